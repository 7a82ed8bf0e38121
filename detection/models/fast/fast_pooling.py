"""RoI Align of all levels in one call: on an accelerator over one canvas, on a CPU as weighted sums of cells.

RoI Pool with a gradient in a fixed order.

Shape shorthand:
    B: images     P: RoIs an image     R = B * P     L: levels     C: channels     H, W: sides of the canvas
    T: cells of all images and levels     o: output side, in bins     s: samples along a side of a bin
    q = o * s: samples along a side of a region     Q = R * o * o: bins     j = 4 * s * s: cells that a bin reads
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detection.kept import table
from detection.models.pooling import RoIPool, RoIPooler, align


class CanvasPooler(RoIPooler):
    """Lays all levels side by side on one canvas, so that one call of `roi_align` pools all regions.

    Boxes must lie inside the image, as those of a detector and of a `Batch` do: beyond a map there is another one.
    """

    def pool(self, maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, levels: Tensor) -> Tensor:
        """As `RoIPooler.pool`."""
        if self.sampling_ratio == 0:  # each region has its own number of samples, and so of those beyond the map
            return super().pool(maps, strides, boxes, levels)
        canvas, origins = build_canvas(maps)
        x, y = zip(*origins, strict=True)
        level = table(self, (tuple(strides), *sides(maps), x, y), boxes.device)[:, levels.flatten()]  # (5, R)
        boxes, length = boxes.flatten(0, 1) / level[0, :, None], level[1:3].T  # (R, 4), (R, 2) as (width, height)
        (_, inside_x), (_, inside_y) = (sample_axis(self, boxes[:, i], boxes[:, i + 2], length[:, i]) for i in (0, 1))
        # `roi_align` widens a narrow region to one cell, at the far edge of a level beyond that edge. On the level
        # alone samples there are 0, but the canvas has another level there. So the region is moved inside, where its
        # samples read the last cell, and each bin is multiplied by the share of its samples that lie on the level.
        size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.0 if self.aligned else 1.0)
        start = torch.minimum(boxes[:, :2], length - size) if not self.aligned else boxes[:, :2]
        start = start + level[3:].T
        image = torch.arange(len(levels), device=boxes.device).repeat_interleave(levels.shape[1])
        rois = torch.cat((image[:, None].to(start), start, start + size), dim=1)
        # In float32, as autocast has it: half precision would move the regions by whole cells.
        pooled = align(canvas.float(), rois, self.output_size, 1.0, self.sampling_ratio, self.aligned)
        shares = [i.float().unflatten(1, (self.output_size, -1)).mean(dim=2) for i in (inside_y, inside_x)]
        return (pooled * shares[0][:, None, :, None] * shares[1][:, None, None, :]).to(canvas.dtype)


class GatherPooler(RoIPooler):
    """Adds up the cells that each bin reads, times their bilinear weights, by one `embedding_bag` over all levels.

    For CPUs, where `roi_align` runs on one thread, and for accelerators that are to give the same bits again: forward
    and backward each sum goes over one list, in its order.
    """

    def pool(self, maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, levels: Tensor) -> Tensor:
        """As `RoIPooler.pool`."""
        if self.sampling_ratio == 0:  # each region has its own number of samples
            return super().pool(maps, strides, boxes, levels)
        counts = [f.shape[0] * f.shape[2] * f.shape[3] for f in maps]
        facts = tuple(strides), tuple(accumulate(counts, initial=0))[:-1], *sides(maps)
        stride, first_row, width, height = table(self, facts, boxes.device)[:, levels.flatten()].int()  # (R,) each
        boxes = boxes.flatten(0, 1) / stride[:, None]
        image = torch.arange(len(levels), dtype=torch.int32, device=boxes.device).repeat_interleave(levels.shape[1])
        start = first_row + image * height * width
        y, y_weight = self._neighbours(boxes[:, 1], boxes[:, 3], height)  # (R, o, 2s)
        x, x_weight = self._neighbours(boxes[:, 0], boxes[:, 2], width)
        o, reads = self.output_size, 4 * self.sampling_ratio**2
        # Both are spread over all cells of a bin first: an operator takes long over rows of four numbers.
        row = _down(start[:, None, None] + y * width[:, None, None])[:, :, None] + _across(x)[:, None]
        weight = _down(y_weight)[:, :, None] * _across(x_weight)[:, None]
        rows = all_cells(maps)
        pooled = _WeightedSum.apply(rows, row.view(-1, reads), weight.view(-1, reads).to(rows.dtype))
        return pooled.view(-1, o, o, rows.shape[1]).permute(0, 3, 1, 2)

    def _neighbours(self, start: Tensor, end: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """The cells that each bin reads along one axis, and their weights. A sample lies between two cells.

        Args:
            start, end: `(R,)` edges of the regions in cells.
            length: `(R,)` cells of the axis.

        Returns:
            cells `(R, o, 2s)` int64 and weights `(R, o, 2s)` float32.
        """
        position, inside = sample_axis(self, start, end, length)
        last = (length - 1)[:, None]
        position = position.clamp(min=0)
        low = torch.minimum(position, last).int()
        high = torch.minimum(low + 1, last)
        fraction = torch.where(low == last, 0.0, position - low)
        share = inside.float() / self.sampling_ratio
        cells = torch.stack((low, high), dim=-1)
        weights = torch.stack(((1 - fraction) * share, fraction * share), dim=-1)
        shape = (len(cells), self.output_size, 2 * self.sampling_ratio)
        return cells.view(shape), weights.view(shape)


def _down(values: Tensor) -> Tensor:
    """Of the rows of a bin `(R, o, n)`: for each of its cells `(R, o, n * n)`."""
    return values.repeat_interleave(values.shape[2], dim=2)


def _across(values: Tensor) -> Tensor:
    """Of the columns of a bin `(R, o, n)`: for each of its cells `(R, o, n * n)`."""
    return values.repeat(1, 1, values.shape[2])


class GatherPool(RoIPool):
    """RoI Pool whose gradient is added up by an index, which PyTorch does in a fixed order on every device.

    torchvision's kernel for accelerators adds in the order in which its threads come, and refuses to be deterministic.
    """

    def pool(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        """As `RoIPool.pool`."""
        feature, o = feature.float().contiguous(), self.output_size
        with torch.no_grad():
            _, cell = torch.ops.torchvision.roi_pool(feature, rois, 1 / stride, o, o)  # (R, C, o, o), -1 for none
        channels, cells = feature.shape[1], feature.shape[2] * feature.shape[3]
        channel = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)  # (R, C)
        values = feature.flatten()[channel[..., None, None] * cells + cell.clamp(min=0)]
        return torch.where(cell >= 0, values, 0.0)


class _WeightedSum(torch.autograd.Function):
    """`embedding_bag` with another backward pass, which takes half the time of PyTorch's.

    The gradient of a row is the weighted sum over the bins that read it, and so an `embedding_bag` too. It adds up in
    float32, where PyTorch's backward pass adds bin by bin in the precision of the rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Sums `(Q, C)` of the rows `(T, C)` that `index` `(Q, j)` names, each times its `weight` `(Q, j)`."""
        ctx.save_for_backward(index, weight)
        ctx.count = len(rows)
        return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The gradient `(T, C)` of the rows; index and weight have none, as regions are detached."""
        index, weight = ctx.saved_tensors
        # As int32 sorting takes half the time. It is stable, so that the bits of a row's sum do not depend on the rest
        # of the batch.
        row, order = index.int().flatten().sort(stable=True)
        offsets = torch.searchsorted(row, torch.arange(ctx.count, dtype=torch.int32, device=row.device))
        weights = weight.flatten()[order].to(grad.dtype)
        bins = order // index.shape[1]
        return F.embedding_bag(bins, grad.contiguous(), offsets, mode="sum", per_sample_weights=weights), None, None


def all_cells(maps: Sequence[Tensor]) -> Tensor:
    """The cells of all images and levels one below the other, `(T, C)`: by level, then image, row and column."""
    return torch.cat([f.permute(0, 2, 3, 1).flatten(0, 2) for f in maps])


def sides(maps: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and heights."""
    return tuple(f.shape[3] for f in maps), tuple(f.shape[2] for f in maps)


def sample_axis(pooler: RoIPooler, start: Tensor, end: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Where regions are sampled along one axis of `length` cells `(R,)`, and which samples lie on the map.

    Returns:
        positions in cells `(R, q)` float32, and bool `(R, q)`.
    """
    extent = end - start
    if not pooler.aligned:  # as `roi_align`: without alignment a region is at least one cell
        extent = extent.clamp(min=1.0)
    count = pooler.output_size * max(pooler.sampling_ratio, 1)
    centre = (torch.arange(count, dtype=torch.float32, device=start.device) + 0.5) / count
    position = (start - 0.5 if pooler.aligned else start)[:, None] + extent[:, None] * centre
    return position, (position >= -1) & (position <= length[:, None])


def build_canvas(features: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """All levels on one map: the finest on the left, the others on its right, one below the other.

    Each level has a border of one cell that repeats its edge. So a sample between the last cell and the edge of the
    level reads what `roi_align` reads on the level alone.

    Returns:
        canvas `(B, C, H, W)` and the (x, y) of each level's first cell on it.
    """
    padded = [F.pad(f, (1, 1, 1, 1), mode="replicate") for f in features]
    origins = [(1, 1)]
    if len(padded) == 1:
        return padded[0], origins
    column_width = max(f.shape[-1] for f in padded[1:])
    top = 0
    column = []
    for level in padded[1:]:
        origins.append((padded[0].shape[-1] + 1, top + 1))
        column.append(F.pad(level, (0, column_width - level.shape[-1], 0, 0)))
        top += level.shape[-2]
    right = torch.cat(column, dim=2)
    height = max(padded[0].shape[-2], right.shape[-2])
    left, right = (F.pad(part, (0, 0, 0, height - part.shape[-2])) for part in (padded[0], right))
    return torch.cat((left, right), dim=3), origins
