"""A results file and an annotation file of anybody, compared: the figures of pycocotools on the same files."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
from pycocotools import mask as mask_api

from detection.data.records import DataError
from detection.evaluation.coco_files import compare_files


def drawn(seed, masks=False, images=20, categories=(7, 2, 90)):
    """Objects, crowds among them, and detections near to some, with decimals and equal scores."""
    rng = np.random.default_rng(seed)
    gt = {"images": [], "annotations": [], "categories": [{"id": c, "name": f"kind {c}"} for c in categories]}
    dt = []
    for image in rng.permutation(images).tolist():
        gt["images"].append({"id": image, "width": 200, "height": 160, "file_name": f"{image}.jpg"})
        for _ in range(rng.integers(0, 7)):
            x, y, w, h = np.round([*rng.uniform(0, 90, 2), *rng.uniform(4, 60, 2)], rng.integers(0, 9)).tolist()
            category = int(rng.choice(categories))
            item = {
                "image_id": image,
                "category_id": category,
                "bbox": [x, y, w, h],
                "area": w * h * rng.uniform(0.5, 1),
            }
            crowd = bool(rng.random() < 0.1)
            gt["annotations"].append(item | {"id": len(gt["annotations"]) + 1, "iscrowd": int(crowd)})
            if masks:
                gt["annotations"][-1]["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            for _ in range(rng.integers(0, 4)):
                moved = (np.array([x, y, w, h]) + rng.normal(0, 2, 4) * (rng.random() < 0.7)).clip(0.5).tolist()
                score = float(rng.choice([rng.random(), round(rng.random(), 1), 0.5 + 1e-12 * rng.integers(9)]))
                entry = {"image_id": image, "category_id": int(rng.choice([category, 7])), "score": score}
                a, b, c, d = moved
                polygon = [[a, b, a + c, b, a + c, b + d, a, b + d]]
                mask = mask_api.merge(mask_api.frPyObjects(polygon, 160, 200))
                rle = {"size": [160, 200], "counts": mask["counts"].decode()}
                dt.append(entry | ({"segmentation": rle} if masks else {"bbox": moved}))
    return gt, [dt[i] for i in rng.permutation(len(dt))]


def write(folder, gt, dt):
    (folder / "gt.json").write_text(json.dumps(gt))
    (folder / "dt.json").write_text(json.dumps(dt))
    return folder / "gt.json", folder / "dt.json"


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_figures_and_those_of_each_class_are_the_official_ones(tmp_path, pycoco, seed, masks):
    gt, dt = drawn(seed, masks)
    compared = compare_files(*write(tmp_path, gt, dt))
    kind = "segm" if masks else "bbox"
    official = pycoco(gt, copy.deepcopy(dt), kind)
    assert compared.metric.compute() == pytest.approx(official["figures"], abs=1e-12)
    assert 0.1 < official["figures"]["map"] < 0.95 and not compared.notes
    assert compared.category_ids == (2, 7, 90)
    precision = official["precision"][:, :, :, 0, 2]
    classes = {
        f"kind {c}": precision[:, :, k].mean() for k, c in enumerate((2, 7, 90)) if (precision[:, :, k] > -1).any()
    }
    assert compared.metric.per_class() == pytest.approx(classes, abs=1e-12)


def test_real_annotations(shared_data, pycoco, tmp_path):
    path = shared_data / "tiny_coco" / "annotations" / "instances_val2017.json"
    rng, gt = np.random.default_rng(0), json.loads(path.read_text())
    dt = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": float(rng.random()),
         "bbox": (np.array(a["bbox"]) + rng.normal(0, 3, 4)).clip(0).tolist()}
        for a in gt["annotations"]
    ]  # fmt: skip
    compared = compare_files(path, write(tmp_path, {}, dt)[1])
    figures = pycoco(str(path), str(tmp_path / "dt.json"))["figures"]
    assert compared.metric.compute() == pytest.approx(figures, abs=1e-12) and 0.2 < figures["map"] < 0.9


def test_no_detection_at_all(tmp_path, pycoco):
    gt, _ = drawn(0)
    compared = compare_files(*write(tmp_path, gt, []))
    assert compared.metric.compute()["map"] == 0 and compared.metric.compute()["mar_100"] == 0


def test_predictions_of_ours_are_results_too(tmp_path):
    gt, dt = drawn(3)
    listed, whole = (
        compare_files(*write(tmp_path, gt, form)).metric.compute() for form in (dt, gt | {"annotations": dt})
    )
    assert listed == whole and listed["map"] > 0.1


def test_what_pycocotools_leaves_out_is_said(tmp_path, pycoco):
    gt, dt = drawn(1)
    gt["annotations"].append(gt["annotations"][0] | {"image_id": 777, "id": 5000})
    dt += [dt[0] | {"category_id": 55}, dt[1] | {"category_id": 55}, dt[1] | {"category_id": "7"}]
    compared = compare_files(*write(tmp_path, gt, dt))
    figures = pycoco(gt, copy.deepcopy(dt))["figures"]
    assert compared.metric.compute() == pytest.approx(figures, abs=1e-12)
    assert "1 annotations are left out" in compared.notes[0]
    assert "3 detections are left out, of categories" in compared.notes[1]
    assert compared.notes[1].endswith("lacks: 55, 7")


def test_what_pycocotools_counts_wrong_is_right_and_said(tmp_path, pycoco):
    gt, _ = drawn(2)
    keys = ("image_id", "category_id", "bbox")
    dt = [{key: a[key] for key in keys} | {"score": 0.5} for a in gt["annotations"] if not a["iscrowd"]]
    figures = {}
    for name, change in (("zero", {"id": 0}), ("twice", {"id": 2})):
        spoiled = copy.deepcopy(gt)
        next(a for a in spoiled["annotations"] if not a["iscrowd"]).update(change)
        compared = compare_files(*write(tmp_path, spoiled, dt))
        assert compared.metric.compute()["map"] == pytest.approx(1.0, abs=1e-12)
        figures[name] = pycoco(spoiled, copy.deepcopy(dt))["figures"]["map"], compared.notes[0]
    assert figures["zero"][0] < 0.999 and "the id 0, whose match pycocotools takes for none" in figures["zero"][1]
    assert "several annotations have one id" in figures["twice"][1]
    del gt["annotations"][0]["area"]
    with pytest.raises(KeyError):
        pycoco(gt, copy.deepcopy(dt))
    compared = compare_files(*write(tmp_path, gt, dt))
    assert compared.metric.compute()["map"] == pytest.approx(1.0, abs=1e-12)
    assert "1 annotations have no area and get that of their box" in compared.notes[0]


def test_ignore_means_nothing_to_the_protocol(tmp_path, pycoco):
    gt, dt = drawn(4)
    for item in gt["annotations"][::3]:
        item["ignore"] = 1
    assert compare_files(*write(tmp_path, gt, dt)).metric.compute() == pytest.approx(
        pycoco(gt, dt)["figures"], abs=1e-12
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_id": 4711}, "entry 0 is of image 4711, which"),
        ({"image_id": "3"}, "entry 0 is of image '3', which"),
        ({"image_id": None}, "entry 0 is of image None"),
        ({"category_id": None}, "entry 0 has no category_id"),
        ({"score": None}, "entry 0 has no score"),
        ({"score": float("nan")}, "entry 0 has no score that is a finite number"),
        ({"bbox": [1, 2, 3]}, "entry 0 has the bbox [1, 2, 3], not"),
        ({"bbox": [1, 2, -3, 4]}, "entry 0 has the bbox [1, 2, -3, 4], not"),
    ],
)
def test_bad_results_are_refused_by_entry(tmp_path, change, sentence):
    gt, dt = drawn(0)
    dt[0] |= change
    with pytest.raises(DataError, match=re.escape(f"dt.json: {sentence}")):
        compare_files(*write(tmp_path, gt, dt))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bbox": None}, "annotation at 0 has the bbox None"),
        ({"area": "big"}, "annotation at 0 has the area 'big'"),
        ({"iscrowd": 2}, "annotation at 0 has iscrowd 2; use 0 or 1"),
        ({"segmentation": []}, "annotation at 0 has no segmentation, but the results have masks"),
        ({"segmentation": [[1, 2]]}, "a segmentation can't be read"),
    ],
)
def test_bad_annotations_are_refused_by_entry(tmp_path, change, sentence):
    gt, dt = drawn(0, masks="segmentation" in change)
    gt["annotations"][0] |= change
    with pytest.raises(DataError, match=re.escape(sentence)):
        compare_files(*write(tmp_path, gt, dt))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "not readable as JSON"),
        ("{}", "a list of detections is expected"),
        ("[3]", "entry 0 is a int, not a detection"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path, content, sentence):
    gt, results = write(tmp_path, drawn(0)[0], [])
    results.write_text(content)
    with pytest.raises(DataError, match=re.escape(sentence)):
        compare_files(gt, results)
    results.unlink()
    with pytest.raises(DataError, match="the results file is missing"):
        compare_files(gt, results)
