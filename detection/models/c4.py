"""The box head of detectors without a pyramid: the fourth stage of a ResNet, run on each region.

Faster R-CNN on ResNets (He et al. 2016, appendix A); Mask R-CNN (He et al. 2017), figure 4, left.

Shape shorthand:
    R: regions     C: channels     o: side of the pooled features
"""

from __future__ import annotations

from torch import Tensor, nn

from detection.models.backbones import Norm, ResNetName, resnet_network
from detection.recipes import recorded
from detection.weights import Weights


class Res5Head(nn.Module):
    """The stage, of stride 2, and the average of its output; it goes with `resnet_c4` and 14x14 pooled features.

    Args:
        layer4: the stage.
        out_channels: of its output.
    """

    def __init__(self, layer4: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.layer4 = layer4
        self.out_channels = out_channels

    def forward(self, pooled: Tensor) -> Tensor:
        """`(R, C, o, o)` -> `(R, out_channels)`."""
        return self.layer4(pooled).mean(dim=(2, 3))


class Res5Maps(nn.Module):
    """The same stage without the average, as head of the mask branch: the stage itself belongs to the box head.

    Args:
        head: of the boxes, with which this one shares all its weights.
    """

    def __init__(self, head: Res5Head) -> None:
        super().__init__()
        self._shared = [head]  # in a list, so that its tensors stand in the state_dict once
        self.out_channels = head.out_channels

    def forward(self, pooled: Tensor) -> Tensor:
        """`(R, C, o, o)` -> `(R, out_channels, o / 2, o / 2)`."""
        return self._shared[0].layer4(pooled)


@recorded
def res5_head(
    name: ResNetName = "resnet50",
    weights: Weights = None,
    norm: Norm = "frozen",
    stride_in_1x1: bool = False,
    trainable: bool = True,
) -> Res5Head:
    """The head cut from a ResNet; `trainable` says whether it trains, the rest is as given to `resnet_c4`."""
    network = resnet_network(name, weights, int(trainable), norm, stride_in_1x1)
    return Res5Head(network.layer4, network.inplanes)
