"""Other pyramids: a path back up from the finest map (PAFPN), and levels behind the coarsest by choice.

Path Aggregation Network (Liu et al. 2018), section 3.1; RetinaNet (Lin et al. 2017), section 4.

Shape shorthand:
    B: images     C_i, h_i, w_i: channels, height and width of map i
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from detection.models.norms import NORM_LAYERS, Norm
from detection.models.pyramid import FeaturePyramidNetwork
from detection.recipes import recorded


@recorded
class PathAggregationPyramid(FeaturePyramidNetwork):
    """A feature pyramid with a bottom-up path behind it (PANet, section 3.1), which brings what is fine to the coarse.

    The finest output N_2 is the pyramid's own P_2. Each next one is made of the one before: a 3x3 convolution of stride
    2 brings N_i to half its size, P_{i+1} is added, and a 3x3 convolution fuses the sum into N_{i+1}. A ReLU follows
    each of these convolutions. MMDetection's `PAFPN` has no ReLU, and goes on from the sums, not from the N_i. `pool`
    is made of the coarsest output, as in `FeaturePyramidNetwork`.

    Args:
        in_channels: channels of the maps, finest first; each map is half as fine as the one before.
        out_channels: channels of every output (256 in the paper).
        norm: behind each convolution; None for a bias instead.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256, norm: Norm | None = None) -> None:
        super().__init__(in_channels, out_channels, NORM_LAYERS[norm] if norm else None)
        steps = range(len(in_channels) - 1)
        self.down_blocks = nn.ModuleList(_conv(out_channels, 2, norm) for _ in steps)
        self.fuse_blocks = nn.ModuleList(_conv(out_channels, 1, norm) for _ in steps)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `FeaturePyramidNetwork.forward`."""
        maps = super().forward(features)
        *names, pool = maps
        for finer, name, down, fuse in zip(names, names[1:], self.down_blocks, self.fuse_blocks, strict=False):
            maps[name] = F.relu(fuse(maps[name] + F.relu(down(maps[finer]))))
        maps[pool] = maps[names[-1]][..., ::2, ::2]
        return maps


@recorded
class ChosenLevelsPyramid(FeaturePyramidNetwork):
    """A feature pyramid without `pool`, or with levels by convolution in its place.

    P6 is a 3x3 convolution of stride 2 on the coarsest output, P7 another one on the ReLU of P6 (RetinaNet, section 4).
    RoI poolers leave out the last map by default, which is `pool` else: give them `num_levels`, as many as
    `in_channels`.

    Args:
        in_channels: channels of the maps, finest first.
        out_channels: channels of every output.
        norm: behind each convolution of the pyramid itself; None for a bias instead.
        conv_levels: how many levels are added by convolution: 0 for none, 1 for P6, 2 for P6 and P7.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int = 256, norm: Norm | None = None, conv_levels: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, NORM_LAYERS[norm] if norm else None)
        self.extra_blocks = nn.ModuleDict({f"p{6 + i}": _conv(out_channels, 2)[0] for i in range(conv_levels)})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps `{name: (B, C_i, h_i, w_i)}`, finest first -> `(B, out_channels, h_i, w_i)` by name, then `p6`, `p7`."""
        maps = super().forward(features)
        del maps["pool"]
        level = next(reversed(maps.values()))
        for name, conv in self.extra_blocks.items():
            level = conv(level if name == "p6" else F.relu(level))
            maps[name] = level
        return maps


def _conv(channels: int, stride: int, norm: Norm | None = None) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=norm is None)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, *([NORM_LAYERS[norm](channels)] if norm else []))
