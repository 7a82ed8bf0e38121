"""The gallery of a report: every image with its boxes, as data that the page filters, and its pictures.

The data is one JSON block. Of each image it has whole numbers alone, one after the other:
    objects: x, y, width, height, class, size            of each object; crowds are left out
    layers: of each detector
        boxes: the same, then score, kind, true class    of each detection
        objects: found, near, undetected                 of each object, in the order above
Classes count from 0, sizes are 0 small, 1 medium, 2 large by area; on the border between two the smaller. Scores are
thousandths, rounded down. The kind is that of `analysis.Analysis`, the true class the row of the confusion matrix: -1
outside of it. Found is the score of an object's right detection, near the best of those that are right or would be if
they were mended, -1 without any; undetected is 1 in the last column of the matrix.
"""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import cv2
import numpy as np
from faster_coco_eval import mask as mask_api
from numpy.typing import NDArray

from detection.data.spectral import Pixels, false_colour
from detection.evaluation import plots
from detection.evaluation.analysis import IGNORED, MISTAKES, RIGHT, Analysis, confusions
from detection.evaluation.coco_eval import AREA_LIMITS, AREAS, Ints, SortedBoxes
from detection.evaluation.gallery_looks import COMPARED, CONTROLS
from detection.evaluation.results import ImageResult, Rle

CONFIDENT = 0.5  # score of the detections in the confusion matrix
FOUND, LOST, MISSED = range(IGNORED + 1, IGNORED + 4)  # kinds of objects: found, with a wrong detection, with none
OBJECT_KINDS = ("found object", "object with a wrong detection", "missed object")
FOUND_COLOUR = "#8fa3b8"
SHOWN: dict[str, tuple[tuple[int, ...], str]] = {  # what can be asked for: its kinds and colour
    "right": ((RIGHT,), plots.COLOURS[RIGHT]),
    **{name: ((kind,), plots.COLOURS[kind]) for kind, (name, _) in MISTAKES.items()},
    "missed": ((MISSED,), plots.MISSED),
    "all false positives": (tuple(MISTAKES), plots.FAINT),
    "all false negatives": ((LOST, MISSED), plots.FAINT),
}
# Longer sides of pictures, and for up to how many images they are as large: a photograph of 256 pixels takes about
# 6 kB, so that 5,000 take 40 MB as text.
SIDES = ((720, 600), (512, 1200), (384, 2400), (256, None))
QUALITY = 50  # of WebP
ROOM = 57_000_000  # bytes of boxes and pictures in a page, which stays below 60 MB; more, and pictures go beside it
CHUNK = 100  # pictures that are unpacked together
OUTLINED, OUTLINE_SCORE = 1000, 0.3  # images up to which masks are drawn, and the least score of those detections


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where the pictures of a gallery come from and go to.

    Attributes:
        load: gives the pixels `(H, W, C)` of an image, in several threads; None where they are not at hand.
        folder: of the page.
        name: of the folder beside it, where they have no room in the page.
        beside: put them there in any case.
    """

    load: Callable[[ImageResult], Pixels] | None
    folder: Path
    name: str
    beside: bool = False


def link(text: str, **wanted: str) -> str:
    """HTML of a link to what the gallery shows for these filters; the text is escaped here."""
    return f'<a href="{escape(fragment(**wanted))}">{escape(text)}</a>'


def fragment(**wanted: str) -> str:
    """The end of an address that stands for filters, e.g. `#class=car&size=small`."""
    return f"#{urlencode(wanted)}"


def gallery(
    results: Sequence[ImageResult],
    names: Sequence[str],
    layers: Mapping[str, Analysis],
    pictures: Pictures,
    change: NDArray[np.float64] | None = None,
) -> str:
    """The HTML of a gallery; it belongs on a page once, with `gallery_looks.STYLE` and `SCRIPT`.

    Args:
        results: all images; masks are outlined, and key points crossed, where there is one layer.
        names: C classes.
        layers: name -> mistakes of each detector, one or two.
        pictures: written into the page, or beside it.
        change: `(I,)` of two detectors, how much lighter the mistakes of the first weigh, over all their runs.
    """
    data = as_script(block(results, names, layers, change))
    where, chunks = ("", []) if pictures.load is None else _pictures(results, pictures, ROOM - len(data.encode()))
    parts = "".join(f'<script type="text/plain" class="pictures">{chunk}</script>' for chunk in chunks)
    controls = CONTROLS.format(compared=COMPARED if len(layers) > 1 else "")
    return f'{controls}<script type="application/json" id="gallery-data"{where}>{data}</script>{parts}'


def block(
    results: Sequence[ImageResult],
    names: Sequence[str],
    layers: Mapping[str, Analysis],
    change: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """What the page knows of the images, see the head of this module."""
    count, first = len(results), next(iter(layers.values())).gt
    order = np.lexsort((-first.areas, first.image))  # the smallest last, so that it can be pointed at
    order = order[~first.crowd[order]]
    objects = _split(first.image[order], _boxes(first)[order], count)
    images: list[dict[str, Any]] = [
        {"file": r.file_name, "id": str(r.image_id), "size": [r.size[1], r.size[0]], "objects": own, "layers": []}
        for r, own in zip(results, objects, strict=True)
    ]
    for judged in layers.values():
        boxes, states, places = _layer(judged)
        in_image = np.lexsort((-judged.dt.areas, judged.dt.image))
        own = _split(judged.dt.image[in_image], boxes[in_image], count)
        seen = _split(first.image[order], states[order], count)
        for image, found, known in zip(images, own, seen, strict=True):
            image["layers"].append({"boxes": found, "objects": known})
        has_more = count and (results[0].gt_masks is not None or results[0].gt_keypoints is not None)
        if len(layers) == 1 and count <= OUTLINED and has_more:
            _outline(images, results, places[in_image], judged, order, in_image)
    if change is not None:
        for image, value in zip(images, change, strict=True):
            image["change"] = round(float(value), 3)
    colours = [plots.COLOURS.get(kind, FOUND_COLOUR) for kind in range(IGNORED + 1)]
    return {
        "classes": list(names),
        "layers": list(layers),
        "shown": [{"name": name, "kinds": kinds, "colour": colour} for name, (kinds, colour) in SHOWN.items()],
        "kinds": ["right", *(name for name, _ in MISTAKES.values()), "not judged", *OBJECT_KINDS],
        "colours": [*colours, FOUND_COLOUR, plots.MISSED, plots.MISSED],
        "sizes": list(AREAS[1:]),
        "images": images,
    }


def as_script(content: Any) -> str:
    """JSON that can't end the script that it stands in, whatever names are in it."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def side_of(count: int) -> int:
    """The longer side of the pictures of so many images, in pixels."""
    return next(side for side, most in SIDES if most is None or count <= most)


def _boxes(boxes: SortedBoxes) -> Ints:
    """`(n, 6)`: x, y, width, height, class, size."""
    corners = np.rint(np.concatenate([boxes.boxes[:, :2], boxes.boxes[:, :2] + boxes.boxes[:, 2:]], 1)).astype(np.int64)
    size = (boxes.areas[:, None] > AREA_LIMITS[1:-1, 1]).sum(1)
    return np.column_stack([corners[:, :2], corners[:, 2:] - corners[:, :2], boxes.label - 1, size])


def _layer(judged: Analysis) -> tuple[Ints, Ints, Ints]:
    """`(D, 9)` of the detections, `(N, 3)` of the objects, and the place of each detection in its image."""
    cells = confusions(judged, CONFIDENT)
    true = np.full(len(judged.kind), -1)
    true[cells.detection[cells.detection >= 0]] = cells.true[cells.detection >= 0]
    score = np.floor(1000 * judged.dt.scores.astype(np.float64)).astype(np.int64)
    found = np.full(len(judged.found), -1)
    found[judged.owner[judged.kind == RIGHT]] = score[judged.kind == RIGHT]
    near = found.copy()
    near[judged.owner[judged.mended]] = score[judged.mended]
    undetected = np.zeros(len(judged.found), np.int64)
    undetected[cells.object[cells.detection < 0]] = 1
    boxes = np.column_stack([_boxes(judged.dt), score, judged.kind, true])
    return boxes, np.column_stack([found, near, undetected]), judged.dt.place


def _split(image: Ints, rows: Ints, count: int) -> list[list[int]]:
    """The rows of each image, one after the other; sorted by image."""
    ends = np.searchsorted(image, np.arange(1, count))
    return [part.ravel().tolist() for part in np.split(rows, ends)][:count]


def _outline(
    images: list[dict[str, Any]],
    results: Sequence[ImageResult],
    places: Ints,
    judged: Analysis,
    objects: Ints,
    detections: Ints,
) -> None:
    """Add SVG paths of each object, and of each detection of some score, else None.

    They are the outlines of masks; without those, boxes with a cross at each key point.
    """
    side = side_of(len(images))
    for image in images:
        image["outlines"], image["layers"][0]["outlines"] = [], []
    for i, place in zip(judged.gt.image[objects], judged.gt.place[objects], strict=True):
        of = results[i]
        path = _crosses(of.gt_boxes[place], None if of.gt_keypoints is None else of.gt_keypoints[place], of.size)
        images[i]["outlines"].append(path if of.gt_masks is None else _path(of.gt_masks[place], side))
    for i, place, score in zip(judged.dt.image[detections], places, judged.dt.scores[detections], strict=True):
        of = results[i]
        path = _crosses(of.boxes[place], None if of.keypoints is None else of.keypoints[place], of.size)
        path = path if of.masks is None else _path(of.masks[place], side)
        images[i]["layers"][0]["outlines"].append(path if score >= OUTLINE_SCORE else None)


def _crosses(box: NDArray[Any], points: NDArray[Any] | None, size: tuple[int, int]) -> str | None:
    """A box and a cross at each key point that is annotated, or detected, as the data of an SVG path."""
    if points is None:
        return None
    x1, y1, x2, y2 = (f"{value:.1f}" for value in box.tolist())
    arm = max(1.0, max(size) / 100)
    seen = [(x, y) for x, y, v in points.tolist() if v > 0]
    crosses = [f"M{x - arm:.1f} {y:.1f}h{2 * arm:.1f}M{x:.1f} {y - arm:.1f}v{2 * arm:.1f}" for x, y in seen]
    return f"M{x1} {y1}H{x2}V{y2}H{x1}Z" + "".join(crosses)


def _path(mask: Rle, side: int) -> str:
    """The outline as the data of an SVG path, no finer than the picture shows."""
    pixels = np.ascontiguousarray(mask_api.decode(mask))
    lines, _ = cv2.findContours(pixels, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    fine = max(1.0, max(pixels.shape) / side)
    rings = [cv2.approxPolyDP(line, fine, True).reshape(-1, 2).tolist() for line in lines]
    return "".join("M" + "L".join(f"{x} {y}" for x, y in ring) + "Z" for ring in rings)


def _pictures(results: Sequence[ImageResult], pictures: Pictures, room: int) -> tuple[str, list[str]]:
    """Where the pictures are, as attributes, and their text: `CHUNK` of them together, a line each; none if beside."""
    side, load = side_of(len(results)), pictures.load
    assert load is not None

    def small(result: ImageResult) -> bytes:
        return _thumbnail(false_colour(load(result)), side)

    # Readers silence warnings for a moment, and threads that do may leave them silenced: here alone, then.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        all_of = list(pool.map(small, results))
    beside = pictures.folder / pictures.name
    for old in beside.glob("[0-9]*.webp"):
        old.unlink()
    if not pictures.beside and sum(map(len, all_of)) * 4 / 3 <= room:
        lines = [base64.b64encode(webp).decode() for webp in all_of]
        return f' data-chunk="{CHUNK}"', ["\n".join(lines[i : i + CHUNK]) for i in range(0, len(lines), CHUNK)]
    beside.mkdir(parents=True, exist_ok=True)
    for i, webp in enumerate(all_of):
        (beside / f"{i:06}.webp").write_bytes(webp)
    return f' data-folder="{pictures.name}"', []


def _thumbnail(pixels: NDArray[np.uint8], side: int) -> bytes:
    """An image `(H, W, 3)` as WebP whose longer side is no longer than `side`."""
    scale = min(1.0, side / max(pixels.shape[:2]))
    size = [max(1, round(scale * length)) for length in pixels.shape[1::-1]]
    shrunk = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    _, webp = cv2.imencode(".webp", cv2.cvtColor(shrunk, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, QUALITY])
    return webp.tobytes()
