"""What a picture's file says of itself before it is decoded: kind, size and orientation; and which kinds are read."""

from __future__ import annotations

import io
import re
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, features
from PIL.ImageFile import ImageFile

from detection.data import spectral
from detection.data.records import DataError

# What is read, in order of preference, and its decoders by Pillow's names. Others may run programs, as that of EPS.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".avif", ".jp2", ".j2k", ".j2c"),
    *(".jpx", ".jpf", ".mpo", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".apng", ".dib", ".tga"),
)
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "AVIF", "JPEG2000", "GIF", "PPM", "TGA")
# Pictures that are not read, and what makes them so.
UNREAD = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "export them as JPEG, or convert them: heif-convert a.heic a.jpg"),
    **dict.fromkeys(
        (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
        "develop them to JPEG or TIFF: darktable-cli a.dng a.jpg",
    ),
    **dict.fromkeys((".psd", ".psb", ".xcf", ".ai", ".eps", ".svg", ".pdf"), "export them as PNG"),
    **dict.fromkeys((".exr", ".hdr", ".pfm", ".fits", ".fit"), "bring their values into 8 or 16 bits and save PNG"),
    **dict.fromkeys((".dcm", ".nii", ".mhd"), "choose a window of values and save PNG"),
    **dict.fromkeys((".svs", ".ndpi", ".czi", ".scn", ".mrxs", ".nd2", ".lif"), "export the level wanted as tiles"),
    **dict.fromkeys((".jxl", ".jxr", ".qoi", ".pcx", ".dds", ".ico", ".icns", ".pict"), "convert them to PNG"),
}
# Content of which a build of Pillow may lack the decoder: (where, bytes) -> Pillow's name of it.
OPTIONAL = {
    (4, b"ftypavi"): ("AVIF", "avif"),
    (4, b"jP  "): ("JPEG 2000", "jpg_2000"),
    (0, b"\xff\x4f\xff\x51"): ("JPEG 2000", "jpg_2000"),
    (8, b"WEBP"): ("WebP", "webp"),
}
HEIF = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")
LARGEST = 178_956_970  # pixels, beyond which Pillow speaks of a decompression bomb: half a gigabyte of RGB
ORIENTATION, TAIL = 0x0112, 2**14  # tag of EXIF; bytes at the end of a PNG among which a late block is looked for
# EXIF 2.32, section 4.6.4: from stored rows and columns to the upright picture, (transpose, flip rows, flip columns)
UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_LIMIT = threading.Lock()


class Header(NamedTuple):
    """What is known of a picture before it is decoded.

    Attributes:
        size: `(height, width)` in pixels as they are stored.
        orientation: of EXIF, 1 (upright) to 8.
        kind: the format by Pillow's name, in which MPO is JPEG; empty where Pillow doesn't know it.
        mode: Pillow's name of the channels and their depth.
        frames: pictures in the file, where they were counted.
    """

    size: tuple[int, int]
    orientation: int
    kind: str
    mode: str
    frames: int

    @property
    def shown(self) -> tuple[int, int]:
        """`(height, width)` as viewers turn it."""
        return self.size[::-1] if UPRIGHT[self.orientation][0] else self.size


def read_header(path: Path, data: bytes | None = None, count: bool = False) -> Header:
    """The header of a picture's file.

    Args:
        path: the file.
        data: its bytes, where they have been read.
        count: count the frames, for which some formats are read to the end.

    Raises:
        DataError: the file is missing, damaged or of a kind that is not read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged EXIF block or an unknown tag does not concern the pixels
            with open_picture(path if data is None else io.BytesIO(data)) as image:
                width, height = image.size
                kind = "JPEG" if image.format == "MPO" else str(image.format)
                # the second picture of a JPEG is a preview or a map of depth or brightness
                frames = _frames(image) if count and kind != "JPEG" else 1
                block = image.info.get("exif") or (_late_exif(image) if kind == "PNG" else None)
                return Header((height, width), orientation_in(image, block), kind, image.mode, frames)
    except FileNotFoundError as error:
        raise DataError(f"{path}: the image is missing; restore the file or delete its annotation") from error
    except Exception as error:  # damaged files make Pillow raise a dozen types, among them SyntaxError
        if (size := _other_size(path, data)) is not None:
            return Header(size, 1, "", "", 1)
        if (sentence := why_unread(path, data)) is not None:
            raise DataError(f"{path}: {sentence}") from error
        raise DataError(f"{path}: not a readable image ({reason_of(error)}); replace or convert the file") from error


def _other_size(path: Path, data: bytes | None) -> tuple[int, int] | None:
    """`(height, width)` of a file that Pillow can't open but `spectral` can."""
    try:
        return spectral.size_of(path.read_bytes() if data is None else data)
    except Exception:
        return None


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow knows; AVIF since its version 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_picture(source: Path | io.BytesIO) -> ImageFile:
    """Pillow's picture of a file of one of FORMATS, of any size, not decoded yet; Pillow's errors."""
    try:
        return Image.open(source, formats=_formats())
    except Image.DecompressionBombError:  # how many pixels are too many is asked here
        with unlimited():
            return Image.open(source, formats=_formats())


@contextmanager
def unlimited() -> Iterator[None]:
    """Lifts Pillow's limit of pixels, which is one for all threads."""
    with _LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def refuse_huge(path: Path, shape: tuple[int, int]) -> None:
    """A DataError for `(height, width)` of more than `LARGEST` pixels."""
    if shape[0] * shape[1] > LARGEST:
        raise DataError(
            f"{path}: {shape[0]}x{shape[1]} pixels (height x width) are too many to be looked at at once; cut the "
            "image and its annotations into tiles (`detection predict` looks at it in tiles by itself)"
        )


def why_unread(path: Path, data: bytes | None) -> str | None:
    """Why no decoder takes the file, where its content or its name tells."""
    try:
        with path.open("rb") as file:
            head = data[:32] if data is not None else file.read(32)
    except (OSError, ValueError):
        return None
    for (at, mark), (kind, feature) in OPTIONAL.items():
        if head[at:].startswith(mark) and not features.check(feature):
            return f"this build of Pillow has no decoder for {kind}; pip install --upgrade pillow, or save it as PNG"
    suffix = ".heic" if head[4:].startswith(HEIF) else path.suffix.lower()
    return f"{suffix[1:].upper()} is not read; {UNREAD[suffix]}" if suffix in UNREAD else None


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a damaged later frame does not concern the first
        return 1


def _late_exif(image: ImageFile) -> bytes | None:
    """The EXIF block behind the pixels of a PNG (PNG 3, 11.3.4.4), which Pillow sees when it has decoded them."""
    assert image.fp is not None  # until it is decoded
    image.fp.seek(max(0, image.fp.seek(0, io.SEEK_END) - TAIL))
    data = image.fp.read()
    at = data.rfind(b"eXIf")
    end = at + 4 + int.from_bytes(data[max(0, at - 4) : at])
    is_chunk = at >= 4 and zlib.crc32(data[at:end]) == int.from_bytes(data[end : end + 4])
    return data[at + 4 : end] if is_chunk else None


def orientation_in(image: Image.Image, block: bytes | None) -> int:
    """The EXIF orientation, 1 (upright) to 8, that a block of EXIF gives a picture."""
    # a TIFF's orientation is a tag of the format itself, which the decoder has already applied to the size
    if image.format == "TIFF" or not block:
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        value = exif.get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing about the orientation
        return 1
    return value if value in UPRIGHT else 1


def reason_of(error: Exception) -> str:
    """An error of a decoder in at most 120 characters, the same each time."""
    text = re.sub(r" <_io\..*?>", "", str(error))  # an address: the same file would be another problem each time
    return f"{type(error).__name__}: {text}".split("\n")[0][:120]
