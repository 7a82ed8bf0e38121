"""Tasks and labelling configuration of Label Studio: images with boxes to look at, to accept or to correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from detection.evaluation.suspicion import Labelled
from detection.visualize import class_colour

# Names of the two tags in the configuration, which each box refers to.
FROM, TO = "label", "image"
SERVED = "/data/local-files/?d="  # where Label Studio serves files of its local storage


class Region(NamedTuple):
    """A box of a task.

    Attributes:
        shape: box and class.
        score: of the detection, or of the suspicion; None for what a person has drawn.
        remark: said beside it, if anything is.
    """

    shape: Labelled
    score: float | None = None
    remark: str = ""


def task(
    file_name: str,
    size: tuple[int, int],
    names: Sequence[str],
    predictions: Mapping[str, Sequence[Region]],
    score: float,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """An image with predictions; the first is shown first.

    Args:
        file_name: of the image, relative to the folder that Label Studio serves.
        size: (height, width) in pixels.
        names: C classes.
        predictions: name of each as `model_version`, and its boxes.
        score: that tasks are sorted by.
        facts: what else the task says.
    """
    made = [
        {
            "model_version": name,
            "score": round(score, 4),
            "result": [_region(r, i, size, names) for i, r in enumerate(own)],
        }
        for name, own in predictions.items()
    ]
    return {"data": {TO: SERVED + quote(file_name), "file_name": file_name} | (facts or {}), "predictions": made}


def _region(region: Region, number: int, size: tuple[int, int], names: Sequence[str]) -> dict[str, Any]:
    """Corners in percent of the image, as Label Studio counts."""
    (height, width), (x1, y1, x2, y2) = size, region.shape.box
    value = {
        "x": 100 * x1 / width,
        "y": 100 * y1 / height,
        "width": 100 * (x2 - x1) / width,
        "height": 100 * (y2 - y1) / height,
        "rotation": 0,
        "rectanglelabels": [names[region.shape.label - 1]],
    }
    made: dict[str, Any] = {
        "id": f"box{number}",
        "type": "rectanglelabels",
        "from_name": FROM,
        "to_name": TO,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": value,
    }
    made |= {} if region.score is None else {"score": round(region.score, 4)}
    return made | ({"meta": {"text": [region.remark]}} if region.remark else {})


def write_configuration(path: Path, names: Sequence[str]) -> None:
    """Write the labelling configuration of C classes, to be pasted into the project's settings."""
    labels = "".join(
        f'    <Label value={quoteattr(name)} background="#{bytes(class_colour(i)).hex()}"/>\n'
        for i, name in enumerate(names, start=1)
    )
    path.write_text(
        f'<View>\n  <Image name="{TO}" value="${TO}" zoom="true"/>\n'
        f'  <RectangleLabels name="{FROM}" toName="{TO}">\n{labels}  </RectangleLabels>\n</View>\n',
        encoding="utf-8",
    )
