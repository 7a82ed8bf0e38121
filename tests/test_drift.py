"""A detector that was changed after it was built is kept as it is, or refused: never as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from detection import fasterrcnn_efficientnet_lite0_fpn
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.drift import present_recipe
from detection.inference import Detector
from detection.interop import CheckpointError, load_detector, save_detector
from detection.models.fast import accelerate
from detection.training.module import DetectionModule


def build(num_classes: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 96, "fpn_channels": 16}
    return fasterrcnn_efficientnet_lite0_fpn(num_classes=num_classes, weights_backbone=None, **(sizes | options))


def test_a_detector_as_it_was_built_keeps_its_recipe() -> None:
    model, state = build(), torch.get_rng_state()
    accelerate(model, torch.device("cpu"))
    assert present_recipe(model) == model.recipe
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_changed_is_kept(tmp_path: Path) -> None:
    """As torchvision's tutorial has it: a new head for other classes; and thresholds."""
    model = build()
    width = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FastRCNNPredictor(width, 3)
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.02, 7
    model.transform.min_size = (80,)
    save_detector(tmp_path / "changed.safetensors", model, ["a", "b"])
    loaded = load_detector(tmp_path / "changed.safetensors")
    assert (loaded.num_classes, loaded.roi_heads.score_thresh, loaded.roi_heads.detections_per_img) == (3, 0.02, 7)
    assert loaded.transform.min_size == (80,)
    image = torch.rand(3, 70, 90)
    (found,), (wanted,) = loaded.predict([image]), model.predict([image])
    assert len(wanted["scores"]) == 7
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_what_no_argument_describes_is_refused(tmp_path: Path) -> None:
    model = build()
    model.roi_heads.box_head.fc7 = nn.Linear(1024, 1024, bias=False)
    with pytest.raises(CheckpointError, match=r"roi_heads\.box_head.* was changed after .* give it to"):
        save_detector(tmp_path / "changed.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_a_run_keeps_the_changes_and_the_sizes_of_its_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = scenes.draw(tmp_path / "scenes", train=4, val=2)
    model = build(num_classes=7, min_size=128, max_size=200)  # of a file that was made elsewhere
    model.roi_heads.score_thresh = 0.3
    splits = {f"{split}_split": file for split, (file, _) in scenes.SPLITS.items()}
    splits |= {f"{split}_images": images for split, (_, images) in scenes.SPLITS.items()}
    data = DetectionDataModule(
        str(root),
        "coco",
        **splits,
        batch_size=2,
        num_workers=0,
        min_size=[48, 64],
        max_size=96,  # type: ignore[arg-type]
    )
    module = DetectionModule(model, scenes.CLASSES)
    options: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, limit_val_batches=0, **options)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert "images are resized as the data says" in caplog.text
    loaded, detector = load_detector(tmp_path / "run.ckpt"), Detector.from_checkpoint(tmp_path / "run.ckpt", "cpu")
    assert loaded.roi_heads.score_thresh == 0.3
    assert (loaded.transform.min_size, loaded.transform.max_size) == ((48, 64), 96)
    assert (detector.min_size, detector.max_size) == (64, 96)
