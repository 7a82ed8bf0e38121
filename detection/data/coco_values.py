"""What stands in the fields of a COCO file: ids, numbers, boxes and segmentations, in any spelling, or None."""

from __future__ import annotations

import math
from typing import Any

from detection.batch import Id
from detection.data import rle

LARGEST = 1e15  # number that is taken for one of pixels


def key_of(value: Any) -> Id | None:
    """An id as a whole number where it is one in any spelling, else as a string; None where it is no id."""
    number = whole_of(value)
    if number is not None:
        return number
    return value.strip() if isinstance(value, str) and value.strip() else None


def spelling_of(value: Any) -> Id:
    """An id as those who compare with the file must spell it; to Python and pycocotools, 7.0 is 7."""
    return value if isinstance(value, str) else int(value)


def no_id(item: Any) -> str:
    """What is wrong with the id of an entry that has none that `key_of` takes."""
    value = item.get("id") if isinstance(item, dict) else None
    return "it has no id" if value is None else f"its id is {str(value)[:40]!r}, neither a whole number nor text"


def whole_of(value: Any) -> int | None:
    """A number of any size without a fraction, in any spelling, or None."""
    if isinstance(value, str) and len(value) < 40 and value.strip().removeprefix("-").isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int else None


def integer_of(value: Any) -> int | None:
    """A whole number that an array can hold, or None."""
    number = whole_of(value)
    return number if number is not None and abs(number) < 2**63 else None


def float_of(value: Any) -> float | None:
    """A finite float, or None."""
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > LARGEST:
        return None
    return float(value) if math.isfinite(value) else None


def text_as_number(value: Any) -> Any:
    """The number of a text that is one, else the value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def box_of(value: Any) -> list[float] | None:
    """`[x, y, w, h]` as `[x1, y1, x2, y2]`, or None where it is not four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [float_of(text_as_number(v)) for v in value]
    if any(n is None for n in numbers):
        return None
    x, y, width, height = (float(n) for n in numbers if n is not None)
    return [x, y, x + width, y + height]


def is_polygon(value: Any) -> bool:
    """Whether it is `[x, y, x, y, ...]` of three points or more."""
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(float_of(v) is not None for v in value)
    )


def is_near(polygon: list[float], width: int, height: int) -> bool:
    """Whether all points lie within an image's size around the image; a coordinate of 1e12 takes minutes to fill."""
    xs, ys = polygon[::2], polygon[1::2]
    return -width <= min(xs) and max(xs) <= 2 * width and -height <= min(ys) and max(ys) <= 2 * height


def extent(segment: Any, height: int) -> list[float]:
    """The box `[x1, y1, x2, y2]` around a segmentation."""
    if isinstance(segment, dict):
        return list(rle.box(rle.decompress(segment["counts"]), height))
    xs, ys = [x for p in segment for x in p[::2]], [y for p in segment for y in p[1::2]]
    return [min(xs), min(ys), max(xs), max(ys)]


def area_of(segment: Any) -> float | None:
    """Pixels of an RLE, or the sum of the polygons' areas (shoelace formula); None where it is zero."""
    if isinstance(segment, dict):
        return float(sum(rle.decompress(segment["counts"])[1::2]))
    total = 0.0
    for p in segment:
        xs, ys = p[::2], p[1::2]
        total += abs(
            sum(x * y2 - x2 * y for x, y, x2, y2 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True))
        )
    return total / 2 or None
