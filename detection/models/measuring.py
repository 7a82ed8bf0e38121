"""Strides and channels of a backbone that declares none, read off the maps of a blank image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def measure(backbone: nn.Module, side: int = 256) -> tuple[tuple[int, ...], int]:
    """Find the strides and the number of channels of a backbone's maps by one run on a blank image.

    The image is twice as wide as high: how many cells the second half adds gives the stride, whatever a network cuts
    off at the borders. Modes, gradients, batch statistics and random state stay as they are.

    Args:
        backbone: images `(1, 3, H, W)` -> `{name: (1, C, h, w)}`, finest first.
        side: width of the image in pixels. Strides that divide half of it are found exactly; none can be larger.

    Returns:
        Pixels between neighbouring cells of each map, and the channels that all maps have.

    Raises:
        ValueError: it is no backbone; the message says why.
    """
    name, size = type(backbone).__name__, (side // 2, side)
    with torch.no_grad(), _undisturbed(backbone):
        try:
            maps = backbone(_blank(backbone, size))
        except Exception as error:
            raise ValueError(
                f"{name} is no backbone: it can't take an image of {size[0]} x {size[1]} pixels: {error}"
            ) from error
    if not isinstance(maps, Mapping) or not maps:
        raise ValueError(
            f'{name} is no backbone: it gives {type(maps).__name__}, not a dictionary of maps; return {{"0": map}}'
        )
    for key, found in maps.items():
        if not isinstance(found, Tensor) or found.ndim != 4:
            kind = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{name} is no backbone: {key} is {kind}, not a map (B, C, h, w)")
    channels = {key: found.shape[1] for key, found in maps.items()}
    if len(set(channels.values())) > 1:
        raise ValueError(
            f"{name} is no backbone: all maps need the same number of channels, not {channels}; put a pyramid on it"
        )
    strides = {key: _stride(f"{name} is no backbone: {key}", found, size) for key, found in maps.items()}
    if list(strides.values()) != sorted(strides.values()):
        raise ValueError(f"{name} is no backbone: maps must come finest first, but their strides are {strides}")
    return tuple(strides.values()), next(iter(channels.values()))


def _stride(name: str, found: Tensor, size: tuple[int, int]) -> int:
    """Pixels between the cells of a map `(1, C, h, w)` of an image of this size."""
    cells, pixels = found.shape[3] - found.shape[2], size[1] - size[0]
    stride = round(pixels / cells) if cells > 0 else 0
    if stride < 1 or abs(cells * stride - pixels) >= stride:
        raise ValueError(
            f"{name} has {found.shape[2]} x {found.shape[3]} cells for {size[0]} x {size[1]} pixels, so it has no "
            "stride that is the same in both directions"
        )
    return stride


def _blank(backbone: nn.Module, size: tuple[int, int]) -> Tensor:
    """A blank image where the backbone's weights are, and in their precision."""
    held = (t for t in chain(backbone.parameters(), backbone.buffers()) if t.is_floating_point())
    like = next(held, None)
    if like is None:
        return torch.zeros(1, 3, *size)
    return torch.zeros(1, 3, *size, device=like.device, dtype=like.dtype)


@contextmanager
def _undisturbed(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's mode and the random state are as before."""
    modes = [(module, module.training) for module in backbone.modules()]
    devices = {p.device.index for p in backbone.parameters() if p.device.type == "cuda"}
    backbone.eval()
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for module, training in modes:
            module.training = training
