"""Reads COCO files with nothing of the project, and asks the official evaluator for its figures."""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.batch import Target

COCO_KEYS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
COCO_KEYS += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")


def official(
    gt: str | dict[str, Any], dt: str | list[Any], iou_type: str = "bbox", limits: Sequence[int] = (1, 10, 100)
) -> dict[str, Any]:
    """pycocotools on a ground-truth file and a results file (or their contents): 12 figures and the raw arrays."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(gt if isinstance(gt, str) else None)
        if not isinstance(gt, str):
            coco.dataset = gt
            coco.createIndex()
        detections = coco.loadRes(dt) if len(dt) else COCO()
        evaluator = COCOeval(coco, detections, iou_type)
        evaluator.params.maxDets = list(limits)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return {"figures": dict(zip(COCO_KEYS, evaluator.stats.tolist(), strict=True)), **evaluator.eval}


def from_coco(gt: dict[str, Any], dt: list[dict[str, Any]]) -> tuple[list[str], list[Target], list[dict[str, Any]]]:
    """Class names (ids as text), targets and detections of a COCO data set and a results list."""
    names = sorted(category["id"] for category in gt["categories"])
    label = {category: i + 1 for i, category in enumerate(names)}
    objects, found = defaultdict(list), defaultdict(list)
    for entry in gt["annotations"]:
        objects[entry["image_id"]].append(entry)
    for entry in dt:
        found[entry["image_id"]].append(entry)
    targets, detections = [], []
    for image in gt["images"]:
        size = (image.get("height", 1000), image.get("width", 1000))
        mine, theirs = objects[image["id"]], found[image["id"]]
        areas = [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in mine]
        targets.append(
            Target(
                image_id=image["id"],
                file_name=image.get("file_name", str(image["id"])),
                size=size,
                boxes=_boxes(mine),
                labels=torch.tensor([label[e["category_id"]] for e in mine], dtype=torch.int64),
                areas=torch.tensor(areas, dtype=torch.float32),
                iscrowd=torch.tensor([bool(e.get("iscrowd", 0)) for e in mine], dtype=torch.bool),
                difficult=torch.zeros(len(mine), dtype=torch.bool),
                masks=[_rle(e["segmentation"], size) for e in mine if e.get("segmentation")],
            )
        )
        detection = {
            "boxes": _boxes(theirs),
            "labels": torch.tensor([label[e["category_id"]] for e in theirs], dtype=torch.int64),
            "scores": torch.tensor([e["score"] for e in theirs], dtype=torch.float32),
        }
        if any("segmentation" in e for e in theirs) or not theirs:
            detection["masks"] = [_rle(e["segmentation"], size) for e in theirs]
        detections.append(detection)
    return [str(name) for name in names], targets, detections


def _boxes(entries: list[dict[str, Any]]) -> torch.Tensor:
    boxes = np.array([e.get("bbox", [0, 0, 0, 0]) for e in entries], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return torch.from_numpy(boxes.astype(np.float32))


def _rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    if isinstance(segmentation, list):
        return mask_api.merge(mask_api.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask_api.frPyObjects(segmentation, *size)
    counts = segmentation["counts"]
    return {"size": list(size), "counts": counts.encode() if isinstance(counts, str) else counts}


@pytest.fixture(scope="session")
def pycoco() -> Callable[..., dict[str, Any]]:
    return official


@pytest.fixture(scope="session")
def read_coco_files() -> Callable[..., Any]:
    def read(gt: Path, dt: Path) -> Any:
        return from_coco(json.loads(gt.read_text()), json.loads(dt.read_text()))

    return read


@pytest.fixture(scope="session")
def coco_inputs() -> Callable[..., Any]:
    return from_coco
