from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.data import rle
from detection.data.coco import read_coco
from detection.data.records import DataError, Index


def content() -> dict[str, Any]:
    """A valid file: two images of 40x30, ids with gaps and from 0, one image without objects."""
    return {
        "images": [
            {"id": 0, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 7, "file_name": "sub/b.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 0, "name": "cat"}],
        "annotations": [
            {"id": 3, "image_id": 0, "category_id": 9, "bbox": [1, 2, 10.5, 20], "area": 100.0, "iscrowd": 0},
            {"id": 5, "image_id": 0, "category_id": 0, "bbox": [0, 0, 40, 30], "area": 5.5, "iscrowd": 1},
        ],
    }


def write(root: Path, data: Any) -> Path:
    (root / "sub").mkdir(exist_ok=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (40, 30)).save(root / name)
    (root / "gt.json").write_text(json.dumps(data))
    return root


def problems(index: Index) -> list[str]:
    return [f"{d.severity}: {d.record}: {d.problem}" for d in index.defects]


def test_valid_file(tmp_path: Path) -> None:
    index = read_coco(write(tmp_path, content()), "gt.json")
    assert (index.classes, index.category_ids, index.defects) == (("cat", "dog"), (0, 9), [])
    first, second = index.records
    assert (first.image_id, first.file_name, first.width, first.height) == (0, "a.png", 40, 30)
    assert (second.image_id, second.file_name, second.boxes.shape) == (7, "sub/b.png", (0, 4))
    np.testing.assert_array_equal(first.boxes, np.array([[1, 2, 11.5, 22], [0, 0, 40, 30]], np.float32))
    assert first.boxes.dtype == np.float32 and second.boxes.dtype == np.float32 and second.labels.dtype == np.int64
    assert first.labels.tolist() == [2, 1] and first.areas.tolist() == [100, 5.5]
    assert first.iscrowd.tolist() == [False, True] and first.annotation_ids.tolist() == [3, 5]


def test_classes_choose_and_order(tmp_path: Path) -> None:
    root = write(tmp_path, content())
    index = read_coco(root, "gt.json", classes=["dog", "cat"])
    assert index.category_ids == (9, 0) and index.records[0].labels.tolist() == [1, 2]
    index = read_coco(root, "gt.json", classes=["dog"])
    assert index.category_ids == (9,) and index.records[0].labels.tolist() == [1] and len(index.records) == 2
    with pytest.raises(DataError, match="no class 'Dogs' in the data; did you mean 'dog'"):
        read_coco(root, "gt.json", classes=["Dogs"])
    with pytest.raises(DataError, match="'dog' is asked for twice"):
        read_coco(root, "gt.json", classes=["dog", "dog"])


@pytest.mark.parametrize(
    ("where", "key", "value", "expected", "boxes"),
    [
        ("annotations", "bbox", [1, 2, 0, 5], "repairable: image 0, annotation 3: box has zero width", 1),
        ("annotations", "bbox", [1, 2, 5, -1], "repairable: image 0, annotation 3: box has negative height", 1),
        ("annotations", "bbox", [1, 2, 5], "repairable: image 0, annotation 3: bbox is not four finite numbers", 1),
        ("annotations", "bbox", [1, 2, 5, float("nan")], "repairable: image 0, annotation 3: bbox is not four", 1),
        ("annotations", "bbox", None, "repairable: image 0, annotation 3: bbox is missing", 1),
        ("annotations", "bbox", [50, 2, 5, 5], "repairable: image 0, annotation 3: box lies outside the image", 1),
        ("annotations", "bbox", [35, 2, 10, 5], "note: image 0, annotation 3: box reaches 5 px outside", 2),
        ("annotations", "bbox", [20, 1, 1e-9, 5], "repairable: image 0, annotation 3: box is too thin", 1),
        ("annotations", "category_id", 4, "repairable: image 0, annotation 3: there is no category 4", 1),
        ("annotations", "category_id", None, "repairable: image 0, annotation 3: it has no category_id", 1),
        ("annotations", "image_id", 99, "repairable: image 99: 1 annotations name an image that is not listed", 1),
        ("annotations", "image_id", None, "repairable: annotation at 0: it has no image_id", 1),
        ("annotations", "id", 5, "repairable: image 0, annotation 5: the id is used twice", 2),
        ("annotations", "area", -4, "repairable: image 0, annotation 3: area is not a positive number", 2),
        ("annotations", "area", 1e-46, "repairable: image 0, annotation 3: area is not a positive number", 2),
        ("annotations", "iscrowd", "yes", "repairable: image 0, annotation 3: iscrowd is 'yes'", 2),
        ("images", "width", 41, "repairable: image 0: says 41x30 (width x height) but the file is 40x30", 2),
        ("images", "height", None, "repairable: image 0: the image's size is missing or not positive", 2),
        ("images", "file_name", "c.png", "broken: image 0: the image is missing", 0),
        ("images", "file_name", None, "broken: image 0: it has no file_name", 0),
        ("categories", "name", None, "repairable: category 9: it has no name", 2),
        ("categories", "id", None, "repairable: category 0: it has no id", 1),
    ],
)
def test_defects_are_reported_and_the_rest_is_read(
    tmp_path: Path, where: str, key: str, value: Any, expected: str, boxes: int
) -> None:
    data = content()
    data[where][0][key] = value
    index = read_coco(write(tmp_path, data), "gt.json")
    assert any(problem.startswith(expected) for problem in problems(index)), problems(index)
    assert sum(len(record.boxes) for record in index.records) == boxes
    assert all(defect.fix and defect.file for defect in index.defects)


def test_missing_area_and_iscrowd_have_silent_defaults(tmp_path: Path) -> None:
    data = content()
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    index = read_coco(write(tmp_path, data), "gt.json")
    assert index.defects == [] and index.records[0].areas.tolist() == [210, 1200]
    assert not index.records[0].iscrowd.any()


def test_ids_in_any_spelling(tmp_path: Path) -> None:
    data = content()
    for annotation in data["annotations"]:
        annotation |= {"image_id": str(annotation["image_id"]), "category_id": float(annotation["category_id"])}
    index = read_coco(write(tmp_path, data), "gt.json")
    assert index.records[0].labels.tolist() == [2, 1] and index.defects == []
    data["images"][0]["id"] = "left"
    for annotation in data["annotations"]:
        annotation["image_id"] = "left"
    index = read_coco(write(tmp_path, data), "gt.json")
    assert [record.image_id for record in index.records] == ["left", 7] and len(index.records[0].boxes) == 2
    assert "some ids are numbers, some text" in problems(index)[0]
    assert "pycocotools can't sort them" in index.defects[0].fix


@pytest.mark.parametrize(
    "name", ["../gt.json", "/etc/hostname", "sub/../../x.png", "C:/x.png", "..\\x.png", "link.png", "l/x.png"]
)
def test_paths_may_not_leave_the_root(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    os.symlink(tmp_path / "x.png", root / "link.png")
    os.symlink(tmp_path, root / "l")
    data = content()
    data["images"][0]["file_name"] = name
    with pytest.raises(DataError, match=r"gt\.json: image 0: the path .* is not inside"):
        read_coco(write(root, data), "gt.json")


def test_links_inside_the_root_are_followed(tmp_path: Path) -> None:
    root = write(tmp_path, content())
    os.rename(root / "a.png", root / "real.png")
    os.symlink(root / "real.png", root / "a.png")
    assert read_coco(root, "gt.json").defects == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable as JSON"),
        ('{"images": [', "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", "holds a list"),
        ("{}", "'images' is missing"),
        ('{"images": [], "annotations": {}}', "'annotations' is a dict"),
        ('{"images": [], "annotations": [], "categories": []}', "'categories' is empty"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no usable image"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "id names",
        ),
    ],
)
def test_unusable_files_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "gt.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_coco(tmp_path, "gt.json")
    assert "gt.json" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    write(tmp_path, content())
    with pytest.raises(DataError, match=r"missing; there are: gt\.json"):
        read_coco(tmp_path, "instances.json")
    with pytest.raises(DataError, match="not a folder"):
        read_coco(tmp_path / "none", "gt.json")
    data = content()
    for name, image in zip(("a.png", "b.png"), data["images"], strict=True):
        image["file_name"] = name
    os.rename(tmp_path / "a.png", tmp_path / "sub" / "a.png")
    (tmp_path / "gt.json").write_text(json.dumps(data))
    assert [record.file_name for record in read_coco(tmp_path, "gt.json").records] == ["sub/a.png", "sub/b.png"]


def test_segmentation_in_every_form(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), bool)
    mask[4:9, 6:20] = True
    compressed = rle.encode(mask)
    uncompressed = {"size": [30, 40], "counts": rle.decompress(compressed["counts"])}
    polygon = [6, 4, 20, 4, 20, 9, 6, 9]
    forms = [compressed | {"counts": compressed["counts"].decode()}, uncompressed, [polygon], [polygon, [1, 2, 3]]]
    bad = [[], None, [[1, 2, 3, 4]], {"size": [40, 30], "counts": [1200]}, {"size": [30, 40], "counts": [7]}, "x"]
    data = content()
    data["annotations"] = [
        {"id": i, "image_id": 0, "category_id": 9, "segmentation": form} for i, form in enumerate(forms)
    ] + [
        {"id": 10 + i, "image_id": 0, "category_id": 9, "segmentation": form, "bbox": [0, 0, 9, 9]}
        for i, form in enumerate(bad)
    ]
    index = read_coco(write(tmp_path, data), "gt.json", masks=True)
    record = index.records[0]
    assert record.segments == [compressed, compressed, [polygon], [polygon], *[None] * 6]
    np.testing.assert_array_equal(record.boxes[:4], [[6, 4, 20, 9]] * 4)
    assert record.areas[:4].tolist() == [70] * 4
    for i in range(10, 16):
        assert sum(f"annotation {i}" in defect.record for defect in index.defects) == 1
    assert sum("of its polygons" in defect.problem for defect in index.defects) == 1


def test_tiny_coco_equals_pycocotools(shared_data: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    root = shared_data / "tiny_coco"
    for split, images, boxes, empty, crowds in (
        ("train2017", 50, 470, [262284], 5),
        ("val2017", 50, 382, [226111, 58636], 5),
    ):
        index = read_coco(root, f"annotations/instances_{split}.json", split, masks=True)
        theirs = coco.COCO(str(root / f"annotations/instances_{split}.json"))
        assert index.defects == [] and len(index.records) == images and len(index.classes) == 80
        assert sum(len(r.boxes) for r in index.records) == boxes
        assert sorted(r.image_id for r in index.records if not len(r.boxes)) == sorted(empty)
        assert sum(int(r.iscrowd.sum()) for r in index.records) == crowds
        assert list(index.category_ids) == sorted(theirs.getCatIds())
        for record in index.records:
            for i, number in enumerate(record.annotation_ids):
                item = theirs.anns[int(number)]
                x, y, w, h = item["bbox"]
                np.testing.assert_allclose(record.boxes[i], [x, y, x + w, y + h], atol=0.011)
                assert record.areas[i] == np.float32(item["area"])
                assert index.category_ids[record.labels[i] - 1] == item["category_id"]
                if item["iscrowd"]:
                    np.testing.assert_array_equal(rle.decode(record.segments[i]), theirs.annToMask(item))


@pytest.mark.parametrize(
    ("folder", "file", "images", "counts"),
    [
        ("nuts", "trainval.json", "images", (18, 165, 3, 165)),
        ("panoptic", "panoptic_coco_detection_format.json", "input_images", (2, 50, 133, 50)),
        ("icevision", "annotations.json", "images", (6, 36, 80, 36)),
        ("voc2012_sample100", "gts/coco_format_v1/instances_default.json", "images", (100, 273, 20, 0)),
    ],
)
def test_real_sets(shared_data: Path, folder: str, file: str, images: str, counts: tuple[int, ...]) -> None:
    index = read_coco(shared_data / folder, file, images, masks=True)
    segments = [segment for record in index.records for segment in record.segments or ()]
    drawn = sum(segment is not None for segment in segments)
    assert (len(index.records), len(segments), len(index.classes), drawn) == counts
    assert len(index.defects) == len(segments) - drawn


def test_broken_reference_file_lists_all_its_defects(shared_data: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_coco(shared_data / "eval_refs" / "hotcoco_fixtures", "healthcheck_bad.json")
    found = "\n".join(map(str, caught.value.defects))
    for part in (
        "image 1: the id is used for several files",
        "image 2: the image's size is missing or not positive",
        "annotation 1: the id is used twice",
        "no category 999",
        "image 999: 1 annot",
    ):
        assert part in found
