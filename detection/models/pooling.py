"""RoI Align and RoI Pool over a feature pyramid: a grid of o x o features from each region, whatever its size.

Fast R-CNN (Girshick 2015), section 2.1 (RoI max pooling); Mask R-CNN (He et al. 2017), section 3 (RoIAlign);
FPN (Lin et al. 2017), equation 1 (the level of a region).

Shape shorthand:
    B: images     P: RoIs an image     R = B * P     L: levels     C: channels
    h, w: cells of a level     o: output side, in bins     s: samples along a side of a bin
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool

from detection.parts import FeatureMaps
from detection.recipes import recorded

CANONICAL_SIZE = 224  # pixels: a region of this size, ImageNet's, belongs to level 4
CANONICAL_LEVEL = 4


def assign_levels(boxes: Tensor, min_level: int, max_level: int) -> Tensor:
    """The pyramid level of boxes `(..., 4)`: floor(4 + log2(sqrt(area) / 224)) clamped, int64 `(...)` (equation 1)."""
    side = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).clamp(min=0).sqrt()
    # The logarithm of 112 or 224 pixels may be rounded down, to the level below; the small term prevents it.
    level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE) + 1e-6)
    return level.nan_to_num(nan=min_level).clamp(min_level, max_level).long()


def level_indices(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """The map that each of the boxes `(..., 4)` is pooled from, as an index into the strides, `(...)` int64."""
    min_level, max_level = (int(math.log2(s)) for s in (strides[0], strides[-1]))
    return (assign_levels(boxes, min_level, max_level) - min_level).clamp(max=len(strides) - 1)


@recorded
class RoIPooler(nn.Module):
    """RoI Align of every region on the level that fits its size.

    Args:
        output_size: o.
        sampling_ratio: s; 0 takes as many samples as a bin has cells.
        aligned: shift by half a pixel, so that pixel centres lie at .5 (Detectron2); False is torchvision's default.
        num_levels: how many of the finest maps are pooled from. None is one if there is one, else all but the last,
            which FPN adds for the RPN alone (section 4.1, footnote 2).
    """

    def __init__(
        self, output_size: int = 7, sampling_ratio: int = 2, aligned: bool = False, num_levels: int | None = None
    ) -> None:
        super().__init__()
        self.output_size, self.sampling_ratio = output_size, sampling_ratio
        self.aligned, self.num_levels = aligned, num_levels

    def forward(self, features: FeatureMaps, boxes: Tensor) -> Tensor:
        """Pool the maps at boxes `(B, P, 4)` in image pixels -> `(B * P, C, o, o)`."""
        maps, strides = finest(features, self.num_levels)
        boxes = boxes.float().nan_to_num(0.0, 0.0, 0.0)  # with infinite ones `roi_align` reads outside of its input
        return self.pool(maps, strides, boxes, level_indices(boxes, strides))

    def pool(self, maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, levels: Tensor) -> Tensor:
        """As `forward`, where the maps are chosen, the boxes finite, and `levels` `(B, P)` names the map of each."""

        def pool(feature: Tensor, rois: Tensor, stride: int) -> Tensor:
            # In float32, as autocast has it: half precision would move the regions by whole cells.
            return align(feature.float(), rois, self.output_size, 1 / stride, self.sampling_ratio, self.aligned)

        return pool_by_level(pool, maps, strides, boxes, levels)


@recorded
class RoIPool(nn.Module):
    """RoI max pooling of every region on the level that fits its size, as Fast R-CNN had it (section 2.1).

    A region is rounded to whole cells, first and last included, and divided into o x o bins. Each bin gives the largest
    value of its cells, and 0 if it lies beyond the edge of the map.

    Args:
        output_size: o.
        num_levels: as for `RoIPooler`.
    """

    def __init__(self, output_size: int = 7, num_levels: int | None = None) -> None:
        super().__init__()
        self.output_size, self.num_levels = output_size, num_levels

    def forward(self, features: FeatureMaps, boxes: Tensor) -> Tensor:
        """Pool the maps at boxes `(B, P, 4)` in image pixels -> `(B * P, C, o, o)`."""
        maps, strides = finest(features, self.num_levels)
        boxes = boxes.float().nan_to_num(0.0, 0.0, 0.0)
        return pool_by_level(self.pool, maps, strides, boxes, level_indices(boxes, strides))

    def pool(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        """One map at regions that belong to it; arguments as those of the `pool` of `pool_by_level`."""
        return roi_pool(feature.float(), rois, self.output_size, 1 / stride)


def align(
    feature: Tensor, rois: Tensor, side: int, scale: float, sampling_ratio: int = 0, aligned: bool = False
) -> Tensor:
    """Torchvision's `roi_align` of a map `(B, C, h, w)` at rois `(R, 5)` -> `(R, C, side, side)`.

    Under deterministic algorithms torchvision leaves its kernel on an accelerator for a form that holds all samples in
    memory. Only the kernel's gradient adds up in any order, so where there is none the kernel is right.
    """
    if feature.requires_grad and torch.is_grad_enabled():
        return roi_align(feature, rois, side, scale, sampling_ratio, aligned)
    return torch.ops.torchvision.roi_align(feature, rois, scale, side, side, sampling_ratio, aligned)


def finest(features: FeatureMaps, num_levels: int | None) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The `num_levels` finest maps and their strides; None is one if there is one, else all but the last."""
    count = max(1, len(features.maps) - 1) if num_levels is None else num_levels
    return features.maps[:count], features.strides[:count]


def pool_by_level(
    pool: Callable[[Tensor, Tensor, int], Tensor],
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    levels: Tensor,
) -> Tensor:
    """Pool every region from the map of its own level.

    Args:
        pool: a map `(B, C, h, w)`, rois `(R, 5)` as (image, x1, y1, x2, y2) in image pixels, stride -> `(R, C, o, o)`.
        maps, strides: of the levels.
        boxes: `(B, P, 4)` in image pixels.
        levels: `(B, P)`, which of the maps is each box's.
    """
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(boxes.shape[:2]).reshape(-1, 1)
    image, level = image.to(boxes), levels.reshape(-1, 1)
    pooled = torch.zeros((), dtype=maps[0].dtype, device=boxes.device)
    for i, (feature, stride) in enumerate(zip(maps, strides, strict=True)):
        own = level == i
        # Regions of other levels take part as a single cell, which costs little and keeps the shapes fixed.
        part = pool(feature, torch.cat((image, boxes.flatten(0, 1) * own), dim=1), stride).to(feature.dtype)
        pooled = torch.where(own[..., None, None], part, pooled)
    return pooled
