"""A backbone: images -> feature maps, see `detection.parts.BackbonePart`."""

from __future__ import annotations

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three maps of one width. Strides and channels are not declared, so they are measured on a blank image.

    Args:
        width: channels of each map, a multiple of 8.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(halve(3, width), halve(width, width))
        self.stages = nn.ModuleList(halve(width, width) for _ in range(3))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images `(B, 3, H, W)` -> maps `(B, C, h, w)` by name, finest first."""
        maps, features = {}, self.stem(images)
        for name, stage in enumerate(self.stages):
            features = stage(features)
            maps[str(name)] = features
        return maps


def halve(in_channels: int, out_channels: int) -> nn.Sequential:
    """A layer that gives half as many cells in each direction."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, out_channels), nn.ReLU())
