"""Where COCO instances files and their pictures lie: COCO's own layout and those of exporting tools.

A file may lie anywhere, its pictures beside it (Roboflow), in a folder of its name (`train.json`, `train/`) or in any
other: the folder is found in which most of its `file_name`s are. Names are looked for by `Tree`.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath

from detection.data.checks import nearest
from detection.data.federated import image_name
from detection.data.headers import EXTENSIONS
from detection.data.records import DataError
from detection.data.tree import PICTURES, Tree, base_of, cleaned, loose, role_of, role_of_path, suffix

HEAD = 1 << 20  # bytes in which the first names of pictures are looked for
SIDE_TASKS = ("keypoint", "caption", "stuff", "panoptic", "image_info", "person")  # beside the instances of a set
NO_PICTURES = (".json", ".xml", ".txt", ".csv", ".yaml", ".yml")


def instance_files(tree: Tree) -> list[str]:
    """The COCO files below a root, judged by the keys in them; captions, panoptic and other JSON are passed over."""
    keys = (b'"annotations"', b'"categories"')
    return [name for name in tree.with_suffix(".json") if _is_instances(tree, name, keys)]


def incomplete_files(tree: Tree) -> list[str]:
    """The JSON files that name pictures as COCO's do, whatever else they hold or lack."""
    return [name for name in tree.with_suffix(".json") if _is_instances(tree, name, (b'"file_name"',))]


def _is_instances(tree: Tree, name: str, keys: Sequence[bytes]) -> bool:
    path = tree.root / name
    if path.stat().st_size < 2:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
        if not start.startswith(b"{") or content.find(b'"images"') < 0:
            return False
        if content.find(b'"segments_info"') >= 0 or (content.find(b'"caption"') >= 0 and content.find(b'"bbox"') < 0):
            return False
        whole = all(content.find(key) >= 0 for key in keys)
    return whole or _is_cut_off(path)  # whoever reads that one will say so


def _is_cut_off(path: Path) -> bool:
    if path.stat().st_size > HEAD:
        return False
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return True
    return False


def groups(tree: Tree) -> dict[str, list[str]]:
    """The COCO files of each data set below the root, by its folder; those of one role in order of preference."""
    found: dict[str, list[str]] = {}
    for name in sorted(instance_files(tree), key=_rank):
        found.setdefault(base_of(name), []).append(name)
    return found


def _rank(name: str) -> tuple[bool, bool, int, str]:
    stem = loose(PurePosixPath(name).stem)
    plain = os.path.splitext(name)[0]  # "train" comes before its copy "train (1)"
    return any(word in stem for word in SIDE_TASKS), "instances" not in stem, name.count("/"), plain


def role_of_file(name: str) -> str | None:
    """What an annotation file is for, by its own name or its folder's."""
    return role_of(PurePosixPath(name).stem) or role_of_path(name)


def split_name(name: str) -> str:
    """How people call the split of a file: the word for it, else the file's stem."""
    return role_of_file(name) or PurePosixPath(name).stem


def sample_of_names(tree: Tree, file: str) -> list[str]:
    """The first `file_name`s of a COCO file, or LVIS's `coco_url`s in their place, without reading all of it."""
    with (tree.root / file).open("rb") as stream:
        head = stream.read(HEAD).decode("utf-8", errors="ignore")
    for key in ("file_name", "coco_url"):
        values = re.findall(rf'"{key}"\s*:\s*"((?:[^"\\]|\\.)*)"', head)
        if values:
            return [str(image_name({key: json.loads(f'"{value}"', strict=False)})) for value in values]
    return []


class PictureFinder:
    """Finds the pictures of one COCO file.

    Args:
        tree: of the data root.
        file: the annotation file, relative to the root, or anywhere else.
        names: its `file_name`s, from which the folder is found that has most of them.
        images: the folder that they are relative to, where that is said.

    Attributes:
        base: the folder; None where the pictures are spread over several and found by their own names.
        rivals: further folders that hold pictures of these names just as well.
    """

    def __init__(self, tree: Tree, file: str, names: Sequence[str], images: str = "") -> None:
        self.tree, self.role = tree, role_of_file(file)
        self._kinds = sorted({suffix(name) for name in tree.pictures})
        said = tree.folder(images) if images.strip("/. ") else None
        if said is None and images.strip("/. "):
            raise DataError(f"{tree.root}: there is no folder '{images}'{nearest(images, tree.folders())}")
        self._is_said = said is not None
        folders = self._folders(file)
        found = [said] if said is not None else tree.best_bases(names, folders)
        if not found:
            found = tree.best_bases([other for name in names[:200] for other in self._of_other_kinds(name)], folders)
        self.base: str | None = found[0] if found else None
        self.rivals = [folder for folder in found[1:] if self._order(folder, file) == self._order(found[0], file)]
        if said is None and names:
            step = max(1, len(names) // 200)
            sample = names[::step]
            below = sum(self.base is not None and self.find(name) is not None for name in sample)
            if 2 * below < sum(self._anywhere(name) is not None for name in sample):
                self.base, self.rivals = None, []

    def _folders(self, file: str) -> list[str]:
        """The folders that may hold the pictures, the likeliest first; those of another split are none of them."""
        own = os.path.dirname(file)
        folders = {"", own} | {os.path.dirname(name) for name in self.tree.pictures}
        folders |= {
            str(parent) for name in list(folders) for parent in PurePosixPath(name).parents if str(parent) != "."
        }
        roles = {folder: role_of_path(f"{folder}/x") for folder in folders}
        fitting = [f for f in folders if roles[f] in (None, self.role) or self.role in (None, "trainval") or f == own]
        return sorted(fitting, key=lambda folder: (self._order(folder, file), folder.count("/"), folder))

    def _order(self, folder: str, file: str) -> tuple[bool, ...]:
        """Less for a folder that says more clearly that it is that of the annotation file."""
        own = base_of(file)
        elsewhere = bool(own) and not f"{folder}/".startswith(f"{own}/")  # in another data set below the root
        last, stem = loose(os.path.basename(folder)), loose(PurePosixPath(file).stem)
        named = bool(last) and last in (stem, stem.removeprefix("instances_"))
        fits = self.role is not None and role_of_path(f"{folder}/x") == self.role
        return elsewhere, not named, not fits, folder != os.path.dirname(file), last not in PICTURES

    def find(self, name: str) -> str | None:
        """The picture of a `file_name`; one of another extension, or of any, where there is just one of its stem."""
        if self.base is None:
            return self._anywhere(name)
        found = self.tree.file(name, (self.base,))
        if found is not None and suffix(found) in NO_PICTURES:
            return None
        if found is None:
            others = {other for n in self._of_other_kinds(name) if (other := self.tree.file(n, (self.base,)))}
            found = others.pop() if len(others) == 1 else None
        return found

    def other_than(self, found: str, names: Sequence[str]) -> str | None:
        """Another picture that one of these written names may as well mean; None where the folder was said."""
        if self._is_said:
            return None
        for name in names:
            for other in self._of_own_role(self.tree.by_name(name)):
                if other != found and _depth(name, other) >= _depth(name, found):
                    return other
        return None

    def _of_own_role(self, pictures: Sequence[str]) -> Sequence[str]:
        return [f for f in pictures if role_of_path(f) in (None, self.role)] if self.role else pictures

    def _of_other_kinds(self, name: str) -> list[str]:
        stem = name[: -len(suffix(name))] if suffix(name) in EXTENSIONS else name
        return [stem + kind for kind in self._kinds]

    def _anywhere(self, name: str) -> str | None:
        found = self.tree.by_name(name)
        fitting = self._of_own_role(found) or found
        return fitting[0] if len(fitting) == 1 else None


def _depth(written: str, picture: str) -> int:
    """How many of a written path's last parts are a picture's, too."""
    pairs = zip(reversed(cleaned(written)), reversed(picture.split("/")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: loose(pair[0]) == loose(pair[1]), pairs))
