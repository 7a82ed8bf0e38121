"""Builders of the usual detectors, with torchvision's names, arguments and `state_dict` keys.

`num_classes` counts the background, as torchvision's does. Unlike torchvision, no builder downloads anything:
`weights_backbone` is None unless said otherwise.

A builder that only fixes arguments of another one is `rebuildable`: the recipe is the other one's. An argument whose
default differs from that of the function behind a builder is in the builder's own signature. The command line passes
every argument that it finds, with its default; it would find that of the function behind, if the argument was in
`**kwargs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from detection.mask_grid import TorchvisionMaskGrid
from detection.models.backbones import (
    Norm,
    ResNetName,
    efficientnet_lite0_fpn,
    mobilenet_v3_large_fpn,
    resnet_fpn,
    timm_fpn,
)
from detection.models.compose import COCO_CATEGORIES, cascade_rcnn, faster_rcnn, mask_branch
from detection.models.masks import MaskHead, MaskPredictor
from detection.models.roi_heads import ConvFCHead, FastRCNNPredictor
from detection.models.rpn import RPNHead
from detection.models.trunks import AnyPyramid
from detection.models.two_stage import TwoStageDetector
from detection.parts import Factory, Factory2
from detection.pretrained import load_weights
from detection.recipes import rebuildable, recorded
from detection.weights import Weights, is_given

HALF = (0.5, 0.5, 0.5)  # brings images to [-1, 1], as the packaged weights of EfficientNet-Lite0 want them


@recorded
def fasterrcnn_resnet_fpn(
    *,
    backbone_name: ResNetName = "resnet18",
    weights: Weights = None,
    published: str | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    fpn_norm: Norm | None = None,
    pyramid: AnyPyramid | None = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Faster R-CNN on a ResNet of any depth with a pyramid (Lin et al. 2017).

    Args:
        backbone_name: torchvision's name of the network.
        weights: of the whole detector: a file, or a name of `published`, whose file lies in torchvision's cache.
        published: torchvision's enumeration of the weights that have names, `"FasterRCNN_ResNet50_FPN_Weights"`.
        class_names: of the foreground. Where `weights` are of other classes that have names, those of the same name
            keep what was learned of them, and the rest starts afresh.
        num_classes: classes with background; default 91.
        weights_backbone: ImageNet weights: `"IMAGENET1K_V1"`, `"IMAGENET1K_V2"`, a file, or None.
        trainable_backbone_layers: 0 to 5, counted from layer4; default 3 with weights, all without.
        norm: of the backbone; default `frozen` with weights, live `batch` without.
        fpn_norm: of the pyramid.
        pyramid: another pyramid in place of ours, see `trunks.Backbone`.
        **kwargs: see `faster_rcnn`.
    """
    norms: Any = {"norm": _norm(norm, weights), "fpn_norm": fpn_norm}
    backbone = resnet_fpn(backbone_name, weights_backbone, trainable_backbone_layers, **norms, pyramid=pyramid)
    model = faster_rcnn(backbone, _count(num_classes, class_names), **kwargs)
    return load_weights(model, weights_backbone, weights, published, class_names)


@rebuildable
def fasterrcnn_resnet50_fpn(**kwargs: Any) -> TwoStageDetector:
    """Torchvision's v1 detector, COCO AP 37.0: see `fasterrcnn_resnet_fpn`; `weights` may be `"COCO_V1"`."""
    published = "FasterRCNN_ResNet50_FPN_Weights"
    return fasterrcnn_resnet_fpn(backbone_name="resnet50", published=published, **kwargs)


@rebuildable
def fasterrcnn_resnet101_fpn(**kwargs: Any) -> TwoStageDetector:
    """Faster R-CNN with ResNet-101-FPN, published COCO AP 39.4 (61.2 / 43.4): see `fasterrcnn_resnet_fpn`."""
    return fasterrcnn_resnet_fpn(backbone_name="resnet101", published=None, **kwargs)


@rebuildable
def fasterrcnn_resnet50_fpn_v2(
    *,
    weights: Weights = None,
    published: str | None = "FasterRCNN_ResNet50_FPN_V2_Weights",
    trainable_backbone_layers: int | None = None,
    norm: Norm = "batch",
    rpn_head: nn.Module | Factory2 | None = None,
    box_head: nn.Module | Factory2 | None = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """The improved detector of torchvision (Li et al. 2021), COCO AP 46.7: normalised pyramid, deeper heads.

    Args:
        weights, published, trainable_backbone_layers, norm: see `fasterrcnn_resnet_fpn`; batch normalisation stays
            live.
        rpn_head, box_head: default: two convolutions; four convolutions and a layer.
        **kwargs: see `fasterrcnn_resnet_fpn`.
    """
    if is_given(weights) and trainable_backbone_layers is None:
        trainable_backbone_layers = 3  # which live statistics would not say
    return fasterrcnn_resnet_fpn(
        backbone_name="resnet50",
        published=published,
        weights=weights,
        trainable_backbone_layers=trainable_backbone_layers,
        norm=norm,
        fpn_norm="batch",
        rpn_head=rpn_head or partial(RPNHead, conv_depth=2),
        box_head=box_head or ConvFCHead,
        **kwargs,
    )


@rebuildable
def maskrcnn_resnet50_fpn(
    *,
    mask_roi_pool: nn.Module | None = None,
    mask_head: nn.Module | Factory | None = None,
    mask_predictor: nn.Module | Factory2 | None = None,
    mask_grid: Any = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Mask R-CNN with ResNet-50-FPN (He et al. 2017): torchvision's v1, COCO box AP 37.9, mask AP 34.6.

    Args:
        mask_roi_pool, mask_head, mask_predictor: see `mask_rcnn`.
        mask_grid: default: torchvision's, `TorchvisionMaskGrid`; `MaskGrid` is nearer to the objects.
        **kwargs: see `fasterrcnn_resnet_fpn`.
    """
    return fasterrcnn_resnet_fpn(
        backbone_name="resnet50",
        published="MaskRCNN_ResNet50_FPN_Weights",
        **mask_branch(mask_roi_pool, mask_head, mask_predictor, mask_grid or TorchvisionMaskGrid()),
        **kwargs,
    )


@rebuildable
def maskrcnn_resnet50_fpn_v2(
    *,
    mask_roi_pool: nn.Module | None = None,
    mask_head: nn.Module | Factory | None = None,
    mask_predictor: nn.Module | Factory2 | None = None,
    mask_grid: Any = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """The improved Mask R-CNN of torchvision (Li et al. 2021), COCO box AP 47.4, mask AP 41.8.

    Arguments as for `fasterrcnn_resnet50_fpn_v2` and `mask_rcnn`; the mask head is normalised, too,
    and `mask_grid` is torchvision's by default.
    """
    parts = mask_roi_pool, mask_head or partial(MaskHead, norm="batch"), mask_predictor
    return fasterrcnn_resnet50_fpn_v2(
        published="MaskRCNN_ResNet50_FPN_V2_Weights",
        **mask_branch(*parts, mask_grid or TorchvisionMaskGrid()),
        **kwargs,
    )


@recorded
def cascadercnn_resnet_fpn(
    *,
    backbone_name: ResNetName = "resnet50",
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    pyramid: AnyPyramid | None = None,
    mask_grid: Any = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Cascade R-CNN on a ResNet with a pyramid (Cai and Vasconcelos 2018): published COCO AP 40.3 (ResNet-50, 1x).

    Arguments as for `fasterrcnn_resnet_fpn` and `cascade_rcnn`; `masks` makes it Cascade Mask R-CNN.
    """
    layers, norm = trainable_backbone_layers, _norm(norm, weights)
    backbone = resnet_fpn(backbone_name, weights_backbone, layers, norm, pyramid=pyramid)
    model = cascade_rcnn(backbone, _count(num_classes, class_names), mask_grid=mask_grid, **kwargs)
    return load_weights(model, weights_backbone, weights, class_names=class_names)


@rebuildable
def cascadercnn_resnet50_fpn(**kwargs: Any) -> TwoStageDetector:
    """Cascade R-CNN with ResNet-50-FPN: see `cascadercnn_resnet_fpn`."""
    return cascadercnn_resnet_fpn(backbone_name="resnet50", **kwargs)


@recorded
def fasterrcnn_mobilenet_v3_large_fpn(
    *,
    weights: Weights = None,
    published: str | None = "FasterRCNN_MobileNet_V3_Large_FPN_Weights",
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    pyramid: AnyPyramid | None = None,
    rpn_score_thresh: float = 0.05,
    **kwargs: Any,
) -> TwoStageDetector:
    """Faster R-CNN on MobileNetV3-Large-FPN for full-sized images, COCO AP 32.8.

    Arguments as for `fasterrcnn_resnet_fpn`; `trainable_backbone_layers` goes to 6.
    """
    backbone = mobilenet_v3_large_fpn(weights_backbone, trainable_backbone_layers, _norm(norm, weights), pyramid)
    model = faster_rcnn(backbone, _count(num_classes, class_names), rpn_score_thresh=rpn_score_thresh, **kwargs)
    return load_weights(model, weights_backbone, weights, published, class_names)


@rebuildable
def fasterrcnn_mobilenet_v3_large_320_fpn(
    *,
    min_size: int | Sequence[int] = 320,
    max_size: int = 640,
    rpn_pre_nms_top_n_test: int = 150,
    rpn_post_nms_top_n_test: int = 150,
    **kwargs: Any,
) -> TwoStageDetector:
    """The same at 320 pixels with 150 proposals, for mobile devices, COCO AP 22.8.

    Arguments as for `fasterrcnn_mobilenet_v3_large_fpn`.
    """
    return fasterrcnn_mobilenet_v3_large_fpn(
        published="FasterRCNN_MobileNet_V3_Large_320_FPN_Weights",
        min_size=min_size,
        max_size=max_size,
        rpn_pre_nms_top_n_test=rpn_pre_nms_top_n_test,
        rpn_post_nms_top_n_test=rpn_post_nms_top_n_test,
        **kwargs,
    )


@recorded
def fasterrcnn_efficientnet_lite0_fpn(
    *,
    num_classes: int | None = None,
    weights_backbone: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    fpn_norm: Norm | None = "batch",
    fpn_channels: int = 128,
    pyramid: AnyPyramid | None = None,
    trainable_backbone_layers: int | None = None,
    image_mean: Sequence[float] = HALF,
    image_std: Sequence[float] = HALF,
    **kwargs: Any,
) -> TwoStageDetector:
    """Faster R-CNN on EfficientNet-Lite0 with a narrow pyramid: trains in minutes on a CPU, without a download.

    Args:
        num_classes: classes with background; default 91.
        weights_backbone: `"IMAGENET1K"` (from an installed package), a file, or None.
        norm: of the backbone; default `frozen` with weights, live `batch` without.
        fpn_norm: of the pyramid, which this network's unnormalised maps need at usual learning rates.
        fpn_channels: of the pyramid.
        pyramid: another pyramid in place of ours, see `trunks.Backbone`.
        trainable_backbone_layers: 0 to 4, counted from stride 32; default 3 with weights, all without.
        image_mean, image_std: bring images to [-1, 1], as the packaged weights want them.
        **kwargs: see `faster_rcnn`.
    """
    layers: Any = trainable_backbone_layers, pyramid
    backbone = efficientnet_lite0_fpn(weights_backbone, norm, fpn_norm, fpn_channels, *layers)
    model = faster_rcnn(backbone, num_classes or COCO_CATEGORIES, image_mean=image_mean, image_std=image_std, **kwargs)
    return load_weights(model, weights_backbone)


@rebuildable
def maskrcnn_efficientnet_lite0_fpn(
    *,
    fpn_channels: int = 128,
    mask_roi_pool: nn.Module | None = None,
    mask_head: nn.Module | Factory | None = None,
    mask_predictor: nn.Module | Factory2 | None = None,
    mask_grid: Any = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Mask R-CNN on EfficientNet-Lite0, its mask branch as narrow as its pyramid: a fifth of the usual one's work.

    Arguments as for `fasterrcnn_efficientnet_lite0_fpn` and `mask_rcnn`.
    """
    return fasterrcnn_efficientnet_lite0_fpn(
        fpn_channels=fpn_channels,
        **mask_branch(
            mask_roi_pool,
            mask_head or partial(MaskHead, layers=[fpn_channels] * 4),
            mask_predictor or partial(MaskPredictor, hidden_channels=fpn_channels),
            mask_grid,
        ),
        **kwargs,
    )


@recorded
def cascadercnn_efficientnet_lite0_fpn(
    *,
    num_classes: int | None = None,
    weights_backbone: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    fpn_norm: Norm | None = "batch",
    fpn_channels: int = 128,
    trainable_backbone_layers: int | None = None,
    pyramid: AnyPyramid | None = None,
    image_mean: Sequence[float] = HALF,
    image_std: Sequence[float] = HALF,
    mask_grid: Any = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Cascade R-CNN on EfficientNet-Lite0. Arguments as for `fasterrcnn_efficientnet_lite0_fpn` and `cascade_rcnn`."""
    layers: Any = trainable_backbone_layers, pyramid
    backbone = efficientnet_lite0_fpn(weights_backbone, norm, fpn_norm, fpn_channels, *layers)
    normal: Any = {"image_mean": image_mean, "image_std": image_std}
    model = cascade_rcnn(backbone, num_classes or COCO_CATEGORIES, mask_grid=mask_grid, **normal, **kwargs)
    return load_weights(model, weights_backbone)


@recorded
def fasterrcnn_timm_fpn(
    *,
    backbone_name: str,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    norm: Norm | None = None,
    fpn_norm: Norm | None = None,
    fpn_channels: int = 256,
    pyramid: AnyPyramid | None = None,
    window_size: int | None = None,
    drop_path_rate: float | None = None,
    trainable_backbone_layers: int | None = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Faster R-CNN on a timm network: convolutional, a hierarchical transformer (Swin) or a plain one (ViT).

    Args:
        backbone_name: timm's name, e.g. `"convnext_tiny"`, `"swin_tiny_patch4_window7_224"`, `"vit_small_patch16_224"`.
        num_classes: classes with background; default 91.
        weights_backbone: a file of timm's weights, or None.
        norm, fpn_norm, fpn_channels, pyramid, window_size, drop_path_rate: see `timm_backbones.timm_fpn`.
        trainable_backbone_layers: see `timm_backbones.timm_fpn`.
        **kwargs: see `faster_rcnn`.
    """
    layers, parts = trainable_backbone_layers, (pyramid, window_size, drop_path_rate)
    backbone = timm_fpn(backbone_name, weights_backbone, layers, norm, fpn_norm, fpn_channels, None, *parts)
    model = load_weights(faster_rcnn(backbone, num_classes or COCO_CATEGORIES, **kwargs), weights_backbone)
    model.resolved |= {"trainable_backbone_layers": backbone.resolved["trainable_layers"]} if backbone.resolved else {}
    return model


def create_faster_rcnn(num_classes: int, pretrained: bool = False) -> TwoStageDetector:
    """The v2 detector with a fresh predictor for the caller's classes.

    Args:
        num_classes: classes with background.
        pretrained: start from torchvision's COCO weights, which must lie in its cache.
    """
    if not pretrained:
        return fasterrcnn_resnet50_fpn_v2(num_classes=num_classes)
    model = fasterrcnn_resnet50_fpn_v2(weights="DEFAULT")
    model.roi_heads.box_predictor = FastRCNNPredictor(model.roi_heads.box_predictor.cls_score.in_features, num_classes)
    if model.recipe:
        model.recipe["init_args"]["num_classes"] = num_classes
    return model


def _norm(norm: Norm | None, weights: Weights) -> Norm | None:
    """Weights of a whole detector bring the backbone's with them, so their statistics are frozen likewise."""
    return "frozen" if norm is None and is_given(weights) else norm


def _count(num_classes: int | None, class_names: Sequence[str] | None) -> int:
    return num_classes or (len(class_names) + 1 if class_names else COCO_CATEGORIES)
