"""Looks at a data set before training: what is wrong, what is in it, and whether the anchors fit.

Readers report what the annotations show; the audit adds what only the pixels and the whole set show.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.data import coco, voc
from detection.data.anchor_fit import AREAS, Boxes, Grid, fitted, recall
from detection.data.duplicates import gradients, near_duplicates
from detection.data.finding import Format, Layout, Stage
from detection.data.headers import EXTENSIONS, UPRIGHT
from detection.data.images import image_size, orientation_of, read_image, remarks
from detection.data.judging import half_labelled, judge, judge_splits, kind_of, shown
from detection.data.records import DataError, Defect, Index, Record, plain_name
from detection.data.spectral import RGB, ChannelStatistics, PixelFormat, false_colour
from detection.data.tree import role_of

VERDICTS = ("clean", "repairable", "broken")


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
        tiles: what there is to say of the tiles that are trained on, where they are.
    """

    name: str
    index: Index | None
    defects: list[Defect]
    statistics: dict[str, Any] = field(default_factory=dict)
    anchors: dict[str, Any] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    form: PixelFormat = RGB
    channels: dict[str, list[float]] = field(default_factory=dict)
    tiles: str = ""

    @property
    def code(self) -> int:
        """0 clean (notes at most), 1 repairable, 2 broken: the exit code of `detection check`."""
        return max((("note", "repairable", "broken").index(d.severity) for d in self.defects), default=0)

    def summary(self) -> list[tuple[str, str, str, int, Defect]]:
        """Defects of a kind together: (severity, problem, fix, count, the first of them), worst first."""
        groups: dict[tuple[str, str], list[Defect]] = {}
        for defect in self.defects:
            groups.setdefault((defect.severity, kind_of(defect.problem)), []).append(defect)
        rows = [
            (severity, kind, kind_of(found[0].fix), len(found), found[0]) for (severity, kind), found in groups.items()
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
            "tiles": self.tiles,
            "defects": [asdict(defect) for defect in self.defects],
        }


def splits_in(layout: Layout, split: str | None = None) -> dict[str, Callable[[], Index]]:
    """What there is to check in a data set that was found: `{name: function that reads it}`, or the split named."""
    splits = [layout.split(split)] if split is not None else layout.splits.values()
    return {
        found.name or "all": partial(found.read, None, layout.masks, None if layout.keypoints else False)
        for found in splits
    }


def splits_named(
    root: Path, kind: Format | None, annotations: str | None, images: str | None, split: str | None
) -> dict[str, Callable[[], Index]]:
    """The same for files that are named.

    Args:
        root: folder of the data set.
        kind: the format of the annotations; None goes by the name of the file.
        annotations: a COCO file or a VOC folder.
        images: the folder of images; None finds it.
        split: a list of VOC; None is every XML file.

    Raises:
        DataError: of a format that has no such file or folder.
    """
    if kind == "yolo" or (kind == "coco" and annotations is None):
        what = "its folders follow from data.yaml" if kind == "yolo" else "name the file with --annotations too"
        raise DataError(f"{root}: {kind} data can't be read so: {what}")
    if annotations is not None and (kind == "coco" or annotations.endswith(".json")):
        return {annotations: partial(coco.read_coco, root, annotations, images or "", masks=True, keypoints=None)}
    masks = (root / "SegmentationObject").is_dir()
    return {split or "all XML files": partial(voc.read_voc, root, split, None, masks, annotations, images)}


def audit(
    name: str,
    read: Callable[[], Index],
    grid: Grid | None = None,
    form: PixelFormat = RGB,
    as_tiles: Callable[[Index], tuple[Index, str]] = lambda index: (index, ""),
) -> Audit:
    """Read a split and look at every image of it.

    Args:
        name: the split, for headings.
        read: returns its index or raises DataError, which becomes the audit's verdict.
        grid: the anchors that training would use.
        form: channels and depth that the images must have.
        as_tiles: gives the index as it is trained on, and what there is to say of that; anchors are judged on it.
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
    judged = judge(index, _stage_of(name))
    defects = [*judged, *index.defects, *defects, *_look_at_objects(index), *_look_at_the_set(index)]
    trained, told = as_tiles(index)
    found = Audit(name, index, defects, statistics(index), _fit(trained, grid), contents, form, tiles=told)
    if measured.count:
        found.channels = dict(zip(("image_mean", "image_std"), measured.mean_and_std(), strict=True))
    return found


def _stage_of(name: str) -> Stage:
    """What a split is for, as its name or its file's says; training where it says nothing."""
    stages: dict[str | None, Stage] = {"val": "val", "test": "test"}
    return stages.get(role_of(name), "train")


def look_across(audits: list[Audit]) -> None:
    """Add what only the splits together show.

    Each audit gets the objects whose classes training lacks; the last gets the images that are in two splits.
    """
    audits[-1].defects += _shared({found.name: found.contents for found in audits})
    trained = next((a.index for a in audits if role_of(a.name) in ("train", "trainval") and a.index is not None), None)
    for found in audits:
        if trained is not None and found.index is not None and (stage := _stage_of(found.name)) != "train":
            found.defects += judge_splits(trained, found.index, stage)


def _shared(splits: Mapping[str, Mapping[str, str]]) -> list[Defect]:
    """A note for each pair of splits with images in common; `trainval` is meant to hold train and val."""
    defects = []
    for (first, earlier), (second, later) in combinations(splits.items(), 2):
        both = [file for content, file in later.items() if content in earlier]
        union = ("trainval" in first) != ("trainval" in second) and "test" not in first + second
        if both and not union:
            problem = f"{len(both)} of its {len(later)} images are in '{first}' too: {shown(both)}"
            fix = "kept in both; don't train on what you evaluate with"
            defects.append(Defect(second, "split", problem, fix, "note"))
    return defects


def statistics(index: Index) -> dict[str, Any]:
    """Counts that training wants to know: images, objects by class, sizes and aspect ratios in original pixels."""
    records = index.records
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(r.boxes for r in records)]).astype(np.float64)
    sides, segments = boxes[:, 2:] - boxes[:, :2], [s for r in records for s in r.segments or ()]
    labels = np.concatenate([np.zeros(0, np.int64), *(r.labels for r in records)])
    areas = np.concatenate([np.zeros(0, np.float32), *(r.areas for r in records)])
    images = Counter(int(label) for r in records for label in set(r.labels.tolist()))
    points = np.concatenate([np.zeros(0), *(r.keypoints[..., 2].ravel() for r in records if r.keypoints is not None)])
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
        **(
            {"key points": int((points > 0).sum()), "hidden key points": int((points == 1).sum())}
            if len(points)
            else {}
        ),
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
    fit: dict[str, Any] = {"grid": asdict(grid), "recall": recall(boxes, grid)}
    better = fitted(boxes, grid)
    if better != grid:
        fit |= {"proposal": asdict(better), "proposal_recall": recall(boxes, better)}
    return fit


def _look_at_images(index: Index, measured: ChannelStatistics) -> tuple[list[Defect], dict[str, str]]:
    """Decode every image; near duplicates by the signs of a thumbnail's gradients, and the files by their digest."""
    defects: list[Defect] = []
    copies: dict[str, list[Record]] = {}
    hashes, records = [], []
    for record in index.records:
        path, where = index.root / record.file_name, f"image {record.image_id}"
        try:
            pixels = read_image(path, (record.height, record.width), form=measured.form)
            if measured.form != RGB:
                measured.add(pixels)
            defects += _orientation(record, path)
            defects += [Defect(record.file_name, where, what, fix, "note") for what, fix in remarks(path)]
            copies.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append(record)
        except DataError as error:
            problem = str(error).removeprefix(f"{path}: ").split(";")[0]
            defects.append(Defect(record.file_name, where, problem, "replace the file or delete its record", "broken"))
            continue
        hashes.append(gradients(false_colour(pixels)))
        records.append(record)
    for second, alike in near_duplicates(hashes):
        earlier, later = records[alike[0]], records[second]
        same_name = Path(earlier.file_name).name == Path(later.file_name).name
        other = same_name and not np.array_equal(earlier.boxes, later.boxes)
        problem = f"it looks like {earlier.file_name}" + (", which has its name but other objects" if other else "")
        fix = "kept; see that one of them is not in another split"
        defects.append(Defect(later.file_name, "image", problem, fix, "note"))
    return [*half_labelled(copies.values()), *defects], {key: own[-1].file_name for key, own in copies.items()}


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
        defects += _far_points(record)
    return defects


def _far_points(record: Record) -> list[Defect]:
    """Objects with key points further from their box than half its longer side: as a rule those of another object."""
    if record.keypoints is None:
        return []
    points, boxes = record.keypoints, record.boxes[:, None]
    reach = 0.5 * (boxes[..., 2:] - boxes[..., :2]).max(axis=-1)
    beyond = np.maximum(boxes[..., :2] - points[..., :2], points[..., :2] - boxes[..., 2:]).max(axis=-1)
    far = ((points[..., 2] > 0) & (beyond > reach)).sum(axis=1)
    fix = "kept; see whose they are"
    return [
        Defect(
            record.file_name,
            f"image {record.image_id}, annotation {record.annotation_ids[i]}",
            f"{far[i]} key points lie far outside of its box",
            fix,
            "note",
        )
        for i in np.flatnonzero(far)
    ]


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
        other = plain.setdefault(plain_name(name), name)
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
            problem = f"{len(rest)} images are not in this split: {shown(rest)}"
            defects.append(Defect(folder or ".", "folder", problem, "they are not read", "note"))
    return defects


def write_json(audits: list[Audit], path: Path) -> None:
    """Write the audits as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([a.to_json() for a in audits], indent=1, default=str))
