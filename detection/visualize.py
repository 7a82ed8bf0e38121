"""Pictures of images with boxes: colours by class, names and scores that can be read at any image size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detection.data import rle

Pixels = NDArray[np.uint8]
PALETTE = (  # for the first classes; neighbours differ most
    (66, 117, 245), (255, 179, 38), (222, 60, 205), (77, 214, 92), (240, 68, 56), (46, 217, 230),
    (146, 88, 222), (214, 232, 60), (255, 145, 178), (22, 148, 130), (196, 124, 62), (150, 172, 200),
)  # fmt: skip
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
    side: int = 480,
) -> Image.Image:
    """The image with its objects, scaled so that its longer side is `side` pixels; text keeps its size.

    Args:
        image: `(H, W, 3)` uint8 RGB.
        boxes: `(N, 4)` xyxy in pixels of `image`.
        labels: `(N,)` from 1 on.
        class_names: of label 1 first.
        scores: `(N,)` in [0, 1], written behind the names; the lowest are drawn first.
        masks: COCO RLE of each object, in the size of `image`; its pixels take on half of the class's colour.
        side: longer side of the result.
    """
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    order = np.argsort(scores, kind="stable") if scores is not None else range(len(boxes))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    for i in order if masks is not None else ():
        shape = Image.fromarray(rle.decode(masks[i]) * np.uint8(128)).resize(size, Image.Resampling.BILINEAR)  # type: ignore[index]
        picture.paste(class_colour(int(labels[i])), (0, 0), shape)
    pen = ImageDraw.Draw(picture)
    tags = []
    for i in order:
        x1, y1, x2, y2 = (float(v) * scale for v in boxes[i])
        colour = class_colour(int(labels[i]))
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=max(1, side // 240))
        text = class_names[int(labels[i]) - 1] + ("" if scores is None else f" {scores[i]:.2f}")
        tags.append((x1, y1, text, colour))
    for x, y, text, colour in tags:  # above all boxes
        write_tag(pen, (x, y), text, colour, size)
    return picture


def write_tag(
    pen: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    size: tuple[int, int],
) -> None:
    """Write `text` on a ground of `colour` above `corner`, moved so that all of it lies in a picture of `size`."""
    font = _font(11)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0.0, min(corner[0], size[0] - width))
    y = max(0.0, min(corner[1] - height, size[1] - height))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((x + 2 - left, y + 2 - top), text, fill="black" if light else "white", font=font)


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
