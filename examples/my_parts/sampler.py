"""A sampler: which regions of an image train, see `detection.parts.Sampler`."""

from __future__ import annotations

import torch
from torch import Tensor

from detection.parts import Hardness


class HardBackground:
    """Any foreground, filled up with the background that has the largest loss.

    Args:
        size: regions of an image.
        share: at most this share of them is foreground.
    """

    def __init__(self, size: int = 64, share: float = 0.25) -> None:
        self.size, self.max_positive = size, int(size * share)

    def __call__(self, labels: Tensor, hardness: Hardness) -> tuple[Tensor, Tensor]:
        """Labels `(B, A)`: above 0 foreground, 0 background, below 0 never -> indices and valid, each `(B, S)`."""
        count = labels.shape[1]
        lot = torch.where(labels > 0, torch.rand(labels.shape, device=labels.device), -1.0)
        drawn, foreground = lot.topk(min(self.max_positive, count))
        rank = torch.where(labels == 0, hardness().float(), -1.0)  # losses are not below 0
        rank = rank.scatter(1, foreground, torch.where(drawn >= 0, torch.inf, rank.gather(1, foreground)))
        value, indices = rank.topk(min(self.size, count))
        return indices, value >= 0
