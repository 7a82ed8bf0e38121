"""Double-Head R-CNN (Wu et al. 2020): fully connected layers say what a region is, convolutions where it lies.

Shape shorthand:
    R: regions of all images     C: channels of the maps     o: side of pooled features     K: classes with background
    F: features for the classes     E: features for the boxes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from detection.models.norms import NORM_LAYERS, Norm
from detection.models.roi_heads import TwoFCHead
from detection.recipes import recorded


@recorded
class DoubleHead(nn.Module):
    """The two heads of section 4, side by side: `(R, C, o, o)` -> `(R, F + E)`, for a `DoublePredictor`.

    The fully connected head has two layers. The convolutional one has residual blocks, the first of which widens the
    features and the others are bottlenecks, and a mean over the places. Each head does one task alone: this is the
    paper's "Double-Head", and not its "Double-Head-Ext", where each does both.

    Args:
        in_channels: C.
        output_size: o.
        blocks: residual blocks of the convolutional head, the widening one among them: 5.
        out_channels: F and E alike, 1024 in the paper; a multiple of 4.
        norm: behind each convolution.

    Raises:
        ValueError: no block, or channels that the bottlenecks can't divide.
    """

    def __init__(
        self, in_channels: int, output_size: int = 7, blocks: int = 5, out_channels: int = 1024, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        if blocks < 1 or out_channels % 4:
            raise ValueError(
                f"blocks is {blocks} and out_channels {out_channels}: give at least one block, and a multiple of 4"
            )
        layer = NORM_LAYERS[norm]
        self.fc_head = TwoFCHead(in_channels, output_size, out_channels)
        self.widen = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=False),
            layer(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            layer(out_channels),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), layer(out_channels))
        bottlenecks = (Bottleneck(out_channels, out_channels // 4, norm_layer=layer) for _ in range(blocks - 1))
        self.bottlenecks = nn.Sequential(*bottlenecks)
        self.out_channels = 2 * out_channels

    def forward(self, pooled: Tensor) -> Tensor:
        places = self.bottlenecks(F.relu(self.widen(pooled) + self.shortcut(pooled)))
        return torch.cat((self.fc_head(pooled), places.mean(dim=(2, 3))), dim=1)


@recorded
class DoublePredictor(nn.Module):
    """Class logits from the first half of the features, box deltas from the second.

    `(R, F + E)` -> `(R, K)`, `(R, K * 4)`.

    Args:
        in_channels: F + E, from a `DoubleHead`.
        num_classes: K, with background.
        class_agnostic: see `FastRCNNPredictor`.
    """

    def __init__(self, in_channels: int, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels // 2, num_classes)
        self.bbox_pred = nn.Linear(in_channels // 2, 4 if class_agnostic else num_classes * 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        of_class, of_box = features.chunk(2, dim=1)
        return self.cls_score(of_class), self.bbox_pred(of_box)
