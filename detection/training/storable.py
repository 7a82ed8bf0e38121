"""What checkpoints may hold: tensors and plain values, as they are opened without running code from them.

What a callback, an optimiser or a schedule of the user's own keeps is looked at before training starts, and again with
every file, so that one value does not cost the whole file.
"""

from __future__ import annotations

import io
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from detection.errors import SettingsError

log = logging.getLogger(__name__)

Keys = tuple[str, ...]
PLAIN = (bool, int, float, str, bytes, type(None))
HELD = "checkpoints hold tensors and plain values alone, as they are opened without running code"


def storable(content: Any, path: Keys = ()) -> tuple[Any, dict[Keys, str]]:
    """The content with Python's numbers in the place of NumPy's, and where it holds what could not be read again.

    Args:
        content: of a checkpoint; it stays as it is.
        path: keys that lead to it.

    Returns:
        The very same objects where nothing had to be replaced; and the type of each value that can't be read, by path.
    """
    if isinstance(content, np.generic):
        content = content.item()
    if isinstance(content, Tensor) or type(content) in PLAIN:
        return content, {}
    if type(content) in (dict, OrderedDict):
        keys = [storable(key)[0] for key in content]
        parts = [storable(value, (*path, str(key))) for key, value in content.items()]
        if _differs(keys, content) or _differs((part for part, _ in parts), content.values()):
            content = type(content)(zip(keys, (part for part, _ in parts), strict=True))
    elif type(content) in (list, tuple):
        parts = [storable(value, (*path, str(i))) for i, value in enumerate(content)]
        if _differs((part for part, _ in parts), content):
            content = type(content)(part for part, _ in parts)
    else:
        return content, {} if _is_readable(content) else {path: type(content).__name__}
    return content, {keys: kind for _, found in parts for keys, kind in found.items()}


def without_unreadable(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint that can be read again; what that costs is said in the log.

    A callback whose state can't be read goes without, and begins anew in a run that goes on. Without the state of an
    optimiser or a schedule nothing goes on, but the weights are there.
    """
    whole, problems = storable(dict(checkpoint))
    for path, kind in problems.items():
        if path[0] == "callbacks" and len(path) > 1:
            whole["callbacks"] = {key: state for key, state in whole["callbacks"].items() if str(key) != path[1]}
        else:
            whole.pop(path[0], None)
        log.error(
            "%s is a %s, and is left out of the checkpoint with all that belongs to it: %s", _shown(path), kind, HELD
        )
    return whole


def check_states(trainer: L.Trainer) -> None:
    """Refuse, before training starts, callbacks and schedules whose state no checkpoint could hold.

    Raises:
        SettingsError: it names the first such value.
    """
    states = {
        "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},  # type: ignore[attr-defined]
        "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }
    for path, kind in storable(states)[1].items():
        raise SettingsError(f"{_shown(path)} is a {kind}: {HELD}; keep numbers, text, lists, dictionaries or tensors")


def _shown(path: Keys) -> str:
    return ".".join(path)


def _differs(new: Iterable[Any], old: Iterable[Any]) -> bool:
    return any(a is not b for a, b in zip(new, old, strict=True))


def _is_readable(value: Any) -> bool:
    """Whether it comes back from a file, as some types that PyTorch knows do."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # whatever its own code of pickling raises
        return False
    return True
