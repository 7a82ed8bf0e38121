"""`scripts/evaluate.py` gives the figures that training logged, from nothing but the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import lightning as L
import numpy as np
import pytest

from detection import maskrcnn_efficientnet_lite0_fpn
from detection.data.datamodule import DetectionDataModule
from detection.training.module import DetectionModule
from detection.training.optimisation import CosineSchedule

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Mask R-CNN after three steps on twelve drawn images whose category ids have gaps, and what it logged."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image in range(12):
        pixels = rng.integers(0, 60, (96, 128, 3), np.uint8)
        for _ in range(3):
            (x, y), (w, h) = rng.integers(0, 60, 2).tolist(), rng.integers(12, 34, 2).tolist()
            category = int(rng.integers(2))
            pixels[y : y + h, x : x + w, category] = 230
            entry = {"image_id": 100 + image, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(entry | {"id": len(annotations) + 1, "category_id": (7, 90)[category]})
        cv2.imwrite(str(folder / f"{image}.png"), pixels)
        images.append({"id": 100 + image, "file_name": f"{image}.png", "height": 96, "width": 128})
    categories = [{"id": 7, "name": "blue"}, {"id": 90, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "objects.json").write_text(json.dumps(content))
    L.seed_everything(0)
    data = DetectionDataModule(
        str(folder),
        "coco",
        "objects.json",
        "objects.json",
        batch_size=4,
        num_workers=0,
        min_size=96,
        max_size=128,
        masks=True,
    )
    detector = maskrcnn_efficientnet_lite0_fpn(num_classes=3, weights_backbone=None, box_score_thresh=0.0)
    module = DetectionModule(detector, data.class_names, schedule=CosineSchedule(warmup_steps=1))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    logged = {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items()}
    boxes = {f"bbox_{k}": v for k, v in logged.items() if k.startswith(("map", "mar"))}
    return folder, boxes | {k: v for k, v in logged.items() if k.startswith("segm_m")}


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_figures_are_those_of_training(trained, pycoco):
    folder, logged = trained
    done = run("--ckpt", folder / "last.ckpt", "--accelerator", "cpu", "--batch_size", 5)
    assert done.returncode == 0, done.stderr
    out = folder / "evaluation_val"
    figures = json.loads((out / "figures.json").read_text())["figures"]
    assert logged["bbox_map_50"] > 0 and logged["segm_map_50"] > 0
    assert {name: figures[name] for name in logged} == pytest.approx(logged, abs=1e-6)
    # Training logs no figure for sizes that no object has.
    assert {figures[name] for name in figures.keys() - logged} <= {-1.0}
    for kind in ("bbox", "segm"):
        official = pycoco(str(folder / "objects.json"), str(out / f"detections_{kind}.json"), kind)["figures"]
        own = {name.removeprefix(f"{kind}_"): value for name, value in figures.items() if name.startswith(kind)}
        assert own == pytest.approx(official, abs=1e-6) and len(own) == 12
    assert f"report: {out / 'report.html'}" in done.stdout
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_a_split_that_was_never_named_is_refused(trained):
    done = run("--ckpt", trained[0] / "last.ckpt", "--split", "test")
    assert done.returncode == 1
    assert "without naming a test split; use --split val" in done.stderr
    assert "Traceback" not in done.stderr
