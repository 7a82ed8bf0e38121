"""RoI Align and RoI Pool over a feature pyramid: a fixed grid of features from each region, wherever its level is.

Fast R-CNN (Girshick 2015), section 2.1 (RoI max pooling); Mask R-CNN (He et al. 2017), section 3 (RoIAlign);
FPN (Lin et al. 2017), equation 1 (the level of a region).

Shape shorthand:
    B: images     P: RoIs an image     R = B * P     L: levels     C: channels
    o: output side     s: samples a bin and side     q = o * s: samples a side
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align, roi_pool

from detection.recipes import recorded

CANONICAL_SIZE = 224  # pixels: a region of this size, ImageNet's, belongs to level 4
CANONICAL_LEVEL = 4


def assign_levels(boxes: Tensor, min_level: int, max_level: int) -> Tensor:
    """The pyramid level of boxes `(..., 4)`: floor(4 + log2(sqrt(area) / 224)) clamped, int64 `(...)` (equation 1)."""
    side = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).clamp(min=0).sqrt()
    # The small term lets 112 and 224 pixels, whose logarithm may round down, reach the level that they should.
    level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE) + 1e-6)
    return level.nan_to_num(nan=min_level).clamp(min_level, max_level).long()


def level_indices(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Which of the maps with these strides, finest first, each of the boxes `(..., 4)` is pooled from, `(...)`."""
    min_level, max_level = (int(math.log2(s)) for s in (strides[0], strides[-1]))
    return (assign_levels(boxes, min_level, max_level) - min_level).clamp(max=len(strides) - 1)


class _WeightedSum(torch.autograd.Function):
    """`embedding_bag` whose gradient is one too, over the bins that read each row; it takes half the time of PyTorch's.

    PyTorch's backward adds bin by bin to the rows, in the rows' precision; here each row is summed once, in float32.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Sums `(n, C)` of the rows `(r, C)` that `index` `(n, taps)` names, times `weight` `(n, taps)`."""
        ctx.save_for_backward(index, weight)
        ctx.count = len(rows)
        return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Gradient of the rows; neither the places nor the weights of the samples learn."""
        index, weight = ctx.saved_tensors
        # Half the bits take half the time. Stable, so that a row's sum is the same bits whatever else is in the batch.
        row, order = index.int().flatten().sort(stable=True)
        offsets = torch.searchsorted(row, torch.arange(ctx.count, dtype=torch.int32))
        weights = weight.flatten()[order].to(grad.dtype)
        bins = order // index.shape[1]
        return F.embedding_bag(bins, grad.contiguous(), offsets, mode="sum", per_sample_weights=weights), None, None


@recorded
class RoIPooler(nn.Module):
    """RoI Align of every region on the level that fits its size, with fixed shapes from end to end.

    torchvision's `roi_align` does the work on an accelerator: all levels are laid side by side on one canvas, so that
    one call serves them, and no region has to be looked up by level. On the CPU, where that kernel runs on one
    thread, the same bilinear sums are written as one weighted `embedding_bag` over the rows of all levels.

    Args:
        output_size: o.
        sampling_ratio: s; 0 takes as many samples as a bin has pixels (only with `roi_align`).
        aligned: shift by half a pixel, so that pixel centres lie at .5 (Detectron2); False is torchvision's default.
        num_levels: how many of the finest maps are pooled from (FPN leaves its last, `pool`, to the RPN).
    """

    def __init__(
        self, output_size: int = 7, sampling_ratio: int = 2, aligned: bool = False, num_levels: int = 4
    ) -> None:
        super().__init__()
        self.output_size, self.sampling_ratio = output_size, sampling_ratio
        self.aligned, self.num_levels = aligned, num_levels

    def forward(self, features: Sequence[Tensor], boxes: Tensor, strides: Sequence[int]) -> Tensor:
        """Pool `(B, C, h, w)` maps of strides `strides` at boxes `(B, P, 4)` in image pixels -> `(B * P, C, o, o)`."""
        features, strides = list(features)[: self.num_levels], list(strides)[: self.num_levels]
        boxes = boxes.float().nan_to_num(0.0, 0.0, 0.0)  # `roi_align` reads anywhere in memory for others
        levels = level_indices(boxes, strides)
        scaled = boxes / torch.tensor(strides, dtype=torch.float32, device=boxes.device)[levels][..., None]
        if boxes.device.type == "cpu" and self.sampling_ratio > 0:
            return self._gather(features, scaled, levels)
        return self._align(features, scaled, levels)

    def _align(self, features: Sequence[Tensor], boxes: Tensor, levels: Tensor) -> Tensor:
        """One `roi_align` call on the canvas; boxes `(B, P, 4)` in cells of their level."""
        canvas, origins = build_canvas(features)
        shapes = torch.tensor([(f.shape[-1], f.shape[-2]) for f in features], device=boxes.device)
        boxes, length = boxes.flatten(0, 1), shapes[levels.flatten()]  # (R, 4), (R, 2) as (width, height)
        (_, inside_x), (_, inside_y) = (self._samples(boxes[:, i], boxes[:, i + 2], length[:, i]) for i in (0, 1))
        # A region narrower than a cell at the far edge is widened past it. There `roi_align` reads zeros, but the
        # canvas has a neighbour, so it is moved inside, where all it can read is the last cell, and weighted.
        size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.0 if self.aligned else 1.0)
        start = torch.minimum(boxes[:, :2], length - size) if not self.aligned else boxes[:, :2]
        start = start + torch.tensor(origins, dtype=torch.float32, device=boxes.device)[levels.flatten()]
        image = torch.arange(len(levels), device=boxes.device).repeat_interleave(levels.shape[1])
        rois = torch.cat((image[:, None].to(start), start, start + size), dim=1)
        # In float32, as autocast has it: half precision would move the regions by whole cells.
        pooled = roi_align(canvas.float(), rois, self.output_size, 1.0, self.sampling_ratio, self.aligned)
        shares = [i.float().unflatten(1, (self.output_size, -1)).mean(dim=2) for i in (inside_y, inside_x)]
        return (pooled * shares[0][:, None, :, None] * shares[1][:, None, None, :]).to(canvas.dtype)

    def _gather(self, features: Sequence[Tensor], boxes: Tensor, levels: Tensor) -> Tensor:
        """Weighted sums over rows of the channels-last maps; boxes `(B, P, 4)` in cells of their level."""
        rows = torch.cat([f.permute(0, 2, 3, 1).flatten(0, 2) for f in features])  # (sum of B * h * w, C)
        shapes = torch.tensor([f.shape[-2:] for f in features])
        first_row = torch.tensor([0] + [f.shape[0] * f.shape[2] * f.shape[3] for f in features]).cumsum(0)[levels]
        height, width = shapes[levels].unbind(-1)  # (B, P) each
        image = torch.arange(len(boxes))[:, None]
        start = (first_row + image * height * width).flatten()
        height, width, boxes = height.flatten(), width.flatten(), boxes.flatten(0, 1)
        y, y_weight = self._taps(boxes[:, 1], boxes[:, 3], height)  # (R, o, 2s)
        x, x_weight = self._taps(boxes[:, 0], boxes[:, 2], width)
        row = (start[:, None, None] + y * width[:, None, None])[:, :, None, :, None] + x[:, None, :, None, :]
        weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
        o, taps = self.output_size, 4 * self.sampling_ratio**2
        pooled = _WeightedSum.apply(rows, row.view(-1, taps), weight.view(-1, taps).to(rows.dtype))
        return pooled.view(-1, o, o, rows.shape[1]).permute(0, 3, 1, 2)

    def _samples(self, start: Tensor, end: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Where regions are sampled along one axis of `length` cells `(R,)`, and which samples lie on the map.

        Returns:
            positions in cells `(R, q)` float32, and bool `(R, q)`.
        """
        extent = end - start
        if not self.aligned:  # as `roi_align`: without alignment a region is at least one cell
            extent = extent.clamp(min=1.0)
        count = self.output_size * max(self.sampling_ratio, 1)
        centre = (torch.arange(count, dtype=torch.float32, device=start.device) + 0.5) / count
        position = (start - 0.5 if self.aligned else start)[:, None] + extent[:, None] * centre
        return position, (position >= -1) & (position <= length[:, None])

    def _taps(self, start: Tensor, end: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """The cells that each bin reads along one axis, and their weights.

        Args:
            start, end: `(R,)` edges of the regions in cells.
            length: `(R,)` cells of the axis.

        Returns:
            cells `(R, o, 2s)` int64 and weights `(R, o, 2s)` float32: each of the s samples of a bin lies between two.
        """
        position, inside = self._samples(start, end, length)
        last = (length - 1)[:, None]
        position = position.clamp(min=0)
        low = torch.minimum(position.long(), last)
        high = torch.minimum(low + 1, last)
        fraction = torch.where(low == last, 0.0, position - low)
        share = inside.float() / self.sampling_ratio
        cells = torch.stack((low, high), dim=-1)
        weights = torch.stack(((1 - fraction) * share, fraction * share), dim=-1)
        shape = (len(cells), self.output_size, 2 * self.sampling_ratio)
        return cells.view(shape), weights.view(shape)


@recorded
class RoIPool(nn.Module):
    """RoI max pooling of every region on the level that fits its size, as Fast R-CNN had it (section 2.1).

    A region is rounded to whole cells, both its last cells included, and cut into o x o bins, each of which gives the
    largest value under it; a bin beyond the edge of the map gives 0.

    Args:
        output_size: o.
        num_levels: how many of the finest maps are pooled from.
    """

    def __init__(self, output_size: int = 7, num_levels: int = 4) -> None:
        super().__init__()
        self.output_size, self.num_levels = output_size, num_levels

    def forward(self, features: Sequence[Tensor], boxes: Tensor, strides: Sequence[int]) -> Tensor:
        """Pool `(B, C, h, w)` maps of strides `strides` at boxes `(B, P, 4)` in image pixels -> `(B * P, C, o, o)`."""
        features, strides = list(features)[: self.num_levels], list(strides)[: self.num_levels]
        boxes = boxes.float().nan_to_num(0.0, 0.0, 0.0)
        levels = level_indices(boxes, strides).flatten()
        image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
        pooled = None
        for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
            own = levels == level
            # Regions of other levels take part as a single cell, which costs little and keeps the shapes fixed.
            rois = torch.cat((image[:, None].to(boxes), boxes.flatten(0, 1) * own[:, None]), dim=1)
            part = roi_pool(feature.float(), rois, self.output_size, 1 / stride).to(feature.dtype)
            pooled = part if pooled is None else torch.where(own[:, None, None, None], part, pooled)
        assert pooled is not None
        return pooled


def build_canvas(features: Sequence[Tensor]) -> tuple[Tensor, list[tuple[float, float]]]:
    """All levels on one map: the finest at the left, the others below each other at its right.

    Each keeps a border of one cell on every side that repeats its edge: samples between the last cell and the edge of
    the map read what `roi_align` reads on the level alone.

    Returns:
        canvas `(B, C, H, W)` and the (x, y) of each level's first cell on it.
    """
    padded = [F.pad(f, (1, 1, 1, 1), mode="replicate") for f in features]
    origins = [(1.0, 1.0)]
    if len(padded) == 1:
        return padded[0], origins
    column_width = max(f.shape[-1] for f in padded[1:])
    top = 0
    column = []
    for level in padded[1:]:
        origins.append((padded[0].shape[-1] + 1.0, top + 1.0))
        column.append(F.pad(level, (0, column_width - level.shape[-1], 0, 0)))
        top += level.shape[-2]
    right = torch.cat(column, dim=2)
    height = max(padded[0].shape[-2], right.shape[-2])
    left, right = (F.pad(part, (0, 0, 0, height - part.shape[-2])) for part in (padded[0], right))
    return torch.cat((left, right), dim=3), origins
