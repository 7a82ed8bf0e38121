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
from xml.etree.ElementTree import Element  # only the type: parsing is defusedxml's

import numpy as np
from PIL import Image

from detection.data import rle
from detection.data.checks import Objects, checked_size, choose_classes, finish_index, short
from detection.data.records import DataError, Defect, Index, Record, Severity
from detection.data.tree import Tree
from detection.data.voc_layout import Entry, VocLayout, read_xml

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
    layout = VocLayout(Tree(Path(root)), annotations=annotations, images=images)
    return read_layout(layout, split or "", classes, masks)


def read_layout(layout: VocLayout, split: str, classes: Sequence[str] | None = None, masks: bool = False) -> Index:
    """Read one split of a data set that was found; see `read_voc`.

    Args:
        layout: where its files are.
        split: `""` for every XML file.
        classes, masks: as for `read_voc`.
    """
    reader = _Reader(layout, masks)
    entries, defects = layout.entries(split)
    reader.defects += defects
    parsed = [(position, found) for position, entry in enumerate(entries) if (found := reader.parse(entry)) is not None]
    counts = Counter(name for _, found in parsed for name, _ in found.objects)
    source = f"{layout.tree.root}" + (f" split '{split}'" if split else "")
    used = {entry.xml for entry in entries}
    chosen = _class_names(reader, source, used, counts, classes) if parsed else ()
    records = [reader.record(position, found, chosen) for position, found in parsed]
    index = Index(layout.tree.root, chosen, tuple(range(1, len(chosen) + 1)), records, reader.defects)
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
    reader: _Reader, source: str, used: set[str | None], counts: Counter[str], wanted: Any
) -> tuple[str, ...]:
    # Names come from every XML file, not from the split alone: all splits of a data set must agree on the labels.
    names = sorted(set(counts) | reader.names_beside(used))
    if wanted is None and names and set(names) <= set(VOC_CLASSES):
        names = list(VOC_CLASSES)
    chosen = choose_classes(names, wanted, source)
    for name in sorted(counts.keys() - set(chosen)):
        reader.report(source, f"class '{name}'", f"{counts[name]} objects of it are not read", "not in classes", "note")
    return chosen


class _Reader:
    """The folders of one data set and what was found wrong in them."""

    def __init__(self, layout: VocLayout, masks: bool) -> None:
        self.layout, self.tree, self.defects = layout, layout.tree, list(layout.defects)
        self.masks = layout.mask_folder if masks else None
        if masks and self.masks is None:
            raise DataError(
                f"{layout.tree.root / layout.base}: there is no folder 'SegmentationObject' with masks; "
                "set data.masks to false, or add it"
            )

    def report(self, file: str, record: str, problem: str, fix: str, severity: Severity = "repairable") -> None:
        self.defects.append(Defect(file, record, short(problem), fix, severity))

    def parse(self, entry: Entry) -> _Parsed | None:
        """The XML file of an entry with its image, or None where either can't be used."""
        if entry.xml is None:
            folder = os.path.dirname(self.layout.xml[0]) if self.layout.xml else ""
            file = f"{folder}/{entry.line}.xml".lstrip("/")
            self.report(file, "file", "the XML file is missing", "the image is left out; restore the file", "broken")
            return None
        file = entry.xml
        try:
            tree = read_xml(self.tree.locate(file, "split"))
        except DataError as error:
            self.report(file, "file", str(error), "the image is left out; repair the file", "broken")
            return None
        if tree.tag != "annotation":
            problem = f"the root element is <{str(tree.tag)[:40]}>, not <annotation>"
            self.report(file, "file", problem, "the image is left out; export it as VOC XML", "broken")
            return None
        name = self._image_of(file, tree)
        if name is None:
            fix = f"it and its {len(_objects_of(tree))} objects are left out; restore the image or delete the XML"
            self.report(file, "file", "its image is missing", fix, "broken")
            return None
        self._remarks(file, tree)
        return self._with_size(file, name, tree)

    def _image_of(self, file: str, tree: Element) -> str | None:
        """The image file of an XML file; the one that <filename> says where several differ in extension."""
        said = (tree.findtext("filename") or "").strip()
        if file not in self.layout.picture:
            self._refuse_link(file)
            return None
        files = [self.layout.picture[file], *self.layout.others[file]]
        names = {os.path.basename(name): name for name in files}
        if said not in names:
            fix = f"'{os.path.basename(files[0])}' is read, by the XML file's name; correct the tag"
            problem = f"<filename> says '{said[:80]}'" if said else "<filename> is missing or empty"
            self.report(file, "filename", problem, fix, "note")
        read = names.get(said, files[0])
        if len(files) > 1:
            others = ", ".join(os.path.basename(name) for name in files if name != read)
            fix = f"'{os.path.basename(read)}' is read; keep one of them"
            self.report(file, "filename", f"{others} has the same stem", fix, "note")
        return read

    def _refuse_link(self, file: str) -> None:
        """Raise where the image of an XML file is a link that leads out of the root."""
        stem = Path(file).stem
        for name in self.tree.outside:
            if Path(name).stem == stem:
                self.tree.locate(name, file)

    def _remarks(self, file: str, tree: Element) -> None:
        """Notes on what is wrong but never used."""
        said = (tree.findtext("path") or "").strip()
        if said.startswith(("/", "\\", "..")) or said[1:2] == ":":
            self.report(file, "path", f"<path> '{said[:80]}' leads elsewhere", "it is not used; remove it", "note")
        if tree.find("folder") is not None and not (tree.findtext("folder") or "").strip():
            self.report(file, "folder", "<folder> is empty", "it is not used", "note")
        if tree.find("size/depth") is not None and not (tree.findtext("size/depth") or "").strip():
            self.report(file, "size", "<depth> is empty", "it is not used: images are read as RGB", "note")
        if bare := sum(item.find("difficult") is None for item in _objects_of(tree)):
            self.report(file, "objects", f"{bare} have no <difficult>", "they count as not difficult", "note")

    def _with_size(self, file: str, name: str, tree: Element) -> _Parsed | None:
        width, height = _float(tree.findtext("size/width")), _float(tree.findtext("size/height"))
        whole = width is not None and height is not None and 1 <= width < 1e9 and 1 <= height < 1e9
        stated = (int(height), int(width)) if whole and width is not None and height is not None else None
        path = self.tree.locate(name, file)
        try:
            height_px, width_px = checked_size(path, stated, file, "size", self.defects)
        except DataError as error:
            problem = str(error).removeprefix(f"{path}: ").split(";")[0]
            self.report(name, "image", problem, "the image is left out; restore the file", "broken")
            return None
        objects = []
        for position, item in enumerate(_objects_of(tree)):
            label = (item.findtext("name") or "").strip()
            if label:
                objects.append((label, item))
            else:
                self.report(file, f"object {position}", "it has no name", "the object is left out; name it")
        return _Parsed(file, name, height_px, width_px, objects)

    def names_beside(self, used: set[str | None]) -> set[str]:
        """The class names in the XML files of other splits."""
        names: set[str] = set()
        for file in self.layout.xml:
            if file not in used:
                try:
                    tree = read_xml(self.tree.root / file)
                except DataError:
                    continue  # parse() reports the file where it is part of the split
                names |= {(item.findtext("name") or "").strip() for item in _objects_of(tree)}
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
            if item.find("bndbox") is None and (around := _around(item)) is not None:
                objects.report(what, "it has no bndbox", "the box around its polygon is used; add its bndbox")
                box = around
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
        name = self.tree.file(f"{Path(parsed.file).stem}.png", (self.masks,))
        if name is None:
            return None
        try:
            with Image.open(self.tree.root / name) as image:
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


def _objects_of(tree: Element) -> list[Element]:
    """The objects, also where a tool has put them into an element of their own."""
    return list(tree.iter("object"))


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
        return "it has no bndbox" + (", but a robndbox, which is turned" if item.find("robndbox") is not None else "")
    corners: list[float] = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        value = _float(bndbox.findtext(tag))
        if value is None:
            return f"{tag} is missing or not a finite number"
        corners.append(value)
    return corners


def _around(item: Element) -> list[float] | None:
    """`[xmin, ymin, xmax, ymax]` of the points of an object's polygon, None without one."""
    polygon = item.find("polygon")
    texts = {} if polygon is None else {point: point.text for point in polygon.iter() if point.tag[:1] in ("x", "y")}
    values = {axis: [_float(text) for point, text in texts.items() if point.tag[0] == axis] for axis in "xy"}
    xs, ys = ([value for value in numbers if value is not None] for numbers in values.values())
    if len(xs) < 3 or len(xs) != len(ys) or len(xs) + len(ys) < len(texts):
        return None
    return [min(xs), min(ys), max(xs), max(ys)]


def _flaw(corners: list[float]) -> str | None:
    """What is wrong with corners as written where one does not come after the other."""
    x1, y1, x2, y2 = corners
    if x2 > x1 and y2 > y1:
        return None
    side, low, high = ("width", x1, x2) if x2 <= x1 else ("height", y1, y2)
    return f"box has {'zero' if low == high else 'negative'} {side} ({low:g} to {high:g})"
