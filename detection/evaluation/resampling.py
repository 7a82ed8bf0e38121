"""COCO's figures of many drawn sets of images at once: images are matched once, and then only weighed.

A drawn set takes each image as often as its weight says. Detections are sorted by score once; the curves of a draw are
running sums of their images' weights. Copies of an image follow each other, so that of detections with equal scores
all copies of the one come before those of the next; all else is what the official evaluator says of a list in which
the images are repeated. A class without objects in a draw has no figures there (NaN), and the means over classes leave
it out, as COCO does.

Shape shorthand:
    S: draws     I: images     U: what is weighed, the images of one run or of several     C: classes     F: figures
    T: IoU thresholds     A: area ranges     n: detections of a class     N: objects of a class
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.evaluation.coco_eval import AREAS, IOU_THRESHOLDS, RECALL_THRESHOLDS, Bools, Floats, Ints, Judged

AT_ONCE = 1 << 22  # weights of detections in memory
T50, T75 = 0, 5  # places of .50 and .75 in `IOU_THRESHOLDS`


def figure_names(limits: Sequence[int]) -> list[str]:
    """The F names of COCO's figures, as `MeanAP` has them of boxes, for the limits of detections."""
    names = ["map", "map_50", "map_75", *(f"map_{area}" for area in AREAS[1:])]
    return [*names, *(f"mar_{limit}" for limit in limits), *(f"mar_{area}" for area in AREAS[1:])]


def drawn(
    classes: Sequence[Judged], num_classes: int, weights: NDArray[Any], objects: NDArray[Any], limits: Sequence[int]
) -> tuple[Floats, Floats]:
    """COCO's figures `(S, F)` of each draw, and the AP of each class `(S, C)`; NaN where a draw has no object for it.

    Args:
        classes: of `judge`, or of `pooled`.
        num_classes: C.
        weights: `(S, U)` how often the detections of a unit are in the draw, whole numbers.
        objects: `(S, I)` how often the objects of an image are.
        limits: of detections of one class in one image, the last is that of all figures but recall at the others.
    """
    names = figure_names(limits)
    total, known = np.zeros((len(weights), len(names))), np.zeros((len(weights), len(names)), np.int64)
    class_ap = np.full((len(weights), num_classes), np.nan)
    for judged in classes:
        step = max(1, AT_ONCE // (len(judged.image) + len(judged.gt_image) + 1))
        for start in range(0, len(weights), step):
            draws = slice(start, start + step)
            own = _figures(judged, weights[draws], objects[draws], limits)
            class_ap[draws, judged.label - 1] = own[:, 0]
            total[draws] += np.nan_to_num(own)
            known[draws] += ~np.isnan(own)
    return np.divide(total, known, out=np.full(total.shape, np.nan), where=known > 0), class_ap


def pooled(runs: Sequence[Sequence[Judged]], images: int) -> list[Judged]:
    """The detections of several runs on the same images in one list; unit `r * images + i` is image i of run r.

    Args:
        runs: of each what `judge` gives, for the same objects.
        images: I.
    """
    merged = []
    for same in zip(*runs, strict=True):
        order = np.argsort(-np.concatenate([judged.scores for judged in same]), kind="stable")
        columns = {name: np.concatenate([getattr(j, name) for j in same], -1)[..., order] for name in POOLED}
        unit = np.concatenate([judged.image + r * images for r, judged in enumerate(same)])[order]
        merged.append(Judged(same[0].label, unit, gt_image=same[0].gt_image, counted=same[0].counted, **columns))
    return merged


POOLED = ("rank", "scores", "tp", "fp")


def _figures(judged: Judged, weights: NDArray[Any], objects: NDArray[Any], limits: Sequence[int]) -> Floats:
    """`(S, F)` of one class."""
    total = np.stack([objects[:, judged.gt_image[own]].sum(1) for own in judged.counted], 1).astype(np.float64)
    own = weights[:, judged.image]
    precision = np.empty((len(weights), len(IOU_THRESHOLDS), len(AREAS)))
    recall = np.empty_like(precision)
    with np.errstate(invalid="ignore", divide="ignore"):
        for a in range(len(AREAS)):
            base = _Counted(own, judged.tp[-1, a] | judged.fp[-1, a])
            for t in range(len(IOU_THRESHOLDS)):
                tp = np.flatnonzero(judged.tp[t, a])
                tps = np.cumsum(own[:, tp], 1, dtype=np.float64)
                counted = base.until(tp, judged.tp[t, a] | judged.fp[t, a])
                precision[:, t, a], recall[:, t, a] = _average(tps, counted, total[:, a])
        fewer = []
        for limit in limits[:-1]:
            first = judged.tp[:, 0] & (judged.rank < limit)
            hits = np.stack([own[:, row].sum(1) for row in first], 1) / total[:, :1]
            fewer.append(hits.mean(1))
    means = precision.mean(1)
    aps = [means[:, 0], precision[:, T50, 0], precision[:, T75, 0], *means[:, 1:].T]
    ars = [*fewer, *recall.mean(1).T]
    return np.where(np.stack(_absent(total, len(limits)), 1), np.nan, np.stack([*aps, *ars], 1))


def _absent(total: Floats, limits: int) -> list[Bools]:
    """Which figures a draw can't have, as it has no object of the class, or none of the size."""
    none = total == 0
    sizes = list(none[:, 1:].T)
    return [none[:, 0]] * 3 + sizes + [none[:, 0]] * limits + sizes


class _Counted:
    """Running sums of the detections that count; most do at every threshold, so they are summed once.

    Args:
        own: `(S, n)` weights of the detections.
        usual: `(n,)` those that count at the threshold that is summed in full.
    """

    def __init__(self, own: NDArray[Any], usual: Bools) -> None:
        self.own, self.usual = own, usual
        self.rows = np.flatnonzero(usual)
        self.sums = _sums(own[:, self.rows])

    def until(self, places: Ints, counted: Bools) -> Floats:
        """`(S, P)` how many of `counted (n,)` there are up to each of the `(P,)` places, these included."""
        result = self.sums[:, np.searchsorted(self.rows, places, "right")]
        changed = np.flatnonzero(counted != self.usual)
        if len(changed):
            sign = np.where(counted[changed], 1, -1)
            result += _sums(self.own[:, changed] * sign)[:, np.searchsorted(changed, places, "right")]
        return result


def _sums(values: NDArray[Any]) -> Floats:
    """`(S, n + 1)` sums of the first 0 to n columns."""
    sums = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, 1, out=sums[:, 1:])
    return sums


def _average(tps: Floats, counted: Floats, total: Floats) -> tuple[Floats, Floats]:
    """101-point AP and the recall reached, `(S,)` each.

    The best precision behind a recall is always that of a right detection: the others lower it. So each right detection
    gives its precision to the recall thresholds between the one before and itself.

    Args:
        tps, counted: `(S, P)` right and counted detections up to each right one.
        total: `(S,)` objects.
    """
    if not tps.shape[1]:
        return np.zeros(len(tps)), np.zeros(len(tps))
    best = np.maximum.accumulate((tps / (counted + np.spacing(1)))[:, ::-1], axis=1)[:, ::-1]
    recall = tps / total[:, None]
    reached = np.searchsorted(RECALL_THRESHOLDS, recall, side="right")
    return (best * np.diff(reached, prepend=0)).sum(1) / len(RECALL_THRESHOLDS), recall[:, -1]
