"""Draw a data set for these examples, in the form that `my_parts.reader` reads: `python draw_scenes.py my_scenes`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from detection.data import scenes
from detection.data.coco import read_coco


def main(folder: Path, train: int = 100, val: int = 20) -> None:
    """Draw scenes into `folder` and write `train.csv` and `val.csv` beside the images."""
    root = scenes.draw(folder, train, val)
    for split, (file, images) in scenes.SPLITS.items():
        index = read_coco(root, file, images)
        with (folder / f"{split}.csv").open("w", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(["file", "x1", "y1", "x2", "y2", "label"])
            for record in index.records:
                name = f"{root.name}/{record.file_name}"
                rows = [
                    [name, *box, index.classes[label - 1]]
                    for box, label in zip(record.boxes, record.labels, strict=True)
                ]
                writer.writerows(rows or [[name, "", "", "", "", ""]])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
