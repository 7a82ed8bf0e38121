"""How well a grid of anchors covers the boxes of a data set, and a grid that covers them better.

Shape shorthand:
    N: boxes     L: levels     S: sizes a level     R: ratios (height / width)
The best anchor of a shape for a box is the one whose centre is nearest in x and in y, because the overlap of two
intervals of fixed lengths shrinks with the distance of their centres. So the best IoU needs one anchor a shape, not
the 200,000 of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from detection.data.records import Index

AREAS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}  # COCO, original pixels
ENOUGH = 0.9  # recall at IoU .5 below which another grid is proposed
FEW = 20  # a size group of fewer boxes is no reason to change the anchors
SAMPLE = 4000  # boxes that the search looks at


@dataclass(frozen=True, slots=True)
class Grid:
    """Anchors and the resizing that comes before them.

    Attributes:
        sizes: `L` tuples of `S` anchor sides in pixels of the resized image.
        strides: `L` distances between anchor centres, in pixels of the resized image.
        ratios: height / width of the anchors, the same on each level.
        min_size, max_size: the shorter side becomes `min_size` unless that makes the longer exceed `max_size`.
    """

    sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    min_size: int = 800
    max_size: int = 1333


@dataclass(frozen=True, slots=True)
class Boxes:
    """The boxes of a data set, `(N, 4)` xyxy, with the `(N, 2)` size (height, width) of the image of each."""

    xyxy: NDArray[np.float64]
    image_sizes: NDArray[np.float64]

    @classmethod
    def of(cls, index: Index) -> Boxes:
        """All boxes to train on: crowds are left out."""
        kept = [record.boxes[~record.iscrowd] for record in index.records]
        sizes = [(record.height, record.width) for record in index.records]
        counts = [len(boxes) for boxes in kept]
        return cls(
            np.concatenate([np.zeros((0, 4)), *kept]).astype(np.float64),
            np.repeat(np.asarray(sizes, np.float64).reshape(-1, 2), counts, axis=0),
        )

    @property
    def sides(self) -> NDArray[np.float64]:
        """`(N, 2)` width and height in original pixels."""
        return self.xyxy[:, 2:] - self.xyxy[:, :2]


def best_iou(boxes: Boxes, grid: Grid) -> NDArray[np.float64]:
    """`(N,)` IoU of each box with its best anchor, in the resized image; anchors are whole pixels, as torchvision's."""
    short, long = boxes.image_sizes.min(axis=1), boxes.image_sizes.max(axis=1)
    scale = np.minimum(grid.min_size / short, grid.max_size / long)[:, None]
    resized = np.floor(boxes.image_sizes[:, ::-1] * scale)
    # resizing rounds the image's sides down, so the two axes scale by slightly different factors
    xyxy = boxes.xyxy * np.tile(resized / boxes.image_sizes[:, ::-1], 2)
    centre, side = (xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]
    best = np.zeros(len(xyxy))
    for sizes, stride in zip(grid.sizes, grid.strides, strict=True):
        last = np.ceil(resized / stride) - 1
        nearest = np.clip(np.round(centre / stride), 0, last) * stride
        for size, ratio in product(sizes, grid.ratios):
            half = np.round(np.array([size / np.sqrt(ratio), size * np.sqrt(ratio)]) / 2)
            low = np.maximum(xyxy[:, :2], nearest - half)
            high = np.minimum(xyxy[:, 2:], nearest + half)
            overlap = np.clip(high - low, 0, None).prod(axis=1)
            best = np.maximum(best, overlap / (side.prod(axis=1) + 4 * half.prod() - overlap))
    return best


def recall(boxes: Boxes, grid: Grid) -> dict[str, dict[str, float]]:
    """Share of the boxes with an anchor of IoU >= .5 and >= .7, for all boxes and by COCO's size groups."""
    iou, area = best_iou(boxes, grid), boxes.sides.prod(axis=1)
    groups = {"all": np.ones(len(iou), bool)}
    groups |= {name: (area >= low) & (area < high) for name, (low, high) in AREAS.items()}
    return {
        name: {"boxes": int(group.sum())}
        | {f"recall_{t:g}": float((iou[group] >= t).mean()) if group.any() else float("nan") for t in (0.5, 0.7)}
        for name, group in groups.items()
    }


def covers(figures: dict[str, dict[str, float]]) -> bool:
    """Whether recall at IoU .5 is enough for all boxes and for each size group that has some."""
    return all(group["recall_0.5"] >= ENOUGH for group in figures.values() if group["boxes"] >= FEW)


def propose(boxes: Boxes, grid: Grid) -> Grid:
    """The smallest of a family of grids that recalls about as much as the best of the family.

    Sizes double from level to level, as strides do, with 1 to 3 sizes an octave, so that each level has as many anchors
    (the RPN's head is shared). The ratios are the grid's own or three quantiles of the data's.

    Args:
        boxes: at least one.
        grid: its strides and resizing are kept.
    """
    step = -(-len(boxes.xyxy) // SAMPLE)
    sample = Boxes(boxes.xyxy[::step], boxes.image_sizes[::step])
    shapes = [grid.ratios, _ratios(sample)]
    found: list[tuple[float, int, Grid]] = []
    for half_octaves, octave, ratios in product(range(5, 15), (1, 2, 3), shapes):
        first = [2.0 ** (half_octaves / 2 + i / octave) for i in range(octave)]
        sizes = tuple(tuple(round(s * stride / grid.strides[0], 1) for s in first) for stride in grid.strides)
        candidate = replace(grid, sizes=sizes, ratios=ratios)
        iou = best_iou(sample, candidate)
        found.append((float((iou >= 0.5).mean() + (iou >= 0.7).mean()) / 2, octave * len(ratios), candidate))
    most = max(score for score, _, _ in found)
    return min((f for f in found if f[0] >= most - 0.02), key=lambda f: (f[1], -f[0]))[2]


def _ratios(boxes: Boxes) -> tuple[float, ...]:
    sides = boxes.sides
    quantiles: Sequence[float] = np.quantile(np.log(sides[:, 1] / sides[:, 0]), (1 / 6, 1 / 2, 5 / 6)).tolist()
    return tuple(dict.fromkeys(round(float(np.exp(q)), 2) for q in quantiles))
