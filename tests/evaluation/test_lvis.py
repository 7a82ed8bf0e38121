"""LVIS: its files read, and its figures against an evaluator that is not ours."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as mask_api

from detection import fasterrcnn_efficientnet_lite0_fpn
from detection.data.coco import read_coco
from detection.data.datamodule import DetectionDataModule
from detection.data.dataset import make_target
from detection.data.store import RecordStore
from detection.evaluation.analysis import BACKGROUND, IGNORED, analyse
from detection.evaluation.coco_files import compare_files
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.voc_ap import voc_ap
from detection.training.module import DetectionModule

WIDTH, HEIGHT = 220, 180
KEYS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
GROUPS = ("map_rare", "map_common", "map_frequent")


def federated_set(folder: Path, images: int = 40, classes: int = 9, seed: int = 0) -> dict[str, Any]:
    """Draw a set in LVIS's form, and write it with its blank images: ids with gaps, `coco_url`, no `file_name`."""
    rng = np.random.default_rng(seed)
    ids = [3 * k + 2 for k in range(classes)]
    categories = [{"id": c, "name": f"class_{c}", "frequency": "rcf"[k % 3]} for k, c in enumerate(ids)]
    entries, annotations = [], []
    (folder / "train2017").mkdir()
    for number in range(images):
        there = rng.choice(ids, rng.integers(1, 4), replace=False).tolist()
        rest = [c for c in ids if c not in there]
        negative = rng.choice(rest, rng.integers(0, 4), replace=False).tolist()
        name = f"train2017/{number:012}.jpg"
        cv2.imwrite(str(folder / name), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        entry = {"id": 1000 - 7 * number, "width": WIDTH, "height": HEIGHT, "neg_category_ids": negative}
        entry |= {"coco_url": f"http://images.cocodataset.org/{name}"}
        entries.append(entry | {"not_exhaustive_category_ids": [c for c in there if rng.random() < 0.4]})
        for category in there:
            for _ in range(rng.integers(1, 4)):
                w, h = rng.integers(6, 120, 2).tolist()
                x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                item = {"id": len(annotations) + 1, "image_id": entry["id"], "category_id": category}
                item |= {"bbox": [x, y, w, h], "area": w * h, "segmentation": [polygon]}
                annotations.append(item)
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "lvis.json").write_text(json.dumps(content))
    return content


def drawn_results(content: dict[str, Any], seed: int = 1, others: int = 12) -> list[dict[str, Any]]:
    """Detections near the objects, and anywhere, of every class; many scores are equal."""
    rng = np.random.default_rng(seed)
    objects = defaultdict(list)
    for item in content["annotations"]:
        objects[item["image_id"]].append(item)
    ids = [category["id"] for category in content["categories"]]
    results = []
    for image in content["images"]:
        found = [(o["bbox"], o["category_id"]) for o in objects[image["id"]] for _ in range(2)]
        for _ in range(others):
            x, y = rng.integers(0, 150, 2).tolist()
            found.append(([x, y, *rng.integers(10, 80, 2).tolist()], int(rng.choice(ids))))
        for box, category in found:
            if rng.random() < 0.1:
                category = int(rng.choice(ids))
            moved = np.maximum(np.add(box, rng.integers(-6, 7, 4)), [0, 0, 3, 3])
            mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
            x, y, w, h = moved.tolist()
            mask[y : y + h, x : x + w] = 1
            rle = mask_api.encode(mask)
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": moved.astype(float).tolist(),
                    "score": float(rng.integers(1, 40) / 40),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    return results


def official(content: dict[str, Any], results: list[dict[str, Any]], iou_type: str = "bbox") -> dict[str, float]:
    """LVIS's figures by faster_coco_eval, of the best 300 detections of each image, as LVIS's own results have it."""
    by_image = defaultdict(list)
    for entry in results:
        by_image[entry["image_id"]].append(entry)
    best = [e for entries in by_image.values() for e in sorted(entries, key=lambda e: e["score"], reverse=True)[:300]]
    if iou_type == "segm":
        best = [{k: v for k, v in entry.items() if k != "bbox"} for entry in best]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(copy.deepcopy(content))
        evaluator = COCOeval_faster(truth, truth.loadRes(copy.deepcopy(best)), iou_type, lvis_style=True)
        evaluator.params.maxDets = [300]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats = evaluator.all_stats.tolist()
    precision, groups = evaluator.eval["precision"], evaluator.freq_groups
    by_group = [precision[:, :, own, 0, -1] for own in groups]
    means = [float(p[p > -1].mean()) for p in by_group]
    return dict(zip((*KEYS, "mar_300", *GROUPS), (*stats[:7], *means), strict=True))


def ours(folder: Path, content: dict[str, Any], results: list[dict[str, Any]], iou_type: Any = "bbox") -> MeanAP:
    index = read_coco(folder, "lvis.json", masks=iou_type == "segm")
    assert not index.defects
    metric = MeanAP(index.classes, 300, iou_type, index.frequencies)
    store = RecordStore(index.records)
    label = {category: i + 1 for i, category in enumerate(index.category_ids)}
    found = defaultdict(list)
    for entry in results:
        found[entry["image_id"]].append(entry)
    for i in range(len(store)):
        target = make_target(store[i])
        mine = found[target.image_id]
        boxes = torch.tensor([e["bbox"] for e in mine]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        detection: dict[str, Any] = {"boxes": boxes, "scores": torch.tensor([e["score"] for e in mine])}
        detection["labels"] = torch.tensor([label[e["category_id"]] for e in mine], dtype=torch.int64)
        detection["masks"] = [e["segmentation"] | {"counts": e["segmentation"]["counts"].encode()} for e in mine]
        metric.update([detection], [target])
    return metric


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_another_evaluator(tmp_path, iou_type, seed):
    content = federated_set(tmp_path, seed=seed)
    results = drawn_results(content, seed)
    wanted = official(content, results, iou_type)
    figures = ours(tmp_path, content, results, iou_type).compute()
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert len({round(wanted[name], 3) for name in ("map", *GROUPS)}) == 4  # or a wrong group would not show


def test_300_detections_of_an_image_count_before_any_is_dropped(tmp_path):
    content = federated_set(tmp_path, images=8)
    results = drawn_results(content, others=500)
    wanted = official(content, results)
    figures = ours(tmp_path, content, results).compute()
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    metric = ours(tmp_path, content, results)
    metric.max_detection_thresholds = [1, 10, 600]
    assert metric.compute()["map"] == figures["map"]  # what was cut is gone
    assert sum(len(result.labels) for result in metric.results) < 8 * 300


def test_what_is_dropped_and_what_is_excused_moves_the_figures(tmp_path):
    """Or the sets above could not tell."""
    content = federated_set(tmp_path)
    results = drawn_results(content)
    right = ours(tmp_path, content, results).compute()["map"]
    for name, other in (("neg_category_ids", 1), ("not_exhaustive_category_ids", 0)):
        changed = copy.deepcopy(content)
        every = [category["id"] for category in content["categories"]]
        for image in changed["images"]:
            image[name] = every if other else []
        (tmp_path / "lvis.json").write_text(json.dumps(changed))
        wrong = ours(tmp_path, changed, results).compute()["map"]
        assert wrong < right - 0.01
        assert wrong == pytest.approx(official(changed, results)["map"], abs=1e-6)


def test_unmatched_detections_of_a_class_not_annotated_in_full_are_no_mistakes(tmp_path):
    content = federated_set(tmp_path)
    results = drawn_results(content)
    metric = ours(tmp_path, content, results)
    judged = analyse(metric.results, 9)
    free = judged.dt.excused & (judged.owner < 0)
    assert free.sum() > 10 and (judged.kind[free] == IGNORED).all()
    assert not (judged.kind[judged.dt.excused] == BACKGROUND).any() and (judged.kind == BACKGROUND).any()
    names = metric.class_names
    without = voc_ap(list(metric.results), names)
    for result in metric.results:
        object.__setattr__(result, "excused", None)
    counted = voc_ap(metric.results, names)
    assert all(without[name] >= counted[name] for name in names) and without != counted


@pytest.mark.slow
def test_a_run_logs_the_figures_of_lvis(tmp_path):
    L.seed_everything(0)
    federated_set(tmp_path, images=6)
    data = DetectionDataModule(
        str(tmp_path), "coco", "lvis.json", "lvis.json", batch_size=3, num_workers=0, min_size=64
    )
    detector = fasterrcnn_efficientnet_lite0_fpn(
        num_classes=10, weights_backbone=None, box_score_thresh=0.0, box_detections_per_img=300
    )
    module = DetectionModule(detector, data.class_names, detections_per_img=300)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    trainer = L.Trainer(max_steps=2, accelerator="cpu", num_sanity_val_steps=0, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    logged = trainer.callback_metrics
    assert {f"val/{name}" for name in GROUPS} <= logged.keys() and "val/mar_300" in logged
    checked = {record.image_id: record for record in read_coco(tmp_path, "lvis.json").records}
    assert any(len(result.labels) for result in module.metric.results)
    for result in module.metric.results:
        assert checked[result.image_id].checked[result.labels - 1].all()


def test_a_results_file_is_not_taken_for_an_evaluation_of_lvis(tmp_path):
    content = federated_set(tmp_path, images=6)
    content["annotations"][0]["ignore"] = 1
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(drawn_results(content)))
    notes = compare_files(tmp_path / "lvis.json", tmp_path / "found.json").notes
    assert any("COCO's figures and not LVIS's" in note for note in notes)
    assert any("1 annotations with ignore 1 count as objects" in note for note in notes)
