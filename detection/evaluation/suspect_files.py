"""The suspects as files: COCO JSON, CSV, and tasks of Label Studio."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.batch import Id
from detection.evaluation.label_studio import Region, task, write_configuration
from detection.evaluation.report import LoadImage
from detection.evaluation.results import ImageResult
from detection.evaluation.suspicion import KINDS, Box, Labelled, Suspect, corners

PLACE = ("class", "x1", "y1", "x2", "y2")
COLUMNS = ["rank", "suspicion", "kind", "image", "annotation_id", *PLACE, *(f"proposed_{name}" for name in PLACE)]
COLUMNS += ["confidence", "iou"]
NOW, PROPOSED = "annotations", "proposals"  # the two predictions of a task: as it is, and as it should be


@dataclass(frozen=True, slots=True)
class Judged:
    """Annotations, and detections that know nothing of them.

    Attributes:
        name: of the run.
        results: images.
        annotation_ids: of each image's annotations, as the file has them.
        class_names: C.
        category_ids: the file's id of each class.
        load_image: gives the pixels of an image, or None where the images are not at hand.
    """

    name: str
    results: list[ImageResult]
    annotation_ids: list[list[Any]]
    class_names: list[str]
    category_ids: list[Id]
    load_image: LoadImage | None

    @property
    def annotations(self) -> int:
        """How many annotations there are."""
        return sum(len(result.gt_labels) for result in self.results)


def write_files(folder: Path, judged: Judged, found: Sequence[Suspect], shown: int) -> None:
    """Write `suspects.json`, `suspects.csv`, `label_studio.json` and `label_studio.xml`.

    Args:
        folder: that exists.
        judged: the annotations.
        found: all suspects, the strongest first.
        shown: how many of them the tasks are made of.
    """
    (folder / "suspects.json").write_text(json.dumps(as_coco(judged, found), allow_nan=False))
    with (folder / "suspects.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_row(judged, rank, one) for rank, one in enumerate(found, start=1))
    (folder / "label_studio.json").write_text(json.dumps(tasks(judged, found[:shown]), allow_nan=False))
    write_configuration(folder / "label_studio.xml", judged.class_names)


def as_coco(judged: Judged, found: Sequence[Suspect]) -> dict[str, Any]:
    """A COCO data set of the suspicious annotations, and of the missing ones as they are proposed.

    Each annotation also has `suspicion`, `kind`, and `proposal` (`bbox`, `category_id`, `score`, `iou`) or null. Ids
    are those of the annotations; a missing one gets a new one, and `is_new` is true.
    """
    numbers = [number for ids in judged.annotation_ids for number in ids]
    # Files without ids of their own, such as VOC's, count in each image: all get new ones, and keep theirs beside.
    unique = len(set(numbers)) == len(numbers) and all(isinstance(number, int) for number in numbers)
    next_id = max(numbers, default=0) + 1 if unique else 1
    entries = []
    for one in found:
        own = None if one.annotation is None else judged.annotation_ids[one.image][one.annotation]
        number = own
        if own is None or not unique:
            number, next_id = next_id, next_id + 1
        here = one.annotated or one.proposed
        assert here is not None
        entry = {"id": number, "image_id": judged.results[one.image].image_id, "iscrowd": 0}
        entry |= _box_of(judged, here) | {"area": _area(here.box), "suspicion": round(one.score, 4), "kind": one.kind}
        entry |= {"is_new": one.annotated is None, "annotation_id": own}
        also = {"score": round(one.confidence, 4), "iou": round(one.iou, 4)}
        entries.append(entry | {"proposal": one.proposed and _box_of(judged, one.proposed) | also})
    images = [
        {"id": r.image_id, "file_name": r.file_name, "width": r.size[1], "height": r.size[0]} for r in judged.results
    ]
    named = zip(judged.category_ids, judged.class_names, strict=True)
    categories = [{"id": number, "name": name} for number, name in named]
    return {"info": {"description": f"suspects, {judged.name}"}, "images": images, "annotations": entries} | {
        "categories": categories
    }


def tasks(judged: Judged, found: Sequence[Suspect]) -> list[dict[str, Any]]:
    """An image of the suspects each, the most suspicious first, with two predictions: `proposals` and `annotations`.

    The proposals are the whole image as it should be: annotations that are not suspected, and what is proposed.
    """
    of_image: dict[int, list[Suspect]] = {}
    for one in found:
        of_image.setdefault(one.image, []).append(one)
    made = []
    for image, own in of_image.items():
        result = judged.results[image]
        now = [
            Region(Labelled(corners(box), int(label)))
            for box, label in zip(result.gt_boxes, result.gt_labels, strict=True)
        ]
        better: list[Region] = list(now)
        for one in own:
            remark = f"{KINDS[one.kind][0]} {one.score:.2f}"
            shown = one.proposed or one.annotated
            assert shown is not None  # a missing object is proposed, any other annotated
            region = Region(shown, one.score, remark)
            if one.annotation is None:
                better.append(region)
            else:
                better[one.annotation] = region
        kinds = ", ".join(dict.fromkeys(KINDS[one.kind][0] for one in own))
        facts = {"suspects": len(own), "kinds": kinds}
        both = {PROPOSED: better, NOW: now}
        made.append(task(result.file_name, result.size, judged.class_names, both, own[0].score, facts))
    return made


def _box_of(judged: Judged, labelled: Labelled) -> dict[str, Any]:
    x1, y1, x2, y2 = labelled.box
    box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
    return {"bbox": box, "category_id": judged.category_ids[labelled.label - 1]}


def _area(box: Box) -> float:
    return round((box[2] - box[0]) * (box[3] - box[1]), 2)


def _row(judged: Judged, rank: int, one: Suspect) -> list[Any]:
    """A line of the CSV, see `COLUMNS`."""
    own = "" if one.annotation is None else judged.annotation_ids[one.image][one.annotation]

    def cells(shape: Labelled | None) -> list[Any]:
        if shape is None:
            return [""] * 5
        return [judged.class_names[shape.label - 1], *(round(value, 1) for value in shape.box)]

    head = [rank, f"{one.score:.4f}", KINDS[one.kind][0], judged.results[one.image].file_name, own]
    return [*head, *cells(one.annotated), *cells(one.proposed), f"{one.confidence:.4f}", f"{one.iou:.4f}"]
