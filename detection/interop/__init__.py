"""Checkpoints from and to torchvision, Detectron2 and MMDetection."""

from detection.interop.files import (
    detector_for_classes,
    export_detector,
    import_detector,
    load_detector,
    save_detector,
)
from detection.interop.foreign import fetch_weights
from detection.weights import CheckpointError, adapt_classes

__all__ = [
    "CheckpointError",
    "adapt_classes",
    "detector_for_classes",
    "export_detector",
    "fetch_weights",
    "import_detector",
    "load_detector",
    "save_detector",
]
