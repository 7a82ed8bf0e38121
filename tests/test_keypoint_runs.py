"""Keypoint R-CNN from data to figures, pictures and files: two steps of it here, and an OKS AP in a rehearsal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from jsonargparse import Namespace

from detection.cli.comparing import contrast
from detection.cli.configuration import fit_detector_to_data
from detection.cli.detected import of_run
from detection.cli.evaluate import evaluate
from detection.data.datamodule import DetectionDataModule
from detection.data.figures import EDGES, draw_figures
from detection.data.images import read_image
from detection.evaluation.coco_files import compare_files
from detection.inference.detections import Detections
from detection.inference.detector import Detector
from detection.inference.fusing import fuse
from detection.inference.run import predict
from detection.inference.sources import open_source
from detection.inference.tiles import Tiles
from detection.inference.tta import TestTimeAugmentation
from detection.models.family.keypoint_builders import keypointrcnn_efficientnet_lite0_fpn
from detection.models.family.keypoints import KeypointHead
from detection.training.callbacks import PredictionPictures
from detection.training.module import DetectionModule
from detection.training.tracking import overlays


def small_detector(points: int = 5) -> Any:
    """Keypoint R-CNN that takes a fifth of a second for a step."""
    few = {f"rpn_{when}_nms_top_n_{mode}": 100 for when in ("pre", "post") for mode in ("train", "test")}
    return keypointrcnn_efficientnet_lite0_fpn(
        num_keypoints=points,
        weights_backbone=None,
        fpn_channels=32,
        box_batch_size_per_image=32,
        keypoint_head=KeypointHead(32, (32, 32)),
        min_size=128,
        max_size=128,
        **few,
    )


def data(root: Path, **options: Any) -> DetectionDataModule:
    settings: dict[str, Any] = {"num_workers": 0, "batch_size": 4, "min_size": 128, "max_size": 128}
    return DetectionDataModule(root=str(root), format="coco", **{"keypoints": True} | settings | options)


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **quiet | options)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_figures(tmp_path_factory.mktemp("figures"), 8, 4)


@pytest.fixture(scope="module")
def run(figures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder, trainer and module of two steps."""
    L.seed_everything(0)
    folder = tmp_path_factory.mktemp("run")
    module = DetectionModule(small_detector(), ["figure"])
    made = trainer(max_steps=2, num_sanity_val_steps=0, callbacks=[PredictionPictures(str(folder), score_thresh=0.0)])
    made.fit(module, datamodule=data(figures))
    made.save_checkpoint(folder / "last.ckpt")
    return folder, made, module


def test_validation_logs_oks_ap_beside_box_ap(run: Any) -> None:
    folder, made, module = run
    logged = made.callback_metrics
    assert {"val/map", "val/keypoints_map", "val/keypoints_map_50", "val/keypoints_mar"} <= logged.keys()
    assert float(logged["val/loss_keypoint"]) > 0
    assert set(module.metric.skeleton.names) == {"head", "left_hand", "right_hand", "left_foot", "right_foot"}
    assert module.metric.results[0].gt_keypoints.shape[1:] == (5, 3)
    assert (folder / "predictions.jpg").is_file()


def test_evaluate_writes_results_that_coco_reads(run: Any, figures: Path) -> None:
    folder, made, _ = run
    evaluate([folder / "last.ckpt"], output=folder / "evaluation", accelerator="cpu")
    figures_of = json.loads((folder / "evaluation/figures.json").read_text())["figures"]
    assert figures_of["keypoints_map"] == pytest.approx(float(made.callback_metrics["val/keypoints_map"]), abs=1e-6)
    entries = json.loads((folder / "evaluation/detections_keypoints.json").read_text())
    assert entries and all(len(entry["keypoints"]) == 15 and "bbox" not in entry for entry in entries)
    page = (folder / "evaluation/report.html").read_text()
    assert "<span>OKS AP</span>" in page and "Crosses are key points" in page
    # The file alone gives the same figure.
    read = compare_files(figures / "annotations/val.json", folder / "evaluation/detections_keypoints.json").metric
    assert read.compute()["map"] == pytest.approx(figures_of["keypoints_map"], abs=1e-6)
    evaluate([folder / "last.ckpt"], output=folder / "boxes", accelerator="cpu", masks=False)
    assert "keypoints_map" not in json.loads((folder / "boxes/figures.json").read_text())["figures"]


def test_detections_that_compare_keeps_are_read_back_with_their_points(run: Any) -> None:
    folder, made, module = run
    first = of_run(folder / "last.ckpt", "val", [], None, "cpu", None)
    again = of_run(folder / "last.ckpt", "val", [], None, "cpu", None)
    assert "detections read from" in again.notes[0] and "detections read from" not in first.notes[0]
    for one, other, seen in zip(first.results, again.results, module.metric.results, strict=True):
        assert (one.keypoints == other.keypoints).all() and (one.gt_keypoints == other.gt_keypoints).all()
        assert one.keypoints.shape == seen.keypoints.shape
    assert first.sigmas == again.sigmas == module.metric.skeleton.oks_sigmas
    found, *_ = contrast([first], [again], ("a", "b"), draws=100, sigmas=first.sigmas)
    wanted = float(made.callback_metrics["val/keypoints_map"])
    assert found.figures[0].a[0] == found.figures[0].b[0] == pytest.approx(wanted, abs=1e-6)


def test_predict_writes_and_draws_key_points(run: Any, figures: Path) -> None:
    folder, _, _ = run
    detector = Detector.from_checkpoint(folder / "last.ckpt", device="cpu")
    assert detector.edges == EDGES
    predict(detector, open_source(str(figures / "val")), folder / "predictions", score_thresh=0.0)
    document = json.loads((folder / "predictions/predictions.json").read_text())
    assert document["annotations"] and all(len(entry["keypoints"]) == 15 for entry in document["annotations"])
    found = detector(figures / "val/0000.png")
    assert found.keypoints is not None and found.keypoint_scores is not None
    assert found.keypoints.shape == (len(found), 5, 3) and found.keypoint_scores.shape == (len(found), 5)
    best = found.take(np.arange(2))
    assert best.keypoints is not None and (best.keypoints == found.keypoints[:2]).all()


def of_two(offset: float) -> Detections:
    points = np.array([[[10, 10, 1], [20, 20, 1]], [[60, 10, 1], [70, 20, 1]]], np.float32)
    boxes = np.array([[5, 5, 25, 25], [55, 5, 75, 25]], np.float32)
    points[..., 0] += offset
    boxes[:, ::2] += offset
    labels, scores = np.ones(2, np.int64), np.array([0.9, 0.8], np.float32)
    more: Any = {"keypoints": points, "keypoint_scores": np.ones((2, 2), np.float32)}
    return Detections(boxes, labels, scores, ("a",), (100, 100), **more)


def test_points_are_drawn_where_they_are() -> None:
    found = of_two(0.0)
    blank = np.zeros((100, 100, 3), np.uint8)
    image = np.asarray(Detections(**{**_fields(found), "edges": ((0, 1),)}).draw(blank, side=400, labels="none"))
    assert (image[4 * 10, 4 * 10] == 255).all() and (image[4 * 20, 4 * 70] == 255).all()
    assert image[4 * 15, 4 * 15].any()  # a line from one to the other
    assert not np.asarray(found.draw(blank, side=400, labels="none"))[4 * 15, 4 * 15].any()


def _fields(found: Detections) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Detections.__slots__}


def test_tiles_and_fusing_keep_points_with_their_boxes() -> None:
    part = of_two(0.0)
    whole = Tiles(100, 0.5).merge([part, part], [(0, 0, 100, 100), (50, 0, 150, 100)], (100, 150))
    assert whole.keypoints is not None
    for box, points in zip(whole.boxes, whole.keypoints, strict=True):
        assert (points[0, :2] == box[:2] + 5).all() and (points[1, :2] == box[2:] - 5).all()
    for how in ("wbf", "nms"):
        fused = fuse([of_two(0.0), of_two(1.0)], how, 10)  # type: ignore[arg-type]
        assert fused.keypoints is not None and len(fused.keypoints) == len(fused) == 2


def test_the_picture_for_wandb_has_the_points(figures: Path, run: Any) -> None:
    _, _, module = run
    result = module.metric.results[0]
    sure = np.zeros_like(result.scores)
    sure[0] = 1  # the others' would lie over it
    result = replace(result, keypoints=result.keypoints.copy())
    result.keypoints[0] = [(20 * i + 10, 64, 1) for i in range(5)]
    drawn = overlays(replace(result, scores=sure), ["figure"], figures)["data_or_path"]
    plain = read_image(figures / result.file_name, result.size)
    assert (drawn[64, 10:100:20] == 255).all() and (drawn[:50] == plain[:50]).all()
    assert (overlays(replace(result, scores=sure * 0.4), ["figure"], figures)["data_or_path"] == plain).all()


def test_the_detector_has_as_many_points_as_the_data(figures: Path) -> None:
    detector = Namespace(
        class_path="detection.models.family.keypoint_builders.keypointrcnn_efficientnet_lite0_fpn",
        init_args=Namespace(num_keypoints=None, num_classes=None),
    )
    fit_detector_to_data(detector, data(figures))
    assert detector.init_args.num_keypoints == 5 and detector.init_args.num_classes == 2
    module = DetectionModule(small_detector(3), ["figure"])
    with pytest.raises(ValueError, match="predicts 3 key points, but the data has 5: build it with num_keypoints=5"):
        trainer(max_steps=1).fit(module, datamodule=data(figures))
    with pytest.raises(ValueError, match=r"predicts key points but the data is read without: set data\.keypoints"):
        trainer(max_steps=1).fit(module, datamodule=data(figures, keypoints=False))


def test_a_mirrored_view_is_refused() -> None:
    with pytest.raises(ValueError, match="left key points for right ones"):
        TestTimeAugmentation(small_detector())
    assert TestTimeAugmentation(small_detector(), hflip=False).num_keypoints == 5


@pytest.mark.rehearsal
def test_oks_ap_rises_on_drawn_figures(tmp_path: Path) -> None:
    L.seed_everything(0)
    root = draw_figures(tmp_path, 200, 40)
    module = DetectionModule(small_detector(), ["figure"], lr=0.04)
    made = trainer(max_steps=400, num_sanity_val_steps=0, limit_val_batches=0, gradient_clip_val=10)
    made.fit(module, datamodule=data(root, batch_size=8))
    figures = trainer().validate(module, datamodule=data(root), verbose=False)[0]
    assert figures["val/keypoints_map"] > 0.6
