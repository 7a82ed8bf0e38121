"""Builders of the older relatives: Fast R-CNN and R-CNN, which are given their proposals, and Faster R-CNN on one map.

Fast R-CNN differs from Faster R-CNN in one part: its proposals are not learned. R-CNN differs in one more: its features
are not shared. Proposals come with the data (`proposals` of the data module); where they do not, as for
`model(images)`, Selective Search computes them on the spot. Defaults stand in each builder's signature, see
`detection.models.zoo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detection.models.backbones import (
    Norm,
    ResNetName,
    efficientnet_lite0_fpn,
    resnet_c4,
    resnet_dc5,
    resnet_fpn,
)
from detection.models.c4 import res5_head
from detection.models.compose import COCO_CATEGORIES, fast_rcnn, faster_rcnn
from detection.models.pooling import RoIPooler
from detection.models.rcnn import CONTEXT, CNNHead, RegionWarp, efficientnet_lite0_head, resnet_head, whole_image
from detection.models.two_stage import FasterRCNN
from detection.models.weights import Weights, is_given
from detection.recipes import recorded


def rcnn(box_head: CNNHead, crop_size: int, num_classes: int = COCO_CATEGORIES, **kwargs: Any) -> FasterRCNN:
    """R-CNN (Girshick et al. 2014) on a classification network; `detection.models.rcnn` says what is not the paper's.

    Args:
        box_head: warped regions -> features.
        crop_size: side in pixels that regions are warped to, with the paper's share of context around them.
        num_classes: classes with background.
        **kwargs: see `fast_rcnn`.
    """
    warp = RegionWarp(crop_size, round(CONTEXT * crop_size))
    return fast_rcnn(whole_image(), num_classes, box_roi_pool=warp, box_head=box_head, **kwargs)


@recorded
def fastrcnn_resnet_fpn(
    *,
    backbone_name: ResNetName = "resnet50",
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Fast R-CNN with a ResNet-FPN backbone.

    Args:
        backbone_name: torchvision's name of the network.
        num_classes: classes with background; default 91.
        weights_backbone: ImageNet weights: `"IMAGENET1K_V1"`, `"IMAGENET1K_V2"`, a file, or None.
        trainable_backbone_layers: 0 to 5, counted from layer4; default 3 with weights, all without.
        norm: of the backbone; default `frozen` with weights, live `batch` without.
        **kwargs: see `fast_rcnn`.
    """
    backbone = resnet_fpn(backbone_name, weights_backbone, trainable_backbone_layers, norm)
    return _finish(fast_rcnn(backbone, num_classes or COCO_CATEGORIES, **kwargs), weights_backbone)


@recorded
def fastrcnn_efficientnet_lite0_fpn(
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
    """Fast R-CNN on EfficientNet-Lite0 with a narrow pyramid.

    Args:
        num_classes: classes with background; default 91.
        weights_backbone, norm, fpn_norm, fpn_channels, trainable_backbone_layers, image_mean, image_std: see
            `zoo.fasterrcnn_efficientnet_lite0_fpn`.
        **kwargs: see `fast_rcnn`.
    """
    backbone = efficientnet_lite0_fpn(weights_backbone, norm, fpn_norm, fpn_channels, trainable_backbone_layers)
    model = fast_rcnn(backbone, num_classes or COCO_CATEGORIES, image_mean=image_mean, image_std=image_std, **kwargs)
    return _finish(model, weights_backbone)


@recorded
def rcnn_resnet(
    *,
    backbone_name: ResNetName = "resnet18",
    crop_size: int = 224,
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    box_batch_size_per_image: int = 64,
    **kwargs: Any,
) -> FasterRCNN:
    """R-CNN with a ResNet that sees one region at a time.

    Args:
        backbone_name: torchvision's name of the network.
        crop_size: side in pixels that regions are warped to; the two layers behind the network grow with its square.
        num_classes: classes with background; default 91.
        weights_backbone, trainable_backbone_layers, norm: see `fastrcnn_resnet_fpn`.
        box_batch_size_per_image: regions of an image that train; with two images the paper's 128.
        **kwargs: see `fast_rcnn`.
    """
    head = resnet_head(crop_size, backbone_name, weights_backbone, trainable_backbone_layers, norm)
    classes = num_classes or COCO_CATEGORIES
    model = rcnn(head, crop_size, classes, box_batch_size_per_image=box_batch_size_per_image, **kwargs)
    return _finish(model, weights_backbone)


@recorded
def rcnn_efficientnet_lite0(
    *,
    crop_size: int = 224,
    num_classes: int | None = None,
    weights_backbone: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    trainable_backbone_layers: int | None = None,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
    box_batch_size_per_image: int = 64,
    **kwargs: Any,
) -> FasterRCNN:
    """R-CNN with an EfficientNet-Lite0 that sees one region at a time.

    Args:
        crop_size, box_batch_size_per_image: see `rcnn_resnet`.
        num_classes: classes with background; default 91.
        weights_backbone, norm, trainable_backbone_layers, image_mean, image_std: see
            `zoo.fasterrcnn_efficientnet_lite0_fpn`.
        **kwargs: see `fast_rcnn`.
    """
    model = rcnn(
        efficientnet_lite0_head(crop_size, weights_backbone, trainable_backbone_layers, norm),
        crop_size,
        num_classes or COCO_CATEGORIES,
        image_mean=image_mean,
        image_std=image_std,
        box_batch_size_per_image=box_batch_size_per_image,
        **kwargs,
    )
    return _finish(model, weights_backbone)


@recorded
def fasterrcnn_resnet_c4(
    *,
    backbone_name: ResNetName = "resnet50",
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    rpn_pre_nms_top_n_train: int = 12000,
    rpn_pre_nms_top_n_test: int = 6000,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN on the map of stride 16, the network's last stage for a head ("C4"): published COCO AP 35.7 (1x).

    He et al. 2016, appendix A; the numbers of proposals are Detectron2's.

    Args:
        backbone_name, num_classes, weights_backbone, trainable_backbone_layers, norm: see `fastrcnn_resnet_fpn`.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: one map has the candidates of five.
        **kwargs: see `faster_rcnn`.
    """
    common: Any = {"weights": weights_backbone, "norm": norm}
    model = faster_rcnn(
        resnet_c4(backbone_name, trainable_layers=trainable_backbone_layers, **common),
        num_classes or COCO_CATEGORIES,
        box_roi_pool=RoIPooler(14),
        box_head=res5_head(backbone_name, **common),
        rpn_pre_nms_top_n_train=rpn_pre_nms_top_n_train,
        rpn_pre_nms_top_n_test=rpn_pre_nms_top_n_test,
        **kwargs,
    )
    return _finish(model, weights_backbone)


@recorded
def fasterrcnn_resnet_dc5(
    *,
    backbone_name: ResNetName = "resnet50",
    num_classes: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    rpn_pre_nms_top_n_train: int = 12000,
    rpn_pre_nms_top_n_test: int = 6000,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN on the last map, its stage dilated to stride 16 ("DC5"): published COCO AP 37.3 (1x, Detectron2).

    Arguments as for `fasterrcnn_resnet_c4`.
    """
    model = faster_rcnn(
        resnet_dc5(backbone_name, weights_backbone, trainable_backbone_layers, norm),
        num_classes or COCO_CATEGORIES,
        rpn_pre_nms_top_n_train=rpn_pre_nms_top_n_train,
        rpn_pre_nms_top_n_test=rpn_pre_nms_top_n_test,
        **kwargs,
    )
    return _finish(model, weights_backbone)


def _finish(model: FasterRCNN, weights_backbone: Weights) -> FasterRCNN:
    """Note what having weights decided, for the recipe."""
    if is_given(weights_backbone):
        model.resolved = {"norm": "frozen", "trainable_backbone_layers": 3}
    return model
