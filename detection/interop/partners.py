"""Which box of one detector is which of another's, where both should find the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

NEAR = 1.0  # pixels: partners differ by less
SAME = 0.01  # pixels: rounding moves a box by less
TIED = 1e-5  # of a score: rounding changes it by less
TIES = 0.02  # of the detections of an image, at most


class Partners(NamedTuple):
    """Rows of two sets of boxes that belong together.

    Attributes:
        left, right: the rows of each `(P,)`.
        gaps: the largest difference of a coordinate of each pair, in pixels `(P,)`.
        ties: pairs beside these: of two boxes of equal score NMS kept one here, the other there.
        alone: boxes of both sides that are in no pair.
    """

    left: Tensor
    right: Tensor
    gaps: Tensor
    ties: int
    alone: int


def pair_boxes(a: Tensor, b: Tensor) -> Partners:
    """Boxes `(N, 4)` and `(M, 4)` that are less than a pixel apart, in all as near as can be."""
    gaps = _gaps(a, b)
    left, right = _assign(gaps, gaps < NEAR)
    return Partners(left, right, gaps[left, right], 0, len(a) + len(b) - 2 * len(left))


def pair_detections(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Partners:
    """Detections of one label that are less than a pixel apart, in all as near as can be.

    Where two boxes that overlap have the same score, rounding decides which of them NMS keeps, so two correct
    detectors may keep different ones. Such ties are not compared, as long as they are few: a detector whose boxes are
    all a little off has equal scores, too.

    Args:
        a, b: boxes `(N, 4)` in pixels, labels and scores `(N,)` of an image.
    """
    gaps, overlap = _gaps(a["boxes"], b["boxes"]), box_iou(a["boxes"], b["boxes"])
    possible = a["labels"][:, None] == b["labels"]
    same = _assign(gaps, possible & (gaps < SAME))
    _take(possible, same)
    equal = (a["scores"][:, None] - b["scores"]).abs() < TIED
    ties = _assign(-overlap, possible & equal & (overlap > 0.5))
    if len(ties[0]) > TIES * max(gaps.shape):
        ties = ties[0][:0], ties[1][:0]
    _take(possible, ties)
    near = _assign(gaps, possible & (gaps < NEAR))
    left, right = torch.cat((same[0], near[0])), torch.cat((same[1], near[1]))
    alone = sum(gaps.shape) - 2 * (len(left) + len(ties[0]))
    return Partners(left, right, gaps[left, right], len(ties[0]), alone)


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b).abs().amax(dim=-1)


def _assign(cost: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns of the cheapest pairs among the possible ones, and as many as can be."""
    filled = torch.where(possible, cost, 1e6).double().numpy()
    left, right = (torch.from_numpy(index) for index in linear_sum_assignment(filled))
    kept = possible[left, right]
    return left[kept], right[kept]


def _take(possible: Tensor, pairs: tuple[Tensor, Tensor]) -> None:
    """Each has one partner."""
    possible[pairs[0]] = False
    possible[:, pairs[1]] = False
