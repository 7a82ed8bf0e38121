"""Forms for CPUs, which can read a number from a tensor at once. An accelerator would have to finish its queue first.

Shape shorthand:
    B: images     P: proposals an image     M: regions of an image that the branches for masks and key points see
"""

from __future__ import annotations

import torch
from torch import Tensor

from detection.batch import Batch
from detection.models.cascade import CascadeRoIHeads
from detection.models.family.keypoints import KeypointRoIHeads
from detection.models.masks import MaskBranch
from detection.models.roi_heads import RoIHeads
from detection.models.two_stage import TwoStageDetector
from detection.parts import Detections, FeatureMaps, Losses, Proposals

SMALL = 300_000  # bytes of a channel of an image


class _Trimmed(MaskBranch):
    """RoI heads that leave out padding.

    Regions are padded to the same number in each image, at the end, and padding costs as much as a region. Here tensors
    are cut to the largest number of an image of the batch.
    """

    def detect(self, features: FeatureMaps, proposals: Proposals, image_sizes: Tensor) -> Detections:
        """As the plain heads."""
        places = torch.arange(1, proposals.valid.shape[1] + 1)
        count = max(1, int((places * proposals.valid.any(dim=0)).amax())) if len(places) else 0
        cut = (rows[:, :count] for rows in (proposals.boxes, proposals.scores, proposals.valid))
        found: Detections = super().detect(features, Proposals(*cut), image_sizes)  # type: ignore[misc]
        return found

    def mask_losses(
        self, features: FeatureMaps, boxes: Tensor, labels: Tensor, matched_idxs: Tensor, batch: Batch
    ) -> Losses:
        """As the plain heads."""
        return super().mask_losses(features, *_foreground(boxes, labels, matched_idxs), batch)


class TrimmedRoIHeads(_Trimmed, RoIHeads):
    """`RoIHeads`, see `_Trimmed`."""


class TrimmedKeypoints(_Trimmed, KeypointRoIHeads):
    """`KeypointRoIHeads`, see `_Trimmed`."""

    def keypoint_losses(
        self, features: FeatureMaps, boxes: Tensor, labels: Tensor, matched_idxs: Tensor, batch: Batch
    ) -> Losses:
        """As the plain heads."""
        return super().keypoint_losses(features, *_foreground(boxes, labels, matched_idxs), batch)


class TrimmedCascade(_Trimmed, CascadeRoIHeads):
    """`CascadeRoIHeads`, see `_Trimmed`."""


def _foreground(boxes: Tensor, labels: Tensor, matched_idxs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Regions `(B, M, ...)` with their foreground first, cut to the most foreground of an image, and at least one."""
    count = max(1, int((labels > 0).sum(dim=1).max()))
    return boxes[:, :count], labels[:, :count], matched_idxs[:, :count]


class ImageByImage(TwoStageDetector):
    """Detects in one image at a time, where a batch's maps no longer fit into the cache.

    On a CPU a batch saves no time by itself. Two images of 800 pixels at once take 10 to 20 % longer than one after the
    other, and eight of 320 pixels in float32 18 %; but two of 320 in bfloat16 4 % less with R50-FPN, and 13 % with an
    EfficientNet-Lite0.
    """

    def run(self, batch: Batch, with_losses: bool, with_detections: bool) -> tuple[Losses, Detections]:
        """As the plain detector."""
        size = 2 if torch.is_autocast_enabled("cpu") else 4
        if with_losses or not with_detections or len(batch) == 1 or batch.images[0, 0].numel() * size < SMALL:
            return super().run(batch, with_losses, with_detections)
        return {}, [super(ImageByImage, self).run(image, False, True)[1][0] for image in batch.split()]
