"""Annotations of a COCO file by image; those that need no repair as rows of numbers.

JSON's dictionary of one annotation takes 500 bytes, and polygons as much again; its row takes 72. `Packer` makes the
row while the file is parsed, so that no more than one of these dictionaries is there at a time, and an image whose
annotations are all sound gets its arrays at once. All others are read one by one, by `detection.data.coco`, which says
what is sound.

Shape shorthand:
    N: annotations of an image
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detection.batch import Id
from detection.data.coco_values import LARGEST, key_of

_ROW = struct.Struct("=qqq5dq")
ROW = np.dtype(
    [("id", "i8"), ("image_id", "i8"), ("category_id", "i8"), ("bbox", "f8", 4), ("area", "f8"), ("ignored", "i8")]
)
NUMBERS = {int, float}


class Packer:
    """Makes the row of an annotation that is sound by itself, and leaves the rest: to be JSON's `object_hook`.

    Sound are whole ids, four finite numbers for a box and one for an area, and flags that are 0 or 1. Polygons are
    lost: they stand in for a box or an area where these are missing.

    Attributes:
        made: rows.
    """

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, item: dict[str, Any]) -> dict[str, Any] | bytes:
        """The row, or what is given."""
        try:
            (x, y, width, height), area = item["bbox"], item["area"]
            number, image, category = item["id"], item["image_id"], item["category_id"]
            crowd, ignore = item.get("iscrowd"), item.get("ignore")
            if not (
                {type(x), type(y), type(width), type(height), type(area)} <= NUMBERS
                and type(number) is type(image) is type(category) is int
                and abs(x) + abs(y) + abs(width) + abs(height) + abs(area) <= LARGEST  # which nan is not
                and crowd in (0, 1, None)
                and ignore in (0, 1, None)
            ):
                return item
            row = _ROW.pack(number, image, category, x, y, width, height, area, crowd == 1 or ignore == 1)
        except (KeyError, TypeError, ValueError, OverflowError, struct.error):
            return item
        self.made += 1
        return row

    def made_annotations_of(self, content: Any) -> bool:
        """Whether all rows are in the list `annotations` of the parsed file: other objects may look alike."""
        items = content.get("annotations") if isinstance(content, dict) else None
        return self.made == (sum(type(item) is bytes for item in items) if isinstance(items, list) else 0)


class Sound(NamedTuple):
    """Arrays of N annotations that need no repair, as in `Record`: `(N, 4)`, then `(N,)` each."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    areas: NDArray[np.float32]
    iscrowd: NDArray[np.bool_]
    annotation_ids: NDArray[np.int64]

    def take(self, part: slice | NDArray[np.bool_]) -> Sound:
        """The arrays of some of them."""
        boxes, labels, areas, iscrowd, ids = self
        return Sound(boxes[part], labels[part], areas[part], iscrowd[part], ids[part])


class Annotations:
    """All annotations of a file, by the key of their image.

    Args:
        items: as JSON has them, or as `Packer` makes them; the list is emptied.
        labels: of the keys of the categories; 0 for those that are not wanted.
        report: takes record, problem and fix of an annotation that names no image.
    """

    def __init__(self, items: list[Any], labels: Mapping[Id, int], report: Callable[[str, str, str], None]) -> None:
        is_row = np.fromiter((type(item) is bytes for item in items), bool, len(items))
        self._loose: dict[Id, list[tuple[int, dict[str, Any]]]] = {}
        for position in np.flatnonzero(~is_row).tolist():
            item = items[position]
            key = key_of(item.get("image_id")) if isinstance(item, dict) else None
            if key is None:
                report(f"annotation at {position}", "it has no image_id", "it is left out; add image_id")
                continue
            self._loose.setdefault(key, []).append((position, item))
        rows = np.frombuffer(b"".join(item for item in items if type(item) is bytes), ROW)
        items.clear()
        order = np.argsort(rows["image_id"], kind="stable")
        self._rows, self._positions = rows[order], np.flatnonzero(is_row)[order]
        self._images, starts = np.unique(self._rows["image_id"], return_index=True)
        self._bounds = np.append(starts, len(order))
        self._columns, self._is_sound, self._reach = self._judge(labels, starts)

    def _judge(
        self, labels: Mapping[Id, int], starts: NDArray[np.intp]
    ) -> tuple[Sound, NDArray[np.bool_], NDArray[np.float64]]:
        """The arrays of all rows; and of each image whether its rows are sound, if the furthest x and y are inside."""
        rows, boxes = self._rows, np.empty((len(self._rows), 4), np.float32)
        categories, category = np.unique(rows["category_id"], return_inverse=True)
        found = np.array([labels.get(key, -1) for key in categories.tolist()], np.int64)[category]
        far = rows["bbox"][:, :2] + rows["bbox"][:, 2:]
        boxes[:, :2], boxes[:, 2:] = rows["bbox"][:, :2], far
        areas, ids = rows["area"].astype(np.float32), rows["id"].copy()
        near_is_inside = (rows["bbox"][:, :2] >= 0).all(axis=1)
        good = near_is_inside & (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (areas > 0) & (found >= 0) | (found == 0)
        good &= ~np.isin(ids, self._find_twice())
        far[found == 0] = -np.inf
        columns = Sound(boxes, found, areas, rows["ignored"] == 1, ids)
        if not len(rows):
            return columns, good, far
        return columns, np.logical_and.reduceat(good, starts), np.maximum.reduceat(far, starts, axis=0)

    def _find_twice(self) -> NDArray[np.int64]:
        """Annotations' ids that are used more than once."""
        loose = (key_of(item.get("id")) for items in self._loose.values() for _, item in items)
        ids = [key for key in loose if isinstance(key, int) and abs(key) < 2**63]
        values = np.sort(np.concatenate((self._rows["id"], np.array(ids, np.int64))))
        return np.unique(values[1:][values[1:] == values[:-1]])

    def _place(self, key: Id) -> int | None:
        """Where an image is among those that have rows."""
        if not isinstance(key, int) or abs(key) >= 2**63:
            return None
        place = int(self._images.searchsorted(key))
        return place if place < len(self._images) and self._images[place] == key else None

    def _part(self, place: int | None) -> slice:
        return slice(0) if place is None else slice(self._bounds[place], self._bounds[place + 1])

    def images(self) -> set[Id]:
        """The keys of all images that have some."""
        return {*self._loose, *self._images.tolist()}

    def count(self, key: Id) -> int:
        """How many an image has."""
        return len(self._rows[self._part(self._place(key))]) + len(self._loose.get(key, ()))

    def items(self, key: Id) -> Iterable[tuple[int, dict[str, Any]]]:
        """Those of an image one by one, each with its position in the file."""
        found, part = [*self._loose.get(key, ())], self._part(self._place(key))
        for position, row in zip(self._positions[part].tolist(), self._rows[part].tolist(), strict=True):
            number, image, category, box, area, ignored = row
            item = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": area}
            found.append((position, item | {"iscrowd": ignored}))
        return sorted(found, key=lambda pair: pair[0])

    def sound(self, key: Id, width: int, height: int) -> Sound | None:
        """The arrays of an image's N annotations, without those of classes with label 0; None where one needs a look.

        Args:
            key: of the image.
            width, height: of the image in pixels.
        """
        if key in self._loose:
            return None
        place = self._place(key)
        if place is not None:
            x, y = self._reach[place]
            if not self._is_sound[place] or x > width or y > height:
                return None
        part = self._part(place)
        found = self._columns.take(part)
        return found if found.labels.all() else found.take(found.labels > 0)
