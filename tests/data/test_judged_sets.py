"""Slips of whole sets on disk: the check and training refuse them in the same words, and real sets raise nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.cli.check import main as check_main
from detection.data.audit import audit
from detection.data.coco import read_coco
from detection.data.coco_layout import instance_files
from detection.data.datamodule import DetectionDataModule
from detection.data.judging import half_labelled, judge, judge_splits
from detection.data.reading import describe
from detection.data.records import DataError, Index
from detection.data.tree import Tree
from detection.data.voc import read_voc
from detection.data.yolo import read_yolo
from tests.data.test_judging import NAMED, WRITTEN


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
    return path


CORNERS = np.array([[50.0, 10, 80, 40], [40, 20, 90, 60], [60, 33, 85, 55]])


def coco(root: Path, boxes: dict[str, Any], names: dict[str, str] | None = None, **fields: Any) -> Path:
    """`{split}.json` beside its pictures, the same boxes in each of two; `names` of the one class by split."""
    for number, (split, rows) in enumerate(boxes.items()):
        images, annotations = [], []
        for i in range(2):
            name = f"{split}_{i}.png"
            picture(root / name, 10 * number + i)
            images.append({"id": i, "file_name": name, "width": 96, "height": 64})
            for row in np.asarray(rows).tolist():
                item = {"id": len(annotations), "image_id": i, "category_id": 1, "bbox": row, "area": 9}
                annotations.append(item | fields)
        classes = [{"id": 1, "name": (names or {}).get(split, "red")}]
        content = {"images": images, "annotations": annotations, "categories": classes}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


SIZES = np.hstack([CORNERS[:, :2], CORNERS[:, 2:] - CORNERS[:, :2]])


def data(root: Path, **options: Any) -> DetectionDataModule:
    splits = {"train_split": "train.json", "val_split": "val.json"}
    return DetectionDataModule(**{"root": str(root), "format": "coco", "num_workers": 0} | splits | options)


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = check_main(arguments)
    return code, " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("train", "val", "fields", "split", "problem"),
    [
        (SIZES / (96, 64, 96, 64), SIZES, {}, "train", "the boxes look relative to the image"),
        (CORNERS, SIZES, {}, "train", "lie inside as corners (x1, y1, x2, y2)"),
        (SIZES, CORNERS, {}, "val", "lie inside as corners (x1, y1, x2, y2)"),
        ([], SIZES, {}, "train", "none of 2 images has an object"),
        (SIZES, [], {}, "val", "none of 2 images has an object; there is nothing to validate on: name the right split"),
        ([[5, 5, 0, 9]] * 3, SIZES, {}, "train", "has an object: 6 times such as 'box has zero width'"),
        (SIZES, SIZES, {"iscrowd": 1}, "train", "all of 6 objects are crowds or difficult, so that none counts"),
    ],
)
def test_the_check_and_training_refuse_in_the_same_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: Any, val: Any, fields: Any, split: str, problem: str
) -> None:
    root = coco(tmp_path, {"train": train, "val": val}, **fields)
    with pytest.raises(DataError) as refused:
        data(root).setup("fit")
    words = str(refused.value).partition(f"the {split} split: ")[2]
    assert problem in words and str(root) in str(refused.value)
    code, said = check(capsys, "--root", str(root), "--format", "coco")
    assert code == 2 and words in said
    found = audit(split, lambda: read_coco(root, f"{split}.json"))
    assert words in [f"{defect.problem}; {defect.fix}" for defect in found.defects if defect.severity == "broken"]
    config = root / "data.yaml"
    section = {"root": str(root), "format": "coco", "train_split": "train.json", "val_split": "val.json"}
    config.write_text(json.dumps({"data": section}))
    code, said = check(capsys, "--config", str(config))
    assert code == 2 and words in said


def test_training_needs_no_validation_split_where_none_is_wanted(tmp_path: Path) -> None:
    root = coco(tmp_path, {"train": SIZES, "val": []})
    for options in ({"limit_val_batches": 0}, {"overfit_batches": 1, "limit_val_batches": 1}):
        module = data(root)
        module.trainer = type("Trainer", (), {"overfit_batches": 0} | options)()
        module.setup("fit")
        assert list(module._datasets) == ["train"]


def test_a_test_split_may_have_no_objects(tmp_path: Path) -> None:
    root = coco(tmp_path, {"train": SIZES, "val": SIZES, "test": []})
    data(root, test_split="test.json").setup("test")
    found = audit("test", lambda: read_coco(root, "test.json"))
    assert found.code == 0 and "none of 2 images has an object" in found.defects[0].problem


def test_classes_that_differ_by_a_letter_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = coco(tmp_path, {"train": SIZES, "val": SIZES}, {"train": "red", "val": "Red"})
    with pytest.raises(DataError) as refused:
        data(root).setup("fit")
    words = "6 objects are of classes that are not trained: 'Red' (6; training calls it 'red')"
    assert f"none of 2 images has an object: {words}; there is nothing to validate on" in str(refused.value)
    code, said = check(capsys, "--root", str(root), "--format", "coco")
    assert code == 2 and said.count(words) >= 2
    train, val = read_coco(root, "train.json"), read_coco(root, "val.json")
    assert [d.severity for d in judge_splits(train, val)] == ["repairable", "broken"]
    assert judge_splits(train, train) == judge_splits(val, val) == []


def test_objects_of_untrained_classes_are_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = coco(tmp_path, {"train": SIZES, "val": SIZES})
    content = json.loads((root / "val.json").read_text())
    content["categories"].append({"id": 2, "name": "blue"})
    content["annotations"][0]["category_id"] = 2
    (root / "val.json").write_text(json.dumps(content))
    (train, val) = (data(root).read(split) for split in ("train", "val"))  # type: ignore[arg-type]
    module = data(root)
    assert module.class_names == ["red"]
    val = module.read("val")
    lines = describe(val, "val").split("\n")
    assert lines[1].startswith("val: 1 objects are of classes that are not trained: 'blue' (1); they are left out")
    assert [d.severity for d in val.defects] == ["repairable"]
    chosen = data(root, classes=["red"])
    assert chosen.class_names == ["red"] and [d.severity for d in chosen.read("val").defects] == ["note"]
    assert "'blue' (1)" in describe(chosen.read("val"), "val")
    assert train.classes == ("red",)


def test_voc_and_yolo_slips_on_disk(tmp_path: Path) -> None:
    shapes = ("xmin", "ymin", "xmax", "ymax")
    relative, sizes = CORNERS / (96, 64, 96, 64), SIZES + np.array([1, 1, 0, 0])
    for name, rows in {"relative": relative, "sizes": sizes, "good": CORNERS + np.array([1, 1, 0, 0])}.items():
        picture(tmp_path / name / "a.png")
        picture(tmp_path / name / "b.png", 1)
        tags = [zip(shapes, row, strict=True) for row in rows.tolist()]
        boxes = ["".join(f"<{tag}>{value}</{tag}>" for tag, value in row) for row in tags]
        objects = "".join(f"<object><name>red</name><bndbox>{box}</bndbox></object>" for box in boxes)
        for stem in "ab":
            (tmp_path / name / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    (defect,) = judge(read_voc(tmp_path / "relative"))
    assert "in 2 of 2 images with boxes all coordinates are 0 to 1" in defect.problem and defect.severity == "broken"
    found = judge(read_voc(tmp_path / "sizes"))
    assert "none of 2 images has an object: 4 times" in found[0].problem or len(found) == 1
    assert "lie inside as corner and size (x, y, width, height)" in found[-1].problem
    assert judge(read_voc(tmp_path / "good")) == []
    for name, rows in {"corners": relative, "good_yolo": np.vstack(WRITTEN["cxcywh"](relative)).T}.items():
        (tmp_path / name / "labels" / "train").mkdir(parents=True)
        (tmp_path / name / "classes.txt").write_text("red\n")
        for stem in "ab":
            picture(tmp_path / name / "images" / "train" / f"{stem}.png")
            lines = "\n".join(" ".join(map(str, [0, *row])) for row in rows.tolist())
            (tmp_path / name / "labels" / "train" / f"{stem}.txt").write_text(lines)
    (defect,) = judge(read_yolo(tmp_path / "corners", "train"))
    assert "lie inside as corners (x1, y1, x2, y2)" in defect.problem and NAMED["cxcywh"] in defect.fix
    assert judge(read_yolo(tmp_path / "good_yolo", "train")) == []


def test_half_labelled_copies_are_named(tmp_path: Path) -> None:
    root = coco(tmp_path, {"train": SIZES})
    for name in ("half.png", "same.png"):
        (root / name).write_bytes((root / "train_0.png").read_bytes())
    content = json.loads((root / "train.json").read_text())
    for number, (name, count) in enumerate({"half.png": 1, "same.png": 3}.items(), 7):
        content["images"].append({"id": number, "file_name": name, "width": 96, "height": 64})
        content["annotations"] += [
            {"id": 100 * number + i, "image_id": number, "category_id": 1, "bbox": box, "area": 9}
            for i, box in enumerate(SIZES.tolist()[:count])
        ]
    (root / "train.json").write_text(json.dumps(content))
    found = audit("train", lambda: read_coco(root, "train.json"))
    (defect,) = [d for d in found.defects if "copy of the picture" in d.problem]
    assert defect.file == "half.png" and found.code == 1
    assert defect.problem.endswith("train_0.png with other objects (1 here, 3 there)")
    assert half_labelled([]) == []


def test_a_copy_of_the_same_name_with_other_objects_is_noted(tmp_path: Path) -> None:
    """Saved again at another quality, its bytes differ."""
    root = coco(tmp_path, {"train": SIZES})
    (root / "again").mkdir()
    smooth = Image.open(root / "train_0.png").resize((8, 6)).resize((96, 64), Image.Resampling.BICUBIC)
    smooth.save(root / "train_0.png")
    smooth.point(lambda value: min(255, value + 3)).save(root / "again" / "train_0.png")
    content = json.loads((root / "train.json").read_text())
    content["images"].append({"id": 7, "file_name": "again/train_0.png", "width": 96, "height": 64})
    (root / "train.json").write_text(json.dumps(content))
    found = audit("train", lambda: read_coco(root, "train.json"))
    problem = "it looks like train_0.png, which has its name but other objects"
    assert [d.file for d in found.defects if d.problem == problem] == ["again/train_0.png"] and found.code == 0


@pytest.mark.parametrize("name", ["c_norm", "c_xyxy", "c_entry_per_ann", "y_nolabelsval"])
def test_sets_as_they_come(shared_data: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    root = shared_data / "wild" / name
    said = {
        "c_norm": (2, "the boxes look relative to the image: in 4 of 4 images"),
        "c_xyxy": (2, "6 of 8 boxes are empty or outside their images, but lie inside as corners (x1, y1, x2, y2)"),
        "c_entry_per_ann": (0, "4 pictures are listed as 8 images"),
        "y_nolabelsval": (0, ""),
    }
    code, problem = said[name]
    form = "yolo" if name[0] == "y" else "coco"
    status, text = check(capsys, "--root", str(root), "--format", form)
    if code:
        assert problem in text
    options: dict[str, Any] = {"root": str(root), "format": form, "num_workers": 0}
    if form == "coco":
        splits = {"train_split": "annotations/train.json", "val_split": "annotations/val.json"}
        options |= splits | {"train_images": "train", "val_images": "val"}
    module = DetectionDataModule(**options)
    assert status == code
    if code:
        with pytest.raises(DataError) as refused:
            module.setup("fit")
        assert problem in str(refused.value)
        return
    module.setup("fit")
    if name == "y_nolabelsval":  # labels/valid beside images/val
        assert [len(record.labels) for record in module.read("val").records] == [2]
        return
    records = module.read("train").records
    assert [len(r.labels) for r in records] == [2, 2, 2, 2] and [r.image_id for r in records] == [1, 3, 5, 7]
    assert problem in describe(module.read("train"), "train")


def test_real_sets_raise_nothing(shared_data: Path) -> None:
    indices: dict[str, Index] = {}
    for name in ("tiny_coco", "nuts", "panoptic", "icevision"):
        root = shared_data / name
        indices |= {f"{name}/{file}": read_coco(root, file) for file in instance_files(Tree(root))}
    places = ("bccd", "cells", "deepforest", "icevision/fridge/odFridgeObjects", "icevision/voc", "voc2012_sample100")
    for name in places:
        xml = "gts/pascalvoc_format" if name == "voc2012_sample100" else None
        indices[name] = read_voc(shared_data / name, annotations=xml)
    assert len(indices) >= 10 and sum(len(index.records) for index in indices.values()) > 900
    found = {name: judge(index) for name, index in indices.items()}
    assert {name: defects for name, defects in found.items() if defects} == {}
