"""How long the COCO figures take, and how much memory: ours against torchmetrics with either of its backends."""

from __future__ import annotations

import multiprocessing
import resource
import time
from typing import Any

import numpy as np
import torch
from torchmetrics.detection import MeanAveragePrecision

from detection.batch import Target
from detection.evaluation.coco_eval import IOU_THRESHOLDS, RECALL_THRESHOLDS
from detection.evaluation.mean_ap import MeanAP

PLAIN = "torchmetrics, "
MIB = 1 << 20


def benchmark_eval(
    images: int = 5000,
    detections: int = 100,
    classes: int = 80,
    evaluators: tuple[str, ...] = ("MeanAP", PLAIN + "faster_coco_eval", PLAIN + "pycocotools"),
) -> list[dict[str, Any]]:
    """Time update and compute on drawn detections of the size of COCO val, each evaluator in a process of its own.

    Args:
        images, detections, classes: images, detections an image, classes.
        evaluators: the last one is what the others are compared with.

    Returns:
        A row an evaluator: seconds of update and compute, peak memory in MiB above what the input takes, mAP, the
        largest difference of the twelve figures and the speed of compute, both against the last evaluator.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(_measure, (name, images, detections, classes)) for name in evaluators]
    reference = rows[-1]
    for row in rows:
        figures = row.pop("figures") if row is not reference else row["figures"]
        row["largest difference"] = max(abs(figures[key] - value) for key, value in reference["figures"].items())
        row["times as fast"] = reference["compute s"] / row["compute s"]
    del reference["figures"]
    return rows


def _measure(evaluator: str, images: int, detections: int, classes: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    targets, found = draw_detections(images, detections, classes)
    plain = evaluator.startswith(PLAIN)
    metric: Any = MeanAP([str(k) for k in range(classes)])
    if plain:
        backend: Any = evaluator.removeprefix(PLAIN)
        metric = MeanAveragePrecision(backend=backend, **thresholds())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for first in range(0, images, 8):
        batch = targets[first : first + 8]
        metric.update(found[first : first + 8], [_plain_target(t) for t in batch] if plain else batch)
    updated = time.perf_counter()
    answer = metric.compute()
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keys = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
    keys += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]
    return {
        "evaluator": evaluator,
        "update s": updated - start,
        "compute s": end - updated,
        "peak MiB": (peak - before) * 1024 / MIB,
        "map": float(answer["map"]),
        "figures": {key: float(answer[key]) for key in keys},
    }


def thresholds() -> dict[str, Any]:
    """The official thresholds: torchmetrics' default ones are float32 and give other figures."""
    return {"iou_thresholds": IOU_THRESHOLDS.tolist(), "rec_thresholds": RECALL_THRESHOLDS.tolist()}


def draw_detections(
    images: int, detections: int, classes: int, seed: int = 0
) -> tuple[list[Target], list[dict[str, torch.Tensor]]]:
    """Ground truth like COCO's in number and size, and detections that find some of it: a few right, most wrong."""
    rng = np.random.default_rng(seed)
    targets, found = [], []
    for image in range(images):
        count = int(rng.poisson(7.3))
        present = rng.integers(1, classes + 1, 6)
        gt, labels = _draw_boxes(rng, count), rng.choice(present, count)
        near = min(detections, 4 * count)
        source = rng.integers(0, max(count, 1), near)
        sides = np.tile(gt[source, 2:] - gt[source, :2], 2)
        boxes = np.concatenate(
            [gt[source] + rng.normal(0, 0.1, (near, 4)) * sides, _draw_boxes(rng, detections - near)]
        )
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        others = rng.choice(np.concatenate([present, rng.integers(1, classes + 1, 6)]), detections - near)
        targets.append(
            Target(
                image_id=image,
                file_name=str(image),
                size=(640, 640),
                boxes=torch.tensor(gt, dtype=torch.float32),
                labels=torch.from_numpy(labels),
                areas=torch.tensor((gt[:, 2:] - gt[:, :2]).prod(1), dtype=torch.float32),
                iscrowd=torch.from_numpy(rng.random(count) < 0.01),
                difficult=torch.zeros(count, dtype=torch.bool),
            )
        )
        scores = torch.tensor(rng.random(detections), dtype=torch.float32)
        names = torch.from_numpy(np.concatenate([labels[source], others]))
        found.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": names, "scores": scores})
    return targets, found


def _draw_boxes(rng: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corners = rng.uniform(0, 640, (count, 2))
    return np.concatenate([corners, corners + sides], axis=1)


def _plain_target(target: Target) -> dict[str, torch.Tensor]:
    crowd = target.iscrowd.to(torch.int64)
    return {"boxes": target.boxes, "labels": target.labels, "area": target.areas, "iscrowd": crowd}
