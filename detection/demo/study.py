"""An image as the demo page shows it: what a detector found in it, and the pictures of its stages.

The network runs once for an image. Threshold and classes select among what it found; the picture of a stage is drawn
when it is first looked at, and kept.

Shape shorthand:
    D: all detections of the image     S: those that are chosen     H, W: its height and width in pixels
"""

from __future__ import annotations

import base64
import copy
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from detection import teaching
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.data.images import read_image
from detection.data.records import DataError
from detection.data.spectral import RGB, PixelFormat, false_colour
from detection.inference import Detections, Detector
from detection.inference.run import as_coco
from detection.inference.tta import TestTimeAugmentation
from detection.models.two_stage import FasterRCNN
from detection.visualize import class_colour, draw_objects

SIDES = (720, 1280)  # pixels: the picture's longer side is brought between them, so that names can be read
STAND_IN = 0.5  # detections from this score on stand for the ground truth that a new image has not
EXAMPLES = 6  # pictures to begin with
THUMBNAIL = 160  # pixels of their longer side on the page
NAMED = 12  # classes that a line can name
# Why a checkpoint gives no data: it has moved, or is another's, or the file is of no run
UNUSABLE = (DataError, LookupError, OSError, RuntimeError, TypeError, UnpicklingError, ValueError)


class Study:
    """One image and all that the page shows of it; `found` are all detections, which took so many `seconds`.

    Args:
        detector: runs once, here.
        model: the same from `model_of`, for the pictures of the stages.
        pixels: `(H, W, C)` in the detector's format.
        name: of the image's file.
    """

    def __init__(self, detector: Detector, model: FasterRCNN, pixels: NDArray[Any], name: str = "image") -> None:
        self.model, self.pixels, self.name = model, pixels, name
        self._category_ids = detector.category_ids
        start = time.perf_counter()
        self.found = detector(pixels)
        self.seconds = time.perf_counter() - start
        self._stages: dict[str, str] = {}

    def where(self, threshold: float, classes: Sequence[str]) -> NDArray[np.int64]:
        """Places `(S,)` in `found` of those that score at least `threshold`, of the named classes; of all without."""
        wanted = self.found.scores >= threshold
        if classes:
            wanted &= np.isin(self.found.names, classes)
        return np.flatnonzero(wanted)

    def choose(self, threshold: float, classes: Sequence[str]) -> Detections:
        """The detections at `where`."""
        return self.found.take(self.where(threshold, classes))

    def picture(self, chosen: Detections) -> str:
        """The image with detections, as a data URI."""
        side = min(max(SIDES[0], *self.pixels.shape[:2]), SIDES[1])
        masks = None if chosen.masks is None else list(chosen.masks)
        objects = (chosen.boxes, chosen.labels, chosen.class_names, chosen.scores, masks)
        points: dict[str, Any] = {"keypoints": chosen.keypoints, "edges": chosen.edges}
        return _uri(draw_objects(self.pixels, *objects, side=side, **points))

    def boxes(self, where: NDArray[np.int64], prefix: str = "") -> str:
        """The boxes of detections as SVG rectangles `data-box="<prefix><place>"`, small ones above large ones."""
        found, (height, width) = self.found, self.found.size
        areas = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1)
        rects = []
        for i in where[np.argsort(-areas[where], kind="stable")].tolist():
            x1, y1, x2, y2 = found.boxes[i].tolist()
            rects.append(
                f'<rect data-box="{prefix}{i}" x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}">'
                f"<title>{escape(found.names[i])} {found.scores[i]:.2f}</title></rect>"
            )
        return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="xMidYMid meet">{"".join(rects)}</svg>'

    def rows(self, where: NDArray[np.int64], prefix: str = "") -> list[dict[str, Any]]:
        """Rows of the page's table: key as in `boxes`, name, colour, score, and the box in whole pixels."""
        found = self.found
        return [
            {
                "key": f"{prefix}{i}",
                "name": found.names[i],
                "colour": f"rgb{class_colour(int(found.labels[i]))}",
                "score": f"{found.scores[i]:.2f}",
                "box": ", ".join(str(round(value)) for value in found.boxes[i].tolist()),
            }
            for i in where.tolist()
        ]

    def jpeg(self, chosen: Detections) -> bytes:
        """The image with detections in its own size, as a file."""
        return _jpeg(chosen.draw(self.pixels))

    def json(self, chosen: Detections) -> str:
        """Detections as `predictions.json` of the command `predict` has them."""
        return json.dumps(as_coco(self.name, chosen, self._category_ids), indent=1)

    def stage(self, stage: Stage) -> str:
        """The picture of a stage as a data URI.

        Raises:
            ValueError: this kind of detector has no such stage.
        """
        if stage.title not in self._stages:
            self._stages[stage.title] = _uri(_readable(stage.draw(self)))
        return self._stages[stage.title]

    @property
    def image(self) -> torch.Tensor:
        """`(C, H, W)`, of the type of `pixels`."""
        return torch.from_numpy(self.pixels).permute(2, 0, 1)

    @property
    def target(self) -> dict[str, torch.Tensor]:
        """Boxes and labels in place of ground truth."""
        sure = self.found.above(STAND_IN)
        return {"boxes": torch.from_numpy(sure.boxes), "labels": torch.from_numpy(sure.labels)}


@dataclass(frozen=True)
class Stage:
    """One step of the detector, what happens in it, and its picture."""

    title: str
    text: str
    draw: Callable[[Study], Figure]


OBJECTS = f"A new image has no ground truth: its detections that score {STAND_IN} or more stand for it."
STAGES = (
    Stage(
        "Features",
        "The backbone and its pyramid turn the image into maps of ever larger stride. Above, how strong each cell is; "
        "below, its three principal components as red, green and blue: one colour, and the detector sees the same.",
        lambda study: teaching.plot_pyramid(study.model, study.image),
    ),
    Stage(
        "Anchors",
        "Each cell of each map, drawn as a dot, has a few anchors: boxes of fixed sizes and ratios, from which objects "
        "are looked for. Those of the cell in the middle are drawn.",
        lambda study: _wrapped(teaching.plot_anchors(study.model, study.image)),
    ),
    Stage(
        "Matching",
        "In training, anchors that overlap an object enough are foreground, those that overlap none are background, "
        f"and those between are ignored. {OBJECTS}",
        lambda study: teaching.plot_matching(study.model, study.image, study.target),
    ),
    Stage(
        "Proposals",
        "The region proposal network scores each anchor as object or not, and moves it. The best of them, after "
        "non-maximum suppression, are the proposals.",
        lambda study: teaching.plot_proposals(study.model, study.image, counts=(20, 200)),
    ),
    Stage(
        "Regions",
        "In training, the second stage learns from a sample of the proposals: those that overlap an object as "
        f"foreground, others as background. {OBJECTS}",
        lambda study: teaching.plot_samples(study.model, study.image, study.target, study.found.class_names),
    ),
)
LAST = "Detections"
LAST_TEXT = (
    "The second stage gives each proposal a class and a score, moves it again, and keeps the best of those that "
    "overlap. Score and classes choose among them; the network does not run again."
)


def model_of(detector: Detector) -> FasterRCNN:
    """A copy of the model on the CPU that resizes images as `detector` does: what `detection.teaching` draws."""
    model = detector.model
    model = copy.deepcopy(model.detector if isinstance(model, TestTimeAugmentation) else model).cpu()
    model.transform.min_size, model.transform.max_size = (detector.min_size,), detector.max_size
    return model


@dataclass(frozen=True)
class Example:
    """A picture to begin with: its file, its name, and itself in small as a data URI."""

    path: Path
    name: str
    small: str


def examples(ckpt: Path, form: PixelFormat, folder: Path, trust: Iterable[str] = ()) -> tuple[list[Example], str]:
    """Pictures to begin with, and what they are.

    Those that the run was validated on, spread over them all; drawn scenes where these are not at hand.

    Args:
        ckpt: of the run.
        form: channels and depth that the detector takes; scenes are RGB alone.
        folder: where scenes are drawn.
        trust: see `DetectionDataModule.load_from_checkpoint`.
    """
    files: list[tuple[Path, tuple[int, int] | None]]
    try:
        index = DetectionDataModule.load_from_checkpoint(ckpt, trust).read("val")
        places = np.linspace(0, len(index.records) - 1, EXAMPLES).astype(int)
        chosen = [index.records[i] for i in np.unique(places)]
        files = [(index.root / record.file_name, (record.height, record.width)) for record in chosen]
        return [_example(path, size, form) for path, size in files], "Pictures that the run was validated on"
    except UNUSABLE:
        if form != RGB:
            return [], ""
    rng = np.random.default_rng(0)
    for number in range(EXAMPLES):
        Image.fromarray(scenes.draw_scene(rng)[0]).save(folder / f"scene_{number + 1}.png")
    return [_example(path, None, form) for path in sorted(folder.glob("scene_*.png"))], "Drawn scenes"


def _example(path: Path, size: tuple[int, int] | None, form: PixelFormat) -> Example:
    small = Image.fromarray(false_colour(read_image(path, size, form=form)))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return Example(path, path.name, _uri(small))


def knows(class_names: Sequence[str]) -> str:
    """What a detector can find at all, as a sentence."""
    more = len(class_names) - NAMED
    names = ", ".join(class_names[:NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"Finds only what it was trained on: {names}. All else is background to it, or taken for one of these."


def _readable(figure: Figure) -> Image.Image:
    """A figure as a picture whose text can be read at the page's width, however wide the figure is."""
    smallest = 0.95 * figure.get_figwidth()  # points: 12 pixels of 900
    for text in figure.findobj(Text):
        text.set_fontsize(max(smallest, text.get_fontsize()))
    file = io.BytesIO()
    figure.savefig(file, dpi=1600 / figure.get_figwidth(), facecolor="white", bbox_inches="tight", pad_inches=0.02)
    return Image.open(file)


def _wrapped(figure: Figure, columns: int = 3) -> Figure:
    """A row of panels as several rows, so that each is large."""
    rows = -(-len(figure.axes) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width * columns / len(figure.axes), height * rows)
    grid = figure.add_gridspec(rows, columns)
    for k, axes in enumerate(figure.axes):
        axes.set_subplotspec(grid[divmod(k, columns)])
    return figure


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=90, subsampling=0)
    return file.getvalue()


def _uri(picture: Image.Image) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(_jpeg(picture)).decode()}"
