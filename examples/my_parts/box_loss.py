"""A loss of each region's box, see `detection.parts.BoxLoss`."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from detection.parts import BoxCoderPart


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
