"""A head of the region proposal network: maps -> objectness and deltas, see `detection.parts.RPNHeadPart`."""

from __future__ import annotations

from torch import Tensor, nn


class DepthwiseHead(nn.Module):
    """Looks at 5x5 cells of each channel by itself, where the usual head mixes 3x3 cells of all channels.

    Args:
        in_channels, num_anchors: from the builder: channels of the maps, and anchors a cell.
    """

    def __init__(self, in_channels: int, num_anchors: int) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(in_channels, in_channels, 5, padding=2, groups=in_channels), nn.ReLU())
        self.logits = nn.Conv2d(in_channels, num_anchors, 1)
        self.deltas = nn.Conv2d(in_channels, 4 * num_anchors, 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps `(B, C, h, w)` of each level -> logits `(B, k, h, w)` and deltas `(B, k * 4, h, w)` of each."""
        seen = [self.look(features) for features in maps]
        return [self.logits(x) for x in seen], [self.deltas(x) for x in seen]
