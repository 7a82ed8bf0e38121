"""Annotations as rows give the index, and the defects, that the same annotations give one by one."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detection.data import coco, coco_rows
from detection.data.coco import read_coco
from detection.data.records import DataError, Index, Record
from tests.data.test_coco import content, write
from tests.data.test_fuzz import JUNK, coco_content, damage_json

SIDES = (40, 30)
UNUSUAL: dict[str, list[Any]] = {
    "id": [1, 2, 3, "4", 5.0, 2**70, None],
    "image_id": [0, 7, 7.0, "7", 8, 2**63, "seven"],
    "category_id": [0, 9, "9", 5],
    "bbox": [[0, 0, *SIDES], [39.5, 0, 0.51, 30], [0, 0, 40.005, 30], [-1, 2, 5, 5], [5, 5, 0, 5], [5, 5, 1e-9, 5]],
    "area": [0, -1, 1e-46, 1e39, "12", None],
    "iscrowd": [1, 1.0, True, None, "1"],
    "ignore": [1, 0, 2],
    "segmentation": [[[6, 4, 20, 4, 20, 9]], []],
}


def drawn(rng: random.Random) -> dict[str, Any]:
    """A file of some sound annotations in any order, and of some unusual and some senseless ones."""
    dirt = rng.choice((0, 0.02, 0.2))
    items: list[Any] = []
    for number in range(rng.randint(0, 30)):
        x, y, w, h = rng.uniform(0, 20), rng.randint(0, 10), rng.uniform(1, 20), rng.randint(1, 20)
        item: dict[str, Any] = {
            "id": number,
            "image_id": rng.choice((0, 7)),
            "category_id": rng.choice((0, 9)),
            "bbox": [x, y, w, h],
        }
        item |= {"area": w * h, "iscrowd": int(rng.random() < 0.2)}
        for key, values in UNUSUAL.items():
            if rng.random() < dirt:
                item[key] = rng.choice(values if rng.random() < 0.7 else JUNK)
        items.append(rng.choice(JUNK) if rng.random() < dirt / 10 else item)
    return content() | {"annotations": items}


def read(root: Path, file: str, monkeypatch: pytest.MonkeyPatch, one_by_one: bool, **options: Any) -> Any:
    with monkeypatch.context() as patch:
        if one_by_one:
            patch.setattr(coco_rows.Packer, "__call__", lambda _, item: item)
            patch.setattr(coco_rows.Annotations, "sound", lambda *_: None)
        try:
            return read_coco(root, file, **options)
        except DataError as error:
            return str(error), sorted(map(str, error.defects))


def same(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Index) or not isinstance(wanted, Index):
        return bool(found == wanted)
    assert [alike(a, b) for a, b in zip(found.records, wanted.records, strict=True)] == [True] * len(wanted.records)
    assert sorted(map(str, found.defects)) == sorted(map(str, wanted.defects))
    names = [field.name for field in fields(Index) if field.name not in ("records", "defects")]
    return all(getattr(found, name) == getattr(wanted, name) for name in names)


def alike(a: Record, b: Record) -> bool:
    for field in fields(Record):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes(), field
            assert one.flags.c_contiguous
        else:
            assert type(one) is type(other) and one == other, field
    return True


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.sampled_from((None, ["cat"], ["dog", "cat"])))
def test_rows_are_read_as_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, classes: list[str] | None
) -> None:
    root, rng = tmp_path_factory.getbasetemp() / "rows", random.Random(seed)
    if not root.is_dir():
        root.mkdir()
        write(root, content())
    text = damage_json(coco_content(), rng) if rng.random() < 0.3 else json.dumps(drawn(rng))
    (root / "gt.json").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        found, wanted = (read(root, "gt.json", monkeypatch, plain, classes=classes) for plain in (False, True))
    assert same(found, wanted)


def test_sound_annotations_are_not_looked_at_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco._Reader, "annotation", lambda *_: pytest.fail("one was"))
    assert [len(record.boxes) for record in read_coco(write(tmp_path, content()), "gt.json").records] == [2, 0]


@pytest.mark.parametrize(
    ("folder", "file", "images"),
    [
        ("tiny_coco", "annotations/instances_train2017.json", "train2017"),
        ("nuts", "trainval.json", "images"),
        ("icevision", "annotations.json", "images"),
        ("voc2012_sample100", "gts/coco_format_v1/instances_default.json", "images"),
        ("eval_refs/hotcoco_fixtures", "healthcheck_bad.json", ""),
    ],
)
def test_real_sets(shared_data: Path, folder: str, file: str, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, wanted = (
        read(shared_data / folder, file, monkeypatch, one_by_one, images=images) for one_by_one in (False, True)
    )
    assert same(found, wanted)


@pytest.mark.parametrize("key", ["images", "categories"])
def test_what_only_looks_like_an_annotation_keeps_its_other_fields(tmp_path: Path, key: str) -> None:
    data = content()
    data[key][0] |= {"image_id": 0, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 12}
    assert len(read_coco(write(tmp_path, data), "gt.json").records) == 2
    (tmp_path / "gt.json").write_text(json.dumps(data["annotations"][0]))
    with pytest.raises(DataError, match="'images' is missing"):
        read_coco(tmp_path, "gt.json")
