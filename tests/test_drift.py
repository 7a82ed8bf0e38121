"""A detector that was changed after it was built is kept as it is, or refused: never as it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from detection import fasterrcnn_efficientnet_lite0_fpn
from detection.anchors import AnchorGenerator
from detection.boxes import BoxCoder
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.drift import present_recipe
from detection.inference import Detector
from detection.interop import CheckpointError, load_detector, save_detector
from detection.losses import ClassWeights, GIoULoss, SmoothL1Loss
from detection.matching import BalancedSampler, HardExampleSampler, Matcher
from detection.models.fast import accelerate
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import TwoFCHead
from detection.recipes import describe
from detection.training.module import DetectionModule
from detection.trust import RecipeError


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


def test_an_images_mean_assigned_as_a_tensor_is_refused() -> None:
    detector = fasterrcnn_efficientnet_lite0_fpn(num_classes=3, weights_backbone=None)
    assert present_recipe(detector.bfloat16().float()) == detector.recipe  # rounded, not changed
    detector.transform.std = detector.transform.std / 2
    with pytest.raises(RecipeError, match=r"transform\.std was changed after the detector was built"):
        present_recipe(detector)


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


class OwnSampler:
    """As a user writes it, without a recipe."""

    max_positive = 8

    def __call__(self, labels: torch.Tensor, hardness: Any) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.arange(min(8, labels.shape[1])).expand(len(labels), -1)
        return indices, labels.gather(1, indices) >= 0


ASSIGNED: dict[str, Any] = {
    "rpn.matcher": Matcher(0.6, 0.4, allow_low_quality_matches=True),
    "rpn.sampler": HardExampleSampler(32),
    "rpn.box_coder": BoxCoder((2.0, 2.0, 1.0, 1.0)),
    "rpn.objectness_loss": partial(torch.nn.functional.binary_cross_entropy_with_logits, reduction="none"),
    "rpn.box_loss": GIoULoss(2.0),
    "rpn.anchor_generator": AnchorGenerator([[8], [16], [32], [64], [128]]),
    "roi_heads.matcher": Matcher(0.6, 0.4),
    "roi_heads.sampler": BalancedSampler(16, 0.5),
    "roi_heads.box_coder": BoxCoder((5.0, 5.0, 2.0, 2.0)),
    "roi_heads.class_loss": ClassWeights([1.0, 2.0, 3.0, 4.0]),
    "roi_heads.box_loss": SmoothL1Loss(1.0),
    "roi_heads.box_roi_pool": RoIPooler(sampling_ratio=1),
}


@pytest.mark.parametrize("path", ASSIGNED)
def test_a_part_that_is_assigned_is_kept(path: str, tmp_path: Path) -> None:
    model, (home, name) = build(), path.split(".")
    setattr(getattr(model, home), name, ASSIGNED[path])
    save_detector(tmp_path / "changed.safetensors", model)
    loaded = load_detector(tmp_path / "changed.safetensors")
    kept = getattr(getattr(loaded, home), name)
    assert type(kept) is type(ASSIGNED[path]) and describe(kept) == describe(ASSIGNED[path])
    assert present_recipe(loaded) == loaded.recipe
    images = torch.rand(2, 3, 70, 90).unbind()
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 60.0, 50.0]]), "labels": torch.tensor([2])}] * 2
    losses = []
    for detector in (model, loaded):
        torch.manual_seed(3)
        losses.append(detector.train()(list(images), targets))
    for loss, value in losses[0].items():
        assert torch.equal(value, losses[1][loss]), loss


@pytest.mark.parametrize(
    ("path", "value", "kept"),
    [
        ("rpn.matcher.fg_iou_thresh", 0.6, True),
        ("roi_heads.box_loss.beta", 0.5, True),
        ("roi_heads.sampler.positive_fraction", 0.5, False),  # of which it has made a number already
        ("roi_heads.sampler", OwnSampler(), False),
        ("roi_heads.class_loss", lambda logits, labels: logits.sum(1), False),
        ("roi_heads.nms", torch.ops.torchvision.nms, False),
        ("rpn.pre_nms_top_n", {"training": 5, "testing": 5}, False),
    ],
)
def test_a_part_that_was_changed_itself_is_kept_or_refused(path: str, value: Any, kept: bool, tmp_path: Path) -> None:
    model, (*homes, name) = build(), path.split(".")
    part: Any = model
    for home in homes:
        part = getattr(part, home)
    setattr(part, name, value)
    file = tmp_path / "changed.safetensors"
    if not kept:
        with pytest.raises(
            CheckpointError, match=rf"^{homes[0]}\.{path.split('.')[1]} was changed after .* give it to"
        ):
            save_detector(file, model)
        assert not list(tmp_path.iterdir())
        return
    save_detector(file, model)
    loaded: Any = load_detector(file)
    for home in path.split("."):
        loaded = getattr(loaded, home)
    assert loaded == value


def test_parts_given_as_factories_or_functions_of_ones_own_are_no_change() -> None:
    given = {"box_loss": GIoULoss(), "class_loss": ClassWeights([1.0, 2.0, 3.0, 4.0]), "box_sampler": OwnSampler()}
    model = build(**given)
    assert model.recipe is None and present_recipe(model) is None  # said when it is saved, with the sampler's name
    model = build(box_loss=GIoULoss(), class_loss=ClassWeights([1.0, 2.0, 3.0, 4.0]), box_head=TwoFCHead)
    assert present_recipe(model) == model.recipe
