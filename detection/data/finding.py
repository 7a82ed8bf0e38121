"""What data set lies below a folder: its format, its layout and its splits, found without being told.

The formats know their own layouts (`coco_layout`, `voc_layout`, `yolo_layout`); here they are asked, and where several
readings are possible, one is chosen by rules that are said, or none where the folder holds several data sets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from detection.data import coco, coco_layout, voc, yolo
from detection.data.checks import nearest
from detection.data.federated import image_name
from detection.data.records import DataError, Index
from detection.data.tree import Tree, base_of, role_of
from detection.data.voc_layout import VocLayout, common_base, list_rank
from detection.data.yolo_layout import YoloLayout

Format: TypeAlias = Literal["coco", "voc", "yolo"]
Stage: TypeAlias = Literal["train", "val", "test"]
Read: TypeAlias = Callable[..., Index]  # of the classes wanted, with or without masks, and key points

TITLES: dict[str, str] = {"coco": "COCO", "voc": "VOC", "yolo": "YOLO"}
COUNTED = 20_000_000  # bytes of a COCO file up to which its images are counted before it is read


@dataclass(frozen=True, slots=True)
class Split:
    """One split of a data set.

    Attributes:
        name: as its list, folder, key or file calls it; `""` where nothing names one.
        count: its images, None where counting would take long.
        read: reads its annotations.
    """

    name: str
    count: int | None
    read: Read


@dataclass(frozen=True, slots=True)
class Layout:
    """A data set that was found.

    Attributes:
        root: the resolved folder that was given.
        format: how the annotations are written.
        how: the layout, in words.
        base: folder of the data set, relative to the root.
        splits: by name.
        pictures: some of its pictures, to tell whether another reading is of the same.
        official: a file describes it; for the choice between several.
        masks: whether it may hold instance masks.
        keypoints: whether it may hold key points.
        others: further readings, in words.
    """

    root: Path
    format: Format
    how: str
    base: str
    splits: dict[str, Split]
    pictures: frozenset[str] = field(repr=False)
    official: bool = False
    masks: bool = False
    keypoints: bool = False
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        counted = [
            f"{split.name or 'all'}" + (f" {split.count}" if split.count is not None else "")
            for split in self.splits.values()
        ]
        return f"{TITLES[self.format]}, {self.how}: {', '.join(counted)}"

    def stage(self, stage: Stage) -> Split | None:
        """The split that a stage takes where none is named; None where there is none.

        Training takes `train`, else `trainval`, else the only split whose name says no other use. Testing takes `val`
        where there is no `test`.
        """
        roles: dict[str | None, list[Split]] = {}
        for name, split in self.splits.items():
            roles.setdefault(role_of(name), []).append(split)
        first = {role: splits[0] for role, splits in roles.items() if role is not None or len(splits) == 1}
        if stage == "train":
            return first.get("train") or first.get("trainval") or first.get(None)
        # Training on `trainval` has seen the images of `val`.
        val = first.get("val") if "train" in first or "trainval" not in first else None
        return val if stage == "val" else first.get("test") or val

    def split(self, name: str) -> Split:
        """The split of a name, or of the word for it (`val` for `valid`); `all` where nothing names a split.

        Raises:
            DataError: there is none.
        """
        same = [split for key, split in self.splits.items() if role_of(key) and role_of(key) == role_of(name)]
        found = self.splits.get("" if name == "all" and "" in self.splits else name) or (
            same[0] if len(same) == 1 else None
        )
        if found is None:
            known = [key for key in self.splits if key]
            hint = nearest(name, known) if known else "; nothing here names a split: leave the split's name out"
            raise DataError(f"{self.root}: there is no split '{name}' in what was found ({self}){hint}")
        return found


def find(root: Path, format: Format | None = None) -> Layout:
    """The data set below a folder.

    The one nearest to the folder is taken; of several formats for the same pictures, the one that describes itself
    best (YOLO with a data.yaml, COCO, VOC, bare YOLO), and the others are named in `others`.

    Args:
        root: the folder.
        format: look for this one alone.

    Raises:
        DataError: there is none, or there are several of different pictures; the message says what is there.
    """
    tree = Tree(root)
    found, refusals = _candidates(tree, format)
    if not found and tree.outside and not tree.pictures:
        link = f"'{tree.outside[0]}' is a link that leads out of the root"
        raise DataError(f"{tree.root}: {link}, and there is no picture but through it; copy or move the files")
    if not found:
        others = _candidates(tree, None)[0] if format is not None else []
        hint = f"; there is {others[0]} in '{others[0].base or '.'}': leave the format out" if others else ""
        raise DataError((refusals[0] if refusals and not hint else _nothing(tree, format)) + hint)
    best = found[0]
    rivals = [other for other in found[1:] if _depth(other) == _depth(best) and not other.pictures & best.pictures]
    if rivals and best.base != rivals[0].base:
        places = ", ".join(f"{layout.base or '.'} ({TITLES[layout.format]})" for layout in (best, *rivals)[:10])
        raise DataError(
            f"{tree.root}: it holds several data sets: {places}; pass the folder of one of them as the root"
        )
    return replace(best, others=tuple(f"{other} in '{other.base or '.'}'" for other in found[1:]))


def _candidates(tree: Tree, format: Format | None) -> tuple[list[Layout], list[str]]:
    """Every reading, the best first, and why others are none."""
    makers: dict[Format, Callable[[Tree], Iterator[Layout]]] = {"coco": _coco, "voc": _voc, "yolo": _yolo}
    found: list[Layout] = []
    refusals: list[str] = []
    for name in get_args(Format) if format is None else (format,):
        try:
            found += makers[name](tree)
        except DataError as error:
            refusals.append(str(error))
    order = {"coco": 1, "voc": 2, "yolo": 3}
    return sorted(
        found, key=lambda c: (_depth(c), 0 if c.official and c.format == "yolo" else order[c.format])
    ), refusals


def _depth(layout: Layout) -> int:
    return layout.base.count("/") + bool(layout.base)


def _nothing(tree: Tree, format: Format | None) -> str:
    known = TITLES[format] if format else "COCO instances JSON, VOC XML or YOLO text"
    problem = f"there are no pictures with annotations in {known} below it, but {tree.contents()}"
    if format is not None and tree.pictures:
        return f"{tree.root}: {problem}"
    if not tree.pictures:
        return f"{tree.root}: {problem}; put the pictures there, or pass the folder that holds both as root"
    return f"{tree.root}: {problem}; export the annotations in one of these formats, or give a data.reader"


def _coco(tree: Tree) -> Iterator[Layout]:
    absent = ""
    if not (sets := coco_layout.groups(tree)):
        for file in coco_layout.incomplete_files(tree):
            coco.load_file(tree.root / file)  # it says what is missing
    for base, files in sets.items():
        splits: dict[str, Split] = {}
        pictures: set[str] = set()
        unread = []
        for file in files:
            names = coco_layout.sample_of_names(tree, file)
            finder = coco_layout.PictureFinder(tree, file, names)
            there = {found for name in names[:200] if (found := finder.find(name)) is not None}
            name = coco_layout.split_name(file)
            if not there and names:
                absent = (
                    absent or f"{tree.root / file}: none of its pictures is below {tree.root}, first '{names[0][:200]}'"
                )
            elif name in splits or (role_of(name) is None and splits):
                unread.append(file)
            else:
                pictures |= there
                splits[name] = Split(name, _count(tree, file), partial(_read_coco, tree, file))
        if splits:
            how = "one file a split" if len(splits) > 1 else f"in {files[0]}"
            how += f" (not read: {', '.join(unread)})" if unread else ""
            yield Layout(tree.root, "coco", how, base, splits, frozenset(pictures), masks=True, keypoints=True)
    if absent:
        raise DataError(f"{absent}; put the pictures below the root, or pass the folder that holds both as root")


def _read_coco(
    tree: Tree, file: str, classes: Sequence[str] | None, masks: bool, keypoints: bool | None = False
) -> Index:
    return coco.read_file(tree, file, "", classes, masks, keypoints)


def _count(tree: Tree, file: str) -> int | None:
    path = tree.root / file
    if path.stat().st_size > COUNTED:
        return None
    try:
        images = json.loads(path.read_bytes())["images"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return len({str(image_name(image)) for image in images if isinstance(image, dict)})


def _voc(tree: Tree) -> Iterator[Layout]:
    layouts = [layout for xml in _merged(tree) if (layout := VocLayout(tree, xml)).picture]
    for layout in layouts:
        beside = all(os.path.dirname(xml) == os.path.dirname(layout.picture.get(xml, xml)) for xml in layout.xml)
        how = "XML beside the pictures" if beside else "XML in a folder of its own"
        how += ", lists in " + os.path.dirname(next(iter(layout.list_file.values()))) if layout.lists else ""
        splits = {name: Split(name, count, partial(_read_voc, layout, name)) for name, count in layout.splits().items()}
        pictures, masks = frozenset(layout.picture.values()), layout.mask_folder is not None
        yield Layout(tree.root, "voc", how, layout.base, splits, pictures, bool(layout.lists), masks)
    if not layouts and (xml := tree.with_suffix(".xml")):
        broken = [defect for defect in VocLayout(tree, xml).defects if defect.severity == "broken"]
        raise DataError(str(broken[0] if broken else f"{tree.root}: none of its {len(xml)} XML files has a picture"))


def _merged(tree: Tree) -> Iterator[list[str]]:
    """XML files by data set; folders of one depth without lists of their own are one, e.g. a folder a batch."""
    by_depth: dict[int, list[list[str]]] = {}
    for xml in VocLayout.candidates(tree):
        base = common_base(xml)
        if any(list_rank(name, base) is not None for name in tree.below(base)):
            yield xml
        else:
            by_depth.setdefault(base.count("/") + bool(base), []).append(xml)
    for groups in by_depth.values():
        merged = [name for group in groups for name in group]
        together = VocLayout(tree, merged)
        if together.pairs.spare:  # the same pictures twice: two readings, not two parts
            yield from groups
        else:
            yield merged


def _read_voc(
    layout: VocLayout, split: str, classes: Sequence[str] | None, masks: bool, keypoints: bool | None = False
) -> Index:
    if keypoints:
        raise DataError(f"{layout.tree.root}: VOC's XML has no key points; set data.keypoints to false")
    return voc.read_layout(layout, split, classes, masks)


def _yolo(tree: Tree) -> Iterator[Layout]:
    configs, refusal = YoloLayout.configs(tree), ""
    by_base: dict[str, str | None] = {}
    for name in configs:
        by_base.setdefault(base_of(name), name)
    for config in [*by_base.values()] or [None]:
        if config is None and not _may_have_labels(tree):
            return
        layout = YoloLayout(tree, config)
        splits = {
            name: Split(name, count, partial(_read_yolo, layout, name)) for name, count in layout.splits().items()
        }
        absent, unlabelled = layout.absent(), layout.unlabelled()
        if splits and layout.pairs.pictures and not unlabelled:
            how = layout.source or "labels without class names"
            how += f" ({', '.join(absent.values())})" if absent else ""
            official = bool(layout.config)
            pictures, points = frozenset(layout.pairs.label), "kpt_shape" in layout.config
            yield Layout(tree.root, "yolo", how, layout.base, splits, pictures, official, keypoints=points)
        elif not splits and absent:
            problem = next(iter(absent.values()))
            refusal = refusal or f"{tree.root / layout.source}: {problem}; correct the path"
        else:
            refusal = refusal or unlabelled or ""
    if refusal:
        raise DataError(refusal)


def _may_have_labels(tree: Tree) -> bool:
    stems = {os.path.splitext(os.path.basename(name))[0].lower() for name in tree.pictures}
    texts = [os.path.splitext(os.path.basename(name))[0].lower() for name in tree.with_suffix(".txt")]
    return any(stem in stems or os.path.splitext(stem)[0] in stems for stem in texts)


def _read_yolo(
    layout: YoloLayout, split: str, classes: Sequence[str] | None, masks: bool, keypoints: bool | None = False
) -> Index:
    if masks:
        raise DataError(f"{layout.tree.root}: YOLO labels are read as boxes, without masks; set data.masks to false")
    return yolo.read_layout(layout, split, classes, keypoints)
