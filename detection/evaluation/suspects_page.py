"""The sheet of suspects: one HTML page with a picture of each place, filtered by kind and class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import cv2
import numpy as np

from detection.data.spectral import Pixels, false_colour
from detection.evaluation.page import PAGE, SCRIPT, STYLE
from detection.evaluation.report import _data, dot, section, table
from detection.evaluation.suspect_files import Judged
from detection.evaluation.suspicion import KINDS, Labelled, Partly, Suspect

CONTEXT = 0.6  # of the longer side of the boxes, shown on each side of them
LEAST_SIDE = 64  # pixels of the image, for boxes of a few
PICTURE = 300  # pixels of a picture
ANNOTATED, FOUND = "#ffb020", "#2f81f7"
KIND_COLOURS = {"missing": "#2f81f7", "class": "#d6409f", "box": "#e5a000", "spurious": "#8fa3b8"}
NOTE = (
    f"{dot(ANNOTATED)}dashed: the annotation. {dot(FOUND)}solid: what a detector finds that has not trained on this "
    "image. The percentage is the suspicion: how often detections and annotations agree in like cases."
)
PARTLY_NOTE = (
    "More than half of what is confidently found of a class has no annotation: annotate all of the image, or none of "
    "the class. In such images one missing annotation more surprises less, so it comes later in the list above."
)
FIGURES = """
figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
figure[hidden] { display: none; }
figure .frame { position: relative; background: #10151d; }
figure img, figure svg { display: block; width: 100%; height: auto; }
figure svg { position: absolute; inset: 0; height: 100%; }
figcaption { padding: .5rem .8rem; font-size: .85rem; line-height: 1.35; color: var(--soft); overflow-wrap: anywhere; }
figcaption b { color: var(--ink); }
rect { fill: transparent; stroke: var(--colour); stroke-width: 2.5; vector-effect: non-scaling-stroke; }
rect.unsure { stroke-dasharray: 6 4; }
"""
OWN_STYLE = """
.suspects { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(190px, 46%), 1fr)); gap: .8rem; }
.suspects figure .frame { aspect-ratio: 1; }
.controls select { font: inherit; max-width: 12rem; }
.parts .scroll { max-height: 260px; }
rect.annotated { stroke-dasharray: 6 4; }
"""
FILTER = """
const figures = [...document.querySelectorAll("figure")], named = document.querySelector("#class");
function filter() {
  const kinds = new Set([...document.querySelectorAll("input[data-kind]:checked")].map(box => box.dataset.kind));
  let count = 0;
  for (const figure of figures) {
    const classes = figure.dataset.classes.split(" ");
    figure.hidden = !kinds.has(figure.dataset.kind) || (named.value && !classes.includes(named.value));
    count += !figure.hidden;
  }
  document.querySelector("#count").textContent = `${count} shown`;
}
document.querySelectorAll("input[data-kind], #class").forEach(input => input.addEventListener("change", filter));
filter();
"""


def render(
    judged: Judged, found: Sequence[Suspect], parts: Sequence[Partly], shown: int, facts: Mapping[str, str]
) -> str:
    """The sheet as one HTML text that loads nothing.

    Args:
        judged: the annotations.
        found: all suspects, the strongest first.
        parts: images that are annotated in part.
        shown: how many suspects are shown.
        facts: for the head.
    """
    own = found[:shown]
    kinds = Counter(one.kind for one in own)
    tiles = [(str(judged.annotations), "annotations"), (str(len(own)), "suspects shown")]
    tiles += [(str(kinds[kind]), name) for kind, (name, _) in KINDS.items()]
    tiles += [(str(len({part.image for part in parts})), "images annotated in part")]
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{escape(text)}</span></div>' for value, text in tiles)
    body = [f'<div class="tiles">{cells}</div>']
    cards = "".join(_cards(judged, own))
    content = f'{_controls(judged)}<div class="suspects">{cards}</div>' if own else "<p>Nothing is suspicious.</p>"
    body.append(section("Suspects", NOTE, content))
    if parts:
        body.append(
            section("Images annotated in part", PARTLY_NOTE, f'<div class="parts">{_parts(judged, parts)}</div>')
        )
    meanings = "".join(f"<li><b>{name}</b>: {meaning}</li>" for name, meaning in KINDS.values())
    body.append(section("Kinds", "", f"<ul>{meanings}</ul>"))
    return PAGE.format(
        title=escape(f"Suspects, {judged.name}"),
        facts=" &nbsp;·&nbsp; ".join(f"{escape(key)} <b>{escape(value)}</b>" for key, value in facts.items()),
        style=STYLE + FIGURES + OWN_STYLE,
        script=SCRIPT + (FILTER if own else ""),
        body="\n".join(body),
        footer="A suspect is a question, not a verdict: look before you change a label.",
    )


def _parts(judged: Judged, parts: Sequence[Partly]) -> str:
    rows = []
    for part in parts:
        file, name = judged.results[part.image].file_name, judged.class_names[part.label - 1]
        counts = (part.missing, part.annotated)
        rows.append([(escape(file), file), (escape(name), name), *((str(count), count) for count in counts)])
    return f'<div class="scroll">{table(("image", "class", "found, not annotated", "annotated"), rows, (0, 1))}</div>'


def _controls(judged: Judged) -> str:
    kinds = "".join(
        f'<label><input type="checkbox" data-kind="{kind}" checked>{dot(KIND_COLOURS[kind])}{name}</label>'
        for kind, (name, _) in KINDS.items()
    )
    classes = "".join(f'<option value="{i}">{escape(n)}</option>' for i, n in enumerate(judged.class_names, start=1))
    return (
        f'<div class="controls">{kinds}<label>class <select id="class"><option value="">all</option>{classes}'
        '</select></label><output id="count"></output></div>'
    )


def _cards(judged: Judged, found: Sequence[Suspect]) -> list[str]:
    """The figure of each; an image is read once, so they are made image by image."""
    made = [""] * len(found)
    for image in dict.fromkeys(one.image for one in found):
        result = judged.results[image]
        pixels = None if judged.load_image is None else false_colour(judged.load_image(result))
        for rank, one in enumerate(found):
            if one.image == image:
                made[rank] = _card(judged, rank + 1, one, pixels)
    return made


def _card(judged: Judged, rank: int, one: Suspect, pixels: Pixels | None) -> str:
    shapes = {"annotated": one.annotated, "proposed": one.proposed}
    there = {style: shape for style, shape in shapes.items() if shape is not None}
    names = {style: judged.class_names[shape.label - 1] for style, shape in there.items()}
    classes = " ".join(str(label) for label in dict.fromkeys(shape.label for shape in there.values()))
    file = judged.results[one.image].file_name
    said = " → ".join(escape(name) for name in dict.fromkeys(names.values()))
    detail = f"found with {one.confidence:.2f}" if one.proposed else "nothing found"
    detail += f", IoU {one.iou:.2f}" if one.iou else ""
    frame = "" if pixels is None else _picture(pixels, there, f"{KINDS[one.kind][0]}: {' → '.join(names.values())}")
    kind = f"{dot(KIND_COLOURS[one.kind])}<b>{KINDS[one.kind][0]} {100 * one.score:.0f}&nbsp;%</b>"
    return (
        f'<figure data-kind="{one.kind}" data-classes="{classes}">{frame}<figcaption>{kind}<br>{said}<br>{detail}<br>'
        f"{rank}. {escape(file)}</figcaption></figure>"
    )


def cut(pixels: Pixels, shapes: Iterable[Labelled]) -> tuple[Pixels, int, int]:
    """The square `(s, s, 3)` around boxes, black beyond the image, and its left and upper side in the image.

    Args:
        pixels: `(H, W, 3)` uint8.
        shapes: the boxes.
    """
    boxes = np.array([shape.box for shape in shapes])
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    side = max(LEAST_SIDE, round(float((high - low).max()) * (1 + 2 * CONTEXT)))
    left, top = (round(float(value)) for value in (low + high - side) / 2)
    square = np.zeros((side, side, 3), np.uint8)
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    square[y1 - top : y2 - top, x1 - left : x2 - left] = pixels[y1:y2, x1:x2]
    return square, left, top


def _picture(pixels: Pixels, shapes: Mapping[str, Labelled], alt: str) -> str:
    square, left, top = cut(pixels, shapes.values())
    side = len(square)
    way = cv2.INTER_AREA if side > PICTURE else cv2.INTER_LINEAR
    small = cv2.resize(square, (PICTURE, PICTURE), interpolation=way)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82])
    rects = "".join(
        f'<rect class="{style}" style="--colour:{ANNOTATED if style == "annotated" else FOUND}" x="{b[0] - left:.1f}" '
        f'y="{b[1] - top:.1f}" width="{b[2] - b[0]:.1f}" height="{b[3] - b[1]:.1f}"/>'
        for style, (b, _) in shapes.items()
    )
    return (
        f'<div class="frame"><img loading="lazy" alt="{escape(alt)}" src="{_data("image/jpeg", jpeg.tobytes())}">'
        f'<svg viewBox="0 0 {side} {side}">{rects}</svg></div>'
    )
