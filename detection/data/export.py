"""Writes an index as COCO instances JSON: the way from any format that is read here to the one that all tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detection.data.records import Index


def write_coco(index: Index, annotations: Path) -> None:
    """Write the records of an index as a COCO instances file, with the data set's own image and category ids.

    Boxes are `[x, y, width, height]`; a compressed RLE's counts become a string, polygons stay as they are.

    Args:
        index: what a reader returned, or what was drawn.
        annotations: the JSON file to write; its folder must exist.
    """
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for record in index.records:
        images.append(
            {"id": record.image_id, "file_name": record.file_name, "width": record.width, "height": record.height}
        )
        for i, (x1, y1, x2, y2) in enumerate(record.boxes.tolist()):
            item: dict[str, Any] = {
                "id": len(objects) + 1,
                "image_id": record.image_id,
                "category_id": index.category_ids[int(record.labels[i]) - 1],
                "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                "area": float(record.areas[i]),
                "iscrowd": int(record.iscrowd[i]),
            }
            if record.segments is not None and record.segments[i] is not None:
                item["segmentation"] = _plain(record.segments[i])
            objects.append(item)
    categories = [{"id": i, "name": name} for i, name in zip(index.category_ids, index.classes, strict=True)]
    annotations.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))


def _plain(segment: Any) -> Any:
    if isinstance(segment, dict) and isinstance(segment["counts"], bytes):
        return {**segment, "counts": segment["counts"].decode()}
    return segment
