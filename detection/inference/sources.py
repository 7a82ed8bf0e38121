"""Where pictures come from: an image, a folder, a pattern, a video, a camera."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from detection.data.images import EXTENSIONS, read_image
from detection.data.records import DataError
from detection.data.spectral import RGB, PixelFormat, Pixels

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


class Images:
    """Image files; those that can't be read are left out and named in `problems`.

    Args:
        paths: of the files.
        form: channels and depth that they must have.

    Attributes:
        root: folder that all of them lie in; names are relative to it.
        problems: one line for each file that was left out.
    """

    fps = 0.0

    def __init__(self, paths: list[Path], form: PixelFormat = RGB) -> None:
        self.paths, self.form = paths, form
        self.root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        self.problems: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[str, Pixels]]:
        """Name and pixels `(H, W, C)` of each, by default uint8 RGB."""
        for path in self.paths:
            try:
                pixels = read_image(path, None, self.form)
            except DataError as error:
                self.problems.append(str(error))
                continue
            yield path.absolute().relative_to(self.root).as_posix(), pixels


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


def open_source(source: str, form: PixelFormat = RGB) -> Images | Video:
    """What a path, a pattern or the number of a camera stands for.

    Args:
        source: the path, pattern or number.
        form: channels and depth that images must have.

    Raises:
        DataError: there is nothing, or no image in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        paths = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.is_file()]
        if not paths:
            raise DataError(f"{path}: no image in this folder; known are {', '.join(EXTENSIONS)}")
        return Images(paths, form)
    if path.is_file():
        return Video(path) if path.suffix.lower() in VIDEOS else Images([path], form)
    if source.isdigit():
        return Video(int(source))
    matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not matches:
        raise DataError(f"{source}: no such file, folder or pattern")
    return Images(matches, form)
