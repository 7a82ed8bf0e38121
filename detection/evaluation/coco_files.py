"""A results file against an annotation file, whoever wrote them: the figures of pycocotools, and our report.

Numbers stay as the files have them, in float64; boxes are neither clipped nor repaired.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.batch import Id
from detection.data.dataset import to_rle
from detection.data.federated import NEGATIVE
from detection.data.listing import Listing, as_id, read_listing
from detection.data.records import DataError
from detection.data.rle import Packed
from detection.data.skeletons import COCO_SIGMAS, SIGMA
from detection.evaluation.mean_ap import IouType, MeanAP
from detection.evaluation.results import ImageResult, Rle

Entries = dict[Id, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two files hold, ready to be computed.

    Attributes:
        metric: has seen all images; its classes are the categories in ascending order of their ids.
        category_ids: of each class.
        notes: sentences on what was left out, or is counted otherwise than pycocotools does.
    """

    metric: MeanAP
    category_ids: tuple[Id, ...]
    notes: list[str]


def compare_files(annotations: Path, results: Path, detections_per_img: int = 100, masks: bool = True) -> Comparison:
    """Read both files; `metric.compute` gives pycocotools' figures.

    Args:
        annotations: COCO instances file. Its images need not be there.
        results: a list of `{"image_id", "category_id", "score"}` with one or several of `"bbox": [x, y, w, h]`,
            `"segmentation": RLE` and `"keypoints": [x, y, v, ...]`, or the `predictions.json` of `detection predict`.
            What the first entry has is compared. The area of a mask is its own; pycocotools takes that of the box where
            an entry has one.
        detections_per_img: how many detections of an image and class count.
        masks: false leaves masks out.

    Raises:
        DataError: naming file and entry: it is no such file, an image is not listed, a number is missing or not finite,
            masks are compared and an object has none, or key points and there are not 3 numbers for each.
    """
    listing = read_listing(annotations, annotated=True)
    found, kinds = _read_results(results, listing, masks)
    notes: list[str] = []
    truth = _truth(listing, "segm" in kinds, notes)
    points = _count_points(found, results) if "keypoints" in kinds else 0
    if points:
        _give_points(truth, points, annotations)
    labels = {number: label for label, number in enumerate(listing.categories, start=1)}
    unknown = Counter(e["category_id"] for entries in found.values() for e in entries if e["category_id"] not in labels)
    if unknown:
        names, count = ", ".join(map(str, list(unknown)[:10])), sum(unknown.values())
        notes.append(f"{results}: {count} detections are left out, of categories that {annotations} lacks: {names}")
    if any(NEGATIVE in entry for entry in listing.images.values()):
        notes.append(
            f"{annotations}: it says which classes were looked for, but these are COCO's figures and not LVIS's: "
            "detections of all classes count; evaluate a checkpoint"
        )
    if ignored := sum(item.get("ignore") == 1 for items in truth.values() for item in items):
        notes.append(f"{annotations}: {ignored} annotations with ignore 1 count as objects, as in pycocotools")
    metric = MeanAP(list(listing.categories.values()), detections_per_img, kinds)
    if points and points != len(COCO_SIGMAS):
        notes.append(f"{results}: OKS with the sigma {SIGMA} for each of the {points} key points")
    images = (
        _image(
            number,
            entry,
            found.get(number, []),
            truth.get(number, []),
            labels,
            kinds,
            f"{annotations}: image {number}",
            points,
        )
        for number, entry in listing.images.items()
    )
    metric.update([], [], images)
    return Comparison(metric, tuple(listing.categories), notes)


def _read_results(path: Path, listing: Listing, masks: bool) -> tuple[Entries, tuple[IouType, ...]]:
    """The checked detections of each image, in the order of the file, and what is compared."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: the results file is missing; check the path") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({str(error)[:100]}); export the results again") from error
    entries = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise DataError(f"{path}: a list of detections is expected; pass a COCO results file")
    first = entries[0] if entries and isinstance(entries[0], dict) else {}
    has: dict[IouType, Any] = {"bbox": first.get("bbox"), "segm": masks and first.get("segmentation")}
    has["keypoints"] = first.get("keypoints")
    kinds = tuple(kind for kind, value in has.items() if value) or ("bbox",)
    found: Entries = defaultdict(list)
    for position, entry in enumerate(entries):
        where = f"{path}: entry {position}"
        if not isinstance(entry, dict):
            raise DataError(f"{where} is a {type(entry).__name__}, not a detection; pass a COCO results file")
        image = as_id(entry.get("image_id"))
        if image is None or image not in listing.images:
            there = ", ".join(repr(number) for number in list(listing.images)[:3])
            raise DataError(
                f"{where} is of image {entry.get('image_id')!r:.60}, which {listing.path} does not list (it lists "
                f"{there}, ...); compare the results with the file that they were made for"
            )
        score = entry.get("score")
        if not _is_number(score):
            raise DataError(f"{where} has no score that is a finite number; pass a COCO results file")
        category = as_id(entry.get("category_id"))
        if category is None:
            raise DataError(f"{where} has no category_id that is a whole number or text; pass a COCO results file")
        if "bbox" in kinds:
            _check_box(entry.get("bbox"), where)
        if "segm" in kinds and not (isinstance(entry.get("segmentation"), dict) and "counts" in entry["segmentation"]):
            raise DataError(f"{where} has no RLE as segmentation, as others have; export masks of all, or of none")
        found[image].append(entry | {"category_id": category})
    return found, kinds


def _count_points(found: Entries, path: Path) -> int:
    """How many key points each detection has.

    Raises:
        DataError: not all have as many, in three finite numbers each.
    """
    counts = set[int]()
    for entry in (entry for entries in found.values() for entry in entries):
        numbers = entry.get("keypoints")
        if not isinstance(numbers, list) or len(numbers) % 3 or not numbers or not all(map(_is_number, numbers)):
            raise DataError(f"{path}: keypoints {numbers!r:.60} are not x, y and a third finite number of each point")
        counts.add(len(numbers) // 3)
    if len(counts) > 1:
        raise DataError(
            f"{path}: detections have {' and '.join(map(str, sorted(counts)))} key points; give all as many"
        )
    return counts.pop()


def _give_points(objects: Entries, count: int, path: Path) -> None:
    """Check the key points of the objects; those without any get zeros, which are not annotated."""
    for item in (item for items in objects.values() for item in items):
        numbers = item.get("keypoints") or [0] * (3 * count)
        if not isinstance(numbers, list) or len(numbers) != 3 * count or not all(map(_is_number, numbers)):
            raise DataError(f"{path}: annotation {item.get('id')} has not {3 * count} finite numbers as keypoints")
        item["keypoints"] = numbers


def _truth(listing: Listing, with_masks: bool, notes: list[str]) -> Entries:
    """The checked objects of each image, in the order of the file."""
    objects: Entries = defaultdict(list)
    left_out, without_area, ids = 0, 0, Counter[Any]()
    for position, item in enumerate(listing.annotations):
        where = f"{listing.path}: annotation at {position}"
        if not isinstance(item, dict):
            raise DataError(f"{where} is a {type(item).__name__}, not an object; pass a COCO instances file")
        image, category = as_id(item.get("image_id")), as_id(item.get("category_id"))
        if image not in listing.images or category not in listing.categories or image is None or category is None:
            left_out += 1
            continue
        box = _check_box(item.get("bbox"), where)
        area = item.get("area")
        if area is None:
            without_area += 1
            area = box[2] * box[3]
        elif not _is_number(area):
            raise DataError(f"{where} has the area {area!r:.40}, which is no finite number; correct it")
        if item.get("iscrowd") not in (None, 0, 1):
            raise DataError(f"{where} has iscrowd {item['iscrowd']!r:.40}; use 0 or 1")
        if with_masks and not item.get("segmentation"):
            raise DataError(f"{where} has no segmentation, but the results have masks; compare boxes, or draw it")
        ids[str(item.get("id"))] += 1
        objects[image].append(item | {"category_id": category, "area": area})
    notes += [f"{listing.path}: {text}" for text in _differences(left_out, without_area, ids)]
    return objects


def _differences(left_out: int, without_area: int, ids: Counter[Any]) -> Iterable[str]:
    """What pycocotools can't read or counts wrong, and we do not."""
    if left_out:
        yield f"{left_out} annotations are left out: their image or category is not listed"
    if without_area:
        yield f"{without_area} annotations have no area and get that of their box; pycocotools refuses them"
    if ids["0"]:
        yield "an annotation has the id 0, whose match pycocotools takes for none: its figures are lower"
    if max(ids.values(), default=0) > 1:
        yield "several annotations have one id, so that pycocotools mistakes one for another: its figures differ"


def _image(
    number: Id,
    entry: dict[str, Any],
    found: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    labels: dict[Id, int],
    kinds: tuple[IouType, ...],
    where: str,
    points: int,
) -> ImageResult:
    """Both sides of one image as the evaluator takes them."""
    found = [detection for detection in found if detection["category_id"] in labels]
    sides = entry.get("height"), entry.get("width")
    if "segm" in kinds and not all(type(side) is int and side > 0 for side in sides):
        raise DataError(f"{where} has no width and height, which masks need; write them down")
    height, width = (side if type(side) is int else 0 for side in sides)
    boxes = _corners(found)
    masks = gt_masks = None
    if "segm" in kinds:
        masks, gt_masks = (
            Packed((_mask(entry["segmentation"], height, width, where) for entry in side), (height, width))
            for side in (found, objects)
        )
    return ImageResult(
        image_id=number,
        file_name=str(entry.get("file_name", number)),
        size=(height, width),
        boxes=boxes,
        labels=np.array([labels[detection["category_id"]] for detection in found], np.int64),
        scores=np.array([detection["score"] for detection in found], np.float64),
        masks=masks,
        gt_boxes=_corners(objects),
        gt_labels=np.array([labels[item["category_id"]] for item in objects], np.int64),
        gt_areas=np.array([item["area"] for item in objects], np.float64),
        gt_iscrowd=np.array([item.get("iscrowd") == 1 for item in objects], np.bool_),
        gt_difficult=np.zeros(len(objects), np.bool_),
        gt_masks=gt_masks,
        keypoints=_points(found, points) if points else None,
        gt_keypoints=_points(objects, points) if points else None,
    )


def _points(entries: list[dict[str, Any]], count: int) -> NDArray[np.float64]:
    return np.array([entry["keypoints"] for entry in entries], np.float64).reshape(-1, count, 3)


def _corners(entries: list[dict[str, Any]]) -> NDArray[np.float64]:
    """`(N, 4)` xyxy of their boxes; around the key points where there are those alone, zeros with masks alone."""
    boxes = np.array([entry.get("bbox") or _around(entry) for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _around(entry: dict[str, Any]) -> tuple[float, float, float, float]:
    numbers = entry.get("keypoints") or [0, 0, 0]
    xs, ys = numbers[::3], numbers[1::3]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _mask(segment: Any, height: int, width: int, where: str) -> Rle:
    try:
        mask = to_rle(segment, np.zeros(4, np.float32), height, width)
        if mask["size"] != [height, width]:
            raise ValueError(f"its size is {mask['size']}, not {[height, width]}")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"{where}: a segmentation can't be read ({str(error)[:100]}); export it again") from error
    return mask


def _check_box(box: Any, where: str) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        raise DataError(f"{where} has the bbox {box!r:.80}, not [x, y, width, height] in finite numbers; correct it")
    return box


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
