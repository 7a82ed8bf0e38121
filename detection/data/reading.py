"""Which reader reads a split, and what must hold of what it read, whoever wrote the reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import isclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection.batch import Id
from detection.data import scenes
from detection.data.coco import read_coco
from detection.data.federated import images_not_checked, label_by_file
from detection.data.finding import Layout, Split, Stage, find
from detection.data.judging import judge
from detection.data.records import DataError, Index, Record, Severity, merge, relabel
from detection.data.voc import read_voc
from detection.parts import Reader
from detection.recipes import describe as plain


def read_split(
    settings: Mapping[str, Any],
    root: Path,
    split: Stage,
    known: Sequence[str] | None = None,
    reader: Reader | None = None,
    layout: Callable[[], Layout] | None = None,
) -> Index:
    """The records of a split, with what `data.labelled` says of which classes were labelled in which image.

    Args:
        settings: of the data, as `DetectionDataModule` takes them.
        root: folder of the data set.
        split: `"test"` is the validation split where the settings name none.
        known: the classes of the training split, which the labels will point into; None takes those that are read. Ids
            of images and categories stay those of the split's own file.
        reader: the user's own; None reads the format of the settings.
        layout: gives the data set that was found below the root; None finds it.

    Raises:
        DataError: nothing is found, or a split that the stage needs is not there.
    """
    index = with_key_points(_read(settings, root, split, known, reader, layout), settings)
    labelled = settings.get("labelled")
    return index if labelled is None else label_by_file(index, root / labelled, settings["classes"] is None)


def _read(
    settings: Mapping[str, Any],
    root: Path,
    split: Stage,
    known: Sequence[str] | None,
    reader: Reader | None,
    layout: Callable[[], Layout] | None,
) -> Index:
    """The records of a split, as its reader gives them."""
    classes, masks = settings["classes"] if known is None else list(known), settings["masks"]
    keypoints = bool(settings.get("keypoints"))
    name, images = settings[f"{split}_split"], settings[f"{split}_images"]
    if name is None and split == "test":
        name, images = settings["val_split"], settings["val_images"]
    # Objects of other classes are left out as the user wishes, or else because the splits' classes don't meet.
    left_out: Severity = "repairable" if settings["classes"] is None else "note"
    if reader is not None:
        name = name or ("train" if split == "train" else "val")
        index = _without_masks(check_index(reader(root, name), reader), masks)
        return relabel(index, known, left_out) if known is not None else _of_classes(index, classes)
    # An evaluated split may lack a class of training, or number them otherwise.
    translate = None if split == "train" else known
    wanted = classes if translate is None else None
    has_ids = True
    if draws_scenes(settings):
        root, name, images = scenes.location(root), *scenes.SPLITS["train" if split == "train" else "val"]
    if name is not None and settings["format"] == "voc" and ":" in name:
        if keypoints:
            raise DataError(f"{root}: VOC's XML has no key points; set data.keypoints to false")
        index, has_ids = _read_folders(root, name, wanted, masks), False
    elif name is not None and settings["format"] != "yolo" and name.endswith(".json"):
        index = read_coco(root, name, images, wanted, masks, keypoints)
    else:
        found = layout() if layout is not None else find(root, settings["format"])
        index, has_ids = _named(found, name, split).read(wanted, masks, keypoints), found.format != "voc"
    if translate is None:
        return index
    index = relabel(index, translate, left_out)
    # XML has no ids: they are the labels, the same in all splits.
    return index if has_ids else replace(index, category_ids=tuple(range(1, len(index.classes) + 1)))


def with_key_points(index: Index, settings: Mapping[str, Any]) -> Index:
    """What was read, with the user's pairs and sigmas of the key points; without any where none are wanted.

    Raises:
        DataError: key points are wanted and there are none, or pairs or sigmas don't fit them.
    """
    if not settings.get("keypoints"):
        if index.skeleton is None:
            return index
        return replace(index, skeleton=None, records=[replace(record, keypoints=None) for record in index.records])
    if index.skeleton is None:
        raise DataError(
            f"{index.root}: data.keypoints is true, but no class has key points (`keypoints` of a COCO category, "
            "`kpt_shape` of data.yaml); set it to false"
        )
    try:
        known = index.skeleton.with_settings(settings.get("keypoint_pairs"), settings.get("keypoint_sigmas"))
    except ValueError as error:
        raise DataError(str(error)) from error
    return replace(index, skeleton=known)


def draws_scenes(settings: Mapping[str, Any]) -> bool:
    """Whether the data are the scenes that this package draws."""
    return settings["format"] == "scenes" or (settings["format"] is None and settings["root"] is None)


def _named(layout: Layout, name: str | None, stage: Stage) -> Split:
    split = layout.split(name) if name is not None else layout.stage(stage)
    if split is None:
        there = ", ".join(f"'{key}'" for key in layout.splits if key) or "none that says so"
        kind = "training" if stage == "train" else "validation"
        raise DataError(f"{layout.root}: there is no {kind} split; of {there}, name one with data.{stage}_split")
    return split


def _of_classes(index: Index, classes: list[str] | None) -> Index:
    """What a reader of the user's gave, in the classes that are wanted, or all."""
    if classes is None:
        return index
    if absent := [name for name in classes if name not in index.classes]:
        raise DataError(f"{index.root}: there is no class '{absent[0]}'; there are: {', '.join(index.classes)}")
    return relabel(index, classes)


def _without_masks(index: Index, wanted: bool) -> Index:
    if not wanted:
        return replace(index, records=[replace(record, segments=None) for record in index.records])
    if all(record.segments is None for record in index.records):
        raise DataError(f"{index.root}: data.masks is true, but the reader gives no record `segments`; leave it out")
    return index


def _read_folders(root: Path, name: str, classes: list[str] | None, masks: bool) -> Index:
    """The splits of VOC folders that `folder:split+folder:split` names, as one."""
    parts: dict[str, Index] = {}
    for part in name.split("+"):
        folder, _, split = part.partition(":")
        parts[folder] = read_voc(root / folder, split, None, masks)
    return merge(root, parts, classes)


def check_index(index: Any, reader: Any) -> Index:
    """What a user's reader gave, if it is what the contract says; a DataError names the first thing that isn't."""
    name = getattr(reader, "__name__", type(reader).__name__)
    if not isinstance(index, Index):
        raise DataError(f"the reader {name} gave a {type(index).__name__}, not a detection.data.records.Index")
    if len(index.classes) != len(index.category_ids):
        raise DataError(
            f"the reader {name} gave {len(index.classes)} classes but {len(index.category_ids)} category_ids"
        )
    ids = set[Id]()
    for record in index.records:
        if not isinstance(record, Record):
            raise DataError(
                f"the reader {name} gave a {type(record).__name__} in place of a detection.data.records.Record"
            )
        where = f"the reader {name}, {record.file_name}"
        if record.image_id in ids:
            raise DataError(f"{where}: another image has the image_id {record.image_id}; count the images through")
        ids.add(record.image_id)
        for field, (shape, kind) in ARRAYS.items():
            value = getattr(record, field)
            wanted = (len(record.labels), *shape)
            if not isinstance(value, np.ndarray) or value.shape != wanted or value.dtype != kind:
                found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
                raise DataError(f"{where}: {field} is {found}, not an array of {kind} {wanted}; see Record.of")
        for field in ("checked", "partial"):
            flags = getattr(record, field)
            if flags is not None and (flags.shape != (len(index.classes),) or flags.dtype != bool):
                found = f"{flags.dtype} {flags.shape}"
                raise DataError(f"{where}: {field} is {found}, not an array of bool ({len(index.classes)},), or None")
        if record.segments is not None and len(record.segments) != len(record.labels):
            raise DataError(f"{where}: {len(record.segments)} segments for {len(record.labels)} objects")
        points = None if index.skeleton is None else (len(record.labels), len(index.skeleton), 3)
        found_points = None if record.keypoints is None else record.keypoints.shape
        if found_points != points:
            raise DataError(f"{where}: keypoints are {found_points}, not {points}, as the index's skeleton says")
    return index


ARRAYS = {
    "labels": ((), "int64"),
    "boxes": ((4,), "float32"),
    "areas": ((), "float32"),
    "iscrowd": ((), "bool"),
    "difficult": ((), "bool"),
    "annotation_ids": ((), "int64"),
}


def check_split(index: Index, split: str, with_difficult: bool = False) -> None:
    """What must hold before anything trains: whole records, and a split that is worth it.

    Args:
        index: as read.
        split: `train`, `val` or `test`.
        with_difficult: whether training is on difficult objects too.

    Raises:
        DataError: in the words of `judging.judge` where the split as a whole can't be used.
    """
    check_records(index, split)
    for defect in judge(index, split, with_difficult):
        if defect.severity == "broken":
            raise DataError(f"{index.root}: the {split} split: {defect.problem}; {defect.fix}", index.defects)


def check_records(index: Index, split: str) -> None:
    """What must hold of each record; a reader that keeps its promise never fails here."""
    count = len(index.classes)
    if not index.records:
        raise DataError(f"{index.root}: the {split} split holds no image; check its name and the folder")
    for record in index.records:
        boxes, where = record.boxes, f"{index.root / record.file_name}: image {record.image_id}"
        if ((record.labels < 1) | (record.labels > count)).any():
            raise DataError(f"{where}: labels {record.labels} are not in 1..{count}; correct the class list")
        inside = (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= record.width).all()
        if not (inside and (boxes[:, 3] <= record.height).all() and (boxes[:, 2:] > boxes[:, :2]).all()):
            raise DataError(f"{where}: a box is empty or outside {record.width}x{record.height}; correct it")


def describe(index: Index, split: str) -> str:
    """A few lines for the log: images, objects by class, what the whole split shows, and what was repaired."""
    counts = torch.zeros(len(index.classes) + 1, dtype=torch.int64)
    for record in index.records:
        counts += torch.bincount(torch.from_numpy(record.labels), minlength=len(counts))
    empty = sum(not len(record.labels) for record in index.records)
    classes = ", ".join(f"{name} {n}" for name, n in zip(index.classes, counts[1:].tolist(), strict=True))
    lines = [f"{split}: {len(index.records)} images ({empty} without objects), {int(counts.sum())} objects: {classes}"]
    if partly := images_not_checked(index):
        lines.append(f"{split}: in {partly} images not every class is labelled; background is not taught of those")
    whole = [*(defect for defect in index.defects if defect.is_of_split), *judge(index, split)]
    lines += [f"{split}: {defect.problem}; {defect.fix}" for defect in whole]
    repaired = [defect for defect in index.defects if defect.severity != "note" and not defect.is_of_split]
    if repaired:
        lines += [f"{split}: {len(repaired)} records repaired or left out, the first of them:"]
        lines += [f"  {defect}" for defect in repaired[:3]] + ["  (`detection check` lists all)"]
    lines += [str(defect) for defect in index.defects if defect.file == "split"]  # images that came after it was made
    return "\n".join(lines)


def splits_of(stage: str, predicted: Stage = "test") -> tuple[Stage, ...]:
    """What a stage of the trainer needs; `predicted` is what it predicts."""
    needed: dict[str, tuple[Stage, ...]] = {"fit": ("train", "val"), "validate": ("val",), "predict": (predicted,)}
    return needed.get(stage, ("test",))


def recipe_of_reader(reader: Reader | None) -> Any:
    """How the user's reader was made, for the checkpoint.

    Raises:
        ValueError: it is not known, or arguments were left out.
    """
    name = getattr(reader, "__name__", type(reader).__name__)
    if isclass(getattr(reader, "func", reader)):
        raise ValueError(f"data.reader: {name} is a class, or lacks arguments: give all that it needs")
    recipe = plain(reader)
    if recipe is NotImplemented:
        raise ValueError(
            f"data.reader: how {name} was made is not known, so that a checkpoint could not keep it: decorate its "
            "class with detection.recipes.recorded, or give it as {'class_path': ..., 'init_args': {...}}"
        )
    return recipe
