"""What evaluation works on: for each image the detections beside the ground truth, as plain numpy arrays.

Shape shorthand:
    D: detections of one image     N: ground-truth objects of one image     C: classes without background
    k: key points of an object
Boxes are `(x1, y1, x2, y2)` float32 pixels of the original image; labels are in `[1, C]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import mask as mask_api
from numpy.typing import NDArray
from torch import Tensor

from detection.batch import Id, Target
from detection.data import rle

Rle = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImageResult:
    """Detections and ground truth of one image, on the CPU and cheap to send between processes.

    Attributes:
        image_id, file_name, size: as in `Target`; size is `(height, width)` in pixels.
        boxes: `(D, 4)` float32 xyxy detections, in the detector's order; from a file, float64 as all its numbers.
            None is of a class that was not looked for.
        labels: `(D,)` int64 in `[1, C]`.
        scores: `(D,)` float32.
        masks: one COCO RLE a detection, or None without masks; `rle.Packed` takes the least memory.
        gt_boxes, gt_labels, gt_areas, gt_iscrowd, gt_difficult, gt_masks: the fields of `Target`, `N` each.
        excused: `(D,)` bool, detections of a class of which not all objects are annotated: those that match none are
            not counted. None where there are no such classes.
        keypoints: `(D, k, 3)` x, y and a third number that is not used; None without key points.
        gt_keypoints: `(N, k, 3)` x, y and visibility, likewise.
    """

    image_id: Id
    file_name: str
    size: tuple[int, int]
    boxes: NDArray[np.floating[Any]]
    labels: NDArray[np.int64]
    scores: NDArray[np.floating[Any]]
    masks: Sequence[Rle] | None
    gt_boxes: NDArray[np.floating[Any]]
    gt_labels: NDArray[np.int64]
    gt_areas: NDArray[np.floating[Any]]
    gt_iscrowd: NDArray[np.bool_]
    gt_difficult: NDArray[np.bool_]
    gt_masks: Sequence[Rle] | None
    excused: NDArray[np.bool_] | None = None
    keypoints: NDArray[np.floating[Any]] | None = None
    gt_keypoints: NDArray[np.floating[Any]] | None = None


def image_result(
    detection: Mapping[str, Any],
    target: Target,
    num_classes: int,
    masks: bool = False,
    limit: int | None = None,
    keypoints: bool = False,
) -> ImageResult:
    """Check one image's detections against what an evaluator can take, and bring both sides to the CPU.

    Of an image that says which classes were looked for (`Target.checked`), detections of others are left out.

    Args:
        detection: `boxes (D, 4)`, `labels (D,)`, `scores (D,)`, and with `masks` also `masks`: `(D, H, W)` or
            `(D, 1, H, W)` (bool, or probabilities cut at 0.5), or a list of COCO RLE dictionaries.
        target: the image's ground truth, in the same pixels.
        num_classes: C, without background.
        masks: whether masks are evaluated, and therefore required on both sides.
        keypoints: whether key points are evaluated; then the detection has `keypoints` `(D, k, 3)`, and the target too.
        limit: of such an image the best detections of all classes together that count, as LVIS has it; None for all.

    Raises:
        ValueError: naming the image: lengths that differ, a score or box that is not finite, a box whose right or
            lower side comes before its left or upper one, a label outside `[1, C]`, masks or key points that are
            missing or not as many as they should be, or masks of another size than the image's.
    """
    where = f"image {target.image_id} ({target.file_name})"
    boxes = _array(detection["boxes"], np.float32).reshape(-1, 4)
    scores = _array(detection["scores"], np.float32)
    labels = _array(detection["labels"], np.int64)
    gt_labels = _array(target.labels, np.int64)
    if not len(boxes) == len(scores) == len(labels):
        raise ValueError(f"{where}: {len(boxes)} boxes, {len(scores)} scores and {len(labels)} labels; pass one each")
    _refuse(~np.isfinite(scores), scores, where, "score is not finite; check the model for NaN")
    _refuse(~np.isfinite(boxes).all(1), boxes, where, "box is not finite; check the model for NaN")
    _refuse((boxes[:, 2:] < boxes[:, :2]).any(1), boxes, where, "box ends before it starts; boxes are x1, y1, x2, y2")
    for side, values in (("detected", labels), ("annotated", gt_labels)):
        _refuse((values < 1) | (values > num_classes), values, where, f"{side} label is outside [1, {num_classes}]")
    if masks and ("masks" not in detection or target.masks is None):
        raise ValueError(f"{where}: mask evaluation needs masks in the detections and in the ground truth")
    segments = gt_segments = None
    if masks:
        segments = _packed(encode_masks(detection["masks"]), len(boxes), target.size, f"{where}, detected")
        gt_segments = _packed(target.masks or (), len(gt_labels), target.size, f"{where}, annotated")
    points, gt_points = _points(detection, target, where) if keypoints else (None, None)
    if target.checked is not None:
        checked = _flags(target.checked, num_classes, where)
        best = np.sort(np.argsort(-scores, kind="stable")[:limit])
        kept = best[checked[labels[best]]]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        segments = None if segments is None else rle.Packed((segments[i] for i in kept), target.size)
        points = None if points is None else points[kept]
    return ImageResult(
        image_id=target.image_id,
        file_name=target.file_name,
        size=target.size,
        boxes=boxes,
        labels=labels,
        scores=scores,
        masks=segments,
        gt_boxes=_array(target.boxes, np.float32).reshape(-1, 4),
        gt_labels=gt_labels,
        gt_areas=_array(target.areas, np.float32),
        gt_iscrowd=_array(target.iscrowd, np.bool_),
        gt_difficult=_array(target.difficult, np.bool_),
        gt_masks=gt_segments,
        excused=None if target.partial is None else _flags(target.partial, num_classes, where)[labels],
        keypoints=points,
        gt_keypoints=gt_points,
    )


def _points(
    detection: Mapping[str, Any], target: Target, where: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The key points of both sides: `(D, k, 3)` and `(N, k, 3)`."""
    if "keypoints" not in detection or target.keypoints is None:
        raise ValueError(f"{where}: key points are needed in the detections and in the ground truth (data.keypoints)")
    annotated = _array(target.keypoints, np.float32)
    found = _array(detection["keypoints"], np.float32)
    if not len(detection["boxes"]):
        found = np.zeros((0, *annotated.shape[1:]), np.float32)
    if found.shape[1] != annotated.shape[1]:
        raise ValueError(
            f"{where}: {found.shape[1]} key points are detected, but {annotated.shape[1]} annotated: build the "
            f"detector with num_keypoints={annotated.shape[1]}"
        )
    _refuse(~np.isfinite(found).all((1, 2)), found, where, "a key point is not finite; check the model for NaN")
    return found, annotated


def _flags(classes: Tensor, num_classes: int, where: str) -> NDArray[np.bool_]:
    """`(C + 1,)` bool by label, of classes `(C,)`."""
    flags = _array(classes, np.bool_)
    if flags.shape != (num_classes,):
        raise ValueError(f"{where}: it says of {len(flags)} classes whether they were looked for, not of {num_classes}")
    return np.append(False, flags)


def spread(results: Sequence[ImageResult], count: int) -> list[ImageResult]:
    """At most `count` images, evenly from the whole of them; the same for the same images."""
    places = np.linspace(0, len(results) - 1, min(count, len(results))).astype(int)
    return [results[i] for i in np.unique(places)]


def encode_masks(masks: Any) -> list[Rle]:
    """COCO RLE of each mask: `(D, H, W)` or `(D, 1, H, W)` tensor or array (floats cut at 0.5); RLE passes through."""
    if isinstance(masks, list | tuple):
        return list(masks)
    dense: NDArray[Any] = masks.detach().cpu().numpy() if isinstance(masks, Tensor) else np.asarray(masks)
    return [mask_api.encode(_binary(mask.reshape(mask.shape[-2:]))) for mask in dense]  # one at a time: they are large


def _binary(mask: NDArray[Any]) -> NDArray[np.uint8]:
    return np.asfortranarray((mask > 0.5 if mask.dtype.kind == "f" else mask != 0).view(np.uint8))


def _packed(masks: Sequence[Rle], count: int, size: tuple[int, int], where: str) -> rle.Packed:
    if len(masks) != count:
        raise ValueError(f"{where}: {len(masks)} masks for {count} objects; pass one each")
    try:
        return rle.Packed(masks, size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; give masks in the pixels of the original image") from error


def _array(values: Tensor | NDArray[Any], dtype: Any) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    # A copy: a view would keep alive, or follow, whatever buffer the detector hands out next.
    return np.array(array, dtype=dtype)


def _refuse(bad: Any, values: NDArray[Any], where: str, problem: str) -> None:
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{where}, object {index}: {problem} (got {values[index].tolist()})")
