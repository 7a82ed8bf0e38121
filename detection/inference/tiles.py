"""Large images in overlapping tiles, each object found once.

An object on the border of two tiles is seen by both, whole or in part. Two detections of a class from different tiles
are one object if what both tiles could see of it agrees: cut to the tiles' common window, their boxes have an IoU of at
least `iou_thresh`. Of the two the one that no border cuts stays, or the better one; if borders cut both, they are parts
of something larger than the overlap, and their union stays.

Shape shorthand:
    D: detections of all tiles
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from faster_coco_eval import mask as mask_api
from numpy.typing import NDArray

from detection.data import rle
from detection.inference.detections import Detections

Floats = NDArray[np.float32]
NEAR = 2.0  # pixels: a box that ends so close to a border of its tile was cut by it


@dataclass(frozen=True)
class Tiles:
    """Square windows over an image; one that fits a tile is a single window, itself.

    Args:
        size: side in pixels. The detector resizes a tile like any image, so a side near its `min_size` keeps scale.
        overlap: of neighbours, as share of the side, at least; in [0, 1).
        iou_thresh: from which two views agree.
    """

    size: int
    overlap: float = 0.2
    iou_thresh: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < 1:
            raise ValueError(f"tiles of {self.size} pixels with an overlap of {self.overlap}: give a size, and 0 to 1")

    def windows(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Windows xyxy that cover the image, row by row, evenly spread."""
        rows, columns = (self._starts(side) for side in (height, width))
        return [(x, y, min(x + self.size, width), min(y + self.size, height)) for y in rows for x in columns]

    def _starts(self, side: int) -> list[int]:
        if side <= self.size:
            return [0]
        step = max(1, int(self.size * (1 - self.overlap)))
        count = -(-(side - self.size) // step) + 1
        return [round(i * (side - self.size) / (count - 1)) for i in range(count)]

    def merge(
        self, parts: Sequence[Detections], windows: Sequence[tuple[int, int, int, int]], size: tuple[int, int]
    ) -> Detections:
        """The detections of an image of `size` (height, width) from those of its windows."""
        counts = [len(part) for part in parts]
        window = np.repeat(np.array(windows, np.float32).reshape(-1, 4), counts, axis=0)
        boxes = np.concatenate([p.boxes for p in parts]) + window[:, [0, 1, 0, 1]]
        labels, scores = (np.concatenate([getattr(p, name) for p in parts]) for name in ("labels", "scores"))
        masks = None
        if all(part.masks is not None for part in parts):
            pairs = zip(parts, windows, strict=True)
            masks = [shift_mask(m, (w[0], w[1]), size) for part, w in pairs for m in part.masks or ()]
        points = _in_image(parts, windows)
        found = _merge(boxes, labels, scores, window, masks, size, self.iou_thresh, points)
        final = replace(parts[0], **found, size=size)
        return final.take(np.argsort(-final.scores, kind="stable"))


def _in_image(parts: Sequence[Detections], windows: Sequence[tuple[int, int, int, int]]) -> dict[str, Any]:
    """The key points of all windows in pixels of the image, and their scores; empty without any."""
    pairs = zip(parts, windows, strict=True)
    moved = [p.keypoints + np.array([*w[:2], 0], np.float32) for p, w in pairs if p.keypoints is not None]
    certain = [part.keypoint_scores for part in parts if part.keypoint_scores is not None]
    return {"keypoints": np.concatenate(moved), "keypoint_scores": np.concatenate(certain)} if moved else {}


def _merge(
    boxes: Floats,
    labels: NDArray[np.int64],
    scores: Floats,
    seen: Floats,
    masks: list[dict[str, Any]] | None,
    size: tuple[int, int],
    iou_thresh: float,
    points: dict[str, Any],
) -> dict[str, Any]:
    """The detections of an image, each object once, from those of its windows, in which it may occur several times.

    Two detections of one class in different windows are one object where they agree, see `_agreement`. Detections that
    no window cuts are taken first, and stay as they are. Two that are cut are united.

    Args:
        boxes: `(D, 4)` in pixels of the image.
        labels, scores: `(D,)`.
        seen: `(D, 4)`, the window of each.
        masks: of each, over the whole image, or None.
        size: (height, width) of the image.
        iou_thresh: IoU from which two agree.
        points: further arrays of which the row of a detection that is kept stays.

    Returns:
        The fields of `Detections`.
    """
    edge = np.array([0, 0, size[1], size[0]], np.float32)
    cut = ((np.abs(boxes - seen) <= NEAR) & (np.abs(seen - edge) > 0)).any(axis=1)
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
    chosen = None if masks is None else tuple(masks[i] for i in kept)
    chosen_points = {name: values[kept] for name, values in points.items()}
    return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept], "masks": chosen} | chosen_points


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
