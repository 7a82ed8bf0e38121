"""Heads as Detectron2 and MMDetection have them: any number of convolutions and of layers, normalised or not.

Shape shorthand:
    R: regions     C: channels     o: side of the pooled features
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from detection.models.masks import MaskHead
from detection.models.norms import Norm
from detection.recipes import recorded


@recorded
class ConvLinearHead(nn.Module):
    """A box head of convolutions and fully connected layers: `(R, C, o, o)` -> `(R, out_channels)`.

    Args:
        in_channels: C.
        output_size: o.
        convs: how many, of 256 channels each.
        norm: behind each; None for a bias instead.
        linears: how many layers follow.
        out_channels: of each.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int = 7,
        convs: int = 4,
        linears: int = 1,
        norm: Norm | None = None,
        out_channels: int = 1024,
    ) -> None:
        super().__init__()
        self.convs = MaskHead(in_channels, [256] * convs, norm)
        pixels = self.convs.out_channels * output_size**2
        self.linears = nn.ModuleList(nn.Linear(out_channels if i else pixels, out_channels) for i in range(linears))
        self.out_channels = out_channels if linears else pixels

    def forward(self, pooled: Tensor) -> Tensor:
        rows = self.convs(pooled).flatten(1)
        for linear in self.linears:
            rows = F.relu(linear(rows))
        return rows
