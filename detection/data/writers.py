"""Writes an index as COCO instances JSON, which all tools read, or as a folder of Pascal VOC XML, which people read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

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
            if record.keypoints is not None:
                points = record.keypoints[i]
                item["keypoints"] = [round(value, 3) for value in points.ravel().tolist()]
                item["num_keypoints"] = int((points[:, 2] > 0).sum())
            objects.append(item)
    known = index.skeleton
    points = (
        {} if known is None else {"keypoints": list(known.names), "skeleton": [[a + 1, b + 1] for a, b in known.edges]}
    )
    categories = [{"id": i, "name": name} | points for i, name in zip(index.category_ids, index.classes, strict=True)]
    annotations.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))


def write_voc(index: Index, root: Path, split: str) -> None:
    """Write a split in the devkit's layout: copies of the images, an XML file each, and the list of their names.

    Files are named `split_000`, `split_001`, ... in the order of the records. Coordinates become VOC's, 1-based and
    inclusive, rounded to whole pixels; crowds, which VOC does not know, become difficult objects.

    Args:
        index: what a reader returned; its images are copied.
        root: folder of the data set, made if absent; other splits in it stay.
        split: its name.
    """
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    stems = [f"{split}_{number:03}" for number in range(len(index.records))]
    for stem, record in zip(stems, index.records, strict=True):
        source = index.root / record.file_name
        shutil.copyfile(source, root / "JPEGImages" / f"{stem}{source.suffix}")
        lines = ["<annotation>", f"  <filename>{stem}{source.suffix}</filename>"]
        lines.append(f"  <size><width>{record.width}</width><height>{record.height}</height><depth>3</depth></size>")
        for label, box, hard in zip(record.labels, record.boxes, record.difficult | record.iscrowd, strict=True):
            x1, y1, x2, y2 = (round(value) for value in box.tolist())
            corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
            name = f"<name>{escape(index.classes[label - 1])}</name><difficult>{int(hard)}</difficult>"
            lines.append(f"  <object>{name}<bndbox>{''.join(f'<{k}>{v}</{k}>' for k, v in corners.items())}</bndbox>")
            lines[-1] += "</object>"
        (root / "Annotations" / f"{stem}.xml").write_text("\n".join([*lines, "</annotation>\n"]))
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join([*stems, ""]))


def _plain(segment: Any) -> Any:
    if isinstance(segment, dict) and isinstance(segment["counts"], bytes):
        return {**segment, "counts": segment["counts"].decode()}
    return segment
