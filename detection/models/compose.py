"""Whole detectors on any backbone, each part replaceable; `detection.models.zoo` has the named ones.

A part is an object, or a factory that is called with what only the builder knows; `detection.parts` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from torch import nn

from detection.anchors import Anchors
from detection.boxes import BoxCoder
from detection.fitting import PartError, finish, name_of
from detection.mask_grid import MaskGrid
from detection.matching import Matcher
from detection.models.cascade import CascadeRoIHeads
from detection.models.masks import MaskHead, MaskPredictor
from detection.models.pooling import RoIPool, RoIPooler
from detection.models.precomputed import PrecomputedProposals
from detection.models.roi_heads import FastRCNNPredictor, RoIHeads, TwoFCHead
from detection.models.rpn import RegionProposalNetwork
from detection.models.transform import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from detection.models.two_stage import TwoStageDetector, layout_of
from detection.parts import Factory, Factory2, ProposerFactory
from detection.recipes import recorded
from detection.resizing import Resizing
from detection.selective_search import SelectiveSearch
from detection.weights import widen

COCO_CATEGORIES = 91  # with background: torchvision's labels are COCO's category ids, gaps included


@recorded
def faster_rcnn(
    backbone: nn.Module,
    num_classes: int = COCO_CATEGORIES,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    image_mean: Sequence[float] = IMAGENET_MEAN,
    image_std: Sequence[float] = IMAGENET_STD,
    rpn_anchor_generator: Anchors = None,
    rpn_head: nn.Module | Factory2 | None = None,
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
    box_head: nn.Module | Factory2 | None = None,
    box_predictor: nn.Module | Factory2 | None = None,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 100,
    box_fg_iou_thresh: float = 0.5,
    box_bg_iou_thresh: float = 0.5,
    box_batch_size_per_image: int = 512,
    box_positive_fraction: float = 0.25,
    bbox_reg_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    soft_nms_sigma: float | None = None,
    rpn_matcher: Callable[..., Any] | None = None,
    rpn_sampler: Callable[..., Any] | None = None,
    rpn_box_coder: Any = None,
    rpn_objectness_loss: Callable[..., Any] | None = None,
    rpn_box_loss: Callable[..., Any] | None = None,
    box_matcher: Callable[..., Any] | None = None,
    box_sampler: Callable[..., Any] | None = None,
    box_coder: Any = None,
    class_loss: Callable[..., Any] | None = None,
    box_loss: Callable[..., Any] | None = None,
    mask_roi_pool: nn.Module | None = None,
    mask_head: nn.Module | Factory | None = None,
    mask_predictor: nn.Module | Factory2 | None = None,
    mask_loss: Callable[..., Any] | None = None,
    mask_grid: Any = None,
    rpn: nn.Module | ProposerFactory | None = None,
    roi_heads: nn.Module | Factory2 | None = None,
    in_channels: int = 3,
    image_depth: int = 8,
    size_divisible: int = 32,
    resizing: Resizing = "torchvision",
) -> TwoStageDetector:
    """Faster R-CNN on a backbone, each part replaceable; names and defaults are those of torchvision's `FasterRCNN`.

    Args:
        backbone: images -> feature maps.
        num_classes: classes with background.
        min_size, max_size, image_mean, image_std, image_depth, size_divisible, resizing: see `ImageTransform`.
        in_channels: of the images; the first convolution of a backbone for RGB is adapted, see `weights.widen`.
        rpn_anchor_generator: default: one size a level, 32 pixels on the finest of five and twice that on each next;
            with fewer levels all five sizes on each. Ratios 1:2, 1:1, 2:1. In a run's settings `auto` fits them to the
            boxes of the training data, see `detection.data.anchor_fit`.
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
        rpn_matcher, rpn_sampler, rpn_box_coder, box_matcher, box_sampler, box_coder: in the place of those that the
            thresholds and numbers above describe.
        rpn_objectness_loss, rpn_box_loss, class_loss, box_loss, mask_loss: in the place of binary cross-entropy, smooth
            L1, cross-entropy, smooth L1, and binary cross-entropy.
        mask_roi_pool, mask_head, mask_predictor: the mask branch, see `mask_rcnn`; None for boxes alone.
        mask_grid: where a mask's cells lie in its box; default: `MaskGrid`, see there.
        rpn: another `Proposer`; the other `rpn_` arguments then have no effect.
        roi_heads: other RoI heads; the `box_` and `mask_` arguments then have no effect.

    Raises:
        PartError: a part does not keep its contract, see `detection.parts`.
    """
    strides, channels = layout_of(widen(backbone, in_channels, image_mean, image_std))
    proposer = rpn or partial(
        RegionProposalNetwork,
        anchor_generator=rpn_anchor_generator,
        head=rpn_head,
        fg_iou_thresh=rpn_fg_iou_thresh,
        bg_iou_thresh=rpn_bg_iou_thresh,
        batch_size_per_image=rpn_batch_size_per_image,
        positive_fraction=rpn_positive_fraction,
        pre_nms_top_n={"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
        post_nms_top_n={"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test},
        nms_thresh=rpn_nms_thresh,
        score_thresh=rpn_score_thresh,
        matcher=rpn_matcher,
        sampler=rpn_sampler,
        box_coder=rpn_box_coder,
        objectness_loss=rpn_objectness_loss,
        box_loss=rpn_box_loss,
    )
    heads = roi_heads or partial(
        RoIHeads,
        box_roi_pool=box_roi_pool,
        box_head=box_head,
        box_predictor=box_predictor,
        fg_iou_thresh=box_fg_iou_thresh,
        bg_iou_thresh=box_bg_iou_thresh,
        batch_size_per_image=box_batch_size_per_image,
        positive_fraction=box_positive_fraction,
        bbox_reg_weights=bbox_reg_weights,
        score_thresh=box_score_thresh,
        nms_thresh=box_nms_thresh,
        detections_per_img=box_detections_per_img,
        soft_nms_sigma=soft_nms_sigma,
        matcher=box_matcher,
        sampler=box_sampler,
        box_coder=box_coder,
        class_loss=class_loss,
        box_loss=box_loss,
        mask_roi_pool=mask_roi_pool,
        mask_head=mask_head,
        mask_predictor=mask_predictor,
        mask_loss=mask_loss,
        mask_grid=mask_grid,
    )
    model = TwoStageDetector(
        backbone,
        finish("rpn", proposer, channels, strides),
        finish("roi_heads", heads, channels, num_classes),
        ImageTransform(min_size, max_size, image_mean, image_std, size_divisible, image_depth, resizing),
    )
    return channels_last(model)


def channels_last(model: TwoStageDetector) -> TwoStageDetector:
    """The model with its weights in channels-last layout, in which convolutions are faster on CPUs and GPUs alike."""
    from torch import channels_last as layout

    return model.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]


@recorded
def mask_rcnn(
    backbone: nn.Module,
    num_classes: int = COCO_CATEGORIES,
    mask_roi_pool: nn.Module | None = None,
    mask_head: nn.Module | Factory | None = None,
    mask_predictor: nn.Module | Factory2 | None = None,
    mask_grid: Any = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Mask R-CNN (He et al. 2017): Faster R-CNN with a mask branch; names and defaults of torchvision's `MaskRCNN`,
    but for the grid.

    Args:
        backbone, num_classes: see `faster_rcnn`.
        mask_roi_pool: default: RoI Align 14x14 with 2x2 samples on all levels but the last.
        mask_head: default: four 3x3 convolutions.
        mask_predictor: default: masks of 28x28, one a class.
        mask_grid: see `faster_rcnn`; `TorchvisionMaskGrid` gives torchvision's masks.
        **kwargs: see `faster_rcnn`.
    """
    branch = mask_branch(mask_roi_pool, mask_head, mask_predictor, mask_grid)
    return faster_rcnn(backbone, num_classes, **branch, **kwargs)


def mask_branch(
    roi_pool: nn.Module | None,
    head: nn.Module | Factory | None,
    predictor: nn.Module | Factory2 | None,
    grid: Any = None,
) -> dict[str, Any]:
    """The arguments of `faster_rcnn` for a mask branch, with the defaults of `mask_rcnn`."""
    parts = (roi_pool or RoIPooler(14), head or MaskHead, predictor or MaskPredictor, grid or MaskGrid())
    return dict(zip(("mask_roi_pool", "mask_head", "mask_predictor", "mask_grid"), parts, strict=True))


@recorded
def cascade_rcnn(
    backbone: nn.Module,
    num_classes: int = COCO_CATEGORIES,
    masks: bool = False,
    cascade_iou_thresh: Sequence[float] = (0.5, 0.6, 0.7),
    cascade_bbox_reg_weights: Sequence[Sequence[float]] = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)),
    mean_of_logits: bool = False,
    box_head: Factory2 | None = None,
    box_predictor: Factory2 | None = None,
    mask_roi_pool: nn.Module | None = None,
    mask_head: nn.Module | Factory | None = None,
    mask_predictor: nn.Module | Factory2 | None = None,
    mask_grid: Any = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Cascade R-CNN (Cai and Vasconcelos 2018, section 4): three box heads in a row.

    Args:
        backbone, num_classes: see `faster_rcnn`.
        masks: with a mask branch.
        cascade_iou_thresh: of each stage, foreground from it on.
        cascade_bbox_reg_weights: of each stage; the boxes get better, so the deltas get smaller.
        mean_of_logits: see `CascadeRoIHeads`.
        box_head, box_predictor: factories, as each stage has its own; predictors are class-agnostic.
        mask_roi_pool, mask_head, mask_predictor, mask_grid: see `mask_rcnn`.
        **kwargs: see `faster_rcnn`; `box_fg_iou_thresh`, `box_bg_iou_thresh`, `box_matcher`, `bbox_reg_weights` and
            `box_coder` have no effect, as each stage has its own.

    Raises:
        ValueError: as many IoU thresholds as coder weights are needed.
        PartError: a part is an object, of which there is only one, or does not keep its contract.
    """
    if len(cascade_iou_thresh) != len(cascade_bbox_reg_weights):
        raise ValueError(
            f"{len(cascade_iou_thresh)} IoU thresholds but {len(cascade_bbox_reg_weights)} coder weights: give one "
            "of each for every stage"
        )
    for name, part in {"box_head": box_head, "box_predictor": box_predictor}.items():
        if isinstance(part, nn.Module):
            raise PartError(
                f"{name}: {name_of(part)} is one object, but each of the {len(cascade_iou_thresh)} stages needs its "
                "own: give its class, or in YAML leave out what the builder fills in"
            )
    head, predictor = box_head or TwoFCHead, box_predictor or partial(FastRCNNPredictor, class_agnostic=True)
    model = faster_rcnn(
        backbone,
        num_classes,
        box_head=head,
        box_predictor=predictor,
        **(mask_branch(mask_roi_pool, mask_head, mask_predictor, mask_grid) if masks else {}),
        **kwargs,
    )
    first: RoIHeads = model.roi_heads
    same = ("sampler", "class_loss", "box_loss", "score_thresh", "nms_thresh", "detections_per_img", "soft_nms_sigma")
    kept: dict[str, Any] = {name: getattr(first, name) for name in same}
    common = layout_of(backbone)[1], num_classes, first.box_roi_pool, head, predictor
    stages = [
        # Of a loss each has its own: it may count what it has seen.
        RoIHeads(*common, matcher=Matcher(iou, iou), box_coder=BoxCoder(weights), **deepcopy(kept))
        for iou, weights in zip(cascade_iou_thresh, cascade_bbox_reg_weights, strict=True)
    ]
    branch = first.mask_roi_pool, first.mask_head, first.mask_predictor, first.mask_loss
    model.roi_heads = CascadeRoIHeads(stages, *branch, mean_of_logits, first.mask_grid)
    model.check()
    return channels_last(model)


@recorded
def fast_rcnn(
    backbone: nn.Module,
    num_classes: int = COCO_CATEGORIES,
    proposals_train: int = 2000,
    proposals_test: int = 2000,
    proposal_source: SelectiveSearch | None = None,
    box_roi_pool: nn.Module | None = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Fast R-CNN (Girshick 2015) on a backbone: Faster R-CNN without its region proposal network.

    Background is every proposal with IoU < `box_bg_iou_thresh`. The paper also wants IoU >= 0.1 (section 2.3).

    Args:
        backbone: images -> feature maps.
        num_classes: classes with background.
        proposals_train, proposals_test: how many of the best proposals of an image are used.
        proposal_source: proposes for images that come without; default: `SelectiveSearch()`.
        box_roi_pool: default: RoI max pooling 7x7 on all levels but the last.
        **kwargs: see `faster_rcnn`; those of the RPN have no effect.
    """
    proposer = precomputed(proposals_train, proposals_test, proposal_source)
    return faster_rcnn(backbone, num_classes, rpn=proposer, box_roi_pool=box_roi_pool or RoIPool(), **kwargs)


def precomputed(training: int, testing: int, source: SelectiveSearch | None) -> PrecomputedProposals:
    """The proposer of `fast_rcnn`; arguments as there."""
    return PrecomputedProposals({"training": training, "testing": testing}, source or SelectiveSearch())
