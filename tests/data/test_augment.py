"""Augmentation: torchvision's size rule and pixels, streams that differ and repeat, objects that stay in step."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2 import functional as F

from detection.data import mixing, pipeline
from detection.data.augment import (
    MASK_SIDE,
    ScaleJitter,
    Transform,
    eval_transform,
    resize_into,
    resized_size,
    train_transform,
)
from detection.data.mixing import Picture, copy_paste, mosaic

BOX = np.array([[10, 10, 60, 30]], np.float32)


def picture(height: int = 90, width: int = 120, seed: int = 0) -> np.ndarray:
    grid = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(grid, (height, width), mode="bicubic").clamp(0, 1) * 255
    return np.ascontiguousarray(image[0].permute(1, 2, 0).byte().numpy())


def test_albumentations_is_called_here_only_and_asks_the_network_for_nothing() -> None:
    """Its import would ask for the newest version; any attempt to connect ends the process with code 3."""
    package = Path(pipeline.__file__).parents[1]
    call = re.compile(r"^(import|from) albumentations", re.MULTILINE)
    assert [path for path in package.rglob("*.py") if call.search(path.read_text())] == [Path(pipeline.__file__)]
    script = (
        "import os, sys; calls = ('socket.connect', 'socket.getaddrinfo')\n"
        "sys.addaudithook(lambda event, _: os._exit(3) if event in calls else None)\n"
        "import detection.data.pipeline, albumentations; print(albumentations.__version__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=package.parent)
    assert done.returncode == 0 and done.stdout.startswith("2.0."), done.stderr


@given(st.integers(2, 2000), st.integers(2, 2000), st.integers(30, 900), st.integers(0, 700))
def test_size_is_torchvisions(height: int, width: int, min_size: int, extra: int) -> None:
    scale = min(min_size / min(height, width), (min_size + extra) / max(height, width))
    assume(min(height, width) * scale >= 1)
    # interpolate with a scale factor is what torchvision's detectors resize with; its shape function needs no pixels
    meta = torch.empty((1, 1, height, width), device="meta")
    expected = torch.nn.functional.interpolate(
        meta, scale_factor=scale, mode="bilinear", recompute_scale_factor=True, align_corners=False
    ).shape[-2:]
    assert resized_size(height, width, min_size, min_size + extra) == tuple(expected)


@pytest.mark.parametrize("size", [(90, 120), (121, 67), (40, 200)])
def test_pixels_and_boxes_are_torchvisions(size: tuple[int, int]) -> None:
    image, boxes = picture(*size), np.array([[3, 4, 30, 33], [0, 0, size[1], size[0]]], np.float32)
    reference = GeneralizedRCNNTransform(100, 160, [0.0] * 3, [1.0] * 3)
    pixels, target = reference.resize(torch.from_numpy(image).permute(2, 0, 1).float(), {"boxes": torch.tensor(boxes)})
    out = eval_transform(100, 160)(image, boxes)
    planes = np.empty((3, *out.size), np.uint8)
    resize_into(out.image, planes)
    assert planes.shape == tuple(pixels.shape)
    assert np.abs(planes - pixels.numpy()).max() < 1
    torch.testing.assert_close(torch.from_numpy(out.boxes), target["boxes"], rtol=1e-6, atol=1e-4)


def test_flip_is_torchvisions() -> None:
    """A box (10, 10, 200, 300) in width 400 becomes (200, 10, 390, 300), and the pixels go with it."""
    image, boxes = picture(320, 400), np.array([[10, 10, 200, 300]], np.float32)
    out = train_transform(320, 400, hflip=1.0)(image, boxes)
    assert out.boxes.tolist() == [[200, 10, 390, 300]]
    np.testing.assert_array_equal(
        out.image, F.horizontal_flip(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0)
    )
    out = train_transform(320, 400, hflip=0, vflip=1.0)(image, boxes)
    assert out.boxes.tolist() == [[10, 20, 200, 310]]


def test_seed_decides_and_flips_are_independent() -> None:
    """One seed given to every transform would flip both ways or neither: half of all seeds must do one of them."""
    transform = train_transform([60, 80, 100], 200, hflip=0.5, vflip=0.5, photometric=0.5)
    image = picture()
    first = [transform(image, BOX, seed=seed) for seed in range(200)]
    again = [transform(image, BOX, seed=seed) for seed in range(200)]
    for a, b in zip(first, again, strict=True):
        assert a.size == b.size and np.array_equal(a.image, b.image) and np.array_equal(a.boxes, b.boxes)
    fractions = np.array([out.boxes[0] / np.array([*out.size[::-1]] * 2) for out in first])
    horizontal, vertical = fractions[:, 0] > 0.4, fractions[:, 1] > 0.4
    for h in (True, False):
        for v in (True, False):
            assert 25 <= ((horizontal == h) & (vertical == v)).sum() <= 80
    assert {min(out.size) for out in first} == {60, 80, 100}


@pytest.mark.parametrize("transform", [eval_transform(50, 90), train_transform(50, 90, photometric=1.0)])
def test_no_object_keeps_shapes(transform: Transform) -> None:
    empty = np.zeros((0, 4), np.float32)
    out = transform(picture(), empty, np.zeros((0, 90, 120), np.uint8), seed=3)
    assert out.boxes.shape == (0, 4) and out.boxes.dtype == np.float32
    assert out.kept.shape == (0,) and out.kept.dtype == np.int64
    assert out.masks is not None and out.masks.shape == (0, MASK_SIDE, MASK_SIDE)
    assert out.windows is not None and out.windows.shape == (0, 4)


def test_degenerate_boxes_are_dropped_by_index() -> None:
    boxes = np.array(
        [[5, 5, 5, 50], [10, 20, 60, 70], [30, 40, 20, 60], [1, 1, 1.5, 90], [-5, -5, 130, 95]], np.float32
    )
    for transform in (eval_transform(90, 120), train_transform(90, 120, hflip=1.0)):
        out = transform(picture(), boxes)
        assert out.kept.tolist() == [1, 4]
        assert out.boxes[1].tolist() == [0, 0, 120, 90]


# Of the outputs below, taken before pipelines could move pixels.
AS_BEFORE = {
    "evaluation": "dd78c5bc70def443",
    "flips": "9907f2a8b7278f78",
    "jitter": "f85cf695abe15cb3",
    "photometric": "4f305df9cef389b8",
}


@pytest.mark.parametrize("name", AS_BEFORE)
def test_without_augmentations_everything_is_as_before(name: str) -> None:
    """To the bit: images, sizes, boxes, indices, masks and their windows of 24 drawn pictures."""
    transform = {
        "evaluation": eval_transform(80, 160),
        "flips": train_transform([60, 80, 100], 200, hflip=0.5, vflip=0.5),
        "jitter": train_transform(64, 96, hflip=0.5, scale_jitter=(0.3, 2.0)),
        "photometric": train_transform(80, 160, hflip=0.5, vflip=0.3, photometric=0.5),
    }[name]
    digest = hashlib.sha256()
    for seed in range(24):
        rng = np.random.default_rng(seed)
        height, width, count = rng.integers((60, 60, 0), (200, 200, 6))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        corners = rng.integers(0, (width - 20, height - 20), (count, 2))
        boxes = np.concatenate([corners, corners + rng.integers(2, 20, (count, 2))], axis=1)
        boxes = (boxes + rng.random((count, 4)) * 0.5).astype(np.float32)
        out = transform(image, boxes, filled(boxes.astype(int).tolist(), height, width), seed=7919 * seed)
        assert out.masks is not None and out.windows is not None
        for part in (out.image, np.array(out.size), out.boxes, out.kept, out.masks, out.windows):
            digest.update(np.ascontiguousarray(part).tobytes())
    assert digest.hexdigest()[:16] == AS_BEFORE[name]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 12), st.floats(0.1, 2.5))
def test_large_scale_jitter_keeps_objects_in_step(seed: int, count: int, scale: float) -> None:
    """Each object is a rectangle of one colour: its mask, its box and the pixels under them stay the same thing."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, (100, 70), (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(4, 20, (count, 2))], axis=1).astype(np.float32)
    image, masks = np.zeros((90, 120, 3), np.uint8), np.zeros((count, 90, 120), np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        image[y1:y2, x1:x2] = i + 1
        masks[i, y1:y2, x1:x2] = 1
    transform = train_transform(64, 64, hflip=0.5, vflip=0.5, scale_jitter=(scale, scale))
    out = transform(image, boxes, masks, seed)
    height, width = out.size
    assert out.masks is not None and out.windows is not None and max(out.size) <= 64
    assert len(out.boxes) == len(out.kept) == len(out.masks) == len(out.windows)
    assert (out.boxes >= 0).all() and (out.boxes <= (width, height, width, height)).all()
    assert (out.boxes[:, 2:] - out.boxes[:, :2] >= 1 - 1e-5).all()  # a flip rounds in float32
    ratio = (out.image.shape[1] / width, out.image.shape[0] / height)
    for box, mask, window, i in zip(out.boxes, out.masks, out.windows, out.kept, strict=True):
        assert (mask == 255).all() and np.abs(window - box).max() <= 1e-3
        x, y = ((box[:2] + box[2:]) / 2 * ratio).astype(int)
        assert out.image[y, x, 0] >= i + 1  # later rectangles lie on top of earlier ones


@pytest.mark.parametrize("radii", [(5, 4), (40, 12), (7, 60), (70, 70)])
def test_a_mask_keeps_its_shape_in_its_window(radii: tuple[int, int]) -> None:
    """Laid back into the view, an ellipse covers what it covered there; flips and the cut at the edge included."""
    masks, image = np.zeros((1, 90, 120), np.uint8), picture()
    cv2.ellipse(masks[0], (70, 40), radii, 0, 0, 250, 1, -1)  # not symmetric
    x, y, w, h = cv2.boundingRect(masks[0])
    box = np.array([[x, y, x + w, y + h]], np.float32)
    out = train_transform(180, 240, hflip=1.0, vflip=1.0)(image, box, masks)
    assert out.masks is not None and out.windows is not None and out.size == (180, 240)
    assert np.allclose(out.windows, out.boxes, atol=1e-3)
    x1, y1, x2, y2 = out.windows[0].astype(int)
    laid = np.zeros(out.size, np.float32)
    laid[y1:y2, x1:x2] = cv2.resize(out.masks[0].astype(np.float32) / 255, (x2 - x1, y2 - y1))
    wanted = cv2.resize(masks[0][::-1, ::-1], (240, 180), interpolation=cv2.INTER_NEAREST)
    differing = np.abs(laid - wanted) > 0.5
    edge = cv2.dilate(wanted, np.ones((5, 5))) - cv2.erode(wanted, np.ones((5, 5)))
    assert not (differing & (edge == 0)).any()
    assert abs(laid.sum() - wanted.sum()) < 0.02 * wanted.sum() + 8


def test_large_scale_jitter_covers_its_range() -> None:
    """Scales are even over the range: the fitted image is 64 wide, so one of 0.5 to 2 shows all or a half of it."""
    views = [ScaleJitter(64, (0.5, 2.0))(90, 120, random.Random(seed)) for seed in range(400)]
    scales = np.array([v.size[1] / (v.window[2] - v.window[0]) * 120 / 64 for v in views])
    assert scales.min() < 0.55 and scales.max() > 1.9 and abs(np.mean(scales < 1.25) - 0.5) < 0.1
    assert all(v.size[0] <= 64 and v.size[1] <= 64 for v in views)
    starts = {v.window[0] for v in views if v.window[2] - v.window[0] < 80}
    assert len(starts) > 20  # windows are not always at the left


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**62))
def test_mosaic_keeps_objects_in_step(seed: int) -> None:
    """Four pictures, each with rectangles of colours of its own: pixels, boxes, masks and labels must agree."""
    rng, pictures = np.random.default_rng(seed), []
    for number in range(4):
        height, width, count = rng.integers((40, 40, 0), (120, 120, 5))
        image, masks = np.full((height, width, 3), 200 + number, np.uint8), np.zeros((count, height, width), np.uint8)
        corners = rng.integers(0, (width - 20, height - 20), (count, 2))
        boxes = np.concatenate([corners, corners + rng.integers(6, 20, (count, 2))], axis=1).astype(np.float32)
        for i, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
            image[y1:y2, x1:x2] = 40 * number + i
            masks[i, y1:y2, x1:x2] = 1
        image[..., 1] = number  # the same all over a picture, so that no edge blurs it
        pictures.append(Picture(image, boxes, 40 * number + np.arange(count), masks))
    out = mosaic(pictures, random.Random(seed))
    assert out.image.shape == pictures[0].image.shape and out.masks is not None
    assert len(out.boxes) == len(out.labels) == len(out.masks) == sum(len(p.boxes) for p in pictures)
    height, width = out.image.shape[:2]
    assert out.image[[0, 0, -1, -1], [0, -1, 0, -1], 1].tolist() == [0, 1, 2, 3]
    for box, label, mask in zip(out.boxes, out.labels, out.masks, strict=True):
        assert (box >= 0).all() and (box <= (width, height, width, height)).all()
        rows, columns = np.nonzero(mask)
        if len(rows) and (box[2:] - box[:2] > 1).all():
            tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.abs(tight - box).max() <= 1.0 + 1e-3
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            if (box[2:] - box[:2] > 4).all():  # away from the blur of the edges
                assert out.image[y, x, 0] // 40 == label // 40


@pytest.mark.parametrize(("height", "width"), [(1, 40), (40, 1), (2, 2), (1, 1)])
def test_mosaic_of_the_narrowest_pictures(height: int, width: int) -> None:
    box, label = np.array([[0, 0, width, height]], np.float32), np.ones(1, np.int64)
    pictures = [Picture(np.full((height, width, 3), i, np.uint8), box, label, None) for i in range(4)]
    for seed in range(20):
        out = mosaic(pictures, random.Random(seed))
        assert out.image.shape == (height, width, 3) and len(out.boxes) == len(out.labels) in (1, 4)


def test_mosaic_scales_by_the_smallest_factor_that_covers() -> None:
    """Four equal pictures: the quarters show 4 windows of one aspect, none stretched by more than rounding."""
    image = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    picture = Picture(np.ascontiguousarray(image), BOX, np.array([1]), None)
    out = mosaic([picture] * 4, random.Random(1))
    slope_x = np.diff(out.image[10, :40, 0].astype(int)).mean()  # source columns a column of the quarter
    assert 1 / 0.7 - 0.1 <= slope_x <= 1 / 0.3 + 0.1
    assert out.masks is None and out.boxes.shape == (4, 4)


def filled(boxes: list[tuple[int, int, int, int]], height: int, width: int) -> np.ndarray:
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    return masks


def test_pasted_objects_cover_what_lies_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns 2 to 5 are pasted over: one object keeps its left column, one its right, one nothing, one everything."""
    monkeypatch.setattr(mixing, "PASTE_SCALES", (1.0, 1.0))
    inner = [(1, 1, 4, 4), (5, 1, 7, 3), (3, 4, 5, 6), (0, 5, 1, 6)]
    boxes = np.array(inner, np.float32)
    boxes[3] = (0, 4.5, 1.5, 6)  # drawn by hand, wider than its mask
    below = Picture(np.full((6, 8, 3), 10, np.uint8), boxes, np.array([1, 2, 3, 4]), filled(inner, 6, 8))
    above = Picture(np.full((6, 8, 3), 99, np.uint8), boxes[:1], np.array([7]), filled([(2, 0, 6, 6)], 6, 8))
    out = copy_paste(below, above, random.Random(0))
    assert out.boxes.tolist() == [[1, 1, 2, 4], [6, 1, 7, 3], [0, 0, 0, 0], [0, 4.5, 1.5, 6], [2, 0, 6, 6]]
    assert out.labels.tolist() == [1, 2, 3, 4, 7] and out.masks is not None
    expected = filled([(1, 1, 2, 4), (6, 1, 7, 3), (0, 0, 0, 0), (0, 5, 1, 6), (2, 0, 6, 6)], 6, 8)
    np.testing.assert_array_equal(out.masks, expected)
    assert (out.image[:, 2:6] == 99).all() and (out.image[:, [0, 1, 6, 7]] == 10).all()
    assert (below.image == 10).all() and below.masks is not None and below.masks[2].sum() == 4  # nothing of it changed
    assert eval_transform(6, 8)(out.image, out.boxes, out.masks).kept.tolist() == [0, 1, 3, 4]


def test_nothing_to_paste_and_no_masks() -> None:
    bare = Picture(picture(), BOX, np.array([1]), None)
    masked = bare._replace(masks=filled([(10, 10, 60, 30)], 90, 120))
    empty = masked._replace(boxes=BOX[:0], labels=np.zeros(0, np.int64), masks=np.zeros((0, 90, 120), np.uint8))
    assert copy_paste(masked, empty, random.Random(0)) is masked
    onto_empty = copy_paste(empty, masked, random.Random(0))
    assert onto_empty.boxes.shape == (1, 4) and onto_empty.labels.tolist() == [1]
    with pytest.raises(ValueError, match="masks"):
        copy_paste(masked, bare, random.Random(0))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**62))
def test_copy_paste_keeps_objects_in_step(seed: int) -> None:
    """The two pictures have colours of their own, and a mask shows where its object is, before and after jitter."""
    rng, pictures = np.random.default_rng(seed), []
    for number in range(2):
        height, width, count = rng.integers((40, 40, 0), (120, 120, 6))
        corners = rng.integers(0, (width - 20, height - 20), (count, 2))
        inner = np.concatenate([corners, corners + rng.integers(6, 20, (count, 2))], axis=1)
        image = np.full((height, width, 3), 100 * (1 + number), np.uint8)
        masks = filled(inner.tolist(), height, width)
        pictures.append(Picture(image, inner.astype(np.float32), 10 * number + np.arange(count), masks))
    below, above = pictures
    out = copy_paste(below, above, random.Random(seed))
    assert below.masks is not None and out.masks is not None and out.image.shape == below.image.shape
    count = len(below.labels)
    assert len(out.boxes) == len(out.labels) == len(out.masks) and out.labels[:count].tolist() == below.labels.tolist()
    assert (len(out.labels) > count) == bool(len(above.labels))
    assert len(set(out.labels.tolist())) == len(out.labels) and set(out.labels[count:]) <= set(above.labels)
    pasted = out.masks[count:].any(axis=0)
    assert ((out.image == 200).all(axis=-1) == pasted).all()
    np.testing.assert_array_equal(out.masks[:count], below.masks & ~pasted)
    for box, mask in zip(out.boxes, out.masks, strict=True):
        rows, columns = np.nonzero(mask)
        tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        assert box.tolist() == tight
    jittered = train_transform(64, 64, scale_jitter=(0.5, 2.0))(out.image, out.boxes, out.masks, seed)
    assert jittered.masks is not None and len(jittered.masks) == len(jittered.boxes) == len(jittered.kept)
    assert out.masks[jittered.kept].any(axis=(1, 2)).all()
    assert copy_paste(below, above, random.Random(seed)).boxes.tolist() == out.boxes.tolist()
