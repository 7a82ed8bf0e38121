"""What several detectors, or several views of an image, find in one image, fused to one list.

Shape shorthand:
    D: detections of all members together     K: fused ones     M: members, detectors or views
Boxes are `(x1, y1, x2, y2)` in pixels of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from detection.boxes import grouped_nms
from detection.data.records import DataError
from detection.data.rle import Packed
from detection.evaluation.results import ImageResult
from detection.inference.detections import Detections

Fusion = Literal["wbf", "nms"]
Found = TypeVar("Found", Detections, ImageResult)
IOU_THRESH = 0.55  # of Solovyev et al. 2021, section 3
NMS_THRESH = 0.5


class Fused(NamedTuple):
    """The fused list, best first.

    Attributes:
        boxes: `(K, 4)`.
        scores: `(K,)`.
        best: `(K,)` place of the highest-scored detection of each cluster, which gives label and mask.
    """

    boxes: NDArray[Any]
    scores: NDArray[Any]
    best: NDArray[np.int64]


def weighted_boxes(
    boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any], count: int, iou_thresh: float = IOU_THRESH
) -> Fused:
    """Weighted box fusion (Solovyev et al. 2021, section 3): clusters of one class become their weighted mean.

    The detections come best first. Each joins the cluster whose fused box it overlaps most, by an IoU > `iou_thresh`,
    or begins one. A fused box is the mean of its cluster weighted by score, its score the mean score; in the end that
    is multiplied by min(T, M) / M, where T is the size of the cluster (equation 5): what few members see counts less.

    Args:
        boxes: `(D, 4)`.
        scores: `(D,)`.
        labels: `(D,)`.
        count: M.
        iou_thresh: exclusive.
    """
    order = np.argsort(-scores, kind="stable")
    fused, total, size = np.zeros((len(boxes), 4)), np.zeros(len(boxes)), np.zeros(len(boxes), np.int64)
    best, known = np.zeros(len(boxes), np.int64), 0
    for i in order:
        iou = _iou(boxes[i].astype(np.float64), fused[:known])
        iou[labels[best[:known]] != labels[i]] = 0
        k = int(iou.argmax()) if known else 0
        if not known or iou[k] <= iou_thresh:
            k, known = known, known + 1
            best[k] = i
        score = float(scores[i])
        if total[k] + score > 0:  # detections of score 0 have no say
            fused[k] = (fused[k] * total[k] + boxes[i] * score) / (total[k] + score)
        else:
            fused[k] = boxes[best[k]]
        total[k], size[k] = total[k] + score, size[k] + 1
    fused, total, size, best = fused[:known], total[:known], size[:known], best[:known]
    means = total / size * np.minimum(size, count) / count
    order = np.argsort(-means, kind="stable")
    return Fused(fused[order].astype(boxes.dtype), means[order].astype(scores.dtype), best[order])


def _iou(box: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """`(K,)` IoU of a box with others; 0 where both are empty."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inside = (high - low).clip(0).prod(1)
    whole = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - inside
    return np.divide(inside, whole, out=np.zeros_like(inside), where=whole > 0)


def fuse(members: Sequence[Found], how: Fusion, limit: int) -> Found:
    """What several members found in one image, as one list, best first. A fused box has the mask, and the key points,
    of its best member.

    Args:
        members: M, of the same image and the same classes.
        how: `wbf`, see `weighted_boxes`; or `nms`, which keeps the best of what overlaps by an IoU > 0.5.
        limit: the best of all that are kept.
    """
    first = members[0]
    boxes, scores, labels = (
        np.concatenate([getattr(m, name) for m in members]) for name in ("boxes", "scores", "labels")
    )
    if how == "wbf":
        fused = weighted_boxes(boxes, scores, labels, len(members))
    else:
        values = (torch.from_numpy(boxes).float(), torch.from_numpy(scores), torch.from_numpy(labels))
        keep = grouped_nms(*values, NMS_THRESH).numpy()
        fused = Fused(boxes[keep], scores[keep], keep)
    best = fused.best[:limit]
    changes: dict[str, Any] = {"boxes": fused.boxes[:limit], "scores": fused.scores[:limit], "labels": labels[best]}
    if first.masks is not None:
        masks = list(chain.from_iterable(m.masks or () for m in members))
        chosen = (masks[i] for i in best)
        changes["masks"] = tuple(chosen) if isinstance(first, Detections) else Packed(chosen, first.size)
    if first.keypoints is not None:
        names = ("keypoints", "keypoint_scores") if isinstance(first, Detections) else ("keypoints",)
        changes |= {name: np.concatenate([getattr(m, name) for m in members])[best] for name in names}
    if isinstance(first, ImageResult) and first.excused is not None:
        changes["excused"] = np.concatenate([getattr(m, "excused") for m in members])[best]  # noqa: B009
    return replace(first, **changes)


def check_members(names: Sequence[object], classes: Sequence[Sequence[str]], masks: Sequence[bool]) -> None:
    """Refuse detectors whose detections can't be fused.

    Args:
        names: of the M detectors.
        classes: of each.
        masks: whether each finds masks.

    Raises:
        DataError: their classes differ, or some find masks and some don't.
    """
    for name, own, has_masks in zip(names, classes, masks, strict=True):
        if list(own) != list(classes[0]):
            raise DataError(
                f"{name} and {names[0]} have other classes ({', '.join(own)[:80]}; {', '.join(classes[0])[:80]}): fuse "
                "detectors of the same classes in the same order"
            )
        if has_masks != masks[0]:
            raise DataError(f"one of {name} and {names[0]} finds masks, the other doesn't: fuse detectors of one kind")
