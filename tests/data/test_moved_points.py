"""Key points through augmentation, against the pixels: each is a dot in a colour channel of its own.

The three points of a figure are its left and its right hand and its nose. In a mirror the hands change places.
"""

from __future__ import annotations

import random
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest

from detection.data.augment import ScaleJitter, ShortSide, Transform, train_transform
from detection.data.mixing import Picture, copy_paste, mosaic
from detection.data.pipeline import Pipeline, check_key_points
from detection.data.records import DataError
from tests.data.test_pipeline import EXACT, RESAMPLED, TURNED

HEIGHT, WIDTH = 120, 160
SWAP = np.array([1, 0, 2])
BOX = np.array([[0, 0, WIDTH, HEIGHT]], np.float32)
EVERY = {**EXACT, **RESAMPLED, **TURNED, "VerticalFlip": A.VerticalFlip(p=1), "SquareSymmetry": A.SquareSymmetry(p=1)}
EVERY |= {"two mirrors": A.Sequential([A.HorizontalFlip(p=1), A.VerticalFlip(p=1)], p=1)}
EVERY |= {"GridDropout": A.GridDropout(ratio=0.3, p=1), "ThinPlateSpline": A.ThinPlateSpline((0.1, 0.2), p=1)}


def figure(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture `(H, W, 3)` and its points `(1, 3, 3)`, each the centre of a dot that is as bright as it is near."""
    rng = np.random.default_rng(seed)
    while True:
        points = rng.integers(30, (WIDTH - 30, HEIGHT - 30), (3, 2)) + 0.5
        if abs(area(points)) > 1500:
            break
    return dots(points, HEIGHT, WIDTH), np.column_stack((points, [2, 1, 2]))[None].astype(np.float32)


def dots(points: np.ndarray, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] + 0.5
    away = [np.hypot(x - px, y - py) for px, py in points]
    return np.ascontiguousarray(np.stack([np.clip(255 - 40 * d, 0, 255) for d in away], -1).astype(np.uint8))


def area(points: np.ndarray) -> float:
    """Twice the triangle's area, below 0 where it is mirrored."""
    (ax, ay), (bx, by) = points[1] - points[0], points[2] - points[0]
    return float(ax * by - ay * bx)


def seen(image: np.ndarray) -> np.ndarray:
    """Where the dot of each channel is `(3, 2)`, NaN where it is not whole."""
    places = np.full((3, 2), np.nan)
    for i in range(3):
        light = image[..., i].astype(np.float64) * (image[..., i] > 20)
        edge = max(light[0].max(), light[-1].max(), light[:, 0].max(), light[:, -1].max())
        if light.max() > 120 and edge == 0:
            light *= light > 180  # the middle alone, as what is bent is no longer round
            y, x = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
            places[i] = (x * light).sum() / light.sum(), (y * light).sum() / light.sum()
    return places


def assert_on_the_dots(image: np.ndarray, points: np.ndarray, before: np.ndarray, tolerance: float) -> int:
    """Points `(3, 3)` are on their dots; how many were compared. A figure keeps its sides, whatever mirrors it."""
    found = seen(image)
    whole = ~np.isnan(found).any()
    if whole and area(found) * area(before[:, :2]) < 0:
        found, before = found[SWAP], before[SWAP]
    compared = 0
    for i in range(3 if whole else 0):
        assert np.abs(points[i, :2] - found[i]).max() <= tolerance, (i, points[i], found[i])
        assert points[i, 2] == before[i, 2]
        compared += 1
    inside = (points[:, :2] >= 0).all(1) & (points[:, :2] <= image.shape[1::-1]).all(1)
    assert inside.all() and (points[points[:, 2] == 0] == 0).all()
    return compared


@pytest.mark.parametrize("name", EVERY)
def test_points_are_where_their_pixels_are(name: str) -> None:
    """To the pixel where a pixel becomes a pixel; else within one."""
    tolerance = 0.01 if name in EXACT else 1
    pipeline, compared = Pipeline([EVERY[name]], swap=SWAP), 0
    for seed in range(30):
        image, points = figure(seed)
        out = pipeline(image, BOX, None, seed, random.Random(seed), points)
        assert out.keypoints is not None and out.keypoints.shape == (len(out.kept), 3, 3)
        if len(out.kept):
            light = tolerance + 3 * ("Dropout" in name)  # of which a hole has taken a part
            compared += assert_on_the_dots(out.image, out.keypoints[0], points[0], light)
    assert compared >= 15


@pytest.mark.parametrize("flips", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("framing", [ShortSide((240,), 1000), ScaleJitter(150, (0.6, 2.0))], ids=["whole", "jitter"])
def test_our_own_flips_and_framing_keep_points_on_their_pixels(framing: Any, flips: tuple[float, float]) -> None:
    transform, compared = Transform(framing, flips=flips, swap=SWAP), 0
    for seed in range(30):
        image, points = figure(seed)
        out = transform(image, BOX, seed=seed, keypoints=points)
        shown: Any = cv2.resize(out.image, out.size[::-1], interpolation=cv2.INTER_LINEAR)
        assert out.keypoints is not None
        compared += assert_on_the_dots(shown, out.keypoints[0], points[0], 0.6)
    assert compared >= 15


def test_points_beyond_the_edge_are_not_annotated_and_the_others_stay_in_order() -> None:
    points = np.array([[[10, 10, 2], [150, 10, 1], [20, 100, 2]]], np.float32)
    out = Pipeline([A.Crop(0, 0, 100, 50, p=1)], swap=SWAP)(dots(points[0, :, :2], 120, 160), BOX, None, 0,
                                                            random.Random(0), points)  # fmt: skip
    assert out.keypoints is not None
    assert out.keypoints.tolist() == [[[10, 10, 2], [0, 0, 0], [0, 0, 0]]]


def test_points_of_objects_that_are_cut_away_go_with_them() -> None:
    boxes = np.array([[120, 0, 160, 40], [0, 0, 40, 40], [10, 10, 30, 30]], np.float32)
    points = np.stack([np.full((1, 3), [130, 20, 2]), np.full((1, 3), [5, 6, 2]), np.full((1, 3), [15, 16, 1])])
    transform = train_transform(60, 200, hflip=0.0, augmentations=[A.Crop(0, 0, 100, 60, p=1)], swap=np.arange(1))
    out = transform(np.zeros((120, 160, 3), np.uint8), boxes, keypoints=points.astype(np.float32))
    assert out.kept.tolist() == [1, 2] and out.keypoints is not None
    assert out.keypoints.tolist() == [[[5, 6, 2]], [[15, 16, 1]]]


def test_without_points_nothing_is_drawn_otherwise() -> None:
    steps = [A.Affine(rotate=(-30, 30), p=1), A.HorizontalFlip(), A.ElasticTransform(p=0.5)]
    for seed in range(5):
        image, points = figure(seed)
        with_points = train_transform(90, 200, augmentations=steps, swap=SWAP)(image, BOX, seed=seed, keypoints=points)
        without = train_transform(90, 200, augmentations=steps)(image, BOX, seed=seed)
        assert (with_points.image == without.image).all() and (with_points.boxes == without.boxes).all()


def test_a_mirror_among_the_augmentations_asks_for_pairs() -> None:
    image, points = figure(0)
    with pytest.raises(DataError, match=r"mirror the picture.*data\.keypoint_pairs"):
        Pipeline([A.HorizontalFlip(p=1)])(image, BOX, None, 0, random.Random(0), points)
    turned = Pipeline([A.RandomRotate90(p=1)])(image, BOX, None, 0, random.Random(0), points)
    assert turned.keypoints is not None


class Boxes(A.DualTransform):
    """A user's own, which knows nothing of points."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return img

    def apply_to_bboxes(self, bboxes: np.ndarray, **params: Any) -> np.ndarray:
        return bboxes


def test_transforms_that_lose_or_repeat_points_are_refused() -> None:
    with pytest.raises(ValueError, match="Boxes moves pixels but no key points: write its apply_to_keypoints"):
        check_key_points([A.OneOf([A.Blur(), Boxes()])])
    with pytest.raises(ValueError, match="Affine repeats key points at the border: set its border_mode to 0"):
        check_key_points([A.Affine(border_mode=cv2.BORDER_REFLECT_101)])
    check_key_points(list(EVERY.values()))


def test_a_mosaic_keeps_points_on_their_pixels() -> None:
    compared = 0
    for seed in range(20):
        pictures = []
        for i in range(4):
            image, points = figure(10 * seed + i)
            pictures.append(Picture(image, BOX, np.array([1]), None, keypoints=points))
        out = mosaic(pictures, random.Random(seed))
        assert out.keypoints is not None and out.keypoints.shape == (4, 3, 3)
        for own in out.keypoints:
            for i, (x, y, v) in enumerate(own):
                if v and 8 < x < WIDTH - 8 and 8 < y < HEIGHT - 8:
                    column, row = int(x), int(y)
                    near = out.image[row - 2 : row + 3, column - 2 : column + 3, i]
                    assert near.max() > 180
                    compared += 1
    assert compared > 60


def test_pasted_objects_bring_their_points_and_hide_those_below() -> None:
    image, points = figure(1)
    mask = np.ones((1, HEIGHT, WIDTH), np.uint8)
    picture = Picture(image, BOX, np.array([1]), mask, keypoints=points)
    other = Picture(*_mirrored(image, points), mask)
    other = Picture(other.image, BOX, np.array([1]), mask, keypoints=other.boxes)
    hidden = compared = 0
    for seed in range(20):
        out = copy_paste(picture, other, random.Random(seed))
        assert out.keypoints is not None and out.masks is not None
        assert (out.keypoints[0, :, :2] == points[0, :, :2]).all()
        for (x, y, v), before in zip(out.keypoints[0], points[0], strict=True):
            covered = bool(out.masks[1, int(y), int(x)])
            assert v == (min(before[2], 1) if covered else before[2])
            hidden += covered
        for i, (x, y, v) in enumerate(out.keypoints[1]):
            if v and 4 < x < WIDTH - 4 and 4 < y < HEIGHT - 4:
                assert out.image[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3, i].max() > 180
                compared += 1
    assert hidden and compared


def _mirrored(image: np.ndarray, points: np.ndarray) -> Any:
    """An image upside down, with its points in the place of boxes."""
    turned = points.copy()
    turned[..., 1] = HEIGHT - points[..., 1]
    return np.ascontiguousarray(image[::-1]), turned, np.array([1])
