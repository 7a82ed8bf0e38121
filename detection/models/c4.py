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
    """A ResNet's fourth stage, of stride 2, and the average of its output over the cells.

    It goes with the backbone `resnet_c4` and pooled features of 14x14.

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
    """The head of the mask branch: the stage of a box head without the average, and with the same weights.

    Args:
        head: the box head, which owns the weights.
    """

    def __init__(self, head: Res5Head) -> None:
        super().__init__()
        self._shared = [head]  # in a list, so that the state_dict has its tensors once
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
