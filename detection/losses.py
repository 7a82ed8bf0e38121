"""The losses of the two stages, each with its normaliser.

Shape shorthand:
    R: sampled anchors or RoIs of the whole batch, some of them not valid (padding)     C: classes with background
All are sums over valid rows divided by the number of valid rows of the batch, foreground and background alike
(Faster R-CNN, equation 2, with N_cls = N_reg and lambda = 1, as torchvision and Detectron2 have it). A batch without
any foreground gives a box loss of exactly 0 that is still connected to the graph.
In training on several processes "the batch" is that of all of them, so that their averaged gradient is that of one
process with the whole batch, however the images are dealt out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from detection.recipes import recorded

EPSILON = 1e-7  # torchvision's, in the denominators of overlaps


def objectness_loss(logits: Tensor, foreground: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy of objectness, equation 1's L_cls of the RPN.

    Args:
        logits: `(R,)`.
        foreground: `(R,)` bool targets.
        valid: `(R,)` bool.
    """
    loss = F.binary_cross_entropy_with_logits(logits.float(), foreground.float(), reduction="none")
    return _mean_of(loss, valid, valid)


def classification_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Softmax cross-entropy over classes (Fast R-CNN, Girshick 2015, section 2.3, L_cls).

    Args:
        logits: `(R, C)`, class 0 is background.
        labels: `(R,)` int64 in `[0, C - 1]`.
        valid: `(R,)` bool.
    """
    return _mean_of(F.cross_entropy(logits.float(), labels, reduction="none"), valid, valid)


def box_loss(deltas: Tensor, gt_deltas: Tensor, foreground: Tensor, valid: Tensor, beta: float = 1 / 9) -> Tensor:
    """Smooth L1 of the deltas of foreground rows, over the number of all valid rows (Fast R-CNN, equations 2 and 3).

    Args:
        deltas: `(R, 4)` predicted.
        gt_deltas: `(R, 4)` wanted; rows that are not foreground may hold anything, NaN included.
        foreground: `(R,)` bool.
        valid: bool, for the normaliser; it may have more rows than R, none of them foreground.
        beta: where the quadratic part ends; 0 is plain L1. 1/9 (from Detectron) is worth 1.2 AP over 1.0.
    """
    wanted = torch.where(foreground[:, None], gt_deltas, 0.0)
    loss = F.smooth_l1_loss(deltas.float(), wanted, beta=beta, reduction="none").sum(dim=1)
    return _mean_of(loss, foreground, valid)


class OverlapLoss:
    """A loss of how predicted and true boxes overlap, to take the place of the smooth L1 of their deltas.

    Args:
        weight: factor on the loss, which is smaller than smooth L1's sum over four deltas.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, boxes: Tensor, gt_boxes: Tensor, foreground: Tensor, valid: Tensor) -> Tensor:
        """As `box_loss`, on boxes `(R, 4)` xyxy float32 in pixels; rows that are not foreground may hold anything."""
        unit = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])  # two equal boxes: no loss, and a gradient that is finite
        pair = [torch.where(foreground[:, None], side, unit) for side in (boxes, gt_boxes)]
        return self.weight * _mean_of(self.of_pairs(*pair), foreground, valid)

    def of_pairs(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """The loss `(R,)` of each pair."""
        raise NotImplementedError


@recorded
class GIoULoss(OverlapLoss):
    """1 - generalised IoU (Rezatofighi et al. 2019, algorithm 1)."""

    def of_pairs(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        iou, union, hull = _overlap(boxes, gt_boxes)
        area = hull.prod(dim=1)
        return 1 - iou + (area - union) / (area + EPSILON)


@recorded
class CIoULoss(OverlapLoss):
    """1 - IoU and penalties on the distance of centres and on the shape (Zheng et al. 2020, equation 10)."""

    def of_pairs(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        iou, _, hull = _overlap(boxes, gt_boxes)
        centres = [(b[:, :2] + b[:, 2:]) / 2 for b in (boxes, gt_boxes)]
        distance = (centres[0] - centres[1]).square().sum(dim=1) / (hull.square().sum(dim=1) + EPSILON)
        angles = [torch.atan((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])) for b in (boxes, gt_boxes)]
        shape = (4 / math.pi**2) * (angles[1] - angles[0]).square()
        with torch.no_grad():  # equation 11, a constant of the optimisation
            trade_off = shape / (1 - iou + shape + EPSILON)
        return 1 - iou + distance + trade_off * shape


def _overlap(boxes: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU `(R,)`, union `(R,)` and sides of the smallest box around both `(R, 2)` of each pair."""
    # torchvision.ops has these losses too, but indexes with a mask, for which an accelerator has to wait.
    low, high = torch.maximum(boxes[:, :2], gt_boxes[:, :2]), torch.minimum(boxes[:, 2:], gt_boxes[:, 2:])
    intersection = (high - low).clamp(min=0).prod(dim=1)
    union = sum((b[:, 2:] - b[:, :2]).prod(dim=1) for b in (boxes, gt_boxes)) - intersection
    hull = torch.maximum(boxes[:, 2:], gt_boxes[:, 2:]) - torch.minimum(boxes[:, :2], gt_boxes[:, :2])
    return intersection / (union + EPSILON), union, hull


def _mean_of(loss: Tensor, counted: Tensor, valid: Tensor) -> Tensor:
    return torch.where(counted, loss, 0.0).sum() / count_over_ranks(valid)


def count_over_ranks(rows: Tensor) -> Tensor:
    """How many of the bool `rows` are True in an average process's share of the batch: float32 scalar, above 0.

    Only where gradients are wanted do the processes meet: in evaluation they may have different numbers of batches.
    """
    count = rows.sum().float()
    if not (torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized()):
        return count.clamp(min=1)
    distributed.all_reduce(count)
    return count.clamp(min=1) / distributed.get_world_size()
