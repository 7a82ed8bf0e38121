"""Faster R-CNN and its family from their parts, trained with Lightning.

The public names below are imported from their modules when they are first asked for, so that `import detection` is
quick and needs neither Lightning nor anything else of training.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detection.anchors import AnchorGenerator
    from detection.batch import Batch, Target
    from detection.boxes import BoxCoder
    from detection.data.datamodule import DetectionDataModule
    from detection.data.proposals import ProposalFiles, SearchedProposals
    from detection.fitting import PartError
    from detection.inference import Detections, Detector, Tiles
    from detection.inference.tta import TestTimeAugmentation
    from detection.interop import detector_for_classes, load_detector, save_detector
    from detection.losses import CIoULoss, ClassWeights, FocalLoss, GIoULoss, SmoothL1Loss
    from detection.mask_grid import MaskGrid, TorchvisionMaskGrid
    from detection.matching import BalancedSampler, HardExampleSampler, Matcher
    from detection.measuring import measure
    from detection.models.backbones import Backbone
    from detection.models.cascade import CascadeRoIHeads
    from detection.models.compose import cascade_rcnn, faster_rcnn, mask_rcnn
    from detection.models.family.keypoint_builders import (
        keypoint_rcnn,
        keypointrcnn_efficientnet_lite0_fpn,
        keypointrcnn_resnet50_fpn,
    )
    from detection.models.family.keypoints import KeypointHead, KeypointPredictor, KeypointRoIHeads
    from detection.models.fast import accelerate
    from detection.models.masks import MaskHead, MaskPredictor
    from detection.models.pooling import RoIPool, RoIPooler
    from detection.models.precomputed import PrecomputedProposals
    from detection.models.pyramid import FeaturePyramidNetwork
    from detection.models.rcnn import RegionWarp
    from detection.models.relatives import (
        fast_rcnn,
        fasterrcnn_resnet_c4,
        fasterrcnn_resnet_dc5,
        fastrcnn_efficientnet_lite0_fpn,
        fastrcnn_resnet_fpn,
        rcnn_efficientnet_lite0,
        rcnn_resnet,
    )
    from detection.models.roi_heads import ConvFCHead, FastRCNNPredictor, RoIHeads, TwoFCHead
    from detection.models.rpn import RegionProposalNetwork, RPNHead
    from detection.models.two_stage import FasterRCNN, TwoStageDetector
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
    from detection.parts import FeatureMaps, Proposals
    from detection.recipes import recorded
    from detection.selective_search import SelectiveSearch
    from detection.training.module import DetectionModule
    from detection.training.optimisation import CosineSchedule, MultiStepSchedule
    from detection.training.sharing import ShardedOptimizer

_HOMES = {
    "anchors": "AnchorGenerator",
    "batch": "Batch Target",
    "boxes": "BoxCoder",
    "data.datamodule": "DetectionDataModule",
    "data.proposals": "ProposalFiles SearchedProposals",
    "inference": "Detections Detector Tiles",
    "interop": "detector_for_classes load_detector save_detector",
    "fitting": "PartError",
    "losses": "CIoULoss ClassWeights FocalLoss GIoULoss SmoothL1Loss",
    "mask_grid": "MaskGrid TorchvisionMaskGrid",
    "matching": "BalancedSampler HardExampleSampler Matcher",
    "measuring": "measure",
    "models.backbones": "Backbone",
    "models.cascade": "CascadeRoIHeads",
    "models.compose": "cascade_rcnn faster_rcnn mask_rcnn",
    "models.family.keypoint_builders": ("keypoint_rcnn keypointrcnn_efficientnet_lite0_fpn keypointrcnn_resnet50_fpn"),
    "models.family.keypoints": "KeypointHead KeypointPredictor KeypointRoIHeads",
    "models.fast": "accelerate",
    "models.masks": "MaskHead MaskPredictor",
    "models.pooling": "RoIPool RoIPooler",
    "models.precomputed": "PrecomputedProposals",
    "models.pyramid": "FeaturePyramidNetwork",
    "models.rcnn": "RegionWarp",
    "models.relatives": (
        "fast_rcnn fasterrcnn_resnet_c4 fasterrcnn_resnet_dc5 fastrcnn_efficientnet_lite0_fpn "
        "fastrcnn_resnet_fpn rcnn_efficientnet_lite0 rcnn_resnet"
    ),
    "models.roi_heads": "ConvFCHead FastRCNNPredictor RoIHeads TwoFCHead",
    "models.rpn": "RPNHead RegionProposalNetwork",
    "inference.tta": "TestTimeAugmentation",
    "models.two_stage": "FasterRCNN TwoStageDetector",
    "models.zoo": (
        "cascadercnn_efficientnet_lite0_fpn cascadercnn_resnet50_fpn create_faster_rcnn "
        "fasterrcnn_efficientnet_lite0_fpn fasterrcnn_mobilenet_v3_large_320_fpn "
        "fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet101_fpn fasterrcnn_resnet50_fpn "
        "fasterrcnn_resnet50_fpn_v2 fasterrcnn_resnet_fpn fasterrcnn_timm_fpn maskrcnn_efficientnet_lite0_fpn "
        "maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2"
    ),
    "parts": "FeatureMaps Proposals",
    "recipes": "recorded",
    "selective_search": "SelectiveSearch",
    "training.module": "DetectionModule",
    "training.optimisation": "CosineSchedule MultiStepSchedule",
    "training.sharing": "ShardedOptimizer",
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
