"""Builders of the older relatives: Fast R-CNN and R-CNN, which are given their proposals, and Faster R-CNN on one map.

Fast R-CNN differs from Faster R-CNN in one part: its proposals are not learned. R-CNN differs in one more: its features
are not shared. Proposals come with the data (`proposals` of the data module); where they do not, as for
`model(images)`, Selective Search computes them on the spot. Defaults stand in each builder's signature, see
`detection.models.zoo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from detection.models.backbones import Norm, ResNetName, resnet_c4, resnet_dc5
from detection.models.c4 import res5_head
from detection.models.compose import COCO_CATEGORIES, fast_rcnn, faster_rcnn, precomputed
from detection.models.pooling import RoIPool, RoIPooler
from detection.models.rcnn import CONTEXT, CNNHead, RegionWarp, efficientnet_lite0_head, resnet_head, whole_image
from detection.models.two_stage import TwoStageDetector
from detection.models.zoo import HALF, fasterrcnn_efficientnet_lite0_fpn, fasterrcnn_resnet_fpn
from detection.pretrained import load_weights
from detection.recipes import rebuildable, recorded
from detection.selective_search import SelectiveSearch
from detection.weights import Weights


def rcnn(box_head: CNNHead, crop_size: int, num_classes: int = COCO_CATEGORIES, **kwargs: Any) -> TwoStageDetector:
    """R-CNN (Girshick et al. 2014) on a classification network; `detection.models.rcnn` says what is not the paper's.

    Args:
        box_head: warped regions -> features.
        crop_size: side in pixels that regions are warped to, with the paper's share of context around them.
        num_classes: classes with background.
        **kwargs: see `fast_rcnn`.
    """
    warp = RegionWarp(crop_size, round(CONTEXT * crop_size))
    return fast_rcnn(whole_image(), num_classes, box_roi_pool=warp, box_head=box_head, **kwargs)


@rebuildable
def fastrcnn_resnet_fpn(
    *,
    backbone_name: ResNetName = "resnet50",
    proposals_train: int = 2000,
    proposals_test: int = 2000,
    proposal_source: SelectiveSearch | None = None,
    box_roi_pool: nn.Module | None = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Fast R-CNN with a ResNet-FPN backbone. Arguments as for `fast_rcnn` and `zoo.fasterrcnn_resnet_fpn`."""
    return fasterrcnn_resnet_fpn(
        backbone_name=backbone_name,
        rpn=precomputed(proposals_train, proposals_test, proposal_source),
        box_roi_pool=box_roi_pool or RoIPool(),
        **kwargs,
    )


@rebuildable
def fastrcnn_efficientnet_lite0_fpn(
    *,
    proposals_train: int = 2000,
    proposals_test: int = 2000,
    proposal_source: SelectiveSearch | None = None,
    box_roi_pool: nn.Module | None = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Fast R-CNN on EfficientNet-Lite0. Arguments as for `fast_rcnn` and `zoo.fasterrcnn_efficientnet_lite0_fpn`."""
    return fasterrcnn_efficientnet_lite0_fpn(
        rpn=precomputed(proposals_train, proposals_test, proposal_source),
        box_roi_pool=box_roi_pool or RoIPool(),
        **kwargs,
    )


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
) -> TwoStageDetector:
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
    return load_weights(model, weights_backbone)


@recorded
def rcnn_efficientnet_lite0(
    *,
    crop_size: int = 224,
    num_classes: int | None = None,
    weights_backbone: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    trainable_backbone_layers: int | None = None,
    image_mean: Sequence[float] = HALF,
    image_std: Sequence[float] = HALF,
    box_batch_size_per_image: int = 64,
    **kwargs: Any,
) -> TwoStageDetector:
    """R-CNN with an EfficientNet-Lite0 that sees one region at a time.

    Args:
        crop_size, box_batch_size_per_image: see `rcnn_resnet`.
        num_classes: classes with background; default 91.
        weights_backbone, norm, trainable_backbone_layers, image_mean, image_std: see
            `zoo.fasterrcnn_efficientnet_lite0_fpn`.
        **kwargs: see `fast_rcnn`.
    """
    head = efficientnet_lite0_head(crop_size, weights_backbone, trainable_backbone_layers, norm)
    normal: Any = {"image_mean": image_mean, "image_std": image_std}
    classes = num_classes or COCO_CATEGORIES
    model = rcnn(head, crop_size, classes, box_batch_size_per_image=box_batch_size_per_image, **normal, **kwargs)
    return load_weights(model, weights_backbone)


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
) -> TwoStageDetector:
    """Faster R-CNN on the map of stride 16, the network's last stage for a head ("C4"): published COCO AP 35.7 (1x).

    He et al. 2016, appendix A; the numbers of proposals are Detectron2's.

    Args:
        backbone_name, num_classes, weights_backbone, trainable_backbone_layers, norm: see `fastrcnn_resnet_fpn`.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: one map has the candidates of five.
        **kwargs: see `faster_rcnn`.
    """
    common: Any = {"weights": weights_backbone, "norm": norm}
    top_n: Any = {"rpn_pre_nms_top_n_train": rpn_pre_nms_top_n_train, "rpn_pre_nms_top_n_test": rpn_pre_nms_top_n_test}
    backbone = resnet_c4(backbone_name, trainable_layers=trainable_backbone_layers, **common)
    heads: Any = {"box_roi_pool": RoIPooler(14), "box_head": res5_head(backbone_name, **common)}
    model = faster_rcnn(backbone, num_classes or COCO_CATEGORIES, **heads, **top_n, **kwargs)
    return load_weights(model, weights_backbone)


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
) -> TwoStageDetector:
    """Faster R-CNN on the last map, its stage dilated to stride 16 ("DC5"): published COCO AP 37.3 (1x, Detectron2).

    Arguments as for `fasterrcnn_resnet_c4`.
    """
    top_n: Any = {"rpn_pre_nms_top_n_train": rpn_pre_nms_top_n_train, "rpn_pre_nms_top_n_test": rpn_pre_nms_top_n_test}
    backbone = resnet_dc5(backbone_name, weights_backbone, trainable_backbone_layers, norm)
    return load_weights(faster_rcnn(backbone, num_classes or COCO_CATEGORIES, **top_n, **kwargs), weights_backbone)
