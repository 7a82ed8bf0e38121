"""What ends a run or a command, said in one sentence with the way out; a traceback is for bugs."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from detection.data.records import DataError
from detection.devices import smaller_precision
from detection.trust import RecipeError
from detection.weights import CheckpointError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class RunError(RuntimeError):
    """A run that can't start or go on; the message is one sentence with the cause and the way out.

    Attributes:
        on_all_ranks: every rank raises the same, so that one message will do.
    """

    def __init__(self, message: str, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class SettingsError(RunError):
    """Settings that don't go together, or that a resumed run can't take: a mistake in flags or configuration."""


# Whose messages are a sentence with the way out already.
SAY_ENOUGH = (DataError, RunError, CheckpointError, RecipeError, FileNotFoundError, MisconfigurationException)


def blame_disk(path: object, error: OSError) -> str:
    """What the system says of a file or folder that could not be written, as a clause."""
    reasons = {errno.ENOSPC: "is full", errno.EDQUOT: "is over its quota", errno.EROFS: "can only be read"}
    return f"{path} {reasons.get(error.errno or 0, f'can not be written ({error.strerror})')}"


LOWER = "lower data.batch_size or data.max_size"


def explain(error: BaseException) -> str | None:
    """One sentence on what ended a run and what to do, or None for what this code doesn't know: that is a bug.

    Args:
        error: what was raised, with the notes that `Guard` adds to it.
    """
    text, notes = str(error), "; ".join(getattr(error, "__notes__", ()))
    beside = f" ({notes})" if notes else ""
    if isinstance(error, SAY_ENOUGH):
        return _innermost(text)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _matches(
        text, "out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory"
    ):
        asked = re.search(r"allocate ([\d.]+ [KMGT]iB|\d+ bytes)", text)
        return f"out of memory{f' when asked for {asked[1]}' if asked else ''}{beside}: {LOWER}{smaller_precision()}"
    if _matches(text, "Bus error", "unable to (allocate|open|mmap|write|resize)[^:]*(shared memory|</torch_)"):
        return f"the shared memory of this machine is full{beside}: give it more (docker run --shm-size=8g), or {LOWER}"
    if _matches(text, "Too many open files", "items of ancdata"):
        return f"too many files are open{beside}: raise the limit (ulimit -n 4096), or lower data.num_workers"
    if found := re.search(r"DataLoader timed out after (\d+)", text):
        return (
            f"no batch came from the loader's processes for {found[1]} seconds{beside}: look at the storage, or raise "
            "data.timeout where reading takes that long"
        )
    if found := re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (.*)", text):
        why = "" if "was stopped" in beside else "most often the system ran out of memory; lower data.num_workers or "
        return (
            f"the loader's process {found[1]} {found[2].strip(' .')}{beside}: "
            f"{why and why + 'data.batch_size, and '}go on with --resume"
        )
    if _matches(text, "closed by peer", "reset by peer", "Broken pipe", "NCCL.*(remote|timeout|abort)"):
        return "another process of this run has ended, which its own message explains; go on with --resume"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{blame_disk(error.filename or 'the disk', error)}; make room and go on with --resume"
    return None


def unexplained(error: Exception, what: str) -> str:
    """A sentence on settings that a library refuses, of which nothing else is known.

    Args:
        error: that it has raised.
        what: can't be done with these settings, e.g. `can't be built`.
    """
    said = " ".join(str(error).split())
    if isinstance(error, ValueError | MisconfigurationException):
        return said
    return f"these settings {what}: {type(error).__name__}: {said} (JSONARGPARSE_DEBUG=true shows where)"


def complaint(command: Callable[[], object]) -> str | None:
    """Run a command of a script; the sentence on what went wrong, for `sys.exit`. What is a bug is raised."""
    try:
        command()
    except Exception as error:
        if (sentence := explain(error)) is None:
            raise
        return f"error: {sentence}"
    return None


def _matches(text: str, *patterns: str) -> bool:
    return any(re.search(pattern, text) for pattern in patterns)


def _innermost(text: str) -> str:
    """The message, without the traceback that PyTorch's loader puts before it where a worker has raised the error."""
    if "Original Traceback" not in text:
        return text
    last = text.strip().splitlines()[-1]
    return last.partition("Error: ")[2] or last
