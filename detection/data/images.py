"""Decoding pictures to `(H, W, 3)` uint8 RGB, with one policy for orientation, depth and damage at every door.

- **Orientation** (EXIF): annotators draw either on the stored pixels or on the picture as viewers turn it, and files
  don't say which. The annotation's size decides: stored pixels where it equals only those, turned otherwise. Without a
  size, or where both fit (square images, half turns, mirrors), the picture is turned, as every viewer shows it.
- **Depth**: 16-bit images keep their high byte (`>> 8`). 32-bit and float images have no known range and are refused.
- **Colour**: grey is repeated, palettes are looked up, alpha is dropped, CMYK is converted; the first frame counts.
- **Other formats**: where other channels, or 16 bits, are asked for, the file must have just these (`spectral`).
- **Damage**: a file that can't be decoded to its last row is an error that names it, never a half-grey picture.
- **Size**: up to `LARGEST` pixels; beyond, only who looks at it in tiles gets it.
"""

from __future__ import annotations

import io
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar, overload

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detection.data import jpeg, spectral
from detection.data.headers import (
    LARGEST,
    UPRIGHT,
    open_picture,
    orientation_in,
    read_header,
    reason_of,
    refuse_huge,
    unlimited,
    why_unread,
)
from detection.data.records import DataError
from detection.data.spectral import RGB, PixelFormat, Pixels

KEPT_PIXELS = 2 * LARGEST  # of images whose tiles are trained on, in each process: a gigabyte of RGB
HEAD = 8192  # bytes
BAND = 2**24  # pixels of a picture that are copied at once
# A damaged header may promise 170 million pixels, half a minute of decoding. Deflate packs up to 8256 pixels a byte.
PLENTY, DENSEST = 10_000_000, 10_000
Kind = TypeVar("Kind", bound=np.generic)


@overload
def read_image(path: Path, size: tuple[int, int] | None = None, huge: bool = False) -> NDArray[np.uint8]: ...
@overload
def read_image(path: Path, size: tuple[int, int] | None = None, huge: bool = False, *, form: PixelFormat) -> Pixels: ...


def read_image(
    path: Path, size: tuple[int, int] | None = None, huge: bool = False, *, form: PixelFormat = RGB
) -> Pixels:
    """Decode one image file.

    Args:
        path: the file.
        size: `(height, width)` in pixels that the annotation states, which settles the orientation.
        huge: read more than `LARGEST` pixels too, decoded whole in 6 (JPEG) to 8 bytes of memory a pixel.
        form: channels and depth. Whatever can be is made 8-bit RGB; for any other the file must have it.

    Returns:
        `(H, W, 3)` uint8 RGB, or what `form` says, contiguous; `(H, W)` equals `size` where it is given.

    Raises:
        DataError: the file is missing, damaged, too large or of an unsupported kind, or neither way up has `size`.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the image can't be read ({reason_of(error)}); restore the file") from error
    header = read_header(path, data)
    stored, shown = header.size, header.shown
    if stored[0] * stored[1] > max(PLENTY, DENSEST * len(data)):
        raise DataError(
            f"{path}: {len(data)} bytes can't hold the {stored[0]}x{stored[1]} pixels of its header; replace it"
        )
    if not huge:
        refuse_huge(path, shown)
    if size is not None and size not in (stored, shown):
        raise DataError(
            f"{path}: the image is {shown[0]}x{shown[1]} (height x width) but its annotation says {size[0]}x{size[1]}; "
            "correct the annotation's size and check its boxes"
        )
    if form != RGB:
        pixels = spectral.decode(path, data, form)
    elif header.kind == "JPEG":
        pixels = _decode_jpeg(path, data, header.mode)
    else:
        pixels = _decode(path, data)
    if pixels.shape[:2] != stored:
        raise DataError(f"{path}: decodes to {pixels.shape[:2]} but its header says {stored}; save the image again")
    return pixels if size is not None and size != shown else _upright(pixels, header.orientation)


class RecentImages:
    """Reads images, and keeps the last ones decoded, as many as have `KEPT_PIXELS` together, and at least one."""

    def __init__(self) -> None:
        self._kept: dict[Path, Pixels] = {}

    def __call__(self, path: Path, size: tuple[int, int], form: PixelFormat) -> Pixels:
        """As `read_image`; not to be written to."""
        pixels = self._kept.pop(path, None)
        if pixels is None:
            pixels = read_image(path, size, form=form)
        self._kept[path] = pixels  # the last of them
        while len(self._kept) > 1 and sum(own.shape[0] * own.shape[1] for own in self._kept.values()) > KEPT_PIXELS:
            del self._kept[next(iter(self._kept))]
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}  # each process keeps its own


def picture(path: Path) -> NDArray[np.uint8]:
    """A file of whatever channels and depth as it is shown to people, `(H, W, 3)`; raises `DataError`."""
    try:
        return read_image(path)
    except DataError:
        return spectral.picture(path)


def image_size(path: Path, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """`(height, width)` that `read_image` will return, from the file's header alone.

    Args:
        path: the file.
        size: `(height, width)` that the annotation states; it decides between the two orientations.

    Raises:
        DataError: the file is missing or too large, or its header can't be read.
    """
    if path.suffix.lower() in (".jpg", ".jpeg") and (found := jpeg.plain_size(_head(path))) is not None:
        refuse_huge(path, found)
        return found
    header = read_header(path)
    refuse_huge(path, header.shown)
    return header.size if size == header.size else header.shown


def _head(path: Path) -> bytes:
    """The first bytes of a file, with the header of most JPEGs; none where it can't be opened."""
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(HEAD)
    except (OSError, ValueError):  # a name that no file can have, too; Pillow says so in turn
        return b""


def orientation_of(path: Path) -> int:
    """The EXIF orientation of an image file, 1 (upright) to 8; raises `DataError` like `image_size`."""
    return read_header(path).orientation


def from_pil(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels `(H, W, 3)` uint8 RGB of an image of Pillow, which are those of its file; errors as `read_image`."""
    pixels = _to_rgb(image, "the image")
    return _upright(pixels, orientation_in(image, image.info.get("exif")))


def from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The pixels `(H, W, 3)` uint8 RGB of an array, as `read_image` gives those of a file.

    Args:
        array: `(H, W, 3)` RGB or `(H, W)` grey, uint8 or uint16.

    Raises:
        ValueError: it is something else; what other channels mean, no array says.
    """
    colours = array.ndim == 3 and array.shape[2] == 3
    if array.dtype not in (np.uint8, np.uint16) or not (colours or array.ndim == 2) or not array.size:
        raise ValueError(
            "an image as array must be (H, W, 3) uint8 or uint16 in RGB order, or (H, W) grey, "
            f"not {array.shape} {array.dtype}"
        )
    pixels = (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
    return np.ascontiguousarray(pixels if colours else np.repeat(pixels[..., None], 3, axis=2))


def remarks(path: Path) -> list[tuple[str, str]]:
    """What of a file is read otherwise than it stands there: (problem, fix) each, as in a `Defect`.

    Raises:
        DataError: as `image_size`.
    """
    found = []
    header = read_header(path, count=True)
    if header.frames > 1:
        found.append((f"only the first of {header.frames} frames is read", "save the others as files of their own"))
    if header.kind == "JPEG" and jpeg.lacks_end(path.read_bytes()):
        found.append(("the JPEG has no end marker", "all of it is there and read; save it again"))
    return found


def _decode_jpeg(path: Path, data: bytes, mode: str) -> NDArray[np.uint8]:
    whole = jpeg.with_end(data)
    pixels: NDArray[Any] | None = None
    if whole is not None and mode not in ("RGB", "L"):
        pixels = _decode(path, whole)
    elif whole is not None:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            pixels = cv2.imdecode(np.frombuffer(whole, np.uint8), flags)
        except cv2.error as error:
            raise DataError(f"{path}: OpenCV does not decode it ({error.err}); cut it into smaller files") from error
    if pixels is None or (jpeg.is_grey_at_end(pixels) and jpeg.ends_early(data)):
        raise DataError(f"{path}: the JPEG is truncated or damaged; replace the file")
    return np.asarray(pixels, np.uint8)


def _decode(path: Path, data: bytes) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_picture(io.BytesIO(data)) as image:
                with unlimited() if image.width * image.height > LARGEST else nullcontext():
                    image.load()
                return _to_rgb(image, str(path))
    except (DataError, MemoryError):
        raise
    except Exception as error:
        if (sentence := why_unread(path, data)) is not None:
            raise DataError(f"{path}: {sentence}") from error
        said = spectral.advice(data) or f"the image is truncated or damaged ({reason_of(error)}); replace the file"
        raise DataError(f"{path}: {said}") from error


def _to_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """The stored pixels of an image of Pillow."""
    # Pillow holds what has 16 bits as 32 where it scales it (PPM), and before its version 11 in PNG too
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not wide:
        raise DataError(f"{name}: 32-bit pixels have no known range; convert the image to 8 or 16 bits")
    if wide:
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    try:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{name}: pixels of mode {image.mode} can't be converted; save the image as RGB") from error
    if rgb.width * rgb.height <= BAND:
        return np.array(rgb)
    pixels = np.empty((rgb.height, rgb.width, 3), np.uint8)
    rows = max(1, BAND // rgb.width)
    for top in range(0, rgb.height, rows):  # a large picture is not held twice
        bottom = min(top + rows, rgb.height)
        pixels[top:bottom] = np.asarray(rgb.crop((0, top, rgb.width, bottom)))
    return pixels


def _upright(pixels: NDArray[Kind], orientation: int) -> NDArray[Kind]:
    transpose, flip_rows, flip_columns = UPRIGHT[orientation]
    turned = pixels.transpose(1, 0, 2) if transpose else pixels
    return np.ascontiguousarray(turned[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])
