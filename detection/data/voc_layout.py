"""Where a VOC data set keeps its XML files, pictures and lists: the devkit's layout and those of exporting tools.

Read are the devkit (Everingham et al. 2010), XML beside the pictures (labelImg), a folder for each split (Roboflow),
sub-folders of either, and lists with or without extensions and flags (VoTT). Folders and lists are found by `Tree`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

from defusedxml.ElementTree import fromstring

from detection.data.checks import nearest, short
from detection.data.headers import EXTENSIONS, UNREAD
from detection.data.pairing import pair
from detection.data.records import DataError, Defect
from detection.data.tree import LABELS, Tree, base_of, cleaned, loose, role_of, role_of_path, suffix

FLAG = re.compile(r"\s+(-1|0|1)$")  # the list of one class says so of each picture, which belongs to the split anyway
ENCODING = re.compile(rb"""<\?xml[^>]*encoding\s*=\s*["']([\w.-]+)""")
LISTS = {"imagesets/main": 0, "imagesets": 1, "splits": 2, "": 3}


class Entry(NamedTuple):
    """A picture of a split: its XML file, or where one is missing, the line that asks for it."""

    xml: str | None
    line: str = ""


class VocLayout:
    """The files of one VOC data set.

    Args:
        tree: of the data root.
        xml: its XML files; None takes those of the data set nearest to the root.
        annotations, images: folders relative to the root that narrow both down.

    Attributes:
        base: folder of the data set, relative to the root.
        picture: of each XML file; those without one are missing.
        others: further pictures of an XML file, which differ in extension.
        lists: by name, the lines of each list file, which `list_file` names.
        mask_folder: the folder of instance masks, None without one.
        defects: what was found wrong in the layout.
    """

    def __init__(
        self, tree: Tree, xml: list[str] | None = None, annotations: str | None = None, images: str | None = None
    ) -> None:
        self.tree, self.defects = tree, list[Defect]()
        if xml is None:
            xml = self._nearest(self._below(annotations, ".xml", "annotations"), annotations)
        self.base = common_base(xml)
        kept = [name for name in self._below(images, None, "images") if suffix(name) in (*EXTENSIONS, *UNREAD)]
        self.pairs = pair(kept, xml)
        self.picture = {label: pictures[0] for label, pictures in self.pairs.pictures.items()}
        self.others = {label: pictures[1:] for label, pictures in self.pairs.pictures.items()}
        self._ask_the_files(kept)
        self.defects += tree.remarks(labelled=set(self.picture.values()))
        self.xml = [name for name in xml if name not in self._foreign]
        for picture, how in self.pairs.loosely.items():
            label = self.pairs.label[picture]
            self.defects.append(Defect(label, "file", f"'{picture}' is its picture: {how}", "it is read", "note"))
        for label, other in self.pairs.spare.items():
            problem = f"'{other}' is read for the same picture"
            self.defects.append(Defect(label, "file", problem, "it is not read; keep one of them"))
        self.lists, self.list_file = self._find_lists()
        self.mask_folder = tree.folder("SegmentationObject", (self.base,))

    @staticmethod
    def candidates(tree: Tree) -> list[list[str]]:
        """The XML files of each data set below the root: those of a devkit's folder, and those that lie in none."""
        groups: dict[str, list[str]] = {}
        for name in tree.with_suffix(".xml"):
            inside = any(loose(part) in LABELS for part in name.split("/")[:-1])
            groups.setdefault(base_of(name) if inside else "\0", []).append(name)
        return list(groups.values())

    def _below(self, folder: str | None, ending: str | None, argument: str) -> list[str]:
        if folder is None:
            return self.tree.files if ending is None else self.tree.with_suffix(ending)
        path = self.tree.locate(folder.rstrip("/"), argument)
        if not path.is_dir():
            there = [p.name for p in self.tree.root.iterdir() if p.is_dir()]
            raise DataError(f"{self.tree.root}: there is no folder '{folder}'{nearest(folder, there)}")
        name = path.relative_to(self.tree.root).as_posix()
        return [f for f in self.tree.below("" if name == "." else name) if ending is None or suffix(f) == ending]

    def _nearest(self, xml: list[str], annotations: str | None) -> list[str]:
        if not xml:
            raise DataError(
                f"{self.tree.root}: there is no XML file in or below it; pass the folder of the VOC data set"
            )
        if annotations is not None:
            return xml
        wanted = set(xml)
        groups = [group for names in self.candidates(self.tree) if (group := [n for n in names if n in wanted])]
        groups.sort(key=lambda group: (common_base(group).count("/") + bool(common_base(group)), group[0].count("/")))
        for group in groups[1:]:
            place = os.path.dirname(group[0])
            problem = f"{len(group)} XML files lie here too but '{os.path.dirname(groups[0][0])}' is read"
            self.defects.append(
                Defect(place, "folder", problem, "pass annotations= or its folder as root to read them", "note")
            )
        return groups[0]

    def _ask_the_files(self, pictures: list[str]) -> None:
        """What XML files without a picture of their name say: another name, or that they are no VOC at all."""
        self._foreign: set[str] = set()
        free: dict[str, list[str]] = {}
        for name in pictures:
            if name not in self.pairs.label:
                free.setdefault(_own_name(name), []).append(name)
        for label in self.pairs.alone:
            try:
                root = read_xml(self.tree.root / label)
            except DataError:
                continue  # the reader reports it
            if root.tag != "annotation":
                problem = "it is CVAT's own XML" if root.tag == "annotations" else f"its root element is <{root.tag}>"
                fix = "it is not read; export the annotations as Pascal VOC or COCO"
                self.defects.append(Defect(label, "file", problem, fix, "broken"))
                self._foreign.add(label)
                continue
            tag = next((tag for tag in ("filename", "path") if cleaned(root.findtext(tag) or "")), "filename")
            said = "/".join(cleaned(root.findtext(tag) or "")[-1:])
            found = free.get(_own_name(said), [])
            if exact := [name for name in found if loose(os.path.basename(name)) == loose(said)]:
                found = exact
            if len(found) == 1:
                del free[_own_name(said)]
                self.picture[label], self.others[label] = found[0], []
                problem = f"no picture has its name, but <{tag}> says '{short(said)}'"
                fix = "that picture is read" if exact else f"'{os.path.basename(found[0])}' is read"
                self.defects.append(Defect(label, tag, problem, fix, "note"))

    def _find_lists(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """The list files of this data set, from the most official folder that has some."""
        ranked: dict[int, list[str]] = {}
        for name in self.tree.below(self.base):
            if (rank := list_rank(name, self.base)) is not None and (rank < LISTS[""] or self._names_any(name)):
                ranked.setdefault(rank, []).append(name)
        files = {PurePosixPath(name).stem: name for name in ranked[min(ranked)]} if ranked else {}
        lists: dict[str, list[str]] = {}
        places: dict[str, str] = {}
        for name, file in files.items():
            prefix, _, split = name.rpartition("_")
            if prefix and split in files:  # cat_train stands beside train
                continue
            plain = split if prefix and role_of(split) else name  # cat_train and dog_train list the same pictures
            lines = self.lines(file)
            if plain != name and all(FLAG.search(line.rstrip()) for line in lines):
                lines = [FLAG.sub("", line.rstrip()) for line in lines]
            if plain not in lists or plain == name:
                lists[plain], places[plain] = lines, file
            else:
                lists[plain] = list(dict.fromkeys((*lists[plain], *lines)))
        return lists, places

    def _names_any(self, file: str) -> bool:
        """Whether a line of a text file, which may be notes, names a picture or an XML file."""
        table, lines = self._names(), (self.tree.root / file).read_text("utf-8-sig", errors="replace").splitlines()
        return any(_look_up(FLAG.sub("", line).strip(), table) for line in lines if line.strip())

    def lines(self, file: str) -> list[str]:
        """The lines of a list file."""
        try:
            return (self.tree.root / file).read_text("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            path = self.tree.root / file
            raise DataError(f"{path}: the split's list is not readable as UTF-8 text; write one stem a line") from error

    def splits(self) -> dict[str, int]:
        """The pictures in each split; without lists and folders of splits there is one, named `""`."""
        if self.lists:
            return {name: len({line.strip() for line in lines if line.strip()}) for name, lines in self.lists.items()}
        return {name: len(xml) for name, xml in self._by_folder().items()}

    def _by_folder(self) -> dict[str, list[str]]:
        folders: dict[str, list[str]] = {}
        for name in self.xml:
            folders.setdefault(role_of_path(name) or "", []).append(name)
        return folders

    def entries(self, split: str) -> tuple[list[Entry], list[Defect]]:
        """The pictures of a split, each once, in the order of its list.

        Args:
            split: a list's name, the word for it (`val` for `valid`), a file below the root, or `""` for all.

        Raises:
            DataError: there is no such split.
        """
        if not split:
            return [Entry(name) for name in self.xml], []
        file = self._list_of(split)
        if file is None:
            folders = self._by_folder()
            wanted = split if split in folders else role_of(split) or ""
            if wanted in folders and (wanted or not self.lists):
                return [Entry(name) for name in folders[wanted]], []
            there = [name for name in (*self.lists, *folders) if name]
            path = self.tree.root / self.base / "ImageSets/Main" / f"{split}.txt"
            hint = nearest(split, there) or "; there are no lists: leave data.train_split and data.val_split out"
            raise DataError(f"{path}: the split's list is missing{hint}")
        return self._listed(file)

    def _list_of(self, split: str) -> str | None:
        """The list file of a split."""
        if split in self.list_file:
            return self.list_file[split]
        inner = f"ImageSets/{split}.txt" if "/" in split else f"ImageSets/Main/{split}.txt"
        self.tree.locate(inner, "split")
        found = self.tree.file(inner, (self.base,)) or (
            self.tree.file(split, (self.base, "")) if split.endswith(".txt") else None
        )
        same = [name for name in self.list_file if role_of(name) and role_of(name) == role_of(split)]
        return found or (self.list_file[same[0]] if len(same) == 1 and same[0] not in ("trainval",) else None)

    def _listed(self, file: str) -> tuple[list[Entry], list[Defect]]:
        lines = [(number, line.strip()) for number, line in enumerate(self._merged(file), 1) if line.strip()]
        table = self._names()
        plain = {line: FLAG.sub("", line).strip() for _, line in lines}
        # A stem may itself end in ` 1`: the reading under which more pictures are there is right.
        whole, bare = ({_look_up(name, table) for name in names} for names in (plain.keys(), plain.values()))
        flagged = len(bare - {None}) > len(whole - {None}) or whole == {None}
        defects: list[Defect] = []
        entries: dict[str, Entry] = {}
        for number, line in lines:
            stem = plain[line] if flagged else line
            xml = _look_up(stem, table)
            if xml is None:
                self._refuse(stem)
            key = xml or stem
            if key in entries:
                problem, fix = f"'{short(stem)}' is listed twice", "it is read once; delete the copy"
                defects.append(Defect(file, f"line {number}", problem, fix))
            else:
                entries[key] = Entry(xml, _without_kind(stem))
        return list(entries.values()), defects

    def _refuse(self, stem: str) -> None:
        """Raise where a line leads out of the root; a path of another machine is one whose own name is not here."""
        written = stem.replace("\\", "/")
        if not PurePosixPath(written).is_absolute() and written[1:2] != ":":
            self.tree.locate(_without_kind(written), "split")

    def _merged(self, file: str) -> list[str]:
        name = next((name for name, place in self.list_file.items() if place == file), None)
        return self.lists[name] if name is not None else self.lines(file)

    def _names(self) -> dict[str, str | None]:
        """XML files by every tail of their path and of their picture's; None where several files share one."""
        table: dict[str, str | None] = {}
        for xml in self.xml:
            for name in {xml, self.picture.get(xml, xml)}:
                parts = _without_kind(name).split("/")
                for start in range(len(parts)):
                    for tail in {"/".join(parts[start:]), loose("/".join(parts[start:]))}:
                        table[tail] = xml if table.get(tail, xml) == xml else None
        return table


def list_rank(name: str, base: str) -> int | None:
    """How official a list file is to the data set of a folder, 0 the most; None where it is no list of it."""
    folder = loose(os.path.dirname(name[len(base) :].lstrip("/")))
    named = folder.startswith("imagesets") or role_of(PurePosixPath(name).stem)
    return LISTS.get(folder) if suffix(name) == ".txt" and named else None


def common_base(names: Iterable[str]) -> str:
    """The folder of the data set that these files belong to."""
    bases = {base_of(name) for name in names}
    return os.path.commonpath([f"/{base}" for base in bases])[1:] if bases else ""


def _look_up(line: str, table: dict[str, str | None]) -> str | None:
    """The XML file that a line means: the longest tail of the path on it that is one file's."""
    parts = _without_kind("/".join(cleaned(line))).split("/")
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        if found := table.get(tail) or table.get(loose(tail)):
            return found
    return None


def _without_kind(name: str) -> str:
    """A name without the extension of a picture or an XML file, or both."""
    for _ in range(2):
        if suffix(name) in (*EXTENSIONS, ".xml"):
            name = os.path.splitext(name)[0]
    return name


def _own_name(path: str) -> str:
    """The file's name without its folders and the extension of a picture, however it is spelt."""
    return loose(_without_kind(os.path.basename(path)))


def read_xml(path: Path) -> Element:
    """The root element of an XML file; its tags have lost their namespace.

    Raises:
        DataError: it is not readable.
    """
    try:
        content: bytes | str = path.read_bytes().lstrip()
        if isinstance(content, bytes) and b"\0" not in content[:4]:  # not UTF-16, which the parser knows itself
            said = ENCODING.match(content)
            content = content.decode(said[1].decode() if said else "utf-8-sig")
        root: Element = fromstring(content)
    # defusedxml's own refusals (entities, external references) are ValueErrors
    except (OSError, ParseError, ValueError, LookupError) as error:
        raise DataError(f"not readable as XML ({type(error).__name__}: {str(error)[:80]})") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root
