"""Faster R-CNN and its family from their parts, trained with Lightning."""

from detection.anchors import AnchorGenerator
from detection.boxes import BoxCoder
from detection.data.batch import Batch, Target
from detection.data.datamodule import DetectionDataModule
from detection.data.proposals import ProposalFiles, SearchedProposals
from detection.inference import Detections, Detector, Tiles
from detection.interop import detector_for_classes, load_detector, save_detector
from detection.losses import CIoULoss, GIoULoss
from detection.matching import BalancedSampler, Matcher
from detection.models.backbones import Backbone
from detection.models.cascade import CascadeRoIHeads
from detection.models.compose import cascade_rcnn, faster_rcnn, mask_rcnn
from detection.models.detector import FasterRCNN
from detection.models.family import (
    fast_rcnn,
    fasterrcnn_resnet_c4,
    fasterrcnn_resnet_dc5,
    fastrcnn_efficientnet_lite0_fpn,
    fastrcnn_resnet_fpn,
    rcnn_efficientnet_lite0,
    rcnn_resnet,
)
from detection.models.fpn import FeaturePyramidNetwork
from detection.models.masks import MaskHead, MaskPredictor
from detection.models.pooling import RoIPool, RoIPooler
from detection.models.proposals import GivenProposals
from detection.models.rcnn import RegionWarp
from detection.models.roi_heads import ConvFCHead, FastRCNNPredictor, RoIHeads, TwoFCHead
from detection.models.rpn import RegionProposalNetwork, RPNHead
from detection.models.tta import TestTimeAugmentation
from detection.models.zoo import (
    cascadercnn_efficientnet_lite0_fpn,
    cascadercnn_resnet50_fpn,
    create_faster_rcnn,
    fasterrcnn_efficientnet_lite0_fpn,
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    fasterrcnn_resnet101_fpn,
    fasterrcnn_resnet_fpn,
    fasterrcnn_timm_fpn,
    maskrcnn_efficientnet_lite0_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from detection.module import DetectionModule
from detection.selective_search import SelectiveSearch

__all__ = [
    "AnchorGenerator",
    "Backbone",
    "BalancedSampler",
    "Batch",
    "BoxCoder",
    "CIoULoss",
    "CascadeRoIHeads",
    "ConvFCHead",
    "DetectionDataModule",
    "DetectionModule",
    "Detections",
    "Detector",
    "FastRCNNPredictor",
    "FasterRCNN",
    "FeaturePyramidNetwork",
    "GIoULoss",
    "GivenProposals",
    "MaskHead",
    "MaskPredictor",
    "Matcher",
    "ProposalFiles",
    "RPNHead",
    "RegionProposalNetwork",
    "RegionWarp",
    "RoIHeads",
    "RoIPool",
    "RoIPooler",
    "SearchedProposals",
    "SelectiveSearch",
    "Target",
    "TestTimeAugmentation",
    "Tiles",
    "TwoFCHead",
    "cascade_rcnn",
    "cascadercnn_efficientnet_lite0_fpn",
    "cascadercnn_resnet50_fpn",
    "create_faster_rcnn",
    "detector_for_classes",
    "fast_rcnn",
    "faster_rcnn",
    "fasterrcnn_efficientnet_lite0_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet101_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_resnet_c4",
    "fasterrcnn_resnet_dc5",
    "fasterrcnn_resnet_fpn",
    "fasterrcnn_timm_fpn",
    "fastrcnn_efficientnet_lite0_fpn",
    "fastrcnn_resnet_fpn",
    "load_detector",
    "mask_rcnn",
    "maskrcnn_efficientnet_lite0_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "rcnn_efficientnet_lite0",
    "rcnn_resnet",
    "save_detector",
]
