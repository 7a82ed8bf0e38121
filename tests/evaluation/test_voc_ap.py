"""VOC AP against published values, against a loop written after the development kit, and by hand."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from detection.batch import Target
from detection.evaluation.results import image_result
from detection.evaluation.voc_ap import voc_ap

ELEVEN = {0.1: 0.3333333333, 0.3: 0.2683982683, 0.5: 0.0303030303, 0.75: 0.0}
AREA = {0.1: 0.3371980676, 0.3: 0.2456866804, 0.5: 0.0222222222, 0.75: 0.0}
EXCLUSIVE = {(True, 0.1): 0.3024538867, (True, 0.3): 0.2683982684}
EXCLUSIVE |= {(False, 0.1): 0.2801328502, (False, 0.3): 0.2253968254}


def result(boxes, scores, gt_boxes, difficult=None, labels=None, gt_labels=None, image_id=1, crowd=None):
    count = len(gt_boxes)
    gt = torch.tensor(gt_boxes, dtype=torch.float32).reshape(-1, 4)
    target = Target(
        image_id=image_id,
        file_name=f"{image_id}.jpg",
        size=(200, 200),
        boxes=gt,
        labels=torch.tensor(gt_labels or [1] * count, dtype=torch.int64),
        areas=(gt[:, 2] - gt[:, 0]) * (gt[:, 3] - gt[:, 1]),
        iscrowd=torch.tensor(crowd or [False] * count, dtype=torch.bool),
        difficult=torch.tensor(difficult or [False] * count, dtype=torch.bool),
    )
    detection = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels or [1] * len(boxes), dtype=torch.int64),
    }
    return image_result(detection, target, 9)


@pytest.fixture
def voc_case(shared_data):
    folder = shared_data / "eval_refs" / "voc_case1"
    results = []
    for number, path in enumerate(sorted((folder / "gts").glob("*.txt"))):
        rows = [[line.split()[1:] for line in p.read_text().splitlines()] for p in (path, folder / "dets" / path.name)]
        gt, dt = (np.array(r, dtype=np.float64) for r in rows)
        gt[:, 2:] += gt[:, :2]
        dt[:, 3:] += dt[:, 1:3]
        results.append(result(dt[:, 1:].tolist(), dt[:, 0].tolist(), gt.tolist(), image_id=number))
    assert sum(len(r.gt_boxes) for r in results) == 15
    assert sum(len(r.boxes) for r in results) == 24
    return results


@pytest.mark.parametrize(("eleven", "published"), [(True, ELEVEN), (False, AREA)])
def test_published_values(voc_case, eleven, published):
    figures = {t: voc_ap(voc_case, ["object"], t, eleven, inclusive=True)["object"] for t in published}
    assert figures == pytest.approx(published, abs=1e-10)  # published rounded or cut at ten digits


def test_published_values_without_the_extra_pixel(voc_case):
    figures = {(e, t): voc_ap(voc_case, ["object"], t, e)["object"] for e, t in EXCLUSIVE}
    assert figures == pytest.approx(EXCLUSIVE, abs=1e-10)


def test_boxes_moved_as_the_reader_moves_them_give_the_inclusive_value(voc_case):
    moved = []
    for image in voc_case:
        shift = np.array([1, 1, 0, 0], np.float32)
        moved.append(dataclasses.replace(image, boxes=image.boxes - shift, gt_boxes=image.gt_boxes - shift))
    for threshold in ELEVEN:
        expected = voc_ap(voc_case, ["object"], threshold, inclusive=True)
        assert voc_ap(moved, ["object"], threshold) == expected


def test_difficult_objects_neither_help_nor_hurt():
    box, other = [10, 10, 50, 50], [100, 100, 150, 150]
    hit = result([box, other, other], [0.9, 0.8, 0.7], [box, other], difficult=[False, True])
    assert voc_ap([hit], ["a"]) == {"a": 1.0}
    missed = result([box], [0.9], [box, other], difficult=[False, True])
    assert voc_ap([missed], ["a"]) == {"a": 1.0}
    assert voc_ap([result([box], [0.9], [other], difficult=[True])], ["a"]) == {}


def test_a_duplicate_is_wrong_and_does_not_fall_back_to_the_next_object():
    # Both detections overlap the first object most; COCO would give the second detection to the second object.
    first, second = [0, 0, 100, 100], [0, 0, 100, 60]
    image = result([first, [0, 0, 100, 90]], [0.9, 0.8], [first, second])
    assert voc_ap([image], ["a"])["a"] == 0.5


def test_a_class_without_detections_has_ap_0_and_one_without_objects_none():
    box = [0, 0, 10, 10]
    assert voc_ap([result([box], [0.9], [box], labels=[2])], ["a", "b"]) == {"a": 0.0}
    assert voc_ap([result([], [], [box])], ["a"]) == {"a": 0.0}
    assert voc_ap([result([box], [0.5], [])], ["a"]) == {}


def reference(results, threshold, label, eleven):
    """The development kit's VOCevaldet, one detection after the other."""
    rows = [(i, d) for i, r in enumerate(results) for d in np.flatnonzero(r.labels == label)]
    rows.sort(key=lambda row: -results[row[0]].scores[row[1]])
    taken, marks = set(), []
    for i, d in rows:
        r, best, owner = results[i], -np.inf, None
        for g in np.flatnonzero(r.gt_labels == label):
            a, b = r.boxes[d].astype(float), r.gt_boxes[g].astype(float)
            w, h = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + 1 for k in (0, 1))
            if w > 0 and h > 0:
                area = sum((x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b))
                if w * h / (area - w * h) > best:
                    best, owner = w * h / (area - w * h), g
        if best >= threshold:
            if not r.gt_difficult[owner]:
                marks.append((i, owner) not in taken)
                taken.add((i, owner))
        else:
            marks.append(False)
    count = sum(int((~r.gt_difficult[r.gt_labels == label]).sum()) for r in results)
    tp = np.cumsum(marks)
    recall, precision = tp / count, tp / np.arange(1, len(tp) + 1)
    if eleven:
        at = [max(precision[recall >= t], default=0.0) for t in np.linspace(0, 1, 11)]
        return sum(at) / 11
    points = sorted({0.0, *recall.tolist()})
    return sum((b - a) * max(precision[recall >= b]) for a, b in pairwise(points))


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_development_kit(seed):
    rng = np.random.default_rng(seed)
    results = []
    for image in range(12):
        gt = rng.integers(0, 40, (rng.integers(0, 7), 4))
        gt[:, 2:] += gt[:, :2] + 1
        dt = gt[rng.integers(0, len(gt), 10)] + rng.integers(-6, 7, (10, 4)) if len(gt) else np.ones((3, 4), int)
        dt[:, 2:] = np.maximum(dt[:, 2:], dt[:, :2] + 1)
        results.append(
            result(
                dt.tolist(),
                (rng.integers(0, 50, len(dt)) / 50).tolist(),
                gt.tolist(),
                (rng.random(len(gt)) < 0.2).tolist(),
                rng.integers(1, 3, len(dt)).tolist(),
                rng.integers(1, 3, len(gt)).tolist(),
                image_id=image,
            )
        )
    for eleven in (False, True):
        figures = voc_ap(results, ["a", "b"], 0.4, eleven, inclusive=True)
        for label, name in ((1, "a"), (2, "b")):
            assert figures[name] == pytest.approx(reference(results, 0.4, label, eleven), abs=1e-12)
            assert 0 < figures[name] < 1
