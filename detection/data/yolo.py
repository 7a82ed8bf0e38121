"""Reads YOLO folders: one text file an image, one `class x_center y_center width height` a line, relative to the image.

Labels lie where the path of the images has `images` replaced by `labels`. Lines of more numbers are polygons
`class x1 y1 x2 y2 ...`, read as the box around them. An image without a text file has no objects: that is how the
format writes background.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from detection.data.checks import Folder, Objects, choose_classes, finish_index, nearest
from detection.data.images import EXTENSIONS, image_size
from detection.data.records import DataError, Defect, Index, Record, Severity

NAME_FILES = ("classes.txt", "obj.names", "labels.txt")  # one class name a line, for sets without a YAML file
LARGEST = 2.0  # relative coordinates beyond this are pixels, not boxes that reach over the edge


def read_yolo(root: Path, split: str, classes: Sequence[str] | None = None) -> Index:
    """Read one split of a YOLO data set.

    Every object left out and every value repaired is a defect of the index. Image ids are positions in the split,
    counted from 0; category ids are the format's own class numbers, from 0.

    Args:
        root: folder that holds `data.yaml` (or `classes.txt`) and the images, which no image may leave.
        split: a key of the YAML file, or a folder `images/{split}` or `{split}/images`.
        classes: names of the classes to read, in the order of their labels; None for all.

    Raises:
        DataError: class names, the split or a wanted class are absent, a path leaves the root, or no image is left.
    """
    folder = Folder(Path(root))
    reader = _Reader(folder)
    names, config, source = reader.names()
    chosen = choose_classes(names, classes, source)
    labels = [chosen.index(name) + 1 if name in chosen else 0 for name in names]
    ids = tuple(names.index(name) for name in chosen)
    index = Index(folder.root, chosen, ids, [], reader.defects, form="cxcywh")
    for position, image in enumerate(reader.images(split, config)):
        if (record := reader.record(position, image, labels)) is not None:
            index.records.append(record)
    return finish_index(index, f"{folder.root} split '{split}'")


def find_splits(root: Path) -> list[str]:
    """The splits that the YAML file or the folders name."""
    folder = Folder(root)
    _, config, _ = _Reader(folder).names()
    splits: list[str] = [key for key in ("train", "val", "valid", "test") if key in config]
    return splits or sorted(p.name for p in (*root.glob("images/*"), *root.glob("*/images/..")) if p.is_dir())


class _Reader:
    """The folders of one data set and what was found wrong in them."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.defects = folder, list[Defect]()

    def report(self, file: str, record: str, problem: str, fix: str, severity: Severity = "repairable") -> None:
        self.defects.append(Defect(file, record, problem, fix, severity))

    def names(self) -> tuple[list[str], dict[str, Any], str]:
        """Class names by number, the YAML file's content ({} without one), and the file they are from."""
        root = self.folder.root
        found = [root / "data.yaml"] if (root / "data.yaml").is_file() else sorted(root.glob("*.y*ml"))
        for path in found:
            try:
                config = yaml.safe_load(path.read_text("utf-8-sig"))
            except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
                raise DataError(f"{path}: not readable as YAML ({type(error).__name__}); correct the file") from error
            if isinstance(config, dict) and "names" in config:
                return self._unique(_by_number(config["names"], path), path), config, path.name
        for name in NAME_FILES:
            if (root / name).is_file():
                try:
                    lines = (root / name).read_text("utf-8-sig").splitlines()
                except ValueError as error:
                    raise DataError(f"{root / name}: not UTF-8 text; write one class name a line") from error
                return self._unique([line.strip() for line in lines if line.strip()], root / name), {}, name
        raise DataError(f"{root}: no data.yaml with 'names' and no classes.txt is there; write the class names down")

    def _unique(self, names: list[str], path: Path) -> list[str]:
        for name, count in Counter(names).items():
            if count > 1:
                raise DataError(f"{path}: the class name '{name}' is listed {count} times; name each class once")
        return names

    def images(self, split: str, config: dict[str, Any]) -> list[str]:
        """The image files of a split, relative to the root, each once."""
        entry = config.get(split)
        entries = [item for item in (entry if isinstance(entry, list) else [entry]) if isinstance(item, str)]
        entries = [place for item in entries if (place := self._find(item, config)) is not None]
        if not entries:
            guesses = (f"images/{split}", f"{split}/images", split)
            entries = [g for g in guesses if self.folder.locate(g, f"split '{split}'").is_dir()][:1]
        if not entries:
            hint = nearest(split, find_splits(self.folder.root))
            raise DataError(f"{self.folder.root}: there is no split '{split}'{hint}")
        files: dict[str, None] = {}
        for place in entries:
            for name in self._listed(place) if place.endswith(".txt") else self._below(place):
                if name in files:
                    self.report(place, "list", f"'{name}' is listed twice", "it is read once; delete the copy")
                files[name] = None
        return list(files)

    def _find(self, entry: str, config: dict[str, Any]) -> str | None:
        """The folder or list that an entry means: exporters write it relative to several places, `path` among them."""
        base = config.get("path")
        entry = entry.replace("\\", "/").removeprefix("./").rstrip("/")
        while entry.startswith("../"):  # relative to a folder above that only the exporter knew
            entry = entry.removeprefix("../")
        bases = [f"{base.strip('/')}/{entry}"] if isinstance(base, str) and ".." not in base else []
        for name in (*bases, entry):
            path = self.folder.locate(name, "YAML file")
            if path.is_dir() or (path.is_file() and name.endswith(".txt")):
                return name
        return None

    def _below(self, place: str) -> list[str]:
        found = []
        for folder, folders, files in os.walk(self.folder.locate(place, "split")):
            folders.sort()
            relative = Path(folder).relative_to(self.folder.root).as_posix()
            found += [f"{relative}/{n}" for n in sorted(files) if os.path.splitext(n)[1].lower() in EXTENSIONS]
        return found

    def _listed(self, place: str) -> list[str]:
        try:
            lines = self.folder.locate(place, "YAML file").read_text("utf-8-sig").splitlines()
        except ValueError as error:
            raise DataError(f"{self.folder.root / place}: not UTF-8 text; write one image path a line") from error
        return [line.strip().removeprefix("./") for line in lines if line.strip()]

    def record(self, position: int, image: str, labels: list[int]) -> Record | None:
        """The record of one image, or None where it can't be used."""
        path = self.folder.locate(image, f"image {position}")
        try:
            height, width = image_size(path)
        except DataError as error:
            problem = str(error).removeprefix(f"{path}: ").split(";")[0]
            self.report(image, f"image {position}", problem, "the image is left out; restore the file", "broken")
            return None
        file = _label_file(image)
        objects = Objects(file, "file", width, height, self.defects)
        try:
            lines = self.folder.locate(file, image).read_text("utf-8-sig").splitlines()
        except FileNotFoundError:
            lines = []
        except (OSError, ValueError):
            self.report(file, "file", "not readable as text", "the image is left out; repair the file", "broken")
            return None
        for number, line in enumerate(lines):
            if line.strip():
                self._object(objects, number, line.split(), labels)
        return objects.finish(position, image, masks=False)

    def _object(self, objects: Objects, number: int, words: list[str], labels: list[int]) -> None:
        what = f"line {number + 1}"
        try:
            category, *values = (float(word) for word in words)
        except ValueError:
            return objects.report(what, "it holds something that is no number", "the line is left out; correct it")
        if not category.is_integer() or not 0 <= category < len(labels):
            problem = f"there is no class {words[0][:20]}"
            return objects.report(what, problem, f"the line is left out; use 0..{len(labels) - 1}")
        if not all(abs(value) <= LARGEST for value in values):
            problem = "coordinates are not relative to the image (0 to 1)"
            return objects.report(what, problem, "the line is left out; divide by width and height")
        if len(values) in (4, 5):
            x, y, w, h = values[:4]
            box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            if len(values) == 5:
                objects.report(what, "a sixth number follows the box", "it is not used; remove scores", "note")
        elif len(values) >= 6 and len(values) % 2 == 0:
            box = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
        else:
            problem = f"{len(values)} numbers follow the class"
            return objects.report(what, problem, "the line is left out; write 4, or 3 points or more")
        if label := labels[int(category)]:
            scale = (objects.width, objects.height, objects.width, objects.height)
            objects.add(what, [value * side for value, side in zip(box, scale, strict=True)], label, number)
        return None


def _by_number(names: Any, path: Path) -> list[str]:
    """Class names in the order of their numbers, from a list or a mapping."""
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{path}: 'names' does not number the classes 0, 1, 2, ...; number them without gaps")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(n, str | int | float) for n in names):
        raise DataError(f"{path}: 'names' is not a list of class names; write them as a YAML list")
    return [str(name).strip() for name in names]


def _label_file(image: str) -> str:
    """`images/train/a.jpg` -> `labels/train/a.txt`: the last folder called images; beside the image where none is."""
    parts = list(Path(image).parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt").as_posix()
