"""Reads COCO instances JSON (https://cocodataset.org/#format-data), with the dirt that real exports carry.

Boxes are `[x, y, width, height]` in 0-based continuous pixels. Ids need not be contiguous, may start at 0, be of any
size, and be strings; they are kept as the file spells them, so that what is exported names the same images and
categories. Labels `1..C` are in ascending order of category id, the order of published COCO models.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection.batch import Id
from detection.data import rle
from detection.data.checks import Objects, checked_size, choose_classes, finish_index, short
from detection.data.coco_keypoints import read_points, skeleton_of
from detection.data.coco_layout import PictureFinder
from detection.data.coco_rows import Annotations, Packer
from detection.data.coco_values import (
    area_of,
    box_of,
    extent,
    float_of,
    integer_of,
    is_near,
    is_polygon,
    key_of,
    no_id,
    spelling_of,
    text_as_number,
)
from detection.data.federated import frequencies, image_name, mark
from detection.data.judging import one_record_per_picture
from detection.data.records import DataError, Defect, Index, Record
from detection.data.skeletons import Skeleton
from detection.data.tree import Tree


def read_coco(
    root: Path,
    annotations: str,
    images: str = "",
    classes: Sequence[str] | None = None,
    masks: bool = False,
    keypoints: bool | None = False,
) -> Index:
    """Read one COCO file.

    Every object left out and every value repaired is a defect of the index. Images without objects are kept. An
    annotation with `"ignore": 1` is a region like a crowd. LVIS files are read too, see `detection.data.federated`.

    Args:
        root: folder of the data set, which no image may leave.
        annotations: path of the JSON file, relative to `root` (or absolute).
        images: folder that `file_name` is relative to, itself relative to `root`.
        classes: names of the classes to read, in the order of their labels; None for all.
        masks: read `segmentation` too; polygons stay polygons, run lengths become compressed RLE.
        keypoints: read `keypoints` too, of the classes that name some. They stay where the file has them, as
            torchvision reads them; Detectron2 moves them by half a pixel. Objects of other classes have none that are
            annotated. None reads them unless two classes have other ones.

    Returns:
        Images in the file's order, categories in ascending order of id unless `classes` orders them.

    Raises:
        DataError: the file is missing or no COCO instances file, an image's path leaves the root, a class is unknown or
            ambiguous, classes have other key points, or no image is left.
    """
    return read_file(Tree(Path(root)), annotations, images, classes, masks, keypoints)


def read_file(
    tree: Tree,
    annotations: str,
    images: str = "",
    classes: Sequence[str] | None = None,
    masks: bool = False,
    keypoints: bool | None = False,
) -> Index:
    """Read one COCO file below a root that was listed; see `read_coco`."""
    path = tree.root / annotations
    content = load_file(path, packed=not masks and keypoints is False)
    names = [image_name(item) for item in content["images"] if isinstance(item, dict) and _is_name(item)]
    reader = _Reader(tree, str(annotations), PictureFinder(tree, str(annotations), names, images), masks)
    labels, index = reader.categories(content["categories"], classes)

    def label_of(category: Any) -> int | None:
        key = key_of(category)
        return None if key is None else labels.get(key)

    entries = {label_of(item.get("id")): item for item in content["categories"] if isinstance(item, dict)}
    index.frequencies = frequencies(entries[label] for label in range(1, len(index.classes) + 1))
    named = {name: entries[label] for label, name in enumerate(index.classes, 1)}
    try:
        index.skeleton = reader.skeleton = None if keypoints is False else skeleton_of(named, str(path))
    except DataError as error:
        if keypoints:
            raise
        problem = str(error).removeprefix(f"{path}: ").split(": choose")[0]
        reader.report("categories", problem, "key points are not read; train on classes of one kind", "note")
    grouped = Annotations(content.pop("annotations"), labels, reader.report)
    known: dict[Id, str] = {}
    reader.torn = _ids_of_several_files(content["images"])
    for position, image in enumerate(content["images"]):
        record = reader.image(position, image, grouped, labels, known)
        if record is not None:
            index.records.append(mark(record, image, label_of, len(index.classes), reader.report))
    for key in grouped.images().difference(known):
        fix = "its annotations are left out; correct image_id or add the image"
        problem = f"{grouped.count(key)} annotations name an image that is not listed"
        reader.report(f"image {key}", problem, fix)
    index.records = reader.without_doubtful(index.records, known)
    reader.look_at("images", [record.image_id for record in index.records])
    reader.look_at("categories", index.category_ids)
    reader.say_spellings()
    return one_record_per_picture(finish_index(index, str(path)))


class _Reader:
    """One pass over the three lists of a file; holds what messages and paths need."""

    def __init__(self, tree: Tree, file: str, pictures: PictureFinder, masks: bool) -> None:
        self.tree, self.file, self.pictures, self.masks = tree, file, pictures, masks
        self.defects = tree.remarks(labelled=tree.unread)
        self.spelt: list[tuple[str, str]] = []  # names of pictures that are not those of their files
        self.ids = Counter[Id]()
        self.torn = set[Id]()  # ids of images that name several files
        self.skeleton: Skeleton | None = None

    def report(self, record: str, problem: str, fix: str, severity: Any = "repairable") -> None:
        self.defects.append(Defect(self.file, short(record), short(problem), short(fix), severity))

    def look_at(self, what: str, ids: Sequence[Id | None]) -> None:
        """Note ids that we read and export as they are but pycocotools can't evaluate."""
        fix = "they are read and exported as they are, but pycocotools "
        if {type(value) for value in ids} >= {int, str}:
            self.report(what, "some ids are numbers, some text", fix + "can't sort them; use one kind", "note")
        numbers = [value for value in ids if isinstance(value, int)]
        if numbers and min(numbers) < 2**63 <= max(numbers) < 2**64:
            problem = "some ids are below 2^63, some not"
            self.report(what, problem, fix + "rounds them to doubles and loses them; number them anew", "note")

    def categories(self, items: list[Any], classes: Sequence[str] | None) -> tuple[dict[Id, int], Index]:
        """`{category key: label}`, 0 for classes that were not asked for, and the index to fill."""
        names: dict[Id, str] = {}
        spelled: dict[Id, Id] = {}
        for position, item in enumerate(items):
            key = key_of(item.get("id")) if isinstance(item, dict) else None
            name = item.get("name") if isinstance(item, dict) else None
            where = f"category {position if key is None else key}"
            if key is None:
                problem = no_id(item)
                self.report(where, problem, "the category is left out; give it a whole number")
                continue
            spelled[key] = spelling_of(item["id"])
            if not isinstance(name, str) or not name.strip():
                self.report(where, "it has no name", f"it is called 'class {key}'; name it")
                name = f"class {key}"
            name = name.strip()
            if names.get(key, name) != name:
                both = f"'{short(names[key])}' and '{short(name)}'"
                fix = "give each category its own id"
                raise DataError(f"{self.file}: {where}: the id names {both}; {fix}", self.defects)
            if key in names:
                self.report(where, "it is listed twice", "listed once is enough; delete the copy")
            elif name in names.values():
                self.report(
                    where, f"the name '{name}' is taken by another id", f"it is called '{name} {key}'; rename it"
                )
                name = f"{name} {key}"
            names[key] = name
        order = sorted(names, key=lambda key: (isinstance(key, str), key))
        chosen = choose_classes([names[key] for key in order], classes, f"{self.file}: categories")
        by_name = {name: key for key, name in names.items()}
        labels = {key: chosen.index(name) + 1 if name in chosen else 0 for key, name in names.items()}
        own_ids = tuple(spelled[by_name[name]] for name in chosen)
        return labels, Index(self.tree.root, chosen, own_ids, [], self.defects, form="xywh")

    def image(
        self,
        position: int,
        item: Any,
        annotations: Annotations,
        labels: dict[Id, int],
        known: dict[Id, str],
    ) -> Record | None:
        """The record of one entry of `images`, or None where it can't be used."""
        item = item if isinstance(item, dict) else {}
        key, name = key_of(item.get("id")), image_name(item)
        where = f"image at {position}" if key is None else f"image {key}"
        usable = key not in self.torn
        if key is not None and not usable:
            problem = f"the id is used for several files, here for {str(name)[:80]!r}"
            fix = f"the image is left out, as are the id's {annotations.count(key)} annotations; number the images anew"
            self.report(where, problem, fix, "broken")
            if key in known:
                return None
        elif key is not None and name is not None and known.get(key) == name:
            self.report(where, f"'{name}' is listed twice", "it is read once; delete the copy")
            return None
        if key is None:
            self.report(where, no_id(item), "this image is left out; give it an id of its own", "broken")
            return None
        known[key] = str(name)
        if not _is_name(item):
            self.report(where, "it has no file_name", "the image and its annotations are left out; add it", "broken")
            return None
        name, path = self.picture(str(name), where)
        width, height = integer_of(item.get("width")), integer_of(item.get("height"))
        stated = (height, width) if width and height and width > 0 and height > 0 else None
        try:
            height, width = checked_size(path, stated, self.file, where, self.defects)
        except DataError as error:
            problem = str(error).removeprefix(f"{path}: ").split(";")[0]
            fix = f"the image and its {annotations.count(key)} annotations are left out; restore the file"
            self.defects.append(Defect(short(name), short(where), problem, fix, "broken"))
            usable, (height, width) = False, stated or (0, 0)
        sound = None
        if usable and not self.skeleton and not self.masks:
            sound = annotations.sound(key, width, height)
        if sound is not None:
            difficult = np.zeros(len(sound.labels), bool)
            return Record(spelling_of(item["id"]), name, width, height, *sound[:4], difficult, sound.annotation_ids)
        objects = Objects(self.file, where, width, height, self.defects)
        if height and width:  # also where the image is missing: one look should find every defect
            for number, annotation in annotations.items(key):
                self.annotation(objects, number, annotation, labels)
        if not usable:
            return None
        return objects.finish(spelling_of(item["id"]), name, self.masks, len(self.skeleton or ()))

    def picture(self, written: str, where: str) -> tuple[str, Path]:
        """The file of an image, relative to the root and whole, which may be missing; no name leads out of the root."""
        if (found := self.pictures.find(written)) is not None:
            if os.path.basename(found) != os.path.basename(written.replace("\\", "/")):
                self.spelt.append((written, found))
            return found, self.tree.root / found
        inside = "/".join(filter(None, (self.pictures.base, written.replace("\\", "/"))))
        path = self.tree.locate(inside, f"{self.file}: {where}")
        return path.relative_to(self.tree.root).as_posix(), path

    def without_doubtful(self, records: list[Record], known: dict[Id, str]) -> list[Record]:
        """The records without those of one file where another one may be meant: nobody knows whose the objects are.

        Args:
            records: all of the file.
            known: the name of each image's file as it is written, by the image's key.
        """
        counts = Counter(record.file_name for record in records)
        listed: dict[str, list[Record]] = {}
        for record in records:
            if counts[record.file_name] > 1:
                listed.setdefault(record.file_name, []).append(record)
        doubtful = set[str]()
        for file, own in listed.items():
            names = [known[key] for record in own if (key := key_of(record.image_id)) is not None]
            if (other := self.pictures.other_than(file, names)) is not None:
                doubtful.add(file)
                problem = f"{len(own)} images, the first of them {own[0].image_id}, are found in '{file}'"
                fix = "they are left out; write the folder into file_name, or name it (data.train_images)"
                self.report("images", f"{problem}, but one may be '{other}'", fix, "broken")
        return [record for record in records if record.file_name not in doubtful]

    def say_spellings(self) -> None:
        """Say where the names of pictures left a choice, and note that some were found under other names."""
        if self.pictures.rivals:
            problem = f"'{self.pictures.rivals[0]}' holds pictures of these names too"
            self.report(
                "images", problem, f"those of '{self.pictures.base}' are read; name the folder (data.train_images)"
            )
        if self.spelt:
            written, found = self.spelt[0]
            problem = f"{len(self.spelt)} names are not those of the files, first '{written}' of '{found}'"
            self.report("images", problem, "they are read; correct file_name", "note")

    def annotation(self, objects: Objects, position: int, item: dict[str, Any], labels: dict[Id, int]) -> None:
        """Add one annotation to the objects of its image."""
        key, category = key_of(item.get("id")), key_of(item.get("category_id"))
        what = f"annotation at {position}" if key is None else f"annotation {key}"
        if key is not None:
            self.ids[key] += 1
            if self.ids[key] == 2:
                objects.report(what, "the id is used twice", "both objects are kept; number them anew")
        if category is None or category not in labels:
            problem = "it has no category_id" if category is None else f"there is no category {category}"
            return objects.report(what, problem, "the object is left out; correct category_id")
        if not labels[category]:
            return None
        segment = None
        bbox, area = box_of(item.get("bbox")), float_of(text_as_number(item.get("area")))
        if self.masks or bbox is None or area is None:
            segment = self.segment(objects, what, item.get("segmentation"))
        if bbox is None:
            problem = "bbox is missing" if item.get("bbox") is None else "bbox is not four finite numbers"
            if segment is None:
                return objects.report(what, problem, "the object is left out; add its bbox")
            objects.report(what, problem, "the box of its segmentation is used; add its bbox")
            bbox = extent(segment, objects.height)
        if area is None or not 0 < np.float32(area) < np.inf:  # as it is kept: 1e-46 would become 0
            area = area_of(segment) if segment is not None else None
            if item.get("area") is not None:
                objects.report(what, "area is not a positive number", "it is computed anew; correct it")
        for name in ("iscrowd", "ignore"):
            if item.get(name) not in (0, 1, None):
                objects.report(what, f"{name} is {str(item[name])[:20]!r}", "it counts as 0; use 0 or 1")
        number = key if isinstance(key, int) and abs(key) < 2**63 else position
        ignored = item.get("iscrowd") == 1 or item.get("ignore") == 1
        points = None
        if self.skeleton is not None:
            points = read_points(item, len(self.skeleton), objects, what)
        objects.add(what, bbox, labels[category], number, area, ignored, segment=segment, keypoints=points)

    def segment(self, objects: Objects, what: str, value: Any) -> Any:
        """Polygons or a compressed RLE, or None (reported where masks are wanted) where neither can be had."""
        problem = "segmentation is missing or empty"
        if isinstance(value, dict):
            try:
                counts = rle.check(value, (objects.height, objects.width))
            except (ValueError, TypeError) as error:
                problem = str(error)
            else:
                if any(counts[1::2]):
                    return {"size": [objects.height, objects.width], "counts": rle.compress(counts)}
                problem = "RLE has no foreground"
        elif isinstance(value, list) and value:
            sides = (objects.width, objects.height)
            good = [polygon for polygon in value if is_polygon(polygon)]
            near = [polygon for polygon in good if is_near(polygon, *sides)]
            if len(near) < len(good):
                fix = "they are left out; redraw them" if len(good) - len(near) > 1 else "it is left out; redraw it"
                objects.report(what, f"{len(good) - len(near)} of its polygons lie far outside the image", fix)
                value = [polygon for polygon in value if polygon not in good or polygon in near]
                good = near
                if not value:
                    return None
            if len(good) < len(value) and good:
                fix = "it is left out, the rest is kept; redraw it"
                objects.report(what, f"{len(value) - len(good)} of its polygons has not 3 finite points", fix)
            if good:
                return good
            problem = "segmentation is not a list of polygons of 3 finite points or more"
        if self.masks:
            severity: Any = "note" if not value else "repairable"
            objects.report(what, problem, "the object has no mask; draw it", severity)
        return None


def load_file(
    path: Path, lists: Sequence[str] = ("images", "annotations", "categories"), packed: bool = False
) -> dict[str, Any]:
    """The JSON object of a COCO file.

    Args:
        path: of the file.
        lists: that it must have.
        packed: make rows of the annotations that are sound, see `coco_rows`.

    Raises:
        DataError: it is missing or no JSON object, or lacks one of the `lists`.
    """
    try:
        pack = Packer() if packed else None
        content = json.loads(path.read_bytes(), object_hook=pack)
        if pack is not None and not pack.made_annotations_of(content):
            content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        there = sorted(p.name for p in path.parent.glob("*.json"))[:10] if path.parent.is_dir() else []
        hint = f"; there are: {', '.join(there)}" if there else "; check the path"
        raise DataError(f"{path}: the annotation file is missing{hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({str(error)[:100]}); export the file again") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: holds a {type(content).__name__}, not an object with images, annotations and categories"
        )
    for key in lists:
        if not isinstance(content.get(key), list):
            problem = "is missing" if content.get(key) is None else f"is a {type(content[key]).__name__}, not a list"
            raise DataError(f"{path}: '{key}' {problem}; pass a COCO instances file")
    if not content["categories"]:
        raise DataError(f"{path}: 'categories' is empty; pass a COCO instances file, which names its classes")
    return content


def _ids_of_several_files(images: list[Any]) -> set[Id]:
    names: dict[Id, Any] = {}
    keyed = ((key_of(item.get("id")), image_name(item)) for item in images if isinstance(item, dict))
    return {key for key, name in keyed if key is not None and names.setdefault(key, name) != name}


def _is_name(item: dict[str, Any]) -> bool:
    name = image_name(item)
    return isinstance(name, str) and bool(name.strip("/. "))
