"""Writing COCO: what one reader read, the COCO reader and pycocotools read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from detection.data import scenes
from detection.data.coco import read_coco
from detection.data.records import Record
from detection.data.voc import read_voc
from detection.data.writers import write_coco, write_voc


@pytest.mark.parametrize(
    ("folder", "annotations", "images"),
    [
        ("tiny_coco", "annotations/instances_val2017.json", "val2017"),
        ("nuts", "trainval.json", "images"),
    ],
)
def test_coco_survives_the_round_trip(
    folder: str, annotations: str, images: str, shared_data: Path, tmp_path: Path
) -> None:
    index = read_coco(shared_data / folder, annotations, images, masks=True)
    write_coco(index, tmp_path / "out.json")
    again = read_coco(shared_data / folder, str(tmp_path / "out.json"), masks=True)
    assert again.classes == index.classes and again.category_ids == index.category_ids
    assert len(again.records) == len(index.records)
    for a, b in zip(again.records, index.records, strict=True):
        same(a, b)
        assert len(a.segments or []) == len(b.labels)
        assert a.segments == b.segments


def test_voc_becomes_coco(shared_data: Path, tmp_path: Path) -> None:
    index = read_voc(shared_data / "bccd", "test")
    write_coco(index, tmp_path / "out.json")
    for a, b in zip(read_coco(shared_data / "bccd", str(tmp_path / "out.json")).records, index.records, strict=True):
        same(a, b)
    official = COCO(tmp_path / "out.json")
    assert len(official.anns) == sum(len(r.labels) for r in index.records)
    assert len({a["id"] for a in json.loads((tmp_path / "out.json").read_text())["annotations"]}) == len(official.anns)


def same(a: Record, b: Record) -> None:
    assert (a.image_id, a.file_name, a.width, a.height) == (b.image_id, b.file_name, b.width, b.height)
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.iscrowd, b.iscrowd)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=2e-3)
    np.testing.assert_allclose(a.areas, b.areas, rtol=1e-6)


def test_voc_gives_back_what_was_written(tmp_path: Path) -> None:
    root = scenes.draw(tmp_path / "scenes", train=6, val=2)
    source = read_coco(root, *scenes.SPLITS["train"])
    write_voc(source, tmp_path / "voc", "train")
    write_voc(read_coco(root, *scenes.SPLITS["val"]), tmp_path / "voc", "val")
    again = read_voc(tmp_path / "voc", "train", source.classes)
    assert not [defect for defect in again.defects if defect.severity != "note"]
    for wanted, found in zip(source.records, again.records, strict=True):
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
        np.testing.assert_array_equal(found.labels, wanted.labels)
        np.testing.assert_array_equal(found.difficult, wanted.iscrowd)
        assert (again.root / found.file_name).read_bytes() == (source.root / wanted.file_name).read_bytes()
