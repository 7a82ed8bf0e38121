"""The breakdown of mistakes against the figures of TIDE's own code (tidecv 1.0.1), and by hand."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch

from detection.batch import Target
from detection.evaluation import analysis
from detection.evaluation.analysis import (
    BACKGROUND,
    BOTH,
    CLASS,
    DUPLICATE,
    IGNORED,
    LOCATION,
    RIGHT,
    analyse,
    confusion_matrix,
    error_breakdown,
    operating_points,
    worst_images,
)
from detection.evaluation.results import image_result

# tidecv on `noisy` below: errors of each type, and dAP in percent.
TIDE_COUNTS = {"classification": 433, "localisation": 495, "both": 261, "duplicate": 436, "background": 150}
TIDE_COUNTS |= {"missed": 102}
TIDE_DELTAS = {
    "classification": 16.14394882140348,
    "localisation": 9.143783100312287,
    "both": 3.872862073869836,
    "duplicate": 1.4807430888314421,
    "background": 2.459306066620119,
    "missed": 3.5019889788945484,
    "all false positives": 38.06391060624183,
    "all false negatives": 12.06804046999937,
}


def noisy(folder):
    """The published fake detections, each moved and confused three times; no crowds; 100 a picture at most."""
    gt = json.loads((folder / "instances_val2014_100.json").read_text())
    dt = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    gt["annotations"] = [entry for entry in gt["annotations"] if not entry["iscrowd"]]
    rng = np.random.default_rng(3)
    present = sorted({entry["category_id"] for entry in gt["annotations"]})
    found = defaultdict(list)

    def add(image, category, box):
        box = [round(float(value), 2) for value in box]
        score = round(float(rng.random()), 6)
        if category in present:
            found[image].append({"image_id": image, "category_id": category, "bbox": box, "score": score})

    for entry in dt:
        for _ in range(3):
            box = np.array(entry["bbox"])
            box = box + rng.normal(0, 0.15, 4) * np.tile(box[2:], 2)
            box[2:] = np.maximum(box[2:], 1)
            category = entry["category_id"] if rng.random() < 0.8 else int(rng.choice(present))
            add(entry["image_id"], category, box)
        if rng.random() < 0.3:
            category = int(rng.choice(present))
            add(entry["image_id"], category, rng.uniform(1, 200, 4))
    return gt, [e for image in found.values() for e in sorted(image, key=lambda e: -e["score"])[:100]]


def results_of(coco_inputs, gt, dt):
    names, targets, detections = coco_inputs(gt, dt)
    results = [image_result(d, t, len(names)) for d, t in zip(detections, targets, strict=True)]
    return sorted(results, key=lambda result: result.image_id), len(names)


def test_breakdown_is_that_of_tide(shared_data, coco_inputs, monkeypatch):
    # tidecv asks for recalls k / 100; COCO's linspace differs from those in the last bit of some.
    monkeypatch.setattr(analysis, "RECALL_THRESHOLDS", np.array([k / 100 for k in range(101)]))
    judged = analyse(*results_of(coco_inputs, *noisy(shared_data / "eval_refs" / "coco_fake")))
    rows = {row.name: row for row in error_breakdown(judged)}
    assert {name: rows[name].count for name in TIDE_COUNTS} == TIDE_COUNTS
    assert {name: 100 * row.delta_ap for name, row in rows.items()} == pytest.approx(TIDE_DELTAS, abs=1e-6)
    everything = analysis.mean_ap(
        judged, judged.dt.label, judged.kind == RIGHT, judged.kind != IGNORED, np.bincount(judged.gt.label)[1:]
    )
    assert 100 * everything == pytest.approx(31.045000284847273, abs=1e-9)


A, B = 1, 2
BOX, NEAR, FAR = [0, 0, 100, 100], [0, 0, 100, 40], [300, 300, 400, 400]


def one_image(found, objects, crowd=None, image_id=1):
    """Lists of (box, label, score) and (box, label)."""
    gt = torch.tensor([box for box, _ in objects], dtype=torch.float32).reshape(-1, 4)
    target = Target(
        image_id=image_id,
        file_name=f"{image_id}.jpg",
        size=(500, 500),
        boxes=gt,
        labels=torch.tensor([label for _, label in objects], dtype=torch.int64),
        areas=(gt[:, 2:] - gt[:, :2]).prod(1),
        iscrowd=torch.tensor(crowd or [False] * len(objects), dtype=torch.bool),
        difficult=torch.zeros(len(objects), dtype=torch.bool),
    )
    detection = {
        "boxes": torch.tensor([box for box, _, _ in found], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([label for _, label, _ in found], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in found], dtype=torch.float32),
    }
    return image_result(detection, target, 2)


@pytest.mark.parametrize(
    ("box", "label", "kind"),
    [(BOX, A, RIGHT), (BOX, B, CLASS), (NEAR, A, LOCATION), (NEAR, B, BOTH), (FAR, A, BACKGROUND)],
)
def test_kinds_of_mistake(box, label, kind):
    judged = analyse([one_image([(box, label, 0.9)], [(BOX, A)])], 2)
    assert judged.kind.tolist() == [kind]
    assert judged.missed.tolist() == [kind in (BOTH, BACKGROUND)]
    assert judged.mended.tolist() == [kind in (CLASS, LOCATION)]


def test_duplicates_and_crowds():
    image = one_image([(BOX, A, 0.5), (BOX, A, 0.9), (FAR, B, 0.3)], [(BOX, A), (FAR, B)], crowd=[False, True])
    judged = analyse([image], 2)
    assert judged.dt.scores.tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert judged.kind.tolist() == [RIGHT, DUPLICATE, IGNORED]
    assert not judged.missed.any()


def test_a_mended_mistake_takes_the_object_once():
    image = one_image([(BOX, B, 0.9), (BOX, B, 0.8), (NEAR, A, 0.7)], [(BOX, A), (FAR, B)])
    judged = analyse([image], 2)
    assert judged.mended.sum() == 1
    rows = {row.name: row for row in error_breakdown(judged)}
    # The best-scored becomes right for A (AP 1), the other goes; B keeps AP 0, so mean AP is a half.
    assert rows["classification"].delta_ap == pytest.approx(0.5)
    assert rows["localisation"].delta_ap == pytest.approx(0.0)
    assert rows["missed"].count == 1


def test_breakdown_of_nothing():
    for results in ([], [one_image([], [])]):
        assert all(row.count == 0 and row.delta_ap == 0 for row in error_breakdown(analyse(results, 2)))
        assert confusion_matrix(analyse(results, 2)).sum() == 0
        assert worst_images(analyse(results, 2), 5) == []
        assert operating_points(analyse(results, 2)) == {}


def test_confusion_matrix_counts_every_object_and_confident_detection_once():
    found = [(BOX, A, 0.9), (BOX, B, 0.8), (FAR, B, 0.7), (NEAR, A, 0.4)]
    other = one_image([(BOX, B, 0.6)], [(BOX, A), (FAR, A)], crowd=[False, True], image_id=2)
    matrix = confusion_matrix(analyse([one_image(found, [(BOX, A), ([0, 200, 50, 250], B)]), other], 2))
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 1], [0, 2, 0]]


def test_operating_point_is_where_f1_is_best():
    found = [(BOX, A, 0.9), (FAR, A, 0.5), ([0, 0, 5, 5], A, 0.3)]
    point = operating_points(analyse([one_image(found, [(BOX, A), (FAR, A)])], 2))[A]
    assert (point.score, point.precision, point.recall) == pytest.approx((0.5, 1.0, 1.0))


def test_worst_images_come_first():
    good = one_image([(BOX, A, 0.9)], [(BOX, A)], image_id=1)
    bad = one_image([(FAR, A, 0.9)], [(BOX, A)], image_id=2)
    worse = one_image([(FAR, A, 0.9)], [(BOX, A), (NEAR, B)], image_id=3)
    assert worst_images(analyse([good, bad, worse], 2), 5) == [(2, pytest.approx(2.9)), (1, pytest.approx(1.9))]
