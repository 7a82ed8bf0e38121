"""Detectors with the semantics that Detectron2 and MMDetection share, where they are not torchvision's.

Aligned RoI Align with as many samples as a bin has pixels, anchors that are not rounded, L1 for boxes, 1000 proposals
in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torchvision.models.resnet import Bottleneck

from detection.anchors import AnchorGenerator
from detection.interop.rows import STYLES, Style
from detection.models.backbones import Backbone, ResNetName, resnet_c4, resnet_dc5, resnet_fpn
from detection.models.c4 import res5_head
from detection.models.detector import FasterRCNN
from detection.models.pooling import RoIPooler
from detection.models.weights import CheckpointError
from detection.models.zoo import default_anchors, faster_rcnn
from detection.recipes import recorded

DEPTHS: dict[int, ResNetName] = {6: "resnet50", 23: "resnet101", 36: "resnet152"}  # by the blocks of layer3


@dataclass(frozen=True, slots=True)
class Layout:
    """What the tensors of a checkpoint tell about its detector.

    Attributes:
        resnet: the backbone's network.
        features: a pyramid, stage 4 with stage 5 as box head, or a dilated stage 5.
        num_classes: with background.
        stages: 1, or those of a cascade.
        mask: whether there is a mask branch.
    """

    resnet: ResNetName
    features: Literal["fpn", "c4", "dc5"]
    num_classes: int
    stages: int
    mask: bool


def resnet_of(blocks: int) -> ResNetName:
    """The network with that many blocks in its third stage.

    Raises:
        CheckpointError: none of those that can be converted.
    """
    if blocks not in DEPTHS:
        raise CheckpointError(
            f"the backbone has {blocks} blocks in its third stage: only ResNet-50 (6), 101 (23) and 152 (36) with "
            f"bottleneck blocks can be converted"
        )
    return DEPTHS[blocks]


def build(layout: Layout, style: Style) -> FasterRCNN:
    """A detector of this layout and style, with random weights and a recipe."""
    name, in_1x1 = layout.resnet, style.stride_in_1x1
    if layout.features == "fpn":
        return aligned_rcnn(resnet_fpn(name, norm="frozen", stride_in_1x1=in_1x1), layout.num_classes)
    parts: dict[str, Any] = {"rpn_pre_nms_top_n_train": 12000, "rpn_pre_nms_top_n_test": 6000}
    parts["rpn_post_nms_top_n_train"] = 2000
    if layout.features == "c4":
        backbone = resnet_c4(name, norm="frozen", stride_in_1x1=in_1x1)
        head = res5_head(name, stride_in_1x1=in_1x1)
        return aligned_rcnn(backbone, layout.num_classes, box_head=head, box_output_size=14, **parts)
    return aligned_rcnn(resnet_dc5(name, norm="frozen", stride_in_1x1=in_1x1), layout.num_classes, **parts)


def style_of(model: FasterRCNN) -> Style:
    """The style to write a detector in: that of MSRA's weights where its stride is, as such settings come in pairs."""
    blocks = [module for module in model.backbone.modules() if isinstance(module, Bottleneck)]
    return STYLES["caffe" if any(block.conv1.stride != (1, 1) for block in blocks) else "pytorch"]


@recorded
def aligned_rcnn(
    backbone: Backbone,
    num_classes: int,
    box_head: nn.Module | None = None,
    box_output_size: int = 7,
    rpn_anchor_generator: AnchorGenerator | None = None,
    rpn_post_nms_top_n_train: int = 1000,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN as Detectron2 and MMDetection train it.

    Args:
        backbone: e.g. `resnet_fpn(norm="frozen", stride_in_1x1=True)`.
        num_classes: classes with background.
        box_head: default: two layers of 1024.
        box_output_size: side of the pooled features.
        rpn_anchor_generator: default: that of `faster_rcnn`, not rounded.
        rpn_post_nms_top_n_train: proposals of an image in training.
        **kwargs: see `faster_rcnn`.
    """
    levels = max(1, len(backbone.strides) - 1)
    model = faster_rcnn(
        backbone,
        num_classes,
        rpn_anchor_generator=rpn_anchor_generator or default_anchors(len(backbone.strides), round_anchors=False),
        rpn_post_nms_top_n_train=rpn_post_nms_top_n_train,
        box_roi_pool=RoIPooler(box_output_size, sampling_ratio=0, aligned=True, num_levels=levels),
        box_head=box_head,
        **kwargs,
    )
    model.rpn.box_beta = model.roi_heads.box_beta = 0.0
    return model
