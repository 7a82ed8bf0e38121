"""What the readers of every format check alike: paths, class names, and the boxes of one image."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detection.batch import Id
from detection.data.images import image_size
from detection.data.records import DataError, Defect, Index, Record, Severity

# Two decimals is how COCO writes coordinates: an overhang that small is rounding and not worth a line in the report.
ROUNDING = 0.01


class Folder:
    """A data root whose files are named by untrusted annotations: no name may lead out of it.

    Attributes:
        root: the resolved root.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: the data root is not a folder; pass the folder that holds the data set")
        self.root = root.resolve()

    def locate(self, name: str, source: str) -> Path:
        """The path of `name` below the root, which need not exist.

        Args:
            name: path relative to the root, with forward slashes.
            source: who names it (file and record), for the message.

        Raises:
            DataError: `name` is absolute, climbs out with `..`, or is a link that leads out of the root.
        """
        path = Path(name)
        drive = len(name) > 1 and name[1] == ":"
        try:
            inside = not ("\0" in name or path.is_absolute() or drive or ".." in path.parts)
            inside = inside and Path(os.path.realpath(self.root / path)).is_relative_to(self.root)
        except (OSError, ValueError):
            inside = False
        if not inside:
            shown = ascii(short(name)) + (" (through a link)" if self._is_link(path) else "")
            raise DataError(f"{source}: the path {shown} is not inside {self.root}; use a path relative to the root")
        return self.root / path

    def _is_link(self, path: Path) -> bool:
        """Whether a path that stays inside as it is written has a link in it."""
        if path.is_absolute() or ".." in path.parts or "\0" in str(path):
            return False
        return any(Path(self.root, *path.parts[:end]).is_symlink() for end in range(1, len(path.parts) + 1))


def short(text: str, limit: int = 300) -> str:
    """Text from a file, cut to a length that a message can carry."""
    return text if len(text) <= limit else f"{text[:limit]}..."


@dataclass(slots=True)
class Objects:
    """Collects the objects of one image, repairing or refusing each and writing down why.

    Attributes:
        file, record: where defects are reported, e.g. the annotation file and `"image 42"`.
        width, height: pixels of the image.
        defects: the index's list, appended to.
        written: every box as it was written, also those that are left out.
    """

    file: str
    record: str
    width: int
    height: int
    defects: list[Defect]
    rows: list[tuple[list[float], int, float, bool, bool, int]] = field(default_factory=list)
    segments: list[Any] = field(default_factory=list)
    keypoints: list[Any] = field(default_factory=list)
    written: list[Sequence[float]] = field(default_factory=list)

    def report(self, what: str, problem: str, fix: str, severity: Severity = "repairable") -> None:
        """Write down a defect of the object `what`."""
        self.defects.append(Defect(self.file, short(f"{self.record}, {what}"), short(problem), fix, severity))

    def add(
        self,
        what: str,
        box: Sequence[float],
        label: int,
        number: int,
        area: float | None = None,
        iscrowd: bool = False,
        difficult: bool = False,
        segment: Any = None,
        keypoints: Any = None,
    ) -> None:
        """Add one object, its box `(x1, y1, x2, y2)` clipped to the image; degenerate boxes are left out.

        Args:
            what: names the object in messages, e.g. `"annotation 7"`.
            box: float64 pixels, 0-based.
            label: in `[1, C]`.
            number: annotation id.
            area: None for the area of the clipped box.
            iscrowd, difficult, segment: as in `Record`.
            keypoints: `(k, 3)`, where key points are read.
        """
        x1, y1, x2, y2 = box
        if not np.isfinite(box).all():
            return self.report(what, "box has a coordinate that is not finite", "the box is left out; redraw it")
        self.written.append(box)
        if x2 <= x1 or y2 <= y1:
            side = "width" if x2 <= x1 else "height"
            sign = "zero" if (x2 == x1 if side == "width" else y2 == y1) else "negative"
            return self.report(what, f"box has {sign} {side}", "the box is left out; delete or redraw it")
        clipped = [min(max(x1, 0), self.width), min(max(y1, 0), self.height)]
        clipped += [min(max(x2, 0), self.width), min(max(y2, 0), self.height)]
        left, top, right, bottom = np.asarray(clipped, np.float32)
        if right <= left or bottom <= top:
            where = "is too thin to have an area" if clipped == list(box) else "lies outside the image"
            return self.report(what, f"box {where}", "the box is left out; delete or redraw it")
        overhang = max(abs(a - b) for a, b in zip(clipped, box, strict=True))
        if overhang > ROUNDING:
            self.report(what, f"box reaches {overhang:.4g} px outside the image", "it is clipped to the image", "note")
        if area is None:
            area = (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
        self.rows.append((clipped, label, area, iscrowd, difficult, number))
        self.segments.append(segment)
        self.keypoints.append(keypoints)

    def finish(self, image_id: Id, file_name: str, masks: bool, points: int = 0) -> Record:
        """The record of the image with everything added so far; with `points` key points of each object."""
        boxes, labels, areas, iscrowd, difficult, numbers = (
            (list(c) for c in zip(*self.rows, strict=True)) if self.rows else [[]] * 6
        )
        kept = np.asarray(boxes, np.float32).reshape(-1, 4)
        written = np.asarray(self.written, np.float32).reshape(-1, 4)
        return Record(
            image_id=image_id,
            file_name=file_name,
            width=self.width,
            height=self.height,
            boxes=kept,
            labels=np.asarray(labels, np.int64),
            areas=np.asarray(areas, np.float32),
            iscrowd=np.asarray(iscrowd, np.bool_),
            difficult=np.asarray(difficult, np.bool_),
            annotation_ids=np.asarray(numbers, np.int64),
            segments=self.segments if masks else None,
            written=None if np.array_equal(written, kept) else written,
            keypoints=np.asarray(self.keypoints, np.float32).reshape(-1, points, 3) if points else None,
        )


def checked_size(
    path: Path, stated: tuple[int, int] | None, file: str, record: str, defects: list[Defect]
) -> tuple[int, int]:
    """`(height, width)` of an image as it will be decoded; a different or missing statement is reported.

    Raises:
        DataError: the image is missing or unreadable.
    """
    if stated is None:
        problem, fix = "the image's size is missing or not positive", "the file's own size is used; write it down"
        defects.append(Defect(file, short(record), problem, fix))
    actual = image_size(path, stated)
    if stated is not None and actual != stated:
        problem = f"says {stated[1]}x{stated[0]} (width x height) but the file is {actual[1]}x{actual[0]}"
        fix = "the file's size is used; check that the boxes fit the image"
        defects.append(Defect(file, short(record), problem, fix))
    return actual


def choose_classes(names: Iterable[str], wanted: Sequence[str] | None, source: str) -> tuple[str, ...]:
    """The foreground classes in order: all the `names` of the data, or those wanted.

    Raises:
        DataError: a wanted class is absent from the data or wanted twice, or there is no class at all.
    """
    known = list(names)
    if wanted is None:
        wanted = known
    elif isinstance(wanted, str):
        raise DataError(f"{source}: classes is the string '{wanted}'; pass a list of names")
    elif twice := [name for name, count in Counter(wanted).items() if count > 1]:
        raise DataError(f"{source}: the class '{twice[0]}' is asked for twice; name each class once")
    for name in wanted:
        if name not in known:
            raise DataError(f"{source}: there is no class '{name}' in the data{nearest(name, known)}")
    if not wanted:
        raise DataError(f"{source}: no class is defined; add at least one class")
    return tuple(wanted)


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name most like `name`, else what there is."""
    known = sorted(set(known))
    folded = {k.casefold(): k for k in known}
    if match := difflib.get_close_matches(name.casefold(), folded, n=1):
        return f"; did you mean '{folded[match[0]]}'?"
    return f"; there are: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}" if known else ""


def finish_index(index: Index, source: str, hint: str = "") -> Index:
    """The index, unless nothing in it can be used.

    Raises:
        DataError: no image is left; the message holds the first defect.
    """
    if not index.records:
        why = f", first: {index.defects[0]}" if index.defects else ""
        raise DataError(f"{source}: no usable image ({len(index.defects)} defects{why}){hint}", index.defects)
    return index
