"""Losses of each sampled region, see `ClassificationLoss` and `BoxLoss` in `detection.parts`."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from detection.parts import BoxCoderPart


class SmoothedCrossEntropy:
    """Cross-entropy that wants no class to be certain.

    Args:
        smoothing: what is taken from the true class, and shared by all.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        self.smoothing = smoothing

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `(R, K)`, labels `(R,)` -> `(R,)`."""
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction="none")


class LogCoshLoss:
    """log cosh of what is wrong with the deltas: quadratic near 0, then linear, without a bend.

    Args:
        scale: of the loss.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, box_coder: BoxCoderPart) -> Tensor:
        """Deltas `(R, 4)` of boxes `(R, 4)`, against ground truth `(R, 4)` -> `(R,)`."""
        wrong = (deltas - box_coder.encode(gt_boxes, boxes)).abs()
        return self.scale * (wrong + F.softplus(-2 * wrong) - math.log(2)).sum(dim=1)
