"""A box head: features of each region -> a vector for it, see `detection.parts.BoxHead`."""

from __future__ import annotations

from torch import Tensor, nn


class SqueezeHead(nn.Module):
    """Few channels, but each place of the region: far fewer weights than the usual head has.

    Args:
        in_channels, output_size: from the builder: channels of the maps, and the side of a region's features.
        width: of the vector.
    """

    def __init__(self, in_channels: int, output_size: int, width: int = 128) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(in_channels, 16, 1), nn.ReLU())
        self.layer = nn.Linear(16 * output_size**2, width)

    def forward(self, pooled: Tensor) -> Tensor:
        """`(R, C, o, o)` -> `(R, F)`."""
        return self.layer(self.squeeze(pooled).flatten(1)).relu()
