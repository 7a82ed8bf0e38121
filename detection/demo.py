"""A page to look at a detector at work: drop an image, choose among its detections, step through its stages.

The network runs once for an image. Threshold and classes select among what it found; the picture of a stage is drawn
when it is first looked at, and kept. The page is served by NiceGUI, which brings all its parts: nothing is loaded from
anywhere else.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import io
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from detection import teaching
from detection.data.images import EXTENSIONS, read_image, remarks
from detection.data.records import DataError
from detection.errors import RunError
from detection.inference import Detections, Detector
from detection.inference.tta import TestTimeAugmentation
from detection.models.two_stage import FasterRCNN
from detection.visualize import class_colour, draw_objects

try:
    from nicegui import app, events, ui
except ImportError as missing:
    raise RunError('the demo page needs NiceGUI: pip install "detection[demo]"') from missing

SIDES = (720, 1280)  # pixels: the picture's longer side is brought between them, so that names can be read
STAND_IN = 0.5  # detections from this score on stand for the ground truth that a new image has not
LARGEST = 100_000_000  # bytes of an image file


class Study:
    """One image and all that the page shows of it; `found` are all detections, which took so many `seconds`.

    Args:
        detector: runs once, here.
        model: the same from `model_of`, for the pictures of the stages.
        pixels: `(H, W, C)` in the detector's format.
    """

    def __init__(self, detector: Detector, model: FasterRCNN, pixels: NDArray[Any]) -> None:
        self.model, self.pixels = model, pixels
        start = time.perf_counter()
        self.found = detector(pixels)
        self.seconds = time.perf_counter() - start
        self._stages: dict[str, str] = {}

    def choose(self, threshold: float, classes: Sequence[str]) -> Detections:
        """Those that score at least `threshold`, of the named classes; of all where none is named."""
        found = self.found.above(threshold)
        return found.of(classes) if classes else found

    def picture(self, chosen: Detections) -> str:
        """The image with detections, as a data URI."""
        side = min(max(SIDES[0], *self.pixels.shape[:2]), SIDES[1])
        masks = None if chosen.masks is None else list(chosen.masks)
        objects = (chosen.boxes, chosen.labels, chosen.class_names, chosen.scores, masks)
        return _uri(draw_objects(self.pixels, *objects, side=side))

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


class Page:
    """What one visitor sees.

    Args:
        detector, model: see `Study`.
        name: of the checkpoint.
    """

    def __init__(self, detector: Detector, model: FasterRCNN, name: str) -> None:
        self._detector, self._model, self._name = detector, model, name
        self._study: Study | None = None
        self._uploads = self._drawings = 0  # counted, so that the latest wins
        self._notes: dict[str, ui.label] = {}
        self._pictures: dict[str, ui.element] = {}

    def build(self) -> None:
        """Lay the page out."""
        ui.colors(primary="#2f5d8c")
        ui.add_css(STYLE)
        with ui.row().classes("head"):
            ui.label("Detector, step by step").classes("title")
            kind = "boxes and masks" if self._model.has_masks else "boxes"
            ui.label(f"{self._name} · {len(self._detector.class_names)} classes · {kind} · {self._detector.device}")
        with ui.element("main").classes("areas"):
            with ui.column().classes("card controls"):
                self._build_controls()
            with ui.column().classes("card stages"):
                self._build_stages()
            with ui.column().classes("card list"):
                self._count = ui.label(WAITING).classes("count")
                self._table = ui.table(columns=COLUMNS, rows=[], row_key="rank", pagination=10).classes("wide")
                self._table.props('flat dense :rows-per-page-options="[10]" no-data-label="Nothing to list"')
                self._table.add_slot("body-cell-name", SWATCH)

    def _build_controls(self) -> None:
        upload = ui.upload(
            label="Drop an image, or press +",
            auto_upload=True,
            max_file_size=LARGEST,
            on_upload=self._take,
            on_rejected=lambda: self._say(f"Not an image of up to {LARGEST // 10**6} MB; known are {KNOWN}."),
        )
        self._upload = upload.props(f'flat accept="{KNOWN}"').classes("wide drop")
        self._error = ui.label().classes("wide error")
        self._error.set_visibility(False)
        with ui.row().classes("line"):
            ui.label("Score at least")
            score = ui.label().classes("count")
        self._threshold = ui.slider(min=0, max=1, step=0.01, value=0.5, on_change=self._draw).props("aria-label=Score")
        score.bind_text_from(self._threshold, "value", lambda value: f"{value:.2f}")
        names = list(self._detector.class_names)
        self._classes = ui.select(names, multiple=True, label="Classes (none chosen: all)", on_change=self._draw)
        self._classes.props("use-chips outlined dense clearable").classes("wide classes")

    def _build_stages(self) -> None:
        steps = [*((stage.title, stage.text) for stage in STAGES), (LAST, LAST_TEXT)]
        with ui.stepper(value=LAST, on_value_change=self._turn, keep_alive=False) as self._stepper:
            self._stepper.props("flat header-nav alternative-labels").classes("wide")
            for number, (title, text) in enumerate(steps, start=1):
                with ui.step(title).props("icon=none active-icon=none done-icon=none"):
                    with ui.row().classes("line"):
                        back = ui.button(icon="chevron_left", on_click=self._stepper.previous)
                        back.props("flat round aria-label=Back").set_enabled(number > 1)
                        ui.label(text).classes("text")
                        onward = ui.button(icon="chevron_right", on_click=self._stepper.next)
                        onward.props("flat round aria-label=Next").set_enabled(number < len(steps))
                    self._notes[title] = ui.label(f"{WAITING}.").classes("wide note")
                    self._pictures[title] = ui.element("img").classes("wide picture").props(f"alt={title}")
                    self._pictures[title].set_visibility(False)

    def _look_at(self, path: Path) -> Study:
        return Study(self._detector, self._model, read_image(path, form=self._detector.form))

    async def _take(self, event: events.UploadEventArguments) -> None:
        """Read an image, detect in it and show it; what can't be read leaves the page as it was."""
        self._uploads += 1
        number, name = self._uploads, event.file.name
        self._upload.reset()
        self._say("")
        self._count.set_text("Detecting ...")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image"
            await event.file.save(path)
            try:
                study = await asyncio.to_thread(self._look_at, path)
            except (DataError, RuntimeError) as error:  # the latter: no memory for it
                if number == self._uploads:
                    self._say(str(error).replace(str(path), name))
                    await self._draw()
                return
            notes = remarks(path)
        print(f"{name}: {len(study.found)} detections in {study.seconds:.2f} s", flush=True)
        if number == self._uploads:
            self._study = study
            self._say("; ".join(problem for problem, _ in notes))
            for stage in STAGES:
                self._show(stage.title, None, "Drawing ...")
            await self._draw()
            await self._turn()

    async def _draw(self) -> None:
        """Show the detections that are chosen."""
        if (study := self._study) is None:
            self._count.set_text(WAITING)
            return
        self._drawings += 1
        number = self._drawings
        chosen = study.choose(self._threshold.value, self._classes.value or ())
        self._count.set_text(f"{len(chosen)} of {len(study.found)} detections, found in {study.seconds:.2f} s")
        self._table.rows = rows_of(chosen)
        picture = await asyncio.to_thread(study.picture, chosen)
        if number == self._drawings:
            self._show(LAST, picture)

    async def _turn(self) -> None:
        """Draw the stage that is looked at, unless it is drawn."""
        study, looked_at = self._study, [stage for stage in STAGES if stage.title == self._stepper.value]
        if study is None or not looked_at:
            return
        try:
            picture, note = await asyncio.to_thread(study.stage, looked_at[0]), ""
        except ValueError as error:
            picture, note = None, f"Nothing to see here: {error}."
        if study is self._study:
            self._show(looked_at[0].title, picture, note)

    def _show(self, title: str, picture: str | None, note: str = "") -> None:
        self._notes[title].set_text(note)
        self._notes[title].set_visibility(bool(note))
        self._pictures[title].set_visibility(picture is not None)
        self._pictures[title].props["src"] = picture or ""
        self._pictures[title].update()

    def _say(self, error: str) -> None:
        self._error.set_text(error)
        self._error.set_visibility(bool(error))


def rows_of(chosen: Detections) -> list[dict[str, Any]]:
    """The rows of the page's table: rank, name, colour, score, and the box in whole pixels."""
    return [
        {
            "rank": rank,
            "name": name,
            "colour": f"rgb{class_colour(label)}",
            "score": f"{score:.2f}",
            "box": ", ".join(str(round(value)) for value in box),
        }
        for rank, (name, label, score, box) in enumerate(
            zip(chosen.names, chosen.labels.tolist(), chosen.scores.tolist(), chosen.boxes.tolist(), strict=True), 1
        )
    ]


def serve(ckpt: Path, host: str, port: int, device: str = "auto", trust: Iterable[str] = ()) -> None:
    """Serve the page of a checkpoint until interrupted.

    Args:
        ckpt: of `detection fit`, or .safetensors.
        host, port: to listen at.
        device: see `Detector`.
        trust: see `Detector.from_checkpoint`.

    Raises:
        CheckpointError, FileNotFoundError: see `Detector.from_checkpoint`.
        RunError: the port is taken.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"{host}:{port} can't be listened at ({error}); give another --port or --host") from error
    detector = Detector.from_checkpoint(ckpt, device, trust=trust)
    model = model_of(detector)
    name = f"{ckpt.parent.name}/{ckpt.name}"
    app.on_startup(lambda: print(f"{ckpt}: http://{host}:{port} (Ctrl-C ends it)", flush=True))
    with contextlib.suppress(KeyboardInterrupt):
        ui.run(lambda: Page(detector, model, name).build(), host=host, port=port, title=name, favicon="🔍", show=False,
               reload=False, show_welcome_message=False)  # fmt: skip


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


def _uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


WAITING = "No image yet"
KNOWN = ", ".join(EXTENSIONS)
COLUMNS: list[dict[str, Any]] = [
    {"name": "name", "label": "Class", "field": "name", "align": "left", "sortable": True},
    {"name": "score", "label": "Score", "field": "score", "align": "right", "sortable": True},
    {"name": "box", "label": "Box: x1, y1, x2, y2", "field": "box", "align": "right"},
]
SWATCH = """
<q-td :props="props"><span class="swatch" :style="{background: props.row.colour}"></span>{{ props.value }}</q-td>
"""
STYLE = """
body { background: #eef1f4; color: #1d2733; font-family: system-ui, "Segoe UI", "Noto Sans", sans-serif; }
.nicegui-content { padding: 16px; gap: 16px; max-width: 1600px; margin: 0 auto; }
.wide { width: 100%; }
.head { width: 100%; align-items: baseline; column-gap: 16px; row-gap: 0; color: #5b6672; }
.title { font-size: 22px; font-weight: 600; color: #1d2733; }
.areas { display: grid; gap: 16px; width: 100%; grid-template: "controls stages" auto "list stages" 1fr / 340px 1fr; }
.card { background: white; border-radius: 10px; box-shadow: 0 1px 3px #0002; padding: 16px; gap: 10px; min-width: 0; }
.controls { grid-area: controls; }
.list { grid-area: list; align-self: start; }
.stages { grid-area: stages; align-self: start; padding: 0 4px 8px; }
@media (max-width: 1000px) { .areas { grid-template: "controls" auto "stages" auto "list" auto / 100%; } }
.drop { border: 2px dashed #9fb3c8; border-radius: 8px; }
.drop .q-uploader__header { background: #f3f6f9; color: #2f5d8c; padding: 10px 4px; border-radius: 8px; }
.drop .q-uploader__subtitle, .drop .q-uploader__list { display: none; }
.line { width: 100%; flex-wrap: nowrap; align-items: center; justify-content: space-between; gap: 8px; }
.count { font-weight: 600; font-variant-numeric: tabular-nums; }
.error { color: #a4161a; background: #fdecec; border-radius: 6px; padding: 8px 10px; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
.stages .q-stepper__header { counter-reset: step; }
.stages .q-stepper__tab { padding: 14px 8px; min-height: 0; counter-increment: step; }
.stages .q-stepper__dot span { display: block; width: 100%; text-align: center; font-size: 14px; }
.stages .q-stepper__dot span::before { content: counter(step); }
.stages .q-stepper__dot .q-icon { display: none; }
.stages .q-stepper__step-inner { padding: 0 12px 8px; }
.text { flex: 1; color: #3b4754; line-height: 1.45; }
.note { color: #5b6672; padding: 48px 0; text-align: center; }
.picture { display: block; max-height: 78vh; object-fit: contain; margin-top: 4px; border-radius: 6px; }
"""
