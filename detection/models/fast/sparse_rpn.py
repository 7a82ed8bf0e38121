"""The RPN whose head has a backward pass over the sampled anchors alone.

Only sampled anchors have a loss, so the gradient of all others is 0. Yet the backward pass of the plain head goes over
all cells, a sixth of the arithmetic of a training step. Here the head runs over all cells without a gradient, for the
proposals, and then, with a gradient, over a patch around the cell of each sampled anchor. The results are the same.

Shape shorthand:
    B: images     C: channels     h, w: cells of a level     k: anchors a cell     A: anchors of all levels
    S: sampled anchors of an image     R = B * S     n: side of a patch, in cells
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detection.models.rpn import RegionProposalNetwork, RPNHead
from detection.parts import FeatureMaps


class SparseRPN(RegionProposalNetwork):
    """A `RegionProposalNetwork` whose head is a plain `RPNHead`."""

    head: RPNHead

    def predict(self, features: FeatureMaps, with_losses: bool) -> tuple[list[Tensor], list[Tensor]]:
        """As the plain network, but without a gradient where `take` will give it."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not with_losses):
            return super().predict(features, with_losses)

    def take(self, features: FeatureMaps, objectness: Tensor, deltas: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """As the plain network, from patches around the sampled anchors."""
        return head_at(self.head, features.maps, sampled)


def head_at(head: RPNHead, maps: Sequence[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor]:
    """What the head gives for some of the anchors: logits `(B, S)` and deltas `(B, S, 4)`.

    Args:
        head: of the RPN.
        maps: `(B, C, h, w)` of each level.
        anchors: `(B, S)` int64 into A.
    """
    per_cell = head.bbox_pred.out_channels // 4
    shapes = [(feature.shape[-2], feature.shape[-1]) for feature in maps]
    level, row, column = _cells(anchors // per_cell, shapes)
    reach = len(head.conv)  # cells that the convolutions see to each side
    hidden, exists = _patches(maps, shapes, level, row, column, reach)
    for layer in head.conv:
        conv: Any = layer[0]  # type: ignore[index]
        # Beyond the edge of a map a convolution reads zeros. The one before it gave something else there: its bias.
        hidden, exists = F.relu(F.conv2d(hidden, conv.weight, conv.bias)), exists[..., 1:-1, 1:-1]
        hidden = hidden * exists
    logits, deltas = head.read(hidden)  # (R, k, 1, 1) and (R, k * 4, 1, 1)
    which = (anchors % per_cell).flatten()[:, None]
    logits = logits.flatten(1).gather(1, which).view(anchors.shape)
    deltas = deltas.flatten(1).unflatten(1, (-1, 4)).gather(1, which[..., None].expand(-1, -1, 4))
    return logits, deltas.view(*anchors.shape, 4)


def _patches(
    maps: Sequence[Tensor], shapes: Sequence[tuple[int, int]], level: Tensor, row: Tensor, column: Tensor, reach: int
) -> tuple[Tensor, Tensor]:
    """A patch around each of the cells, `(R, C, n, n)`, and which of its cells lie on the map, bool `(R, 1, n, n)`.

    Args:
        maps: `(B, C, h, w)` of each level.
        shapes: `(h, w)` of each level.
        level, row, column: `(B, S)` int64 of each cell.
        reach: cells to each side, n = 2 * reach + 1.
    """
    steps = torch.arange(-reach, reach + 1, device=row.device)
    rows, columns = row[..., None] + steps, column[..., None] + steps  # (B, S, n)
    patches, exists = maps[0].new_zeros(()), torch.zeros(1, dtype=torch.bool, device=row.device)
    for i, (feature, (height, width)) in enumerate(zip(maps, shapes, strict=True)):
        inside = [(place >= 0) & (place < size) for place, size in ((rows, height), (columns, width))]
        own = (inside[0][..., :, None] & inside[1][..., None, :]) & (level == i)[..., None, None]  # (B, S, n, n)
        image = torch.arange(len(feature), device=row.device)[:, None, None, None]
        cell = (image * height + rows[..., :, None]) * width + columns[..., None, :]
        values = F.embedding(torch.where(own, cell, 0).flatten(0, 1), feature.permute(0, 2, 3, 1).flatten(0, 2))
        own = own.flatten(0, 1)[..., None]  # (R, n, n, 1)
        patches, exists = patches + values * own, exists | own
    return patches.permute(0, 3, 1, 2), exists.permute(0, 3, 1, 2)


def _cells(cells: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Level, row and column, each `(B, S)`, of cells `(B, S)` that are numbered through all levels, finest first."""
    counts = [height * width for height, width in shapes]
    starts = torch.tensor([0, *counts], device=cells.device).cumsum(0)
    level = torch.bucketize(cells, starts[1:-1], right=True)
    within = cells - starts[level]
    width = torch.tensor([width for _, width in shapes], device=cells.device)[level]
    return level, within // width, within % width
