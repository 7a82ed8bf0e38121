"""Which classes were looked for in which image: from LVIS files and YAML, through the loader into the batch."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detection.data.augment import eval_transform, train_transform
from detection.data.coco import read_coco
from detection.data.datamodule import DetectionDataModule
from detection.data.dataset import DetectionDataset, collate, make_target
from detection.data.federated import label_by_file
from detection.data.reading import check_index, describe
from detection.data.records import DataError, Index, relabel
from detection.data.store import RecordStore

CLASSES = ("ant", "bee", "cow", "dog")


def lvis() -> dict[str, Any]:
    """Three images in LVIS's form; ids of categories are 5, 6, 7 and 9, in another order in the file."""
    url = "http://images.cocodataset.org"
    return {
        "images": [
            {"id": 4, "coco_url": f"{url}/train2017/1.png", "width": 40, "height": 30, "neg_category_ids": [6],
             "not_exhaustive_category_ids": [5]},
            {"id": 5, "coco_url": f"{url}/val2017/2.png", "width": 40, "height": 30, "neg_category_ids": [],
             "not_exhaustive_category_ids": []},
            {"id": 6, "file_name": "val2017/3.png", "width": 40, "height": 30},
        ],
        "categories": [
            {"id": 9, "name": "dog", "frequency": "f", "image_count": 1},
            {"id": 5, "name": "ant", "image_count": 10},
            {"id": 6, "name": "bee", "image_count": 11},
            {"id": 7, "name": "cow", "image_count": 101},
        ],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 5, "bbox": [2, 3, 10, 10], "area": 100},
            {"id": 2, "image_id": 4, "category_id": 9, "bbox": [20, 5, 15, 20], "area": 300},
            {"id": 3, "image_id": 5, "category_id": 7, "bbox": [20, 5, 15, 20], "area": 300, "ignore": 1},
            {"id": 4, "image_id": 6, "category_id": 7, "bbox": [1, 1, 5, 5], "area": 25},
        ],
    }  # fmt: skip


def write(root: Path, content: dict[str, Any]) -> Path:
    for name in ("train2017/1.png", "val2017/2.png", "val2017/3.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / name)
    (root / "lvis.json").write_text(json.dumps(content))
    return root


def named(flags: Any, classes: tuple[str, ...] = CLASSES) -> list[str] | None:
    return None if flags is None else [name for name, flag in zip(classes, flags, strict=True) if flag]


def test_an_lvis_file(tmp_path: Path) -> None:
    index = read_coco(write(tmp_path, lvis()), "lvis.json")
    assert (index.classes, index.defects, index.frequencies) == (CLASSES, [], ("r", "c", "f", "f"))
    first, second, third = index.records
    assert [r.file_name for r in index.records] == ["train2017/1.png", "val2017/2.png", "val2017/3.png"]
    assert (named(first.checked), named(first.partial)) == (["ant", "bee", "dog"], ["ant"])
    assert (named(second.checked), named(second.partial)) == (["cow"], [])
    assert third.checked is None and third.partial is None  # it says nothing: all classes are labelled
    assert second.iscrowd.tolist() == [True] and not first.iscrowd.any()
    assert "in 2 images not every class is labelled" in describe(index, "train")


def test_chosen_classes_take_their_flags_along(tmp_path: Path) -> None:
    root = write(tmp_path, lvis())
    chosen = read_coco(root, "lvis.json", classes=["dog", "bee"])
    assert named(chosen.records[0].checked, chosen.classes) == ["dog", "bee"] and chosen.frequencies == ("f", "c")
    other = relabel(read_coco(root, "lvis.json"), ("dog", "elk", "ant"), (1, 2, 3))
    assert named(other.records[0].checked, other.classes) == ["dog", "ant"]  # nobody looked for an elk
    assert named(other.records[0].partial, other.classes) == ["ant"]
    assert other.records[2].checked is None and other.frequencies == ("f", "", "r")


@pytest.mark.parametrize(
    ("value", "problem"),
    [([6, 77], "neg_category_ids has the category 77, which there is not"), ("6", "neg_category_ids is no list")],
)
def test_lists_that_are_wrong_are_reported(tmp_path: Path, value: Any, problem: str) -> None:
    content = lvis()
    content["images"][0]["neg_category_ids"] = value
    index = read_coco(write(tmp_path, content), "lvis.json")
    assert [d.problem for d in index.defects] == [problem] and "image 4" in index.defects[0].record


def test_a_file_without_groups_has_none(tmp_path: Path) -> None:
    content = lvis()
    del content["categories"][1]["image_count"]
    assert read_coco(write(tmp_path, content), "lvis.json").frequencies is None


def test_ids_that_are_text_are_found(tmp_path: Path) -> None:
    content = lvis()
    content["images"][0]["neg_category_ids"] = ["6"]
    assert named(read_coco(write(tmp_path, content), "lvis.json").records[0].checked) == ["ant", "bee", "dog"]


def plain(tmp_path: Path) -> Index:
    """The same images, which say nothing themselves."""
    content = lvis()
    for image in content["images"]:
        image.pop("neg_category_ids", None), image.pop("not_exhaustive_category_ids", None)
    return read_coco(write(tmp_path, content), "lvis.json")


def by_file(index: Index, text: str, every_class: bool = True) -> Index:
    (index.root / "labelled.yaml").write_text(text)
    return label_by_file(index, index.root / "labelled.yaml", every_class)


def test_a_yaml_says_what_was_labelled(tmp_path: Path) -> None:
    index = plain(tmp_path)
    assert all(record.checked is None for record in index.records)
    marked = by_file(index, 'train2017/*: [bee, dog]\nval2017/3.png: [cow, ant]\n"*/3*": []\nelse/*: [dog]\n')
    first, second, third = marked.records
    # An ant was annotated though none was to be: others may be there.
    assert (named(first.checked), named(first.partial)) == (["ant", "bee", "dog"], ["ant"])
    assert second.checked is None
    assert (named(third.checked), named(third.partial)) == (["ant", "cow"], [])  # by its path, not by the pattern
    assert [str(d) for d in marked.defects] == [
        "labelled.yaml: '*/3*': 2 of its 4 names fit no image of this split; "
        "they change nothing here; see that they fit images of another"
    ]
    assert named(by_file(index, '{"val*": ["cow"], "*": ["dog", "ant"]}').records[0].checked) == ["ant", "dog"]


def test_a_yaml_and_lvis_hold_together(tmp_path: Path) -> None:
    index = read_coco(write(tmp_path, lvis()), "lvis.json")
    first = by_file(index, "train2017/*: [bee, cow, dog]\n").records[0]
    assert (named(first.checked), named(first.partial)) == (["ant", "bee", "dog"], ["ant"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train2017/*: [bee, dgo]", "names the class 'dgo', which there is not; did you mean 'dog'"),
        ("train2017/*: bee", "has 'bee', not a list of classes"),
        ("[bee]", "write one line a folder"),
        ("a: [b", "not readable as YAML"),
    ],
)
def test_a_yaml_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=r"labelled\.yaml") as caught:
        by_file(plain(tmp_path), text)
    assert message in str(caught.value)
    with pytest.raises(DataError, match="is missing"):
        label_by_file(plain(tmp_path), tmp_path / "none.yaml")


def test_flags_of_a_reader_are_checked(tmp_path: Path) -> None:
    index = plain(tmp_path)
    index.records[0].checked = np.ones(3, bool)
    with pytest.raises(DataError, match=r"1.png: checked is bool \(3,\), not an array of bool \(4,\), or None"):
        check_index(index, read_coco)


def test_the_store_and_the_target_keep_the_flags(tmp_path: Path) -> None:
    index = read_coco(write(tmp_path, lvis()), "lvis.json")
    store = pickle.loads(pickle.dumps(RecordStore(index.records)))
    for record, kept in zip(index.records, [store[i] for i in range(3)], strict=True):
        assert named(kept.checked) == (list(CLASSES) if record.checked is None else named(record.checked))
        assert named(kept.partial) == (named(record.partial) or [])
    assert make_target(index.records[0]).checked.tolist() == index.records[0].checked.tolist()
    assert RecordStore(plain(tmp_path).records)[0].checked is None


def test_a_batch_knows_what_is_labelled_and_what_is_ignored(tmp_path: Path) -> None:
    index = read_coco(write(tmp_path, lvis()), "lvis.json")
    data = DetectionDataset(index, train_transform(60, 80, hflip=1.0))
    batch = collate([data[0], data[1], data[2]])
    assert [named(row) for row in batch.labelled] == [["bee", "dog"], ["cow"], list(CLASSES)]
    assert batch.gt_valid.sum(dim=1).tolist() == [2, 0, 1]
    assert batch.gt_ignored.tolist() == [[[0.0] * 4], [[10.0, 10.0, 40.0, 50.0]], [[0.0] * 4]]  # doubled and mirrored
    assert (batch.objects_given, batch.objects_dropped) == (3, 0)
    silent = collate([DetectionDataset(plain(tmp_path), eval_transform(60, 80))[i] for i in (0, 2)])
    assert silent.labelled is None and silent.gt_ignored is None


def test_a_mosaic_is_labelled_where_all_its_images_are(tmp_path: Path) -> None:
    index = read_coco(write(tmp_path, lvis()), "lvis.json")
    data = DetectionDataset(replace(index, records=index.records[:2]), eval_transform(60, 80), mosaic=1.0)
    samples = [data[i % 2, i] for i in range(12)]
    both = [s for s in samples if s.labelled is not None and not s.labelled.any()]
    assert both and any(len(s.ignored) for s in samples)
    assert all(s.labels.min() > 0 for s in samples if len(s.labels))


def test_ignore_regions_have_no_mask_and_are_not_pasted(tmp_path: Path) -> None:
    content = lvis()
    for item in content["annotations"]:
        x, y, w, h = item["bbox"]
        item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    index = read_coco(write(tmp_path, content), "lvis.json", masks=True)
    data = DetectionDataset(index, eval_transform(60, 80), copy_paste=1.0)
    pasted = [data[2, seed] for seed in range(20)]
    assert {int(label) for sample in pasted for label in sample.labels} <= {1, 3, 4}
    assert all(len(sample.masks) == len(sample.labels) == len(sample.windows) for sample in pasted)
    alone = DetectionDataset(index, eval_transform(60, 80))[1]
    assert alone.ignored.tolist() == [[40.0, 10.0, 70.0, 50.0]] and len(alone.masks) == 0


def test_the_data_module_reads_the_yaml(tmp_path: Path) -> None:
    plain(tmp_path)
    (tmp_path / "labelled.yaml").write_text("train2017/*: [bee, dog]")
    splits = {"train_split": "lvis.json", "val_split": "lvis.json", "labelled": "labelled.yaml"}
    data = DetectionDataModule(str(tmp_path), "coco", num_workers=0, batch_size=3, group_by_aspect=False, **splits)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        flags = {t.file_name: named(row) for t, row in zip(batch.targets, batch.labelled, strict=True)}
        assert flags == {"train2017/1.png": ["bee", "dog"], "val2017/2.png": list(CLASSES),
                         "val2017/3.png": list(CLASSES)}  # fmt: skip
    assert data.frequencies == ("r", "c", "f", "f")
    (tmp_path / "labelled.yaml").write_text("train2017/*: [elk]")
    again = DetectionDataModule(str(tmp_path), "coco", **splits)
    with pytest.raises(DataError, match="names the class 'elk'"):
        again.setup("fit")
    (tmp_path / "labelled.yaml").write_text("train2017/*: [bee, elk]")
    chosen = DetectionDataModule(str(tmp_path), "coco", classes=["cow", "bee"], **splits)
    assert named(chosen.read("train").records[0].checked, ("cow", "bee")) == ["bee"]  # an elk may be a class left out


def test_batches_move_and_travel_with_their_flags(tmp_path: Path) -> None:
    index = read_coco(write(tmp_path, lvis()), "lvis.json")
    data = DetectionDataset(index, eval_transform(60, 80))
    batch = collate([data[0], data[1]])
    assert [part.labelled.shape for part in batch.split()] == [torch.Size([1, 4])] * 2
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, collate_fn=collate)
    sent = next(iter(loader))
    assert torch.equal(sent.labelled, batch.labelled) and torch.equal(sent.gt_ignored, batch.gt_ignored)
    assert torch.equal(sent.targets[0].checked, batch.targets[0].checked)


def test_a_picture_that_is_listed_twice_knows_what_either_entry_knows(tmp_path: Path) -> None:
    content = lvis()
    again = content["images"][0] | {"id": 8, "neg_category_ids": [7], "not_exhaustive_category_ids": []}
    content["images"].append(again)
    content["annotations"].append({"id": 9, "image_id": 8, "category_id": 5, "bbox": [2, 3, 10, 10], "area": 100})
    record = read_coco(write(tmp_path, content), "lvis.json").records[0]
    assert (named(record.checked), named(record.partial)) == (["ant", "bee", "cow", "dog"], [])
    content["images"][-1] = again | {"not_exhaustive_category_ids": [5]}
    record = read_coco(write(tmp_path, content), "lvis.json").records[0]
    assert (named(record.checked), named(record.partial)) == (["ant", "bee", "cow", "dog"], ["ant"])
    content["images"][-1].pop("neg_category_ids"), content["images"][-1].pop("not_exhaustive_category_ids")
    assert read_coco(write(tmp_path, content), "lvis.json").records[0].checked is None
