"""Looks at a data set before training: what is wrong, what is in it, and whether the anchors fit.

Readers report what the annotations show; the audit adds what only the pixels and the whole set show.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.data import coco, voc, yolo
from detection.data.anchor_fit import AREAS, Boxes, Grid, covers, propose, recall
from detection.data.images import EXTENSIONS, UPRIGHT, image_size, orientation_of, read_image
from detection.data.records import DataError, Defect, Index, Record
from detection.data.spectral import RGB, ChannelStatistics, PixelFormat, Pixels, false_colour

VERDICTS = ("clean", "repairable", "broken")
HASH = 16  # rows and columns of the grey thumbnail whose gradients are compared
# Share of equal gradients from which two images count as near duplicates. Measured on 920 photographs and micrographs:
# unrelated ones agree in up to 0.75, frames of one scene in 0.83 to 0.91.
ALIKE = 0.82


@dataclass(slots=True)
class Audit:
    """What was found in one split.

    Attributes:
        name: the split, for headings.
        index: the records as training would see them, None where the reader gave up.
        defects: all of the readers' and the audit's own.
        statistics: counts by name; see `statistics`.
        anchors: the grid asked about, its recall, and a proposal with its recall where it does not cover the boxes.
        contents: the image files by a digest of their bytes, to find them again in other splits.
        form: channels and depth that the images must have.
        channels: `image_mean` and `image_std` of the images, where they are no 8-bit RGB.
    """

    name: str
    index: Index | None
    defects: list[Defect]
    statistics: dict[str, Any] = field(default_factory=dict)
    anchors: dict[str, Any] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    form: PixelFormat = RGB
    channels: dict[str, list[float]] = field(default_factory=dict)

    @property
    def code(self) -> int:
        """0 clean (notes at most), 1 repairable, 2 broken: the exit code of `scripts/check_data.py`."""
        return max((("note", "repairable", "broken").index(d.severity) for d in self.defects), default=0)

    def summary(self) -> list[tuple[str, str, str, int, Defect]]:
        """Defects of a kind together: (severity, problem, fix, count, the first of them), worst first."""
        groups: dict[tuple[str, str], list[Defect]] = {}
        for defect in self.defects:
            groups.setdefault((defect.severity, _kind(defect.problem)), []).append(defect)
        rows = [
            (severity, kind, _kind(found[0].fix), len(found), found[0]) for (severity, kind), found in groups.items()
        ]
        return sorted(rows, key=lambda row: (("broken", "repairable", "note").index(row[0]), -row[3]))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "split": self.name,
            "verdict": VERDICTS[self.code],
            "statistics": self.statistics,
            "anchors": self.anchors,
            "channels": self.channels,
            "defects": [asdict(defect) for defect in self.defects],
        }


def find_splits(
    root: Path, kind: str, annotations: str | None, images: str | None, split: str | None
) -> dict[str, Any]:
    """What there is to check below a root: `{name: function that reads it}`.

    Args:
        root: folder of the data set.
        kind: `"coco"`, `"voc"` or `"yolo"`.
        annotations: the COCO file or VOC folder; None finds every COCO file.
        images: the folder of images; None finds it.
        split: the VOC or YOLO split; None is every file (VOC) or all splits (YOLO).
    """
    if kind == "coco":
        files = [annotations] if annotations else coco.find_files(root)
        if not files:
            raise DataError(f"{root}: there is no COCO instances file below it; name one with --annotations")
        return {
            file: lambda file=file: coco.read_coco(root, file, _images(root, file, images), masks=True)
            for file in files
        }
    if kind == "voc":
        masks = (root / "SegmentationObject").is_dir()
        read = lambda: voc.read_voc(root, split, masks=masks, annotations=annotations, images=images)  # noqa: E731
        return {split or "all XML files": read}
    splits = [split] if split else yolo.find_splits(root)
    return {name: lambda name=name: yolo.read_yolo(root, name) for name in splits}


def _images(root: Path, file: str, images: str | None) -> str:
    return (coco.find_images(root, file) or "") if images is None else images


def audit(name: str, read: Callable[[], Index], grid: Grid | None = None, form: PixelFormat = RGB) -> Audit:
    """Read a split and look at every image of it.

    Args:
        name: the split, for headings.
        read: returns its index or raises DataError, which becomes the audit's verdict.
        grid: the anchors that training would use.
        form: channels and depth that the images must have.
    """
    try:
        index = read()
    except DataError as error:
        where, _, problem = str(error).partition(": ")
        refused = Defect(where, "data set", problem or where, "nothing can be read before that", "broken")
        return Audit(name, None, [*error.defects, refused])
    grid = grid or Grid()
    measured = ChannelStatistics(form)
    defects, contents = _look_at_images(index, measured)
    defects = [*index.defects, *defects, *_look_at_objects(index), *_look_at_the_set(index)]
    found = Audit(name, index, defects, statistics(index), _fit(index, grid), contents, form)
    if measured.count:
        found.channels = dict(zip(("image_mean", "image_std"), measured.mean_and_std(), strict=True))
    return found


def look_across(audits: list[Audit], root: Path | None, kind: str | None) -> None:
    """Add what only the splits together show to the last audit: images that are in two of them, or twice in a list.

    Args:
        audits: one a split; VOC may have just one of all files, its lists are read from `ImageSets/Main`.
        root, kind: as for `find_splits`; None where a configuration names the splits.
    """
    splits: dict[str, dict[str, str]] = {found.name: found.contents for found in audits}
    if kind == "voc" and root is not None:
        lists = voc.split_lists(root)
        for name, stems in lists.items():
            copies = [stem for stem, count in Counter(stems).items() if count > 1]
            if copies and name not in splits:  # or the reader has said so
                problem = f"{len(copies)} stems are listed more than once: {_shown(copies)}"
                audits[-1].defects.append(Defect(name, "list", problem, "each is read once; delete the copies"))
        splits = {name: {stem: stem for stem in stems} for name, stems in lists.items()}
    audits[-1].defects += _shared(splits)


def _shared(splits: Mapping[str, Mapping[str, str]]) -> list[Defect]:
    """A note for each pair of splits with images in common; `trainval` is meant to hold train and val."""
    defects = []
    for (first, earlier), (second, later) in combinations(splits.items(), 2):
        both = [file for content, file in later.items() if content in earlier]
        union = ("trainval" in first) != ("trainval" in second) and "test" not in first + second
        if both and not union:
            problem = f"{len(both)} of its {len(later)} images are in '{first}' too: {_shown(both)}"
            fix = "kept in both; don't train on what you evaluate with"
            defects.append(Defect(second, "split", problem, fix, "note"))
    return defects


def _shown(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def statistics(index: Index) -> dict[str, Any]:
    """Counts that training wants to know: images, objects by class, sizes and aspect ratios in original pixels."""
    records = index.records
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(r.boxes for r in records)]).astype(np.float64)
    sides, segments = boxes[:, 2:] - boxes[:, :2], [s for r in records for s in r.segments or ()]
    labels = np.concatenate([np.zeros(0, np.int64), *(r.labels for r in records)])
    areas = np.concatenate([np.zeros(0, np.float32), *(r.areas for r in records)])
    images = Counter(int(label) for r in records for label in set(r.labels.tolist()))
    edge = [(r.boxes[:, 2] >= r.width) | (r.boxes[:, 3] >= r.height) for r in records]
    return {
        "images": len(records),
        "images without objects": sum(not len(r.labels) for r in records),
        "objects": len(labels),
        "most objects on an image": max((len(r.labels) for r in records), default=0),
        "crowds": sum(int(r.iscrowd.sum()) for r in records),
        "difficult": sum(int(r.difficult.sum()) for r in records),
        "masks of one polygon": sum(isinstance(s, list) and len(s) == 1 for s in segments),
        "masks of several polygons": sum(isinstance(s, list) and len(s) > 1 for s in segments),
        "masks of run lengths": sum(isinstance(s, dict) for s in segments),
        "boxes touching the right or bottom edge": int(sum(e.sum() for e in edge)),
        "classes": {
            name: {"objects": int((labels == i).sum()), "images": images[i]} for i, name in enumerate(index.classes, 1)
        },
        "areas": {name: int(((areas >= low) & (areas < high)).sum()) for name, (low, high) in AREAS.items()},
        "image sizes": Counter(f"{r.width}x{r.height}" for r in records).most_common(5),
        "quantiles": _quantiles(
            {"width": sides[:, 0], "height": sides[:, 1], "height / width": sides[:, 1] / sides[:, 0]}
        ),
    }


def _quantiles(values: dict[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    """Minimum, 5 %, median, 95 % and maximum of each."""
    points = (0, 0.05, 0.5, 0.95, 1)
    return {name: [round(float(q), 2) for q in np.quantile(v, points)] for name, v in values.items() if len(v)}


def _fit(index: Index, grid: Grid) -> dict[str, Any]:
    boxes = Boxes.of(index)
    if not len(boxes.xyxy):
        return {}
    figures = recall(boxes, grid)
    fit: dict[str, Any] = {"grid": asdict(grid), "recall": figures}
    if not covers(figures):
        better = propose(boxes, grid)
        fit |= {"proposal": asdict(better), "proposal_recall": recall(boxes, better)}
    return fit


def _look_at_images(index: Index, measured: ChannelStatistics) -> tuple[list[Defect], dict[str, str]]:
    """Decode every image; near duplicates by the signs of a thumbnail's gradients, and the files by their digest."""
    defects: list[Defect] = []
    contents: dict[str, str] = {}
    hashes, names = [], []
    for record in index.records:
        path, where = index.root / record.file_name, f"image {record.image_id}"
        try:
            pixels = read_image(path, (record.height, record.width), measured.form)
            if measured.form != RGB:
                measured.add(pixels)
            defects += _orientation(record, path)
            contents[hashlib.sha256(path.read_bytes()).hexdigest()] = record.file_name
        except DataError as error:
            problem = str(error).removeprefix(f"{path}: ").split(";")[0]
            defects.append(Defect(record.file_name, where, problem, "replace the file or delete its record", "broken"))
            continue
        hashes.append(_gradients(pixels))
        names.append(record.file_name)
    for first, second in _near_duplicates(hashes):
        fix = "kept; see that one of them is not in another split"
        defects.append(Defect(names[second], "image", f"it looks like {names[first]}", fix, "note"))
    return defects, contents


def _orientation(record: Record, path: Path) -> list[Defect]:
    orientation = orientation_of(path)
    if orientation == 1:
        return []
    turned = image_size(path)
    if UPRIGHT[orientation][0] and record.width != record.height:
        used = "turned" if turned == (record.height, record.width) else "not turned"
        fix = f"the picture is {used}, as its annotation's size says"
    else:
        fix = "the picture is turned, which its size can't confirm; look at its boxes on the picture sheet"
    return [Defect(record.file_name, f"image {record.image_id}", f"EXIF orientation {orientation}", fix, "note")]


def _gradients(pixels: Pixels) -> NDArray[np.float32]:
    """`(HASH * HASH,)` of 1 and -1: whether brightness grows to the right, on a small grey copy."""
    grey = cv2.cvtColor(false_colour(pixels), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (HASH + 1, HASH), interpolation=cv2.INTER_AREA).astype(np.int16)
    return np.where(np.diff(small, axis=1) > 0, 1, -1).astype(np.float32).ravel()


def _near_duplicates(hashes: list[NDArray[np.float32]]) -> list[tuple[int, int]]:
    """Each image that looks like an earlier one, with the first such."""
    if not hashes:
        return []
    every = np.stack(hashes)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(every), 1024):
        equal = (every[start : start + 1024] @ every.T / every.shape[1] + 1) / 2 >= ALIKE
        equal &= np.arange(len(every))[None] < np.arange(start, start + len(equal))[:, None]
        pairs += [(int(row.argmax()), start + i) for i, row in enumerate(equal) if row.any()]
    return pairs


def _look_at_objects(index: Index) -> list[Defect]:
    """Images without objects, objects drawn twice, boxes too small to see."""
    defects: list[Defect] = []
    for record in index.records:
        where = f"image {record.image_id}"
        if not len(record.labels):
            fix = "kept as background; annotate it if it shows objects"
            defects.append(Defect(record.file_name, where, "it has no object", fix, "note"))
        seen: dict[tuple[float, ...], int] = {}
        for box, label, number in zip(record.boxes, record.labels, record.annotation_ids, strict=True):
            key = (*box.tolist(), int(label))
            if key in seen:
                problem = f"box and class are those of annotation {seen[key]}"
                defects.append(
                    Defect(record.file_name, f"{where}, annotation {number}", problem, "kept; delete one", "note")
                )
            seen.setdefault(key, int(number))
            width, height = box[2:] - box[:2]
            if min(width, height) < 2:
                problem = f"box is {width:.3g} x {height:.3g} px"
                defects.append(
                    Defect(record.file_name, f"{where}, annotation {number}", problem, "kept; look at it", "note")
                )
    return defects


def _look_at_the_set(index: Index) -> list[Defect]:
    """Classes without objects, class names that differ by a slip, images that no annotation names."""
    defects: list[Defect] = []
    used = {int(label) for record in index.records for label in record.labels}
    absent = [name for i, name in enumerate(index.classes, 1) if i not in used]
    if absent:
        problem = f"{len(absent)} of {len(index.classes)} classes never occur: {', '.join(absent)}"
        defects.append(Defect("classes", "classes", problem, "kept; leave them out with classes", "note"))
    plain: dict[str, str] = {}
    for name in index.classes:
        other = plain.setdefault(re.sub(r"[\W_]+", "", name.casefold()).rstrip("s"), name)
        if other != name:
            problem = f"the names '{other}' and '{name}' are nearly alike"
            defects.append(
                Defect("classes", f"class '{name}'", problem, "both kept; make them one if it is a slip", "note")
            )
    listed: dict[str, set[str]] = {}
    for record in index.records:
        folder, _, name = record.file_name.rpartition("/")
        listed.setdefault(folder, set()).add(name)
    for folder, names in listed.items():
        files = {n for n in os.listdir(index.root / folder) if os.path.splitext(n)[1].lower() in EXTENSIONS}
        if rest := sorted(files - names):
            problem = f"{len(rest)} images are not in this split: {_shown(rest)}"
            defects.append(Defect(folder or ".", "folder", problem, "they are not read", "note"))
    return defects


def _kind(text: str) -> str:
    """A problem without its particulars, so that like ones can be counted together."""
    return re.sub(
        r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", re.sub(r"'[^']*'|\S+/\S+\.\w+|\S+\.(jpe?g|png|tiff?)", "...", text)
    )


def write_json(audits: list[Audit], path: Path) -> None:
    """Write the audits as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([a.to_json() for a in audits], indent=1, default=str))
