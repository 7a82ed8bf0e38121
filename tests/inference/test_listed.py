"""Test sets that a COCO file lists: predicted under its ids and classes, or refused."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data.records import DataError
from detection.inference import predict
from detection.inference.sources import Listed
from tests.inference.blobs import Blobs, scene


def listed(tmp_path, ids=("b", "a"), categories=((3, "blue"), (12, "other"), (1, "red"))):
    """Two pictures, a file that lists them without objects, as of a test set, and one with the objects."""
    folder = tmp_path / "test"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(scene(60, 80, (0, 10, 10, 30, 40))).save(folder / "one.png")
    Image.fromarray(scene(60, 80, (2, 50, 20, 70, 50), (0, 5, 5, 25, 25))).save(folder / "more" / "two.png")
    files = zip(ids, ("one.png", "more/two.png"), strict=True)
    info = {"images": [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in files]}
    info["categories"] = [{"id": i, "name": name} for i, name in categories]
    number = {name: i for i, name in categories}
    objects = ((0, "red", [10, 10, 20, 30]), (1, "blue", [50, 20, 20, 30]), (1, "red", [5, 5, 20, 20]))
    annotations = [
        {
            "id": k + 1,
            "image_id": ids[i],
            "category_id": number.get(name, 0),
            "bbox": b,
            "area": b[2] * b[3],
            "iscrowd": 0,
        }
        for k, (i, name, b) in enumerate(objects)
    ]
    (tmp_path / "image_info.json").write_text(json.dumps(info))
    (tmp_path / "instances.json").write_text(json.dumps(info | {"annotations": annotations}))
    return folder


@pytest.mark.parametrize("ids", [("b", "a"), (9, 2), (2**63 + 5, 2**63 + 1), ("007", "7b")])
def test_a_test_set_is_predicted_under_its_own_ids(tmp_path, ids):
    folder = listed(tmp_path, ids)
    done = predict(Blobs(), Listed(tmp_path / "image_info.json", folder), tmp_path / "out", 0.0)
    assert done.images == 2 and not done.left_out and not done.problems
    truth = COCO(str(tmp_path / "instances.json"))
    found = truth.loadRes(str(tmp_path / "out" / "detections_bbox.json"))
    scores = COCOeval(truth, found, "bbox")
    scores.evaluate(), scores.accumulate(), scores.summarize()
    assert scores.stats[0] == pytest.approx(1.0, abs=1e-12)
    masks = json.loads((tmp_path / "out" / "detections_segm.json").read_text())
    assert len(masks) == 3 and set(masks[0]) == {"image_id", "category_id", "segmentation", "score"}
    whole = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["id"] for image in whole["images"]] == [*ids]
    assert {c["id"]: c["name"] for c in whole["categories"]} == {1: "red", 3: "blue", 12: "other"}


def test_an_image_listed_twice_is_exported_under_both_ids(tmp_path):
    folder = listed(tmp_path)
    info = json.loads((tmp_path / "image_info.json").read_text())
    info["images"].append(info["images"][0] | {"id": "again"})
    (tmp_path / "image_info.json").write_text(json.dumps(info))
    done = predict(Blobs(), Listed(tmp_path / "image_info.json", folder), tmp_path / "out", 0.0)
    entries = json.loads((tmp_path / "out" / "detections_bbox.json").read_text())
    assert done.images == 2 and sorted(entry["image_id"] for entry in entries) == ["a", "a", "again", "b"]


def test_a_class_that_the_test_set_lacks_is_counted(tmp_path):
    folder = listed(tmp_path, categories=((3, "blue"), (12, "other")))
    done = predict(Blobs(), Listed(tmp_path / "image_info.json", folder), tmp_path / "out", 0.0)
    assert done.left_out == {"red": 2} and done.counts == {"red": 2, "blue": 1}
    entries = json.loads((tmp_path / "out" / "detections_bbox.json").read_text())
    assert [entry["category_id"] for entry in entries] == [3]


def broken(info, where, **values):
    return info | {where: [info[where][0] | values, *info[where][1:]]}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda info: broken(info, "images", file_name="none.png"), "1 of its 2 images are not in"),
        (lambda info: broken(info, "images", file_name="../image_info.json"), "is not inside"),
        (lambda info: broken(info, "images", file_name=None), "image b: it has no file_name"),
        (lambda info: broken(info, "images", id=None), "entry 0 of 'images' has no id"),
        (lambda info: broken(info, "images", id=1.5), "entry 0 of 'images' has no id that is a whole number or text"),
        (lambda info: broken(info, "images", id="a"), "two entries of 'images' have the id 'a'"),
        (lambda info: {"images": info["images"]}, "'categories' is missing"),
        (lambda info: info | {"images": []}, "it lists no image"),
        (lambda info: [info], "holds a list, not an object"),
    ],
)
def test_a_test_set_that_can_not_be_used_is_refused(tmp_path, spoil, sentence):
    folder = listed(tmp_path)
    info = json.loads((tmp_path / "image_info.json").read_text())
    (tmp_path / "image_info.json").write_text(json.dumps(spoil(info)))
    with pytest.raises(DataError, match=re.escape(sentence)):
        Listed(tmp_path / "image_info.json", folder)


def test_a_test_set_of_other_classes_is_refused(tmp_path):
    folder = listed(tmp_path, categories=((3, "cat"), (12, "dog")))
    with pytest.raises(DataError, match=r"none of the detector's classes \(red, blue\) .* \(cat, dog\)"):
        predict(Blobs(), Listed(tmp_path / "image_info.json", folder), tmp_path / "out")
