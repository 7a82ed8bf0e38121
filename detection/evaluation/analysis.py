"""What kind of mistakes a detector makes, after TIDE (Bolya et al., ECCV 2020), and the counts behind the plots.

Shape shorthand:
    D: detections     N: objects     C: classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detection.evaluation.coco_eval import (
    RECALL_THRESHOLDS,
    Bools,
    Ints,
    Pairs,
    SortedBoxes,
    find_pairs,
    match,
    sorted_detections,
    sorted_objects,
)
from detection.evaluation.results import ImageResult

RIGHT, CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND, IGNORED = range(7)
MISTAKES = {
    CLASS: ("classification", "right place, wrong class"),
    LOCATION: ("localisation", "right class, wrong place"),
    BOTH: ("both", "wrong class and wrong place"),
    DUPLICATE: ("duplicate", "a better-scored detection has the object"),
    BACKGROUND: ("background", "nothing there"),
}


@dataclass(frozen=True, slots=True)
class Analysis:
    """Every detection and object, judged at one IoU threshold.

    Attributes:
        dt, gt: all detections and all objects.
        num_classes: C.
        kind: `(D,)` RIGHT, one of `MISTAKES`, or IGNORED: on a crowd, or unmatched and
            of a class of which not all objects are annotated.
        owner: `(D,)` the object that a detection belongs to, -1 for none. It is the object matched; for a LOCATION or a
            CLASS mistake it is the object that was meant.
        found: `(N,)` objects with a detection that is RIGHT.
        mended: `(D,)` LOCATION and CLASS mistakes that would be RIGHT if they were corrected: their object is not found
            by another detection, and of all mistakes on that object theirs is the best score.
        missed: `(N,)` objects that are neither found nor would be by a mended mistake, as TIDE counts; no crowds.
    """

    dt: SortedBoxes
    gt: SortedBoxes
    num_classes: int
    kind: Ints
    owner: Ints
    mended: Bools
    found: Bools
    missed: Bools


@dataclass(frozen=True, slots=True)
class Mistake:
    """One row of the breakdown: how many, and by how much AP would rise if this kind alone were put right."""

    name: str
    meaning: str
    count: int
    delta_ap: float


@dataclass(frozen=True, slots=True)
class Operating:
    """A class at the score where its F1 is best."""

    score: float
    precision: float
    recall: float


def analyse(
    results: Sequence[ImageResult], num_classes: int, iou: float = 0.5, background: float = 0.1, limit: int = 100
) -> Analysis:
    """Judge every detection as TIDE does (section 2.2), with COCO's matching at one threshold.

    Args:
        results: images in the order of their ids.
        num_classes: C.
        iou: foreground threshold, inclusive.
        background: an IoU below it with every object is background.
        limit: best detections of each class and image that are looked at.
    """
    dt, gt = sorted_detections(results, limit), sorted_objects(results)
    pairs = find_pairs(dt, gt, background, by_class=False)
    same = dt.label[pairs.dt] == gt.label[pairs.gt]
    near = _select(pairs, same & (pairs.iou >= iou))
    rows = np.unique(near.dt)
    group = dt.label[rows] * (len(results) + 1) + dt.image[rows]
    owner = np.full(len(dt.label), -1)
    owner[rows] = match(near, rows, group, np.array([iou]), gt.crowd[None], gt.crowd)[0, 0]
    real = ~gt.crowd[pairs.gt]
    own, own_iou = _best(_select(pairs, same & real), len(dt.label))
    other, other_iou = _best(_select(pairs, ~same & real), len(dt.label))
    # First come first served, as in TIDE's own code: its figures depend on this order.
    kind = np.select(
        [
            owner >= 0,
            (own_iou >= background) & (own_iou < iou),
            other_iou >= iou,
            own_iou >= iou,
            np.maximum(own_iou, other_iou) < background,
        ],
        [RIGHT, LOCATION, CLASS, DUPLICATE, BACKGROUND],
        BOTH,
    )
    if len(gt.crowd):
        kind = np.where((owner >= 0) & gt.crowd[owner], IGNORED, kind)
    kind = np.where((owner < 0) & dt.excused, IGNORED, kind)
    found = np.zeros(len(gt.label), bool)
    found[owner[kind == RIGHT]] = True
    owner = np.select([kind == LOCATION, kind == CLASS], [own, other], owner)
    mendable = np.flatnonzero(np.isin(kind, (LOCATION, CLASS)))
    mendable = mendable[~found[owner[mendable]]]
    mendable = mendable[np.argsort(-dt.scores[mendable], kind="stable")]
    mended = np.zeros(len(dt.label), bool)
    mended[mendable[np.unique(owner[mendable], return_index=True)[1]]] = True
    missed = ~found & ~gt.crowd
    missed[owner[mended]] = False
    return Analysis(dt, gt, num_classes, kind, owner, mended, found, missed)


def error_breakdown(analysis: Analysis) -> list[Mistake]:
    """Count and dAP of each kind of mistake, then of missed objects, all false positives and all false negatives.

    Each row compares AP at the analysed IoU with what an oracle would reach that puts right this kind alone
    (section 2.3): a class or place is corrected where the object is free, otherwise the detection is taken away, as it
    is for the other kinds; missed objects leave the count of objects.
    """
    a = analysis
    right, kept = a.kind == RIGHT, a.kind != IGNORED
    total = _counts(a, ~a.gt.crowd)
    base = mean_ap(a, a.dt.label, right, kept, total)
    rows = []
    for kind, (name, meaning) in MISTAKES.items():
        here = a.kind == kind
        mended = here & a.mended
        label = np.where(mended, a.gt.label[a.owner], a.dt.label) if len(a.gt.label) else a.dt.label
        fixed = mean_ap(a, label, right | mended, kept & (~here | mended), total)
        rows.append(Mistake(name, meaning, int(here.sum()), fixed - base))
    lost = ~a.found & ~a.gt.crowd
    fixed = mean_ap(a, a.dt.label, right, kept, total - _counts(a, a.missed))
    rows.append(Mistake("missed", "no detection near the object", int(a.missed.sum()), fixed - base))
    wrong = kept & ~right
    fixed = mean_ap(a, a.dt.label, right, right, total)
    rows.append(Mistake("all false positives", "every detection that is not right", int(wrong.sum()), fixed - base))
    fixed = mean_ap(a, a.dt.label, right, kept, total - _counts(a, lost))
    rows.append(Mistake("all false negatives", "every object without its detection", int(lost.sum()), fixed - base))
    return rows


def mean_ap(analysis: Analysis, label: Ints, right: Bools, kept: Bools, counts: Ints) -> float:
    """COCO's 101-point AP averaged over the classes that have objects.

    Args:
        analysis: gives scores, and which classes have objects at all.
        label, right, kept: `(D,)` class, true positive, and whether a detection is there.
        counts: `(C,)` objects of each class.
    """
    values = []
    for k in np.flatnonzero(_counts(analysis, ~analysis.gt.crowd)) + 1:
        mine = np.flatnonzero(kept & (label == k))
        if len(mine) or counts[k - 1]:
            order = mine[np.argsort(-analysis.dt.scores[mine], kind="stable")]
            values.append(_average_precision(right[order], int(counts[k - 1])))
    return float(np.mean(values)) if values else 0.0


def _average_precision(right: Bools, count: int) -> float:
    if not count or not len(right):
        return 0.0
    tp = np.cumsum(right, dtype=np.float64)
    envelope = np.maximum.accumulate((tp / np.arange(1, len(tp) + 1))[::-1])[::-1]
    return float(np.append(envelope, 0.0)[np.searchsorted(tp / count, RECALL_THRESHOLDS)].mean())


@dataclass(frozen=True, slots=True)
class Confusions:
    """Each object and each detection that counts, as a cell of the confusion matrix.

    Attributes:
        true, detected: class from 0 on; C is background in `true` and undetected in `detected`.
        detection, object: position in `Analysis.dt` and `Analysis.gt`; -1 where there is none.
    """

    true: Ints
    detected: Ints
    detection: Ints
    object: Ints


def confusions(analysis: Analysis, score: float = 0.5, iou: float = 0.5) -> Confusions:
    """What each object was taken for, and each detection that has none.

    Detections of at least `score` take objects of any class in falling order of score; those on crowds are left out.
    """
    a = analysis
    order = np.lexsort((-a.dt.scores, a.dt.image))
    order = order[a.dt.scores[order] >= score]
    position = np.full(len(a.dt.label), -1)
    position[order] = np.arange(len(order))
    pairs = find_pairs(a.dt, a.gt, iou, by_class=False)
    pairs = _select(pairs, position[pairs.dt] >= 0)
    pairs = Pairs(position[pairs.dt], pairs.gt, pairs.iou)
    pairs = _select(pairs, np.lexsort((pairs.gt, pairs.dt)))
    rows = np.unique(pairs.dt)
    owner = np.full(len(order), -1)
    owner[rows] = match(pairs, rows, a.dt.image[order[rows]], np.array([iou]), a.gt.crowd[None], a.gt.crowd)[0, 0]
    true = np.append(a.gt.label - 1, a.num_classes)  # owner -1 is background
    counted = ~np.append(a.gt.crowd, False)[owner]
    unseen = ~a.gt.crowd
    unseen[owner[owner >= 0]] = False
    lost = np.full(int(unseen.sum()), a.num_classes)
    return Confusions(
        np.concatenate([true[owner[counted]], a.gt.label[unseen] - 1]),
        np.concatenate([a.dt.label[order[counted]] - 1, lost]),
        np.concatenate([order[counted], np.full(len(lost), -1)]),
        np.concatenate([owner[counted], np.flatnonzero(unseen)]),
    )


def confusion_matrix(analysis: Analysis, score: float = 0.5, iou: float = 0.5) -> NDArray[np.int64]:
    """`(C + 1, C + 1)` counts of `confusions`: the last row is background, the last column undetected."""
    matrix = np.zeros((analysis.num_classes + 1, analysis.num_classes + 1), np.int64)
    cells = confusions(analysis, score, iou)
    np.add.at(matrix, (cells.true, cells.detected), 1)
    return matrix


def most_confused(matrix: NDArray[np.int64], limit: int) -> Ints:
    """The `limit` classes that are most often taken for others, or others for them; all where there are no more."""
    count = len(matrix) - 1
    off = matrix[:count, :count] - np.diag(np.diag(matrix[:count, :count]))
    return np.sort(np.argsort(-(off.sum(0) + off.sum(1)), kind="stable")[:limit])


def operating_points(analysis: Analysis) -> dict[int, Operating]:
    """The score of best F1 for each label that has both objects and right detections."""
    a = analysis
    counts = _counts(a, ~a.gt.crowd)
    points = {}
    for k in np.flatnonzero(counts) + 1:
        mine = np.flatnonzero((a.dt.label == k) & (a.kind != IGNORED))
        order = mine[np.argsort(-a.dt.scores[mine], kind="stable")]
        tp = np.cumsum(a.kind[order] == RIGHT)
        if len(tp) and tp[-1]:
            best = int(np.argmax(2 * tp / (np.arange(1, len(tp) + 1) + counts[k - 1])))
            precision, recall = tp[best] / (best + 1), tp[best] / counts[k - 1]
            points[int(k)] = Operating(float(a.dt.scores[order[best]]), float(precision), float(recall))
    return points


def worst_images(analysis: Analysis, count: int) -> list[tuple[int, float]]:
    """Positions of the images with the most mistakes: scores of wrong detections plus one for each object not found."""
    a = analysis
    size = 1 + max(a.dt.image.max(initial=-1), a.gt.image.max(initial=-1))
    wrong = (a.kind != RIGHT) & (a.kind != IGNORED)
    weight = np.bincount(a.dt.image[wrong], a.dt.scores[wrong], minlength=size)
    weight = weight + np.bincount(a.gt.image[~a.found & ~a.gt.crowd], minlength=size)
    order = np.argsort(-weight, kind="stable")[:count]
    return [(int(i), float(weight[i])) for i in order if weight[i] > 0]


def _best(pairs: Pairs, size: int) -> tuple[Ints, NDArray[np.float64]]:
    """For each detection the object of highest IoU, the first of equals, and that IoU; -1 and 0 without any."""
    order = np.lexsort((pairs.gt, -pairs.iou, pairs.dt))
    order = order[np.flatnonzero(np.diff(pairs.dt[order], prepend=-1))]
    best, iou = np.full(size, -1), np.zeros(size)
    best[pairs.dt[order]], iou[pairs.dt[order]] = pairs.gt[order], pairs.iou[order]
    return best, iou


def _select(pairs: Pairs, rows: NDArray[np.bool_ | np.int64]) -> Pairs:
    return Pairs(pairs.dt[rows], pairs.gt[rows], pairs.iou[rows])


def _counts(analysis: Analysis, objects: Bools) -> Ints:
    return np.bincount(analysis.gt.label[objects] - 1, minlength=analysis.num_classes)
