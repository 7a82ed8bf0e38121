"""The embedded data set: scenes that this module draws, so that a first run needs no download.

Six classes that take both form and texture to tell apart (a shaded disc is a ball, a striped disc a melon, a spotted
disc nothing), on backgrounds of similar colours, from 8 pixels to half the image, overlapping, beside distractors of
other forms and fills. Everything follows from a seed. The scenes are written as JPEG with COCO JSON and read back by
the COCO reader, so that the quickstart takes the same road as real data.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from detection.data.records import DataError, Index, Record
from detection.data.writers import write_coco

RECIPE = 1  # raise it whenever the pictures or annotations change: the folder's name holds it
CLASSES = ("ball", "melon", "ring", "tile", "star", "cross")
SPLITS = {"train": ("annotations/train.json", "train"), "val": ("annotations/val.json", "val")}
MIN_VISIBLE = 0.4  # no object is painted over beyond this fraction of its area

Floats = NDArray[Any]  # float32
Form = Callable[[Floats, Floats], Floats]


# Signed distance to a form's edge in units of its radius, negative inside; (u, v) are coordinates in those units.
def _disc(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - 1


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - 0.74) - 0.26


def _half_disc(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.hypot(u, v) - 1, v)


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _bar(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u) - 1, np.abs(v) - 0.25)


def _cross(u: Floats, v: Floats) -> Floats:
    return np.minimum(_bar(u, v), _bar(v, u))


def _polygon(sides: int) -> Form:
    def form(u: Floats, v: Floats) -> Floats:
        sector = np.mod(np.arctan2(v, u), 2 * np.pi / sides) - np.pi / sides
        return np.hypot(u, v) * np.cos(sector) - np.float32(np.cos(np.pi / sides))

    return form


def _star(u: Floats, v: Floats) -> Floats:
    angle = np.abs(np.mod(np.arctan2(v, u), 2 * np.pi / 5) - np.pi / 5)
    radius, inner = np.hypot(u, v), 0.45
    edge_x, edge_y = np.cos(np.pi / 5) - inner, np.sin(np.pi / 5)  # from the inner corner to the tip
    across = edge_y * (radius * np.cos(angle) - inner) - edge_x * radius * np.sin(angle)
    return np.asarray(across / np.hypot(edge_x, edge_y), np.float32)


FILLS = ("flat", "gradient", "stripes", "spots", "shade")
OBJECTS: dict[str, tuple[Form, tuple[str, ...]]] = {
    "ball": (_disc, ("shade",)),
    "melon": (_disc, ("stripes",)),
    "ring": (_ring, FILLS),
    "tile": (_square, ("flat", "gradient", "spots", "shade")),
    "star": (_star, FILLS),
    "cross": (_cross, FILLS),
}
DISTRACTORS: tuple[tuple[Form, tuple[str, ...]], ...] = (
    (_disc, ("spots",)),
    (_square, ("stripes",)),
    (_half_disc, FILLS),
    (_bar, FILLS),
    (_polygon(3), FILLS),
    (_polygon(6), FILLS),
)


def _fill(kind: str, u: Floats, v: Floats, radius: float, rng: np.random.Generator) -> Floats:
    """The share of the second colour at each pixel, 0 to 1."""
    if kind == "flat":
        return np.full_like(u, 0.15)
    if kind == "gradient":
        return (u + 1) / 2
    if kind == "shade":
        return np.clip(np.hypot(u + 0.4, v + 0.4) / 1.7, 0, 1)
    periods = rng.uniform(2.5, 4) if radius > 8 else 2.0
    if kind == "stripes":
        return np.clip(0.5 + 1.5 * np.sin(periods * np.pi * u + rng.uniform(0, 6)), 0, 1)
    return np.clip(0.5 + 2 * np.sin(periods * np.pi * u) * np.sin(periods * np.pi * v), 0, 1)


def _cloud(height: int, width: int, cells: float, channels: int, rng: np.random.Generator) -> Floats:
    """Smooth noise of shape `(height, width, channels)`, about 0 to 1, with `cells` bumps along the height."""
    rows, columns = max(2, round(cells)), max(2, round(cells * width / height))
    grid = rng.random((rows, columns, channels), dtype=np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def _background(height: int, width: int, palette: Floats, rng: np.random.Generator) -> Floats:
    """One of four textures between two or three colours of the palette, `(height, width, 3)` in 0 to 1."""
    kind = rng.integers(4)
    y, x = np.mgrid[:height, :width].astype(np.float32) / height
    blend = _cloud(height, width, 3, 1, rng)
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(6, 22)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    if kind == 0:  # clouds
        blend = 0.5 * blend + 0.3 * _cloud(height, width, 9, 1, rng) + 0.2 * _cloud(height, width, 30, 1, rng)
    elif kind == 1:  # wood
        warp = along + 0.25 * blend[..., 0]
        blend = (0.5 + 0.4 * np.sin(2 * np.pi * frequency * warp))[..., None] * 0.6 + 0.4 * blend
    elif kind == 2:  # paving, each stone a shade of its own
        pitch = rng.integers(14, 40)
        grid = rng.random((height // pitch + 1, width // pitch + 1), dtype=np.float32)
        stones = np.kron(grid, np.ones((pitch, pitch), np.float32))[:height, :width]
        stones[::pitch] = stones[:, ::pitch] = 0
        blend = 0.6 * stones[..., None] + 0.4 * blend
    else:  # facets
        blend = np.ascontiguousarray(0.6 * blend)
        for _ in range(14):
            corners = rng.uniform(-0.2, 1.2, (3, 2)) * (width, height)
            cv2.fillPoly(blend, [corners.astype(np.int32)], float(rng.random()), cv2.LINE_AA)
    image = palette[0] + np.clip(blend, 0, 1) * (palette[1] - palette[0])
    return np.asarray(image + 0.12 * (_cloud(height, width, 5, 3, rng) - 0.5), np.float32)


def _colours(count: int, rng: np.random.Generator) -> Floats:
    """`(count, 3)` colours in 0 to 1 of random hue, saturation and value."""
    hsv = np.stack([rng.uniform(0, 360, count), rng.uniform(0.15, 0.85, count), rng.uniform(0.3, 0.95, count)], axis=1)
    return np.asarray(cv2.cvtColor(hsv[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0])


@dataclass(slots=True)
class _Canvas:
    """A picture in the making.

    Attributes:
        image: `(H, W, 3)` float32 in 0 to 1.
        owner: `(H, W)` int64, the number of the thing seen at each pixel, 0 for background.
        areas: `(T + 1,)` pixels that each thing had when it was painted; entry 0 stands for the background.
        seen: `(T + 1,)` pixels that can be seen of it now.
    """

    image: Floats
    owner: NDArray[np.int64]
    areas: NDArray[np.int64]
    seen: NDArray[np.int64]

    def paint(
        self,
        form: Form,
        kind: str,
        centre: tuple[float, float],
        radius: float,
        colours: Floats,
        rng: np.random.Generator,
        number: int | None = None,
    ) -> bool:
        """Paint one thing with its shadow; False, and nothing painted, where it would hide too much of another.

        `number` adds the pixels to an earlier thing instead of a new one.
        """
        height, width = self.owner.shape
        (cx, cy), reach = centre, 1.3 * radius + 3
        x1, x2 = max(0, int(cx - reach)), min(width, int(cx + reach) + 1)
        y1, y2 = max(0, int(cy - reach)), min(height, int(cy + reach) + 1)
        dy, dx = np.mgrid[y1:y2, x1:x2].astype(np.float32) + np.float32(0.5)
        dx, dy = (dx - np.float32(cx)) / np.float32(radius), (dy - np.float32(cy)) / np.float32(radius)
        angle, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 1.25)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = cos * dx + sin * dy, (cos * dy - sin * dx) * np.float32(squeeze)
        distance = form(u, v) * radius
        owner = self.owner[y1:y2, x1:x2]
        inside = distance < 0
        hidden = np.bincount(owner[inside], minlength=len(self.areas))
        seen = self.seen - hidden
        if (number is None and (seen[1:] < MIN_VISIBLE * self.areas[1:]).any()) or not inside.any():
            return False
        light = radius * 0.12 + 1
        shadow = form(u - cos * np.float32(0.12), v + sin * np.float32(0.12)) * radius
        patch = self.image[y1:y2, x1:x2]
        patch *= (1 - 0.4 * np.clip(0.5 - shadow / (2 * light), 0, 1))[..., None]
        share = _fill(kind, dx, dy, radius, rng) if kind == "shade" else _fill(kind, u, v, radius, rng)
        paint = colours[0] + share[..., None] * (colours[1] - colours[0])
        paint *= (1 - 0.35 * np.exp(-np.square(distance + 1)))[..., None]  # a darker rim
        patch += np.clip(0.5 - distance, 0, 1)[..., None] * (paint - patch)
        owner[inside] = len(self.areas) if number is None else number
        if number is None:
            self.areas, self.seen = np.append(self.areas, inside.sum()), np.append(seen, inside.sum())
        return True


def draw_scene(rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[tuple[int, NDArray[np.bool_], bool]]]:
    """Draw one scene.

    Returns:
        The image `(H, W, 3)` uint8 RGB and its objects, each with its label from 1, the mask `(H, W)` of what is seen
        of it, and whether it is a crowd.
    """
    height, width = rng.integers(160, 225, 2)
    palette = _colours(5, rng)
    owner = np.zeros((height, width), np.int64)
    canvas = _Canvas(
        _background(height, width, palette, rng), owner, areas=np.zeros(1, np.int64), seen=np.zeros(1, np.int64)
    )
    count = 0 if rng.random() < 0.05 else int(rng.integers(1, 11))
    radii = np.exp(rng.uniform(np.log(4), np.log(min(height, width) / 4), count + 4))
    labels = rng.integers(1, len(CLASSES) + 1, count + 4)
    labels[rng.permutation(count + 4)[:4]] = 0  # four of the things are distractors
    objects: list[tuple[int, int, bool]] = []  # label, number on the canvas, crowd
    for label, radius in sorted(zip(labels.tolist(), radii.tolist(), strict=True), key=lambda t: -t[1]):
        form, fills = OBJECTS[CLASSES[label - 1]] if label else DISTRACTORS[rng.integers(len(DISTRACTORS))]
        colours = _contrast(_colours(2, rng) if rng.random() < 0.6 else palette[rng.permutation(5)[:2]], rng)
        for _ in range(5):
            centre = rng.uniform(0.6 * radius, width - 0.6 * radius), rng.uniform(0.6 * radius, height - 0.6 * radius)
            if canvas.paint(form, str(rng.choice(fills)), centre, radius, colours, rng):
                if label:
                    objects.append((label, len(canvas.areas) - 1, False))
                break
    if count and rng.random() < 0.04:
        objects += _crowd(canvas, rng)
    image = _photograph(canvas.image, rng)
    return image, [(label, canvas.owner == number, crowd) for label, number, crowd in objects]


def _contrast(colours: Floats, rng: np.random.Generator) -> Floats:
    """The colours, the second darkened or lightened so that a pattern of the two shows."""
    second = colours[1] * 0.35 if colours[0].mean() > 0.5 else 1 - 0.45 * (1 - colours[1])
    return np.stack([colours[0], second]).astype(np.float32)


def _crowd(canvas: _Canvas, rng: np.random.Generator) -> list[tuple[int, int, bool]]:
    """A heap of small things of one class in a free place, annotated as one crowd."""
    height, width = canvas.owner.shape
    label, number = int(rng.integers(1, len(CLASSES) + 1)), len(canvas.areas)
    form, fills = OBJECTS[CLASSES[label - 1]]
    centre, colours = rng.uniform(25, (width - 25, height - 25)), _contrast(_colours(2, rng), rng)
    x, y = centre.astype(int)
    if canvas.owner[y - 22 : y + 22, x - 22 : x + 22].any():
        return []
    canvas.areas, canvas.seen = np.append(canvas.areas, 0), np.append(canvas.seen, 0)
    for offset in rng.uniform(-14, 14, (10, 2)):
        cx, cy = centre + offset
        canvas.paint(form, str(rng.choice(fills)), (cx, cy), rng.uniform(4, 6), colours, rng, number)
    return [(label, number, True)]


def _photograph(image: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light from one side, a little blur and grain."""
    height, width = image.shape[:2]
    light = _slope(width, rng)[None, :, None]
    image = image * light * _slope(height, rng)[:, None, None]
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(0.005, 0.04))
    return np.clip((image + grain) * 255, 0, 255).astype(np.uint8)


def _slope(length: int, rng: np.random.Generator) -> Floats:
    first, last = rng.uniform(0.75, 1.15, 2)
    return np.linspace(first, last, length, dtype=np.float32)


def default_folder() -> Path:
    """Where scenes go when no folder is named: `detection` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "detection"


def location(folder: Path, train: int = 600, val: int = 120, seed: int = 0) -> Path:
    """The data root that `draw` makes in `folder`; another recipe, size or seed has another name."""
    return folder / f"scenes-{RECIPE}-{train}-{val}-{seed}"


def check_folder(folder: Path) -> None:
    """Raise a DataError where a folder holds files that are not ours: scenes are never drawn beside somebody's data."""
    there = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if there and not any(name.startswith("scenes-") for name in there):
        raise DataError(
            f"{folder}: scenes are not drawn into a folder that holds something else ({sorted(there)[0]}); leave "
            "data.format out to read what is there, or name an empty folder"
        )


def draw(folder: Path, train: int = 600, val: int = 120, seed: int = 0) -> Path:
    """Draw the data set into `folder` unless it lies there, and return its root.

    It is drawn in a temporary folder that takes its final name when it is complete, so an interrupted run leaves
    nothing half done and several processes may call this at once.
    """
    root = location(folder, train, val, seed)
    if root.is_dir():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=folder))
    try:
        (work / "annotations").mkdir()
        for number, (split, count) in enumerate([("train", train), ("val", val)]):
            annotations, images = SPLITS[split]
            (work / images).mkdir()
            records = [_draw_record(work / images, i, np.random.default_rng([seed, number, i])) for i in range(count)]
            index = Index(work, CLASSES, tuple(range(1, len(CLASSES) + 1)), records)
            write_coco(index, work / annotations)
        work.chmod(0o755)  # mkdtemp makes it private
        try:
            work.rename(root)
        except OSError:
            if not root.is_dir():  # else another process was faster, with the same pictures
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def _draw_record(images: Path, number: int, rng: np.random.Generator) -> Record:
    """Draw one scene, write its JPEG, return its annotations."""
    image, objects = draw_scene(rng)
    height, width = image.shape[:2]
    name = f"{number:06d}.jpg"
    options = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(80, 96))]
    encoded = cv2.imencode(".jpg", image[..., ::-1], options)[1]
    (images / name).write_bytes(encoded.tobytes())
    spans = [(np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))) for _, mask, _ in objects]
    boxes = [(x[0], y[0], x[-1] + 1, y[-1] + 1) for x, y in spans]
    return Record(
        image_id=number + 1,
        file_name=name,
        width=width,
        height=height,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array([label for label, _, _ in objects], np.int64),
        areas=np.array([mask.sum() for _, mask, _ in objects], np.float32),
        iscrowd=np.array([crowd for _, _, crowd in objects], np.bool_),
        difficult=np.zeros(len(objects), np.bool_),
        annotation_ids=np.arange(len(objects), dtype=np.int64),
        segments=[rle.encode(np.asfortranarray(mask, np.uint8)) for _, mask, _ in objects],
    )
