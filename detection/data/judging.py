"""Judges a whole split: what is wrong with it although no single record shows it, and what makes training pointless.

A box that reaches over the edge is a slip of the hand; if most do, and all would lie inside with their numbers read as
corners, the export wrote corners. So each judgement counts over the split and names only what the counts show clearly.
What is `broken` here is refused before training with the words that the audit shows.

Shape shorthand:
    M: boxes of a split as its file has them, kept or not
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.data.federated import seen_together
from detection.data.headers import EXTENSIONS
from detection.data.pairing import pair
from detection.data.records import Defect, Form, Index, Record, Severity, relabel

Boxes = NDArray[np.float64]
Flags = NDArray[np.bool_]

# A box may reach this far over an edge, in pixels or as a share of the side, whichever is more: counting from 1,
# rounding, and pictures that were scaled by a fraction.
SLACK, SLACK_SHARE = 2.0, 0.01
FEWEST = 3  # boxes from which a set shows anything,
MANY = 8  # and from which a part of it does
# Of boxes or images: from here on it is the set that is wrong, and training on it is refused.
MOST_WRONG = 0.1
LABEL_KINDS = (".txt", ".xml")


def judge(index: Index, split: str = "train", with_difficult: bool = False) -> list[Defect]:
    """What is wrong with a split as a whole.

    Args:
        index: as read.
        split: `train`, `val` or `test`; without an object there is nothing to train or to validate on, but a test
            split may be there to detect in.
        with_difficult: whether training is on difficult objects too.

    Returns:
        Defects of the split: `broken` ones make training or validation pointless.
    """
    if not index.records:
        return []
    return [*_objects(index, split, with_difficult), *_coordinates(index)]


def judge_splits(train: Index, val: Index, split: str = "val") -> list[Defect]:
    """What only two splits together show: objects of the other's classes that training does not have.

    Args:
        train, val: each in the classes that its own files name.
        split: what `val` is, as in `judge`.
    """
    same = relabel(val, train.classes, "repairable")
    missed = same.defects[len(val.defects) :]
    return [*missed, *(_objects(same, split) if missed else [])]


def one_record_per_picture(index: Index) -> Index:
    """The same split with one record for each picture, where the file lists some as several images.

    The first image's id stays, at its place, with the objects of all in the order of the file. An object that an
    earlier image of the picture has too, in box, class and crowd, is a copy and left out. Whoever matches detections
    with the file by id must know that the other ids of the picture have none.
    """
    by_picture: dict[str, list[Record]] = {}
    for record in index.records:
        by_picture.setdefault(record.file_name, []).append(record)
    several = [records for records in by_picture.values() if len(records) > 1]
    if not several:
        return index
    entries, copies = sum(map(len, several)), 0
    merged: list[Record] = []
    for records in by_picture.values():
        whole, left_out = _union(records)
        merged.append(whole)
        copies += left_out
    problem = f"{len(several)} pictures are listed as {entries} images, the first of them {several[0][0].file_name}"
    fix = "each is read once, with the objects of all under the first one's id; list it once"
    noted = [Defect.of_split(problem, fix, "note")]
    if copies:
        problem = f"{copies} objects are listed again with another image of the same picture"
        noted.append(Defect.of_split(problem, "the copies are left out; delete them"))
    return replace(index, records=merged, defects=[*index.defects, *noted])


def _union(records: Sequence[Record]) -> tuple[Record, int]:
    """One record with the objects of several, and how many copies were left out."""
    if len(records) == 1:
        return records[0], 0
    seen: set[tuple[Any, ...]] = set()
    kept: list[Flags] = []
    for record in records:
        rows = zip(record.boxes.tolist(), record.labels.tolist(), record.iscrowd.tolist(), strict=True)
        objects = [(*box, label, crowd) for box, label, crowd in rows]
        kept.append(np.array([row not in seen for row in objects], np.bool_))
        seen.update(objects)
    names = ("boxes", "labels", "areas", "iscrowd", "difficult", "annotation_ids")
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(r, name)[k] for r, k in zip(records, kept, strict=True)]) for name in names
    }
    arrays["checked"], arrays["partial"] = seen_together(records)
    if records[0].segments is not None:
        pairs = [pair for r, k in zip(records, kept, strict=True) for pair in zip(r.segments or (), k, strict=True)]
        arrays["segments"] = [segment for segment, keep in pairs if keep]
    points = [r.keypoints[k] for r, k in zip(records, kept, strict=True) if r.keypoints is not None]
    arrays["keypoints"] = np.concatenate(points) if points else None
    if any(record.written is not None for record in records):
        arrays["written"] = np.concatenate([_written(record) for record in records])
    return replace(records[0], **arrays), sum(int((~flags).sum()) for flags in kept)


def _written(record: Record) -> NDArray[np.float32]:
    return record.boxes if record.written is None else record.written


def _objects(index: Index, split: str, with_difficult: bool = False) -> list[Defect]:
    """Whether anything in the split counts, with what keeps it from doing so."""
    objects = sum(len(record.labels) for record in index.records)
    difficult = split == "train" and not with_difficult
    if any((~(r.iscrowd | r.difficult) if difficult else ~r.iscrowd).any() for r in index.records):
        return []
    problem = f"none of {len(index.records)} images has an object"
    if objects:
        problem = f"all of {objects} objects are crowds{' or difficult' if difficult else ''}, so that none counts"
    elif reason := _reason(index):
        problem += f": {reason}"
    if split == "test":
        return [Defect.of_split(problem, "there are no figures without; detecting needs none", "note")]
    if split == "train":
        fix = "there is nothing to learn from: correct the annotations, or name the right split"
    else:
        fix = "there is nothing to validate on: name the right split, or train without (--trainer.limit_val_batches 0)"
    return [Defect.of_split(problem, fix, "broken")]


def _reason(index: Index) -> str:
    """Why no object is left, as far as the defects or the folders tell."""
    serious = [defect.problem for defect in index.defects if defect.severity != "note"]
    if whole := [defect.problem for defect in index.defects if defect.is_of_split]:
        return whole[-1]
    if serious:
        kind, count = Counter(map(kind_of, serious)).most_common(1)[0]
        first = next(problem for problem in serious if kind_of(problem) == kind)
        return first if count == 1 else f"{count} times such as '{first}'"
    if place := _labels_elsewhere(index):
        return f"label files of these names lie in '{place}', which should be called as the folder of images is"
    return ""


def _labels_elsewhere(index: Index) -> str | None:
    """The folder below the root with most label files of the pictures' names that belong to none of them, not empty."""
    stems = {PurePosixPath(record.file_name).stem for record in index.records}
    labels: list[str] = []
    for place, folders, files in os.walk(index.root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        named = [name for name in files if name.lower().endswith(LABEL_KINDS) and Path(name).stem in stems]
        labels += [Path(place, name).relative_to(index.root).as_posix() for name in named]
    alone = pair([record.file_name for record in index.records], labels).alone
    found = Counter(os.path.dirname(name) for name in alone if os.path.getsize(index.root / name) > 0)
    return found.most_common(1)[0][0] if found else None


def kind_of(problem: str) -> str:
    """A problem without its particulars, so that like ones can be counted together."""
    endings = "|".join(EXTENSIONS).replace(".", r"\.")
    names = re.sub(rf"'[^']*'|\S+/\S+\.\w+|\S+({endings})\b", "...", problem)
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", names)


@dataclass(frozen=True, slots=True)
class _Written:
    """All boxes of a split as its file has them.

    Attributes:
        boxes: `(M, 4)` xyxy, in whatever the reader took for 0-based pixels.
        sides: `(M, 2)` width and height of each one's picture.
        image: `(M,)` int64, the position of its record.
    """

    boxes: Boxes
    sides: Boxes
    image: NDArray[np.int64]

    @classmethod
    def of(cls, index: Index) -> _Written:
        boxes = [_written(record) for record in index.records]
        counts = [len(own) for own in boxes]
        sides = np.repeat([(record.width, record.height) for record in index.records], counts, axis=0)
        image = np.repeat(np.arange(len(counts)), counts)
        return cls(np.concatenate(boxes).astype(np.float64), sides.astype(np.float64), image)

    def only(self, chosen: Flags) -> _Written:
        return _Written(self.boxes[chosen], self.sides[chosen], self.image[chosen])

    def fits(self, boxes: Boxes) -> Flags:
        """`(M,)`: which of these boxes, in place of its own, have a size and lie in their pictures."""
        slack = np.maximum(SLACK, SLACK_SHARE * self.sides)
        inside = (boxes[:, :2] >= -slack) & (boxes[:, 2:] <= self.sides + slack)
        return np.asarray((inside & (boxes[:, 2:] > boxes[:, :2])).all(axis=1))

    def of_same_images(self, chosen: Flags) -> Flags:
        """`(M,)`: the boxes of all images that have a chosen one."""
        images = np.zeros(int(self.image.max(initial=0)) + 1, np.bool_)
        images[self.image[chosen]] = True
        return np.asarray(images[self.image])


def _coordinates(index: Index) -> list[Defect]:
    written = _Written.of(index)
    relative = _relative(written)
    defects = _judge_relative(written, relative)
    written = written.only(~relative)
    wrong = ~written.fits(written.boxes)
    if wrong.sum() < max(FEWEST, 0.02 * len(wrong)):
        return defects
    return [*defects, *(_judge_form(written, wrong, index.form) or _judge_size(written, wrong))]


def _relative(written: _Written) -> Flags:
    """`(M,)`: the boxes of images all of whose numbers lie in 0 to 1, as no picture is a pixel wide.

    Readers have made them up to 2 (a corner that was a size), or from -1 on (VOC counts from 1). Whole numbers alone
    are no share of a side but a click, or the box that stands for none.
    """
    low = np.asarray((np.abs(written.boxes) <= 2).all(axis=1) & (written.sides >= 16).all(axis=1))
    fractions = np.asarray((written.boxes != written.boxes.round()).any(axis=1))
    return written.of_same_images(fractions) & ~written.of_same_images(~low)


def _judge_relative(written: _Written, relative: Flags) -> list[Defect]:
    images, of = len(np.unique(written.image[relative])), len(np.unique(written.image))
    if not images or (images < of and (images < FEWEST or relative.sum() < 2 * FEWEST)):
        return []
    problem = f"the boxes look relative to the image: in {images} of {of} images with boxes all coordinates are 0 to 1"
    fix = "write pixels: multiply x and width by the width of the image, y and height by its height"
    return [Defect.of_split(problem, fix, _severity(images / of))]


def _severity(share: float) -> Severity:
    return "broken" if share >= MOST_WRONG else "repairable"


# What four numbers may mean: the corners they stand for, as `(..., 4)` xyxy.
READINGS: dict[str, tuple[str, Callable[[Boxes], Boxes]]] = {
    "xyxy": ("corners (x1, y1, x2, y2)", lambda n: n),
    "xywh": ("corner and size (x, y, width, height)", lambda n: np.hstack([n[:, :2], n[:, :2] + n[:, 2:]])),
    "cxcywh": (
        "centre and size (cx, cy, width, height)",
        lambda n: np.hstack([n[:, :2] - n[:, 2:] / 2, n[:, :2] + n[:, 2:] / 2]),
    ),
    "yxyx": ("corners with y first (y1, x1, y2, x2)", lambda n: n[:, [1, 0, 3, 2]]),
    "yxhw": (
        "corner and size with y first (y, x, height, width)",
        lambda n: np.hstack([n[:, 1::-1], n[:, 1::-1] + n[:, :1:-1]]),
    ),
    "xxyy": ("sides (x1, x2, y1, y2)", lambda n: n[:, [0, 2, 1, 3]]),
}
# The four numbers that a reader of each form has made corners of.
NUMBERS: Mapping[Form, Callable[[Boxes], Boxes]] = {
    "xyxy": lambda boxes: boxes,
    "xywh": lambda boxes: np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]),
    "cxcywh": lambda boxes: np.hstack([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]]),
}


def _judge_form(written: _Written, wrong: Flags, form: Form) -> list[Defect]:
    """Whether the boxes that do not fit would do so if their numbers meant something else.

    Another meaning must leave a twentieth of what is wrong, or less: in the whole split, or in the images that have a
    wrong box where these are many.
    """
    share, many = float(wrong.mean()), wrong.sum() >= MANY
    if not many and share < MOST_WRONG:
        return []
    places = [np.ones_like(wrong)] + ([written.of_same_images(wrong)] if many else [])
    for place in places:
        here = written.only(place)
        numbers = NUMBERS[form](here.boxes)
        left = {
            name: int((~here.fits(corners(numbers))).sum()) for name, (_, corners) in READINGS.items() if name != form
        }
        fewest = min(left.values())
        if fewest * 20 <= wrong.sum():
            meant = " or as ".join(READINGS[name][0] for name, count in left.items() if count == fewest)
            problem = (
                f"{wrong.sum()} of {len(wrong)} boxes are empty or outside their images, but lie inside as {meant}"
            )
            fix = f"the format takes the four numbers for {READINGS[form][0]}: convert them"
            return [Defect.of_split(problem, fix, _severity(share))]
    return []


def _judge_size(written: _Written, wrong: Flags) -> list[Defect]:
    """Whether boxes are those of larger pictures: many beyond the right or lower edge, none beyond the others."""
    boxes, sides = written.boxes, written.sides
    beyond = wrong & (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (boxes[:, :2] >= -SLACK).all(axis=1)
    outside = beyond & (boxes[:, :2] >= sides).any(axis=1)
    if beyond.sum() < 0.95 * wrong.sum() or outside.sum() < max(FEWEST, 0.02 * len(wrong)):
        return []
    across, down = (boxes[:, 2:] / sides).max(axis=0)
    problem = (
        f"{beyond.sum()} of {len(wrong)} boxes reach beyond the right or lower edge, up to {across:.3g} times the "
        f"width and {down:.3g} times the height, and none beyond the others: they look drawn on larger pictures"
    )
    fix = "use the pictures that were annotated, or scale the boxes as the pictures were scaled"
    return [Defect.of_split(problem, fix, _severity(float(beyond.mean())))]


def half_labelled(copies: Iterable[Sequence[Record]]) -> list[Defect]:
    """Pictures that lie in a split several times, with other objects each time: what one lacks is background to it.

    Args:
        copies: for each such picture the records of its copies.
    """
    defects = []
    for records in copies:
        objects = [_objects_of(record) for record in records]
        first = records[0]
        for record, own in zip(records[1:], objects[1:], strict=True):
            if own != objects[0]:
                counts = f"{own.total()} here, {objects[0].total()} there"
                problem = f"it is a copy of the picture {first.file_name} with other objects ({counts})"
                fix = "both are kept; give one of them all objects and delete the other"
                defects.append(Defect(record.file_name, f"image {record.image_id}", problem, fix))
    return defects


def _objects_of(record: Record) -> Counter[tuple[int, ...]]:
    rounded = record.boxes.round().astype(int).tolist()
    return Counter((*box, label) for box, label in zip(rounded, record.labels.tolist(), strict=True))


def shown(names: Sequence[str]) -> str:
    """The first ten names, for a message."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
