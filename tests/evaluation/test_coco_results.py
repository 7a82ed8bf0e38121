"""The exported JSON, scored by the official evaluator against the official annotations, gives the logged figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import distributed as dist

from detection.data.coco import read_coco
from detection.data.dataset import make_target
from detection.evaluation.coco_results import coco_results, write_coco_results
from detection.evaluation.mean_ap import MeanAP

SETS = {
    "tiny_coco": ("annotations/instances_val2017.json", "val2017"),
    "voc2012_sample100": ("gts/coco_format_v1/instances_default.json", "images"),
}


def perturbed(target, num_classes, rng, masks=False):
    """Detections that a mediocre detector might give: moved, repeated, confused, missed and invented boxes."""
    boxes, labels = target.boxes.numpy(), target.labels.numpy()
    picked = rng.integers(0, max(len(boxes), 1), 2 * len(boxes))
    sides = np.tile(boxes[picked, 2:] - boxes[picked, :2], 2)
    moved = boxes[picked] + rng.normal(0, 0.12, sides.shape) * sides
    invented = rng.uniform(0, 150, (4, 4))
    invented[:, 2:] += invented[:, :2] + 1
    found = np.concatenate([moved, invented]).astype(np.float32)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
    names = np.concatenate([labels[picked], rng.integers(1, num_classes + 1, 4)])
    names = np.where(rng.random(len(names)) < 0.1, rng.integers(1, num_classes + 1, len(names)), names)
    scores = (rng.integers(0, 200, len(names)) / 200).astype(np.float32)
    detection = {
        "boxes": torch.from_numpy(found),
        "labels": torch.from_numpy(names),
        "scores": torch.from_numpy(scores),
    }
    if masks:
        grid = np.mgrid[: target.size[0], : target.size[1]]
        inside = [(grid[1] >= b[0]) & (grid[1] < b[2]) & (grid[0] >= b[1]) & (grid[0] < b[3]) for b in found]
        detection["masks"] = torch.from_numpy(np.stack(inside))
    return detection


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("name", SETS)
def test_logged_figures_are_the_official_ones(shared_data, pycoco, tmp_path, name, batch_size):
    annotations, images = SETS[name]
    index = read_coco(shared_data / name, annotations, images)
    targets = [make_target(record) for record in index.records]
    rng = np.random.default_rng(0)
    detections = [perturbed(target, len(index.classes), rng) for target in targets]
    metric = MeanAP(index.classes)
    for start in range(0, len(targets), batch_size):
        metric.update(detections[start : start + batch_size], targets[start : start + batch_size])
    logged = metric.compute()
    path = tmp_path / "results.json"
    count = write_coco_results(path, metric.results, index.category_ids)
    assert count == sum(len(detection["scores"]) for detection in detections)
    figures = pycoco(str(shared_data / name / annotations), str(path))["figures"]
    assert 0.1 < figures["map"] < 0.9
    assert logged == pytest.approx(figures, abs=1e-6)


def score_a_shard(rank, folder, root):
    """One of two processes; the second sees the first image once more, as a sampler pads."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    figures = {}
    for name, (file, images) in SETS.items():
        index = read_coco(root / name, file, images)
        targets = [make_target(record) for record in index.records]
        rng = np.random.default_rng(0)
        detections = [perturbed(target, len(index.classes), rng) for target in targets]
        metric = MeanAP(index.classes)
        for i in [*range(rank, len(targets), 2), *([0] if rank else [])]:
            metric.update([detections[i]], [targets[i]])
        figures[name] = metric.compute()
        if rank == 0:
            write_coco_results(folder / f"{name}.json", metric.results, index.category_ids)
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


@pytest.mark.slow
def test_figures_of_two_processes_are_the_official_ones(shared_data, pycoco, tmp_path):
    torch.multiprocessing.spawn(score_a_shard, (tmp_path, shared_data), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for name, (file, _) in SETS.items():
        official = pycoco(str(shared_data / name / file), str(tmp_path / f"{name}.json"))["figures"]
        assert 0.1 < official["map"] < 0.9
        assert first[name] == pytest.approx(official, abs=1e-6)


def test_logged_mask_figures_are_the_official_ones(shared_data, pycoco, tmp_path):
    annotations, images = SETS["tiny_coco"]
    index = read_coco(shared_data / "tiny_coco", annotations, images, masks=True)
    targets = [make_target(record) for record in index.records]
    rng = np.random.default_rng(1)
    metric = MeanAP(index.classes, iou_type=("bbox", "segm"))
    metric.update([perturbed(target, len(index.classes), rng, masks=True) for target in targets], targets)
    logged = metric.compute()
    for iou_type in ("bbox", "segm"):
        path = tmp_path / f"{iou_type}.json"
        write_coco_results(path, metric.results, index.category_ids, iou_type)
        figures = pycoco(str(shared_data / "tiny_coco" / annotations), str(path), iou_type)["figures"]
        assert 0.05 < figures["map"] < 0.9
        mine = {key.removeprefix(f"{iou_type}_"): v for key, v in logged.items() if key.startswith(iou_type)}
        assert mine == pytest.approx(figures, abs=1e-6)


def test_category_ids_with_gaps_come_back(coco_inputs):
    gt = {
        "images": [{"id": 7, "width": 50, "height": 50}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 12}],
        "categories": [{"id": 0, "name": "a"}, {"id": 90, "name": "b"}],
    }
    dt = [{"image_id": 7, "category_id": 90, "bbox": [1.5, 2.25, 3.0, 4.125], "score": 0.5}]
    names, targets, detections = coco_inputs(gt, dt)
    metric = MeanAP(names)
    metric.update(detections, targets)
    assert coco_results(metric.results, [0, 90]) == dt
    assert json.loads(json.dumps(coco_results(metric.results, [0, 90]))) == dt
    with pytest.raises(ValueError, match=r"image 7 \(7\) has no masks"):
        coco_results(metric.results, [0, 90], "segm")
