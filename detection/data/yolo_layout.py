"""Where a YOLO data set keeps names, pictures, labels and splits: as Ultralytics, Darknet and other tools export it.

Read are data.yaml of every kind, Darknet's obj.data with obj.names (CVAT, Roboflow), and bare folders with classes.txt
(Label Studio, labelImg). Paths in these files are those of the machine that wrote them: `Tree` finds what they mean.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import yaml

from detection.data.checks import nearest
from detection.data.pairing import Pairs, pair
from detection.data.records import DataError, Defect
from detection.data.tree import LABELS, Tree, base_of, loose, role_of, role_of_folder, role_of_path, suffix

NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels", "darknet.labels", "predefined_classes.txt")
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
        found = self.configs(tree) if config is None else [config]
        self.source = found[0] if found else ""
        for other in found[1:]:
            fix = f"'{self.source}' is read; pass the folder of the other as root to read that"
            self.defects.append(Defect(other, "file", "it describes a data set too", fix, "note"))
        self.config: dict[str, Any] = {}
        names: dict[int, str] | None = None
        if suffix(self.source) in (".yaml", ".yml"):
            self.config = _yaml(tree, self.source)
            names = _numbered(self.config["names"], self.config.get("nc"), tree.root / self.source)
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
        self.all_pictures = sorted({*tree.pictures, *(first & set(tree.unread))})
        self.defects += tree.remarks(labelled=first)
        self.names = self._used_numbers() if names is None else names
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
        found = [name for ending in (".yaml", ".yml") for name in tree.with_suffix(ending) if _has_names(tree, name)]
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
        said = self.config.get("names")
        file = self.tree.file(said, (self.base, "")) if isinstance(said, str) else None
        if file is None and os.path.basename(self.source).lower() in NAME_FILES:
            file = self.source
        if file is None and suffix(self.source) in (".names", ".labels"):
            file = self.source
        if file is None:
            beside = [n for n in self.tree.below(self.base) if os.path.basename(n).lower() in NAME_FILES]
            file = min(beside, key=lambda n: (n.count("/"), n), default=None)
        if file is None:
            return None
        lines = [line.strip() for line in _text(self.tree, file, "write one class name a line").splitlines()]
        self.source = file
        names = dict(enumerate(line for line in lines if line))
        if not names:
            raise DataError(f"{self.tree.root / file}: it names no class; write one class name a line")
        return names

    def _used_numbers(self) -> dict[int, str]:
        """`class 0`, `class 1`, ... for the numbers in the label files, where nothing names them."""
        numbers = {
            int(float(line.split()[0]))
            for label in self.pairs.pictures
            for line in (self.tree.root / label).read_text("utf-8-sig", errors="replace").splitlines()
            if LABEL_LINE.match(line.strip())
        }
        if not numbers:
            raise DataError(
                f"{self.tree.root}: no data.yaml with 'names' and no classes.txt is there; write the class names down"
            )
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
        return role_of_folder(PurePosixPath(name).stem) is not None and name.count("/") <= self.base.count("/") + 1

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

    def splits(self) -> dict[str, int]:
        """The pictures in each split whose entry leads somewhere; `""` is the only one where nothing names any."""
        named = {key: self.config[key] for key in SPLITS if self.config.get(key)}
        if named:
            return {key: len(files) for key, value in named.items() if (files := self._entry(value, [])) is not None}
        return {name: len(files) for name, files in (self._by_list() or self._by_folder()).items()}

    def absent(self) -> list[str]:
        """The keys of splits whose entry leads nowhere."""
        return [key for key in SPLITS if self.config.get(key) and self._entry(self.config[key], []) is None]

    def pictures(self, split: str) -> tuple[list[str], list[Defect]]:
        """The pictures of a split, each once, and what was found wrong.

        Args:
            split: a key of the file, the word for it (`val` for `valid`), a folder, or `""` for every labelled folder.

        Raises:
            DataError: there is no such split.
        """
        defects: list[Defect] = []
        role, key = role_of(split), self._key(split)
        if key:
            found = self._entry(self.config[key], defects)
            if found is None:
                found = self._by_folder().get(role or "", [])
                problem = f"'{self.config[key]}' of '{key}' is not there"
                if not found:
                    raise DataError(f"{self.tree.root / self.source}: {problem}; correct the path")
                fix = f"'{os.path.dirname(found[0])}' is read by its name; correct the path"
                defects.append(Defect(self.source, key, problem, fix))
        else:
            groups = self._by_list() or self._by_folder()
            found = groups.get(split) or groups.get(role or split) or self._of_folder(split)
            if not found:
                hint = nearest(split, [name for name in self.splits() if name])
                raise DataError(f"{self.tree.root}: there is no split '{split}'{hint}", defects)
        for name, count in Counter(found).items():
            if count > 1:
                defects.append(Defect(split, "list", f"'{name}' is listed twice", "it is read once; delete the copy"))
        return list(dict.fromkeys(found)), defects

    def _key(self, split: str) -> str | None:
        """The key of the file that means this split, if it says something."""
        same = [key for key in SPLITS if role_of(key) == role_of(split)] if role_of(split) else []
        return next((key for key in (split, *same) if split and self.config.get(key)), None)

    def _of_folder(self, split: str) -> list[str]:
        """The pictures of a folder that bears the name of the split."""
        self.tree.locate(split, f"split '{split}'")
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
        inside = set(self.tree.below(folder))
        return [name for name in self.all_pictures if name in inside]

    def _listed(self, file: str, defects: list[Defect]) -> list[str]:
        """The pictures of a list file, whose lines are relative to one of several folders."""
        lines = [line.strip() for line in _text(self.tree, file, "write one image path a line").splitlines()]
        lines = [line for line in lines if line]
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

    def _by_list(self) -> dict[str, list[str]]:
        """The splits of list files such as `train.txt` that nothing else names."""
        files = [n for n in self.tree.below(self.base) if suffix(n) == ".txt" and self._names_split(n)]
        lists = {role_of_folder(PurePosixPath(n).stem) or "": self._listed(n, []) for n in files}
        return {name: pictures for name, pictures in lists.items() if pictures}

    def _by_folder(self) -> dict[str, list[str]]:
        """Pictures by the role of their folder. A folder where no picture has a label is none of the data set's."""
        labelled = {os.path.dirname(name) for name in self.pairs.label}
        folders: dict[str, list[str]] = {}
        for name in self.all_pictures:
            role = role_of_path(name) or ""
            if os.path.dirname(name) in labelled or (role and name.startswith(f"{self.base}/" if self.base else "")):
                folders.setdefault(role, []).append(name)
        if len(folders) > 1:
            folders.pop("", None)
        return folders


def _text(tree: Tree, file: str, fix: str) -> str:
    try:
        return (tree.root / file).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{tree.root / file}: not UTF-8 text; {fix}") from error


def _yaml(tree: Tree, file: str) -> dict[str, Any]:
    path = tree.root / file
    try:
        config = _parsed(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable as YAML ({type(error).__name__}); correct the file") from error
    if not isinstance(config, dict) or "names" not in config:
        raise DataError(f"{path}: it has no 'names'; write the class names down")
    return config


def _parsed(text: str) -> Any:
    """The YAML of a text, in which a quoted path of Windows is no series of escapes."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return yaml.safe_load(text.replace("\\", "/"))


def _has_names(tree: Tree, file: str) -> bool:
    """Whether a YAML file describes a data set; one of its usual name that can't be read counts, to be reported."""
    official = os.path.basename(file).lower() in ("data.yaml", "data.yml", "dataset.yaml")
    try:
        text = (tree.root / file).read_text("utf-8-sig")
        if not official and not re.search(r"^\s*['\"]?names['\"]?\s*:", text, re.MULTILINE) and "{" not in text:
            return False
        config = _parsed(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return official
    return isinstance(config, dict) and "names" in config


def _holds_labels(tree: Tree, file: str) -> bool:
    """Whether the first line with something on it is a label."""
    with (tree.root / file).open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line.strip() for line in lines if line.strip()), "")
    return LABEL_LINE.match(first) is not None


def _numbered(names: Any, count: Any, path: Any) -> dict[int, str]:
    """Class names by number: from a list, a mapping of numbers, or text with a separator."""
    if isinstance(names, str):
        names = _split_text(names, count)
    if isinstance(names, dict):
        try:
            numbers = {int(number): name for number, name in names.items()}
        except (TypeError, ValueError):
            if all(type(number) is int for number in names.values()):  # {red: 0, blue: 1}
                numbers = {number: name for name, number in names.items()}
            else:
                raise DataError(
                    f"{path}: 'names' has keys that are no class numbers; number them 0, 1, 2, ..."
                ) from None
        if min(numbers, default=0) < 0 or len(numbers) != len(names):
            raise DataError(f"{path}: 'names' does not number the classes 0, 1, 2, ...; number each class once")
    else:
        numbers = dict(enumerate(names)) if isinstance(names, list) else {}
    if not numbers or not all(isinstance(name, str | int | float) for name in numbers.values()):
        raise DataError(f"{path}: 'names' is not a list of class names; write them as a YAML list")
    return {number: str(numbers[number]).strip() for number in sorted(numbers)}


def _split_text(text: str, count: Any) -> list[str]:
    """Names from one string: a list in brackets, or separated by commas, lines, or blanks where their count says so."""
    if text.strip().startswith("["):
        try:
            inner = yaml.safe_load(text)
        except yaml.YAMLError:
            inner = None
        if isinstance(inner, list):
            return [str(name) for name in inner]
    for separator in (r"[,;\n]+", r"\s+"):
        parts = [part.strip(" '\"-[]\t") for part in re.split(separator, text.strip())]
        parts = [part for part in parts if part]
        if len(parts) > 1 and (separator != r"\s+" or len(parts) == count):
            return parts
    return [text.strip()]
