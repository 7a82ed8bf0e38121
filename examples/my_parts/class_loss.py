"""A loss of each region's class, see `detection.parts.ClassificationLoss`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
