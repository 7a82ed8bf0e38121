"""Pictures of images with boxes: colours by class, names and scores that can be read at any image size."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detection.data import rle
from detection.data.spectral import Pixels, false_colour

Colour = tuple[int, int, int]
Names = Literal["auto", "all", "none"]
PALETTE = (  # for the first classes; neighbours differ most
    (66, 117, 245), (255, 179, 38), (222, 60, 205), (77, 214, 92), (240, 68, 56), (46, 217, 230),
    (146, 88, 222), (214, 232, 60), (255, 145, 178), (22, 148, 130), (196, 124, 62), (150, 172, 200),
)  # fmt: skip
UNTRACKED = (150, 150, 150)  # what has no id yet
SMALLEST_SIDE = 320  # pixels of the longer side, below which names would hide the picture
SMALLEST_TEXT = 9  # pixels, to which names shrink where they would cover too much
COVERED = 0.1  # of the picture, which names cover at most
HIDDEN = 0.25  # of a name, which others may hide; then it is left out
GOLDEN_RATIO = 0.618033988749895  # of the colour circle, for the others: never twice the same


@cache
def class_colour(label: int) -> Colour:
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
    names: Names = "auto",
    line_width: int | None = None,
    colours: Sequence[Colour] | None = None,
    keypoints: NDArray[Any] | None = None,
    edges: Sequence[tuple[int, int]] = (),
    ids: NDArray[Any] | None = None,
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
        names: `auto` shrinks the names where they would cover more than a tenth of the picture, and then leaves those
            of the lowest scores out; `all` writes each, `none` no name.
        line_width: of the boxes, in pixels of the result; None takes a 300th of its longer side.
        colours: RGB of each object; None takes those of the classes, or of the ids.
        keypoints: `(N, k, 3)` x, y in pixels of `image` and visibility; those at 0 are not drawn.
        edges: positions of key points to join by a line, where both are drawn.
        ids: `(N,)` of the objects of a film, from 1 on, written behind the names; -1 of those without, which are grey.
    """
    if ids is not None and colours is None:
        colours = [class_colour(int(own)) if own > 0 else UNTRACKED for own in ids]
    colours = colours if colours is not None else [class_colour(int(label)) for label in labels]
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
        picture.paste(colours[i], (0, 0), shape)
    pen = ImageDraw.Draw(picture)
    places = np.asarray(boxes, np.float64).reshape(-1, 4) * scale
    for i in order:
        x1, y1, x2, y2 = places[i]
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        pen.rectangle(corners, outline=colours[i], width=line_width or max(1, round(side / 300)))
    for i in order if keypoints is not None else ():
        draw_points(pen, np.asarray(keypoints)[i] * (scale, scale, 1), colours[i], edges, max(2.0, side / 160))  # type: ignore[index]
    kinds = [class_names[int(label) - 1] for label in labels]
    if ids is not None:
        kinds = [f"{kind} #{own}" if own > 0 else kind for kind, own in zip(kinds, ids, strict=True)]
    texts = [kinds[i] + ("" if scores is None else f" {scores[i]:.2f}") for i in order[::-1]]
    tags = Tags(pen, size, texts if names == "auto" else None)
    for i, text in zip(order[::-1], texts if names != "none" else (), strict=False):
        tags.write(places[i], text, colours[i])  # above all boxes; the best choose their places first
    return picture


def draw_points(
    pen: ImageDraw.ImageDraw, points: NDArray[Any], colour: Colour, edges: Sequence[tuple[int, int]], radius: float
) -> None:
    """Draw the key points `(k, 3)` of one object that are annotated, and the lines between them.

    Args:
        pen: draws on the picture.
        points: in its pixels.
        colour: of the lines; the points are white with a rim of it.
        edges: positions of the points that a line joins.
        radius: of a point, in pixels.
    """
    for a, b in edges:
        if points[a, 2] > 0 and points[b, 2] > 0:
            pen.line([*points[a, :2], *points[b, :2]], fill=colour, width=max(1, round(radius * 0.8)))
    for x, y, seen in points.tolist():
        if seen > 0:
            corners = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse(corners, fill="white", outline=colour, width=max(1, round(radius / 3)))


class Tags:
    """Writes names at boxes so that all of each lies in the picture and none hides another, where there is room.

    Args:
        pen: draws on the picture.
        size: its width and height.
        texts: those to come, which share a tenth of the picture: they shrink, and what finds no room is left out. None
            writes each that comes, at full size.
    """

    def __init__(self, pen: ImageDraw.ImageDraw, size: tuple[int, int], texts: Sequence[str] | None = None) -> None:
        self._pen, self._size = pen, size
        self._height = text_size(size)
        self._taken = np.zeros((0, 4))
        self._left = float("inf")  # pixels that names may still cover
        if texts:
            self._left = COVERED * size[0] * size[1]
            wanted = sum(width * height for width, height, *_ in map(self._measure, texts))
            shrunk = int(self._height * min(1.0, (self._left / wanted) ** 0.5))
            self._height = min(self._height, max(SMALLEST_TEXT, shrunk))

    def write(self, box: Sequence[float] | NDArray[Any], text: str, colour: Colour) -> None:
        """Write `text` on a ground of `colour` at the box `(4,)` xyxy, in pixels of the picture."""
        width, height, start, font = self._measure(text)
        x, y, hidden = self._place(np.asarray(box, np.float64), width, height)
        if self._left < float("inf") and ((len(self._taken) and width * height > self._left) or hidden > HIDDEN):
            return
        self._left -= width * height
        self._taken = np.vstack([self._taken, (x, y, x + width, y + height)])
        self._pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        self._pen.text((x + start[0], y + start[1]), text, fill="black" if light else "white", font=font)

    def _measure(self, text: str) -> tuple[float, float, tuple[float, float], Any]:
        """Width and height of the ground, where on it the text starts, and its font."""
        rim = max(1, self._height // 6)
        length = self._pen.textlength(text, font=_font(self._height)) + 2 * rim
        font = _font(max(6, min(self._height, int(self._height * self._size[0] / length))))  # as long as the picture
        left, top, right, bottom = self._pen.textbbox((0, 0), text, font=font)
        return right - left + 2 * rim, bottom - top + 2 * rim, (rim - left, rim - top), font

    def _place(self, box: NDArray[Any], width: float, height: float) -> tuple[int, int, float]:
        """The first of the places around the box that is free, else where the least is hidden, and its share of it."""
        x1, y1, x2, y2 = box
        rows = [y1 - height, y1, y2, y2 - height, (y1 + y2 - height) / 2]  # above, inside at the top, below, ...
        columns = [x1, x2 - width, (x1 + x2 - width) / 2]
        corners = np.array([(x, y) for y in rows for x in columns])
        corners = np.clip(corners, 0, np.maximum(np.array(self._size) - (width, height), 0)).round()
        low = np.maximum(corners[:, None], self._taken[:, :2])
        high = np.minimum(corners[:, None] + (width, height), self._taken[:, 2:])
        hidden = np.maximum(high - low, 0).prod(axis=2).sum(axis=1)  # pixels, at each of the places
        best = int(np.argmin(hidden))
        return int(corners[best, 0]), int(corners[best, 1]), float(hidden[best]) / (width * height)


def text_size(size: tuple[int, int]) -> int:
    """Height of text in a picture of that width and height: 11 pixels up to a side of 500, then in proportion."""
    return min(max(11, round(max(size) / 45)), max(6, min(size) // 3))


def side_by_side(
    pairs: Sequence[tuple[Image.Image, Image.Image]],
    titles: tuple[str, str],
    columns: int = 2,
    legend: Mapping[str, Colour] | None = None,
) -> Image.Image:
    """A sheet of pairs of pictures, `columns` pairs a row, the titles above each column of pictures.

    Args:
        pairs: of pictures.
        titles: of the left and the right ones.
        columns: pairs a row.
        legend: what each colour means, in a line above all.
    """
    cell = (max(p.width for pair in pairs for p in pair), max(p.height for pair in pairs for p in pair))
    columns = min(columns, len(pairs))
    rows, gap, line = -(-len(pairs) // columns), 6, 24
    head = 2 * line if legend else line
    width, height = columns * (2 * cell[0] + 3 * gap), head + rows * (cell[1] + gap)
    sheet = Image.new("RGB", (width, height), (24, 24, 24))
    pen, x = ImageDraw.Draw(sheet), gap
    for text, colour in (legend or {}).items():
        pen.rectangle((x, 6, x + 13, 19), fill=colour)
        pen.text((x + 20, 4), text, fill="white", font=_font(14))
        x += 40 + round(pen.textlength(text, font=_font(14)))
    for number, pair in enumerate(pairs):
        row, column = divmod(number, columns)
        for k, picture in enumerate(pair):
            x = column * (2 * cell[0] + 3 * gap) + k * (cell[0] + gap) + gap
            sheet.paste(picture, (x, head + row * (cell[1] + gap)))
            if row == 0:
                pen.text((x, head - line + 4), titles[k], fill="white", font=_font(14))
    return sheet
