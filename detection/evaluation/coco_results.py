"""Detections as COCO results JSON, with the ids of the data set itself: what the official evaluator reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from detection.batch import Id
from detection.evaluation.coco_eval import xywh
from detection.evaluation.results import ImageResult


def coco_results(
    results: Sequence[ImageResult],
    category_ids: Sequence[Id | None],
    iou_type: Literal["bbox", "segm", "keypoints"] = "bbox",
) -> list[dict[str, Any]]:
    """One entry a detection, image by image, in the detector's order (which decides between equal scores).

    Ids are those of the annotation file that is compared with. Detections of classes which it lacks are left out: no
    id could name them, and COCO's figures leave them out too.

    Args:
        results: images with their detections.
        category_ids: the file's id of label `i` is `category_ids[i - 1]`, None where it lacks the class.
        iou_type: `"bbox"` gives boxes as x, y, width, height; `"segm"` gives masks alone, because the official
            evaluator takes an object's area from its box where an entry has one. `"keypoints"` gives x, y and a third
            number of each key point.
    """
    entries = []
    for result in results:
        rows = zip(result.labels.tolist(), result.scores.tolist(), xywh(result.boxes).tolist(), strict=True)
        for i, (label, score, box) in enumerate(rows):
            category = category_ids[label - 1]
            if category is None:
                continue
            entry: dict[str, Any] = {"image_id": result.image_id, "category_id": category}
            if iou_type == "bbox":
                entry["bbox"] = box
            elif iou_type == "keypoints":
                if result.keypoints is None:
                    raise ValueError(f"image {result.image_id} ({result.file_name}) has no key points")
                entry["keypoints"] = result.keypoints[i].ravel().tolist()
            elif result.masks is None:
                raise ValueError(f"image {result.image_id} ({result.file_name}) has no masks; evaluate with masks")
            else:
                mask = result.masks[i]
                counts = mask["counts"]
                text = counts.decode() if isinstance(counts, bytes) else counts
                entry["segmentation"] = {"size": [int(side) for side in mask["size"]], "counts": text}
            entries.append(entry | {"score": score})
    return entries


def write_coco_results(
    path: Path,
    results: Sequence[ImageResult],
    category_ids: Sequence[Id | None],
    iou_type: Literal["bbox", "segm", "keypoints"] = "bbox",
) -> int:
    """Write `coco_results` to a file whose folder exists; gives the number of detections written."""
    entries = coco_results(results, category_ids, iou_type)
    path.write_text(json.dumps(entries, allow_nan=False))
    return len(entries)
