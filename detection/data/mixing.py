"""Several pictures as one, each with its objects: mosaics, and objects cut out of one and pasted onto another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.data.augment import ScaleJitter, View
from detection.data.pipeline import boxes_around
from detection.data.skeletons import inside
from detection.data.spectral import Pixels

IGNORED = 0  # in the place of a label: an ignore region


class Picture(NamedTuple):
    """An image with its objects, and the regions in which there may be others.

    Attributes:
        image: `(H, W, C)` uint8 or uint16.
        boxes: `(N, 4)` float32 xyxy pixels.
        labels: `(N,)` int64, `IGNORED` for regions.
        masks: `(N, H, W)` uint8 0/1, or None.
        labelled: `(C,)` bool, the classes of which all objects are here, or None for all.
        keypoints: `(N, k, 3)` float32 x, y and visibility, or None.
    """

    image: Pixels
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.uint8] | None
    labelled: NDArray[np.bool_] | None = None
    keypoints: NDArray[np.float32] | None = None


def mosaic(pictures: Sequence[Picture], rng: random.Random) -> Picture:
    """Four pictures as one of the first one's size (Bochkovskiy et al. 2020, section 3.3).

    They meet at a random point of the middle; each fills its quarter, scaled by the smallest factor that does, cut at
    random where it is longer. Objects keep what is left of their boxes; those of which nothing is left have empty ones.
    """
    height, width = pictures[0].image.shape[:2]
    if min(height, width) < 2:  # which nothing can be put together to
        return pictures[0]
    x, y = (min(max(round(side * rng.uniform(0.3, 0.7)), 1), side - 1) for side in (width, height))
    quarters = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    canvas, boxes, masks, points = np.empty_like(pictures[0].image), [], [], []
    for picture, (x1, y1, x2, y2) in zip(pictures, quarters, strict=True):
        h, w = picture.image.shape[:2]
        scale = max((y2 - y1) / h, (x2 - x1) / w)
        cut_h, cut_w = (min(n, max(1, round(m / scale))) for n, m in ((h, y2 - y1), (w, x2 - x1)))
        left, top = rng.randint(0, w - cut_w), rng.randint(0, h - cut_h)
        view = View((left, top, left + cut_w, top + cut_h), (y2 - y1, x2 - x1))
        part = picture.image[top : top + cut_h, left : left + cut_w]
        canvas[y1:y2, x1:x2] = _resized(part, y2 - y1, x2 - x1)
        boxes.append(view.boxes(picture.boxes) + np.array([x1, y1] * 2, dtype=np.float32))
        if picture.masks is not None:
            masks.append(np.zeros((len(picture.boxes), height, width), np.uint8))
            masks[-1][:, y1:y2, x1:x2] = view.masks(picture.masks)
        if picture.keypoints is not None:
            points.append(_shifted(view.keypoints(picture.keypoints), x1, y1))
    labels = np.concatenate([picture.labels for picture in pictures])
    known = [picture.labelled for picture in pictures if picture.labelled is not None]
    everywhere = np.logical_and.reduce(known) if known else None
    all_masks, all_points = np.concatenate(masks) if masks else None, np.concatenate(points) if points else None
    return Picture(canvas, np.concatenate(boxes), labels, all_masks, everywhere, all_points)


def _shifted(keypoints: NDArray[np.float32], x: int, y: int) -> NDArray[np.float32]:
    """Key points `(N, k, 3)` moved by whole pixels; zeros stay zeros."""
    return keypoints + np.array([x, y, 0], np.float32) * (keypoints[..., 2:] > 0)


def _resized(image: Pixels, height: int, width: int) -> Pixels:
    """Bilinear; OpenCV would leave the axis of a single channel out."""
    resized: Any = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized.reshape(height, width, image.shape[2]))


PASTE_SCALES = (0.5, 2.0)  # of the picture that gives, fitted into the one that takes


def copy_paste(picture: Picture, other: Picture, rng: random.Random) -> Picture:
    """Some objects of another picture, cut out by their masks and pasted onto this one (Ghiasi et al. 2021, section 3).

    The other picture is scaled at random and laid at a random place first. What is covered loses that part of its mask,
    and its box shrinks to the rest; objects of which nothing is left have empty boxes. Key points that are covered
    become hidden ones.

    Args:
        picture, other: both with masks.
        rng: chooses the objects, at least one of those there are, and where they go.
    """
    if picture.masks is None or other.masks is None:
        raise ValueError("copy-paste cuts objects out by their masks, but the pictures have none")
    objects = np.flatnonzero(other.labels != IGNORED).tolist()
    if not objects:
        return picture
    height, width = picture.image.shape[:2]
    chosen = sorted(rng.sample(objects, rng.randint(1, len(objects))))
    view = ScaleJitter(max(height, width), PASTE_SCALES)(other.image.shape[0], other.image.shape[1], rng)
    h, w = min(view.size[0], height), min(view.size[1], width)
    y, x = rng.randint(0, height - h), rng.randint(0, width - w)
    x1, y1, x2, y2 = view.window
    layer = _resized(other.image[y1:y2, x1:x2], *view.size)[:h, :w]
    pasted = np.zeros((len(chosen), height, width), np.uint8)
    pasted[:, y : y + h, x : x + w] = view.masks(other.masks[chosen])[:, :h, :w]
    covered = np.asarray(pasted.any(axis=0))
    image, boxes, masks = picture.image.copy(), picture.boxes.copy(), picture.masks * ~covered
    image[y : y + h, x : x + w][covered[y : y + h, x : x + w]] = layer[covered[y : y + h, x : x + w]]
    hit = (masks != picture.masks).any(axis=(1, 2))
    boxes[hit] = boxes_around(masks[hit])
    points = None
    if picture.keypoints is not None and other.keypoints is not None:
        given = _shifted(view.keypoints(other.keypoints[chosen]), x, y)
        points = np.concatenate([_hidden(picture.keypoints, covered), inside(given, height, width)])
    return Picture(
        image,
        np.concatenate([boxes, boxes_around(pasted)]),
        np.concatenate([picture.labels, other.labels[chosen]]),
        np.concatenate([masks, pasted]),
        picture.labelled,
        points,
    )


def _hidden(keypoints: NDArray[np.float32], covered: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Key points `(N, k, 3)`, where those on a pixel that is covered are hidden."""
    last = np.array(covered.shape[::-1]) - 1
    columns, rows = np.moveaxis(np.minimum(keypoints[..., :2].astype(np.int64), last), -1, 0)
    hidden = keypoints.copy()
    hidden[..., 2] = np.where(covered[rows, columns], np.minimum(keypoints[..., 2], 1), keypoints[..., 2])
    return hidden
