"""Key points of COCO files: three numbers a point, x, y and visibility, whose names the category gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.data.checks import Objects, short
from detection.data.records import DataError
from detection.data.skeletons import Skeleton, pairs_by_name

SLACK = 0.01  # pixels outside of the image that are rounding


def skeleton_of(categories: Mapping[str, Mapping[str, Any]], file: str) -> Skeleton | None:
    """The key points that all classes with key points share; None where no class names any.

    Args:
        categories: of the file, by the name of the class.
        file: for messages.

    Raises:
        DataError: two classes have other key points, which one head can't learn.
    """
    named = {name: item["keypoints"] for name, item in categories.items() if _are_names(item.get("keypoints"))}
    if not named:
        return None
    first, points = next(iter(named.items()))
    for name, others in named.items():
        if others != points:
            raise DataError(
                f"{file}: '{first}' has {len(points)} key points ({short(', '.join(points), 80)}), but '{name}' "
                f"{len(others)} ({short(', '.join(others), 80)}): choose classes of one kind with data.classes"
            )
    return Skeleton(tuple(points), pairs_by_name(points), _edges(categories[first].get("skeleton"), len(points)))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _edges(value: Any, count: int) -> tuple[tuple[int, int], ...]:
    """Pairs of positions from 0, of COCO's from 1; what is none is left out, as it only draws lines."""
    pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2] if isinstance(value, list) else []
    good = [(a - 1, b - 1) for a, b in pairs if type(a) is type(b) is int and 1 <= min(a, b) <= max(a, b) <= count]
    return tuple(good)


def read_points(item: Mapping[str, Any], count: int, objects: Objects, what: str) -> NDArray[np.float32]:
    """The key points `(count, 3)` of an annotation, zeros where there are none; what is wrong is reported.

    Args:
        item: the annotation.
        count: k.
        objects: of the image.
        what: names the annotation in messages.
    """
    value = item.get("keypoints")
    nothing = np.zeros((count, 3), np.float32)
    if value is None or value == []:
        return nothing
    try:
        numbers = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.zeros(0)
    if numbers.shape != (3 * count,):
        found = f"{len(value)} numbers" if isinstance(value, list) else type(value).__name__
        problem = f"keypoints holds {found}, not {3 * count} for {count} points"
        objects.report(what, problem, "it has no key points; write x, y, visibility of each")
        return nothing
    points = check_points(numbers.reshape(count, 3), objects, what)
    labelled, stated = int((numbers[2::3] > 0).sum()), item.get("num_keypoints")
    if type(stated) is int and stated != labelled:
        problem = f"num_keypoints is {stated}, but {labelled} points are annotated"
        objects.report(what, problem, "the points are counted; correct it", "note")
    return points


def check_points(points: NDArray[np.float64], objects: Objects, what: str) -> NDArray[np.float32]:
    """Points `(k, 3)` in pixels as training takes them: zeros where not annotated, all others inside the image."""
    seen = points[:, 2]
    known = np.isin(seen, (0, 1, 2))
    if not known.all():
        value = seen[~known][0]
        fix = "such points count as not annotated; use 0, 1 or 2"
        objects.report(what, f"the visibility of {int((~known).sum())} key points is {value:g}", fix)
    finite = np.isfinite(points).all(axis=1)
    annotated = known & finite & (seen > 0)
    if not finite.all():
        objects.report(what, f"{int((~finite).sum())} key points are not finite", "they are left out; correct them")
    limits = np.array([objects.width, objects.height])
    places = np.where(annotated[:, None], points[:, :2], 0)
    outside = (places < -SLACK).any(axis=1) | (places > limits + SLACK).any(axis=1)
    if outside.any():
        problem = f"{int(outside.sum())} key points lie outside the image"
        objects.report(what, problem, "they count as not annotated; correct them")
    corner = annotated & (places == 0).all(axis=1)
    if corner.any():
        problem = f"{int(corner.sum())} annotated key points lie at (0, 0)"
        objects.report(what, problem, "they are kept; give points that are not annotated the visibility 0", "note")
    kept = annotated & ~outside
    rows = np.column_stack((places.clip(0, limits), seen))
    return np.where(kept[:, None], rows, 0).astype(np.float32)
