"""Where pictures come from: an image, a folder, a pattern, a video, a camera."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.batch import Id
from detection.data.checks import Folder
from detection.data.images import EXTENSIONS, read_image
from detection.data.listing import read_listing
from detection.data.records import DataError

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
Pixels = NDArray[np.uint8]


class Images:
    """Image files; those that can't be read are left out and named in `problems`.

    Args:
        paths: of the files.

    Attributes:
        root: folder that all of them lie in; names are relative to it.
        problems: one line for each file that was left out.
    """

    fps = 0.0

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        self.problems: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[str, Pixels]]:
        """Name and `(H, W, 3)` uint8 RGB of each."""
        for path in self.paths:
            try:
                pixels = read_image(path)
            except DataError as error:
                self.problems.append(str(error))
                continue
            yield path.absolute().relative_to(self.root).as_posix(), pixels


class Listed(Images):
    """The images that a COCO file lists, annotated or not (`image_info_test-dev2017.json`), under its own ids.

    Args:
        annotations: the file; it names `images` and `categories`.
        folder: that its `file_name` are relative to, which no image may leave.

    Attributes:
        listing: what the file names.
        ids: those of each image, by its path relative to the folder; several where the file lists it several times.

    Raises:
        DataError: the file can't be read, or an image is not there.
    """

    def __init__(self, annotations: Path, folder: Path) -> None:
        self.listing = read_listing(annotations)
        place, self.ids = Folder(folder), dict[str, list[Id]]()
        for number, entry in self.listing.images.items():
            name, where = entry.get("file_name"), f"{annotations}: image {number}"
            if not isinstance(name, str) or not name.strip("/. "):
                raise DataError(f"{where}: it has no file_name; add it")
            path = place.locate(name.replace("\\", "/"), where)
            self.ids.setdefault(path.relative_to(place.root).as_posix(), []).append(number)
        if not self.ids:
            raise DataError(f"{annotations}: it lists no image; pass a file that does")
        if missing := [name for name in self.ids if not (place.root / name).is_file()]:
            raise DataError(
                f"{annotations}: {len(missing)} of its {len(self.ids)} images are not in {folder}, first {missing[0]}; "
                "name the folder that holds them, or restore them"
            )
        super().__init__([place.root / name for name in self.ids])
        self.root = place.root


class Video:
    """The frames of a video file, or of a camera until it is interrupted.

    Args:
        source: path of a file, or number of a camera.

    Raises:
        DataError: it can't be opened.
    """

    def __init__(self, source: Path | int) -> None:
        self.name = f"camera{source}" if isinstance(source, int) else source.name
        self.problems: list[str] = []
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            what = f"there is no camera {source}" if isinstance(source, int) else f"{source}: not a readable video"
            raise DataError(f"{what}; OpenCV can't open it")
        self.fps = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        self._count = 0 if isinstance(source, int) else max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __len__(self) -> int:
        """Frames that the file says it has; 0 where nobody knows."""
        return self._count

    def __iter__(self) -> Iterator[tuple[str, Pixels]]:
        """Name and `(H, W, 3)` uint8 RGB of each frame; the name ends in its number from 0 on."""
        number = 0
        while True:
            ok, frame = self._capture.read()
            if not ok:
                break
            yield f"{self.name}#{number}", np.ascontiguousarray(frame[..., ::-1], np.uint8)
            number += 1
        self._capture.release()
        if number < self._count:
            self.problems.append(f"{self.name}: only {number} of {self._count} frames could be read")


def open_source(source: str) -> Images | Video:
    """What a path, a pattern or the number of a camera stands for.

    Raises:
        DataError: there is nothing, or no image in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        paths = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.is_file()]
        if not paths:
            raise DataError(f"{path}: no image in this folder; known are {', '.join(EXTENSIONS)}")
        return Images(paths)
    if path.is_file():
        return Video(path) if path.suffix.lower() in VIDEOS else Images([path])
    if source.isdigit():
        return Video(int(source))
    matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not matches:
        raise DataError(f"{source}: no such file, folder or pattern")
    return Images(matches)
