"""Faster R-CNN and its family from their parts, trained with Lightning."""

from detection.anchors import AnchorGenerator
from detection.boxes import BoxCoder
from detection.data.batch import Batch, Target
from detection.data.datamodule import DetectionDataModule
from detection.matching import BalancedSampler, Matcher
from detection.models.backbones import Backbone
from detection.models.detector import FasterRCNN
from detection.models.fpn import FeaturePyramidNetwork
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import ConvFCHead, FastRCNNPredictor, RoIHeads, TwoFCHead
from detection.models.rpn import RegionProposalNetwork, RPNHead
from detection.models.zoo import (
    create_faster_rcnn,
    faster_rcnn,
    fasterrcnn_efficientnet_lite0_fpn,
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    fasterrcnn_resnet101_fpn,
    fasterrcnn_resnet_fpn,
    fasterrcnn_timm_fpn,
)
from detection.module import DetectionModule

__all__ = [
    "AnchorGenerator",
    "Backbone",
    "BalancedSampler",
    "Batch",
    "BoxCoder",
    "ConvFCHead",
    "DetectionDataModule",
    "DetectionModule",
    "FastRCNNPredictor",
    "FasterRCNN",
    "FeaturePyramidNetwork",
    "Matcher",
    "RPNHead",
    "RegionProposalNetwork",
    "RoIHeads",
    "RoIPooler",
    "Target",
    "TwoFCHead",
    "create_faster_rcnn",
    "faster_rcnn",
    "fasterrcnn_efficientnet_lite0_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet101_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_resnet_fpn",
    "fasterrcnn_timm_fpn",
]
