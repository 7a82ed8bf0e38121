"""Detectors at work: images, folders, videos -> detections with class names, pictures and files of results."""

from detection.inference.detections import Detections
from detection.inference.detector import Detector, ImageLike
from detection.inference.run import Summary, predict
from detection.inference.tiles import Tiles

__all__ = ["Detections", "Detector", "ImageLike", "Summary", "Tiles", "predict"]
