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
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detection.kept import table
from detection.models.fast.fast_pooling import all_cells, sides
from detection.models.fast.linear import linear
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
    reach = len(head.conv)  # cells that the convolutions see to each side
    hidden, exists = _patches(maps, *_cells(head, anchors // per_cell, maps), reach)
    for layer in head.conv:
        conv: Any = layer[0]  # type: ignore[index]
        # Beyond the edge of a map a convolution reads zeros. The one before it gave something else there: its bias.
        hidden, exists = F.relu(_convolve(hidden, conv.weight, conv.bias)), exists[..., 1:-1, 1:-1]
        hidden = hidden * exists
    logits, deltas = head.read(hidden)  # (R, k, 1, 1) and (R, k * 4, 1, 1)
    which = (anchors % per_cell).flatten()[:, None]
    logits = logits.flatten(1).gather(1, which).view(anchors.shape)
    deltas = deltas.flatten(1).unflatten(1, (-1, 4)).gather(1, which[..., None].expand(-1, -1, 4))
    return logits, deltas.view(*anchors.shape, 4)


def _convolve(patches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Patches `(R, C, n, n)` by a weight `(C, C, 3, 3)`: `(R, C, n - 2, n - 2)`, for n = 3 as a product of matrices.

    A kernel of convolutions, and still more that of its gradient, has one cell of each patch to work on at a time.
    """
    if patches.shape[-1] > 3:
        return F.conv2d(patches, weight, bias)
    rows, columns = (cells.permute(0, 2, 3, 1).flatten(1) for cells in (patches, weight))
    return linear(rows, columns, bias)[..., None, None]


def _cells(head: RPNHead, cells: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Where cells `(B, S)` are that are numbered through all levels, finest first.

    Returns:
        The map of each, `(4, B, S)` int64: its height, its width, its first row in `all_cells`, and its first cell
        among those of one image; and the row and column in that map, `(2, B, S)`.
    """
    widths, heights = sides(maps)
    first = tuple(accumulate((h * w for h, w in zip(heights, widths, strict=True)), initial=0))[:-1]
    facts = table(head, (heights, widths, tuple(len(maps[0]) * n for n in first), first), cells.device)
    level = facts[:, torch.bucketize(cells, facts[3, 1:], right=True)]
    within = cells - level[3]
    return level, torch.stack((within // level[1], within % level[1]))


def _patches(maps: Sequence[Tensor], level: Tensor, place: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """A patch around each of the cells, `(R, C, n, n)`, and which of its cells lie on the map, bool `(R, 1, n, n)`.

    Args:
        maps: `(B, C, h, w)` of each level.
        level, place: of each cell, see `_cells`.
        reach: cells to each side, n = 2 * reach + 1.
    """
    height, width, first = level[:3, ..., None, None]  # (B, S, 1, 1)
    steps = torch.arange(-reach, reach + 1, device=place.device)
    row, column = place[0, ..., None, None] + steps[:, None], place[1, ..., None, None] + steps
    exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)  # (B, S, n, n)
    image = torch.arange(len(place[0]), device=place.device)[:, None, None, None]
    cell = torch.where(exists, first + (image * height + row) * width + column, 0).flatten(0, 1)
    exists = exists.flatten(0, 1)[:, None]
    return F.embedding(cell, all_cells(maps)).permute(0, 3, 1, 2) * exists, exists
