"""Draws stick figures with five key points as a COCO data set, to learn key points from in minutes on a CPU.

A figure faces the viewer: its left hand is on the right. So a detector has to tell left from right by where they are,
and a mirror image that kept their names would teach it the wrong ones.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.data.records import Index, Record
from detection.data.skeletons import Skeleton, pairs_by_name
from detection.data.writers import write_coco

CLASSES = ("figure",)
NAMES = ("head", "left_hand", "right_hand", "left_foot", "right_foot")
EDGES = ((0, 1), (0, 2), (0, 3), (0, 4))
SKELETON = Skeleton(NAMES, pairs_by_name(NAMES), EDGES)
SIDE = 128  # pixels of a picture
ANNOTATIONS = "annotations/{}.json"
# Of a figure of height 1 that stands on the middle of its feet: head, left and right hand, left and right foot.
POSE = np.array([[0, -0.88], [0.36, -0.5], [-0.36, -0.5], [0.2, 0], [-0.2, 0]])


def draw_figures(root: Path, train: int = 200, val: int = 40, seed: int = 0) -> Path:
    """Write `train` and `val` pictures of one or two figures each and their `annotations/*.json`; gives the folder.

    Args:
        root: folder to make.
        train, val: how many pictures.
        seed: of all that is drawn.
    """
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        (root / split).mkdir(exist_ok=True)
        records = [_record(root, split, i, np.random.default_rng([seed, number, i])) for i in range(count)]
        write_coco(Index(root, CLASSES, (1,), records, skeleton=SKELETON), root / ANNOTATIONS.format(split))
    return root


def _record(root: Path, split: str, number: int, rng: np.random.Generator) -> Record:
    image, points = draw_figure(rng)
    name = f"{split}/{number:04d}.png"
    cv2.imwrite(str(root / name), image[..., ::-1])
    low, high = points[..., :2].min(axis=1), points[..., :2].max(axis=1)
    rim = np.array([2, 2]) + 0.1 * (high - low) * (0, 1)  # the head has a size
    boxes = np.concatenate([low - rim, high + 2], axis=1).clip(0, SIDE)
    return Record.of(number + 1, name, (SIDE, SIDE), boxes, np.ones(len(points)), points)


def draw_figure(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """One picture `(SIDE, SIDE, 3)` and the key points `(N, 5, 3)` of its figures, which stand side by side.

    A hand in ten is behind the back: it is not drawn, and its point is hidden.
    """
    ground = cv2.resize(rng.integers(40, 120, (6, 6, 3), np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    image: NDArray[np.uint8] = np.asarray(ground, np.uint8)
    count = int(rng.integers(1, 3))
    figures = []
    for i in range(count):
        height = rng.uniform(40, 60) if count > 1 else rng.uniform(50, 95)
        middle = SIDE * (i + 0.5) / count + rng.uniform(-6, 6)
        pose = POSE + rng.uniform(-0.08, 0.08, POSE.shape)
        places = pose * height + (middle, rng.uniform(0.8, 0.9) * SIDE)
        seen = np.where(np.isin(np.arange(5), (1, 2)) & (rng.random(5) < 0.1), 1, 2)
        colour = tuple(int(value) for value in rng.integers(170, 256, 3))
        _draw(image, places, seen, height, colour)
        figures.append(np.column_stack((places, seen)))
    return image, np.stack(figures).astype(np.float32)


def _draw(
    image: NDArray[np.uint8],
    places: NDArray[np.float64],
    seen: NDArray[np.int64],
    height: float,
    colour: tuple[int, ...],
) -> None:
    head, *limbs = (places * 16).round().astype(int).tolist()  # in sixteenths of a pixel
    neck, hip = (head[0], head[1] + round(2.5 * height)), (head[0], head[1] + round(8 * height))
    width = max(1, round(height / 22))
    cv2.line(image, neck, hip, colour, width, cv2.LINE_AA, 4)
    for i, limb in enumerate(limbs, 1):
        if seen[i] == 2:
            cv2.line(image, neck if i < 3 else hip, limb, colour, width, cv2.LINE_AA, 4)
    cv2.circle(image, head, round(1.6 * height), colour, -1, cv2.LINE_AA, 4)
