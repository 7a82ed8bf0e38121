"""Small drawn data sets whose truth is known, written in any format and layout, under names as people have them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

CLASSES = ("red", "blue")
COLOURS = ((220, 40, 40), (40, 60, 220))
WIDTH, HEIGHT = 64, 48


@dataclass
class Picture:
    """One drawn picture: its stem, its split, and its objects as (class number, x1, y1, x2, y2)."""

    stem: str
    split: str
    objects: list[tuple[int, int, int, int, int]]
    place: str = ""  # where it was written, relative to the root


@dataclass
class Style:
    """How a set is written; each field is one way in which sets of the wild differ.

    Attributes:
        suffix: of pictures.
        upper: stems of labels in capitals.
        form: Unicode form of the labels' names.
        escape: percent escapes in the labels' names.
        double: labels are called `a.jpg.xml`.
        label_suffix: of XML or text files, e.g. `.XML`.
        folders: sub-folder of picture number i, `""` for none.
        splits: names of training and validation; one name alone leaves the split to be made.
        path: writes a path as lists and annotation files have it.
        layout: of the format, see the writers.
        ids: of images, from their number.
        names: the lines of data.yaml that name the classes.
    """

    suffix: str = ".png"
    upper: bool = False
    form: str = "NFC"
    escape: bool = False
    double: bool = False
    label_suffix: str = ""
    folders: Callable[[int], str] = lambda number: ""
    splits: tuple[str, ...] = ("train", "val")
    path: Callable[[str], str] = lambda name: name
    layout: str = "plain"
    ids: Callable[[int], int] = lambda number: number + 1
    names: str = "names: [red, blue]"
    stems: tuple[str, ...] = field(default=("a", "b", "c", "d", "e"))

    def label(self, stem: str) -> str:
        """The stem of a label file."""
        name = unicodedata.normalize(self.form, stem.upper() if self.upper else stem)
        name = quote(name) if self.escape else name
        return f"{name}{self.suffix}" if self.double else name


def draw(style: Style, seed: int = 0) -> list[Picture]:
    """Pictures of one or two rectangles that do not overlap; the last of the first split has none."""
    rng = np.random.default_rng(seed)
    pictures = []
    for number, stem in enumerate(style.stems):
        split = style.splits[-1] if number >= len(style.stems) - 2 else style.splits[0]
        objects = []
        for side, category in enumerate(rng.permutation(2)[: rng.integers(1, 3)]):
            x1, y1 = side * 32 + rng.integers(2, 10), rng.integers(2, 20)
            x2, y2 = x1 + rng.integers(8, 20), y1 + rng.integers(8, 26)
            objects.append((int(category), int(x1), int(y1), int(x2), int(y2)))
        pictures.append(Picture(stem, split, objects))
    return pictures


def save(root: Path, place: str, picture: Picture) -> None:
    """Write the pixels of a picture."""
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for category, x1, y1, x2, y2 in picture.objects:
        pixels[y1:y2, x1:x2] = COLOURS[category]
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP"}[path.suffix.lower()]
    Image.fromarray(pixels).save(path, kind, **({"quality": 95} if kind == "JPEG" else {}))
    picture.place = place


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def write_yolo(root: Path, style: Style) -> list[Picture]:
    """Layouts: `plain` (images/train), `inner` (train/images), `flat` (beside), `lists` (train.txt), `bare`."""
    pictures = draw(style)
    places = {
        "plain": ("images/{s}", "labels/{s}"),
        "inner": ("{s}/images", "{s}/labels"),
        "flat": ("{s}", "{s}"),
        "lists": ("data/images", "data/labels"),
        "bare": ("images", "labels"),
    }[style.layout]
    listed: dict[str, list[str]] = {}
    for number, picture in enumerate(pictures):
        folder, labels = (place.format(s=picture.split) for place in places)
        save(root, _join(folder, style.folders(number), picture.stem + style.suffix), picture)
        listed.setdefault(picture.split, []).append(style.path(picture.place))
        lines = []
        for category, x1, y1, x2, y2 in picture.objects:
            values = ((x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT)
            lines.append(f"{category} " + " ".join(f"{value:.6f}" for value in values))
        path = root / labels / style.folders(number) / (style.label(picture.stem) + (style.label_suffix or ".txt"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    if style.layout == "bare":
        (root / "classes.txt").write_text("\n".join(CLASSES))
        return pictures
    lines = [style.names]
    for key, split in zip(("train", "val"), style.splits, strict=False):
        if style.layout == "lists":
            (root / f"{key}.txt").write_text("\n".join(listed[split]))
            lines.append(f"{key}: {key}.txt")
        else:
            lines.append(f"{key}: '{style.path(places[0].format(s=split))}'")
    (root / "data.yaml").write_text("\n".join(lines))
    return pictures


def write_voc(root: Path, style: Style) -> list[Picture]:
    """Layouts: `plain` (devkit with lists), `beside` (no lists), `folders` (a folder a split), `flags` (`name 1`)."""
    pictures = draw(style)
    listed: dict[str, list[str]] = {}
    for number, picture in enumerate(pictures):
        inner = style.folders(number)
        images, labels = {
            "plain": ("JPEGImages", "Annotations"),
            "flags": ("JPEGImages", "Annotations"),
            "beside": ("", ""),
            "folders": (picture.split, picture.split),
        }[style.layout]
        save(root, _join(images, inner, picture.stem + style.suffix), picture)
        line = style.path(_join(inner, picture.stem))
        listed.setdefault(picture.split, []).append(f"{line} 1" if style.layout == "flags" else line)
        objects = "".join(
            f"<object><name>{CLASSES[c]}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}"
            f"</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for c, x1, y1, x2, y2 in picture.objects
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        name = f"<filename>{picture.stem}{style.suffix}</filename>"
        path = root / labels / inner / (style.label(picture.stem) + (style.label_suffix or ".xml"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<annotation>{name}{size}{objects}</annotation>")
    if style.layout in ("plain", "flags"):
        folder = root / "ImageSets" / "Main"
        folder.mkdir(parents=True)
        for split, lines in listed.items():
            (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return pictures


def write_coco(root: Path, style: Style) -> list[Picture]:
    """Layouts: `plain` (annotations/train.json, train/), `beside` (Roboflow), `fiftyone` (data/, labels.json)."""
    pictures = draw(style)
    for split in dict.fromkeys(style.splits):
        images, annotations = [], []
        for number, picture in enumerate(pictures):
            if picture.split != split:
                continue
            folder = {"plain": split, "beside": split, "fiftyone": "data", "cvat": "images"}[style.layout]
            inner = _join(style.folders(number), picture.stem + style.suffix)
            save(root, _join(folder, inner), picture)
            written = style.path(_join(style.folders(number), style.label(picture.stem)) + style.suffix)
            entry = {"id": style.ids(number), "file_name": written, "width": WIDTH, "height": HEIGHT}
            images.append(entry)
            for category, x1, y1, x2, y2 in picture.objects:
                box = [x1, y1, x2 - x1, y2 - y1]
                fields = {"id": len(annotations) + 1, "image_id": entry["id"], "category_id": category + 1}
                annotations.append(fields | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        place = {
            "plain": f"annotations/instances_{split}.json",
            "beside": f"{split}/_annotations.coco.json",
            "fiftyone": "labels.json",
            "cvat": "annotations/instances_default.json",
        }[style.layout]
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return pictures


WRITERS = {"yolo": write_yolo, "voc": write_voc, "coco": write_coco}
LAYOUTS = {
    "yolo": ("plain", "inner", "flat", "lists", "bare"),
    "voc": ("plain", "beside", "folders", "flags"),
    "coco": ("plain", "beside", "fiftyone", "cvat"),
}
WITHOUT_SPLIT = {("yolo", "bare"), ("voc", "beside"), ("coco", "fiftyone"), ("coco", "cvat")}
