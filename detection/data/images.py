"""Decoding image files to `(H, W, 3)` uint8 RGB, with one policy for orientation, depth and damage.

- **Orientation** (EXIF): annotators draw either on the stored pixels or on the picture as viewers turn it, and files
  don't say which. The annotation's size decides: stored pixels where it equals only those, turned otherwise. Without a
  size, or where both fit (square images, half turns, mirrors), the picture is turned, as every viewer shows it.
- **Depth**: 16-bit images keep their high byte (`>> 8`). 32-bit and float images have no known range and are refused.
- **Colour**: grey is repeated, palettes are looked up, alpha is dropped, CMYK is converted; the first frame counts.
- **Other formats**: where other channels, or 16 bits, are asked for, the file must have just these (`spectral`).
- **Damage**: a file that can't be decoded to its last row is an error that names it, never a half-grey picture.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import overload

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detection.data import spectral
from detection.data.records import DataError, Index
from detection.data.spectral import RGB, ChannelStatistics, PixelFormat, Pixels

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")  # in order of preference
ORIENTATION = 0x0112
# A damaged header may promise 170 million pixels, half a minute of decoding. Deflate packs up to 8256 pixels a byte.
PLENTY, DENSEST = 10_000_000, 10_000
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


@overload
def read_image(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]: ...
@overload
def read_image(path: Path, size: tuple[int, int] | None, form: PixelFormat) -> Pixels: ...


def read_image(path: Path, size: tuple[int, int] | None = None, form: PixelFormat = RGB) -> Pixels:
    """Decode one image file.

    Args:
        path: the file.
        size: `(height, width)` in pixels that the annotation states, which settles the orientation.
        form: channels and depth. Whatever can be is made 8-bit RGB; for any other the file must have it.

    Returns:
        `(H, W, 3)` uint8 RGB, or what `form` says, contiguous; `(H, W)` equals `size` where it is given.

    Raises:
        DataError: the file is missing, damaged or of an unsupported kind, or neither way up has `size`.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the image can't be read ({_reason(error)}); restore the file") from error
    stored, orientation, is_plain_jpeg = _header(path, data)
    if stored[0] * stored[1] > max(PLENTY, DENSEST * len(data)):
        raise DataError(
            f"{path}: {len(data)} bytes can't hold the {stored[0]}x{stored[1]} pixels of its header; replace it"
        )
    shown = stored[::-1] if UPRIGHT[orientation][0] else stored
    if size is not None and size not in (stored, shown):
        raise DataError(
            f"{path}: the image is {shown[0]}x{shown[1]} (height x width) but its annotation says {size[0]}x{size[1]}; "
            "correct the annotation's size and check its boxes"
        )
    if form != RGB:
        pixels = spectral.decode(path, data, form)
    else:
        pixels = _decode_jpeg(path, data) if is_plain_jpeg else _decode(path, data)
    if pixels.shape[:2] != stored:
        raise DataError(f"{path}: decodes to {pixels.shape[:2]} but its header says {stored}; save the image again")
    return pixels if size is not None and size != shown else _upright(pixels, orientation)


def image_size(path: Path, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """`(height, width)` that `read_image` will return, from the file's header alone.

    Args:
        path: the file.
        size: `(height, width)` that the annotation states; it decides between the two orientations.

    Raises:
        DataError: the file is missing or its header can't be read.
    """
    stored, orientation, _ = _header(path)
    shown = stored[::-1] if UPRIGHT[orientation][0] else stored
    return stored if size == stored else shown


def orientation_of(path: Path) -> int:
    """The EXIF orientation of an image file, 1 (upright) to 8; raises `DataError` like `image_size`."""
    return _header(path)[1]


def measure_channels(index: Index, form: PixelFormat, most: int = 200) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over a data set, in shares of the depth's range.

    Args:
        index: the images.
        form: channels and depth that they must have.
        most: images to look at, spread evenly: the same ones each time.

    Raises:
        DataError: none of them can be read.
    """
    statistics, problem = ChannelStatistics(form), DataError(f"{index.root}: there is no image to measure")
    for record in index.records[:: max(1, -(-len(index.records) // most))]:
        try:
            statistics.add(read_image(index.root / record.file_name, (record.height, record.width), form))
        except DataError as error:  # named again, and counted, when it is to be trained on
            problem = error
    if not statistics.count:
        raise problem
    return statistics.mean_and_std()


def _header(path: Path, data: bytes | None = None) -> tuple[tuple[int, int], int, bool]:
    """Stored `(height, width)`, EXIF orientation, and whether the fast JPEG decoder may have it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged EXIF block or an unknown tag does not concern the pixels
            with Image.open(path if data is None else io.BytesIO(data)) as image:
                width, height = image.size
                # a TIFF's orientation is a tag of the format itself, which the decoder has already applied to `size`
                orientation = 1 if image.format == "TIFF" else _exif_orientation(image.info.get("exif"))
                plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    except FileNotFoundError as error:
        raise DataError(f"{path}: the image is missing; restore the file or delete its annotation") from error
    except Exception as error:  # damaged files make Pillow raise a dozen types, among them SyntaxError
        if size := _other_size(path, data):
            return size, 1, False
        raise DataError(f"{path}: not a readable image ({_reason(error)}); replace or convert the file") from error
    return (height, width), orientation, plain


def _other_size(path: Path, data: bytes | None) -> tuple[int, int] | None:
    """`(height, width)` of a file that Pillow can't open but `spectral` can."""
    try:
        return spectral.size_of(path.read_bytes() if data is None else data)
    except Exception:
        return None


def _exif_orientation(block: bytes | None) -> int:
    if not block:
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        value = exif.get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing about the orientation
        return 1
    return value if value in UPRIGHT else 1


def _decode_jpeg(path: Path, data: bytes) -> NDArray[np.uint8]:
    # An end marker follows the last scan of every complete file. OpenCV before 5 paints what is missing grey instead.
    complete = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if complete else None
    if pixels is None:
        raise DataError(f"{path}: the JPEG is truncated or damaged; replace the file")
    return np.asarray(pixels, np.uint8)


def _decode(path: Path, data: bytes) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if image.mode in ("I", "F"):
                    raise DataError(f"{path}: 32-bit pixels have no known range; convert the image to 8 or 16 bits")
                if image.mode.startswith("I;16"):
                    grey = (np.asarray(image) >> 8).astype(np.uint8)
                    return np.repeat(grey[..., None], 3, axis=2)
                return np.array(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:
        said = spectral.advice(data) or f"the image is truncated or damaged ({_reason(error)}); replace the file"
        raise DataError(f"{path}: {said}") from error


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    transpose, flip_rows, flip_columns = UPRIGHT[orientation]
    turned = pixels.transpose(1, 0, 2) if transpose else pixels
    return np.ascontiguousarray(turned[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _reason(error: Exception) -> str:
    text = re.sub(r" <_io\..*?>", "", str(error))  # an address: the same file would be another problem each time
    return f"{type(error).__name__}: {text}".split("\n")[0][:120]
