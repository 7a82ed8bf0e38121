"""Which pictures without labels to label next: those of whose objects detectors are least sure.

Shape shorthand:
    D: detections of a picture by one detector
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.data.duplicates import near_duplicates
from detection.data.spectral import Pixels, false_colour
from detection.evaluation.label_studio import Region, task, write_configuration
from detection.evaluation.page import PAGE, STYLE
from detection.evaluation.report import _data, section
from detection.evaluation.suspects_page import FIGURES
from detection.evaluation.suspicion import Floats, Labelled, corners, iou_of

SAME_PLACE = 0.5  # IoU from which detections of one class are of one object
LIKELY = 0.3  # mean score from which an object is proposed to who labels
SHOWN_SIDE = 480  # pixels of the longer side of a picture on the sheet
PICTURES = 200  # on the sheet
COLUMNS = ("rank", "image", "doubt", "objects", "looks_like")
NOTE = (
    "The doubt of an object is 1 - |2p - 1|: 1 where its score p, the mean over the detectors, is 0.5, and 0 where all "
    "are sure. That of a picture is the sum. A picture that looks like one before it comes behind all others."
)
OWN_STYLE = """
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 1rem; }
rect { --colour: #2f81f7; }
"""


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """A picture without labels.

    Attributes:
        file_name: relative to the folder.
        size: (height, width) in pixels.
        objects: what is found, the surest first; `score` is the mean over the detectors.
        signs: of its gradients, see `duplicates.gradients`.
        like: an earlier picture of the list that it looks like; empty for none.
    """

    file_name: str
    size: tuple[int, int]
    objects: list[Region]
    signs: NDArray[np.float32]
    like: str = ""

    @property
    def doubt(self) -> float:
        """Sum of that of its objects."""
        return sum(1 - abs(2 * (one.score or 0.0) - 1) for one in self.objects)

    @property
    def likely(self) -> list[Region]:
        """Objects to propose."""
        return [one for one in self.objects if (one.score or 0.0) >= LIKELY]


def merged(found: Sequence[tuple[Floats, NDArray[np.int64], Floats]]) -> list[Region]:
    """The objects that several detectors find in a picture, the surest first.

    A detector that does not find an object counts as one with the score 0.

    Args:
        found: boxes `(D, 4)` xyxy, labels `(D,)` and scores `(D,)` of each detector.
    """
    boxes, labels, scores = (np.concatenate([one[i] for one in found]) for i in range(3))
    owner = np.repeat(np.arange(len(found)), [len(one[1]) for one in found])
    overlap, free, objects = iou_of(boxes, boxes), np.ones(len(boxes), bool), list[Region]()
    for i in np.argsort(-scores, kind="stable").tolist():
        if not free[i]:
            continue
        here = free & (overlap[i] >= SAME_PLACE) & (labels == labels[i])
        here[i] = True
        free &= ~here
        best = [float(scores[here & (owner == d)].max(initial=0.0)) for d in range(len(found))]
        objects.append(Region(Labelled(corners(boxes[i]), int(labels[i])), float(np.mean(best))))
    return sorted(objects, key=lambda one: -(one.score or 0.0))


def ranked(pictures: Sequence[Unlabelled]) -> list[Unlabelled]:
    """The most doubtful first, and those that look like one of these behind all others."""
    order = sorted(pictures, key=lambda one: -one.doubt)
    like = {i: order[int(earlier[0])].file_name for i, earlier in near_duplicates([one.signs for one in order])}
    alike = [replace(one, like=like.get(i, "")) for i, one in enumerate(order)]
    return sorted(alike, key=lambda one: bool(one.like))


def write_next(folder: Path, pictures: Sequence[Unlabelled], names: Sequence[str], root: Path, load: Any) -> None:
    """Write `next.csv`, `next.html`, `next_label_studio.json` and `label_studio.xml`.

    Args:
        folder: that exists.
        pictures: as `ranked` has them.
        names: C classes.
        root: folder of the pictures.
        load: gives the pixels `(H, W, C)` of a file.
    """
    with (folder / "next.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for rank, one in enumerate(pictures, start=1):
            writer.writerow([rank, one.file_name, f"{one.doubt:.3f}", len(one.likely), one.like])
    tasks = [
        task(one.file_name, one.size, names, {"detections": one.likely}, one.doubt, {"doubt": round(one.doubt, 3)})
        for one in pictures
    ]
    (folder / "next_label_studio.json").write_text(json.dumps(tasks, allow_nan=False))
    write_configuration(folder / "label_studio.xml", names)
    cards = [_card(rank, one, names, load(root / one.file_name)) for rank, one in enumerate(pictures[:PICTURES], 1)]
    page = PAGE.format(
        title="What to label next",
        facts=f"pictures <b>{len(pictures)}</b> &nbsp;·&nbsp; shown <b>{len(cards)}</b>",
        style=STYLE + FIGURES + OWN_STYLE,
        script="",
        body=section("Pictures", NOTE, f'<div class="pictures">{"".join(cards)}</div>'),
        footer=f"Drawn are objects of a mean score of {LIKELY} and more.",
    )
    (folder / "next.html").write_text(page, encoding="utf-8")


def _card(rank: int, one: Unlabelled, names: Sequence[str], pixels: Pixels) -> str:
    height, width = one.size
    scale = min(1.0, SHOWN_SIDE / max(height, width))
    small = cv2.resize(false_colour(pixels), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    rects = []
    for region in one.likely:
        x1, y1, x2, y2 = region.shape.box
        place = f'x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}"'
        sure, name = region.score or 0.0, escape(names[region.shape.label - 1])
        unsure = ' class="unsure"' if sure < 0.7 else ""
        rects.append(f"<rect{unsure} {place}><title>{name} {sure:.2f}</title></rect>")
    like = f", looks like {escape(one.like)}" if one.like else ""
    return (
        f'<figure><div class="frame"><img loading="lazy" alt="" src="{_data("image/jpeg", jpeg.tobytes())}">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(rects)}</svg></div><figcaption>'
        f"{rank}. <b>{escape(one.file_name)}</b><br>doubt {one.doubt:.2f}, {len(one.likely)} objects{like}"
        "</figcaption></figure>"
    )
