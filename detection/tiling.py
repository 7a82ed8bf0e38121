"""Tiles of large images: where they lie, which boxes their borders cut, and each object once again.

Training, evaluation and prediction look at the same tiles by the same rule. An object on the border of two tiles is
seen by both, whole or in part. Two detections of a class from different tiles are one object if what both tiles could
see of it agrees: cut to the tiles' common window, their boxes have an IoU of at least `iou_thresh`. Of the two the one
that no border cuts stays, or the better one; if borders cut both, they are parts of something larger than the overlap,
and their union stays. What is taught of a cut object follows from that, see `detection.data.tiled`.

Shape shorthand:
    D: detections of all tiles
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import mask as mask_api
from numpy.typing import NDArray

from detection.data import rle

Window = tuple[int, int, int, int]  # xyxy in whole pixels of the image
Floats = NDArray[np.float32]
NEAR = 2.0  # pixels: a box that ends so close to a border of its tile was cut by it
AGREE = 0.5  # IoU from which two views are of one object


@dataclass(frozen=True)
class Tiling:
    """Square windows over an image; one that fits a tile is a single window, itself.

    Args:
        size: side in pixels. The detector resizes a tile like any image, so a side near its `min_size` keeps scale.
        overlap: of neighbours, as share of the side, at least; in [0, 1).
    """

    size: int
    overlap: float = 0.2

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < 1:
            raise ValueError(f"tiles of {self.size} pixels with an overlap of {self.overlap}: give a size, and 0 to 1")

    def __str__(self) -> str:
        return f"tiles of {self.size} pixels, overlap {self.overlap:g}"

    def windows(self, height: int, width: int) -> list[Window]:
        """Windows xyxy that cover the image, row by row, evenly spread."""
        rows, columns = (self._starts(side) for side in (height, width))
        return [(x, y, min(x + self.size, width), min(y + self.size, height)) for y in rows for x in columns]

    def _starts(self, side: int) -> list[int]:
        if side <= self.size:
            return [0]
        step = max(1, int(self.size * (1 - self.overlap)))
        count = -(-(side - self.size) // step) + 1
        return [round(i * (side - self.size) / (count - 1)) for i in range(count)]


def is_cut(boxes: Floats, seen: Floats, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Whether a border of its tile cuts a box: it ends at most `NEAR` pixels from one that is not the image's edge.

    Args:
        boxes: `(..., 4)` xyxy in pixels of the image, inside their tiles.
        seen: `(..., 4)`, the tile of each.
        size: (height, width) of the image.

    Returns:
        `(...)`.
    """
    edge = np.array([0, 0, size[1], size[0]], np.float32)
    return np.asarray(((np.abs(boxes - seen) <= NEAR) & (np.abs(seen - edge) > 0)).any(axis=-1))


def merge_tiles(
    parts: Sequence[Mapping[str, Any]],
    windows: Sequence[Window],
    size: tuple[int, int],
    iou_thresh: float = AGREE,
) -> dict[str, Any]:
    """What was found in the tiles of an image as what is in the image, each object once, best first.

    Args:
        parts: of each tile `boxes` `(D, 4)` in its own pixels, `labels` and `scores` `(D,)`, and `masks`, COCO RLE of
            the tile, or None. Where they have `keypoints` `(D, k, 3)`, in their own pixels too, and `keypoint_scores`,
            those of the view that stays are kept.
        windows: of the tiles.
        size: (height, width) of the image.
        iou_thresh: from which two views agree.

    Returns:
        The same names, in pixels of the image; `masks` is a tuple or None, and key points are there if they were given.
    """
    counts = [len(part["labels"]) for part in parts]
    seen = np.repeat(np.array(windows, np.float32).reshape(-1, 4), counts, axis=0)
    boxes = np.concatenate([part["boxes"] for part in parts]) + seen[:, [0, 1, 0, 1]]
    labels, scores = (np.concatenate([part[name] for part in parts]) for name in ("labels", "scores"))
    masks = None
    if all(part["masks"] is not None for part in parts):
        pairs = zip(parts, windows, strict=True)
        masks = [shift_mask(mask, (x, y), size) for part, (x, y, *_) in pairs for mask in part["masks"]]
    kept, boxes, scores, masks = _merge(boxes, labels, scores, seen, masks, size, iou_thresh)
    order = np.argsort(-scores[kept], kind="stable")
    kept = kept[order]
    merged = {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}
    points = {name: values[kept] for name, values in _points(parts, windows).items()}
    return merged | points | {"masks": None if masks is None else tuple(masks[i] for i in kept)}


def _points(parts: Sequence[Mapping[str, Any]], windows: Sequence[Window]) -> dict[str, Floats]:
    """The key points of all tiles in pixels of the image, and their scores; empty without any."""
    if any(part.get("keypoints") is None for part in parts):
        return {}
    pairs = zip(parts, windows, strict=True)
    moved = [part["keypoints"] + np.array([x, y, 0], np.float32) for part, (x, y, *_) in pairs]
    scores = np.concatenate([part["keypoint_scores"] for part in parts])
    return {"keypoints": np.concatenate(moved), "keypoint_scores": scores}


def _merge(
    boxes: Floats,
    labels: NDArray[np.int64],
    scores: Floats,
    seen: Floats,
    masks: list[dict[str, Any]] | None,
    size: tuple[int, int],
    iou_thresh: float,
) -> tuple[NDArray[np.int64], Floats, Floats, list[dict[str, Any]] | None]:
    """Which detections stay of those of an image's windows, in which an object may occur several times.

    Two detections of one class in different windows are one object where they agree, see `_agreement`. Detections that
    no window cuts are taken first, and stay as they are. Two that are cut are united.

    Args:
        boxes: `(D, 4)` in pixels of the image.
        labels, scores: `(D,)`.
        seen: `(D, 4)`, the window of each.
        masks: of each, over the whole image, or None.
        size: (height, width) of the image.
        iou_thresh: IoU from which two agree.

    Returns:
        the positions of those that stay; boxes, scores and masks of all, those that stay changed.
    """
    cut = is_cut(boxes, seen, size)
    boxes, scores, seen = boxes.copy(), scores.copy(), seen.copy()
    kept: list[int] = []
    for i in np.lexsort((-scores, cut)):  # whole ones first, the best of them first
        others = np.array(kept, dtype=np.int64)
        others = others[(labels[others] == labels[i]) & (seen[others] != seen[i]).any(axis=1)]
        agreement = _agreement(boxes[i], seen[i], boxes[others], seen[others])
        if not len(agreement) or agreement.max() < iou_thresh:
            kept.append(int(i))
            continue
        j = others[agreement.argmax()]
        scores[j] = max(scores[i], scores[j])
        if cut[i] and cut[j]:  # and stays so: more parts may come
            boxes[j], seen[j] = _union(boxes[i], boxes[j]), _union(seen[i], seen[j])
            if masks is not None:
                masks[j] = mask_api.merge([masks[i], masks[j]])
    return np.array(kept, np.int64), boxes, scores, masks


def _agreement(box: Floats, window: Floats, boxes: Floats, windows: Floats) -> Floats:
    """IoU of one box and each of the boxes `(D, 4)`, all cut to what both windows show; 0 where that is nothing."""
    low, high = np.maximum(window[:2], windows[:, :2]), np.minimum(window[2:], windows[:, 2:])

    def clip(given: Floats) -> tuple[Floats, Floats]:
        return np.clip(given[..., :2], low, high), np.clip(given[..., 2:], low, high)

    (a1, a2), (b1, b2) = clip(box), clip(boxes)
    area_a, area_b = (np.prod(np.maximum(end - start, 0), axis=1) for start, end in ((a1, a2), (b1, b2)))
    common = np.prod(np.maximum(np.minimum(a2, b2) - np.maximum(a1, b1), 0), axis=1)
    apart = (high <= low).any(axis=1)
    return np.asarray(np.where(apart, 0, common / np.maximum(area_a + area_b - common, 1e-6)), np.float32)


def _union(a: Floats, b: Floats) -> Floats:
    return np.concatenate((np.minimum(a[:2], b[:2]), np.maximum(a[2:], b[2:])))


def shift_mask(mask: dict[str, Any], corner: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """The RLE of a window's mask as one of the whole image, without laying it out.

    Args:
        mask: of the window.
        corner: (x, y) of the window's first pixel.
        size: (height, width) of the image.
    """
    return rle.encode_window(rle.decode(mask), corner, size)
