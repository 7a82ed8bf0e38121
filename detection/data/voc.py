"""Reads Pascal VOC XML (Everingham et al. 2010, devkit section 5), in the devkit's layout or in plain folders.

Coordinates are 1-based and inclusive: `[xmin, xmax]` covers the pixels from xmin to xmax, which is `[xmin - 1, xmax]`
in the 0-based continuous pixels used here. A box with `xmax <= xmin` or `ymax <= ymin` as written is a slip of the hand
and left out. The stem of the XML file decides which image it belongs to: `<filename>`, `<folder>` and `<path>` are what
tools forget to update.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError  # only the types: parsing is defusedxml's

import numpy as np
from defusedxml.ElementTree import fromstring
from PIL import Image

from detection.data import rle
from detection.data.checks import Folder, Objects, checked_size, choose_classes, finish_index, nearest, short
from detection.data.images import EXTENSIONS
from detection.data.records import DataError, Defect, Index, Record, Severity

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOID = 255  # SegmentationObject pixels of nobody: outlines, and objects too small to mark


def read_voc(
    root: Path,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    masks: bool = False,
    annotations: str | None = None,
    images: str | None = None,
) -> Index:
    """Read a folder of VOC XML files.

    Every object left out and every value repaired is a defect of the index. Images without objects are kept; image ids
    are positions in the split's list, counted from 0.

    Args:
        root: folder of the data set (the one that holds `Annotations`), which no image may leave.
        split: a list in `ImageSets/Main`, or in `ImageSets` as `"Segmentation/train"`; None reads every XML file.
        classes: names of the classes to read, in the order of their labels. None takes them from the data: the 20 of
            VOC in their official order where no other name occurs, else all names in alphabetical order.
        masks: read instance masks from `SegmentationObject`, where 255 is void; objects without one have None.
        annotations, images: folders relative to `root`; None finds them.

    Raises:
        DataError: a folder, the split or a class is absent, a path leaves the root, or no image is left.
    """
    folder = Folder(Path(root))
    reader = _Reader(folder, annotations, images, masks)
    stems = reader.split(split) if split is not None else reader.stems()
    parsed = [(position, found) for position, stem in enumerate(stems) if (found := reader.parse(stem)) is not None]
    counts = Counter(name for _, found in parsed for name, _ in found.objects)
    source = f"{folder.root}" + (f" split '{split}'" if split is not None else "")
    chosen = _class_names(reader, source, stems, counts, classes) if parsed else ()
    records = [reader.record(position, found, chosen) for position, found in parsed]
    index = Index(folder.root, chosen, tuple(range(1, len(chosen) + 1)), records, reader.defects)
    return finish_index(index, source)


@dataclass(slots=True)
class _Parsed:
    """One XML file whose image is there; `objects` are `(class name, element)`, None where the name is missing."""

    file: str
    image: str
    height: int
    width: int
    objects: list[tuple[str, Element]]


def _class_names(
    reader: _Reader, source: str, stems: Sequence[str], counts: Counter[str], wanted: Any
) -> tuple[str, ...]:
    # Names come from every XML file, not from the split alone: all splits of a data set must agree on the labels.
    names = sorted(set(counts) | reader.names_beside(stems))
    if wanted is None and names and set(names) <= set(VOC_CLASSES):
        names = list(VOC_CLASSES)
    chosen = choose_classes(names, wanted, source)
    for name in sorted(counts.keys() - set(chosen)):
        reader.report(source, f"class '{name}'", f"{counts[name]} objects of it are not read", "not in classes", "note")
    return chosen


class _Reader:
    """The folders of one data set and what was found wrong in them."""

    def __init__(self, folder: Folder, annotations: str | None, images: str | None, masks: bool) -> None:
        self.folder, self.defects = folder, list[Defect]()
        self.annotations = self._xml_folder() if annotations is None else self._given(annotations)
        self.images = self._image_folder() if images is None else self._given(images)
        self.masks = self._given("SegmentationObject") if masks else None
        self.files: dict[str, list[str]] = {}  # image files by stem, the preferred extension first
        for name in sorted(os.listdir(self.images), key=lambda n: (_rank(n), n)):
            if _rank(name) < len(EXTENSIONS):
                self.files.setdefault(Path(name).stem, []).append(name)

    def report(self, file: str, record: str, problem: str, fix: str, severity: Severity = "repairable") -> None:
        self.defects.append(Defect(file, record, short(problem), fix, severity))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder.root).as_posix()

    def _given(self, name: str) -> Path:
        path = self.folder.locate(name, "folder")
        if not path.is_dir():
            there = [p.name for p in self.folder.root.iterdir() if p.is_dir()]
            raise DataError(f"{self.folder.root}: there is no folder '{name}'{nearest(name, there)}")
        return path

    def _xml_folder(self) -> Path:
        """The folder nearest to the root that holds XML files."""
        found: list[tuple[int, Path]] = []
        for place, folders, files in os.walk(self.folder.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if any(name.lower().endswith(".xml") for name in files):
                path = Path(place)
                found.append((len(path.relative_to(self.folder.root).parts), path))
        found.sort()
        if not found:
            raise DataError(
                f"{self.folder.root}: there is no XML file in or below it; pass the folder of the VOC data set"
            )
        (depth, best), rest = found[0], found[1:]
        if rest and rest[0][0] == depth and best.name != "Annotations":
            both = f"'{self._relative(best)}' and '{self._relative(rest[0][1])}'"
            raise DataError(f"{self.folder.root}: XML files lie in {both}; say which with annotations=")
        for _, other in rest:
            problem = f"XML files lie here too but '{self._relative(best)}' is read"
            self.report(self._relative(other), "folder", problem, "pass annotations= to read them instead", "note")
        return best

    def _image_folder(self) -> Path:
        beside = self.annotations.parent
        places = [base / name for base in (self.folder.root, beside) for name in ("JPEGImages", "images", "Images")]
        for path in (*places, self.annotations, self.folder.root):
            if path.is_dir() and any(_rank(name) < len(EXTENSIONS) for name in os.listdir(path)):
                return self.folder.locate(self._relative(path), "folder of images")
        raise DataError(
            f"{self.folder.root}: there is no folder of images (JPEGImages, images); say where with images="
        )

    def stems(self) -> list[str]:
        """The stem of every XML file in the annotation folder."""
        return sorted(Path(name).stem for name in os.listdir(self.annotations) if name.lower().endswith(".xml"))

    def split(self, split: str) -> list[str]:
        """The stems that a split lists, each once and in its order."""
        name = f"ImageSets/{split if '/' in split else f'Main/{split}'}.txt"
        path = self.folder.locate(name, "split")
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except FileNotFoundError as error:
            there = [p.stem for p in path.parent.glob("*.txt")] if path.parent.is_dir() else []
            hint = nearest(split, there) or "; there are no lists: leave split out to read every XML file"
            raise DataError(f"{path}: the split's list is missing{hint}") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: the split's list is not readable as UTF-8 text; write one stem a line") from error
        stems: dict[str, None] = {}
        for number, stem in enumerate(map(_stem, lines), 1):
            if stem in stems:
                self.report(name, f"line {number}", f"'{stem}' is listed twice", "it is read once; delete the copy")
            elif stem:
                stems[stem] = None
        return list(stems)

    def parse(self, stem: str) -> _Parsed | None:
        """The XML file of a stem with its image, or None where either can't be used."""
        path = self.folder.locate(f"{self._relative(self.annotations)}/{stem}.xml", "split")
        file = self._relative(path)
        try:
            tree: Element = fromstring(path.read_bytes())
        except FileNotFoundError:
            self.report(file, "file", "the XML file is missing", "the image is left out; restore the file", "broken")
            return None
        # defusedxml's own refusals (entities, external references) are ValueErrors
        except (OSError, ParseError, ValueError, LookupError) as error:
            problem = f"not readable as XML ({type(error).__name__}: {str(error)[:80]})"
            self.report(file, "file", problem, "the image is left out; repair the file", "broken")
            return None
        if tree.tag != "annotation":
            problem = f"the root element is <{str(tree.tag)[:40]}>, not <annotation>"
            self.report(file, "file", problem, "the image is left out; export it as VOC XML", "broken")
            return None
        name = self._image_of(stem, file, tree)
        if name is None:
            fix = f"it and its {len(tree.findall('object'))} objects are left out; restore the image or delete the XML"
            self.report(file, "file", "its image is missing", fix, "broken")
            return None
        self._remarks(file, tree)
        return self._with_size(file, name, tree)

    def _image_of(self, stem: str, file: str, tree: Element) -> str | None:
        """Name of the image file with this stem; the one that <filename> says where there are several."""
        said = (tree.findtext("filename") or "").strip()
        files = self.files.get(stem, [])
        if files and said not in files:
            fix = f"'{files[0]}' is read, by the XML file's name; correct the tag"
            problem = f"<filename> says '{said[:80]}'" if said else "<filename> is missing or empty"
            self.report(file, "filename", problem, fix, "note")
        if len(files) > 1:
            read = said if said in files else files[0]
            others = ", ".join(name for name in files if name != read)
            self.report(file, "filename", f"{others} has the same stem", f"'{read}' is read; keep one of them", "note")
            return read
        return files[0] if files else None

    def _remarks(self, file: str, tree: Element) -> None:
        """Notes on what is wrong but never used."""
        said = (tree.findtext("path") or "").strip()
        if said.startswith(("/", "\\", "..")) or said[1:2] == ":":
            self.report(file, "path", f"<path> '{said[:80]}' leads elsewhere", "it is not used; remove it", "note")
        if tree.find("folder") is not None and not (tree.findtext("folder") or "").strip():
            self.report(file, "folder", "<folder> is empty", "it is not used", "note")
        if tree.find("size/depth") is not None and not (tree.findtext("size/depth") or "").strip():
            self.report(file, "size", "<depth> is empty", "it is not used: images are read as RGB", "note")
        if bare := sum(item.find("difficult") is None for item in tree.findall("object")):
            self.report(file, "objects", f"{bare} have no <difficult>", "they count as not difficult", "note")

    def _with_size(self, file: str, name: str, tree: Element) -> _Parsed | None:
        width, height = _float(tree.findtext("size/width")), _float(tree.findtext("size/height"))
        whole = width is not None and height is not None and 1 <= width < 1e9 and 1 <= height < 1e9
        stated = (int(height), int(width)) if whole and width is not None and height is not None else None
        path = self.folder.locate(self._relative(self.images / name), file)
        try:
            height_px, width_px = checked_size(path, stated, file, "size", self.defects)
        except DataError as error:
            problem = str(error).removeprefix(f"{path}: ").split(";")[0]
            self.report(self._relative(path), "image", problem, "the image is left out; restore the file", "broken")
            return None
        objects = []
        for position, item in enumerate(tree.findall("object")):
            label = (item.findtext("name") or "").strip()
            if label:
                objects.append((label, item))
            else:
                self.report(file, f"object {position}", "it has no name", "the object is left out; name it")
        return _Parsed(file, self._relative(path), height_px, width_px, objects)

    def names_beside(self, stems: Sequence[str]) -> set[str]:
        """The class names in the XML files of other splits."""
        names: set[str] = set()
        for name in sorted(set(os.listdir(self.annotations)) - {f"{stem}.xml" for stem in stems}):
            if name.lower().endswith(".xml"):
                try:
                    tree = fromstring((self.annotations / name).read_bytes())
                except (OSError, ParseError, ValueError, LookupError):
                    continue  # parse() reports the file where it is part of the split
                names |= {(item.findtext("name") or "").strip() for item in tree.findall("object")}
        return names - {""}

    def record(self, position: int, parsed: _Parsed, classes: tuple[str, ...]) -> Record:
        """The record of one parsed file."""
        objects = Objects(parsed.file, "file", parsed.width, parsed.height, self.defects)
        instances = self._instances(parsed) if self.masks else None
        for number, (name, item) in enumerate(parsed.objects):
            what = f"object {number} ({name[:40]})"
            if name not in classes:
                continue
            box = _bndbox(item)
            if isinstance(box, str):
                objects.report(what, box, "the box is left out; delete or redraw it")
                continue
            flaw, box = _flaw(box), [box[0] - 1, box[1] - 1, *box[2:]]
            if flaw is not None:
                objects.written.append(box)
                objects.report(what, flaw, "the box is left out; delete or redraw it")
                continue
            flag = (item.findtext("difficult") or "0").strip() or "0"
            if flag not in ("0", "1"):
                objects.report(what, f"difficult is '{flag[:20]}'", "it counts as not difficult; use 0 or 1")
            segment = None if instances is None else self._mask(objects, what, instances == number + 1, box)
            objects.add(what, box, classes.index(name) + 1, number, difficult=flag == "1", segment=segment)
        return objects.finish(position, parsed.image, self.masks is not None)

    def _instances(self, parsed: _Parsed) -> Any:
        """`(H, W)` instance numbers, 0 for background, or None where the image has no SegmentationObject."""
        assert self.masks is not None
        name = f"{self._relative(self.masks)}/{Path(parsed.file).stem}.png"
        path = self.folder.locate(name, parsed.file)
        if not path.is_file():
            return None
        try:
            with Image.open(path) as image:
                numbers = np.array(image) if image.mode in ("P", "L") else None
        except Exception as error:  # damaged files make Pillow raise a dozen types
            self.report(name, "image", f"not readable ({type(error).__name__})", "its masks are left out; replace it")
            return None
        if numbers is None or numbers.shape != (parsed.height, parsed.width):
            problem = "not a palette image of the image's size"
            self.report(name, "image", problem, "its masks are left out; save instance numbers as a palette PNG")
            return None
        return np.where(numbers == VOID, 0, numbers)

    def _mask(self, objects: Objects, what: str, mask: Any, box: list[float]) -> dict[str, Any] | None:
        """The mask as RLE where it is the box's: instance numbers follow the order of the objects."""
        segment = rle.encode(mask)
        x1, y1, x2, y2 = rle.box(rle.decompress(segment["counts"]), mask.shape[0])
        inter = max(0.0, min(x2, box[2]) - max(x1, box[0])) * max(0.0, min(y2, box[3]) - max(y1, box[1]))
        union = (x2 - x1) * (y2 - y1) + (box[2] - box[0]) * (box[3] - box[1]) - inter
        if inter * 2 < union:
            problem = (
                "its instance in SegmentationObject lies elsewhere" if x2 else "no pixel of SegmentationObject is its"
            )
            objects.report(what, problem, "the object has no mask; number the instances in the XML's order")
            return None
        return segment


def split_lists(root: Path) -> dict[str, list[str]]:
    """The stems in each list of `ImageSets/Main`, as often as they stand there; lists of one class are left out."""
    folder = root / "ImageSets" / "Main"
    files = {path.stem: path for path in sorted(folder.glob("*.txt"))} if folder.is_dir() else {}
    lists = {}
    for name, path in files.items():
        prefix, _, split = name.rpartition("_")
        if not (prefix and split in files):  # cat_train stands beside train
            lines = path.read_text("utf-8-sig", errors="replace").splitlines()
            lists[name] = [stem for line in lines if (stem := _stem(line))]
    return lists


def _stem(line: str) -> str:
    """The stem on a line of a list; those of one class add 1, 0 or -1: every image listed belongs to the split."""
    head, _, flag = line.strip().rpartition(" ")
    return head.strip() if flag in ("1", "0", "-1") and head else line.strip()


def _rank(name: str) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return EXTENSIONS.index(suffix) if suffix in EXTENSIONS else len(EXTENSIONS)


def _float(text: str | None) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e15 else None


def _bndbox(item: Element) -> list[float] | str:
    """`[xmin, ymin, xmax, ymax]` of an object's bndbox (not of its parts'), or what is missing in it."""
    bndbox = item.find("bndbox")
    if bndbox is None:
        return "it has no bndbox"
    corners: list[float] = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        value = _float(bndbox.findtext(tag))
        if value is None:
            return f"{tag} is missing or not a finite number"
        corners.append(value)
    return corners


def _flaw(corners: list[float]) -> str | None:
    """What is wrong with corners as written where one does not come after the other."""
    x1, y1, x2, y2 = corners
    if x2 > x1 and y2 > y1:
        return None
    side, low, high = ("width", x1, x2) if x2 <= x1 else ("height", y1, y2)
    return f"box has {'zero' if low == high else 'negative'} {side} ({low:g} to {high:g})"
