"""Why a file of weights can't be opened, and what to do about it. Nothing in it is unpickled to find out."""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from typing import Any

START = 200  # bytes that tell what kind of file it is
NO_RUN = (
    "a .safetensors file holds a detector, but not its run, which a .ckpt does: `detection evaluate --ckpt` takes it "
    "with data that is named, --annotations or --root, and `detection fit --weights` begins a run with it"
)


def why_unopened(path: Any, error: Exception) -> str:
    """One sentence on a file that `torch.load` did not read.

    Args:
        path: of the file.
        error: what was raised in reading it without unpickling objects.
    """
    if not isinstance(error, pickle.UnpicklingError):
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"not a whole file of this kind, or not of this version ({reason}); fetch or write it again"
    start = _start(path)
    if start and not start.startswith(pickle.PROTO):
        return f"no file of torch.save, as it begins with {start[:20].decode('latin1')!a}; fetch it again"
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    reason = f"it needs {wanted[1]}" if wanted else "it needs more than tensors and plain values, or is damaged"
    kept = "torch.load(path, weights_only=False)"
    kept = (
        f"torch.save({kept}.state_dict(), new)"
        if _is_of_an_object(start)
        else f'torch.save({kept}["model"], new), where "model" may be "state_dict" or another name'
    )
    return (
        f"not opened, as {reason}, and unpickling objects can run anything. Where the file was made, keep its tensors "
        f"only: {kept}"
    )


def _start(path: Any) -> bytes:
    """The first bytes of the pickle in a file of `torch.save`, or of another file; none where there is no telling."""
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return file.read(START)
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as inside:
                return inside.read(START)
    except Exception:  # a damaged or foreign file may raise anything
        return b""


def _is_of_an_object(start: bytes) -> bool:
    """Whether a pickle is of one object, such as a whole model, rather than of a dictionary."""
    try:
        opcodes = ((code.name, str(argument)) for code, argument, _ in pickletools.genops(start))
        first, argument = next(pair for pair in opcodes if pair[0] not in ("PROTO", "FRAME"))
    except (ValueError, StopIteration):
        return False
    return first in ("GLOBAL", "SHORT_BINUNICODE") and not argument.startswith("collections")
