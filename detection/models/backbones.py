"""Backbones: images -> named feature maps with their strides, as a rule behind a feature pyramid.

Those of torchvision's networks are made here, those of timm's in `timm_backbones`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torchvision.models import get_model_weights, list_models, mobilenet_v3_large, resnet
from torchvision.models.resnet import Bottleneck, ResNet

from detection.models.norms import NORM_LAYERS, Norm
from detection.models.timm_backbones import efficientnet_lite0_fpn, timm_fpn
from detection.models.trunks import AnyPyramid, Backbone, Trunk, count_trainable
from detection.recipes import recorded
from detection.weights import Weights, find_weights, is_given

__all__ = ["Backbone", "Norm", "ResNetName", "Trunk", "efficientnet_lite0_fpn", "mobilenet_v3_large_fpn", "resnet_c4",
           "resnet_dc5", "resnet_fpn", "resnet_network", "timm_fpn"]  # fmt: skip

ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
                     "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d", "resnext152_32x8d"]  # fmt: skip


@recorded
def resnet_fpn(
    name: ResNetName = "resnet50",
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    fpn_norm: Norm | None = None,
    out_channels: int = 256,
    stride_in_1x1: bool = False,
    pyramid: AnyPyramid | None = None,
) -> Backbone:
    """A torchvision ResNet (He et al. 2016) with its four stages in a pyramid: strides 4, 8, 16, 32 and 64.

    Args:
        name: torchvision's name of the network. ResNeXt (Xie et al. 2017) has groups in its 3x3 convolutions: 32 of 8
            channels each in the first stage of `resnext101_32x8d`.
        weights: ImageNet weights; see `weights.find_weights`.
        trainable_layers: how many of layer4, layer3, layer2, layer1 and the stem train, counted from the end: 3 with
            weights, 5 (all) without.
        norm: default: frozen statistics with weights, live batch normalisation without. `affine` are frozen ones
            whose scale and shift learn. Both say that weights come from somewhere, if only later, so they also decide
            the default of `trainable_layers`.
        fpn_norm: normalisation inside our pyramid.
        out_channels: of our pyramid.
        stride_in_1x1: see `resnet_network`.
        pyramid: another pyramid in place of ours; see `Backbone`.
    """
    network = resnet_network(name, weights, trainable_layers, norm, stride_in_1x1)
    channels = [network.inplanes // 2**k for k in (3, 2, 1, 0)]
    body = Trunk(dict(network.named_children()), {f"layer{k + 1}": str(k) for k in range(4)})
    return _note(Backbone(body, channels, (4, 8, 16, 32), out_channels, fpn_norm, pyramid), weights)


@recorded
def resnet_c4(
    name: ResNetName = "resnet50",
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    stride_in_1x1: bool = False,
) -> Backbone:
    """A ResNet up to its third stage, without a pyramid: one map of stride 16 with 1024 channels (256 of ResNet-18).

    The fourth stage belongs to the box head, `c4.res5_head` (He et al. 2016, appendix A).
    Arguments as for `resnet_fpn`; `trainable_layers` counts layer4, as if it stood here.
    """
    network = resnet_network(name, weights, trainable_layers, norm, stride_in_1x1)
    body = Trunk(dict(network.named_children()), {"layer3": "0"})
    return _note(Backbone(body, [network.inplanes // 2], (16,), out_channels=None), weights)


@recorded
def resnet_dc5(
    name: ResNetName = "resnet50",
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    stride_in_1x1: bool = False,
    dilate_first: bool = False,
) -> Backbone:
    """A ResNet whose fourth stage is dilated by 2 in place of its stride: one map of stride 16 with 2048 channels.

    Dai et al. 2017 (Deformable ConvNets), section 4.2. The first block of the stage loses its stride of 2. All later
    3x3 convolutions of the stage are dilated by 2, to read the same cells of the image as before. Every second cell of
    the map is then equal to a cell of the undilated network.

    Args:
        name, weights, trainable_layers, norm, stride_in_1x1: see `resnet_fpn`.
        dilate_first: dilate also a 3x3 convolution that had the stride itself, as Detectron2 does.

    Raises:
        ValueError: ResNet-18 and 34, which do not have bottleneck blocks.
    """
    network = resnet_network(name, weights, trainable_layers, norm, stride_in_1x1)
    for index, block in enumerate(network.layer4):
        if not isinstance(block, Bottleneck):
            raise ValueError(f"{name} has no bottleneck blocks to dilate: choose resnet50, resnet101 or resnet152")
        if index > 0 or stride_in_1x1 or dilate_first:
            block.conv2.dilation = block.conv2.padding = (2, 2)
    first = network.layer4[0]
    first.conv1.stride = first.conv2.stride = first.downsample[0].stride = (1, 1)
    body = Trunk(dict(network.named_children()), {"layer4": "0"})
    return _note(Backbone(body, [network.inplanes], (16,), out_channels=None), weights)


def resnet_network(
    name: ResNetName,
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    stride_in_1x1: bool = False,
) -> ResNet:
    """The whole classification network that the backbones above are cut from.

    Args:
        name, weights, trainable_layers, norm: see `resnet_fpn`.
        stride_in_1x1: where a bottleneck block has its stride: in its first 1x1 convolution as in the paper's own
            weights (MSRA; Detectron2's model zoo and MMDetection's "caffe" models), or in the 3x3 one (torchvision).
            The weights have the same shapes either way, and give nonsense in the wrong place.

    Raises:
        ValueError: `stride_in_1x1` for a network without bottleneck blocks.
    """
    pretrained = is_given(weights) or norm in ("frozen", "affine")
    plain, _, grouped = name.replace("resnext", "resnet").partition("_")
    count, width = (grouped or "1x64d").removesuffix("d").split("x")
    make, layer = resnet.__dict__[plain], NORM_LAYERS[norm or ("frozen" if pretrained else "batch")]
    network: ResNet = make(norm_layer=layer, groups=int(count), width_per_group=int(width))
    if is_given(weights):
        network.load_state_dict(find_weights(weights, get_model_weights(name) if name in list_models() else None))
    if stride_in_1x1:
        blocks = [block for block in network.modules() if isinstance(block, Bottleneck)]
        if not blocks:
            raise ValueError(f"{name} has no 1x1 convolutions to put the stride in: leave stride_in_1x1 out")
        for block in blocks:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    groups = [["layer4"], ["layer3"], ["layer2"], ["layer1"], ["conv1", "bn1"]]
    # torchvision trains the stem's normalisation only when everything trains, which the last group says.
    _freeze(network, groups, count_trainable(trainable_layers, pretrained, 5))
    return network


@recorded
def mobilenet_v3_large_fpn(
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    pyramid: AnyPyramid | None = None,
) -> Backbone:
    """MobileNetV3-Large (Howard et al. 2019) with torchvision's two maps: both of stride 32, and the pool of 64.

    Arguments as in `resnet_fpn`; there are 6 groups of layers that can train.
    """
    pretrained = is_given(weights) or norm in ("frozen", "affine")
    network = mobilenet_v3_large(norm_layer=NORM_LAYERS[norm or ("frozen" if pretrained else "batch")])
    if is_given(weights):
        network.load_state_dict(find_weights(weights, get_model_weights("mobilenet_v3_large")))
    layers = network.features
    # The stem and the blocks with a stride begin a stage; the last convolution is a stage of its own.
    starts = [*(i for i, layer in enumerate(layers) if _has_stride(layer)), len(layers) - 1]
    bounds = [*starts, len(layers)]
    groups = [[str(i) for i in range(a, b)] for a, b in zip(bounds[:-1], bounds[1:], strict=True)][::-1]
    _freeze(layers, groups, count_trainable(trainable_layers, pretrained, 6))
    channels = [layers[starts[-2]].out_channels, layers[-1].out_channels]
    body = Trunk(dict(layers.named_children()), {str(starts[-2]): "0", str(starts[-1]): "1"})
    return _note(Backbone(body, channels, (32, 32), pyramid=pyramid), weights)


def _has_stride(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) and module.stride[0] > 1 for module in layer.modules())


def _note(backbone: Backbone, weights: Weights) -> Backbone:
    """Write down what weights decided, as a recipe leaves them out."""
    if is_given(weights):
        backbone.resolved = {"norm": "frozen", "trainable_layers": 3}
    return backbone


def _freeze(network: nn.Module, groups: Sequence[Sequence[str]], trainable: int) -> None:
    """Stop the gradients of all children but those in the first `trainable` groups."""
    training = {name for group in groups[:trainable] for name in group}
    for name, child in network.named_children():
        if name not in training:
            child.requires_grad_(False)
