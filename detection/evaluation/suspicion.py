"""Annotations that a detector contradicts which has not trained on them: missing, wrong class, loose box, not found.

The idea is ObjectLab's (Tkachenko et al. 2023): a detection that contradicts an annotation makes it suspicious. The
scores are our own. Each says how often detections and annotations agree in like cases of this very data set, so that
one list can rank all kinds: a contradiction is the more suspicious the rarer it is.

Shape shorthand:
    D: detections of an image     P: places, one for each object found     N: its annotations     C: classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import expit, ndtr

from detection.evaluation.results import ImageResult

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.intp]
Box = tuple[float, float, float, float]
Kind = Literal["missing", "class", "box", "spurious"]
KINDS: dict[Kind, tuple[str, str]] = {  # what it is called, and what it means
    "missing": ("missing", "an object is found where no annotation is"),
    "class": ("wrong class", "the object is found, but of another class"),
    "box": ("loose box", "the object is found, but the boxes share less than is usual for the class"),
    "spurious": ("not found", "nothing is found at the annotation; weak, as the detector may be at fault"),
}
SAME_PLACE = 0.5  # IoU from which detections of several classes are of one object
SAME_OBJECT = 0.5  # IoU from which annotation and detection tell something of the class
TOUCHES = 0.1  # IoU from which they may be of one object
INSIDE = 0.5  # share of a detection in a crowd from which it belongs to that
CONFIDENT = 0.5  # score of detections that count where an image's completeness is judged
PARTLY = 3  # confident detections of a class without annotation that make an image one that is annotated in part
QUARTILE = 0.6745  # standard deviations between median and quartile of a normal distribution
LEAST_SPREAD = 0.02  # of IoU: nobody draws boxes more exactly
TAIL = 0.5  # standard deviations that are forgiven, as IoU has a longer tail than a normal distribution
WEAK = 0.5  # the most that it counts if nothing is found
LEAST = 0.3  # what is less suspicious is not listed


class Labelled(NamedTuple):
    """A box, xyxy in pixels of the image, and its class from 1 on."""

    box: Box
    label: int


@dataclass(frozen=True, slots=True)
class Suspect:
    """An annotation that is probably wrong, or one that is probably missing.

    Attributes:
        score: suspicion, in [0, 1].
        kind: what is wrong with it.
        image: position among the results.
        annotation: position among the image's annotations; None for a missing one.
        annotated: what is annotated; None for a missing one.
        proposed: what to put in its place; None where nothing is found.
        confidence: score of the detection that proposes it; 0 for none.
        iou: of both boxes; 0 where one is absent.
    """

    score: float
    kind: Kind
    image: int
    annotation: int | None
    annotated: Labelled | None
    proposed: Labelled | None
    confidence: float
    iou: float


class Partly(NamedTuple):
    """A class that is annotated in part in an image: more of its confident detections have no annotation than have."""

    image: int
    label: int
    missing: int
    annotated: int


@dataclass(frozen=True, slots=True)
class Places:
    """Where an image has objects by the detector, and how they pair with the annotations.

    Attributes:
        boxes: `(P, 4)` xyxy of the best detection at each place.
        scores: `(P, C)` best score of each class there, 0 for none.
        iou: `(N, P)` with the annotations.
        of: `(N,)` place of each annotation, -1 for none. A place has one annotation at most.
        judged: `(P,)` bool; false for what is inside a crowd, or of a class that is annotated in part by intent.
    """

    boxes: Floats
    scores: Floats
    iou: Floats
    of: Ints
    judged: NDArray[np.bool_]

    @property
    def label(self) -> Ints:
        """`(P,)` the surest class."""
        return self.scores.argmax(axis=1) + 1

    @property
    def confidence(self) -> Floats:
        """`(P,)` its score."""
        return np.asarray(self.scores.max(axis=1))

    @property
    def taken(self) -> NDArray[np.bool_]:
        """`(P,)` whether there is an annotation."""
        return np.isin(np.arange(len(self.boxes)), self.of)


def suspects(results: Sequence[ImageResult], num_classes: int) -> list[Suspect]:
    """All suspicions, the strongest first.

    Crowds and difficult objects are not judged, nor is what is found inside of a crowd. Of a class that was not looked
    for in an image, or not in all of it, nothing is missing.

    Args:
        results: of a detector that has not trained on these images.
        num_classes: C.
    """
    places = [places_of(result, num_classes) for result in results]
    usual = Usual(results, places, num_classes)
    found = list[Suspect]()
    for i, (result, own) in enumerate(zip(results, places, strict=True)):
        found += [_of_annotation(i, n, result, own, usual) for n in _judged(result)]
        found += _missing(i, own, usual)
    return sorted((one for one in found if one.score >= LEAST), key=lambda one: -one.score)


def partly_annotated(results: Sequence[ImageResult], num_classes: int) -> list[Partly]:
    """Images in which a class is annotated in part, those that lack most first; arguments as for `suspects`."""
    found = []
    for i, result in enumerate(results):
        places = places_of(result, num_classes)
        sure = places.judged & (places.confidence >= CONFIDENT)
        for label in np.unique(places.label[sure]).tolist():
            own = places.taken[sure & (places.label == label)]
            missing, there = int((~own).sum()), int(own.sum())
            if missing >= PARTLY and missing > there:
                found.append(Partly(i, label, missing, there))
    return sorted(found, key=lambda one: -one.missing)


class Usual:
    """How often detections and annotations of a data set agree.

    Args:
        results: images.
        places: of each.
        num_classes: C.
    """

    def __init__(self, results: Sequence[ImageResult], places: Sequence[Places], num_classes: int) -> None:
        ious, scores = ([list[float]() for _ in range(num_classes + 1)] for _ in range(2))
        margins: list[Floats] = [np.zeros((0, 2))]
        agree = [np.zeros(0)]
        for result, own in zip(results, places, strict=True):
            for n in _judged(result):
                label, place = int(result.gt_labels[n]), int(own.of[n])
                score = float(own.scores[place, label - 1]) if place >= 0 else 0.0
                scores[label].append(score)
                if score > 0:
                    ious[label].append(float(own.iou[n, place]))
                if place >= 0 and own.iou[n, place] >= SAME_OBJECT:
                    margins.append(_margin(own)[[place]])
                    agree.append(own.label[[place]] == label)
        seen = [own.judged for own in places]
        told = np.concatenate([np.zeros((0, 3)), *(_surroundings(p)[j] for p, j in zip(places, seen, strict=True))])
        annotated = np.concatenate([np.zeros(0), *(p.taken[j] for p, j in zip(places, seen, strict=True))])
        self._annotated = _logistic(told, annotated)
        self._same_class = _logistic(np.concatenate(margins), np.concatenate(agree))
        self._score = [float(np.median(own)) if own else 0.0 for own in scores]
        self._iou = [float(np.median(own)) if own else 1.0 for own in ious]
        # Of the quartile, for what is wrong lies further out.
        low = [float(np.quantile(own, 0.25)) if own else 1.0 for own in ious]
        self._spread = [max((m - q) / QUARTILE, LEAST_SPREAD) for m, q in zip(self._iou, low, strict=True)]

    def annotated(self, places: Places) -> Floats:
        """`(P,)` how often places like these have an annotation: as confident, in images as complete."""
        return np.asarray(expit(_surroundings(places) @ self._annotated))

    def same_class(self, places: Places) -> Floats:
        """`(P,)` how often the annotation of places like these is of the class that is found."""
        return np.asarray(expit(_margin(places) @ self._same_class))

    def closer(self, label: int, iou: float) -> float:
        """Share of a class's right annotations with a higher IoU, as a normal distribution has it."""
        return float(ndtr((self._iou[label] - iou) / self._spread[label] - TAIL))

    def found(self, label: int) -> float:
        """Score with which a class's annotations are found; the median."""
        return self._score[label]


def _of_annotation(image: int, n: int, result: ImageResult, places: Places, usual: Usual) -> Suspect:
    """The strongest suspicion against an annotation."""
    label, place = int(result.gt_labels[n]), int(places.of[n])
    own = float(places.scores[place, label - 1]) if place >= 0 else 0.0
    annotated = Labelled(corners(result.gt_boxes[n]), label)
    scores: dict[Kind, float] = {"spurious": WEAK * max(0.0, usual.found(label) - own)}
    iou = float(places.iou[n, place]) if place >= 0 else 0.0
    if place >= 0 and places.label[place] == label:
        scores["box"] = own * usual.closer(label, iou)
    elif iou >= SAME_OBJECT:
        scores["class"] = float(usual.same_class(places)[place])
    kind = max(scores, key=scores.__getitem__)
    if kind == "spurious":
        return Suspect(scores[kind], kind, image, n, annotated, None, 0.0, 0.0)
    proposed = Labelled(corners(places.boxes[place]), int(places.label[place]))
    return Suspect(scores[kind], kind, image, n, annotated, proposed, float(places.confidence[place]), iou)


def _missing(image: int, places: Places, usual: Usual) -> list[Suspect]:
    """What is found and not annotated."""
    scores, confidence = usual.annotated(places), places.confidence
    found = []
    for place in np.flatnonzero(~places.taken & places.judged).tolist():
        proposed = Labelled(corners(places.boxes[place]), int(places.label[place]))
        found.append(Suspect(float(scores[place]), "missing", image, None, None, proposed, float(confidence[place]), 0))
    return found


def places_of(result: ImageResult, num_classes: int) -> Places:
    """Detections of several classes on one object made one, and paired with the annotations.

    Pairs are one to one, so that the sum of IoU times confidence is highest.

    Args:
        result: an image.
        num_classes: C.
    """
    boxes = np.asarray(result.boxes, np.float64)
    overlap, free = iou_of(boxes, boxes), np.ones(len(boxes), bool)
    lead = list[int]()
    rows: list[Floats] = [np.zeros((0, num_classes))]
    for i in np.argsort(-result.scores, kind="stable").tolist():
        if not free[i]:
            continue
        others = free & (overlap[i] >= SAME_PLACE) & (result.labels != result.labels[i])
        here = np.append(np.flatnonzero(others), i)
        free[here] = False
        row = np.zeros((1, num_classes))
        np.maximum.at(row[0], result.labels[here] - 1, result.scores[here])
        lead.append(i)
        rows.append(row)
    at, scores = boxes[lead], np.concatenate(rows)
    iou = iou_of(result.gt_boxes, at)
    weight = iou * scores.max(axis=1, initial=0.0) * (iou >= TOUCHES) * ~result.gt_iscrowd[:, None]
    of = np.full(len(iou), -1)
    for n, place in zip(*linear_sum_assignment(-weight), strict=True):
        of[n] = place if weight[n, place] > 0 else -1
    judged = np.asarray(~(_share_of(at, result.gt_boxes[result.gt_iscrowd]) >= INSIDE).any(axis=1))
    if result.excused is not None:
        judged &= ~result.excused[lead]
    return Places(at, scores, iou, of, judged)


def iou_of(a: Floats, b: Floats) -> Floats:
    """IoU of every pair of xyxy boxes, `(N, 4)` and `(M, 4)` -> `(N, M)`."""
    inner, areas = _inner(a, b), [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b)]
    return np.asarray(inner / np.maximum(areas[0][:, None] + areas[1] - inner, 1e-9))


def _share_of(a: Floats, b: Floats) -> Floats:
    """Which share of each of `a` lies in each of `b`, `(N, M)`."""
    return np.asarray(_inner(a, b) / np.maximum(np.prod(a[:, 2:] - a[:, :2], axis=1)[:, None], 1e-9))


def _inner(a: Floats, b: Floats) -> Floats:
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.asarray(np.prod(np.maximum(high - low, 0.0), axis=2))


def _judged(result: ImageResult) -> list[int]:
    return [int(n) for n in np.flatnonzero(~(result.gt_iscrowd | result.gt_difficult))]


def _surroundings(places: Places) -> Floats:
    """`(P, 3)`: log odds of the confidence, and of how complete the rest of the image is for the class; and one."""
    label, p, taken = places.label, places.confidence, places.taken
    others = (label[:, None] == label) & (p >= CONFIDENT) & ~np.eye(len(p), dtype=bool)
    share = ((others & taken).sum(axis=1) + 1) / (others.sum(axis=1) + 1.25)  # 0.8 where there are no others
    return np.stack([_log_odds(p), _log_odds(share), np.ones(len(p))], axis=1)


def _margin(places: Places) -> Floats:
    """`(P, 2)`: log ratio of the surest class to the second; and one."""
    ranked = np.sort(np.pad(places.scores, ((0, 0), (1, 0))), axis=1)
    return np.stack([np.log(ranked[:, -1] / (ranked[:, -2] + 0.01)), np.ones(len(ranked))], axis=1)


def _log_odds(p: Floats) -> Floats:
    return np.asarray(np.log(p / (1.001 - p)))


def _logistic(x: Floats, y: Floats) -> Floats:
    """Weights of a logistic regression whose last column is constant; no other weight is below zero.

    A prior (variance 1, of the constant 100) keeps them finite where one value decides.
    """
    sign, count = 2.0 * y - 1, x.shape[1]
    prior = np.append(np.ones(count - 1), 0.01)

    def loss(w: Floats) -> tuple[float, Floats]:
        z = -sign * (x @ w)
        return float(np.logaddexp(0, z).sum() + prior @ w**2 / 2), np.asarray(prior * w - (sign * expit(z)) @ x)

    bounds = [(0.0, None)] * (count - 1) + [(None, None)]
    return np.asarray(minimize(loss, np.zeros(count), jac=True, bounds=bounds).x)


def corners(box: Floats) -> Box:
    """A row of boxes as plain numbers."""
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, x2, y2
