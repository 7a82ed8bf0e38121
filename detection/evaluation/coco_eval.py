"""The COCO evaluation protocol on flat arrays: the official evaluator's numbers without its loops over images.

Only pairs of detection and object whose IoU reaches the lowest threshold can ever match, and they are few. So the
greedy matching runs over those pairs alone, the r-th detection of every (class, image) at once, for all thresholds
and area ranges together.

Shape shorthand:
    D: detections     N: objects     P: pairs     C: classes     T: IoU thresholds     R: recall thresholds
    A: area ranges (all, small, medium, large)    M: limits on detections of one class in one image
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import mask as mask_api
from numpy.typing import NDArray

from detection.evaluation.oks import extents, similarity
from detection.evaluation.results import ImageResult, Rle

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
AREAS = ("all", "small", "medium", "large")
AREA_LIMITS = np.array([(0, 1e5**2), (0, 32**2), (32**2, 96**2), (96**2, 1e5**2)])  # both ends belong to the range
PAIRS_AT_ONCE = 1 << 20


@dataclass(slots=True)
class SortedBoxes:
    """All detections or all objects, sorted by class, then image, then (detections) by falling score.

    Attributes:
        image: `(n,)` position of the image in the list of results.
        label: `(n,)` in `[1, C]`.
        place: `(n,)` position within the image's own arrays.
        boxes: `(n, 4)` x, y, width, height; where masks are evaluated, tight around the masks.
        areas: `(n,)` square pixels.
        rank: `(n,)` for detections, position among those of the same class and image.
        scores: `(n,)` of detections; empty for objects.
        crowd: `(n,)` of objects; empty for detections.
        masks: by image those of its own arrays, as `place` counts; where masks are evaluated.
        excused: `(n,)` of detections, those that are not counted if they match nothing; empty for objects.
        points: `(n, k, 3)`, where key points are evaluated; the areas of detections are then those around them.
    """

    image: Ints
    label: Ints
    place: Ints
    boxes: Floats
    areas: Floats
    rank: Ints
    scores: Floats
    crowd: Bools
    masks: list[Sequence[Rle]] | None
    excused: Bools
    points: Floats | None = None


@dataclass(slots=True)
class Pairs:
    """Detections and objects of one group whose IoU is high enough to match, sorted by detection: `(P,)` each."""

    dt: Ints
    gt: Ints
    iou: Floats


def xywh(boxes: NDArray[Any]) -> Floats:
    """`(N, 4)` xyxy as x, y, width, height in double precision, so that x + width gives x2 back."""
    wide = boxes.astype(np.float64)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], axis=1)


def sorted_detections(
    results: Sequence[ImageResult], limit: int, use_masks: bool = False, use_points: bool = False
) -> SortedBoxes:
    """All detections, the best `limit` of each class and image."""
    image, place = _places([r.labels for r in results])
    label = _join([r.labels for r in results], np.int64)
    scores = _join([r.scores for r in results], np.float64)
    order = np.lexsort((-scores, image, label))  # stable: equal scores keep the detector's order
    first = np.flatnonzero(np.diff(label[order], prepend=-1) | np.diff(image[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    order, rank = order[rank < limit], rank[rank < limit]
    masks = [r.masks or () for r in results] if use_masks else None
    flat = _join([r.boxes for r in results], np.float64).reshape(-1, 4)
    boxes = (xywh(flat) if masks is None else _boxes(masks))[order]
    areas = boxes[:, 2] * boxes[:, 3] if masks is None else _areas(masks)[order]
    points = _points([r.keypoints for r in results], order) if use_points else None
    excused = _join([np.zeros(len(r.labels), bool) if r.excused is None else r.excused for r in results], np.bool_)
    return SortedBoxes(
        image=image[order],
        label=label[order],
        place=place[order],
        boxes=boxes,
        areas=areas if points is None else extents(points),
        rank=rank,
        scores=scores[order],
        crowd=np.zeros(0, bool),
        masks=masks,
        excused=excused[order],
        points=points,
    )


def sorted_objects(results: Sequence[ImageResult], use_masks: bool = False, use_points: bool = False) -> SortedBoxes:
    """All ground-truth objects, crowds included."""
    image, place = _places([r.gt_labels for r in results])
    label = _join([r.gt_labels for r in results], np.int64)
    order = np.lexsort((image, label))
    masks = [r.gt_masks or () for r in results] if use_masks else None
    flat = _join([r.gt_boxes for r in results], np.float64).reshape(-1, 4)
    boxes = (xywh(flat) if masks is None else _boxes(masks))[order]
    areas = _join([r.gt_areas for r in results], np.float64)[order]
    crowd = _join([r.gt_iscrowd for r in results], np.bool_)[order]
    return SortedBoxes(
        image=image[order],
        label=label[order],
        place=place[order],
        boxes=boxes,
        areas=areas,
        rank=np.zeros(0, np.int64),
        scores=np.zeros(0, np.float64),
        crowd=crowd,
        masks=masks,
        excused=np.zeros(0, bool),
        points=_points([r.gt_keypoints for r in results], order) if use_points else None,
    )


def find_pairs(
    dt: SortedBoxes, gt: SortedBoxes, floor: float, by_class: bool = True, sigmas: Sequence[float] = ()
) -> Pairs:
    """Pairs in one image (and, with `by_class`, of one class) with IoU >= `floor`; a crowd's IoU is over the detection.

    With `sigmas` OKS takes the place of IoU.
    Indices are places in `dt` and in `gt`. Those of detections ascend; for each detection, those of objects ascend.
    """
    images = 1 + max(dt.image.max(initial=0), gt.image.max(initial=0))
    group_dt = dt.image + (dt.label * images if by_class else 0)
    group_gt = gt.image + (gt.label * images if by_class else 0)
    order = np.argsort(group_gt, kind="stable")
    start = np.searchsorted(group_gt[order], group_dt, "left")
    count = np.searchsorted(group_gt[order], group_dt, "right") - start
    has = np.flatnonzero(count)
    at_once = PAIRS_AT_ONCE // max(1, len(sigmas))
    chunks = np.split(has, np.flatnonzero(np.diff(np.cumsum(count[has]) // at_once)) + 1)
    found = [_pairs_of(rows, start, count, order, dt, gt, floor, sigmas) for rows in chunks]
    return Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _pairs_of(
    rows: Ints,
    start: Ints,
    count: Ints,
    order: Ints,
    dt: SortedBoxes,
    gt: SortedBoxes,
    floor: float,
    sigmas: Sequence[float],
) -> Any:
    offset = np.cumsum(count[rows]) - count[rows]
    d = np.repeat(rows, count[rows])
    g = order[np.arange(len(d)) - np.repeat(offset, count[rows]) + np.repeat(start[rows], count[rows])]
    if sigmas and dt.points is not None and gt.points is not None:
        iou = similarity(dt.points[d], gt.points[g], gt.boxes[g], gt.areas[g], sigmas)
    else:
        iou = box_iou(dt.boxes[d], gt.boxes[g], gt.crowd[g])
    if dt.masks is not None and gt.masks is not None:
        near = np.flatnonzero(iou > 0)
        iou[near] = [_mask_iou(_mask(dt, a), _mask(gt, b), gt.crowd[b]) for a, b in zip(d[near], g[near], strict=True)]
    keep = iou >= floor
    return d[keep], g[keep], iou[keep]


def box_iou(dt: Floats, gt: Floats, crowd: Bools) -> Floats:
    """IoU of `(P, 4)` against `(P, 4)` xywh row by row, with the operations and their order of the official code."""
    low, high = np.maximum(dt[:, :2], gt[:, :2]), np.minimum(dt[:, :2] + dt[:, 2:], gt[:, :2] + gt[:, 2:])
    side = np.maximum(high - low, 0)
    inter = side[:, 0] * side[:, 1]
    area = dt[:, 2] * dt[:, 3]
    union = np.where(crowd, area, area + gt[:, 2] * gt[:, 3] - inter)
    return np.divide(inter, union, out=np.zeros_like(inter), where=inter > 0)


def match(pairs: Pairs, rows: Ints, group: Ints, thresholds: Floats, ignore: Bools, crowd: Bools) -> NDArray[np.int32]:
    """Greedy matching within each group: detections choose one after the other, the best score first.

    A detection chooses among the objects that no other has. It takes one that counts if there is any, otherwise one
    that is ignored. Of several it takes that of highest IoU, and of equals the last. A crowd can be taken by many.

    Args:
        pairs: what may match.
        rows: `(K,)` the detections that have a pair, each once, ascending.
        group: `(K,)` the group of each; in one group the score falls from row to row.
        thresholds: `(T,)` lowest IoU of a match, inclusive.
        ignore: `(A, N)` which objects are ignored in each area range.
        crowd: `(N,)` which objects are crowds.

    Returns:
        `(T, A, K)` index of the object matched, -1 for none.
    """
    matched = np.full((len(thresholds), len(ignore), len(rows)), -1, np.int32)
    taken = np.zeros((len(thresholds), len(ignore), len(crowd)), bool)
    if not len(rows):
        return matched
    first = np.searchsorted(pairs.dt, rows)
    count = np.searchsorted(pairs.dt, rows, "right") - first
    start = np.flatnonzero(np.diff(group, prepend=-1))
    turn = np.arange(len(rows)) - np.repeat(start, np.diff(start, append=len(rows)))
    by_turn = np.argsort(turn, kind="stable")
    floor = np.minimum(thresholds, 1 - 1e-10)[:, None, None, None]
    for now in np.split(by_turn, np.cumsum(np.bincount(turn))[:-1]):
        slots = np.arange(count[now].max())
        valid = slots < count[now, None]
        index = np.where(valid, first[now, None] + slots, 0)
        objects, iou = pairs.gt[index], np.where(valid, pairs.iou[index], -1.0)
        free = (iou >= floor) & (~taken[:, :, objects] | crowd[objects])
        ignored = np.broadcast_to(ignore[:, objects], free.shape)
        regular = free & ~ignored
        usable = np.where(regular.any(-1, keepdims=True), regular, free)
        best = len(slots) - 1 - np.argmax(np.where(usable, iou, -1.0)[..., ::-1], axis=-1)
        chosen = np.where(usable.any(-1), objects[np.arange(len(now)), best], -1)
        matched[:, :, now] = chosen
        t, a, n = np.nonzero(chosen >= 0)
        taken[t, a, chosen[t, a, n]] = True
    return matched


@dataclass(frozen=True, slots=True)
class Curves:
    """What accumulation gives; -1 where a class has no ground truth.

    Attributes:
        precision: `(T, R, C, A, M)` interpolated.
        recall: `(T, C, A, M)` highest reached.
        scores: `(T, R, C, A, M)` score at which each recall is reached.
    """

    precision: Floats
    recall: Floats
    scores: Floats


@dataclass(frozen=True, slots=True)
class Judged:
    """The detections of one class in falling order of score, and its objects, after matching.

    Attributes:
        label: of the class.
        image: `(n,)` position of the image in the list of results.
        rank: `(n,)` position among the detections of the class in the image.
        scores: `(n,)`.
        tp, fp: `(T, A, n)` right, and wrong; what is neither does not count.
        gt_image: `(N,)` likewise of the objects.
        counted: `(A, N)` objects that are not ignored.
    """

    label: int
    image: Ints
    rank: Ints
    scores: Floats
    tp: Bools
    fp: Bools
    gt_image: Ints
    counted: Bools


def judge(
    results: Sequence[ImageResult],
    num_classes: int,
    limit: int = 100,
    use_masks: bool = False,
    thresholds: Floats = IOU_THRESHOLDS,
    sigmas: Sequence[float] = (),
) -> Iterator[Judged]:
    """Match as the official evaluator does; each class that has objects in turn.

    With `sigmas` key points are judged, by OKS; objects without any that is annotated are ignored. Detections that
    match nothing do not count where they lie outside of the area range, or are `excused`.
    """
    dt = sorted_detections(results, limit, use_masks, bool(sigmas))
    gt = sorted_objects(results, use_masks, bool(sigmas))
    pairs = find_pairs(dt, gt, min(thresholds.min(), 1 - 1e-10), sigmas=sigmas)
    rows = np.unique(pairs.dt)
    unjudged = gt.crowd if gt.points is None else gt.crowd | ~(gt.points[..., 2] > 0).any(axis=1)
    ignore = unjudged | _outside(gt.areas)
    matched = match(pairs, rows, dt.label[rows] * (len(results) + 1) + dt.image[rows], thresholds, ignore, gt.crowd)
    bounds = np.arange(1, num_classes + 2)
    gt_at, dt_at = np.searchsorted(gt.label, bounds), np.searchsorted(dt.label, bounds)
    row_at = np.searchsorted(rows, dt_at)
    for k in range(num_classes):
        own = slice(gt_at[k], gt_at[k + 1])
        if ignore[:, own].all():
            continue
        mine, picked = slice(dt_at[k], dt_at[k + 1]), slice(row_at[k], row_at[k + 1])
        hit = np.zeros((len(thresholds), len(AREAS), dt_at[k + 1] - dt_at[k]), bool)
        skip = np.broadcast_to(_outside(dt.areas[mine]) | dt.excused[mine], hit.shape).copy()
        objects, columns = matched[:, :, picked], rows[picked] - dt_at[k]
        hit[:, :, columns] = objects >= 0
        on_ignored = ignore[np.arange(len(AREAS))[:, None], objects] if len(gt.crowd) else skip[:, :, columns]
        skip[:, :, columns] = np.where(objects >= 0, on_ignored, skip[:, :, columns])
        order = np.argsort(-dt.scores[mine], kind="stable")
        yield Judged(
            label=k + 1,
            image=dt.image[mine][order],
            rank=dt.rank[mine][order],
            scores=dt.scores[mine][order],
            tp=(hit & ~skip)[:, :, order],
            fp=(~hit & ~skip)[:, :, order],
            gt_image=gt.image[own],
            counted=~ignore[:, own],
        )


def evaluate(
    results: Sequence[ImageResult],
    num_classes: int,
    max_detections: Sequence[int] = (1, 10, 100),
    use_masks: bool = False,
    thresholds: Floats = IOU_THRESHOLDS,
    sigmas: Sequence[float] = (),
) -> Curves:
    """Match and accumulate as the official evaluator does; `results` must be in the order of image id."""
    shape = (len(thresholds), num_classes, len(AREAS), len(max_detections))
    precision = np.full((shape[0], len(RECALL_THRESHOLDS), *shape[1:]), -1.0)
    recall, scores = np.full(shape, -1.0), precision.copy()
    for judged in judge(results, num_classes, max(max_detections), use_masks, thresholds, sigmas):
        k, counted = judged.label - 1, judged.counted.sum(1)
        for m, limit in enumerate(max_detections):
            kept = np.flatnonzero(judged.rank < limit)
            curves = _accumulate(judged.tp[:, :, kept], judged.fp[:, :, kept], counted, judged.scores[kept])
            precision[:, :, k, :, m], recall[:, k, :, m], scores[:, :, k, :, m] = curves
    return Curves(precision, recall, scores)


def _accumulate(tp: Bools, fp: Bools, counted: Ints, score: Floats) -> tuple[Floats, Floats, Floats]:
    """Curves of one class from `(T, A, n)` true and false positives in falling order of score."""
    tps, fps = np.cumsum(tp, axis=-1, dtype=np.float64), np.cumsum(fp, axis=-1, dtype=np.float64)
    precision = np.maximum.accumulate((tps / (fps + tps + np.spacing(1)))[..., ::-1], axis=-1)[..., ::-1]
    shape = (len(tp), len(RECALL_THRESHOLDS), len(counted))
    at, score_at, reached = np.full(shape, -1.0), np.full(shape, -1.0), np.full((len(tp), len(counted)), -1.0)
    for t, a in np.ndindex(reached.shape):
        if counted[a]:
            recall = tps[t, a] / counted[a]
            reached[t, a] = recall[-1] if len(recall) else 0.0
            index = np.searchsorted(recall, RECALL_THRESHOLDS, side="left")
            index = index[index < len(recall)]
            at[t, :, a], score_at[t, :, a] = 0.0, 0.0
            at[t, : len(index), a], score_at[t, : len(index), a] = precision[t, a, index], score[index]
    return at, reached, score_at


def _outside(areas: Floats) -> Bools:
    return (areas < AREA_LIMITS[:, :1]) | (areas > AREA_LIMITS[:, 1:])


def _places(arrays: list[Ints]) -> tuple[Ints, Ints]:
    counts = np.array([len(a) for a in arrays], dtype=np.int64)
    image = np.repeat(np.arange(len(arrays)), counts)
    return image, np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)


def _join(arrays: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(arrays or [np.zeros(0)]).astype(dtype, copy=False)


def _points(keypoints: list[NDArray[Any] | None], order: Ints) -> Floats:
    """`(n, k, 3)` of all images; each has some, as `MeanAP.update` sees to."""
    return _join([own for own in keypoints if own is not None], np.float64)[order]


def _boxes(masks: list[Sequence[Rle]]) -> Floats:
    """`(n, 4)` around each; image by image, as all would be unpacked together."""
    around = [np.asarray(mask_api.toBbox(list(own))).reshape(-1, 4) for own in masks if own]
    return _join(around, np.float64).reshape(-1, 4)


def _areas(masks: list[Sequence[Rle]]) -> Floats:
    """`(n,)` pixels of each."""
    return _join([np.asarray(mask_api.area(list(own))) for own in masks if own], np.float64)


def _mask(of: SortedBoxes, i: int) -> Rle:
    assert of.masks is not None
    return of.masks[of.image[i]][of.place[i]]


def _mask_iou(dt: Rle, gt: Rle, crowd: bool) -> float:
    return float(mask_api.iou([dt], [gt], [int(crowd)])[0, 0])
