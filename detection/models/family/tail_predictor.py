"""A box predictor for long tails: rare classes begin low, and no class scores high by the length of its weights.

Shape shorthand:
    R: regions     F: features of a region     K: classes with background
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.models.roi_heads import FastRCNNPredictor
from detection.recipes import recorded


class CosineLinear(nn.Linear):
    """A linear layer of unit features and unit weights: `temperature` * cosine + bias, `(R, F)` -> `(R, K)`.

    The normalised linear activation of seesaw loss (Wang et al. 2021).
    """

    def __init__(self, in_features: int, out_features: int, temperature: float) -> None:
        super().__init__(in_features, out_features)
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(self.temperature * F.normalize(features, dim=1), F.normalize(self.weight, dim=1), self.bias)


@recorded
class TailPredictor(FastRCNNPredictor):
    """`FastRCNNPredictor` for losses of long tails; the names and shapes of its weights are the same.

    Args:
        in_channels, num_classes, class_agnostic: as there.
        prior: the probability that each class has in the beginning, for losses of one sigmoid a class: with 0.5 the
            wrong classes, hundreds of them, would be the whole loss of the first steps. Column 0 begins at 0.5.
        temperature: logits are this times the cosine of features and weights; 20 in the paper; None for a plain layer.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        class_agnostic: bool = False,
        prior: float | None = None,
        temperature: float | None = None,
    ) -> None:
        super().__init__(in_channels, num_classes, class_agnostic)
        if temperature is not None:
            self.cls_score = CosineLinear(in_channels, num_classes, temperature)
        if prior is not None:
            start = torch.full((num_classes,), math.log(prior / (1 - prior)))
            self.cls_score.bias = nn.Parameter(F.pad(start[1:], (1, 0)))
