"""How images are resized: by torchvision's rule, or by those of the libraries that weights come from.

The libraries differ in rounding the sides, by a pixel, and in the filter. Detectron2 has Pillow, which averages
what it shrinks; torchvision and MMDetection take two neighbours of each pixel, however far those lie apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Resizing = Literal["torchvision", "detectron2", "mmdetection"]
ONE = 2048  # a weight of 1 in OpenCV's fixed point


def resized_size(
    height: int, width: int, min_size: int, max_size: int, resizing: Resizing = "torchvision"
) -> tuple[int, int]:
    """The size rule: the short side becomes `min_size` unless the long side would exceed `max_size`.

    Args:
        height, width: of the image.
        min_size, max_size: see above.
        resizing: torchvision rounds down, the others to the nearest, halves up.

    Returns:
        `(height, width)`, each at least 1 pixel.
    """
    scale = min(min_size / min(height, width), max_size / max(height, width))
    half = 0.0 if resizing == "torchvision" else 0.5
    if resizing == "detectron2":  # in two steps, as there: the last bit decides which side of a half it is
        scale = min_size / min(height, width)
        sides = [scale * height, scale * width]
        sides[0 if height < width else 1] = float(min_size)
        if max(sides) > max_size:
            scale = max_size / max(sides)
            sides = [side * scale for side in sides]
        return max(1, int(sides[0] + half)), max(1, int(sides[1] + half))
    return max(1, int(height * scale + half)), max(1, int(width * scale + half))


def resize_into(image: NDArray[Any], planes: NDArray[Any], resizing: Resizing = "torchvision") -> None:
    """Resize `(h, w, C)` into `(C, H, W)`, which may be a part of something larger.

    Bilinear without antialiasing, as torchvision's detectors do it, within one grey level (OpenCV works in fixed
    point), without another copy. Detectron2's is Pillow's, level for level; of 16-bit images, which Pillow can't
    resize, it is the same filter in floating point.
    """
    height, width = planes.shape[1:]
    for source, plane in zip(cv2.split(image), planes, strict=True):
        if resizing != "detectron2":
            cv2.resize(source, (width, height), dst=plane, interpolation=cv2.INTER_LINEAR)
        elif source.dtype == np.uint8:
            plane[:] = Image.fromarray(source).resize((width, height), Image.Resampling.BILINEAR)
        else:
            levels = torch.from_numpy(source.astype(np.float32))[None, None]
            plane[:] = averaged(levels, (height, width))[0, 0].numpy().astype(source.dtype)


def resize_tensor(image: Tensor, min_size: int, max_size: int, resizing: Resizing = "torchvision") -> Tensor:
    """An image `(C, h, w)`, float in [0, 1], on its own device; see `resized_size` for the rest.

    torchvision keeps fractions of grey levels, the others see whole levels of 8 bits.
    """
    height, width = image.shape[-2:]
    if resizing == "torchvision":
        scale = min(min_size / min(height, width), max_size / max(height, width))
        return F.interpolate(
            image[None], scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=True
        )[0]
    size = resized_size(height, width, min_size, max_size, resizing)
    levels = image[None] * 255
    if resizing == "detectron2":
        return averaged(levels, size)[0] / 255
    return F.interpolate(levels, size, mode="bilinear", align_corners=False)[0].round() / 255


def averaged(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, C, h, w)` levels by Pillow's filter: along rows, then along columns, to whole levels each time."""
    for sides in ((levels.shape[2], size[1]), size):
        levels = F.interpolate(levels, sides, mode="bilinear", align_corners=False, antialias=True)
        levels = (levels + 0.5).floor()  # halves up, as Pillow
    return levels


def resize_as_opencv(
    images: Tensor, old: Tensor, new: tuple[int, int], divide: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """uint8 `(B, 3, H, W)` as `(B, 3, *new)` int32: bilinear in the fixed point of `cv2.resize`, as data is loaded.

    Args:
        images: of one size.
        old: that size, two float64.
        new: height and width.
        divide: whole numbers, none below 0, by another, rounded down; a graph has an operator of its own for it.
    """
    left, right, a0, a1 = _taps(old[1], images.shape[3], new[1])
    alone = left == right  # beyond the edge, where OpenCV rounds once along rows, but twice along columns
    a0, a1 = torch.where(alone, ONE, a0), torch.where(alone, 0, a1)
    pixels = images.int()
    across = divide(pixels.index_select(3, left) * a0 + pixels.index_select(3, right) * a1, 16)
    upper, lower, b0, b1 = _taps(old[0], images.shape[2], new[0])
    parts = [divide(across.index_select(2, i) * b[:, None], 65536) for i, b in ((upper, b0), (lower, b1))]
    return divide(parts[0] + parts[1] + 2, 4)


def _taps(old: Tensor, size: int, new: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each of `new` pixels along a side the two of the old ones it is made of, and their weights in 2048ths."""
    place = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    first = place.floor()
    share = place - first
    left, right = ((first.long() + i).clamp(0, size - 1) for i in (0, 1))
    return left, right, ((1 - share) * ONE).round().int(), (share * ONE).round().int()
