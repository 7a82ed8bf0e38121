"""Images that say which classes were looked for in them: LVIS, and lists beside a data set.

Where nobody looked for a class, its objects are not annotated: they are neither background to learn, nor are detections
of them mistakes. A record says by `checked` which classes were looked for, and by `partial` of which of them some
objects may be missing. LVIS (Gupta et al. 2019, section 3.1, "federated") has both for each image:
    neg_category_ids               looked for, and there is none
    the classes of its objects     looked for, and all are annotated
    not_exhaustive_category_ids    looked for, and some may not be annotated
All other classes nobody looked for.

Shape shorthand:
    C: classes without background
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from detection.data.checks import nearest, short
from detection.data.records import DataError, Defect, Index, Record

NEGATIVE, PARTIAL = "neg_category_ids", "not_exhaustive_category_ids"
# LVIS, section 3.1: the most training images of a rare and of a common class.
RARE, COMMON = 10, 100


def image_name(item: Mapping[str, Any]) -> Any:
    """`file_name` of an entry of `images`, or what LVIS has in its place: the last two parts of `coco_url`."""
    name, url = item.get("file_name"), item.get("coco_url")
    if name is None and isinstance(url, str) and url.count("/") > 1:
        return "/".join(url.split("/")[-2:])
    return name


def frequencies(categories: Iterable[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """The frequency group of each category, `r`are, `c`ommon or `f`requent; None where one has none.

    Args:
        categories: entries of LVIS's `categories`, with `frequency` or `image_count`.
    """
    groups = []
    for item in categories:
        group, count = item.get("frequency"), item.get("image_count")
        if group not in ("r", "c", "f"):
            if not isinstance(count, int) or isinstance(count, bool):
                return None
            group = "r" if count <= RARE else "c" if count <= COMMON else "f"
        groups.append(group)
    return tuple(groups)


def mark(
    record: Record,
    item: Mapping[str, Any],
    label_of: Callable[[Any], int | None],
    num_classes: int,
    report: Callable[[str, str, str], None],
) -> Record:
    """The record with what LVIS says of its image; unchanged where the image has no `neg_category_ids`.

    Args:
        record: read from `item`.
        item: an entry of `images`.
        label_of: category id -> label, 0 for a class that is not wanted, None for an unknown one.
        num_classes: C.
        report: takes record, problem and fix of a defect.
    """
    if item.get(NEGATIVE) is None and item.get(PARTIAL) is None:
        return record
    absent, partial = (
        _flags(item.get(name) or (), name, record, label_of, num_classes, report) for name in (NEGATIVE, PARTIAL)
    )
    checked = absent | partial
    checked[record.labels - 1] = True
    return replace(record, checked=checked, partial=partial)


def _flags(
    ids: Any,
    name: str,
    record: Record,
    label_of: Callable[[Any], int | None],
    num_classes: int,
    report: Callable[[str, str, str], None],
) -> NDArray[np.bool_]:
    flags = np.zeros(num_classes + 1, bool)
    where = f"image {record.image_id}"
    if not isinstance(ids, list | tuple):
        report(where, f"{name} is no list", "it counts as empty; write a list of category ids")
        ids = ()
    for category in ids:
        label = label_of(category)
        if label is None:
            problem = f"{name} has the category {short(repr(category), 40)}, which there is not"
            report(where, problem, "it is passed over; correct it")
        else:
            flags[label] = True
    return flags[1:]


def label_by_file(index: Index, path: Path, every_class: bool = True) -> Index:
    """The images of an index, with the classes that a YAML (or JSON) file says were labelled in them.

    The file names classes for images, by their path from the root of the data or by a pattern of such paths, in which
    `*` stands for anything, `/` included:

        old_camera/*: [car, truck]
        new_camera/000017.jpg: [car, truck, bicycle]

    The path of an image itself counts before any pattern, and of several patterns the first. In images that nothing
    fits all classes were labelled. Objects of a class that is not named train all the same; others of it may be there.

    Args:
        index: whose classes and paths are named.
        path: of the file.
        every_class: whether the index has all classes of the data, so that any other name is a mistake.

    Raises:
        DataError: the file is missing, is written otherwise, or names an unknown class.
    """
    rules = {name: _named(path, name, classes, index, every_class) for name, classes in _load(path).items()}
    patterns = [(name, re.compile(fnmatch.translate(name))) for name in rules if set("*?[") & set(name)]
    used, records = set[str](), []
    for record in index.records:
        name = record.file_name
        if name not in rules:
            name = next((pattern for pattern, fits in patterns if fits.match(name)), "")
        if name not in rules:
            records.append(record)
            continue
        used.add(name)
        listed = rules[name] if record.checked is None else rules[name] & record.checked
        there = np.zeros_like(listed)
        there[record.labels - 1] = True
        partial = there & ~listed if record.partial is None else (there & ~listed) | record.partial
        records.append(replace(record, checked=listed | there | partial, partial=partial))
    defects = list(index.defects)
    if unused := [name for name in rules if name not in used]:
        problem = f"{len(unused)} of its {len(rules)} names fit no image of this split"
        fix = "they change nothing here; see that they fit images of another"
        defects.append(Defect(path.name, f"'{short(unused[0], 100)}'", problem, fix, "note"))
    return replace(index, records=records, defects=defects)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: the file of data.labelled is missing; it is relative to data.root") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable as YAML ({short(str(error), 100)}); correct it") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise DataError(f"{path}: write one line a folder, 'folder/*: [class, class]', and nothing else")
    return content


def _named(path: Path, name: str, classes: Any, index: Index, every_class: bool) -> NDArray[np.bool_]:
    """Which classes of the index a line of the file names, `(C,)`."""
    if not isinstance(classes, list):
        raise DataError(f"{path}: '{short(name)}' has {short(repr(classes), 60)}, not a list of classes; write [...]")
    unknown = [known for known in classes if known not in index.classes]
    if unknown and every_class:
        hint = nearest(str(unknown[0]), index.classes)
        raise DataError(f"{path}: '{short(name)}' names the class '{unknown[0]}', which there is not{hint}")
    return np.array([known in classes for known in index.classes])


def images_not_checked(index: Index) -> int:
    """How many images of an index say that some class was not looked for in them, or not fully annotated."""
    return sum(not labelled(record).all() for record in index.records)


def labelled(record: Record) -> NDArray[np.bool_]:
    """`(C,)` bool: the classes that were looked for in an image and of which all objects are annotated.

    An image that says nothing has an array of one True, for all classes.
    """
    checked = np.ones(1, bool) if record.checked is None else record.checked
    return checked if record.partial is None else checked & ~record.partial


def seen_together(records: Sequence[Record]) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """`checked` and `partial` of a picture that is listed several times: what one of the entries is sure of is sure."""
    if any(record.checked is None and record.partial is None for record in records):
        return None, None
    sure = np.logical_or.reduce([labelled(record) for record in records])
    checked = np.logical_or.reduce([np.ones(1, bool) if r.checked is None else r.checked for r in records])
    return checked | sure, checked & ~sure
