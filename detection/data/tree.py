"""The files below a data root, found by the names that annotations give them, however those are spelt.

Exporters write paths of the machine that they ran on, file systems change the case and the Unicode form of names, and
browsers escape blanks. A name is looked for as it is written first, then without its leading folders, then without
regard to case, form and escapes. What is found is always a file that was listed below the root: no name leads out.
"""

from __future__ import annotations

import os
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from detection.data.checks import Folder
from detection.data.headers import EXTENSIONS, UNREAD
from detection.data.records import DataError, Defect

NOT_DATA = {"__MACOSX", "__pycache__", "$RECYCLE.BIN"}  # besides hidden folders; what archives and systems leave behind
PICTURES = {"images", "image", "imgs", "img", "jpegimages", "pictures", "photos", "data"}
LABELS = {"labels", "label", "annotations", "annotation", "annots", "anns", "ann", "xmls", "xml", "bboxes"}
ROLES = {
    "train": {"train", "training", "trn"},
    "val": {"val", "valid", "validation", "dev", "eval", "evaluation"},
    "test": {"test", "testing", "tst"},
    "trainval": {"trainval", "trainvalid"},
}
ROLE_OF_WORD = {word: role for role, words in ROLES.items() for word in words}


class Tree(Folder):
    """The files below a data root, hidden ones left out.

    Attributes:
        root: the resolved root.
        files: paths relative to the root, forward slashes, sorted.
        outside: links that lead out of the root and are not followed.
        hidden: folders with pictures that are not looked into, such as `.ipynb_checkpoints`.
    """

    def __init__(self, root: Path) -> None:
        root = Path(root).expanduser()
        if root.is_file():
            raise DataError(f"{root}: the data root is a file; pass the folder of the data set, such as {root.parent}")
        super().__init__(root)
        self.outside: list[str] = []
        self.hidden: list[str] = []
        self.files = sorted(self._walk("", set()))
        self._files = set(self.files)
        holding = {os.path.dirname(name) for name in self.files}
        parents = {str(parent) for folder in holding for parent in PurePosixPath(folder).parents if folder}
        self._folders = {""} | holding | {"" if folder == "." else folder for folder in parents}

    def _walk(self, folder: str, seen: set[str]) -> Iterator[str]:
        real = os.path.realpath(self.root / folder)
        if real in seen:
            return
        seen.add(real)
        try:
            with os.scandir(self.root / folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{self.root / folder}: the folder can't be listed ({error.strerror}); allow it") from error
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or entry.name in NOT_DATA:
                if entry.is_dir() and any(suffix(inner) in EXTENSIONS for inner in os.listdir(entry.path)):
                    self.hidden.append(name)
                continue
            if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(self.root):
                self.outside.append(name)
            elif entry.is_dir():
                yield from self._walk(name, seen)
            elif entry.is_file():
                yield name

    @cached_property
    def _loose(self) -> dict[str, list[str]]:
        return _by_loose_name(self.files)

    @cached_property
    def _loose_folders(self) -> dict[str, list[str]]:
        return _by_loose_name(sorted(self._folders))

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for name in self.pictures:
            table.setdefault(loose(os.path.basename(name)), []).append(name)
        return table

    def by_name(self, written: str) -> list[str]:
        """The pictures anywhere below the root that have the own name of a written path."""
        parts = cleaned(written)
        return self._by_name.get(loose(parts[-1]), []) if parts else []

    @cached_property
    def pictures(self) -> list[str]:
        """Every picture of a kind that is read."""
        return [name for name in self.files if suffix(name) in EXTENSIONS]

    @cached_property
    def unread(self) -> list[str]:
        """Every picture of a kind that is known, but not read."""
        return [name for name in self.files if suffix(name) in UNREAD]

    def remarks(self, labelled: Container[str] = ()) -> list[Defect]:
        """Notes on pictures that nobody reads: in hidden folders, behind links that lead out, of unread kinds.

        Args:
            labelled: pictures that are reported one by one, as they have labels.
        """
        notes = [
            Defect(name, "folder", "it holds pictures", "hidden folders are not read; move them", "note")
            for name in self.hidden
        ]
        fix = "what is behind it is not read; copy or move it"
        notes += [Defect(name, "link", "it leads out of the root", fix, "note") for name in self.outside]
        kinds: dict[str, list[str]] = {}
        for name in self.unread:
            if name not in labelled:
                kinds.setdefault(suffix(name), []).append(name)
        for kind, names in kinds.items():
            problem = f"{len(names)} pictures are {kind}, a kind that is not read"
            notes.append(Defect(names[0], "pictures", problem, f"they are left out; {UNREAD[kind]}", "note"))
        return notes

    def with_suffix(self, ending: str) -> list[str]:
        """Every file whose extension is this one, in any case."""
        return [name for name in self.files if suffix(name) == ending]

    def is_file(self, name: str) -> bool:
        return name in self._files

    def is_folder(self, name: str) -> bool:
        return name in self._folders

    def folders(self) -> list[str]:
        """Every folder below the root that has files in or below it."""
        return sorted(self._folders - {""})

    def below(self, folder: str) -> list[str]:
        """The files below a folder, those in sub-folders included."""
        if not folder:
            return self.files
        first, behind = f"{folder}/", f"{folder}0"  # "0" comes after "/"
        return self.files[bisect_left(self.files, first) : bisect_left(self.files, behind)]

    def file(self, written: str, bases: Iterable[str] = ("",)) -> str | None:
        """The file that a written path means, below the first of these folders that has it; None where none does."""
        found = _find(written, bases, self._files, self._loose)
        return found and found[0]

    def folder(self, written: str, bases: Iterable[str] = ("",)) -> str | None:
        """The folder that a written path means, likewise."""
        found = _find(written, bases, self._folders, self._loose_folders)
        return found and found[0]

    def best_bases(self, names: Sequence[str], bases: Iterable[str]) -> list[str]:
        """The folders below which these written paths are found best, equals in the order given; none where none is.

        Counted are the parts of the paths that are there: `b/1.jpg` is not well found by `a/1.jpg` below `a`.
        """
        step = max(1, len(names) // 200)
        counts = dict.fromkeys(bases, 0)
        for base in counts:
            for name in names[::step]:
                found = _find(name, (base,), self._files, self._loose)
                counts[base] += found[1] if found else 0
        best = max(counts.values(), default=0)
        return [base for base, count in counts.items() if count == best > 0]

    def contents(self) -> str:
        """What lies here, for messages: the commonest kinds of files with their counts."""
        kinds: dict[str, int] = {}
        for name in self.files:
            kind = suffix(name) or "without extension"
            kinds[kind] = kinds.get(kind, 0) + 1
        common = sorted(kinds.items(), key=lambda item: -item[1])[:5]
        return ", ".join(f"{count} {kind}" for kind, count in common) or "no file"


def suffix(name: str) -> str:
    """The extension in lower case, e.g. `".jpg"`."""
    return os.path.splitext(name)[1].lower()


def loose(name: str) -> str:
    """A name without what systems change: case, Unicode form, percent escapes, backslashes."""
    plain = unquote(name.replace("\\", "/"))
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", plain).casefold())


def cleaned(written: str) -> list[str]:
    """The parts of a written path that could lie below a root: without drive, scheme, `.` and `..`."""
    plain = re.sub(r"^(file://|[A-Za-z]:)", "", written.strip().replace("\\", "/"))
    return [part for part in plain.split("/") if part not in ("", ".", "..")]


def _by_loose_name(names: Iterable[str]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for name in names:
        table.setdefault(loose(name), []).append(name)
    return table


def contradicts(written: str, found: str) -> bool:
    """Whether a path below the root names another split's folder than that of the file that was found for it.

    The folders of another machine's path say nothing of ours.
    """
    plain = written.strip().replace("\\", "/")
    said, role = role_of_path(plain), role_of_path(found)
    return not re.match(r"/|[A-Za-z]+:", plain) and said is not None and role is not None and said != role


def _find(written: str, bases: Iterable[str], exact: set[str], table: dict[str, list[str]]) -> tuple[str, int] | None:
    """What a written path means, and how many of its parts are there."""
    parts, bases = cleaned(written), list(bases)
    if "\0" in written or (not parts and "" in bases and written.strip() not in (".", "./")):
        return None
    for start in range(max(len(parts), 1)):
        tail = "/".join(parts[start:])
        for base in bases:
            name = "/".join(filter(None, (base, tail)))
            if name in exact and not (start and contradicts(written, name)):
                return name, len(parts) - start
        for base in bases:
            found = table.get(loose("/".join(filter(None, (base, tail)))), [])
            # Of several that differ in case alone, none is meant more than another.
            if len(found) == 1 and not (start and contradicts(written, found[0])):
                return found[0], len(parts) - start
    return None


def role_of(name: str) -> str | None:
    """What a split of this name is for: `train`, `val`, `test` or `trainval`; None where no word of it says so."""
    for word in re.findall(r"[a-z]+", loose(name)):
        if word in ROLE_OF_WORD:
            return ROLE_OF_WORD[word]
    return None


def role_of_folder(name: str) -> str | None:
    """The role of a folder whose whole name is a role's word, with a number at most (`train2017`, `valid`)."""
    return ROLE_OF_WORD.get(re.sub(r"[\W\d_]+$", "", loose(name)))


def role_of_path(name: str) -> str | None:
    """The role of the nearest folder that has one."""
    return next((role for part in reversed(name.split("/")[:-1]) if (role := role_of_folder(part))), None)


def base_of(name: str) -> str:
    """The folder of the data set that a file belongs to: what comes before a folder of pictures, labels or a role."""
    kept: list[str] = []
    for part in name.split("/")[:-1]:
        if loose(part) in PICTURES | LABELS | {"imagesets", "segmentationobject"} or role_of_folder(part):
            break
        kept.append(part)
    return "/".join(kept)
