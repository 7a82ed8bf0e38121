"""Whole detectors on any backbone: Faster, Mask and Cascade R-CNN; `detection.models.zoo` has the named ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detection.anchors import AnchorGenerator
from detection.losses import OverlapLoss
from detection.models.backbones import Backbone
from detection.models.cascade import CascadeRoIHeads
from detection.models.masks import MaskBranch, MaskHead, MaskPredictor
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import FastRCNNPredictor, RoIHeads, TwoFCHead
from detection.models.rpn import RegionProposalNetwork, RPNHead
from detection.models.transform import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from detection.models.two_stage import FasterRCNN
from detection.recipes import recorded

COCO_CATEGORIES = 91  # with background: torchvision's labels are COCO's category ids, gaps included


@recorded
def faster_rcnn(
    backbone: Backbone,
    num_classes: int = COCO_CATEGORIES,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    image_mean: Sequence[float] = IMAGENET_MEAN,
    image_std: Sequence[float] = IMAGENET_STD,
    rpn_anchor_generator: AnchorGenerator | None = None,
    rpn_head: nn.Module | None = None,
    rpn_pre_nms_top_n_train: int = 2000,
    rpn_pre_nms_top_n_test: int = 1000,
    rpn_post_nms_top_n_train: int = 2000,
    rpn_post_nms_top_n_test: int = 1000,
    rpn_nms_thresh: float = 0.7,
    rpn_fg_iou_thresh: float = 0.7,
    rpn_bg_iou_thresh: float = 0.3,
    rpn_batch_size_per_image: int = 256,
    rpn_positive_fraction: float = 0.5,
    rpn_score_thresh: float = 0.0,
    box_roi_pool: nn.Module | None = None,
    box_head: nn.Module | None = None,
    box_predictor: nn.Module | None = None,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 100,
    box_fg_iou_thresh: float = 0.5,
    box_bg_iou_thresh: float = 0.5,
    box_batch_size_per_image: int = 512,
    box_positive_fraction: float = 0.25,
    bbox_reg_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    soft_nms_sigma: float | None = None,
    rpn_box_beta: float = 1 / 9,
    box_beta: float = 1 / 9,
    rpn_overlap_loss: OverlapLoss | None = None,
    box_overlap_loss: OverlapLoss | None = None,
) -> FasterRCNN:
    """Faster R-CNN on a backbone, each part replaceable; names and defaults are those of torchvision's `FasterRCNN`.

    Args:
        backbone: images -> feature maps.
        num_classes: classes with background.
        min_size, max_size, image_mean, image_std: see `ImageTransform`.
        rpn_anchor_generator: default: one size a level, 32 pixels on the finest of five and twice that on each next;
            with fewer levels all five sizes on each. Ratios 1:2, 1:1, 2:1.
        rpn_head: default: one 3x3 convolution.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: anchors of a level that go into NMS.
        rpn_post_nms_top_n_train, rpn_post_nms_top_n_test: proposals of an image that come out.
        rpn_nms_thresh, rpn_fg_iou_thresh, rpn_bg_iou_thresh, rpn_batch_size_per_image, rpn_positive_fraction,
            rpn_score_thresh: see `RegionProposalNetwork`.
        box_roi_pool: default: RoI Align 7x7 with 2x2 samples on all levels but the last.
        box_head: default: two layers of 1024.
        box_predictor: default: one layer each for classes and boxes.
        box_score_thresh, box_nms_thresh, box_detections_per_img, box_fg_iou_thresh, box_bg_iou_thresh,
            box_batch_size_per_image, box_positive_fraction, bbox_reg_weights, soft_nms_sigma: see `RoIHeads`.
        rpn_box_beta, box_beta: where smooth L1 turns from quadratic to linear, see `losses.box_loss`.
        rpn_overlap_loss, box_overlap_loss: `GIoULoss` or `CIoULoss` in place of smooth L1.
    """
    anchor_generator = rpn_anchor_generator or default_anchors(len(backbone.strides))
    channels = backbone.out_channels
    rpn = RegionProposalNetwork(
        anchor_generator,
        rpn_head or RPNHead(channels, anchor_generator.num_anchors_per_location()[0]),
        backbone.strides,
        rpn_fg_iou_thresh,
        rpn_bg_iou_thresh,
        rpn_batch_size_per_image,
        rpn_positive_fraction,
        {"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
        {"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test},
        rpn_nms_thresh,
        rpn_score_thresh,
        rpn_box_beta,
        overlap_loss=rpn_overlap_loss,
    )
    box_roi_pool = box_roi_pool or RoIPooler(num_levels=max(1, len(backbone.strides) - 1))
    box_head = box_head or TwoFCHead(channels, box_roi_pool.output_size)  # type: ignore[arg-type]
    roi_heads = RoIHeads(
        box_roi_pool,
        box_head,
        box_predictor or FastRCNNPredictor(box_head.out_channels, num_classes),  # type: ignore[arg-type]
        backbone.strides,
        box_fg_iou_thresh,
        box_bg_iou_thresh,
        box_batch_size_per_image,
        box_positive_fraction,
        bbox_reg_weights,
        box_score_thresh,
        box_nms_thresh,
        box_detections_per_img,
        box_beta,
        soft_nms_sigma,
        box_overlap_loss,
    )
    model = FasterRCNN(backbone, rpn, roi_heads, ImageTransform(min_size, max_size, image_mean, image_std))
    # Convolutions are quicker so on CPUs and GPUs alike, and the pooler reads rows of channels.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def default_anchors(num_levels: int, **options: Any) -> AnchorGenerator:
    """Five sizes from 32 to 512: one a level where there are five levels (FPN, section 4.1), else all on each."""
    sizes = (32, 64, 128, 256, 512)
    return AnchorGenerator([[s] for s in sizes] if num_levels == len(sizes) else [sizes] * num_levels, **options)


@recorded
def mask_rcnn(
    backbone: Backbone,
    num_classes: int = COCO_CATEGORIES,
    mask_roi_pool: RoIPooler | None = None,
    mask_head: nn.Module | None = None,
    mask_predictor: nn.Module | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Mask R-CNN (He et al. 2017): Faster R-CNN with a mask branch; names and defaults of torchvision's `MaskRCNN`.

    Args:
        backbone, num_classes: see `faster_rcnn`.
        mask_roi_pool: default: RoI Align 14x14 with 2x2 samples on all levels but the last.
        mask_head: default: four 3x3 convolutions.
        mask_predictor: default: masks of 28x28, one a class.
        **kwargs: see `faster_rcnn`.
    """
    model = faster_rcnn(backbone, num_classes, **kwargs)
    add_mask_branch(model.roi_heads, backbone, num_classes, mask_roi_pool, mask_head, mask_predictor)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def add_mask_branch(
    roi_heads: MaskBranch,
    backbone: Backbone,
    num_classes: int,
    roi_pool: RoIPooler | None = None,
    head: nn.Module | None = None,
    predictor: nn.Module | None = None,
) -> None:
    """Give RoI heads their mask branch, with the defaults of `mask_rcnn`."""
    roi_heads.mask_roi_pool = roi_pool or RoIPooler(output_size=14, num_levels=max(1, len(backbone.strides) - 1))
    roi_heads.mask_head = head or MaskHead(backbone.out_channels)
    roi_heads.mask_predictor = predictor or MaskPredictor(roi_heads.mask_head.out_channels, num_classes)  # type: ignore[arg-type]


@recorded
def cascade_rcnn(
    backbone: Backbone,
    num_classes: int = COCO_CATEGORIES,
    masks: bool = False,
    cascade_iou_thresh: Sequence[float] = (0.5, 0.6, 0.7),
    cascade_bbox_reg_weights: Sequence[Sequence[float]] = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)),
    mean_of_logits: bool = False,
    **kwargs: Any,
) -> FasterRCNN:
    """Cascade R-CNN (Cai and Vasconcelos 2018, section 4): three box heads in a row.

    Args:
        backbone, num_classes: see `faster_rcnn`.
        masks: with a mask branch.
        cascade_iou_thresh: of each stage, foreground from it on.
        cascade_bbox_reg_weights: of each stage; the boxes get better, so the deltas get smaller.
        mean_of_logits: see `CascadeRoIHeads`.
        **kwargs: see `faster_rcnn`; `box_fg_iou_thresh`, `box_bg_iou_thresh`, `bbox_reg_weights`, `box_head` and
            `box_predictor` have no say here.

    Raises:
        ValueError: as many IoU thresholds as coder weights are needed.
    """
    if len(cascade_iou_thresh) != len(cascade_bbox_reg_weights):
        raise ValueError(
            f"{len(cascade_iou_thresh)} IoU thresholds but {len(cascade_bbox_reg_weights)} coder weights: give one "
            "of each for every stage"
        )
    model = faster_rcnn(backbone, num_classes, **kwargs)
    plain: RoIHeads = model.roi_heads  # type: ignore[assignment]
    stages = []
    for iou, weights in zip(cascade_iou_thresh, cascade_bbox_reg_weights, strict=True):
        head = TwoFCHead(backbone.out_channels, plain.box_roi_pool.output_size)  # type: ignore[arg-type]
        stage = RoIHeads(
            plain.box_roi_pool,
            head,
            FastRCNNPredictor(head.out_channels, num_classes, class_agnostic=True),
            backbone.strides,
            iou,
            iou,
            plain.sampler.batch_size_per_image,
            plain.sampler.positive_fraction,
            weights,
            plain.score_thresh,
            plain.nms_thresh,
            plain.detections_per_img,
            plain.box_beta,
            plain.soft_nms_sigma,
            plain.overlap_loss,
        )
        stages.append(stage)
    model.roi_heads = CascadeRoIHeads(stages, mean_of_logits=mean_of_logits)
    if masks:
        add_mask_branch(model.roi_heads, backbone, num_classes)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
