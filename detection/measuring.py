"""Strides and channels of a backbone that declares none, read off the maps of a blank image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from detection.fitting import PartError, expect, name_of, trial

SIDE = 64  # pixels of the blank image on which a detector is checked


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
        PartError: it is no backbone; the message says why.
    """
    strides, channels = measure_each(backbone, side)
    if len(set(channels)) > 1:
        raise PartError(
            f"{type(backbone).__name__} is no backbone: all its maps need the same number of channels, not {channels}; "
            "put a pyramid on it"
        )
    return strides, channels[0]


def measure_each(body: nn.Module, side: int = 256) -> tuple[tuple[int, ...], list[int]]:
    """As `measure`, for maps with different numbers of channels, as a pyramid takes them."""
    size = side // 2, side
    maps, name = run_blank(body, size), f"{type(body).__name__} is no backbone"
    strides = {key: _stride(f"{name}: {key}", found, size) for key, found in maps.items()}
    if list(strides.values()) != sorted(strides.values()):
        raise PartError(f"{name}: maps must come finest first, but their strides are {strides}")
    return tuple(strides.values()), [found.shape[1] for found in maps.values()]


def check_maps(backbone: nn.Module, maps: Mapping[str, Tensor], strides: Sequence[int], channels: int) -> None:
    """Refuse maps of a square blank image that are not what the backbone declares.

    Args:
        backbone: what gave them.
        maps: by name, of an image of `SIDE` pixels.
        strides, channels: declared.

    Raises:
        PartError: see above.
    """
    name = name_of(backbone)
    if not isinstance(maps, Mapping):
        raise PartError(f'backbone: {name} gave {type(maps).__name__}, not a dictionary of maps; return {{"0": map}}')
    if len(maps) != len(strides):
        raise PartError(f"backbone: {name} gave {len(maps)} maps, but declares the strides {tuple(strides)}")
    for key, found in maps.items():
        expect("backbone", backbone, f"map {key}", found, (1, channels, "h", "w"))
    # A network that cuts off borders has fewer cells; its strides are measured on more than one image.
    if any(found.shape[3] != -(-SIDE // stride) for found, stride in zip(maps.values(), strides, strict=True)):
        real = measure(backbone)[0]
        if real != tuple(strides):
            raise PartError(f"backbone: {name} declares the strides {tuple(strides)}, but its maps have {real}")


def run_blank(body: nn.Module, size: tuple[int, int]) -> dict[str, Tensor]:
    """The maps of one blank image of this height and width; a PartError where there are none."""
    name = f"{type(body).__name__} is no backbone"
    with trial(body):
        try:
            maps = body(_blank(body, size))
        except Exception as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise PartError(f"{name}: it can't take an image of {size[0]} x {size[1]} pixels: {said}") from error
    if not isinstance(maps, Mapping) or not maps:
        raise PartError(f'{name}: it gives {type(maps).__name__}, not a dictionary of maps; return {{"0": map}}')
    for key, found in maps.items():
        if not isinstance(found, Tensor) or found.ndim != 4:
            kind = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise PartError(f"{name}: {key} is {kind}, not a map (B, C, h, w)")
    return dict(maps)


def _stride(name: str, found: Tensor, size: tuple[int, int]) -> int:
    """Pixels between the cells of a map `(1, C, h, w)` of an image of this size."""
    cells, pixels = found.shape[3] - found.shape[2], size[1] - size[0]
    stride = round(pixels / cells) if cells > 0 else 0
    if stride < 1 or abs(cells * stride - pixels) >= stride:
        raise PartError(
            f"{name} has {found.shape[2]} x {found.shape[3]} cells for {size[0]} x {size[1]} pixels, so it has no "
            "stride that is the same in both directions"
        )
    return stride


def _blank(backbone: nn.Module, size: tuple[int, int]) -> Tensor:
    """A blank image where the backbone's weights are, and in their precision."""
    held = (t for t in chain(backbone.parameters(), backbone.buffers()) if t.is_floating_point())
    like = next(held, None)
    return torch.zeros(1, 3, *size) if like is None else like.new_zeros(1, 3, *size)
