"""Large images in overlapping tiles, each object found once; the rule is that of `detection.tiling`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from detection.inference.detections import Detections
from detection.tiling import AGREE, Tiling, Window, merge_tiles


@dataclass(frozen=True)
class Tiles(Tiling):
    """Square windows over an image, in which a detector looks for objects one by one.

    Args:
        size, overlap: see `Tiling`.
        iou_thresh: from which two views agree.
    """

    iou_thresh: float = AGREE

    def merge(self, parts: Sequence[Detections], windows: Sequence[Window], size: tuple[int, int]) -> Detections:
        """The detections of an image of `size` (height, width) from those of its windows."""
        names = ("boxes", "labels", "scores", "masks", "keypoints", "keypoint_scores")
        found = [{name: getattr(part, name) for name in names} for part in parts]
        return replace(parts[0], **merge_tiles(found, windows, size, self.iou_thresh), size=size)
