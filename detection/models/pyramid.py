"""Feature pyramid network (Lin et al. 2017, section 3): strong semantics at every resolution.

Shape shorthand:
    B: images     C_i, h_i, w_i: channels, height and width of map i
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from detection.recipes import recorded


@recorded
class FeaturePyramidNetwork(nn.Module):
    """Top-down pathway with lateral connections.

    A 1x1 convolution brings each map to `out_channels`. From the coarsest on, each map is upsampled by nearest
    neighbour and added to the next finer one. A 3x3 convolution smooths each sum. One more level, `pool`, is the
    coarsest output subsampled by 2 (section 4.1, footnote 2), for the RPN's largest anchors.

    Args:
        in_channels: channels of the maps, finest first.
        out_channels: channels of every output (256 in the paper).
        norm_layer: None, or what makes the normalisation behind each convolution.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if out_channels < 1:
            raise ValueError(f"a pyramid needs at least one channel, not {out_channels}: set fpn_channels")
        self.inner_blocks = nn.ModuleList(_conv(c, out_channels, 1, norm_layer) for c in in_channels)
        self.layer_blocks = nn.ModuleList(_conv(out_channels, out_channels, 3, norm_layer) for _ in in_channels)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps `{name: (B, C_i, h_i, w_i)}`, finest first -> `(B, out_channels, h_i, w_i)` by name, and `pool`."""
        maps = list(features.values())
        merged = [self.inner_blocks[-1](maps[-1])]
        for lateral, feature in zip(self.inner_blocks[-2::-1], maps[-2::-1], strict=True):
            fine = lateral(feature)
            merged.insert(0, fine + F.interpolate(merged[0], size=fine.shape[-2:], mode="nearest"))
        smoothed = (block(inner) for block, inner in zip(self.layer_blocks, merged, strict=True))
        outputs = OrderedDict(zip(features, smoothed, strict=True))
        outputs["pool"] = next(reversed(outputs.values()))[..., ::2, ::2]
        return outputs


def _conv(
    in_channels: int, out_channels: int, kernel: int, norm_layer: Callable[[int], nn.Module] | None
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=norm_layer is None)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, *([norm_layer(out_channels)] if norm_layer else []))
