"""Whether the data has what the detector learns from: masks, key points and channels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from detection.data.skeletons import SIGMA, Skeleton
from detection.data.spectral import PixelFormat
from detection.training.encoding import kinds_of

log = logging.getLogger(__name__)


def check_targets(detector: nn.Module, settings: Mapping[str, Any], skeleton: Skeleton | None) -> None:
    """Refuse data without the ground truth that a detector is trained and evaluated with.

    Args:
        detector: of this package, or one in its place.
        settings: those of the data; what they don't say is not checked.
        skeleton: of the data's key points, where it has any.

    Raises:
        ValueError: with the setting to change.
    """
    kinds = kinds_of(detector)
    if "segm" in kinds and not settings.get("masks", True):
        raise ValueError("the detector predicts masks but the data is read without: set data.masks to true")
    if "keypoints" in kinds:
        _check_key_points(detector, settings, skeleton)


def check_form(detector: nn.Module, form: PixelFormat | None) -> None:
    """A ValueError where the data's images, whose form may be unknown, aren't of the channels that a detector takes."""
    if form is not None and hasattr(detector, "transform") and form != (wanted := PixelFormat.of(detector)):
        raise ValueError(
            f"the detector takes images with {wanted}, but the data has {form}: build it with in_channels, "
            "image_depth, image_mean and image_std of the data"
        )


def _check_key_points(detector: Any, settings: Mapping[str, Any], skeleton: Skeleton | None) -> None:
    points = int(detector.num_keypoints)
    if not settings.get("keypoints", True):
        raise ValueError("the detector predicts key points but the data is read without: set data.keypoints to true")
    if skeleton is None:
        return
    if points != len(skeleton):
        raise ValueError(
            f"the detector predicts {points} key points, but the data has {len(skeleton)}: build it with "
            f"num_keypoints={len(skeleton)}"
        )
    if skeleton.guesses_sigmas:
        log.info(
            "OKS takes the sigma %g for each of the %d key points; data.keypoint_sigmas sets others (Ultralytics "
            "takes 1 / k)",
            SIGMA,
            points,
        )
