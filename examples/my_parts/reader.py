"""A reader of annotations: a file of the user's own kind -> records, see `detection.parts.Reader`."""

from __future__ import annotations

import csv
from pathlib import Path

from detection.data.images import image_size
from detection.data.records import DataError, Index, Record


def read_csv(root: Path, split: str) -> Index:
    """Read `<split>.csv` with the columns file, x1, y1, x2, y2 (pixels) and label.

    Each line is an object; an image without any has one line with nothing but its file.
    """
    path = root / f"{split}.csv"
    if not path.is_file():
        raise DataError(f"{path} is missing: name a split whose file is there")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    classes = sorted({line["label"] for line in lines if line["label"]})
    images: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        images.setdefault(line["file"], []).append(line)
    records = []
    for number, (name, rows) in enumerate(images.items()):
        objects = [row for row in rows if row["label"]]
        boxes = [[float(row[side]) for side in ("x1", "y1", "x2", "y2")] for row in objects]
        labels = [classes.index(row["label"]) + 1 for row in objects]
        records.append(Record.of(number, name, image_size(root / name), boxes, labels))
    return Index(root, tuple(classes), tuple(range(1, len(classes) + 1)), records)
