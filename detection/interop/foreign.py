"""What lies in the files of other libraries: tensors by name, whatever the file's form, and where torchvision's are."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torchvision.models import get_weight

from detection.interop.pickles import read_pickle, read_without_objects
from detection.weights import CheckpointError, cache_path, find_state, read_safetensors, read_torch

PIXELS = "pixels"  # entry of a file for Detectron2 beside its tensors, which says what its pixels are


def fetch_weights(name: str) -> Path:
    """Download a named set of torchvision's weights into its cache, unless they are there; the path of the file.

    Args:
        name: e.g. `"FasterRCNN_ResNet50_FPN_Weights.COCO_V1"`.

    Raises:
        CheckpointError: no such name, no connection, or a wrong checksum; the message says how to do without.
    """
    try:
        weights = get_weight(name)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"torchvision has no weights {name}: give e.g. ResNet50_Weights.DEFAULT") from error
    path = cache_path(weights)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        published = torch.hub.HASH_REGEX.search(path.name)
        try:
            torch.hub.download_url_to_file(weights.url, str(path), published[1] if published else None, progress=False)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{weights.url} can't be fetched ({error}): fetch it on a machine with access and put it at {path}"
            ) from error
    return path


def read_foreign(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict of any of the files, and its `meta`."""
    if source.suffix == ".safetensors":
        tensors, facts = read_safetensors(source)
        if facts:
            raise CheckpointError("written by this project already: load_detector reads it")
        with safe_open(source, framework="pt") as file:
            pixels = json.loads((file.metadata() or {}).get(PIXELS, "{}"))
        return tensors | _statistics(pixels), {}
    content = read_pickle(source) if source.suffix == ".pkl" else _read_pth(source)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds {type(content).__name__}, not a state_dict")
    meta = content.get("meta")
    state = {
        name: torch.from_numpy(np.array(value)) if isinstance(value, (np.ndarray, np.generic)) else value
        for name, value in find_state(content, source).items()
    }
    return state | _statistics(content.get(PIXELS)), dict(meta) if isinstance(meta, Mapping) else {}


def _read_pth(source: Path) -> Any:
    try:
        return read_torch(source)
    except CheckpointError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        try:
            return read_without_objects(source)
        except CheckpointError:
            raise error from error.__cause__


def _statistics(pixels: Any) -> dict[str, Tensor]:
    """What stands beside the tensors of a file that this project wrote for Detectron2, as `read_style` wants it."""
    named = pixels if isinstance(pixels, Mapping) else {}
    return {name: torch.tensor(value) for name, value in named.items() if name in ("pixel_mean", "pixel_std")}
