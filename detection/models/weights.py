"""Where pretrained weights come from: a file, or torchvision's cache. Nothing is downloaded from here.

Weights are read without unpickling objects (`weights_only`), or from safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchvision.models import WeightsEnum

# A name such as "DEFAULT" or "IMAGENET1K_V1", torchvision's own enumeration member, a path, or None for none.
Weights: TypeAlias = str | Path | WeightsEnum | None


def is_given(weights: Weights) -> bool:
    """Whether weights are wanted at all; "none" says no on a command line."""
    return weights is not None and str(weights).lower() != "none"


def find_weights(weights: Weights, names: type[WeightsEnum] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, or of a named set of weights in torch.hub's cache.

    Args:
        weights: what to load.
        names: torchvision's enumeration of the names that may be given; None when only a file will do.

    Raises:
        ValueError: a name that isn't one of `names`.
        FileNotFoundError: nothing there; the message says where it looked and how to supply the file.
    """
    if isinstance(weights, str) and names is not None and weights in (*names.__members__, "DEFAULT"):
        weights = names[weights]
    if not isinstance(weights, WeightsEnum):
        path = Path(str(weights))
        if path.is_file():
            return read_tensors(path)
        choices = f"one of {', '.join(names.__members__)}, DEFAULT, or " if names is not None else ""
        raise FileNotFoundError(f"no weights at {path}: give {choices}the path of a .pth or .safetensors file")
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights {weights} are not at {path} and nothing is downloaded unasked: fetch {weights.url} on a "
            f"machine with access and put the file there, or give its path instead of the name"
        )
    return read_tensors(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state_dict in a `.safetensors` file, or in a PyTorch file that holds tensors only."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
