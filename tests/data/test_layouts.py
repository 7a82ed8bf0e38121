"""Small sets with one trap each: names that mean two files, folders and lists that look like something else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.data.finding import Layout, Stage, find
from detection.data.records import Index

LABEL = "0 0.5 0.5 0.25 0.25\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def save(root: Path, *names: str) -> None:
    """Pictures of 48 x 32 pixels."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(path)


def xml(name: str = "cat", filename: str = "") -> str:
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
    size = "<size><width>48</width><height>32</height></size>"
    return f"<annotation><filename>{filename}</filename>{size}<object><name>{name}</name>{box}</object></annotation>"


def coco(names: Iterable[str]) -> str:
    """A file with one object an image."""
    images = [{"id": i, "file_name": name, "width": 48, "height": 32} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 9, 9], "area": 81} for i in range(len(images))]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]})


def read(root: Path, stage: Stage = "train", layout: Layout | None = None) -> Index:
    split = (layout or find(root)).stage(stage)
    assert split is not None
    return split.read(None, False)


def names_of(index: Index) -> list[str]:
    return [record.file_name for record in index.records]


def problems(index: Index) -> str:
    return "\n".join(map(str, index.defects))


@pytest.mark.parametrize(("file", "folders"), [("a.json", ("a", "b")), ("train.json", ("train", "extra"))])
def test_a_coco_file_named_like_one_of_its_folders(tmp_path: Path, file: str, folders: tuple[str, str]) -> None:
    pictures = [f"{folder}/{number:04}.jpg" for number in (1, 2) for folder in folders]
    save(tmp_path, *pictures)
    write(tmp_path, {file: coco(pictures)})
    assert names_of(read(tmp_path)) == pictures


def test_coco_names_that_two_folders_hold(tmp_path: Path) -> None:
    save(tmp_path, "images/1.png", "gt/1.png")
    write(tmp_path, {"a.json": coco(["1.png"])})
    index = read(tmp_path)
    assert names_of(index) == ["images/1.png"] and not index.defects
    save(tmp_path, "images/day/2.png", "images/night/2.png")
    write(tmp_path, {"a.json": coco(["2.png"])})
    index = read(tmp_path)
    assert names_of(index) == ["images/day/2.png"] and "'images/night' holds pictures of these names too" in problems(
        index
    )


def test_a_path_into_one_split_is_none_of_another(tmp_path: Path) -> None:
    save(tmp_path, "train/1.jpg", "train/2.jpg", "val/2.jpg")
    write(tmp_path, {"val.json": coco(["val/1.jpg", "val/2.jpg"])})
    index = read(tmp_path, "val")
    assert names_of(index) == ["val/2.jpg"] and "the image is missing" in problems(index)
    write(tmp_path, {"val.json": coco(["/home/me/dev/pictures/2.jpg"])})  # of another machine
    assert names_of(read(tmp_path, "val")) == ["val/2.jpg"]
