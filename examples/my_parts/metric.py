"""A metric of torchmetrics; `model.metrics` takes any that is updated with `(preds, target)` as mAP is."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class CountError(Metric):
    """By how many objects an image's count is wrong, in the mean.

    Args:
        score_thresh: detections above it count.
    """

    wrong: Tensor
    images: Tensor

    def __init__(self, score_thresh: float = 0.5) -> None:
        super().__init__()
        self.score_thresh = score_thresh
        self.add_state("wrong", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[dict[str, Tensor]], target: list[dict[str, Tensor]]) -> None:
        """Add images: `scores` `(D,)` of the detections, `labels` `(N,)` of the objects."""
        for found, truth in zip(preds, target, strict=True):
            self.wrong += ((found["scores"] > self.score_thresh).sum() - len(truth["labels"])).abs()
            self.images += 1

    def compute(self) -> Tensor:
        """The mean."""
        return self.wrong / self.images
