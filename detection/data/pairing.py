"""Which label file belongs to which picture, whatever the layout: looked for by ever looser names, in both directions.

A file that a stricter rule has paired is not looked at by a looser one, so that a picture without objects never gets
the labels of another picture that happens to have its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from detection.data.headers import EXTENSIONS
from detection.data.tree import LABELS, PICTURES, loose, role_of_folder, role_of_path, suffix

Key = tuple[str, ...]


@dataclass(slots=True)
class Pairs:
    """Pictures and their label files.

    Attributes:
        pictures: of each label file, in order of preference; several where they differ in extension alone.
        label: of each picture.
        loosely: pictures that were found by another name than their label's, and how.
        alone: label files that no picture belongs to.
        spare: label files of a picture that another one was taken for.
    """

    pictures: dict[str, list[str]] = field(default_factory=dict)
    label: dict[str, str] = field(default_factory=dict)
    loosely: dict[str, str] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    spare: dict[str, str] = field(default_factory=dict)


def pair(pictures: Sequence[str], labels: Sequence[str]) -> Pairs:
    """Pair pictures with label files; all paths are relative to one root.

    The first rule pairs equal stems in folders that are equal but for words such as `images` and `labels`. The others
    let the label file carry the picture's extension (`a.jpg.xml`), forget case, Unicode form, percent escapes and the
    spelling of roles (`labels/valid` for `images/val`), and at last the folders, where the stem is unique.
    """
    pairs = Pairs()
    rules: list[tuple[str, Callable[[str], Key], Callable[[str], Key]]] = [
        ("", _folders_and_stem, _folders_and_stem),
        ("the label file carries the picture's extension", _folders_and_name, _folders_and_stem),
        ("the names differ in case, form or folder", _loosely(_folders_and_stem), _loosely(_folders_and_stem)),
        ("the names differ in case, form or folder", _loosely(_folders_and_name), _loosely(_folders_and_stem)),
    ]
    for how, of_picture, of_label in rules:
        _pair_by(pairs, how, pictures, labels, of_picture, of_label)
    _pair_by(pairs, "the folders differ", pictures, labels, _stem_alone, _stem_alone, unique=True)
    pairs.alone = [name for name in labels if name not in pairs.pictures and name not in pairs.spare]
    return pairs


def _pair_by(
    pairs: Pairs,
    how: str,
    pictures: Sequence[str],
    labels: Sequence[str],
    of_picture: Callable[[str], Key],
    of_label: Callable[[str], Key],
    unique: bool = False,
) -> None:
    free: dict[Key, list[str]] = {}
    for name in pictures:
        if name not in pairs.label:
            free.setdefault(of_picture(name), []).append(name)
    wanted: dict[Key, list[str]] = {}
    for name in sorted(labels, key=_preference):
        if name not in pairs.pictures and name not in pairs.spare:
            wanted.setdefault(of_label(name), []).append(name)
    for key, names in wanted.items():
        found = sorted(free.get(key, ()), key=_rank)
        if not found or (unique and (len(found) > 1 or len(names) > 1 or _roles_differ(found[0], names[0]))):
            continue
        chosen = _nearest(found, names)
        pairs.pictures |= chosen
        pairs.spare |= dict.fromkeys([name for name in names if name not in chosen], next(iter(chosen)))
        pairs.label |= {picture: label for label, own in chosen.items() for picture in own}
        if how:
            pairs.loosely |= dict.fromkeys([picture for own in chosen.values() for picture in own], how)


def _nearest(pictures: Sequence[str], labels: Sequence[str]) -> dict[str, list[str]]:
    """The pictures of each label file among those that a rule can't tell apart: those with most folders in common."""
    if len({PurePosixPath(name).parent for name in pictures}) == 1:
        return {labels[0]: list(pictures)}
    chosen: dict[str, list[str]] = {}
    for picture in pictures:
        label = max(labels, key=lambda name: _in_common(picture, name))  # the first of equals
        chosen.setdefault(label, []).append(picture)
    for label, own in chosen.items():
        most = max(_in_common(picture, label) for picture in own)
        chosen[label] = [picture for picture in own if _in_common(picture, label) == most]
    return chosen


def _in_common(picture: str, label: str) -> int:
    first, second = (Counter(map(loose, PurePosixPath(name).parts[:-1])) for name in (picture, label))
    return (first & second).total()


def _folders(name: str) -> Key:
    """The folders of a path without those that only say what kind of file lies in them."""
    return tuple(part for part in PurePosixPath(name).parts[:-1] if loose(part) not in PICTURES | LABELS)


def _folders_and_stem(name: str) -> Key:
    return (*_folders(name), PurePosixPath(name).stem)


def _folders_and_name(name: str) -> Key:
    return (*_folders(name), PurePosixPath(name).name)


def _stem_alone(name: str) -> Key:
    stem = loose(PurePosixPath(name).stem)
    return (stem[: -len(suffix(stem))] if suffix(stem) in EXTENSIONS else stem,)


def _loosely(rule: Callable[[str], Key]) -> Callable[[str], Key]:
    def key(name: str) -> Key:
        *folders, stem = rule(name)
        return (*(role_of_folder(part) or loose(part) for part in folders), loose(stem))

    return key


def _roles_differ(picture: str, label: str) -> bool:
    first, second = role_of_path(picture), role_of_path(label)
    return first is not None and second is not None and first != second


def _preference(label: str) -> tuple[bool, int, str]:
    """Labels in a folder of their own come before those beside the pictures."""
    own = any(loose(part) in LABELS for part in PurePosixPath(label).parts[:-1])
    return not own, label.count("/"), label


def _rank(picture: str) -> tuple[int, str]:
    kind = suffix(picture)
    return EXTENSIONS.index(kind) if kind in EXTENSIONS else len(EXTENSIONS), picture
