"""Detectors without a pyramid see images as they are, of odd sides too, wherever a batch comes from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detection import Detector, load_detector, save_detector
from detection.data.datamodule import DetectionDataModule
from detection.inference.tta import TestTimeAugmentation
from detection.interop.exported_files import onnx_runner, to_onnx, to_torch, torch_runner
from detection.interop.parity import compare
from detection.models.backbones import resnet_c4
from detection.models.compose import faster_rcnn
from detection.models.fast import accelerate
from detection.models.two_stage import TwoStageDetector

SIZES = [(101, 143), (97, 97), (133, 90), (64, 200)]


@pytest.fixture(scope="module")
def detector() -> TwoStageDetector:
    torch.manual_seed(0)
    few: Any = {"rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 50, "box_score_thresh": 0.01}
    backbone = resnet_c4("resnet18", norm="batch")
    model = faster_rcnn(backbone, 4, min_size=96, max_size=160, size_divisible=1, **few).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_score.weight", "cls_logits.weight")):
                parameter.mul_(30)
    return model


def pictures() -> list[Any]:
    return [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(SIZES)]


def test_nothing_is_padded(detector: TwoStageDetector) -> None:
    image = torch.rand(3, 97, 141)
    batch = detector.transform([image], None, 4)
    assert tuple(batch.images.shape[2:]) == (96, 139)
    maps = detector.extract(batch).maps
    assert tuple(maps[0].shape[2:]) == (6, 9)  # half the side four times, rounded up: 139, 70, 35, 18, 9
    several = detector.transform([image, torch.rand(3, 141, 97)], None, 4)
    assert tuple(several.images.shape[2:]) == (139, 139)  # the largest of the batch, as Detectron2 pads it


@torch.no_grad()
def test_a_batch_pads_none_of_its_images(detector: TwoStageDetector) -> None:
    mine = Detector(detector, ["a", "b", "c"], device="cpu")
    assert tuple(mine.batch(pictures()[:1]).images.shape[2:]) == (96, 135)
    alone = [mine(picture) for picture in pictures()]
    together = mine.predict(pictures(), batch_size=4)
    assert sum(len(found.boxes) for found in alone) > 50
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.boxes, other.boxes) and np.array_equal(one.scores, other.scores)


@torch.no_grad()
def test_the_quick_forms_find_the_same(detector: TwoStageDetector) -> None:
    quick = detector.for_inference("cpu")
    for picture in pictures():
        image = torch.from_numpy(picture).permute(2, 0, 1)
        (plain,), (fast,) = detector([image]), quick([image])
        assert len(plain["boxes"]) > 5 and torch.equal(plain["labels"], fast["labels"])
        torch.testing.assert_close(plain["boxes"], fast["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(plain["scores"], fast["scores"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_other_scales_are_not_padded_either(detector: TwoStageDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    extract = detector.extract
    monkeypatch.setattr(detector, "extract", lambda batch: seen.append(batch.images.shape[2:]) or extract(batch))
    TestTimeAugmentation(detector, scales=(1.3,), hflip=False).run(
        detector.transform([torch.rand(3, 96, 139)], None, 4), False, True
    )
    assert [tuple(size) for size in seen] == [(124, 180)]


def test_it_trains_on_them(detector: TwoStageDetector) -> None:
    from copy import deepcopy

    model = accelerate(deepcopy(detector).train(), "cpu")
    box = {"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([1])}
    losses: dict[str, Tensor] = model([torch.rand(3, 101, 143), torch.rand(3, 133, 90)], [box, box])  # type: ignore[assignment]
    assert all(loss.isfinite() for loss in losses.values()) and sum(losses.values()).requires_grad  # type: ignore[union-attr]


def test_the_file_keeps_it(detector: TwoStageDetector, tmp_path: Path) -> None:
    save_detector(tmp_path / "c4.safetensors", detector, ["a", "b", "c"])
    assert load_detector(tmp_path / "c4.safetensors").transform.size_divisible == 1


def test_the_data_follows_the_detector(detector: TwoStageDetector, tmp_path: Path) -> None:
    """A trainer brings both together; evaluation then has one image a batch."""
    data = DetectionDataModule(num_workers=0, min_size=90, max_size=130, batch_size=4)
    assert data._divisor == 32
    module = SimpleNamespace(detector=detector)
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    assert data._divisor == 1
    told = DetectionDataModule(num_workers=0, size_divisible=64)
    told.trainer = data.trainer
    assert told._divisor == 64
    with pytest.raises(ValueError, match="size_divisible 1 must be a multiple of 32"):
        DetectionDataModule(size_divisible=1)


@pytest.mark.rehearsal
def test_exported_files_find_the_same(detector: TwoStageDetector, tmp_path: Path) -> None:
    mine = Detector(detector, ["a", "b", "c"], device="cpu")
    to_torch(detector, tmp_path / "c4.pt2", {})
    to_onnx(detector, tmp_path / "c4.onnx", {})
    for run in (torch_runner(tmp_path / "c4.pt2"), onnx_runner(tmp_path / "c4.onnx")):
        parity = compare(mine, run, pictures())
        assert parity.detections > 50 and parity.unmatched == 0 and parity.box < 1e-3 and parity.score < 1e-5
