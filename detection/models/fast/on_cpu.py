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

MOST_BYTES = 2_000_000  # of one channel of the images that are detected in at once


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


class FewAtOnce(TwoStageDetector):
    """Detects in as many images of a batch at once as `MOST_BYTES` allow, and in large ones one at a time.

    The maps of large images don't stay in the cache, and a batch of them only takes memory: eight of 800 x 1333 pixels
    at once take 3.4 times as much, and 0.94 of the time with R50-FPN, 1.2 with an EfficientNet-Lite0. Small ones do
    save time together, 5 to 12 % at 320 pixels and 12 to 15 % in bfloat16. Four of those are enough for it, and the C
    library, which left to itself gives pieces of 32 MiB and more back to the kernel, keeps their maps for the next.
    """

    def run(self, batch: Batch, with_losses: bool, with_detections: bool) -> tuple[Losses, Detections]:
        """As the plain detector."""
        image_bytes = batch.images[0, 0].numel() * (2 if torch.is_autocast_enabled("cpu") else 4)
        count = max(1, MOST_BYTES // image_bytes)
        if with_losses or not with_detections or len(batch) <= count:
            return super().run(batch, with_losses, with_detections)
        return {}, [found for few in batch.split(count) for found in super(FewAtOnce, self).run(few, False, True)[1]]
