"""A validation split where a data set has none: stratified by class, and what belongs together on one side.

Images of one clip, copies that a tool has augmented, and pictures that look alike would let a detector be examined on
what it has learned by heart; such a group is never divided. Nothing is drawn: what random numbers would decide, a
digest of the names and the seed does, so that the same names are divided the same everywhere, in whatever order.

Shape shorthand:
    N: images     C: classes, then two columns more: whether an image shows an object, and that it is one
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from detection.data.duplicates import gradients_of, near_duplicates
from detection.data.records import DataError, Defect, Index, Record
from detection.data.stratifying import distribute

ROBOFLOW = re.compile(r"(?P<name>.+?)(_(jpe?g|png|bmp|tiff?|webp))?\.rf\.\w{8,}", re.IGNORECASE)  # of augmented copies
FRAME = re.compile(r"(?P<clip>.*?)(?P<number>\d+)")
SHORTEST = 3  # frames of a clip
REGULAR = 0.8  # share of a clip's neighbouring frames that are equally far apart
MANY = 5000  # images: to compare them takes long enough to say so


@dataclass(frozen=True, slots=True)
class Split:
    """A division of a data set.

    Attributes:
        train, val: file names, as in the records of an index.
        note: how the division was made, for the log.
    """

    train: list[str]
    val: list[str]
    note: str = ""

    def to_plain(self) -> dict[str, Any]:
        """A dictionary of plain lists, for YAML, JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Split:
        """What `to_plain` gave."""
        return cls(list(plain["train"]), list(plain["val"]), str(plain.get("note", "")))

    def apply(self, index: Index) -> tuple[Index, Index]:
        """The images to train on and those to validate on, each in the order of the index.

        Images in neither list, which came later, train. The first index keeps the report, with a note on them.

        Raises:
            DataError: an image that is listed is no longer there.
        """
        there = {record.file_name for record in index.records}
        if gone := [name for name in [*self.val, *self.train] if name not in there]:
            raise DataError(
                f"{index.root}: {len(gone)} images of the split that the run began with are gone: {_shown(gone)}; "
                "restore them with their annotations, or begin a new run"
            )
        aside, defects = set(self.val), list(index.defects)
        if new := sorted(there - aside - set(self.train)):
            problem = f"{len(new)} images came after the split was made: {_shown(new)}"
            defects.append(Defect("split", "images", problem, "they train; a new run divides all anew", "note"))
        train = [record for record in index.records if record.file_name not in aside]
        val = [record for record in index.records if record.file_name in aside]
        return replace(index, records=train, defects=defects), replace(index, records=val, defects=[])


def divide(index: Index, fraction: float = 0.2, seed: int = 0) -> Split:
    """Set a share of the images aside for validation.

    A class that two groups or more have is on both sides, unless other classes make that impossible; a class that one
    group has trains. Objects that evaluation leaves out, crowds and difficult ones, do not count.

    Args:
        index: the training split.
        fraction: of the images, in (0, 1); groups that stay together may make it a little more or less.
        seed: another one sets others aside.

    Raises:
        DataError: fewer than two images have an object.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction of images to validate on is {fraction}: it must lie between 0 and 1")
    return _split(index, [1 - fraction, fraction], 1, seed, "were set aside", trains=0)


def fold(index: Index, part: int, parts: int, seed: int = 0) -> Split:
    """Validate on one part of several, as in cross-validation; each image is in one part.

    Args:
        index: the training split.
        part: from 1 to `parts`.
        parts: how many.
        seed: see `divide`.

    Raises:
        DataError: there are fewer groups of images with objects than parts.
    """
    if not 1 <= part <= parts or parts < 2:
        raise ValueError(f"fold {part}/{parts}: the part must be one of 1 to {parts}, of two parts or more")
    return _split(index, [1 / parts] * parts, part - 1, seed, f"are part {part} of {parts}")


def split_of(index: Index, settings: Mapping[str, Any]) -> Split:
    """The division that the settings of the data ask for, `fold` or else `val_fraction`; the log says what it is.

    Its seed is always 0: runs that differ in the seed of their training are compared on the same images.
    """
    if settings["fold"] is not None:
        why, made = f"fold {settings['fold']}", fold(index, *parse_fold(settings["fold"]))
    else:
        why, made = "no validation split", divide(index, settings["val_fraction"])
    rank_zero_info(f"{why}: {made.note}")
    return made


def keep(split: Split | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of a split, in plain values; None where the data set has its own."""
    return {"split": split and split.to_plain(), "asked": {name: settings[name] for name in ("val_fraction", "fold")}}


def kept(state: Mapping[str, Any], settings: Mapping[str, Any]) -> Split | None:
    """The split that a checkpoint has kept; where the settings now ask for another, a warning says that it stays."""
    if any(settings[name] != value for name, value in state["asked"].items()):
        before, now = (", ".join(f"{name} {s[name]}" for name in state["asked"]) for s in (state["asked"], settings))
        rank_zero_warn(f"The run goes on with its own split, of {before}; for one of {now} begin a new run.")
    return state["split"] and Split.of_plain(state["split"])


def check_division(fraction: float, part: str | None, val_split: str | None) -> None:
    """Refuse settings of the data that no division can follow: a ValueError."""
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction {fraction} must lie between 0 and 1")
    if part is not None:
        parse_fold(part)
        if val_split is not None:
            raise ValueError(f"fold {part} validates on images of train_split: leave val_split '{val_split}' out")


def parse_fold(text: str) -> tuple[int, int]:
    """`(2, 5)` of `"2/5"`; a ValueError says how a fold is written."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts or parts < 2:
        raise ValueError(f"fold '{text}' is not understood: write 2/5 to validate on the second part of five")
    return part, parts


def _split(index: Index, shares: Sequence[float], chosen: int, seed: int, how: str, trains: int | None = None) -> Split:
    """Divide into parts of these shares, and validate on the chosen one; `trains` is a part that every class needs."""
    by_name: dict[str, list[Record]] = {}
    for record in index.records:
        by_name.setdefault(record.file_name, []).append(record)
    names = sorted(by_name)
    records = [by_name[name][0] for name in names]
    shows = np.array([_shows(by_name[name], len(index.classes)) for name in names])
    groups, kept = _groups(index, records, shows, shares)
    firsts, group = np.unique(groups, return_inverse=True)
    images = np.zeros((len(firsts), shows.shape[1]))
    np.add.at(images, group, shows)
    order = np.array(sorted(range(len(firsts)), key=lambda g: _digest(names[firsts[g]], seed)))
    parts = np.zeros(len(firsts), np.intp)
    parts[order] = distribute(images[order], np.array(shares), trains)
    inside = parts[group] == chosen
    train, val = ([name for name, aside in zip(names, inside, strict=True) if aside == side] for side in (False, True))
    size = f"{100 * len(val) / len(names):.0f} % of the images ({len(val)} of {len(names)}) {how}, stratified by class"
    known = shows[:, :-2].any(axis=0)
    lost = []
    for where, side in {"training": ~inside, "validation": inside}.items():
        if absent := np.flatnonzero(known & ~shows[side, :-2].any(axis=0)).tolist():
            lost.append(f"{where} has no object of {_shown([index.classes[c] for c in absent])}")
    return Split(train, val, "; ".join([size, *kept, *lost]))


def _digest(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode(errors="surrogatepass")).digest()


def _shows(records: Sequence[Record], classes: int) -> NDArray[np.bool_]:
    """`(C,)`: which classes an image shows, whether it shows any, and that it is one."""
    counted = [record.labels[~(record.iscrowd | record.difficult)] for record in records]
    shown = np.isin(np.arange(1, classes + 1), np.concatenate(counted))
    return np.append(shown, [shown.any(), True])


def _groups(
    index: Index, records: Sequence[Record], shows: NDArray[np.bool_], shares: Sequence[float]
) -> tuple[NDArray[np.intp], list[str]]:
    """`(N,)`: of each image the first one of its group; and what to say about the groups.

    What binds images is tried from the surest to the least sure. It is left out where it would bind so many that no
    division of these shares is left: the pictures of one fixed camera all look alike.

    Raises:
        DataError: there are fewer images with objects than parts.
    """
    count, originals = len(records), [_original(record.file_name) for record in records]
    if (useful := int(shows[:, -2].sum())) < len(shares):
        raise DataError(
            f"{index.root}: {useful} of {count} images have objects, too few to divide into {len(shares)} parts, "
            "training and validation each with one: annotate more"
        )
    copies: dict[str, list[int]] = {}
    for i, name in enumerate(originals):
        copies.setdefault(name, []).append(i)
    if count > MANY:
        rank_zero_info(f"looking for images that look alike among {count}; each is read, and decoded small")
    hashes = gradients_of(index.root, records)
    seen = np.array([i for i, found in enumerate(hashes) if found is not None], np.intp)
    pairs = near_duplicates([found for found in hashes if found is not None])
    alike = (seen[np.append(earlier, i)] for i, earlier in pairs)
    bonds: dict[str, Iterable[Sequence[int] | NDArray[np.intp]]] = {
        "augmented copies": [found for found in copies.values() if len(found) > 1],
        "frames of clips": clips(originals, shows),
        "images that look alike": alike,
    }
    groups, said = _Groups.apart(count), list[str]()
    for what, sets in bonds.items():
        bound = groups.bound(sets)
        members = bound.of_each()
        sizes = np.bincount(members, minlength=count)
        usable = len(np.unique(members[shows[:, -2]])) >= len(shares) and sizes.max() <= (1 - min(shares)) * count
        if (named := int(bound.changed.sum())) and usable:
            groups = bound
            said.append(f"{named} {what} stay together")
        elif named:
            said.append(f"{named} {what} are divided all the same, for they are nearly all there is")
    return groups.of_each(), said


@dataclass(slots=True)
class _Groups:
    """Union-find: which images belong together. The first image of a group stands for it.

    Each set is looked up at once: where a camera stands still, every frame comes with all frames before it.
    """

    parent: NDArray[np.intp]
    changed: NDArray[np.bool_]  # whether the last sets have named an image

    @classmethod
    def apart(cls, count: int) -> _Groups:
        return cls(np.arange(count), np.zeros(count, bool))

    def find(self, images: NDArray[np.intp]) -> NDArray[np.intp]:
        """The first image of the group of each."""
        roots = self.parent[images]
        while not np.array_equal(above := self.parent[roots], roots):
            roots = above
        return roots

    def bound(self, sets: Iterable[Sequence[int] | NDArray[np.intp]]) -> _Groups:
        """Other groups, in which each of these sets is in one."""
        new = _Groups(self.parent.copy(), np.zeros_like(self.changed))
        for members in map(np.asarray, sets):
            roots = new.find(members)
            new.parent[roots] = new.parent[members] = roots.min()
            new.changed[members] = True
        return new

    def of_each(self) -> NDArray[np.intp]:
        return self.find(np.arange(len(self.parent)))


def _original(file_name: str) -> str:
    """The name without its extension, and without what Roboflow adds to the augmented copies of an image."""
    path = PurePosixPath(file_name)
    copy = ROBOFLOW.fullmatch(path.stem)
    return str(path.with_name(copy["name"] if copy else path.stem))


def clips(names: Sequence[str], shows: NDArray[np.bool_]) -> list[list[int]]:
    """The frames of each film among images, by position.

    A clip is all images of a folder whose names are equal but for a number at the end, if there are three or more, and
    four of five neighbouring numbers are equally far apart. A set whose images are all numbered alike is no clip, so
    there must be two of them. Nor is one that alone, and on each image, has a certain class: its name is that of the
    class.

    Args:
        names: N paths without extension.
        shows: `(N, C)`: whether an image has objects of a class.
    """
    numbered: dict[str, dict[int, list[int]]] = {}
    for position, name in enumerate(names):
        if found := FRAME.fullmatch(name):
            numbered.setdefault(found["clip"], {}).setdefault(int(found["number"]), []).append(position)
    films = []
    for frames in numbered.values():
        steps = np.diff(sorted(frames))
        if len(frames) >= SHORTEST and (steps == np.median(steps)).mean() >= REGULAR:
            films.append(sorted(position for positions in frames.values() for position in positions))
    if len(films) < 2:
        return []
    classes, busy = shows[:, :-2], shows[:, -2]
    return [
        film
        for film in films
        if not any(
            classes[film, c][busy[film]].all() and classes[film, c].sum() == classes[:, c].sum()
            for c in np.flatnonzero(classes[film].any(axis=0))
        )
    ]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
