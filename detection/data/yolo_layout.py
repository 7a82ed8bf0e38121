"""Where a YOLO data set keeps names, pictures, labels and splits: as Ultralytics, Darknet and other tools export it.

Read are data.yaml of every kind, Darknet's obj.data with obj.names (CVAT, Roboflow), and bare folders with classes.txt
(Label Studio, labelImg). Paths in these files are those of the machine that wrote them: `Tree` finds what they mean.
"""

from __future__ import annotations

import filecmp
import os
import re
from collections import Counter
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from detection.data.checks import nearest, short
from detection.data.judging import shown
from detection.data.pairing import Pairs, pair
from detection.data.records import DataError, Defect
from detection.data.tree import LABELS, Tree, base_of, loose, role_of, role_of_folder, role_of_path, suffix
from detection.data.yolo_yaml import has_names, numbered, read_yaml

NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels", "darknet.labels", "predefined_classes.txt")
YAML = (".yaml", ".yml")
SPLITS = ("train", "val", "valid", "validation", "test", "minival")
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
LABEL_LINE = re.compile(rf"\d+(\.0*)?(\s+{NUMBER}){{4,}}")


class YoloLayout:
    """The files of one YOLO data set.

    Args:
        tree: of the data root.
        config: the file that names classes or splits, relative to the root; None takes the one nearest to the root.

    Attributes:
        base: folder of the data set, relative to the root.
        source: the file that names the classes; `""` where none does.
        config: what that file says besides ({} without one).
        names: of the classes, by their number in label files.
        pairs: pictures and label files.
        defects: what was found wrong in the layout.

    Raises:
        DataError: the file can't be read, or its names are none.
    """

    def __init__(self, tree: Tree, config: str | None = None) -> None:
        self.tree, self.defects = tree, list[Defect]()
        found = self.configs(tree)
        self.source = config or next(iter(found), "")
        for other in found:
            beside = base_of(other) == base_of(self.source)
            if (beside or config is None) and not filecmp.cmp(tree.root / other, tree.root / self.source, False):
                fix = "keep one of them here" if beside else "pass the folder of the other as root to read that"
                problem, fix = "it describes a data set too", f"'{self.source}' is read; {fix}"
                self.defects.append(Defect(other, "file", problem, fix, "note"))
        self.config: dict[str, Any] = {}
        names: dict[int, str] | None = None
        if suffix(self.source) in YAML:
            self.config = read_yaml(tree.root / self.source)
            if self._file_of_names() is None:
                names = numbered(self.config["names"], self.config.get("nc"), tree.root / self.source)
        elif suffix(self.source) == ".data":
            self.config = self._darknet(self.source)
        self.base = base_of(self.source) if self.source else ""
        if not any(name.startswith(f"{self.base}/") for name in tree.pictures):  # `configs/data.yaml` beside `images`
            self.base = ""
        if names is None:
            names = self._listed_names()
        self.pairs = self._pair()
        first = {pictures[0] for pictures in self.pairs.pictures.values()}
        # Labelled pictures of a kind that is not read are listed too, so that the reader names them.
        self._pictures = dict.fromkeys(sorted({*tree.pictures, *(first & set(tree.unread))}))
        self.defects += tree.remarks(labelled=first)
        self.names = self._used_numbers() if names is None else names
        self._compare_names()
        for name, count in Counter(self.names.values()).items():
            if count > 1:
                where = tree.root / self.source
                raise DataError(f"{where}: the class name '{name}' is listed {count} times; name each class once")
        stated = self.config.get("nc")
        if type(stated) is int and stated != len(self.names):
            problem = f"nc is {stated}, but {len(self.names)} classes have names"
            self.defects.append(Defect(self.source, "nc", problem, "the names are used; correct nc"))
        for picture, how in self.pairs.loosely.items():
            problem = f"'{picture}' is its picture: {how}"
            self.defects.append(Defect(self.pairs.label[picture], "file", problem, "it is read", "note"))

    @staticmethod
    def configs(tree: Tree) -> list[str]:
        """The files that describe a YOLO data set, the nearest and most official first."""
        found = [name for name in tree.files if suffix(name) in YAML and has_names(tree.root / name)]
        found = found or tree.with_suffix(".data")
        found = found or [name for name in tree.files if os.path.basename(name).lower() in NAME_FILES]
        found = found or tree.with_suffix(".names")

        def rank(name: str) -> tuple[int, int, int, str]:
            base, file = base_of(name), os.path.basename(name).lower()
            official = ("data.yaml", "dataset.yaml", "obj.data", *NAME_FILES)
            return (
                base.count("/") + bool(base),
                official.index(file) if file in official else len(official),
                name.count("/"),
                name,
            )

        return sorted(found, key=rank)

    def _darknet(self, file: str) -> dict[str, Any]:
        """Darknet's `key = value` lines."""
        lines = _text(self.tree, file, "write lines of key = value").splitlines()
        pairs = (line.partition("=") for line in lines if "=" in line)
        return {key.strip(): value.strip() for key, _, value in pairs}

    def _listed_names(self) -> dict[int, str] | None:
        """Class names from a file of one a line, which becomes the source; None where there is none."""
        file = self._file_of_names()
        if file is None and os.path.basename(self.source).lower() in NAME_FILES:
            file = self.source
        if file is None and suffix(self.source) in (".names", ".labels"):
            file = self.source
        if file is None:
            beside = [n for n in self.tree.below(self.base) if os.path.basename(n).lower() in NAME_FILES]
            file = min(beside, key=lambda n: (n.count("/"), n), default=None)
        if file is None:
            return None
        self.source = file
        names = [line.strip() for line in _text(self.tree, file, "write one class name a line").rstrip().splitlines()]
        if not names:
            raise DataError(f"{self.tree.root / file}: it names no class; write one class name a line")
        for number in (number for number, name in enumerate(names) if not name):
            fix = f"it counts as 'class {number}'; delete it, or name the class"
            self.defects.append(Defect(file, f"line {number + 1}", "it names no class", fix))
        return {number: name or f"class {number}" for number, name in enumerate(names)}

    def _file_of_names(self) -> str | None:
        """The file that `names` leads to, where that is a path and no name."""
        said = self.config.get("names")
        if not isinstance(said, str) or suffix(said.strip()) not in (".txt", ".names", ".labels"):
            return None
        return self.tree.file(said, (base_of(self.source), ""))

    def _compare_names(self) -> None:
        """Report files of names that say otherwise than the one that is read."""
        for file in self.tree.below(self.base):
            if file != self.source and os.path.basename(file).lower() in NAME_FILES[:-1]:
                names = _stripped((self.tree.root / file).read_text("utf-8-sig", errors="replace"))
                if names and names != list(self.names.values()):
                    problem = f"it names {shown(names)}, but '{self.source}' {shown([*self.names.values()])}"
                    fix = f"'{self.source}' is read; correct the one that is wrong"
                    self.defects.append(Defect(file, "classes", problem, fix))

    def _used_numbers(self) -> dict[int, str]:
        """`class 0`, `class 1`, ... for the numbers in the label files, where nothing names them."""
        numbers = {
            int(float(line.split()[0]))
            for label in self.pairs.pictures
            for line in (self.tree.root / label).read_text("utf-8-sig", errors="replace").splitlines()
            if LABEL_LINE.match(line.strip())
        }
        if not numbers:
            problem = "no data.yaml with 'names' and no classes.txt is there; write the class names down"
            raise DataError(self.unlabelled() or f"{self.tree.root}: {problem}")
        problem, fix = "no file names the classes", "they are called by their numbers; write a classes.txt"
        self.defects.append(Defect("classes", "classes", problem, fix))
        return {number: f"class {number}" for number in sorted(numbers)}

    def _pair(self) -> Pairs:
        files = self.tree.below(self.base)
        inside = set(files)
        lists = {name for name in files if suffix(name) == ".txt" and self._is_list(name)}
        labels = [name for name in files if suffix(name) == ".txt" and name not in lists and name != self.source]
        return pair([name for name in (*self.tree.pictures, *self.tree.unread) if name in inside], labels)

    def _is_list(self, name: str) -> bool:
        """Whether a text file is none with labels by its name: class names, a list of pictures, a read-me."""
        file, said = os.path.basename(name).lower(), [v for v in self.config.values() if isinstance(v, str)]
        listed = any(loose(value).endswith(f"/{file}") or loose(value) == file for value in said)
        in_labels = any(loose(part) in LABELS for part in name.split("/")[:-1])
        return file in NAME_FILES or file.startswith("readme") or (listed and not in_labels) or self._names_split(name)

    def _names_split(self, name: str) -> bool:
        named = role_of_folder(PurePosixPath(name).stem) is not None and name.count("/") <= self.base.count("/") + 1
        return named and not _holds_labels(self.tree, name)  # a picture may be called `train_1`

    def orphans(self, split: str) -> list[Defect]:
        """The label files of a split that no picture belongs to, and those that another one stands before."""
        role, found = role_of(split) if split else None, list[Defect]()
        for name in self.pairs.alone:
            if role_of_path(name) in (None, role) and _holds_labels(self.tree, name):
                problem, fix = "it has no picture", "its objects are left out; restore the picture or delete the file"
                found.append(Defect(name, "file", problem, fix))
        for name, other in self.pairs.spare.items():
            if role_of_path(name) in (None, role):
                problem = f"'{other}' is read for the same picture"
                found.append(Defect(name, "file", problem, "it is not read; keep one of them"))
        return found

    def unlabelled(self) -> str | None:
        """What the label files hold instead of labels; None where a line of them is one, or they are empty."""
        problem = None
        for label in self.pairs.pictures:
            lines = _stripped((self.tree.root / label).read_text("utf-8-sig", errors="replace"))
            if any(map(LABEL_LINE.match, lines)):
                return None
            if lines and problem is None:
                fix = "write class x_center y_center width height, relative to the image, with blanks between"
                problem = f"{self.tree.root / label}: {short(lines[0], 80)!r} is no label; {fix}"
        return problem

    def splits(self) -> dict[str, int]:
        """The pictures in each split whose entry leads somewhere; `""` is the only one where nothing names any."""
        return {name: len(pictures) for name, (pictures, _) in self._parts.items()}

    def absent(self) -> dict[str, str]:
        """What is wrong with the keys of splits whose entry leads nowhere."""
        keys = [key for key in SPLITS if self.config.get(key) and key not in self._parts]
        link = next((f", but '{name}' is a link that leads out of the root" for name in self.tree.outside), "")
        return {key: f"'{self.config[key]}' of '{key}' is not there{link}" for key in keys}

    @cached_property
    def _parts(self) -> dict[str, tuple[list[str], list[Defect]]]:
        """The pictures of each split and what was found wrong: as the file says, else by lists, else by folders."""
        named = {key: self.config[key] for key in SPLITS if self.config.get(key)}
        folders = self._by_folder()
        if not named:
            return self._by_list() or {name: (found, self._left_over(folders, name)) for name, found in folders.items()}
        parts: dict[str, tuple[list[str], list[Defect]]] = {}
        for key, value in named.items():
            defects: list[Defect] = []
            found = self._entry(value, defects)
            if found is None and (found := folders.get(role_of(key) or "")):
                fix = f"'{os.path.dirname(found[0])}' is read by its name; correct the path"
                defects.append(Defect(self.source, key, f"'{value}' of '{key}' is not there", fix))
            if found is not None:
                parts[key] = (found, defects)
        taken = {name for pictures, _ in parts.values() for name in pictures}
        spare = [] if any(role_of(key) == "val" for key in parts) else folders.get("val", [])
        if any(name in self.pairs.label for name in spare) and taken.isdisjoint(spare):
            fix = f"'{os.path.dirname(spare[0])}' is read by its name; write it down"
            parts["val"] = (spare, [Defect(self.source, "val", "it names no pictures to validate on", fix)])
        return parts

    def pictures(self, split: str) -> tuple[list[str], list[Defect]]:
        """The pictures of a split, each once, and what was found wrong.

        Args:
            split: a key of the file, the word for it (`val` for `valid`), a folder, or `""` for every labelled folder.

        Raises:
            DataError: there is no such split.
        """
        absent, role = self.absent(), role_of(split)
        same = [key for key in (*SPLITS, *self._parts) if role and role_of(key) == role]
        key = next((key for key in (split, *same) if key in self._parts or key in absent), None)
        if key in absent:
            raise DataError(f"{self.tree.root / self.source}: {absent[key]}; correct the path")
        found, defects = self._parts[key] if key is not None else (self._of_folder(split), [])
        if not found and key is None:
            hint = nearest(split, [name for name in self.splits() if name])
            raise DataError(f"{self.tree.root}: there is no split '{split}'{hint}")
        twice = [name for name, count in Counter(found).items() if count > 1]
        copies = [Defect(split, "list", f"'{n}' is listed twice", "it is read once; delete the copy") for n in twice]
        return list(dict.fromkeys(found)), [*defects, *copies]

    def _of_folder(self, split: str) -> list[str]:
        """The pictures of a folder that bears the name of the split, or one of the words for it."""
        self.tree.locate(split, f"split '{split}'")
        if found := self._by_folder().get(role_of(split) or split):
            return found
        for place in (f"images/{split}", f"{split}/images", split):
            folder = self.tree.folder(place, (self.base,)) if split else None
            if folder and loose(folder).endswith(loose(place)):
                return self._below(folder)
        return []

    def _entry(self, value: Any, defects: list[Defect]) -> list[str] | None:
        """The pictures behind an entry: a folder, a list file, or several of them; None where it leads nowhere."""
        found: list[str] | None = None
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, str):
                continue
            bases = self._bases()
            file = self.tree.file(item, bases) if item.strip().endswith(".txt") else None
            folder = None if file else self._folder(item, bases)
            if file is not None:
                found = (found or []) + self._listed(file, defects)
            elif folder is not None:
                found = (found or []) + self._below(folder)
        return found

    def _folder(self, item: str, bases: list[str]) -> str | None:
        folder = self.tree.folder(item, bases)
        # `train/images` must not become `images`, which holds the pictures of every split.
        if folder is None or role_of_path(f"{item}/x".replace("\\", "/")) != role_of_path(f"{folder}/x"):
            return None
        return folder

    def _bases(self) -> list[str]:
        path = self.config.get("path")
        inner = self.tree.folder(path, (self.base,)) if isinstance(path, str) and path.strip(". /\\") else None
        return [base for base in (inner, self.base, "") if base is not None]

    def _below(self, folder: str) -> list[str]:
        return [name for name in self.tree.below(folder) if name in self._pictures]

    def _listed(self, file: str, defects: list[Defect]) -> list[str]:
        """The pictures of a list file, whose lines are relative to one of several folders."""
        lines = _stripped(_text(self.tree, file, "write one image path a line"))
        base = next(iter(self.tree.best_bases(lines, [os.path.dirname(file), *self._bases()])), None)
        found = []
        for number, line in enumerate(lines, 1):
            name = self.tree.file(line, (base,)) if base is not None else None
            if name is None:
                problem = f"there is no picture '{line[:200]}'"
                defects.append(Defect(file, f"line {number}", problem, "it is left out; restore it", "broken"))
            else:
                found.append(name)
        return found

    def _by_list(self) -> dict[str, tuple[list[str], list[Defect]]]:
        """The splits of list files such as `train.txt` that nothing else names, and the lines that mean nothing."""
        parts: dict[str, tuple[list[str], list[Defect]]] = {}
        for file in self.tree.below(self.base):
            if suffix(file) == ".txt" and self._names_split(file):
                defects: list[Defect] = []
                if found := self._listed(file, defects):
                    parts[role_of_folder(PurePosixPath(file).stem) or ""] = (found, defects)
        return parts

    def _by_folder(self) -> dict[str, list[str]]:
        """Pictures by the role of their folder. A folder where no picture has a label is none of the data set's."""
        labelled = {os.path.dirname(name) for name in self.pairs.label}
        folders: dict[str, list[str]] = {}
        for name in self._pictures:
            role = role_of_path(name) or ""
            if os.path.dirname(name) in labelled or (role and name.startswith(f"{self.base}/" if self.base else "")):
                folders.setdefault(role, []).append(name)
        if len(folders) > 1:
            folders.pop("", None)
        return folders

    def _left_over(self, folders: dict[str, list[str]], split: str) -> list[Defect]:
        """Said with the first split: pictures with labels that lie in no split's folder."""
        taken = {name for pictures in folders.values() for name in pictures}
        left = [name for name in self._pictures if name in self.pairs.label and name not in taken]
        if not left or split != next(iter(folders)):
            return []
        problem = f"{len(left)} labelled pictures lie in no split's folder"
        return [Defect(left[0], "file", problem, "they are not read; move them into one")]


def _text(tree: Tree, file: str, fix: str) -> str:
    try:
        return (tree.root / file).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{tree.root / file}: not UTF-8 text; {fix}") from error


def _stripped(text: str) -> list[str]:
    """The lines with something on them."""
    return [line for line in map(str.strip, text.splitlines()) if line]


def _holds_labels(tree: Tree, file: str) -> bool:
    """Whether the first line with something on it is a label."""
    with (tree.root / file).open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line.strip() for line in lines if line.strip()), "")
    return LABEL_LINE.match(first) is not None
