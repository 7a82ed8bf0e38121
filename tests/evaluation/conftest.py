"""Reads COCO files with nothing of the project, and asks the official evaluator for its figures."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.batch import Target
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.report import write_evaluation

NAMES = ["cat", "</script><b>\"dog'</b>&amp;", "_$bird$", "never seen", "absent"]
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


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory):
    """Drawn detections of 20 images in three classes, one with a hostile name, and some on a class without objects."""
    rng = np.random.default_rng(0)
    metric = MeanAP(NAMES)
    for image in range(20):
        gt = rng.uniform(0, 150, (5, 4))
        gt[:, 2:] = gt[:, :2] + rng.uniform(8, 100, (5, 2))
        dt = np.concatenate([gt + rng.normal(0, 6, gt.shape), gt[:2], rng.uniform(0, 60, (3, 4))])
        dt[:, 2:] = np.maximum(dt[:, 2:], dt[:, :2] + 1)
        labels = rng.integers(1, 4, 5)
        found = np.concatenate([np.where(rng.random(5) < 0.7, labels, rng.integers(1, 4, 5)), labels[:2], [1, 2, 5]])
        boxes = torch.tensor(gt, dtype=torch.float32)
        target = Target(
            image_id=image,
            file_name=f'folder/<{image}> "a" & b.jpg',
            size=(200, 260),
            boxes=boxes,
            labels=torch.from_numpy(labels),
            areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
            iscrowd=torch.zeros(5, dtype=torch.bool),
            difficult=torch.zeros(5, dtype=torch.bool),
        )
        detection = {
            "boxes": torch.tensor(dt, dtype=torch.float32),
            "labels": torch.from_numpy(found),
            "scores": torch.tensor(rng.random(10), dtype=torch.float32),
        }
        metric.update([detection], [target])
    folder = tmp_path_factory.mktemp("evaluation") / "new"
    figures = write_evaluation(
        folder,
        metric,
        [3, 5, 7, 8, 9],
        lambda result: np.full((*result.size, 3), 90, np.uint8),
        "Test <report>",
        {"checkpoint": "a&b.ckpt"},
        "model: {lr: 0.125}",
    )
    return folder, metric, figures


@pytest.fixture
def browser() -> Iterator[Any]:
    """A context of a headless chromium; opening a page fails the test on an error of a script and on any request."""
    driver = pytest.importorskip("playwright.sync_api", reason='needs pip install "detection[dev]"')
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed")
    with driver.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        context, problems = started.new_context(), []
        context.on("weberror", lambda error: problems.append(str(error.error)))
        context.on("request", lambda request: problems.extend([request.url] * request.url.startswith("http")))
        yield context
        started.close()
    assert not problems
