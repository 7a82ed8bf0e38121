"""The losses of the two stages: each gives a loss a row, and `mean_over` divides their sum.

Shape shorthand:
    R: sampled anchors or regions of the whole batch, some of them not valid (padding)     K: classes with background
    B: images     S: sampled regions of an image
    m: side of a mask
Sums go over valid rows and are divided by the number of valid rows of the batch, foreground and background alike
(Faster R-CNN, equation 1, with N_cls = N_reg and lambda = 1, as torchvision and MMDetection have it). Masks are divided
by the number of foreground regions. Detectron2 does likewise in the heads, but divides the RPN's losses by the rows
asked for, `batch_size_per_image * B`, whether there are so many or not: where all are there they are equal, else ours
are larger by `batch_size_per_image * B / valid`. A batch without any foreground gives a box loss of exactly 0 that is
still connected to the graph.
In training on several processes the batch is that of all of them together, where the others divide by the counts of
each process. So the mean of their gradients is the
gradient that one process would have on the whole batch, whichever images each process has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from detection.parts import BoxCoderPart
from detection.recipes import rebuildable, recorded

EPSILON = 1e-7  # torchvision's, in the denominators of overlaps
NOTHING = 30.0  # below others, a logit has no part in a softmax; below 0, none in a sigmoid


@rebuildable
def objectness_loss(logits: Tensor, is_object: Tensor) -> Tensor:
    """Binary cross-entropy of logits `(R,)` against 1.0 for objects, 0.0 for background `(R,)` -> `(R,)`.

    Faster R-CNN, equation 1, L_cls.
    """
    return F.binary_cross_entropy_with_logits(logits, is_object, reduction="none")


@rebuildable
def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy of logits `(R, K)` against labels `(R,)`, 0 for background -> `(R,)`.

    Fast R-CNN (Girshick 2015), section 2.3, L_cls.
    """
    return F.cross_entropy(logits, labels, reduction="none")


@rebuildable
def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean binary cross-entropy over the pixels of logits `(R, m, m)` against masks `(R, m, m)` in [0, 1] -> `(R,)`.

    Mask R-CNN (He et al. 2017), section 3, L_mask.
    """
    return F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(dim=(1, 2))


@recorded
class FocalLoss:
    """Cross-entropy that counts what is classified well for less (Lin et al. 2017, RetinaNet, equation 4).

    Of the softmax over classes: -(1 - p)^gamma log p of the true class.

    Args:
        gamma: 0 is plain cross-entropy; 2 in the paper.
        weight: factor on the loss. The larger gamma, the smaller is the loss; a weight above 1 makes up for it.
    """

    def __init__(self, gamma: float = 2.0, weight: float = 1.0) -> None:
        self.gamma, self.weight = gamma, weight

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `(R, K)`, labels `(R,)` -> `(R,)`."""
        log_p = logits.log_softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
        # 1 - p, never 0, where gamma below 1 would have an infinite slope
        return -self.weight * (-torch.expm1(log_p)).clamp(min=EPSILON) ** self.gamma * log_p


@recorded
class ClassWeights(nn.Module):
    """Cross-entropy with a factor for each class.

    Args:
        weights: K factors, the background's first. The sum is divided by the number of regions, not by their weights.
    """

    weights: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights), persistent=False)  # a setting, not learned

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `(R, K)`, labels `(R,)` -> `(R,)`.

        Raises:
            ValueError: there are not as many weights as classes.
        """
        if len(self.weights) != logits.shape[1]:
            raise ValueError(f"{len(self.weights)} class weights for {logits.shape[1]} classes, background included")
        return F.cross_entropy(logits, labels, self.weights, reduction="none")


@recorded
class SmoothL1Loss:
    """Smooth L1 of the deltas, summed over the four (Fast R-CNN, equations 2 and 3).

    Args:
        beta: where the quadratic part ends; 0 is plain L1. 1/9 (from Detectron) is worth 1.2 AP over 1.0.
    """

    def __init__(self, beta: float = 1 / 9) -> None:
        self.beta = beta

    def __call__(self, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, box_coder: BoxCoderPart) -> Tensor:
        """Deltas `(R, 4)` of boxes `(R, 4)`, against ground truth `(R, 4)` -> `(R,)`."""
        wanted = box_coder.encode(gt_boxes, boxes)
        return F.smooth_l1_loss(deltas, wanted, beta=self.beta, reduction="none").sum(dim=1)


@recorded
class BalancedL1Loss:
    """L1 whose small errors weigh more than in smooth L1, summed over the four (Libra R-CNN, Pang et al. 2019).

    Equation 10, whose slope is equation 9: alpha * ln(b |x| + 1) below 1 and gamma from there on. b follows from
    equation 11, alpha * ln(b + 1) = gamma, so that the slope has no jump, and C is what lets the loss have none.

    Args:
        alpha: the smaller, the larger are the slopes of small errors (0.5 in the paper).
        gamma: slope of errors of 1 and more, which bounds the gradient (1.5 in the paper).

    Raises:
        ValueError: one of them is not above 0.
    """

    def __init__(self, alpha: float = 0.5, gamma: float = 1.5) -> None:
        if alpha <= 0 or gamma <= 0:
            raise ValueError(f"alpha is {alpha} and gamma {gamma}: both must be above 0")
        self.alpha, self.gamma = alpha, gamma

    def __call__(self, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, box_coder: BoxCoderPart) -> Tensor:
        """As `SmoothL1Loss`."""
        error = (deltas - box_coder.encode(gt_boxes, boxes)).abs()
        b = math.expm1(self.gamma / self.alpha)
        inner = error.clamp(max=1)  # or the logarithm of what is not taken could be infinite
        small = self.alpha / b * (b * inner + 1) * torch.log1p(b * inner) - self.alpha * inner
        return torch.where(error < 1, small, self.gamma * error + self.gamma / b - self.alpha).sum(dim=1)


class OverlapLoss:
    """Base of losses on the overlap of refined and true boxes, in the place of the smooth L1 of their deltas.

    Args:
        weight: factor on the loss. An overlap gives smaller losses than smooth L1, which sums over four deltas.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, box_coder: BoxCoderPart) -> Tensor:
        """As `SmoothL1Loss`."""
        return self.weight * self.of_pairs(box_coder.decode(deltas, boxes), gt_boxes)

    def of_pairs(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """The loss `(R,)` of each pair of boxes `(R, 4)` xyxy float32 in pixels."""
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


def mean_over(loss: Tensor, counted: Tensor, valid: Tensor) -> Tensor:
    """The sum of the losses of counted rows, divided by the number of valid rows, see `count_over_ranks`: a scalar.

    Args:
        loss: `(R,)`; rows that are not counted may hold anything, NaN included.
        counted: `(R,)` bool, e.g. the foreground.
        valid: bool, of any shape, e.g. all sampled regions.
    """
    return torch.where(counted, loss, 0.0).sum() / count_over_ranks(valid)


def sampled_rows(foreground: Tensor, valid: Tensor) -> Tensor:
    """The anchors by whose number the RPN divides its losses, bool of any shape: those that were sampled.

    Args:
        foreground, valid: `(B, S)` bool.
    """
    return valid


def merge_unlabelled(logits: Tensor, labels: Tensor, labelled: Tensor | None) -> Tensor:
    """Class logits by which background means no more than is known: none of the classes that were looked for.

    In the rows of background, the classes that were not looked for in the image go into the background: its logit
    becomes the logarithm of the sum of theirs and its own. So any loss sees the probability of "background, or an
    object that nobody looked for", and no gradient sets one against the other. (Merely to leave the classes out would
    still raise the background's logit where such an object is; on drawn images that had 39.1 AP in place of 42.0.)
    The rows of foreground stay as they are: an object of one class is of no other, whether it was looked for or not;
    else classes that are never looked for in the same image would never be told apart.

    Args:
        logits: `(B, S, K)` float32.
        labels: `(B, S)`, 0 for background.
        labelled: `(B, K - 1)` bool, see `Batch`; None for all.
    """
    if labelled is None:
        return logits
    unknown = _unknown(labels, labelled)
    background = torch.arange(logits.shape[-1], device=logits.device) == 0
    merged = logits.masked_fill(~(unknown | background), -torch.inf).logsumexp(dim=-1, keepdim=True)
    # Next to nothing, for a softmax as for a sigmoid, and yet finite, which a loss of smoothed labels needs.
    nothing = merged.detach().clamp(max=0) - NOTHING
    return torch.where(background, merged, torch.where(unknown, nothing, logits))


def class_loss_of_rows(
    class_loss: Callable[..., Tensor], logits: Tensor, labels: Tensor, valid: Tensor, labelled: Tensor | None
) -> Tensor:
    """A `ClassificationLoss` of each row, `(R,)`, R = B * S. Rows that are not valid have a loss of no meaning.

    To a loss that reads its logits by `probabilities` of its own, classes that were not looked for are not there in the
    rows of background; to the others they are background, see `merge_unlabelled`.

    Args:
        class_loss: see `parts.ClassificationLoss`.
        logits: `(B, S, K)` of any precision.
        labels: `(B, S)`, 0 for background.
        valid: `(B, S)` bool.
        labelled: `(B, K - 1)` bool, see `Batch`; None for all.
    """
    logits = logits.float()
    if not hasattr(class_loss, "probabilities"):
        logits = merge_unlabelled(logits, labels, labelled)
    elif labelled is not None:
        logits = torch.where(_unknown(labels, labelled), -NOTHING, logits)
    more = (valid.flatten(),) if getattr(class_loss, "wants_valid", False) else ()
    return class_loss(logits.flatten(0, 1), labels.flatten(), *more)


def class_probabilities(class_loss: Any, logits: Tensor) -> Tensor:
    """Probabilities `(..., K)` of class logits `(..., K)`: the loss says how its logits are read, else by a softmax."""
    read: Callable[..., Tensor] | None = getattr(class_loss, "probabilities", None)
    return logits.float().softmax(dim=-1) if read is None else read(logits.float())


def _unknown(labels: Tensor, labelled: Tensor) -> Tensor:
    """Which logits of which rows are of classes that nobody looked for, in background, `(B, S, K)`."""
    return F.pad(~labelled, (1, 0))[:, None] & (labels == 0)[..., None]


def box_loss_of_foreground(
    box_loss: Callable[..., Tensor],
    deltas: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    foreground: Tensor,
    box_coder: BoxCoderPart,
) -> Tensor:
    """A `BoxLoss` of each row, `(R,)`. Rows that are not foreground may hold anything, and have a loss of no meaning.

    Args:
        box_loss: see `parts.BoxLoss`.
        deltas, boxes, gt_boxes, box_coder: its arguments.
        foreground: `(R,)` bool.
    """
    # The others get two equal boxes and deltas of 0, whose loss and gradient are finite.
    unit = (torch.arange(4, device=boxes.device) >= 2).to(boxes.dtype)  # 0, 0, 1, 1
    pair = (torch.where(foreground[:, None], side, unit) for side in (boxes, gt_boxes))
    return box_loss(torch.where(foreground[:, None], deltas.float(), 0.0), *pair, box_coder)


def count_over_ranks(rows: Tensor) -> Tensor:
    """How many of the bool `rows` are True, as a mean over the processes: a float32 scalar above 0.

    The processes exchange their counts only where gradients are wanted. In evaluation they may have different numbers
    of batches, and one would wait for ever.
    """
    count = rows.sum().float()
    if not (torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized()):
        return count.clamp(min=1)
    return sum_over_ranks(count).clamp(min=1) / distributed.get_world_size()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor of each process, in place; all of them must call it."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values
