"""Builders of the usual detectors, with torchvision's names, arguments and `state_dict` keys.

`num_classes` counts the background, as torchvision's does. Unlike torchvision, no builder downloads anything:
`weights_backbone` is None unless said otherwise.

Where a builder's default is not that of `faster_rcnn`, the argument stands in its own signature: the command line hands
over every argument that it finds, and would put the defaults of `faster_rcnn` in place of any that hid in `**kwargs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torchvision.models import detection as reference

from detection.models.backbones import (
    Norm,
    ResNetName,
    efficientnet_lite0_fpn,
    mobilenet_v3_large_fpn,
    resnet_fpn,
    timm_fpn,
)
from detection.models.compose import COCO_CATEGORIES, cascade_rcnn, faster_rcnn, mask_rcnn
from detection.models.masks import MaskHead, MaskPredictor
from detection.models.roi_heads import ConvFCHead, FastRCNNPredictor
from detection.models.rpn import RPNHead
from detection.models.two_stage import FasterRCNN
from detection.models.weights import Weights, adapt_classes, find_class_names, find_weights, fold_epsilon, is_given
from detection.parts import Factory, Factory2
from detection.recipes import recorded

WITHOUT_EPSILON = (reference.FasterRCNN_ResNet50_FPN_Weights, reference.MaskRCNN_ResNet50_FPN_Weights)


@recorded
def fasterrcnn_resnet50_fpn(
    *,
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN with a ResNet-50-FPN backbone (Lin et al. 2017): torchvision's v1 detector, COCO AP 37.0.

    Args:
        weights: `"DEFAULT"` or `"COCO_V1"` from torchvision's cache, or a file.
        class_names: of the foreground. Where `weights` are of other classes that have names, those of the same name
            keep what was learned of them, and the rest starts afresh.
        num_classes: classes with background; default 91.
        weights_backbone: ImageNet weights: `"IMAGENET1K_V1"`, `"IMAGENET1K_V2"`, a file, or None.
        trainable_backbone_layers: 0 to 5, counted from layer4; default 3 with weights, all without.
        norm: of the backbone; default `frozen` with weights, live `batch` without.
        **kwargs: see `faster_rcnn`.
    """
    backbone = resnet_fpn("resnet50", weights_backbone, trainable_backbone_layers, _norm(norm, weights))
    model = faster_rcnn(backbone, _count(num_classes, class_names), **kwargs)
    return _finish(model, weights_backbone, weights, reference.FasterRCNN_ResNet50_FPN_Weights, class_names)


@recorded
def fasterrcnn_resnet50_fpn_v2(
    *,
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm = "batch",
    rpn_head: nn.Module | Factory2 | None = None,
    box_head: nn.Module | Factory2 | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """The improved detector of torchvision (Li et al. 2021), COCO AP 46.7: normalised pyramid, deeper heads.

    Arguments as for `fasterrcnn_resnet50_fpn`; batch normalisation stays live.
    """
    if is_given(weights) and trainable_backbone_layers is None:
        trainable_backbone_layers = 3
    backbone = resnet_fpn("resnet50", weights_backbone, trainable_backbone_layers, norm, fpn_norm="batch")
    model = faster_rcnn(
        backbone,
        _count(num_classes, class_names),
        rpn_head=rpn_head or partial(RPNHead, conv_depth=2),
        box_head=box_head or ConvFCHead,
        **kwargs,
    )
    return _finish(model, weights_backbone, weights, reference.FasterRCNN_ResNet50_FPN_V2_Weights, class_names)


@recorded
def fasterrcnn_resnet_fpn(
    *,
    backbone_name: ResNetName = "resnet18",
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN on a ResNet of any depth. Arguments as for `fasterrcnn_resnet50_fpn`; `weights` only from a file."""
    backbone = resnet_fpn(backbone_name, weights_backbone, trainable_backbone_layers, _norm(norm, weights))
    model = faster_rcnn(backbone, _count(num_classes, class_names), **kwargs)
    return _finish(model, weights_backbone, weights, class_names=class_names)


@recorded
def fasterrcnn_resnet101_fpn(
    *,
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN with a ResNet-101-FPN backbone: published COCO AP 39.4 (61.2 / 43.4).

    Arguments as for `fasterrcnn_resnet_fpn`.
    """
    backbone = resnet_fpn("resnet101", weights_backbone, trainable_backbone_layers, _norm(norm, weights))
    model = faster_rcnn(backbone, _count(num_classes, class_names), **kwargs)
    return _finish(model, weights_backbone, weights, class_names=class_names)


@recorded
def fasterrcnn_mobilenet_v3_large_fpn(
    *,
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    rpn_score_thresh: float = 0.05,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN on MobileNetV3-Large-FPN for full-sized images, COCO AP 32.8.

    Arguments as for `fasterrcnn_resnet50_fpn`; `trainable_backbone_layers` goes to 6.
    """
    backbone = mobilenet_v3_large_fpn(weights_backbone, trainable_backbone_layers, _norm(norm, weights))
    model = faster_rcnn(backbone, _count(num_classes, class_names), rpn_score_thresh=rpn_score_thresh, **kwargs)
    return _finish(model, weights_backbone, weights, reference.FasterRCNN_MobileNet_V3_Large_FPN_Weights, class_names)


@recorded
def fasterrcnn_mobilenet_v3_large_320_fpn(
    *,
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    min_size: int | Sequence[int] = 320,
    max_size: int = 640,
    rpn_pre_nms_top_n_test: int = 150,
    rpn_post_nms_top_n_test: int = 150,
    rpn_score_thresh: float = 0.05,
    **kwargs: Any,
) -> FasterRCNN:
    """The same at 320 pixels with 150 proposals, for mobile devices, COCO AP 22.8.

    Arguments as for `fasterrcnn_mobilenet_v3_large_fpn`.
    """
    backbone = mobilenet_v3_large_fpn(weights_backbone, trainable_backbone_layers, _norm(norm, weights))
    model = faster_rcnn(
        backbone,
        _count(num_classes, class_names),
        min_size,
        max_size,
        rpn_pre_nms_top_n_test=rpn_pre_nms_top_n_test,
        rpn_post_nms_top_n_test=rpn_post_nms_top_n_test,
        rpn_score_thresh=rpn_score_thresh,
        **kwargs,
    )
    return _finish(
        model, weights_backbone, weights, reference.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights, class_names
    )


@recorded
def fasterrcnn_efficientnet_lite0_fpn(
    *,
    num_classes: int | None = None,
    weights_backbone: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    fpn_norm: Norm | None = "batch",
    fpn_channels: int = 128,
    trainable_backbone_layers: int | None = None,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN on EfficientNet-Lite0 with a narrow pyramid: trains in minutes on a CPU, without a download.

    Args:
        num_classes: classes with background; default 91.
        weights_backbone: `"IMAGENET1K"` (from an installed package), a file, or None.
        norm: of the backbone; default `frozen` with weights, live `batch` without.
        fpn_norm: of the pyramid, which this network's unnormalised maps need at usual learning rates.
        fpn_channels: of the pyramid.
        trainable_backbone_layers: 0 to 4, counted from stride 32; default 3 with weights, all without.
        image_mean, image_std: bring images to [-1, 1], as the packaged weights want them.
        **kwargs: see `faster_rcnn`.
    """
    backbone = efficientnet_lite0_fpn(weights_backbone, norm, fpn_norm, fpn_channels, trainable_backbone_layers)
    model = faster_rcnn(backbone, num_classes or COCO_CATEGORIES, image_mean=image_mean, image_std=image_std, **kwargs)
    return _finish(model, weights_backbone)


@recorded
def fasterrcnn_timm_fpn(
    *,
    backbone_name: str,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    norm: Norm | None = None,
    fpn_channels: int = 256,
    trainable_backbone_layers: int | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN on any timm network that gives feature maps.

    Args:
        backbone_name: timm's name, e.g. `"convnext_tiny"`.
        num_classes: classes with background; default 91.
        weights_backbone: a file of timm's weights, or None.
        norm, fpn_channels, trainable_backbone_layers: see `backbones.timm_fpn`.
        **kwargs: see `faster_rcnn`.
    """
    backbone = timm_fpn(backbone_name, weights_backbone, trainable_backbone_layers, norm, out_channels=fpn_channels)
    return _finish(faster_rcnn(backbone, num_classes or COCO_CATEGORIES, **kwargs), weights_backbone)


@recorded
def maskrcnn_resnet50_fpn(
    *,
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Mask R-CNN with a ResNet-50-FPN backbone (He et al. 2017): torchvision's v1, COCO box AP 37.9, mask AP 34.6.

    Arguments as for `fasterrcnn_resnet50_fpn`, and those of `mask_rcnn`.
    """
    backbone = resnet_fpn("resnet50", weights_backbone, trainable_backbone_layers, _norm(norm, weights))
    model = mask_rcnn(backbone, _count(num_classes, class_names), **kwargs)
    return _finish(model, weights_backbone, weights, reference.MaskRCNN_ResNet50_FPN_Weights, class_names)


@recorded
def maskrcnn_resnet50_fpn_v2(
    *,
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm = "batch",
    rpn_head: nn.Module | Factory2 | None = None,
    box_head: nn.Module | Factory2 | None = None,
    mask_head: nn.Module | Factory | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """The improved Mask R-CNN of torchvision (Li et al. 2021), COCO box AP 47.4, mask AP 41.8.

    Arguments as for `fasterrcnn_resnet50_fpn_v2`, and those of `mask_rcnn`.
    """
    if is_given(weights) and trainable_backbone_layers is None:
        trainable_backbone_layers = 3
    backbone = resnet_fpn("resnet50", weights_backbone, trainable_backbone_layers, norm, fpn_norm="batch")
    model = mask_rcnn(
        backbone,
        _count(num_classes, class_names),
        rpn_head=rpn_head or partial(RPNHead, conv_depth=2),
        box_head=box_head or ConvFCHead,
        mask_head=mask_head or partial(MaskHead, batch_norm=True),
        **kwargs,
    )
    return _finish(model, weights_backbone, weights, reference.MaskRCNN_ResNet50_FPN_V2_Weights, class_names)


@recorded
def maskrcnn_efficientnet_lite0_fpn(
    *,
    num_classes: int | None = None,
    weights_backbone: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    fpn_norm: Norm | None = "batch",
    fpn_channels: int = 128,
    trainable_backbone_layers: int | None = None,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
    mask_head: nn.Module | Factory | None = None,
    mask_predictor: nn.Module | Factory2 | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Mask R-CNN on EfficientNet-Lite0, its mask branch as narrow as its pyramid: a fifth of the usual one's work.

    Arguments as for `fasterrcnn_efficientnet_lite0_fpn` and `mask_rcnn`.
    """
    backbone = efficientnet_lite0_fpn(weights_backbone, norm, fpn_norm, fpn_channels, trainable_backbone_layers)
    classes = num_classes or COCO_CATEGORIES
    model = mask_rcnn(
        backbone,
        classes,
        mask_head=mask_head or partial(MaskHead, layers=[fpn_channels] * 4),
        mask_predictor=mask_predictor or partial(MaskPredictor, hidden_channels=fpn_channels),
        image_mean=image_mean,
        image_std=image_std,
        **kwargs,
    )
    return _finish(model, weights_backbone)


@recorded
def cascadercnn_resnet50_fpn(
    *,
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Cascade R-CNN with a ResNet-50-FPN backbone (Cai and Vasconcelos 2018): published COCO AP 40.3 (1x).

    Arguments as for `fasterrcnn_resnet_fpn`, and those of `cascade_rcnn`; `masks` makes it Cascade Mask R-CNN.
    """
    backbone = resnet_fpn("resnet50", weights_backbone, trainable_backbone_layers, _norm(norm, weights))
    model = cascade_rcnn(backbone, _count(num_classes, class_names), **kwargs)
    return _finish(model, weights_backbone, weights, class_names=class_names)


@recorded
def cascadercnn_efficientnet_lite0_fpn(
    *,
    num_classes: int | None = None,
    weights_backbone: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    fpn_norm: Norm | None = "batch",
    fpn_channels: int = 128,
    trainable_backbone_layers: int | None = None,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
    **kwargs: Any,
) -> FasterRCNN:
    """Cascade R-CNN on EfficientNet-Lite0. Arguments as for `fasterrcnn_efficientnet_lite0_fpn` and `cascade_rcnn`."""
    backbone = efficientnet_lite0_fpn(weights_backbone, norm, fpn_norm, fpn_channels, trainable_backbone_layers)
    model = cascade_rcnn(backbone, num_classes or COCO_CATEGORIES, image_mean=image_mean, image_std=image_std, **kwargs)
    return _finish(model, weights_backbone)


def create_faster_rcnn(num_classes: int, pretrained: bool = False) -> FasterRCNN:
    """The v2 detector with a fresh predictor for the caller's classes.

    Args:
        num_classes: classes with background.
        pretrained: start from torchvision's COCO weights, which must lie in its cache.
    """
    if not pretrained:
        return fasterrcnn_resnet50_fpn_v2(num_classes=num_classes)
    model = fasterrcnn_resnet50_fpn_v2(weights="DEFAULT")
    predictor = FastRCNNPredictor(model.roi_heads.box_predictor.cls_score.in_features, num_classes)  # type: ignore[union-attr, arg-type]
    model.roi_heads.box_predictor = predictor
    if model.recipe:
        model.recipe["init_args"]["num_classes"] = num_classes
    return model


def _norm(norm: Norm | None, weights: Weights) -> Norm | None:
    """Weights of a whole detector bring the backbone's with them, so their statistics are frozen likewise."""
    return "frozen" if norm is None and is_given(weights) else norm


def _count(num_classes: int | None, class_names: Sequence[str] | None) -> int:
    return num_classes or (len(class_names) + 1 if class_names else COCO_CATEGORIES)


def _finish(
    model: FasterRCNN,
    backbone: Weights,
    weights: Weights = None,
    names: Any = None,
    class_names: Sequence[str] | None = None,
) -> FasterRCNN:
    """Load the weights of the whole detector, and note what having weights decided, for the recipe."""
    if is_given(weights):
        state = find_weights(weights, names)
        if names in WITHOUT_EPSILON and weights in (names.COCO_V1, "COCO_V1", "DEFAULT"):
            # torchvision trained these without the epsilon of the frozen normalisation, and evaluates them so: taking
            # it off the variance gives the same numbers without a setting that a checkpoint would have to carry.
            state = fold_epsilon(state)
        old_names = find_class_names(weights, names) if class_names else None
        if class_names and old_names:
            state = adapt_classes(state, model.state_dict(), old_names, class_names)
        model.load_state_dict(state)
    if is_given(weights) or is_given(backbone):
        model.resolved = {"norm": "frozen", "trainable_backbone_layers": 3}
    return model
