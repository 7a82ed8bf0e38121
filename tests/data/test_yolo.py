from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.data.records import DataError
from detection.data.yolo import read_yolo


def write(root: Path, labels: str, yaml: str = "names: [cat, dog]\n", layout: str = "images/train") -> Path:
    for folder, name in ((layout, "a.png"), (layout, "b.png")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(root / folder / name)
    text = root / layout.replace("images", "labels") / "a.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(labels)
    if yaml:
        (root / "data.yaml").write_text(yaml)
    return root


@pytest.mark.parametrize(
    ("yaml", "layout"),
    [
        ("names: [cat, dog]\n", "images/train"),
        ("names: {0: cat, 1: dog}\ntrain: images/first\n", "images/first"),
        ("names: [cat, dog]\ntrain: ../train/images\nnc: 2\n", "train/images"),
        ("names: [cat, dog]\ntrain: images/x\npath: set\n", "set/images/x"),
    ],
)
def test_layouts(tmp_path: Path, yaml: str, layout: str) -> None:
    index = read_yolo(write(tmp_path, "1 0.5 0.5 0.2 0.4\n\n0 0.05 0.1 0.1 0.2\n", yaml, layout), "train")
    assert (index.classes, index.category_ids, index.defects) == (("cat", "dog"), (0, 1), [])
    first, second = index.records
    assert (first.file_name, first.width, first.height) == (f"{layout}/a.png", 200, 100)
    np.testing.assert_allclose(first.boxes, [[80, 30, 120, 70], [0, 0, 20, 20]], atol=1e-5)
    assert first.labels.tolist() == [2, 1] and second.boxes.shape == (0, 4)


def test_image_lists_and_class_files(tmp_path: Path) -> None:
    root = write(tmp_path, "0 .5 .5 1 1", yaml="")
    (root / "classes.txt").write_text("cat\ndog\n")
    assert read_yolo(root, "train").classes == ("cat", "dog")
    (root / "data.yaml").write_text("names: [cat, dog]\ntrain: train.txt\n")
    (root / "train.txt").write_text(
        "./images/train/b.png\nimages/train/a.png\nimages/train/a.png\nimages/train/c.png\n"
    )
    index = read_yolo(root, "train", classes=["dog"])
    assert [record.file_name[-5:] for record in index.records] == ["b.png", "a.png"] and index.category_ids == (1,)
    assert sorted(d.severity for d in index.defects) == ["broken", "repairable"]
    (root / "train.txt").write_text("../../x.png\n")
    with pytest.raises(DataError, match=r"no usable image.*there is no picture '\.\./\.\./x\.png'"):
        read_yolo(root, "train")


@pytest.mark.parametrize(
    ("line", "problem", "boxes"),
    [
        ("2 .5 .5 .1 .1", "there is no class 2", 0),
        ("x .5 .5 .1 .1", "no number", 0),
        ("0 .5 .5 .1", "3 numbers follow the class", 0),
        ("0 100 50 20 20", "not relative", 0),
        ("0 nan .5 .1 .1", "not relative", 0),
        ("nan .5 .5 .1 .1", "there is no class", 0),
        ("0 .5 .5 0 .1", "zero width", 0),
        ("0 .95 .5 .2 .1", "reaches 10 px outside", 1),
        ("0 .5 .5 .1 .1 .87", "a sixth number", 1),
    ],
)
def test_defects(tmp_path: Path, line: str, problem: str, boxes: int) -> None:
    index = read_yolo(write(tmp_path, line), "train")
    (defect,) = index.defects
    assert problem in defect.problem and defect.record == "file, line 1" and defect.file == "labels/train/a.txt"
    assert len(index.records[0].boxes) == boxes


def test_polygon_is_read_as_the_box_around_it(tmp_path: Path) -> None:
    index = read_yolo(write(tmp_path, "0 .1 .2 .5 .1 .4 .9"), "train")
    np.testing.assert_allclose(index.records[0].boxes, [[20, 10, 100, 90]], atol=1e-5)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("", r"no data\.yaml"),
        ("names: [", "not readable as YAML"),
        ("names: !!python/object:os.system {}", "not readable as YAML"),
        ("names: {0: a, b: 2}", "no class numbers"),
        ("names: []", "not a list of class names"),
        ("names: [a, a]", "listed 2 times"),
        ("names: [a]\nval: /etc", "'/etc' of 'val' is not there; correct the path"),
    ],
)
def test_unusable_sets(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_yolo(write(tmp_path, "", yaml), "val" if "val" in yaml else "train")


def test_missing_split_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        read_yolo(write(tmp_path, ""), "trian")
