"""What backbones are made of: the layers of a network that give maps, and a pyramid on them.

Shape shorthand:
    B: images     C: channels     h, w: cells of a map
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detection.fitting import finish
from detection.measuring import measure
from detection.models.norms import NORM_LAYERS, Norm
from detection.models.pyramid import FeaturePyramidNetwork

AnyPyramid = Callable[[list[int]], nn.Module] | nn.Module  # a factory or an object, see detection.parts.Pyramid


class Trunk(nn.ModuleDict):
    """The leading layers of a classification network, of which some outputs are kept.

    Args:
        layers: the network's children in order, by name.
        outputs: layer name -> name of the feature map; layers behind the last one are dropped.
    """

    def __init__(self, layers: Mapping[str, nn.Module], outputs: Mapping[str, str]) -> None:
        names = list(layers)
        last = max(names.index(name) for name in outputs)
        super().__init__(OrderedDict((name, layers[name]) for name in names[: last + 1]))
        self.outputs = dict(outputs)
        self.checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what each layer reads for the backward pass, and compute the rest again there (timm's name)."""
        self.checkpointing = enable

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(B, 3, H, W)` -> `{name: (B, C, h, w)}`, finest first."""
        maps = {}
        for name, layer in self.items():
            again = self.checkpointing and torch.is_grad_enabled()
            images = checkpoint(layer, images, use_reentrant=False) if again else layer(images)
            if name in self.outputs:
                maps[self.outputs[name]] = images
        return maps


class Backbone(nn.Module):
    """A trunk and the pyramid on it.

    Args:
        body: images -> named maps, finest first.
        in_channels: channels of those maps.
        strides: pixels between neighbouring cells of those maps.
        out_channels: channels of every map of our pyramid; None for no pyramid, the trunk's maps as they are.
        fpn_norm: normalisation inside our pyramid, None for none.
        pyramid: another pyramid in place of ours, or its factory; see `detection.parts.Pyramid`. It has channels and
            levels of its own, which one run on a blank image shows.

    Attributes:
        in_channels: channels of the trunk's maps.
        out_channels: channels of every map that the backbone gives.
        strides: pixels between neighbouring cells of every map that the backbone gives.
        resolved: values that a builder chose because it had weights. A recipe has no weights, so it has these values.

    Raises:
        ValueError: the pyramid's maps don't fit together; the message says why.
    """

    def __init__(
        self,
        body: nn.Module,
        in_channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int | None = 256,
        fpn_norm: Norm | None = None,
        pyramid: AnyPyramid | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.in_channels = tuple(in_channels)
        self.out_channels = in_channels[-1] if out_channels is None else out_channels
        self.strides = tuple(strides)
        self.resolved: dict[str, Any] = {}
        self.fpn: nn.Module = nn.Identity()
        if pyramid is not None:
            self.fpn = finish("pyramid", pyramid, list(in_channels))
            self.strides, self.out_channels = measure(self)
        elif out_channels is not None:
            self.fpn = FeaturePyramidNetwork(in_channels, out_channels, NORM_LAYERS[fpn_norm] if fpn_norm else None)
            self.strides = (*strides, 2 * strides[-1])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(B, 3, H, W)` -> `{name: (B, out_channels, h, w)}`, finest first, our pyramid's `pool` last."""
        return self.fpn(self.body(images))


def count_trainable(layers: int | None, pretrained: bool, groups: int, default: int = 3) -> int:
    """How many groups of layers train: as told, else `default` with pretrained weights and all without."""
    layers = (default if pretrained else groups) if layers is None else layers
    if not 0 <= layers <= groups:
        raise ValueError(f"trainable_backbone_layers must be from 0 to {groups}, not {layers}")
    return layers
