"""Object keypoint similarity (https://cocodataset.org/#keypoints-eval), which takes the place of IoU for key points.

Shape shorthand:
    P: pairs of a detection and an object     k: key points
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 20  # detections of an image and class that COCO counts
THRESHOLDS = {"": slice(None), "_50": slice(0, 1), "_75": slice(5, 6)}
SIZES = {"_medium": 2, "_large": 3}  # places in `AREAS`; small objects have no key points in COCO, and no figure


def similarity(
    found: NDArray[np.float64],
    points: NDArray[np.float64],
    boxes: NDArray[np.float64],
    areas: NDArray[np.float64],
    sigmas: Sequence[float],
) -> NDArray[np.float64]:
    """`(P,)` in [0, 1]: the mean over the annotated points of exp(-d^2 / (2 s^2 (2 sigma)^2)), s^2 the object's area.

    Of an object without annotated points the distance is that to its box, doubled about its middle to all sides: it is
    not counted, and excuses the detections on it.

    Args:
        found: `(P, k, 3)` detected points.
        points: `(P, k, 3)` annotated ones, x, y and visibility.
        boxes: `(P, 4)` x, y, width, height of the objects.
        areas: `(P,)` of the objects.
        sigmas: k.
    """
    seen = np.asarray(points[..., 2] > 0)
    low, high = boxes[:, None, :2] - boxes[:, None, 2:], boxes[:, None, :2] + 2 * boxes[:, None, 2:]
    outside = np.maximum(low - found[..., :2], 0) + np.maximum(found[..., :2] - high, 0)
    none = np.asarray(~seen.any(axis=1))
    apart = np.where(none[:, None, None], outside, found[..., :2] - points[..., :2])
    variances = np.square(2 * np.asarray(sigmas, np.float64))
    error = np.square(apart).sum(axis=2) / variances / (areas[:, None] + np.spacing(1)) / 2
    counted = seen | none[:, None]
    return np.asarray((np.exp(-error) * counted).sum(axis=1) / counted.sum(axis=1))


def extents(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(D,)` the area of the box around the detected points `(D, k, 3)`, by which COCO sorts detections by size."""
    if not points.size:
        return np.zeros(len(points))
    return np.asarray((points[..., :2].max(axis=1) - points[..., :2].min(axis=1)).prod(axis=1))


def figures(precision: NDArray[Any], recall: NDArray[Any], mean: Any) -> dict[str, float]:
    """COCO's ten: AP, at OKS .50 and .75, of medium and large objects, and AR likewise.

    Args:
        precision: `(T, R, C, A, 1)`.
        recall: `(T, C, A, 1)`.
        mean: of the entries that have ground truth.
    """
    of_all: dict[str, float] = {}
    for name, values in (("map", precision), ("mar", recall)):
        of_all |= {name + end: mean(values[at, ..., 0, 0]) for end, at in THRESHOLDS.items()}
        of_all |= {name + end: mean(values[..., area, 0]) for end, area in SIZES.items()}
    return of_all
