"""Images are resized as the library does whose weights they are for: sizes, filter, and at every door alike."""

from __future__ import annotations

import math
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detection import fasterrcnn_mobilenet_v3_large_320_fpn, load_detector, save_detector
from detection.data.augment import eval_transform, train_transform
from detection.data.dataset import Sample
from detection.inference.detector import Detector
from detection.interop.export import ExportableDetector
from detection.resizing import Resizing, resize_into, resize_tensor, resized_size


def picture(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize(
    ("size", "sides", "floor", "nearest"),
    [
        ((480, 640), (800, 1333), (800, 1066), (800, 1067)),  # 1066.67
        ((427, 640), (800, 1333), (800, 1199), (800, 1199)),  # 1199.06
        ((200, 401), (100, 1333), (100, 200), (100, 201)),  # 200.5: halves go up
        ((300, 1000), (800, 1333), (399, 1333), (400, 1333)),  # the long side decides, 399.9
    ],
)
def test_the_sides(
    size: tuple[int, int], sides: tuple[int, int], floor: tuple[int, int], nearest: tuple[int, int]
) -> None:
    assert resized_size(*size, *sides) == floor
    assert resized_size(*size, *sides, "detectron2") == resized_size(*size, *sides, "mmdetection") == nearest


def triangle(pixels: np.ndarray, new: int) -> np.ndarray:
    """Bilinear along the first axis, by its definition: a triangle as wide as the step between new pixels."""
    old = len(pixels)
    step = old / new
    width = max(1.0, step)
    rows = []
    for i in range(new):
        centre = (i + 0.5) * step
        weights = np.array([max(0.0, 1 - abs((j + 0.5 - centre) / width)) for j in range(old)])
        rows.append(np.tensordot(weights / weights.sum(), pixels, 1))
    return np.stack(rows)


def test_detectron2s_filter_averages_what_it_shrinks() -> None:
    image = picture(60, 90)
    wanted = triangle(triangle(image.astype(float), 20).transpose(1, 0, 2), 30).transpose(1, 0, 2)
    planes = np.empty((3, 20, 30), np.uint8)
    resize_into(image, planes, "detectron2")
    assert np.abs(planes.transpose(1, 2, 0) - wanted).max() <= 1.01  # which rounds along both axes
    assert np.array_equal(planes.transpose(1, 2, 0), np.asarray(Image.fromarray(image).resize((30, 20), 2)))
    inside = resize_tensor(torch.from_numpy(image).permute(2, 0, 1) / 255, 20, 999, "detectron2")
    apart = np.abs(255 * inside.numpy() - planes)  # Pillow's weights are whole numbers, which decides some halves
    assert apart.max() <= 1.01 and (apart > 0.01).mean() < 0.01
    resize_into(image, planes, "mmdetection")
    assert np.array_equal(planes.transpose(1, 2, 0), cv2.resize(image, (30, 20), interpolation=cv2.INTER_LINEAR))


def test_pixels_of_16_bits_have_the_same_filter() -> None:
    deep = picture(60, 90).astype(np.uint16) * 257
    planes, shallow = np.empty((3, 20, 30), np.uint16), np.empty((3, 20, 30), np.uint8)
    resize_into(deep, planes, "detectron2")
    resize_into((deep // 257).astype(np.uint8), shallow, "detectron2")
    assert np.abs(planes / 257 - shallow).max() <= 1.01


@pytest.mark.parametrize("resizing", ["torchvision", "detectron2", "mmdetection"])
def test_every_door_shows_the_same_picture(resizing: Resizing, tmp_path: Path) -> None:
    """The workers' data, `predict`, `model(images)` and the exported graph; 47 x 61 at 40 has 51.9 columns."""
    image = picture(47, 61)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(num_classes=3, min_size=40, max_size=320, resizing=resizing).eval()
    save_detector(tmp_path / "m.safetensors", model)
    model = load_detector(tmp_path / "m.safetensors")
    assert model.transform.resizing == resizing  # kept in the recipe
    size = (40, 51 if resizing == "torchvision" else 52)
    for transform in (eval_transform(40, 320), train_transform(40, 320, hflip=0.0)):
        transform.take_resizing(resizing)
        out = transform(image, np.zeros((0, 4), np.float32), seed=0)
        assert out.size == size and out.resizing == resizing
    worker = Sample(out.image, out.size, torch.zeros(0), torch.zeros(0), None, resizing=out.resizing).image  # type: ignore[arg-type]
    shown = Detector(model, ["a", "b"], device="cpu").batch([image])
    assert shown.image_sizes.tolist() == [list(size)]
    assert torch.equal(shown.images[0, :, : size[0], : size[1]], worker)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    own = model.transform([tensor], None, 3)
    assert own.image_sizes.tolist() == [list(size)]
    graph, seen, _ = ExportableDetector(model)._resize(tensor[None])
    assert seen.tolist() == [list(size)]
    for inside in (own.images[0], graph[0]):
        assert (255 * inside[:, : size[0], : size[1]] - worker).abs().max() <= 1.01


def test_training_frames_at_the_rounded_size() -> None:
    transform = train_transform([30, 40], 320)
    transform.take_resizing("detectron2")
    rng = random.Random(0)
    sizes = {transform.framing(47, 61, rng).size for _ in range(20)}
    assert sizes == {(side, math.floor(61 * side / 47 + 0.5)) for side in (30, 40)}
