"""What a detector finds, as evaluation and results files take it."""

from __future__ import annotations

from typing import Any

from detection.batch import Batch
from detection.data import rle
from detection.evaluation.mean_ap import IouType
from detection.mask_grid import MaskGrid
from detection.parts import MaskGridPart


def encode_detections(detections: list[dict[str, Any]], batch: Batch, grid: MaskGridPart) -> list[dict[str, Any]]:
    """What `FasterRCNN.run` found, with its small masks as COCO RLE of the images: no mask is ever as large as one.

    Args:
        detections: in original pixels.
        batch: that they were found in.
        grid: of the detector, see `grid_of`.
    """
    for detection, (height, width) in zip(detections, batch.original_sizes.tolist(), strict=True):
        if "masks" in detection:
            # To the host while they are small and in one copy: each window alone would wait for the device.
            masks, boxes = (detection[name].float().cpu() for name in ("masks", "boxes"))
            laid = grid.windows(masks, boxes, (height, width))
            detection["masks"] = [
                rle.encode_window(grid.inside(values).numpy(), (columns.start, rows.start), (height, width))
                for rows, columns, values in laid
            ]
    return detections


def kinds_of(detector: Any) -> tuple[IouType, ...]:
    """What of a detector is evaluated: boxes, and masks and key points where it finds them."""
    points = getattr(detector, "has_keypoints", False)  # which a detector of the user's own may lack
    kinds: dict[IouType, bool] = {"bbox": True, "segm": bool(detector.has_masks), "keypoints": bool(points)}
    return tuple(kind for kind, wanted in kinds.items() if wanted)


def grid_of(detector: Any) -> MaskGridPart:
    """What lays a detector's masks on images; `MaskGrid` where it does not say."""
    return getattr(detector, "mask_grid", None) or MaskGrid()
