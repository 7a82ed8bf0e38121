"""Annotated frames as a film that browsers play: H.264, by OpenCV or PyAV; MPEG-4 where neither can."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# A coder that is missing is no error here; OpenCV reads this once, when it opens its first film.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


class Writer(Protocol):
    """What writes frames: OpenCV's, or ours of the same methods."""

    def write(self, frame: NDArray[np.uint8], /) -> object:
        """Add a frame `(H, W, 3)` BGR."""

    def release(self) -> None:
        """Finish the file."""


class Film:
    """One video of pictures.

    Args:
        path: of the file, .mp4.
        fps: frames a second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self._writer: Writer | None = None
        self._notes: list[str] = []

    def write(self, name: str, picture: Image.Image) -> None:
        """Add a frame; the first sets the size."""
        width, height = picture.width & ~1, picture.height & ~1  # video has colours for pairs of pixels
        if self._writer is None:
            self._writer = self._open((width, height))
        self._writer.write(np.ascontiguousarray(np.asarray(picture)[:height, :width, ::-1]))

    def _open(self, size: tuple[int, int]) -> Writer:
        log = getattr(cv2.utils, "logging", cv2)  # before OpenCV 4.13 its functions are those of cv2
        level = log.setLogLevel(0)  # silent
        try:
            writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"avc1"), self.fps, size)
        finally:
            log.setLogLevel(level)
        if writer.isOpened():
            return writer
        try:
            return _H264(self.path, self.fps, size)
        except (ImportError, ValueError):  # no PyAV, or one without the coder
            pass
        other = self.path.with_stem(f"{self.path.stem}_h264").name
        self._notes.append(
            f"{self.path}: MPEG-4, which browsers don't play, as this OpenCV writes no H.264; with "
            f'pip install "detection[video]" the next is, and to convert this one: ffmpeg -i {self.path.name} '
            f"-c:v libx264 -pix_fmt yuv420p {other}"
        )
        return cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"mp4v"), self.fps, size)

    def close(self) -> list[str]:
        """Finish the file; what is to be said of it."""
        if self._writer is not None:
            self._writer.release()
        return self._notes


class _H264:
    """Writes with PyAV; an ImportError or a ValueError where it is not installed or has no coder for H.264."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        import av

        self._frame = av.VideoFrame
        av.Codec("h264", "w")
        self._file = av.open(str(path), "w", options={"movflags": "faststart"})  # plays before all of it is there
        self._stream = self._file.add_stream("h264", rate=Fraction(fps).limit_denominator(1001))
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"

    def write(self, frame: NDArray[np.uint8]) -> None:
        self._file.mux(self._stream.encode(self._frame.from_ndarray(frame, format="bgr24")))

    def release(self) -> None:
        self._file.mux(self._stream.encode())
        self._file.close()
