"""Suspects: damage done on purpose to a drawn set, its files read back, and what to label next."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from defusedxml.ElementTree import parse
from pycocotools.coco import COCO
from torchvision.ops import box_iou

from detection.data.duplicates import gradients
from detection.evaluation.label_studio import Region, task, write_configuration
from detection.evaluation.next_labels import Unlabelled, merged, ranked, write_next
from detection.evaluation.results import ImageResult
from detection.evaluation.suspect_files import Judged, write_files
from detection.evaluation.suspects_page import render
from detection.evaluation.suspicion import KINDS, Labelled, iou_of, partly_annotated, places_of, suspects

NAMES = ["cat", "dog & fox"]
SIZE = (300, 400)
FIELDS = ("gt_boxes", "gt_labels", "gt_areas", "gt_iscrowd", "gt_difficult")


def image(number: int, boxes: Any, labels: Any, found: Any, found_labels: Any, scores: Any) -> ImageResult:
    boxes, found = (np.array(own, np.float64).reshape(-1, 4) for own in (boxes, found))
    flags = np.zeros(len(boxes), bool)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    truth = (boxes, np.array(labels, np.int64), areas, flags, flags.copy())
    detected = (found, np.array(found_labels, np.int64), np.array(scores, np.float64))
    return ImageResult(number, f"folder/{number} a.png", SIZE, *detected, None, *truth, None)


def world(images: int = 40) -> list[ImageResult]:
    """Six objects an image, all annotated and found within a pixel or two."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(images):
        corner = np.array([(x, y) for x in (20, 150, 280) for y in (20, 160)]) + rng.uniform(-10, 10, (6, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(60, 90, (6, 2))], 1)
        labels = rng.integers(1, 3, 6)
        found = boxes + rng.normal(0, 1.5, boxes.shape)
        made.append(image(i, boxes, labels, found, labels, np.full(6, 0.9)))
    return made


def without(result: ImageResult, n: int) -> ImageResult:
    return replace(result, **{name: np.delete(getattr(result, name), n, axis=0) for name in FIELDS})


def damaged() -> list[ImageResult]:
    """Of image 3 object 1 removed, of 5 object 2 of the other class, of 7 object 4 shifted, to 9 one added."""
    made = world()
    made[3] = without(made[3], 1)
    labels = made[5].gt_labels.copy()
    labels[2] = 3 - labels[2]
    made[5] = replace(made[5], gt_labels=labels)
    boxes = made[7].gt_boxes.copy()
    boxes[4] += [25, 0, 25, 0]
    made[7] = replace(made[7], gt_boxes=boxes)
    kept = np.arange(6) != 0  # nothing is found at object 0
    nine = made[9]
    made[9] = replace(nine, boxes=nine.boxes[kept], labels=nine.labels[kept], scores=nine.scores[kept])
    return made


def test_iou_is_torchvisions() -> None:
    rng = np.random.default_rng(1)
    a, b = (np.concatenate([c := rng.uniform(0, 50, (n, 2)), c + rng.uniform(1, 40, (n, 2))], 1) for n in (7, 5))
    assert iou_of(a, b) == pytest.approx(box_iou(torch.tensor(a), torch.tensor(b)).numpy())


def test_damage_comes_first_and_is_named() -> None:
    clean, made = world(), damaged()
    found = suspects(made, 2)
    first = {(one.kind, one.image, one.annotation) for one in found[:3]}
    assert first == {("missing", 3, None), ("class", 5, 2), ("box", 7, 4)}
    by_kind = {one.kind: one for one in reversed(found)}
    assert [(one.image, one.annotation) for one in found if one.kind == "spurious"] == [(9, 0)]
    for kind, number, n in (("missing", 3, 1), ("class", 5, 2), ("box", 7, 4)):
        proposed = by_kind[kind].proposed  # type: ignore[index]
        assert proposed is not None and proposed.label == clean[number].gt_labels[n]
        assert proposed.box == pytest.approx(clean[number].boxes[n])
    assert by_kind["spurious"].proposed is None and by_kind["spurious"].score <= 0.5
    assert all(by_kind[kind].score > 0.85 for kind in ("missing", "class", "box"))  # type: ignore[index]
    assert all(one.kind == "box" and one.score < 0.9 for one in found[3:] if one.kind != "spurious")
    assert by_kind["class"].annotated == Labelled(tuple(made[5].gt_boxes[2]), int(made[5].gt_labels[2]))


def test_a_loose_box_is_loose_for_its_class() -> None:
    """The same IoU is usual for one class and not for the other."""
    made = world()
    rng = np.random.default_rng(2)
    for i, result in enumerate(made):
        loose = result.gt_boxes + rng.normal(0, 9, (6, 4)) * (result.gt_labels == 2)[:, None]
        made[i] = replace(result, gt_boxes=loose)
    i = next(i for i, result in enumerate(made) if set(result.gt_labels[:2]) == {1, 2})
    boxes = made[i].gt_boxes.copy()
    boxes[:2] = made[i].boxes[:2] + np.array([12, 0, 12, 0])
    made[i] = replace(made[i], gt_boxes=boxes)
    scores = {one.annotation: one.score for one in suspects(made, 2) if one.image == i and one.kind == "box"}
    of = {int(label): scores.get(n, 0.0) for n, label in enumerate(made[i].gt_labels[:2])}
    assert of[1] > 0.85 and of[2] < 0.6


def test_one_detection_answers_one_annotation() -> None:
    """Two annotations of one object: the better one is answered, the other has nothing."""
    result = image(0, [[10, 10, 60, 60], [12, 12, 62, 62]], [1, 1], [[10, 10, 60, 61]], [1], [0.9])
    assert places_of(result, 2).of.tolist() == [0, -1]


def test_classes_at_one_place_are_one_place() -> None:
    found = [[10, 10, 60, 60], [12, 10, 60, 62], [200, 10, 260, 60]]
    places = places_of(image(0, [], [], found, [1, 2, 2], [0.3, 0.6, 0.2]), 2)
    assert places.scores.tolist() == [[0.3, 0.6], [0.0, 0.2]]
    assert places.boxes.tolist() == [found[1], found[2]]
    assert places.label.tolist() == [2, 2] and places.taken.tolist() == [False, False]


def test_images_annotated_in_part_come_later_and_are_listed() -> None:
    made = world()
    made[3] = without(made[3], 1)
    label = int(world()[3].gt_labels[1])
    scores = made[3].scores.copy()
    scores[1] = 0.9
    made[3] = replace(made[3], scores=scores)
    own = world()[8]
    labels = np.full(6, label)
    made[8] = replace(own, labels=labels, scores=np.full(6, 0.9), gt_labels=labels)
    for _ in range(4):
        made[8] = without(made[8], 0)
    missing = [one for one in suspects(made, 2) if one.kind == "missing"]
    assert [one.image for one in missing] == [3, 8, 8, 8, 8]
    assert missing[0].score > missing[1].score + 0.1
    assert partly_annotated(made, 2) == [(8, label, 4, 2)]


def test_crowds_difficult_objects_and_classes_in_part_are_left_alone() -> None:
    made = world()
    crowd = made[2].gt_iscrowd.copy()
    crowd[0] = True
    inside = made[2].gt_boxes[0] + [20, 20, -20, -20]
    made[2] = replace(made[2], gt_iscrowd=crowd)
    made[2] = replace(
        made[2],
        boxes=np.concatenate([made[2].boxes, [inside]]),
        labels=np.append(made[2].labels, 1),
        scores=np.append(made[2].scores, 0.95),
    )
    difficult = made[4].gt_difficult.copy()
    difficult[1] = True
    made[4] = replace(made[4], gt_difficult=difficult, gt_boxes=made[4].gt_boxes + np.eye(6)[1][:, None] * 25)
    made[6] = replace(without(made[6], 5), excused=np.ones(6, bool))
    assert not [one for one in suspects(made, 2) if (one.image, one.annotation) == (4, 1) or one.kind == "missing"]
    made[6] = replace(made[6], excused=None)
    assert [one.image for one in suspects(made, 2) if one.kind == "missing"] == [6]


def test_nothing_to_judge() -> None:
    nothing = image(0, [], [], [], [], [])
    assert suspects([], 2) == suspects([nothing], 2) == partly_annotated([nothing], 2) == []
    nowhere = suspects(
        [image(0, [], [], [[1, 1, 9, 9]], [1], [0.9])], 1
    )  # where nothing is annotated nothing is missing
    assert nowhere == []


def judged(results: list[ImageResult], ids: list[list[Any]]) -> Judged:
    return Judged("run", results, ids, NAMES, [7, 9], lambda result: np.zeros((*result.size, 3), np.uint8))


@pytest.mark.parametrize("unique", [True, False])
def test_files_are_read_back(unique: bool, tmp_path: Path) -> None:
    made = damaged()
    ids = [[100 * i + n if unique else n for n in range(len(r.gt_labels))] for i, r in enumerate(made)]
    found = suspects(made, 2)
    write_files(tmp_path, own := judged(made, ids), found, 3)
    coco = COCO(str(tmp_path / "suspects.json"))
    entries = list(coco.dataset["annotations"])
    assert len(coco.anns) == len(entries) == len(found)  # ids are not shared
    by_kind = {entry["kind"]: entry for entry in reversed(entries)}
    wrong = by_kind["class"]
    assert wrong["annotation_id"] == ids[5][2] and (wrong["id"] == ids[5][2] or not unique)
    assert wrong["category_id"] == [7, 9][made[5].gt_labels[2] - 1] != wrong["proposal"]["category_id"]
    x, y, w, h = by_kind["box"]["bbox"]
    assert [x, y, x + w, y + h] == pytest.approx(made[7].gt_boxes[4].tolist(), abs=0.02)
    assert by_kind["missing"]["is_new"] and by_kind["missing"]["annotation_id"] is None
    assert by_kind["missing"]["id"] not in {number for own_ids in ids for number in own_ids} or not unique
    assert by_kind["spurious"]["proposal"] is None
    with (tmp_path / "suspects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["suspicion"]) for row in rows] == pytest.approx([one.score for one in found], abs=1e-4)
    assert {row["kind"] for row in rows} == {name for name, _ in KINDS.values()}
    labels = parse(tmp_path / "label_studio.xml").getroot()
    assert [label.get("value") for label in labels.iter("Label")] == NAMES
    control, shown = labels.find("RectangleLabels"), labels.find("Image")
    assert control is not None and shown is not None and control.get("toName") == shown.get("name")
    tasks = json.loads((tmp_path / "label_studio.json").read_text())
    assert len(tasks) == 3 and shown.get("value") == "$image"
    for one in tasks:
        better, now = one["predictions"]
        i = int(one["data"]["file_name"].split("/")[1].split(" ")[0])
        assert unquote(one["data"]["image"]) == f"/data/local-files/?d=folder/{i} a.png"
        assert corners_of(now) == pytest.approx(made[i].gt_boxes, abs=1e-6)
        for region in better["result"]:
            assert (region["from_name"], region["to_name"]) == (control.get("name"), control.get("toName"))
        truth = world()[i]
        wanted = sorted(zip(np.round(truth.gt_boxes[:, 0]), truth.gt_labels, strict=True))
        has = sorted(
            zip(np.round(corners_of(better)[:, 0]), [NAMES.index(n) + 1 for n in names_of(better)], strict=True)
        )
        assert np.array(has) == pytest.approx(np.array(wanted), abs=5)  # put right, within the detector's accuracy
    page = render(own, found, partly_annotated(made, 2), 3, {"images": "40"})
    assert page.count("<figure") == page.count("data:image/jpeg") == 3 and "dog &amp; fox" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def corners_of(prediction: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Label Studio's percent as pixels, by its documentation."""
    height, width = SIZE
    values = [region["value"] for region in prediction["result"]]
    places = [(v["x"] * width, v["y"] * height, v["width"] * width, v["height"] * height) for v in values]
    return np.array([(x / 100, y / 100, (x + w) / 100, (y + h) / 100) for x, y, w, h in places])


def names_of(prediction: dict[str, Any]) -> list[str]:
    return [region["value"]["rectanglelabels"][0] for region in prediction["result"]]


def test_a_task_has_its_score_and_what_is_said() -> None:
    made = task("a.png", (100, 200), ["x"], {"m": [Region(Labelled((50, 25, 100, 75), 1), 0.5, "why")]}, 0.25)
    (prediction,) = made["predictions"]
    (region,) = prediction["result"]
    assert prediction["score"] == 0.25 and region["score"] == 0.5 and region["meta"] == {"text": ["why"]}
    assert region["value"] == {"x": 25, "y": 25, "width": 25, "height": 50, "rotation": 0, "rectanglelabels": ["x"]}
    assert (region["original_width"], region["original_height"]) == (200, 100)


def test_names_are_safe_in_the_configuration(tmp_path: Path) -> None:
    names = ['a "quoted" <b>', "c & d"]
    write_configuration(tmp_path / "c.xml", names)
    assert [e.get("value") for e in parse(tmp_path / "c.xml").getroot().iter("Label")] == names


def one_detector(*objects: tuple[list[float], int, float]) -> Any:
    boxes, labels, scores = ([one[i] for one in objects] for i in range(3))
    return np.array(boxes, float).reshape(-1, 4), np.array(labels, np.int64), np.array(scores, float)


def test_doubt_is_of_scores_between_and_of_detectors_that_disagree() -> None:
    here, there = [10, 10, 50, 50], [100, 10, 150, 60]
    sure = merged([one_detector((here, 1, 1.0)), one_detector(([11, 10, 50, 50], 1, 1.0))])
    assert [one.score for one in sure] == [1.0]
    split = merged([one_detector((here, 1, 1.0), (there, 2, 0.2)), one_detector((here, 2, 1.0))])
    assert [(one.shape.label, one.score) for one in split] == [(1, 0.5), (2, 0.5), (2, 0.1)]
    signs = np.ones(4, np.float32)
    assert Unlabelled("a", (1, 1), sure, signs).doubt == 0
    assert Unlabelled("a", (1, 1), split, signs).doubt == pytest.approx(1 + 1 + 0.2)
    assert merged([one_detector(), one_detector()]) == []


def test_the_doubtful_come_first_and_copies_last(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    pixels = {name: rng.integers(0, 255, (60, 80, 3), np.uint8) for name in "abc"}
    pixels["copy"] = np.clip(pixels["a"].astype(int) + 3, 0, 255).astype(np.uint8)
    scores = {"a": 0.5, "b": 0.9, "c": 0.3, "copy": 0.45}
    made = [
        Unlabelled(name, (60, 80), [Region(Labelled((1, 1, 9, 9), 1), score)], gradients(pixels[name]))
        for name, score in scores.items()
    ]
    order = ranked(made)
    assert [(one.file_name, one.like) for one in order] == [("a", ""), ("c", ""), ("b", ""), ("copy", "a")]
    write_next(tmp_path, order, NAMES, tmp_path, lambda path: pixels[path.name])
    with (tmp_path / "next.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["a", "c", "b", "copy"]
    tasks = json.loads((tmp_path / "next_label_studio.json").read_text())
    assert [one["predictions"][0]["score"] for one in tasks] == pytest.approx([1.0, 0.6, 0.2, 0.9])
    assert (tmp_path / "next.html").read_text().count("<figure") == 4
