"""What is exported names images and categories as the annotation file does: perfect detections score 1 against it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detection.batch import Id
from detection.data.coco import read_coco
from detection.data.datamodule import DetectionDataModule
from detection.data.dataset import make_target
from detection.data.records import Index
from detection.data.store import RecordStore
from detection.data.writers import write_coco
from detection.evaluation.coco_results import coco_results, write_coco_results
from detection.evaluation.mean_ap import MeanAP

BEYOND = 2**63
WILD = ("c_entry_per_ann", "c_idsdiffer", "c_kp", "c_rle", "c_roboflow", "c_uint64")
CASES: dict[str, tuple[list[Id], list[Id]]] = {
    "from zero": ([0, 1, 2], [0, 1, 2]),
    "permuted": ([3, 1, 2], [2, 3, 1]),
    "with gaps": ([7, 139, 2], [90, 1, 13]),
    "negative": ([-1, 0, 5], [4, -4, 0]),
    "close to the end of int64": ([BEYOND - 3, BEYOND - 2, BEYOND - 1], [BEYOND - 1, 5, 6]),
    "of 64 bits without sign": ([BEYOND, BEYOND + 1, BEYOND + 2], [BEYOND + 7, BEYOND + 5, BEYOND + 6]),
    "larger": ([2**70, 2**70 + 1, 1], [2**65, 3, 2]),
    "digits": (["10", "9", "1"], ["3", "20", "1"]),
    "padded digits": (["001", "000", "010"], ["02", "01", "03"]),
    "names": (["left", "right", "an id "], ["r", "b", "g"]),
    "whole floats": ([2.0, 1.0, 0.0], [1.0, 3.0, 2.0]),  # type: ignore[list-item]
}


def perfect(index: Index) -> MeanAP:
    """A metric that has seen every object of the index as a detection."""
    targets = [make_target(record) for record in index.records]
    metric = MeanAP(index.classes)
    found = [{"boxes": t.boxes, "labels": t.labels, "scores": torch.full((len(t.labels),), 0.9)} for t in targets]
    metric.update(found, targets)
    return metric


def draw(folder: Path, images: list[Any], categories: list[Any]) -> dict[str, Any]:
    """A COCO file `gt.json` of black pictures, two to four objects in each."""
    cv2.imwrite(str(folder / "black.png"), np.zeros((60, 80, 3), np.uint8))
    content: dict[str, Any] = {"images": [], "annotations": []}
    for position, image in enumerate(images):
        name = f"{position}.png"
        (folder / name).write_bytes((folder / "black.png").read_bytes())
        content["images"].append({"id": image, "file_name": name, "width": 80, "height": 60})
        for k, category in enumerate([*categories, categories[position % len(categories)]]):
            box = [3.5 + 5 * k, 2 + 7 * k, 12 + k, 9.25 + 3 * position]
            item = {"id": len(content["annotations"]) + 1, "image_id": image, "category_id": category, "bbox": box}
            content["annotations"].append(item | {"area": box[2] * box[3], "iscrowd": 0})
    content["categories"] = [{"id": category, "name": f"kind {k}"} for k, category in enumerate(categories)]
    (folder / "gt.json").write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("case", CASES)
def test_perfect_detections_score_one_whatever_the_ids(tmp_path, pycoco, case):
    images, categories = CASES[case]
    draw(tmp_path, images, categories)
    index = read_coco(tmp_path, "gt.json")
    assert not index.defects and [record.image_id for record in index.records] == images
    store = RecordStore(index.records)  # as a data set keeps them
    index = replace(index, records=[store[i] for i in range(len(store))])
    metric = perfect(index)
    assert write_coco_results(tmp_path / "dt.json", metric.results, index.category_ids) == 4 * len(images)
    official = pycoco(str(tmp_path / "gt.json"), str(tmp_path / "dt.json"))
    assert official["figures"] == pytest.approx(metric.compute(), abs=1e-9)
    assert official["figures"]["map"] == pytest.approx(1.0, abs=1e-12)
    assert not (official["recall"][:, :, 0, 2] < 1).any()  # nothing is passed over


def number(text: str) -> int | str:
    """What "01" and "1" both are."""
    return int(text) if text.removeprefix("-").isdecimal() else text


IDS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3, unique=True),
    st.lists(st.integers(2**63, 2**64 - 1), min_size=3, max_size=3, unique=True),
    st.lists(st.text("ab01-", min_size=1, max_size=5), min_size=3, max_size=3, unique_by=number),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=IDS, categories=IDS)
def test_perfect_detections_score_one_for_any_ids(tmp_path, pycoco, images, categories):
    draw(tmp_path, images, categories)
    index = read_coco(tmp_path, "gt.json")
    content = coco_results(perfect(index).results, index.category_ids)
    assert {entry["image_id"] for entry in content} == {*images}
    assert {entry["category_id"] for entry in content} == {*categories}
    assert pycoco(json.loads((tmp_path / "gt.json").read_text()), content)["figures"]["map"] > 1 - 1e-9


def splits_of(folder: Path) -> list[tuple[str, str]]:
    """Annotation file and folder of pictures of each split of a wild set, training first."""
    flat = [(f"annotations/{name}.json", name) for name in ("train", "val")]
    nested = [(f"{name}/_annotations.coco.json", name) for name in ("train", "valid")]
    return nested if (folder / nested[0][0]).is_file() else flat


@pytest.mark.parametrize("name", WILD)
def test_perfect_detections_score_one_in_sets_as_they_come(shared_data, pycoco, tmp_path, name):
    root = shared_data / "wild" / name
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    (train, train_images), (val, val_images) = splits_of(root)
    data = DetectionDataModule(
        str(root), "coco", train, val, train_images=train_images, val_images=val_images, num_workers=0
    )
    for split, file in (("train", train), ("val", val)):
        _ = data.class_names  # of training, which labels point into
        index = data.read(split)
        metric = perfect(index)
        dt = tmp_path / f"{split}.json"
        assert write_coco_results(dt, metric.results, index.category_ids) == sum(len(r.labels) for r in index.records)
        truth = json.loads((root / file).read_text())
        exported, own = json.loads(dt.read_text()), {image["id"] for image in truth["images"]}
        assert {entry["image_id"] for entry in exported} <= own
        if own != {record.image_id for record in index.records}:
            # Several entries for one picture, which are one image to us: compare with what was read.
            write_coco(index, tmp_path / "as_read.json")
            truth = json.loads((tmp_path / "as_read.json").read_text())
        if name == "c_uint64":
            assert any("pycocotools" in defect.fix for defect in index.defects)
            truth, exported = numbered(truth), numbered({"annotations": exported}, truth)["annotations"]
        assert pycoco(truth, exported)["figures"]["map"] == pytest.approx(1.0, abs=1e-12)
        assert metric.compute()["map"] == pytest.approx(1.0, abs=1e-12)


def numbered(content: dict[str, Any], like: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same file with its images numbered from 1: what pycocotools needs where ids lie on both sides of 2^63."""
    number = {image["id"]: i + 1 for i, image in enumerate((like or content)["images"])}
    images = [image | {"id": number[image["id"]]} for image in content.get("images", [])]
    items = [item | {"image_id": number[item["image_id"]]} for item in content["annotations"]]
    return content | {"images": images, "annotations": items}


def test_pycocotools_loses_images_whose_ids_lie_on_both_sides_of_2_to_the_63(tmp_path, pycoco):
    # The reason for the note: not even the file's own objects are found as detections.
    images = [BEYOND - 1000, BEYOND + 5, BEYOND + 5000]
    content = draw(tmp_path, images, [1, 2, 3])
    index = read_coco(tmp_path, "gt.json")
    assert "some ids are below 2^63, some not" in str(index.defects[0]) and index.defects[0].severity == "note"
    exported = coco_results(perfect(index).results, index.category_ids)
    assert {entry["image_id"] for entry in exported} == {*images}
    assert pycoco(content, exported)["figures"]["map"] == -1
    assert (
        pycoco(numbered(content), numbered({"annotations": exported}, content)["annotations"])["figures"]["map"] > 0.99
    )


def test_ids_are_those_of_the_evaluated_file(tmp_path, pycoco):
    for split, ids in (("train", [1, 2, 3]), ("val", [30, 10, 20])):
        (tmp_path / split).mkdir()
        draw(tmp_path / split, [5, 6, 7], ids)
    data = DetectionDataModule(
        str(tmp_path), "coco", "train/gt.json", "val/gt.json", train_images="train", val_images="val", num_workers=0
    )
    data.setup("fit")
    assert data.category_ids == [1, 2, 3] and data.class_names == ["kind 0", "kind 1", "kind 2"]
    dataset: Any = data.val_dataloader().dataset
    assert dataset.category_ids == (30, 10, 20)
    index = data.read("val")
    exported = coco_results(perfect(index).results, dataset.category_ids)
    assert pycoco(str(tmp_path / "val" / "gt.json"), exported)["figures"]["map"] == pytest.approx(1.0, abs=1e-12)


def test_a_class_that_the_evaluated_file_lacks_has_no_id_and_is_not_exported(tmp_path):
    draw(tmp_path, [5, 6, 7], [30, 10])
    index = DetectionDataModule(
        str(tmp_path), "coco", test_split="gt.json", classes=["kind 1", "other", "kind 0"], num_workers=0
    )
    index.setup("test")  # without a training split
    dataset: Any = index.test_dataloader().dataset
    assert dataset.classes == ("kind 1", "other", "kind 0") and dataset.category_ids == (10, None, 30)
    target = make_target(dataset.store[0])
    metric = MeanAP(dataset.classes)
    boxes = torch.tensor([[0.0, 0, 5, 5], [1.0, 1, 9, 9]])
    metric.update([{"boxes": boxes, "labels": torch.tensor([2, 3]), "scores": torch.tensor([0.9, 0.8])}], [target])
    (entry,) = coco_results(metric.results, dataset.category_ids)
    assert (entry["image_id"], entry["category_id"], entry["bbox"]) == (5, 30, [1, 1, 8, 8])
