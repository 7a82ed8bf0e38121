"""A box head: features of each region -> a vector for it, see `detection.parts.BoxHead`."""

from __future__ import annotations

from torch import Tensor, nn


class MeanHead(nn.Module):
    """The mean over the region and one layer: a hundredth of the weights of two fully connected layers.

    Args:
        in_channels, output_size: from the builder: channels of the maps, and the side of a region's features.
        width: of the vector.
    """

    def __init__(self, in_channels: int, output_size: int, width: int = 128) -> None:
        super().__init__()
        self.layer = nn.Linear(in_channels, width)

    def forward(self, pooled: Tensor) -> Tensor:
        """`(R, C, o, o)` -> `(R, F)`."""
        return self.layer(pooled.mean(dim=(2, 3))).relu()
