"""Reads YOLO folders: one text file an image, one `class x_center y_center width height` a line, relative to the image.

Where the files lie is `YoloLayout`'s to say. Lines of more numbers are polygons or oriented boxes
`class x1 y1 x2 y2 ...`, read as the box around them, or key points behind the box where `kpt_shape` says so. An image
without a text file has no objects: that is how the format writes background.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.data.checks import Objects, choose_classes, finish_index
from detection.data.coco_keypoints import check_points
from detection.data.images import image_size
from detection.data.records import DataError, Defect, Index, Record, Severity
from detection.data.skeletons import Skeleton, numbered, pairs_by_name
from detection.data.tree import Tree
from detection.data.yolo_layout import YoloLayout

FEWEST = 3  # lines from which their form shows what they are
LARGEST = 2.0  # relative coordinates beyond this are pixels, not boxes that reach over the edge


def read_yolo(root: Path, split: str, classes: Sequence[str] | None = None, keypoints: bool | None = False) -> Index:
    """Read one split of a YOLO data set.

    Every object left out and every value repaired is a defect of the index. Image ids are positions in the split,
    counted from 0; category ids are the format's own class numbers, from 0.

    Args:
        root: folder that holds `data.yaml` (or `classes.txt`) and the images, which no image may leave.
        split: a key of the YAML file, or a folder `images/{split}` or `{split}/images`; `""` is every labelled folder.
        classes: names of the classes to read, in the order of their labels; None for all.
        keypoints: read the key points behind the box too, where `kpt_shape` says that there are any. Of two numbers
            each, those at (0, 0) are not annotated, and all others visible. `flip_idx` says which change places
            in a mirror.

    Raises:
        DataError: class names, the split or a wanted class are absent, a path leaves the root, `flip_idx` is no
            exchange of points, or no image is left.
    """
    return read_layout(YoloLayout(Tree(Path(root))), split, classes, keypoints)


def read_layout(
    layout: YoloLayout, split: str, classes: Sequence[str] | None = None, keypoints: bool | None = False
) -> Index:
    """Read one split of a data set that was found; see `read_yolo`."""
    chosen = choose_classes(layout.names.values(), classes, layout.source or str(layout.tree.root))
    labels = {number: chosen.index(name) + 1 if name in chosen else 0 for number, name in layout.names.items()}
    numbers = {name: number for number, name in layout.names.items()}
    pictures, defects = layout.pictures(split)
    reader = _Reader(layout, labels, [*layout.defects, *defects, *layout.orphans(split)], keypoints)
    ids = tuple(numbers[name] for name in chosen)
    index = Index(layout.tree.root, chosen, ids, [], reader.defects, form="cxcywh", skeleton=reader.skeleton)
    for position, picture in enumerate(pictures):
        if (record := reader.record(position, picture)) is not None:
            index.records.append(record)
    reader.judge_numbers()
    reader.judge_key_points()
    return finish_index(index, f"{layout.tree.root} split '{split}'" if split else str(layout.tree.root))


class _Reader:
    """Reads the label files of one data set, and holds what was found wrong in them."""

    def __init__(
        self, layout: YoloLayout, labels: dict[int, int], defects: list[Defect], keypoints: bool | None
    ) -> None:
        self.layout, self.labels, self.defects = layout, labels, defects
        shape: Any = layout.config.get("kpt_shape")
        good = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
        good = good and shape[0] > 0 and shape[1] in (2, 3)
        self.seen: set[int] = set()  # class numbers
        self.long = Counter[tuple[int, bool]]()  # lines by how many numbers follow the class, and if key points may
        self.points = shape[0] * shape[1] if good else 0  # numbers of the key points that follow the box
        self.skeleton = _skeleton(layout, shape[0]) if good and keypoints is not False else None

    def report(self, file: str, record: str, problem: str, fix: str, severity: Severity = "repairable") -> None:
        self.defects.append(Defect(file, record, problem, fix, severity))

    def judge_numbers(self) -> None:
        """Raise where class numbers count from 1: all but the last class would be taken for the one behind it."""
        count = len(self.labels)
        one_more = 0 not in self.seen and count in self.seen and max(self.seen) == count
        if 0 in self.labels and one_more and 2 * len(self.seen) > count:
            problem = f"class numbers in the label files run from {min(self.seen)} to {count}, but names count from 0"
            where = self.layout.tree.root / self.layout.source
            raise DataError(f"{where}: {problem}; subtract 1 from the class numbers", self.defects)

    def judge_key_points(self) -> None:
        """Raise where all long lines look like a box and key points that no `kpt_shape` announces."""
        (count, alike), lines = next(iter(self.long.items()), ((0, False), 0))
        if len(self.long) == 1 and alike and lines >= FEWEST:
            points = (count - 4) // 3
            problem = f"{count} numbers follow each class, and every third behind the box is 0, 1 or 2: key points"
            where = self.layout.tree.root / self.layout.source
            raise DataError(f"{where}: {problem}; add the line kpt_shape: [{points}, 3]", self.defects)

    def record(self, position: int, image: str) -> Record | None:
        """The record of one image, or None where it can't be used."""
        path = self.layout.tree.locate(image, f"image {position}")
        try:
            height, width = image_size(path)
        except DataError as error:
            problem = str(error).removeprefix(f"{path}: ").split(";")[0]
            self.report(image, f"image {position}", problem, "the image is left out; restore the file", "broken")
            return None
        file = self.layout.pairs.label.get(image)
        if file is None:
            return Objects(image, "file", width, height, self.defects).finish(
                position, image, False, len(self.skeleton or ())
            )
        objects = Objects(file, "file", width, height, self.defects)
        try:
            lines = self.layout.tree.locate(file, image).read_text("utf-8-sig").splitlines()
        except (OSError, ValueError):
            self.report(file, "file", "not readable as text", "the image is left out; repair the file", "broken")
            return None
        for number, line in enumerate(lines):
            if line.strip():
                self._object(objects, number, line.split())
        return objects.finish(position, image, False, len(self.skeleton or ()))

    def _object(self, objects: Objects, number: int, words: list[str]) -> None:
        what = f"line {number + 1}"
        try:
            category, *values = (float(word) for word in words)
        except ValueError:
            return objects.report(what, "it holds something that is no number", "the line is left out; correct it")
        if category.is_integer():
            self.seen.add(int(category))
        if category not in self.labels:
            problem = f"there is no class {words[0][:20]}"
            return objects.report(what, problem, f"the line is left out; use 0..{max(self.labels)}")
        points: list[float] = []
        if self.points and len(values) == 4 + self.points:
            values, points = values[:4], values[4:]
        elif self.points and len(values) > 5:
            problem = f"{len(values)} numbers follow the class"
            return objects.report(what, problem, f"the line is left out; write 4 and {self.points}, as kpt_shape says")
        if len(values) > 6:
            self.long[len(values), _may_be_key_points(values)] += 1
        if len(values) == 5:
            objects.report(what, "a sixth number follows the box", "it is not used; remove scores", "note")
            values = values[:4]
        if not all(abs(value) <= LARGEST for value in values):
            problem = "coordinates are not relative to the image (0 to 1)"
            return objects.report(what, problem, "the line is left out; divide by width and height")
        if len(values) == 4:
            x, y, w, h = values
            box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        elif len(values) >= 6 and len(values) % 2 == 0:
            box = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
        else:
            problem = f"{len(values)} numbers follow the class"
            return objects.report(what, problem, "the line is left out; write 4, or 3 points or more")
        if label := self.labels[int(category)]:
            scale = (objects.width, objects.height, objects.width, objects.height)
            corners = [value * side for value, side in zip(box, scale, strict=True)]
            objects.add(what, corners, label, number, keypoints=self._key_points(objects, what, points))
        return None

    def _key_points(self, objects: Objects, what: str, numbers: list[float]) -> NDArray[np.float32] | None:
        """The points of a line as `(k, 3)` in pixels, zeros where it has none; None where none are read."""
        if self.skeleton is None:
            return None
        if not numbers:
            objects.report(what, "no key points follow the box", "it has none that are annotated; add them", "note")
            return np.zeros((len(self.skeleton), 3), np.float32)
        rows = np.array(numbers).reshape(len(self.skeleton), -1)
        if rows.shape[1] == 2:
            rows = np.column_stack((rows, 2.0 * (rows != 0).any(axis=1)))
        return check_points(rows * (objects.width, objects.height, 1), objects, what)


def _skeleton(layout: YoloLayout, count: int) -> Skeleton:
    """The names and pairs of the points, as `kpt_names` and `flip_idx` have them."""
    listed: Any = layout.config.get("kpt_names")
    listed = next(iter(listed.values()), None) if isinstance(listed, dict) else listed
    known = isinstance(listed, list) and len(listed) == count and all(isinstance(name, str) for name in listed)
    names = tuple(listed) if known else numbered(count)
    order: Any = layout.config.get("flip_idx")
    if order is None:
        return Skeleton(names, pairs_by_name(names) if known else None)
    positions = list(range(count))
    whole = isinstance(order, list) and all(type(i) is int for i in order) and sorted(order) == positions
    if not whole or [order[i] for i in order] != positions:
        raise DataError(
            f"{layout.tree.root / layout.source}: flip_idx must give each of the {count} points its partner, which "
            "gives it back, or itself; correct it"
        )
    return Skeleton(names, tuple((i, j) for i, j in enumerate(order) if i < j))


def _may_be_key_points(values: list[float]) -> bool:
    """Whether the numbers may be a box inside its picture and points `x y visibility`."""
    x, y, width, height = values[:4]
    inside = min(x - width / 2, y - height / 2) > -0.01 and max(x + width / 2, y + height / 2) < 1.01
    flags = values[6::3]
    return inside and min(width, height) > 0 and len(values) % 3 == 1 and all(value in (0, 1, 2) for value in flags)
