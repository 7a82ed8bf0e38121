"""Images that are not 8-bit RGB: any number of channels, 8 or 16 bits a channel, nothing of them dropped or scaled.

The files must have what `data.channels` and `data.depth` say: one that has something else is an error, as nobody can
know whether a fourth channel is infrared or transparency. Channels keep the file's order, colour ones are red, green,
blue.

- PNG and other common formats: 1 to 4 channels. Palettes count as the colours that they stand for.
- TIFF: samples side by side, in planes, or as pages of one sample each; of pages, reduced copies don't count. More than
  four samples, and four that are not RGB with one more, need the package `tifffile`.
- `.npy`: `(H, W)` or `(H, W, C)`. Such files are read where an annotation names them, and not looked for in folders,
  where other programs keep their caches.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from detection.data.records import DataError

Pixels: TypeAlias = NDArray[np.uint8 | np.uint16]  # (H, W, C)

NPY, PNG, TIFF = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LACKING = "a TIFF of this kind needs one more package: pip install tifffile"
MOST_PAGES = 4096
SUBFILE, WIDTH, HEIGHT, BITS, COLOUR, ORIENTATION, SAMPLES, PLANES = 254, 256, 257, 258, 262, 274, 277, 284  # TIFF 6.0
RGB_COLOUR, SIDE_BY_SIDE = 2, 1
SHOWN = (1, 99)  # percentiles of a 16-bit channel that become black and white in pictures


class PixelFormat(NamedTuple):
    """Channels of an image, and bits of each."""

    channels: int = 3
    depth: int = 8

    @classmethod
    def of(cls, detector: Any) -> PixelFormat:
        """What a detector takes, as its transform says."""
        return cls(detector.transform.channels, detector.transform.image_depth)

    @property
    def dtype(self) -> type[np.uint8 | np.uint16]:
        """Of the arrays."""
        return np.uint16 if self.depth == 16 else np.uint8

    @property
    def highest(self) -> int:
        """The highest value of a pixel."""
        return int(2**self.depth - 1)

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.depth} bits"


RGB = PixelFormat()


def size_of(data: bytes) -> tuple[int, int] | None:
    """`(height, width)` of a file whose kind Pillow does not know; None where it is not known here either."""
    if data.startswith(NPY):
        shape = _array(data).shape
        return (shape[0], shape[1])
    if data.startswith(TIFF):
        first = _pages(data)[0]
        return (int(first[HEIGHT]), int(first[WIDTH]))
    return None


def decode(path: Path, data: bytes, form: PixelFormat) -> Pixels:
    """The pixels of a file as they are stored, `(H, W, C)`.

    Args:
        path: of the file, for messages.
        data: its contents.
        form: what it must have.

    Raises:
        DataError: it is damaged, of an unsupported kind, or has other channels or another depth.
    """
    pixels = _of_any_format(path, data)
    found = PixelFormat(pixels.shape[2], 8 * pixels.dtype.itemsize)
    if found != form:
        raise DataError(
            f"{path}: the image has {found}, but {form} are wanted; set data.channels and data.depth to what all files "
            "have, or convert this one"
        )
    return np.ascontiguousarray(pixels)


def _of_any_format(path: Path, data: bytes) -> Pixels:
    try:
        pixels = _decode(data)
    except ImportError as error:
        raise DataError(f"{path}: {LACKING}") from error
    except Exception as error:  # damaged files raise a dozen types
        said = f"{type(error).__name__}: {error}".split("\n")[0][:160]
        raise DataError(f"{path}: the image can't be decoded ({said}); replace or convert the file") from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path}: its pixels are {pixels.dtype}, of no known range; convert them to 8 or 16 bits")
    return pixels


def advice(data: bytes) -> str:
    """What to say of a file that can be read, but not as RGB; nothing of a damaged one."""
    try:
        pixels = _decode(data)
        found = PixelFormat(pixels.shape[2] if pixels.ndim == 3 else 1, 8 * pixels.dtype.itemsize)
    except ImportError:
        return LACKING
    except Exception:
        return ""
    return f"the image has {found}: set data.channels to {found.channels} and data.depth to {found.depth}"


def _decode(data: bytes) -> NDArray[Any]:
    if data.startswith(NPY):
        return _array(data)
    if data.startswith(TIFF):
        return _decode_tiff(data)
    if data.startswith(PNG) and data[24] == 16 and data[25] != 0:  # Pillow keeps 8 bits of 16-bit colours
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # or OpenCV leaves the rest of a damaged file as it may be
        return _by_opencv(data)
    with Image.open(io.BytesIO(data)) as image:
        return _by_pillow(image)


def _decode_tiff(data: bytes) -> NDArray[Any]:
    pages = _pages(data)
    first = pages[0]
    samples, bits, colour = first.get(SAMPLES, 1), first.get(BITS, (1,))[0], first.get(COLOUR)
    whole = [i for i, page in enumerate(pages) if not page.get(SUBFILE, 0) & 1]
    if samples == 1 and bits in (8, 16):
        with Image.open(io.BytesIO(data)) as image:
            frames = [_by_pillow(frame) for i, frame in enumerate(ImageSequence.Iterator(image)) if i in whole]
        return frames[0] if len(frames) == 1 else np.stack(frames, axis=-1)
    together = colour == RGB_COLOUR and samples in (3, 4) and first.get(PLANES, SIDE_BY_SIDE) == SIDE_BY_SIDE
    if together and bits == 8:  # OpenCV would multiply colours by the fourth channel
        with Image.open(io.BytesIO(data)) as image:
            return _by_pillow(image)
    if (turned := first.get(ORIENTATION, 1)) != 1:
        raise ValueError(f"its orientation tag is {turned}: save it upright")
    if together and bits == 16:
        return _by_opencv(data)
    import tifffile

    pixels: NDArray[Any] = tifffile.imread(io.BytesIO(data), key=0)
    return pixels if first.get(PLANES, SIDE_BY_SIDE) == SIDE_BY_SIDE else np.moveaxis(pixels, 0, -1)


def _pages(data: bytes) -> list[ImageFileDirectory_v2]:
    """The directories of a TIFF, one a page."""
    file, head = io.BytesIO(data), data[: 16 if 43 in data[2:4] else 8]  # 43 says BigTIFF
    place, pages = ImageFileDirectory_v2(head).next, list[ImageFileDirectory_v2]()
    while place and len(pages) < MOST_PAGES:
        file.seek(place)
        page = ImageFileDirectory_v2(head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of a damaged page, and gives what it has
            page.load(file)
        pages.append(page)
        place = page.next
    return pages


def _array(data: bytes) -> NDArray[Any]:
    pixels: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    if pixels.ndim not in (2, 3) or not pixels.size:
        raise ValueError(f"an array of shape {pixels.shape} is no image: save it as (H, W) or (H, W, C)")
    return pixels


def _by_pillow(image: Image.Image) -> NDArray[Any]:
    image.load()
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    return pixels.astype(np.uint16) if image.mode.startswith("I;16") else pixels


def _by_opencv(data: bytes) -> NDArray[Any]:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("it is truncated or damaged")
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def false_colour(pixels: Pixels) -> NDArray[np.uint8]:
    """An image `(H, W, C)` for people's eyes, `(H, W, 3)` uint8: its first three channels, or its only one as grey.

    16-bit channels are stretched, each for itself, from their 1st to their 99th percentile. 8-bit RGB stays as it is.
    """
    channels = pixels.shape[2]
    if pixels.dtype == np.uint8:
        return np.asarray(pixels if channels == 3 else pixels[..., np.arange(3) % channels], np.uint8)
    shown = pixels[..., np.arange(3) % channels].astype(np.float32)
    low, high = np.percentile(shown[::4, ::4], SHOWN, axis=(0, 1)).astype(np.float32)
    return np.asarray(((shown - low) / np.maximum(high - low, 1) * 255).clip(0, 255), np.uint8)


def picture(path: Path) -> NDArray[np.uint8]:
    """A file of whatever format in false colour; raises `DataError`."""
    return false_colour(_of_any_format(path, path.read_bytes()))


class ChannelStatistics:
    """Mean and standard deviation of each channel over images, in shares of the depth's range."""

    def __init__(self, form: PixelFormat) -> None:
        self.form, self.count = form, 0
        self._sums = np.zeros((2, form.channels))

    def add(self, pixels: Pixels) -> None:
        """Count an image `(H, W, C)`, of a large one every so many rows and columns."""
        step = max(1, round((pixels.shape[0] * pixels.shape[1] / 250_000) ** 0.5))
        values = pixels[::step, ::step].reshape(-1, self.form.channels) / self.form.highest
        self.count += len(values)
        self._sums += values.sum(axis=0), (values**2).sum(axis=0)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of all images so far, to four digits; 1 as deviation of a channel that never changes."""
        mean, square = self._sums / max(self.count, 1)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        std = np.where(std > 1e-7, std, 1.0)
        return _rounded(mean), _rounded(std)


def _rounded(values: Sequence[float] | NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
