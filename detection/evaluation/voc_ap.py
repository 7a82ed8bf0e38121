"""Average precision by the rules of PASCAL VOC: one IoU threshold, `difficult` objects ignored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detection.evaluation.coco_eval import Floats, find_pairs, sorted_detections, sorted_objects
from detection.evaluation.results import ImageResult

ALL_DETECTIONS = 1 << 40
# The seventh is 0.6000000000000001, which a recall of 9/15 misses; the published figures have it so.
RECALLS = np.linspace(0.0, 1.0, 11)


def voc_ap(
    results: Sequence[ImageResult],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
    eleven_point: bool = False,
    inclusive: bool = False,
) -> dict[str, float]:
    """AP of every class that has objects which count; their mean is VOC's mAP.

    A detection belongs to the object of its class that it overlaps most, taken or not; it is right if that IoU is at
    least the threshold and no better-scored detection was there before, and leaves no trace if the object is
    difficult (or a crowd).

    Args:
        results: images in the order of their ids; equal scores are ranked in this order.
        class_names: label `i` is `class_names[i - 1]`.
        iou_threshold: inclusive, as in the development kit.
        eleven_point: VOC 2007's mean over recalls 0, .1 ... 1; otherwise the area under the envelope (2010 on).
        inclusive: boxes hold the first and the last pixel, so a side is `x2 - x1 + 1` as in the development kit.
            False for boxes of `read_voc`, which moved the first corner by one: their `x2 - x1` is already that width.
    """
    dt, gt = sorted_detections(results, ALL_DETECTIONS), sorted_objects(results)
    for side in (dt, gt):
        side.boxes[:, 2:] += inclusive
    ignored = gt.crowd | np.array([results[i].gt_difficult[p] for i, p in zip(gt.image, gt.place, strict=True)], bool)
    gt.crowd = np.zeros_like(gt.crowd)  # VOC knows no crowds: IoU is over the union, and what they match is ignored
    pairs = find_pairs(dt, gt, min(iou_threshold, 1.0))
    # Of each detection the pair of highest IoU, the first of equals.
    best = np.lexsort((pairs.gt, -pairs.iou, pairs.dt))
    best = best[np.flatnonzero(np.diff(pairs.dt[best], prepend=-1))]
    owner = np.full(len(dt.label), -1)
    owner[pairs.dt[best]] = pairs.gt[best]
    figures = {}
    for k, name in enumerate(class_names, start=1):
        count = int((~ignored[gt.label == k]).sum())
        if not count:
            continue
        mine = np.flatnonzero((dt.label == k) & ~(dt.excused & (owner < 0)))
        taken = owner[mine[np.argsort(-dt.scores[mine], kind="stable")]]
        taken = taken[(taken < 0) | ~ignored[taken]] if len(ignored) else taken
        right = np.zeros(len(taken), bool)
        right[np.unique(taken, return_index=True)[1]] = True
        right &= taken >= 0
        tp = np.cumsum(right, dtype=np.float64)
        figures[name] = average_precision(tp / count, tp / np.arange(1, len(tp) + 1), eleven_point)
    return figures


def average_precision(recall: Floats, precision: Floats, eleven_point: bool = False) -> float:
    """Area under the monotone envelope of a curve in rising order of recall, or VOC 2007's mean at eleven recalls."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if eleven_point:
        at = np.searchsorted(recall, RECALLS)
        return float(np.append(envelope, 0.0)[at].mean())
    return float((np.diff(recall, prepend=0.0) * envelope).sum())
