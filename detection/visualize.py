"""Pictures of images with boxes: colours by class, names and scores that can be read at any image size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detection.data import rle
from detection.data.spectral import Pixels, false_colour

PALETTE = (  # for the first classes; neighbours differ most
    (66, 117, 245), (255, 179, 38), (222, 60, 205), (77, 214, 92), (240, 68, 56), (46, 217, 230),
    (146, 88, 222), (214, 232, 60), (255, 145, 178), (22, 148, 130), (196, 124, 62), (150, 172, 200),
)  # fmt: skip
SMALLEST_SIDE = 320  # pixels of the longer side, below which names would hide the picture
GOLDEN_RATIO = 0.618033988749895  # of the colour circle, for the others: never twice the same


@cache
def class_colour(label: int) -> tuple[int, int, int]:
    """RGB of a class from 1 on, the same in every picture."""
    if label <= len(PALETTE):
        return PALETTE[label - 1]
    red, green, blue = colorsys.hsv_to_rgb((label * GOLDEN_RATIO) % 1.0, 0.85, (1.0, 0.8, 0.9)[label % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def draw_objects(
    image: Pixels,
    boxes: NDArray[Any],
    labels: NDArray[Any],
    class_names: Sequence[str],
    scores: NDArray[Any] | None = None,
    masks: Sequence[dict[str, Any]] | None = None,
    side: int | None = 480,
) -> Image.Image:
    """The image with its objects, scaled so that its longer side is `side` pixels; text grows with that, not with it.

    Args:
        image: `(H, W, 3)` uint8 RGB; any other channels and 16 bits are shown in false colour.
        boxes: `(N, 4)` xyxy in pixels of `image`.
        labels: `(N,)` from 1 on.
        class_names: of label 1 first.
        scores: `(N,)` in [0, 1], written behind the names; the lowest are drawn first.
        masks: COCO RLE of each object, in the size of `image`; its pixels take on half of the class's colour.
        side: longer side of the result; None keeps the image's own size, unless that has no room for text.
    """
    image = false_colour(image)
    side = side or max(SMALLEST_SIDE, *image.shape[:2])
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    order = np.argsort(scores, kind="stable") if scores is not None else np.arange(len(boxes))
    if scale < 1:  # before Pillow copies it, for a picture may be huge
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    picture = Image.fromarray(image)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    for i in order if masks is not None else ():
        shape = Image.fromarray(rle.decode(masks[i]) * np.uint8(128)).resize(size, Image.Resampling.BILINEAR)  # type: ignore[index]
        picture.paste(class_colour(int(labels[i])), (0, 0), shape)
    pen = ImageDraw.Draw(picture)
    places = np.asarray(boxes, np.float64).reshape(-1, 4) * scale
    for i in order:
        x1, y1, x2, y2 = places[i]
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        pen.rectangle(corners, outline=class_colour(int(labels[i])), width=max(1, round(side / 300)))
    tags = Tags(pen, size)
    for i in order[::-1]:  # above all boxes; the best choose their places first
        text = class_names[int(labels[i]) - 1] + ("" if scores is None else f" {scores[i]:.2f}")
        tags.write(places[i], text, class_colour(int(labels[i])))
    return picture


class Tags:
    """Writes names at boxes so that all of each lies in the picture and none hides another, where there is room.

    Args:
        pen: draws on the picture.
        size: its width and height.
    """

    def __init__(self, pen: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
        self._pen, self._size = pen, size
        self._height = text_size(size)
        self._taken = np.zeros((0, 4))

    def write(self, box: Sequence[float] | NDArray[Any], text: str, colour: tuple[int, int, int]) -> None:
        """Write `text` on a ground of `colour` at the box `(4,)` xyxy, in pixels of the picture."""
        rim = max(1, self._height // 6)
        length = self._pen.textlength(text, font=_font(self._height)) + 2 * rim
        font = _font(
            max(6, min(self._height, int(self._height * self._size[0] / length)))
        )  # no longer than the picture
        left, top, right, bottom = self._pen.textbbox((0, 0), text, font=font)
        width, height = right - left + 2 * rim, bottom - top + 2 * rim
        x, y = self._place(np.asarray(box, np.float64), width, height)
        self._taken = np.vstack([self._taken, (x, y, x + width, y + height)])
        self._pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        self._pen.text((x + rim - left, y + rim - top), text, fill="black" if light else "white", font=font)

    def _place(self, box: NDArray[Any], width: float, height: float) -> tuple[int, int]:
        """The first of the places around the box that is free, else the one where the least is hidden."""
        x1, y1, x2, y2 = box
        rows = [y1 - height, y1, y2, y2 - height, (y1 + y2 - height) / 2]  # above, inside at the top, below, ...
        columns = [x1, x2 - width, (x1 + x2 - width) / 2]
        corners = np.array([(x, y) for y in rows for x in columns])
        corners = np.clip(corners, 0, np.maximum(np.array(self._size) - (width, height), 0)).round()
        low = np.maximum(corners[:, None], self._taken[:, :2])
        high = np.minimum(corners[:, None] + (width, height), self._taken[:, 2:])
        hidden = np.maximum(high - low, 0).prod(axis=2).sum(axis=1)  # pixels, at each of the places
        best = corners[int(np.argmin(hidden))]
        return int(best[0]), int(best[1])


def text_size(size: tuple[int, int]) -> int:
    """Height of text in a picture of that width and height: 11 pixels up to a side of 500, then in proportion."""
    return min(max(11, round(max(size) / 45)), max(6, min(size) // 3))


def side_by_side(
    pairs: Sequence[tuple[Image.Image, Image.Image]], titles: tuple[str, str], columns: int = 2
) -> Image.Image:
    """A sheet of pairs of pictures, `columns` pairs a row, the titles above each column of pictures."""
    cell = (max(p.width for pair in pairs for p in pair), max(p.height for pair in pairs for p in pair))
    columns = min(columns, len(pairs))
    rows, gap, head = -(-len(pairs) // columns), 6, 24
    width, height = columns * (2 * cell[0] + 3 * gap), head + rows * (cell[1] + gap)
    sheet = Image.new("RGB", (width, height), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for number, pair in enumerate(pairs):
        row, column = divmod(number, columns)
        for k, picture in enumerate(pair):
            x = column * (2 * cell[0] + 3 * gap) + k * (cell[0] + gap) + gap
            sheet.paste(picture, (x, head + row * (cell[1] + gap)))
            if row == 0:
                pen.text((x, 4), titles[k], fill="white", font=_font(14))
    return sheet
