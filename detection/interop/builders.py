"""Detectors with the semantics that Detectron2 and MMDetection share, where they are not torchvision's.

Aligned RoI Align with as many samples as a bin has pixels, anchors that are not rounded, L1 for boxes, 1000 proposals
in training.

Shape shorthand:
    B: images     P: proposals an image
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from detection.anchors import Anchors, chosen_anchors
from detection.interop.heads import ConvLinearHead
from detection.interop.rows import STYLES, Style
from detection.interop.semantics import Library, Semantics
from detection.interop.told import Told, usual
from detection.losses import SmoothL1Loss
from detection.mask_grid import MaskGrid
from detection.models.backbones import Backbone, ResNetName, resnet_c4, resnet_dc5, resnet_fpn
from detection.models.c4 import Res5Head, Res5Maps, res5_head
from detection.models.compose import cascade_rcnn, channels_last, faster_rcnn, mask_branch, precomputed
from detection.models.family.keypoint_builders import keypoint_rcnn
from detection.models.masks import MaskHead, MaskPredictor
from detection.models.norms import Norm
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import FastRCNNPredictor, RoIHeads
from detection.models.two_stage import FasterRCNN
from detection.parts import Factory, Factory2, MaskGridPart
from detection.recipes import recorded
from detection.weights import CheckpointError

DEPTHS = {True: {6: 50, 23: 101, 36: 152}, False: {2: 18, 6: 34}}  # by bottleneck blocks or not, and those of layer3


@dataclass(frozen=True, slots=True)
class Layout:
    """What the tensors of a checkpoint tell about its detector.

    Attributes:
        resnet: the backbone's network.
        features: a pyramid, stage 4 with stage 5 as box head, or a dilated stage 5.
        num_classes: with background.
        stages: 1, or those of a cascade.
        mask: whether there is a mask branch.
        norm: of the backbone.
        fpn_norm, mask_norm: of the pyramid and of the mask branch.
        convs, linears, box_norm: of the box head, see `ConvLinearHead`.
        agnostic: whether a detector with one stage has one box for all classes, as a cascade has.
        precomputed: proposals come with the data (Fast R-CNN).
        stage_masks: each stage of a cascade has a mask branch.
        keypoints: of each object; 0 without a key point branch.
    """

    resnet: ResNetName
    features: Literal["fpn", "c4", "dc5"]
    num_classes: int
    stages: int
    mask: bool
    norm: Norm = "frozen"
    fpn_norm: Norm | None = None
    mask_norm: Norm | None = None
    convs: int = 0
    linears: int = 2
    box_norm: Norm | None = None
    agnostic: bool = False
    precomputed: bool = False
    stage_masks: bool = False
    keypoints: int = 0


def resnet_of(blocks: int, kernel: Tensor | None = None, bottleneck: bool = True) -> ResNetName:
    """The network with that many blocks in its third stage.

    Args:
        blocks: how many.
        kernel: of the 3x3 convolution of its first block, whose shape tells groups and their width.
        bottleneck: whether the blocks have three convolutions.

    Raises:
        CheckpointError: none of those that can be converted.
    """
    depth = DEPTHS[bottleneck].get(blocks, 0)
    name = f"resnet{depth}"
    if kernel is not None and bottleneck and (len(kernel) != kernel.shape[1] or len(kernel) != 64):
        name = f"resnext{depth}_{len(kernel) // kernel.shape[1]}x{kernel.shape[1]}d"
    known: tuple[ResNetName, ...] = get_args(ResNetName)
    found = next((other for other in known if other == name), None)
    if found is None:
        what = f"is {name}" if depth else f"has {blocks} blocks in its third stage"
        raise CheckpointError(f"the backbone {what}, where {', '.join(known)} can be converted")
    return found


def norm_of(state: Mapping[str, Tensor], prefix: str) -> Norm | None:
    """The normalisation with that prefix: `group` has no statistics, and without one there are no tensors."""
    if f"{prefix}weight" not in state:
        return None
    return "batch" if f"{prefix}running_mean" in state else "group"


def build(layout: Layout, style: Style, told: Told = Told(), **options: Any) -> FasterRCNN:  # noqa: B008
    """A detector of this layout and style, with random weights and a recipe.

    Args:
        layout, style: from the checkpoint.
        told: by a configuration, or nothing.
        **options: those of the builder in which the libraries differ.

    Raises:
        CheckpointError: a cascade without a pyramid, or of other than three stages; a mask branch in each stage without
            MMDetection's rules; or what is told is of another detector.
    """
    name, count = layout.resnet, layout.num_classes
    depth = int("".join(re.findall(r"\d+", name)[:1]))
    found = {"num_classes": count, "mask": layout.mask, "stages": layout.stages, "depth": depth}
    found["keypoints"] = layout.keypoints
    told.check(found | {"agnostic": layout.agnostic})
    settings = options | usual(count) | told.arguments | told.asked | style.image_mean | _heads(layout)
    rules = semantics_of(settings.get("semantics", "torchvision")).rules
    if layout.stage_masks and rules != "mmdetection":
        raise CheckpointError(f"each stage has a mask branch, which only MMDetection's rules train, not {rules}'s")
    if layout.keypoints and (layout.features, layout.stages) != ("fpn", 1):
        raise CheckpointError("a Keypoint R-CNN can be converted with one stage and a pyramid only")
    norm = told.norm or layout.norm
    if (norm == "group") != (layout.norm == "group"):
        raise CheckpointError(f"the config says {norm} normalisation, but the tensors are of {layout.norm}")
    if norm == "affine" and rules != "mmdetection":
        norm = "frozen"
    common: dict[str, Any] = {"norm": norm, "stride_in_1x1": style.stride_in_1x1}
    trained: dict[str, Any] = common | {
        "trainable_layers": 3 if told.trainable_layers is None else told.trainable_layers
    }
    if layout.stages > 1:
        if layout.features != "fpn" or layout.stages != 3:
            raise CheckpointError("a cascade can be converted with three stages and a pyramid only")
        backbone = resnet_fpn(name, **trained, fpn_norm=layout.fpn_norm)
        return aligned_cascade_rcnn(backbone, count, layout.mask, **settings)
    if layout.features == "fpn":
        return aligned_rcnn(resnet_fpn(name, **trained, fpn_norm=layout.fpn_norm), count, layout.mask, **settings)
    proposals = {"rpn_pre_nms_top_n_train": 12000, "rpn_pre_nms_top_n_test": 6000, "rpn_post_nms_top_n_train": 2000}
    settings = proposals | settings
    settings["size_divisible"] = 1  # only a pyramid needs sides that all its maps divide
    if layout.features == "dc5":
        return aligned_rcnn(resnet_dc5(name, **trained, dilate_first=True), count, layout.mask, **settings)
    head, backbone = res5_head(name, **common), resnet_c4(name, **trained)
    return aligned_rcnn(backbone, count, layout.mask, box_head=head, box_output_size=14, **settings)


def _heads(layout: Layout) -> dict[str, Any]:
    """The arguments of a builder for heads, and for proposals, that are not the usual ones."""
    parts: dict[str, Any] = {}
    if (layout.convs, layout.linears) != (0, 2):
        shape: dict[str, Any] = {"convs": layout.convs, "linears": layout.linears, "norm": layout.box_norm}
        parts["box_head"] = partial(ConvLinearHead, **shape)
    if layout.mask and layout.mask_norm:
        parts["mask_head"] = partial(MaskHead, norm=layout.mask_norm)
    if layout.stage_masks:
        parts["stage_masks"] = True
    if layout.keypoints:
        parts["num_keypoints"] = layout.keypoints
    if layout.agnostic:
        parts["box_predictor"] = partial(FastRCNNPredictor, class_agnostic=True)
    if layout.precomputed:
        parts["rpn"] = precomputed(2000, 1000, None)
    return parts


def style_of(model: FasterRCNN) -> Style:
    """The style to write a detector in: that of MSRA's weights where its stride is, as such settings come in pairs."""
    blocks = [module for module in model.backbone.modules() if isinstance(module, Bottleneck)]
    return STYLES["caffe" if any(block.conv1.stride != (1, 1) for block in blocks) else "pytorch"]


def box_pool_of(model: FasterRCNN) -> nn.Module:
    """What pools for the boxes, of the first stage in a cascade."""
    heads = next(module for module in model.roi_heads.modules() if isinstance(module, RoIHeads))
    return heads.box_roi_pool


@recorded
def aligned_rcnn(
    backbone: Backbone,
    num_classes: int,
    masks: bool = False,
    box_head: nn.Module | Factory2 | None = None,
    box_output_size: int = 7,
    box_roi_pool: nn.Module | None = None,
    mask_roi_pool: nn.Module | None = None,
    rpn_anchor_generator: Anchors = None,
    rpn_post_nms_top_n_train: int = 1000,
    rpn_box_loss: Callable[..., Any] | None = None,
    box_loss: Callable[..., Any] | None = None,
    mask_head: nn.Module | Factory | None = None,
    mask_grid: Any = None,
    num_keypoints: int = 0,
    keypoint_roi_pool: nn.Module | None = None,
    min_size: int | Sequence[int] = 800,
    semantics: Library | Semantics = "torchvision",
    **kwargs: Any,
) -> FasterRCNN:
    """Faster, Mask or Keypoint R-CNN as Detectron2 and MMDetection train it.

    Args:
        backbone: e.g. `resnet_fpn(norm="frozen", stride_in_1x1=True)`.
        num_classes: classes with background.
        masks: with a mask branch.
        box_head: default: two layers of 1024. A `Res5Head` serves the masks, too.
        box_output_size: side of the pooled features.
        box_roi_pool, mask_roi_pool, keypoint_roi_pool: default: aligned RoI Align with as many samples as a bin has
            cells.
        rpn_anchor_generator: default: that of `faster_rcnn`, not rounded.
        rpn_post_nms_top_n_train: proposals of an image in training.
        rpn_box_loss, box_loss: default: plain L1.
        mask_head: default: four convolutions, or the stage of a `Res5Head`.
        mask_grid: see `faster_rcnn`; the default, `MaskGrid`, is that of both libraries.
        num_keypoints: of each object; 0 for none, and then `keypoint_roi_pool` has no effect.
        min_size: see `ImageTransform`.
        semantics: whose rules of training, see `Semantics`.
        **kwargs: see `faster_rcnn`, and `keypoint_rcnn`.
    """
    rules = semantics_of(semantics)
    arguments: dict[str, Any] = rules.parts(kwargs, masks) | {
        "rpn_anchor_generator": chosen_anchors(rpn_anchor_generator, len(backbone.strides), round_anchors=False),
        "rpn_post_nms_top_n_train": rpn_post_nms_top_n_train,
        "box_roi_pool": box_roi_pool or _pooler(box_output_size),
        "box_head": box_head,
        "rpn_box_loss": rpn_box_loss or SmoothL1Loss(0.0),
        "box_loss": box_loss or SmoothL1Loss(0.0),
        "min_size": min_size,
    }
    if masks:
        mask_head = Res5Maps(box_head) if isinstance(box_head, Res5Head) else mask_head
        arguments |= mask_branch(mask_roi_pool or _pooler(14), mask_head, None, mask_grid)
    if num_keypoints:
        pool = keypoint_roi_pool or _pooler(14)
        return rules.apply(keypoint_rcnn(backbone, num_classes, num_keypoints, keypoint_roi_pool=pool, **arguments))
    return rules.apply(faster_rcnn(backbone, num_classes, **arguments))


@recorded
def aligned_cascade_rcnn(
    backbone: Backbone,
    num_classes: int,
    masks: bool = False,
    box_roi_pool: nn.Module | None = None,
    mask_roi_pool: nn.Module | None = None,
    rpn_anchor_generator: Anchors = None,
    cascade_bbox_reg_weights: Sequence[Sequence[float]] = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)),
    mean_of_logits: bool = False,
    rpn_box_loss: Callable[..., Any] | None = None,
    box_loss: Callable[..., Any] | None = None,
    mask_head: Factory | None = None,
    mask_grid: Any = None,
    stage_masks: bool = False,
    semantics: Library | Semantics = "torchvision",
    **kwargs: Any,
) -> FasterRCNN:
    """Cascade R-CNN as Detectron2 trains it and, with other arguments, MMDetection.

    Args:
        backbone, num_classes, masks, box_roi_pool, mask_roi_pool, rpn_anchor_generator: see `aligned_rcnn`.
        cascade_bbox_reg_weights: of each stage.
        mean_of_logits: average the stages' logits (MMDetection) in place of their probabilities.
        rpn_box_loss, box_loss: default: plain L1.
        mask_head: default: four convolutions.
        mask_grid: see `faster_rcnn`; the default, `MaskGrid`, is that of both libraries.
        stage_masks: with a mask branch in each stage, as MMDetection has them, and not the one of `masks`.
        semantics: whose rules of training, see `Semantics`.
        **kwargs: see `cascade_rcnn`.

    Raises:
        ValueError: `stage_masks` with other rules than MMDetection's, which alone say how they train.
    """
    rules = semantics_of(semantics)
    if stage_masks and rules.rules != "mmdetection":
        raise ValueError(
            f"semantics {rules.rules!r} do not say how a mask branch in each stage trains: take mmdetection"
        )
    model = cascade_rcnn(
        backbone,
        num_classes,
        masks and not stage_masks,
        mask_roi_pool=mask_roi_pool or _pooler(14),
        mask_head=mask_head,
        mask_grid=mask_grid,
        cascade_bbox_reg_weights=cascade_bbox_reg_weights,
        mean_of_logits=mean_of_logits,
        rpn_box_loss=rpn_box_loss or SmoothL1Loss(0.0),
        box_loss=box_loss or SmoothL1Loss(0.0),
        rpn_anchor_generator=chosen_anchors(rpn_anchor_generator, len(backbone.strides), round_anchors=False),
        box_roi_pool=box_roi_pool or _pooler(7),
        **rules.parts(kwargs),
    )
    if stage_masks:
        _add_masks(model, mask_roi_pool or _pooler(14), mask_head or MaskHead, mask_grid or MaskGrid())
    return rules.apply(model)


def _add_masks(model: FasterRCNN, pool: nn.Module, head: Factory, grid: MaskGridPart) -> None:
    """Give each stage of a cascade a mask branch."""
    for stage in model.roi_heads.stages:
        stage.mask_roi_pool, stage.mask_head, stage.mask_grid = pool, head(model.backbone.out_channels), grid
        stage.mask_predictor = MaskPredictor(stage.mask_head.out_channels, model.num_classes)
    model.roi_heads.mask_grid = grid
    model.check()
    channels_last(model)


def semantics_of(semantics: Library | Semantics) -> Semantics:
    """The rules that a library's name stands for."""
    return Semantics(semantics) if isinstance(semantics, str) else semantics


def _pooler(output_size: int) -> RoIPooler:
    return RoIPooler(output_size, sampling_ratio=0, aligned=True)
