"""A COCO file as it stands, images unopened and nothing repaired: what results are compared with, or made for.

`read_coco` reads what a detector is trained on and repairs it. Here a file without annotations will do, as of COCO's
test sets (`image_info_test-dev2017.json`), and the images need not be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.batch import Id
from detection.data.coco import load_file
from detection.data.records import DataError


@dataclass(frozen=True, slots=True)
class Listing:
    """Images and categories that a COCO file names.

    Attributes:
        path: of the file.
        images: by id, the entry of each: `file_name`, `width`, `height`.
        categories: the names by id, in ascending order of the ids.
        annotations: its list as it is; empty where there is none.
    """

    path: Path
    images: dict[Id, dict[str, Any]]
    categories: dict[Id, str]
    annotations: list[Any]

    def category_ids(self, class_names: Sequence[str]) -> list[Id | None]:
        """The file's id of each class, None of those that it lacks.

        Raises:
            DataError: it lacks them all.
        """
        ids = {name: number for number, name in self.categories.items()}
        found = [ids.get(name) for name in class_names]
        if all(number is None for number in found):
            raise DataError(
                f"{self.path}: none of the detector's classes ({_few(class_names)}) is among its categories "
                f"({_few(list(ids))}); they are compared by name"
            )
        return found


def read_listing(path: Path, annotated: bool = False) -> Listing:
    """Read a COCO file.

    Args:
        path: of the file, which lists `images` and `categories`.
        annotated: whether it must list `annotations`, too.

    Raises:
        DataError: it is no such file, or an entry has no id, one that is taken, or one that is neither a whole number
            nor text.
    """
    content = load_file(path, ("images", "categories", *(("annotations",) if annotated else ())))
    images = _by_id(path, "images", content["images"])
    entries = _by_id(path, "categories", content["categories"])
    categories: dict[Id, str] = {}
    for number in sorted(entries, key=lambda number: (isinstance(number, str), number)):
        name = str(entries[number].get("name") or f"class {number}").strip()
        categories[number] = f"{name} {number}" if name in categories.values() else name  # as `read_coco` has it
    annotations = content.get("annotations")
    return Listing(path, images, categories, annotations if isinstance(annotations, list) else [])


def as_id(value: Any) -> Id | None:
    """An id as Python compares it, or None where the value is none: 7.0 is 7, but "7" is not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str) or type(value) is int else None


def _by_id(path: Path, where: str, entries: list[Any]) -> dict[Id, dict[str, Any]]:
    """The entries of a list by id."""
    found: dict[Id, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        number = as_id(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            raise DataError(
                f"{path}: entry {position} of '{where}' has no id that is a whole number or text; give it one"
            )
        if number in found and found[number] != entry:
            raise DataError(f"{path}: two entries of '{where}' have the id {number!r}; give each its own")
        found[number] = entry
    return found


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
