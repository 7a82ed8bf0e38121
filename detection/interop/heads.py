"""Heads as Detectron2 and MMDetection have them: any number of convolutions and of layers, normalised or not.

Shape shorthand:
    R: regions     C: channels     o: side of the pooled features
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from detection.models.norms import NORM_LAYERS, Norm
from detection.recipes import recorded


@recorded
class ConvStack(nn.Sequential):
    """3x3 convolutions, each normalised and rectified: `(R, C, o, o)` -> `(R, channels, o, o)`.

    Args:
        in_channels: C.
        convs: how many.
        norm: behind each; None for a bias instead.
        channels: of each.
    """

    def __init__(self, in_channels: int, convs: int = 4, norm: Norm | None = None, channels: int = 256) -> None:
        blocks = []
        for i in range(convs):
            conv = nn.Conv2d(channels if i else in_channels, channels, 3, padding=1, bias=norm is None)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            blocks.append(nn.Sequential(conv, *([NORM_LAYERS[norm](channels)] if norm else []), nn.ReLU(inplace=True)))
        super().__init__(*blocks)
        self.out_channels = channels if convs else in_channels


@recorded
class ConvLinearHead(nn.Module):
    """A box head of convolutions and fully connected layers: `(R, C, o, o)` -> `(R, out_channels)`.

    Args:
        in_channels: C.
        output_size: o.
        convs, norm: see `ConvStack`.
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
        self.convs = ConvStack(in_channels, convs, norm)
        pixels = self.convs.out_channels * output_size**2
        self.linears = nn.ModuleList(nn.Linear(out_channels if i else pixels, out_channels) for i in range(linears))
        self.out_channels = out_channels if linears else pixels

    def forward(self, pooled: Tensor) -> Tensor:
        rows = self.convs(pooled).flatten(1)
        for linear in self.linears:
            rows = F.relu(linear(rows))
        return rows
