"""Where pictures come from: an image, a folder, a pattern, a video, a stream, a camera."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import cv2
import numpy as np

from detection.batch import Id
from detection.data.checks import Folder
from detection.data.headers import EXTENSIONS, UNREAD
from detection.data.images import read_image, remarks
from detection.data.listing import read_listing
from detection.data.records import DataError
from detection.data.spectral import RGB, PixelFormat, Pixels

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
RESULTS, ANNOTATED = ("predictions.json", "predictions.csv"), "annotated"  # what a run writes into its folder
FASTEST = 240.0  # frames a second; streams that don't know theirs say 1000 or 90000


class Images:
    """Image files; those that can't be read are left out and named in `problems`.

    Args:
        paths: of the files.
        notes: what was seen when they were looked for.
        form: channels and depth that they must have.

    Attributes:
        root: folder that all of them lie in; names are relative to it.
        problems: one line for each file that was left out.
        notes: one line for each file that is read in part, or each kind that is not.
    """

    fps = 0.0

    def __init__(self, paths: list[Path], notes: list[str] | None = None, form: PixelFormat = RGB) -> None:
        self.paths, self.form = paths, form
        self.root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        self.problems: list[str] = []
        self.notes = notes or []

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[str, Pixels]]:
        """Name and pixels `(H, W, C)` of each, by default uint8 RGB."""
        for path in self.paths:
            try:
                pixels = read_image(path, huge=True, form=self.form)
                if self.form == RGB:  # of others all is read
                    self.notes += [f"{path}: {problem}" for problem, _ in remarks(path)]
            except DataError as error:
                self.problems.append(str(error))
                continue
            except MemoryError:
                self.problems.append(f"{path}: there is no memory for the whole of it; cut it into smaller files")
                continue
            yield self.name_of(path), pixels

    def name_of(self, path: Path) -> str:
        """Of one of the files, relative to the root."""
        return path.absolute().relative_to(self.root).as_posix()

    def share(self, rank: int, processes: int, batch_size: int, limit: int | None = None) -> Self:
        """The files that one of several processes looks at: whole batches, as one process alone would make them.

        Behind an unreadable file batches differ, and with them the last digits of what is found.

        Args:
            rank: of the process that looks at them, from 0.
            processes: that share the files.
            batch_size: files a batch.
            limit: share only so many files, readable or not.
        """
        part = copy.copy(self)
        part.paths = [path for i, path in enumerate(self.paths[:limit]) if i // batch_size % processes == rank]
        part.problems, part.notes = [], list(self.notes) if rank == 0 else []
        return part


class Listed(Images):
    """The images that a COCO file lists, annotated or not (`image_info_test-dev2017.json`), under its own ids.

    Args:
        annotations: the file; it names `images` and `categories`.
        folder: that its `file_name` are relative to, which no image may leave.
        form: channels and depth that they must have.

    Attributes:
        listing: what the file names.
        ids: those of each image, by its path relative to the folder; several where the file lists it several times.

    Raises:
        DataError: the file can't be read, or an image is not there.
    """

    def __init__(self, annotations: Path, folder: Path, form: PixelFormat = RGB) -> None:
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
        super().__init__([place.root / name for name in self.ids], form=form)
        self.root = place.root


class Video:
    """The frames of a video file, or of a stream or camera until it ends or is interrupted.

    Args:
        source: path of a file, URL of a stream, or number of a camera.

    Attributes:
        name: of the file or camera, or the end of the URL, which may hold a password.
        problems: one line where frames are missing.
        notes: one line where a stream has ended.

    Raises:
        DataError: it can't be opened.
    """

    def __init__(self, source: Path | str | int) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._is_live = not isinstance(source, Path)
        if isinstance(source, int):
            self.name, what = f"camera{source}", f"there is no camera {source}"
        elif isinstance(source, Path):
            self.name, what = source.name, f"{source}: not a readable video"
        else:
            url = urlsplit(source)
            self.name = Path(url.path).name or url.hostname or "stream"
            what = f"{url.scheme}://{url.hostname}{url.path}: there is no film or stream"
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            raise DataError(f"{what}; OpenCV can't open it")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= FASTEST else 25.0
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self._count = 0 if isinstance(source, int) else max(0, int(count))

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
        elif self._is_live and not self._count:  # OpenCV does not tell the one from the other
            self.notes.append(f"{self.name}: the stream ended or broke off after {number} frames")


def open_source(source: str, form: PixelFormat = RGB) -> Images | Video:
    """What a path, a pattern, the URL of a stream or the number of a camera stands for.

    Of a folder all pictures below it are read, but no hidden ones and no annotated ones of an earlier run.

    Args:
        source: the path, pattern or number.
        form: channels and depth that images must have.

    Raises:
        DataError: there is nothing, or no image in it.
    """
    if "://" in source:
        return Video(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _below(path, form)
    if path.is_file():
        return Video(path) if path.suffix.lower() in VIDEOS else Images([path], form=form)
    if source.isdigit():
        return Video(int(source))
    matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    matches = [match for match in matches if not any(_is_output(parent) for parent in match.parents)]
    if not matches:
        raise DataError(f"{source}: no such file, folder or pattern")
    return Images(matches, form=form)


def _below(root: Path, form: PixelFormat) -> Images:
    paths, notes, rest = list[Path](), list[str](), dict[str, list[str]]()
    for place, folders, files in os.walk(root):
        folder = Path(place)
        notes += [f"{folder / name}: pictures of an earlier run" for name in folders if _is_output(folder / name)]
        folders[:] = [n for n in folders if not n.startswith(".") and not _is_output(folder / n)]
        for name in files:
            suffix = Path(name).suffix.lower()
            if suffix in EXTENSIONS and not name.startswith("."):
                paths.append(folder / name)
            elif suffix in UNREAD or suffix in VIDEOS:
                rest.setdefault(suffix, []).append(name)
    for suffix, names in sorted(rest.items()):
        way = UNREAD.get(suffix, "name each as --source")
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        notes.append(f"{root}: {len(names)} {suffix} files: {shown}; {way}")
    if not paths:
        also = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(f"{root}: no image in this folder{also}; known are {', '.join(EXTENSIONS)}")
    return Images(sorted(paths), [f"not read: {note}" for note in notes], form)


def _is_output(folder: Path) -> bool:
    return folder.name == ANNOTATED and all((folder.parent / name).is_file() for name in RESULTS)
