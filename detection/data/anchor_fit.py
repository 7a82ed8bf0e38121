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
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray

from detection.anchors import AnchorGenerator, default_anchors
from detection.data.records import DataError, Index

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
        offset, round_anchors: see `detection.AnchorGenerator`.
    """

    sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    min_size: int = 800
    max_size: int = 1333
    offset: float = 0.0
    round_anchors: bool = True

    @classmethod
    def of(cls, generator: AnchorGenerator, strides: Sequence[int], min_size: int, max_size: int) -> Grid:
        """The grid that a generator lays.

        Raises:
            DataError: its levels are not as many as the strides, or differ in their ratios.
        """
        how: dict[str, Any] = generator.recipe["init_args"]  # type: ignore[index, assignment]
        given = how["aspect_ratios"]
        by_level = {tuple(level) for level in given} if isinstance(given[0], list) else {tuple(given)}
        if len(generator.sizes) != len(strides) or len(by_level) > 1:
            raise DataError(
                f"anchors: these of {len(generator.sizes)} levels can't be judged on strides {tuple(strides)}: give as "
                "many sizes as strides, and the same ratios on each level"
            )
        ratios = tuple(1 / r if how["ratio_is_width_over_height"] else r for r in by_level.pop())
        return cls(generator.sizes, tuple(strides), ratios, min_size, max_size, how["offset"], how["round_anchors"])


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
    """`(N,)` IoU of each box with its best anchor, in the resized image; see `Grid`."""
    short, long = boxes.image_sizes.min(axis=1), boxes.image_sizes.max(axis=1)
    scale = np.minimum(grid.min_size / short, grid.max_size / long)[:, None]
    resized = np.floor(boxes.image_sizes[:, ::-1] * scale)
    # resizing rounds the image's sides down, so the two axes scale by slightly different factors
    xyxy = boxes.xyxy * np.tile(resized / boxes.image_sizes[:, ::-1], 2)
    centre, side = (xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]
    best = np.zeros(len(xyxy))
    for sizes, stride in zip(grid.sizes, grid.strides, strict=True):
        last = np.ceil(resized / stride) - 1
        nearest = (np.clip(np.round(centre / stride - grid.offset), 0, last) + grid.offset) * stride
        for size, ratio in product(sizes, grid.ratios):
            half = np.array([size / np.sqrt(ratio), size * np.sqrt(ratio)]) / 2
            half = np.round(half) if grid.round_anchors else half
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
    (the RPN's head is shared). With fewer than five levels each may span more than an octave. The ratios are the grid's
    own or three quantiles of the data's.

    Args:
        boxes: at least one.
        grid: its strides and resizing are kept.
    """
    step = -(-len(boxes.xyxy) // SAMPLE)
    sample = Boxes(boxes.xyxy[::step], boxes.image_sizes[::step])
    shapes = [grid.ratios, _ratios(sample)]
    found: list[tuple[float, int, Grid]] = []
    spans = range(1, max(2, 7 - len(grid.strides)))
    for half_octaves, octave, span, ratios in product(range(5, 15), (1, 2, 3), spans, shapes):
        first = [2.0 ** (half_octaves / 2 + i / octave) for i in range(octave * span)]
        sizes = tuple(tuple(round(s * stride / grid.strides[0], 1) for s in first) for stride in grid.strides)
        candidate = replace(grid, sizes=sizes, ratios=ratios)
        iou = best_iou(sample, candidate)
        found.append((float((iou >= 0.5).mean() + (iou >= 0.7).mean()) / 2, len(first) * len(ratios), candidate))
    most = max(score for score, _, _ in found)
    return min((f for f in found if f[0] >= most - 0.02), key=lambda f: (f[1], -f[0]))[2]


def fitted(boxes: Boxes, grid: Grid) -> Grid:
    """The grid itself where it covers the boxes or none that is proposed is better, else the one proposed.

    Better is one that recalls more of all boxes, and at IoU .5 as many at the least.
    """
    if not len(boxes.xyxy) or covers(recall(boxes, grid)):
        return grid
    better = propose(boxes, grid)
    before, after = recall(boxes, grid)["all"], recall(boxes, better)["all"]
    gains = [after[name] - before[name] for name in ("recall_0.5", "recall_0.7")]
    return better if gains[0] >= 0 and sum(gains) > 0 else grid


def generator_for(
    index: Index, strides: Sequence[int] = (4, 8, 16, 32, 64), min_size: int = 800, max_size: int = 1333
) -> AnchorGenerator:
    """Anchors for the boxes of a training split: the default ones where they cover these, else those that do better.

    Args:
        index: the training split.
        strides: of the detector's maps, `detector.strides`.
        min_size, max_size: of the images as they are trained on, in pixels.
    """
    boxes = Boxes.of(index)
    usual = Grid.of(default_anchors(len(strides)), strides, min_size, max_size)
    chosen = fitted(boxes, usual)
    if len(boxes.xyxy):
        shares = [100 * recall(boxes, grid)["all"]["recall_0.5"] for grid in (chosen, usual)]
        which = "the default ones" if chosen == usual else f"sizes {chosen.sizes}, ratios {chosen.ratios}"
        rank_zero_info(
            f"anchors for {len(boxes.xyxy)} boxes at min_size {min_size}, max_size {max_size}: {which}; "
            f"{shares[0]:.1f} % of the boxes have one of IoU >= .5 (of the default ones {shares[1]:.1f} %)"
        )
    return AnchorGenerator(chosen.sizes, chosen.ratios)


def _ratios(boxes: Boxes) -> tuple[float, ...]:
    sides = boxes.sides
    quantiles: Sequence[float] = np.quantile(np.log(sides[:, 1] / sides[:, 0]), (1 / 6, 1 / 2, 5 / 6)).tolist()
    return tuple(dict.fromkeys(round(float(np.exp(q)), 2) for q in quantiles))
