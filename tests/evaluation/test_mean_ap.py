"""`MeanAP` against the figures published with the official evaluator, and against that evaluator."""

from __future__ import annotations

import copy
import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch
from torch import distributed as dist

from detection.batch import Target
from detection.data.coco import read_coco
from detection.data.dataset import make_target
from detection.evaluation import mean_ap
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.results import encode_masks
from tests.evaluation.references import mean_ap as mean_ap_of

KEYS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
KEYS += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
BACKENDS = ("arrays", "faster_coco_eval", "pycocotools")
FAKE_BOXES = "0.505 0.697 0.573 0.586 0.519 0.501 0.387 0.594 0.595 0.640 0.566 0.564"
FAKE_MASKS = "0.320 0.562 0.299 0.387 0.310 0.327 0.268 0.415 0.417 0.469 0.377 0.381"
BOXES = "0.503647 0.696973 0.571667 0.593252 0.557991 0.489363 0.386813 0.593680 0.595353 0.654764 0.603130 0.553744"
PUBLISHED = {
    "fake boxes": (
        "coco_fake/instances_val2014_100.json",
        "coco_fake/instances_val2014_fakebbox100_results.json",
        "bbox",
        FAKE_BOXES,
    ),
    "fake masks": (
        "coco_fake/instances_val2014_100.json",
        "coco_fake/instances_val2014_fakesegm100_results.json",
        "segm",
        FAKE_MASKS,
    ),
    "boxes": ("coco_boxes/sampled_gts_bbox_area.json", "coco_boxes/cocoapi_results.json", "bbox", BOXES),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PUBLISHED)
def test_published_figures(shared_data, read_coco_files, case, backend):
    gt, dt, iou_type, published = PUBLISHED[case]
    folder = shared_data / "eval_refs"
    names, targets, detections = read_coco_files(folder / gt, folder / dt)
    metric = mean_ap_of(names, iou_type=iou_type, backend=backend)
    for start in range(0, len(targets), 7):
        metric.update(detections[start : start + 7], targets[start : start + 7])
    figures = metric.compute()
    digits = len(published.split()[0]) - 2
    assert [f"{figures[key]:.{digits}f}" for key in KEYS] == published.split()


def target(image_id, boxes, labels, crowd=None, areas=None, masks=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    return Target(
        image_id=image_id,
        file_name=f"{image_id}.jpg",
        size=(200, 200),
        boxes=boxes,
        labels=torch.tensor(labels, dtype=torch.int64),
        areas=sides.prod(1) if areas is None else torch.tensor(areas),
        iscrowd=torch.tensor(crowd or [False] * len(boxes), dtype=torch.bool),
        difficult=torch.zeros(len(boxes), dtype=torch.bool),
        masks=masks,
    )


def detection(boxes, labels, scores):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


BOX, FAR = [10.0, 10.0, 50.0, 60.0], [100.0, 100.0, 150.0, 160.0]


def random_images(count, seed=0, classes=3, per_image=8):
    rng = np.random.default_rng(seed)
    targets, detections = [], []
    for image_id in rng.permutation(1000)[:count].tolist():
        gt = rng.integers(0, 60, (rng.integers(0, 6), 4))
        gt[:, 2:] += gt[:, :2] + 8
        dt = gt[rng.integers(0, len(gt), per_image)] + rng.integers(-4, 5, (per_image, 4)) if len(gt) else gt
        dt[:, 2:] = np.maximum(dt[:, 2:], dt[:, :2])
        labels = rng.integers(1, classes + 1, len(gt)).tolist()
        targets.append(target(image_id, gt.tolist(), labels, crowd=(rng.random(len(gt)) < 0.1).tolist()))
        found = rng.integers(1, classes + 1, len(dt)).tolist()
        detections.append(detection(dt.tolist(), found, (rng.integers(0, 20, len(dt)) / 20).tolist()))
    return detections, targets


@pytest.mark.parametrize("fixture", ["gt dt", "edge_gt edge_dt"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_edge_fixtures(shared_data, read_coco_files, pycoco, fixture, backend):
    gt, dt = (shared_data / "eval_refs" / "hotcoco_fixtures" / f"{name}.json" for name in fixture.split())
    names, targets, detections = read_coco_files(gt, dt)
    metric = mean_ap_of(names, backend=backend)
    metric.update(detections, targets)
    assert metric.compute() == pytest.approx(pycoco(str(gt), str(dt))["figures"], abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_from_zero_count(shared_data, read_coco_files, backend):
    # pycocotools takes object 0 for "no match" and would say less than 1.
    folder = shared_data / "eval_refs" / "hotcoco_fixtures"
    names, targets, detections = read_coco_files(folder / "zero_gt.json", folder / "zero_dt.json")
    metric = mean_ap_of(names, backend=backend)
    metric.update(detections, targets)
    assert metric.compute()["map"] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("limit", [1, 5, 100, 300])
def test_backends_agree_at_every_limit(limit):
    detections, targets = random_images(15, per_image=120)
    figures = []
    for backend in BACKENDS:
        metric = mean_ap_of(["a", "b", "c"], detections_per_img=limit, backend=backend)
        metric.update(detections, targets)
        figures.append(metric.compute())
        assert metric.per_class() == pytest.approx(dict(zip("abc", metric.per_class().values(), strict=True)))
    assert 0 < figures[0]["map"] < 1
    assert f"mar_{limit}" in figures[0]
    assert figures[0] == pytest.approx(figures[1], abs=1e-9)
    assert figures[0] == pytest.approx(figures[2], abs=1e-12)


def test_per_class_is_the_official_evaluator_on_one_class_alone(shared_data, read_coco_files):
    gt, dt, _, _ = PUBLISHED["fake boxes"]
    names, targets, detections = read_coco_files(shared_data / "eval_refs" / gt, shared_data / "eval_refs" / dt)
    metric = MeanAP(names)
    metric.update(detections, targets)
    figures = metric.compute()
    per_class = metric.per_class()
    assert figures["map"] == pytest.approx(np.mean(list(per_class.values())), abs=1e-12)
    label = names.index("3") + 1
    alone = mean_ap_of(["3"], backend="pycocotools")
    for found, truth in zip(detections, targets, strict=True):
        kept, ours = found["labels"] == label, truth.labels == label
        one = {"labels": torch.ones_like(truth.labels[ours])}
        one |= {name: getattr(truth, name)[ours] for name in ("boxes", "areas", "iscrowd", "difficult")}
        mine = {"labels": torch.ones_like(found["labels"][kept])} | {n: found[n][kept] for n in ("boxes", "scores")}
        alone.update([mine], [dataclasses.replace(truth, **one, masks=None)])
    assert alone.compute()["map"] == pytest.approx(per_class["3"], abs=1e-12)


def test_classes_without_ground_truth_are_left_out_and_their_detections_counted():
    metric = MeanAP(["a", "b", "c"])
    metric.update([detection([BOX, FAR, FAR], [1, 2, 2], [0.9, 0.8, 0.7])], [target(1, [BOX], [1])])
    assert metric.compute()["map"] == pytest.approx(1.0)
    assert metric.per_class() == pytest.approx({"a": 1.0})
    assert metric.absent_detections() == {"b": 2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sides(backend):
    nothing, no_objects = detection([], [], []), target(1, [], [])
    for images, expected in {
        "nothing at all": ([], -1.0),
        "no ground truth": ([(detection([BOX], [1], [0.5]), no_objects)], -1.0),
        "both empty": ([(nothing, no_objects)], -1.0),
        "no detections": ([(nothing, target(1, [BOX], [1]))], 0.0),
        "empty first": ([(nothing, no_objects), (detection([BOX], [1], [0.5]), target(2, [BOX], [1]))], 1.0),
        "empty last": ([(detection([BOX], [1], [0.5]), target(2, [BOX], [1])), (nothing, target(3, [], []))], 1.0),
    }.values():
        metric = mean_ap_of(["a", "b"], backend=backend)
        for found, truth in images:
            metric.update([found], [truth])
        metric.update([], [])
        assert metric.compute()["map"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (detection([BOX, FAR], [1, 1], [0.5, float("nan")]), r"image 42 \(42.jpg\), object 1: score is not finite"),
        (detection([BOX], [1], [float("inf")]), r"image 42 \(42.jpg\), object 0: score is not finite"),
        (detection([[0, float("nan"), 5, 5]], [1], [0.5]), r"image 42 \(42.jpg\), object 0: box is not finite"),
        (detection([[9, 0, 5, 5]], [1], [0.5]), "box ends before it starts"),
        (detection([BOX], [0], [0.5]), r"detected label is outside \[1, 2\]"),
        (detection([BOX], [3], [0.5]), r"detected label is outside \[1, 2\]"),
        (detection([BOX, BOX], [1], [0.5]), "2 boxes, 1 scores and 1 labels"),
    ],
)
def test_bad_detections_are_refused_by_image(found, message):
    metric = MeanAP(["a", "b"])
    with pytest.raises(ValueError, match=message):
        metric.update([found], [target(42, [BOX], [1])])


def test_bad_ground_truth_and_calls_are_refused():
    metric = MeanAP(["a"])
    with pytest.raises(ValueError, match=r"image 3 \(3.jpg\), object 0: annotated label is outside \[1, 1\] \(got 2"):
        metric.update([detection([], [], [])], [target(3, [BOX], [2])])
    with pytest.raises(ValueError, match="1 detections for 0 targets"):
        metric.update([detection([], [], [])], [])
    with pytest.raises(ValueError, match="at least 1"):
        MeanAP(["a"], detections_per_img=0)
    with pytest.raises(ValueError, match=r"image 3 \(3.jpg\): mask evaluation needs masks"):
        MeanAP(["a"], iou_type="segm").update([detection([], [], [])], [target(3, [], [])])


def test_masks_that_are_no_masks_of_the_image_are_refused():
    """Between masks of two sizes evaluators find no overlap: AP would be 0 without a word."""
    metric, truth = MeanAP(["a"], iou_type="segm"), target(3, [BOX], [1])
    height, width = truth.size
    whole = encode_masks(torch.ones(1, height, width))
    truth = dataclasses.replace(truth, masks=whole)
    found = detection([BOX], [1], [0.5])
    with pytest.raises(ValueError, match=r"image 3 \(3.jpg\), detected: mask 0 has 28 rows of 28 pixels, but its"):
        metric.update([found | {"masks": torch.ones(1, 28, 28)}], [truth])
    with pytest.raises(ValueError, match=r"image 3 \(3.jpg\), detected: 2 masks for 1 objects"):
        metric.update([found | {"masks": whole * 2}], [truth])
    with pytest.raises(ValueError, match=r"image 3 \(3.jpg\), annotated: 0 masks for 1 objects"):
        metric.update([found | {"masks": whole}], [dataclasses.replace(truth, masks=[])])
    metric.update([found | {"masks": whole}], [truth])
    assert metric.compute()["map"] == pytest.approx(1)


def test_an_image_seen_twice_counts_once_and_two_images_with_one_id_are_an_error():
    metric = MeanAP(["a"])
    for _ in range(2):
        metric.update([detection([BOX], [1], [0.9])], [target(1, [BOX, FAR], [1, 1])])
    assert len(metric.results) == 1
    assert metric.compute()["mar_100"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"image id 1 is both 1\.jpg and other\.jpg"):
        metric.update([detection([], [], [])], [dataclasses.replace(target(1, [], []), file_name="other.jpg")])


def test_order_of_arrival_and_batches_do_not_matter():
    detections, targets = random_images(30)
    figures = []
    for order in (np.arange(30), np.random.default_rng(1).permutation(30)):
        metric = MeanAP(["a", "b", "c"])
        for chunk in np.array_split(order, 7):
            metric.update([detections[i] for i in chunk], [targets[i] for i in chunk])
        figures.append((metric.compute(), metric.per_class()))
    assert figures[0] == figures[1]


def test_state_is_ours_stays_on_the_cpu_and_resets():
    found, truth = detection([BOX], [1], [0.9]), target(1, [BOX], [1])
    metric = MeanAP(["a"])
    metric.update([found], [truth])
    found["boxes"].zero_()
    metric.to("meta")
    assert metric.compute()["map"] == pytest.approx(1.0)
    metric.reset()
    assert metric.results == []
    assert metric.per_class() == {}
    metric.update([], [])
    assert metric.compute()["map"] == -1.0


def test_an_aggregate_of_minus_one_with_ground_truth_is_an_error(monkeypatch):
    metric = MeanAP(["a"])
    metric.update([detection([BOX], [1], [0.9])], [target(1, [BOX], [1])])
    monkeypatch.setattr(mean_ap, "summarize", lambda *arrays: {"map": -1.0})
    with pytest.raises(RuntimeError, match="map is -1 although there is ground truth"):
        metric.compute()


def with_corners(detections, targets):
    """The same with two key points each, the corners of their boxes; some of the annotated ones are not seen."""
    found = [d | {"keypoints": torch.cat([d["boxes"].view(-1, 2, 2), torch.ones(len(d["boxes"]), 2, 1)], 2)}
             for d in detections]  # fmt: skip
    seen = [(t.areas[:, None] + torch.arange(2)).long() % 3 for t in targets]
    points = [torch.cat([t.boxes.view(-1, 2, 2), v[..., None]], 2) for t, v in zip(targets, seen, strict=True)]
    return found, [dataclasses.replace(t, keypoints=p) for t, p in zip(targets, points, strict=True)]


def corner_figures(images, detections, targets):
    metric = MeanAP(["a", "b", "c"], iou_type=("bbox", "keypoints"))
    found, truth = with_corners(detections, targets)
    for i in images:
        metric.update([found[i]], [truth[i]])
    return [metric.compute(), metric.per_class("keypoints")]


def distributed_worker(rank, folder):
    """Two ranks: uneven shards with a padded image, an empty shard, nothing anywhere, and an error on rank 0."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    detections, targets = random_images(21)
    answers = []
    for shards in ([range(0, 21, 2), [*range(1, 21, 2), 0]], [range(21), []], [[], range(21)], [[], []]):
        metric = MeanAP(["a", "b", "c"])
        for i in shards[rank]:
            metric.update([detections[i]], [targets[i]])
        answers.append([metric.compute(), metric.per_class(), metric.absent_detections()])
    answers.append(corner_figures([*range(rank, 21, 2), 0], detections, targets))
    metric = MeanAP(["a", "b", "c"])
    clash = dataclasses.replace(targets[0], file_name=f"rank{rank}.jpg")
    metric.update([detections[0]], [clash])
    try:
        metric.compute()
    except RuntimeError as error:
        answers.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_bit_for_bit(tmp_path):
    torch.multiprocessing.spawn(distributed_worker, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    metric = MeanAP(["a", "b", "c"])
    metric.update(*random_images(21))
    alone = json.loads(json.dumps([metric.compute(), metric.per_class(), metric.absent_detections()]))
    assert 0 < alone[0]["map"] < 1
    assert first[:3] == [alone] * 3
    assert first[3][0]["map"] == -1.0
    corners = json.loads(json.dumps(corner_figures(range(21), *random_images(21))))
    assert first[4] == corners and 0 < corners[0]["keypoints_map"] < 1
    assert "is both rank0.jpg and rank1.jpg" in first[5]


def test_ignored_objects_are_what_crowds_are_to_pycocotools(pycoco, tmp_path):
    """`ignore` of a file that is ours to read is `iscrowd` of one that is theirs: they overwrite the former."""
    rng = np.random.default_rng(3)
    images = [{"id": i + 1, "file_name": f"{i}.png", "width": 200, "height": 200} for i in range(12)]
    objects, found = [], []
    for image in images:
        cv2.imwrite(str(tmp_path / image["file_name"]), np.zeros((200, 200, 3), np.uint8))
        for _ in range(5):
            box = [*rng.integers(0, 100, 2).tolist(), *rng.integers(10, 100, 2).tolist()]
            entry = {"image_id": image["id"], "category_id": int(rng.integers(1, 3)), "bbox": box}
            objects.append(entry | {"id": len(objects) + 1, "area": box[2] * box[3], "iscrowd": 0})
            objects[-1]["ignore"] = int(rng.random() < 0.3)
            moved = np.maximum(np.add(box, rng.integers(-9, 10, 4)), 1).tolist()
            for score in (0.0, 0.5):  # of two on an object the second is a mistake, but not on a region
                found.append(entry | {"bbox": moved, "score": score + int(rng.integers(1, 50)) / 100})
    content = {"images": images, "annotations": objects, "categories": [{"id": k, "name": str(k)} for k in (1, 2)]}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    index = read_coco(tmp_path, "gt.json")
    assert not index.defects and 0.1 < np.mean(np.concatenate([r.iscrowd for r in index.records])) < 0.5
    metric = MeanAP(index.classes)
    for record in index.records:
        mine = [e for e in found if e["image_id"] == record.image_id]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (e["bbox"] for e in mine)]
        shown = detection(boxes, [e["category_id"] for e in mine], [e["score"] for e in mine])
        metric.update([shown], [make_target(record)])
    figures = metric.compute()
    as_they_read_it = pycoco(copy.deepcopy(content), copy.deepcopy(found))["figures"]
    for item in content["annotations"]:
        item["iscrowd"] = item["ignore"]
    assert figures == pytest.approx(pycoco(content, found)["figures"], abs=1e-12)
    assert abs(as_they_read_it["map"] - figures["map"]) > 0.01  # or it would not show
