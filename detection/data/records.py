"""What every reader of annotations returns: records, defects, and the index that holds them.

A record is one image with its objects as numpy arrays, in the original pixels of the file. Readers never drop
anything silently: whatever they repair or leave out is a `Defect` in the index's report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detection.batch import Id
from detection.data.skeletons import Skeleton

Severity = Literal["note", "repairable", "broken"]
# What the four numbers of a box mean in a file: corners (VOC), corner and size (COCO), centre and size (YOLO).
Form = Literal["xyxy", "xywh", "cxcywh"]


@dataclass(slots=True)
class Record:
    """One image and its N objects.

    Attributes:
        image_id: the id of the image, as the annotation file spells it (VOC and YOLO: position in the split's list).
        file_name: image path relative to the index's root, forward slashes.
        width, height: pixels of the image as it will be decoded.
        boxes: `(N, 4)` float32 xyxy in original pixels, 0-based, positive width and height, inside the image.
        labels: `(N,)` int64 in `[1, C]`.
        areas: `(N,)` float32 annotation area in original pixels.
        iscrowd, difficult: `(N,)` bool; crowds and ignore regions are the same thing.
        annotation_ids: `(N,)` int64, the annotation's id (COCO) or its position in the file, for messages.
        segments: without masks None; else per object COCO polygons (list of flat lists), an RLE dictionary, or None.
        checked: `(C,)` bool, the classes that were looked for in the image, or None for all.
        partial: `(C,)` bool, the classes of which some objects may not be annotated, or None for none.
        written: `(M, 4)` float32, the boxes as the file has them, before any was clipped or left out; None where they
            are `boxes`. What is wrong with a whole set shows here, see `judging`.
        keypoints: `(N, k, 3)` float32 x, y in original pixels and visibility (0: not annotated, 1: hidden, 2: visible),
            zeros where that is 0; None where no key points are read.
        window: of a tile, its x and y in the file's image, and that image's height and width; all above is the tile's.
    """

    image_id: Id
    file_name: str
    width: int
    height: int
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    areas: NDArray[np.float32]
    iscrowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    annotation_ids: NDArray[np.int64]
    segments: list[Any] | None = None
    checked: NDArray[np.bool_] | None = None
    partial: NDArray[np.bool_] | None = None
    written: NDArray[np.float32] | None = None
    keypoints: NDArray[np.float32] | None = None
    window: tuple[int, int, int, int] | None = None

    @classmethod
    def of(
        cls,
        image_id: Id,
        file_name: str,
        size: tuple[int, int],
        boxes: Sequence[Sequence[float]] | NDArray[Any],
        labels: Sequence[int] | NDArray[Any],
        keypoints: NDArray[Any] | None = None,
    ) -> Record:
        """An image with plain objects: none a crowd or difficult, areas those of the boxes, numbered in their order.

        Args:
            image_id, file_name: see above.
            size: `(height, width)` of the image in pixels.
            boxes: `(N, 4)` xyxy in pixels, inside the image.
            labels: `(N,)`, from 1 on.
            keypoints: `(N, k, 3)`, or None.
        """
        corners = np.array(boxes, np.float32).reshape(-1, 4)
        count = len(corners)
        return cls(
            image_id=image_id,
            file_name=file_name,
            width=size[1],
            height=size[0],
            boxes=corners,
            labels=np.array(labels, np.int64).reshape(-1),
            areas=np.asarray((corners[:, 2:] - corners[:, :2]).prod(axis=1)),
            iscrowd=np.zeros(count, bool),
            difficult=np.zeros(count, bool),
            annotation_ids=np.arange(count),
            keypoints=None if keypoints is None else np.asarray(keypoints, np.float32),
        )


@dataclass(frozen=True, slots=True)
class Defect:
    """Something wrong in the data: where, what, and what to do about it.

    Attributes:
        file: the annotation or image file, relative to the root.
        record: which record in it, e.g. `"image 42, annotation 7"`.
        problem: one clause, e.g. `"box has zero width"`.
        fix: one clause, e.g. `"the box is left out; delete or redraw it"`.
        severity: `note` changes nothing, `repairable` was repaired or skipped or should be, `broken` can't be used.
    """

    file: str
    record: str
    problem: str
    fix: str
    severity: Severity = "repairable"

    def __str__(self) -> str:
        return f"{self.file}: {self.record}: {self.problem}; {self.fix}"

    @classmethod
    def of_split(cls, problem: str, fix: str, severity: Severity = "repairable") -> Defect:
        """Something that no single record shows."""
        return cls(ANNOTATIONS, SPLIT, problem, fix, severity)

    @property
    def is_of_split(self) -> bool:
        """Whether `of_split` made it: the log shows such defects first and in full."""
        return (self.file, self.record) == (ANNOTATIONS, SPLIT)


ANNOTATIONS, SPLIT = "annotations", "split"


@dataclass(slots=True)
class Index:
    """A split of a data set as read: its images, its classes, and what was wrong.

    Attributes:
        root: folder that every `file_name` is relative to, and that none may leave.
        classes: foreground class names; label `i` of a record is `classes[i - 1]`.
        category_ids: the id of each class, as this split's file spells it, to export detections with; None of a class
            that the file lacks.
        records: one `Record` an image, images without objects included.
        defects: what was repaired, skipped or noted while reading.
        frequencies: LVIS's group of each class, `"r"`, `"c"` or `"f"`, or None where the data names none.
        form: what the file's four numbers of a box mean.
        skeleton: what is known of the key points, where they are read and there are any.
    """

    root: Path
    classes: tuple[str, ...]
    category_ids: tuple[Id | None, ...]
    records: list[Record]
    defects: list[Defect] = field(default_factory=list)
    form: Form = "xyxy"
    frequencies: tuple[str, ...] | None = None
    skeleton: Skeleton | None = None


def relabel(index: Index, classes: Sequence[str], severity: Severity = "note") -> Index:
    """The same images with labels that point into `classes`, which another split or the user has named.

    Ids stay those of the index. Objects of other classes are left out and counted in a defect; a class that this split
    lacks has no object and no id. In images that say which classes were looked for, that class was not.

    Args:
        index: in classes of its own.
        classes: those of the result.
        severity: of what is left out: `repairable` where nobody asked for these classes alone.
    """
    labels = np.array([0, *(classes.index(name) + 1 if name in classes else 0 for name in index.classes)])
    dropped = Counter[str]()
    records = []
    places = [index.classes.index(name) if name in index.classes else -1 for name in classes]
    for record in index.records:
        new = labels[record.labels]
        kept = new > 0
        dropped.update(index.classes[old - 1] for old in record.labels[~kept])
        arrays = ("boxes", "areas", "iscrowd", "difficult", "annotation_ids")
        filtered: dict[str, Any] = {name: getattr(record, name)[kept] for name in arrays}
        if record.segments is not None:
            filtered["segments"] = [segment for segment, keep in zip(record.segments, kept, strict=True) if keep]
        if record.keypoints is not None:
            filtered["keypoints"] = record.keypoints[kept]
        for name in ("checked", "partial"):
            flags = getattr(record, name)
            filtered[name] = None if flags is None else np.append(flags, False)[places]
        records.append(replace(record, labels=new[kept], **filtered))
    left_out = [_untrained(dropped, classes, severity)] if dropped else []
    groups = None if index.frequencies is None else tuple((*index.frequencies, "")[place] for place in places)
    ids = dict(zip(index.classes, index.category_ids, strict=True))
    same = replace(index, classes=tuple(classes), category_ids=tuple(map(ids.get, classes)), frequencies=groups)
    return replace(same, records=records, defects=[*index.defects, *left_out])


def _untrained(dropped: Counter[str], classes: Sequence[str], severity: Severity) -> Defect:
    """Objects by their class that no class of training is named after, with those that are named nearly so."""
    alike = {plain_name(name): name for name in classes}
    named = []
    for name, count in dropped.most_common(10):
        other = alike.get(plain_name(name))
        named.append(f"'{name}' ({count}" + (f"; training calls it '{other}')" if other else ")"))
    shown = ", ".join(named) + (f" and {len(dropped) - 10} more" if len(dropped) > 10 else "")
    problem = f"{dropped.total()} objects are of classes that are not trained: {shown}"
    fix = "they are left out; name each class as training does, or among `classes` to train and evaluate it"
    return Defect.of_split(problem, fix, severity)


def plain_name(name: str) -> str:
    """A class name without what a slip of the hand changes: case, spaces and signs, the s of a plural."""
    return re.sub(r"[\W_]+", "", name.casefold()).rstrip("s")


def merge(root: Path, parts: Mapping[str, Index], classes: Sequence[str] | None = None) -> Index:
    """Several folders below `root` as one split, e.g. two years of VOC. Image ids are counted through.

    Args:
        root: that all folders lie in.
        parts: by folder, relative to `root`.
        classes: those wanted, in the order of their labels; None takes all, in the order of the folders.

    Raises:
        DataError: no folder has a class that is wanted.
    """
    known = list(dict.fromkeys(name for index in parts.values() for name in index.classes))
    absent = [name for name in classes or () if name not in known]
    if absent:
        raise DataError(f"{root}: there is no class '{absent[0]}' in {', '.join(parts)}; there are: {', '.join(known)}")
    names = tuple(classes or known)
    records: list[Record] = []
    defects: list[Defect] = []
    for folder, index in parts.items():
        same = relabel(index, names)
        for record in same.records:
            records.append(replace(record, image_id=len(records), file_name=f"{folder}/{record.file_name}"))
        defects += [replace(defect, file=f"{folder}/{defect.file}") for defect in same.defects]
    form = next(iter(parts.values())).form
    return Index(root, names, tuple(range(1, len(names) + 1)), records, defects, form)


class DataError(ValueError):
    """Data that can't be used; the message is one sentence naming file, record and fix.

    Attributes:
        defects: everything the reader had found when it gave up.
    """

    def __init__(self, message: str, defects: Sequence[Defect] = ()) -> None:
        super().__init__(message)
        self.defects = tuple(defects)
