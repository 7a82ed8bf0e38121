"""A page to look at a detector at work: choose an image and among its detections, step through its stages.

What is shown of an image is in `detection.demo.study`. The page is served by NiceGUI, which brings all its parts:
nothing is loaded from anywhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from detection.data.headers import EXTENSIONS
from detection.data.images import read_image, remarks
from detection.data.records import DataError
from detection.demo.demo_looks import COLUMNS, ROW, SCRIPT, STYLE
from detection.demo.study import STAGES, Example, Study, examples, knows, model_of
from detection.errors import RunError
from detection.inference import Detector
from detection.models.two_stage import FasterRCNN

try:
    from nicegui import app, events, ui
except ImportError as missing:
    raise RunError('the demo page needs NiceGUI: pip install "detection[demo]"') from missing

LARGEST = 100_000_000  # bytes of an image file
LAST = "Detections"
LAST_TEXT = (
    "The second stage gives each proposal a class and a score, moves it again, and keeps the best of those that "
    "overlap. Score and classes choose among them; the network does not run again."
)
WAITING = "No image yet"
KNOWN = ", ".join(EXTENSIONS)


class Look(NamedTuple):
    """A detector to look at: see `Study`; and the name of its checkpoint."""

    detector: Detector
    model: FasterRCNN
    name: str

    def at(self, path: Path, name: str) -> Study:
        """What it makes of an image file."""
        return Study(self.detector, self.model, read_image(path, form=self.detector.form), name)


class Panel:
    """The part of the page that one detector has: its pictures, its list and what can be downloaded.

    Args:
        look: the detector.
        number: of the panel, from 0 on.
    """

    def __init__(self, look: Look, number: int) -> None:
        self.look, self.number = look, number
        self.study: Study | None = None
        self._drawings = 0  # counted, so that the latest wins
        self._notes: dict[str, ui.label] = {}
        self._pictures: dict[str, ui.element] = {}

    def build_picture(self, title: str, named: bool) -> None:
        """Lay out the place of a stage's picture."""
        with ui.element("div").classes("look"):
            if named:
                ui.label(self.look.name).classes("small")
            self._notes[title] = ui.label(f"{WAITING}.").classes("wide note")
            with ui.element("div").classes("frame"):
                self._pictures[title] = ui.element("img").classes("picture").props(f"alt={title}")
                self._pictures[title].set_visibility(False)
                if title == LAST:
                    self._boxes = ui.html("", sanitize=False)

    def build_list(self, named: bool) -> None:
        """Lay out the list of detections and the buttons for files."""
        if named:
            ui.label(self.look.name).classes("small")
        self.count = ui.label(WAITING).classes("count")
        self._table = ui.table(columns=COLUMNS, rows=[], row_key="key").classes("wide rows")
        self._table.props('flat dense no-data-label="None of its classes, at this score"').add_slot("body", ROW)
        with ui.row():
            files = ((self._picture_file, "Picture"), (self._json_file, "JSON"))
            self._buttons = [
                ui.button(text, icon="download", on_click=call).props("flat dense") for call, text in files
            ]
        self._enable(False)

    def begin(self, study: Study | None) -> None:
        """Take another image; its pictures come when they are drawn."""
        self.study = study
        self._enable(study is not None)
        for stage in STAGES:
            self.show(stage.title, None, "Drawing ...")

    async def draw(self, threshold: float, classes: Sequence[str], image: int) -> None:
        """Show the detections that are chosen; `image` counts images, so that keys of boxes are of one alone."""
        if (study := self.study) is None:
            self.count.set_text(WAITING)
            return
        self._drawings += 1
        number, prefix = self._drawings, f"{image}-{self.number}-"
        where = study.where(threshold, classes)
        self._chosen = study.found.take(where)
        self.count.set_text(f"{len(where)} of {len(study.found)} detections, found in {study.seconds:.2f} s")
        self._table.rows = study.rows(where, prefix)
        picture = await asyncio.to_thread(study.picture, self._chosen)
        if number == self._drawings:
            self.show(LAST, picture)
            self._boxes.set_content(study.boxes(where, prefix))

    async def turn(self, title: str) -> None:
        """Draw a stage, unless it is drawn."""
        study, looked_at = self.study, [stage for stage in STAGES if stage.title == title]
        if study is None or not looked_at:
            return
        try:
            picture, note = await asyncio.to_thread(study.stage, looked_at[0]), ""
        except ValueError as error:
            picture, note = None, f"Nothing to see here: {error}."
        if study is self.study:
            self.show(title, picture, note)

    def show(self, title: str, picture: str | None, note: str = "") -> None:
        """Put a picture, or a note in its place, into a stage."""
        self._notes[title].set_text(note)
        self._notes[title].set_visibility(bool(note))
        self._pictures[title].set_visibility(picture is not None)
        self._pictures[title].props["src"] = picture or ""
        self._pictures[title].update()

    def _enable(self, on: bool) -> None:
        for button in self._buttons:
            button.set_enabled(on)

    async def _picture_file(self) -> None:
        assert self.study is not None
        content = await asyncio.to_thread(self.study.jpeg, self._chosen)
        ui.download.content(content, f"{Path(self.study.name).stem}_detections.jpg")

    def _json_file(self) -> None:
        assert self.study is not None
        ui.download.content(self.study.json(self._chosen), f"{Path(self.study.name).stem}_detections.json")


class Page:
    """What one visitor sees.

    Args:
        looks: one detector, or two that are shown side by side.
        begin_with: pictures, and what they are.
    """

    def __init__(self, looks: Sequence[Look], begin_with: tuple[Sequence[Example], str] = ((), "")) -> None:
        self.panels = [Panel(look, number) for number, look in enumerate(looks)]
        self._examples, self._examples_are = begin_with
        self._images = 0  # counted, so that the latest wins

    def build(self) -> None:
        """Lay the page out."""
        ui.colors(primary="#2f5d8c")
        ui.add_css(STYLE)
        ui.add_body_html(SCRIPT)
        with ui.row().classes("head"):
            ui.label("Detector, step by step").classes("title")
            for panel in self.panels:
                detector, kind = panel.look.detector, "boxes and masks" if panel.look.model.has_masks else "boxes"
                ui.label(f"{panel.look.name} · {len(detector.class_names)} classes · {kind} · {detector.device}")
        with ui.element("main").classes("areas"):
            with ui.column().classes("card controls"):
                self._build_controls()
            with ui.column().classes("card stages"):
                self._build_stages()
            with ui.column().classes("card list"):
                for panel in self.panels:
                    panel.build_list(named=len(self.panels) > 1)

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
        if self._examples:
            ui.label(f"{self._examples_are}:").classes("small")
            with ui.element("div").classes("examples"):
                for example in self._examples:
                    with ui.element("button").classes("example") as button:
                        small = ui.element("img")
                    small.props["src"], small.props["alt"] = example.small, example.name
                    button.on("click", lambda _, chosen=example: self._look_at(chosen.path, chosen.name))
        with ui.row().classes("line"):
            ui.label("Score at least")
            score = ui.label().classes("count")
        self._threshold = ui.slider(min=0, max=1, step=0.01, value=0.5, on_change=self._draw).props("aria-label=Score")
        score.bind_text_from(self._threshold, "value", lambda value: f"{value:.2f}")
        names = list(dict.fromkeys(name for panel in self.panels for name in panel.look.detector.class_names))
        self._classes = ui.select(names, multiple=True, label="Classes (none chosen: all)", on_change=self._draw)
        self._classes.props("use-chips outlined dense clearable").classes("wide classes")
        for sentence in dict.fromkeys(knows(panel.look.detector.class_names) for panel in self.panels):
            ui.label(sentence).classes("small knows")

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
                    with ui.element("div").classes("pictures"):
                        for panel in self.panels:
                            panel.build_picture(title, named=len(self.panels) > 1)

    async def _take(self, event: events.UploadEventArguments) -> None:
        """Look at an image that was dropped."""
        self._upload.reset()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image"
            await event.file.save(path)
            await self._look_at(path, event.file.name)

    async def _look_at(self, path: Path, name: str) -> None:
        """Read an image, detect in it and show it; what can't be read leaves the page as it was."""
        self._images += 1
        number = self._images
        self._say("")
        for panel in self.panels:
            panel.count.set_text("Detecting ...")
        try:
            studies = [await asyncio.to_thread(panel.look.at, path, name) for panel in self.panels]
        except (DataError, RuntimeError) as error:  # the latter: no memory for it
            if number == self._images:
                self._say(str(error).replace(str(path), name))
                await self._draw()
            return
        for study in studies:
            print(f"{name}: {len(study.found)} detections in {study.seconds:.2f} s", flush=True)
        if number == self._images:
            self._say("; ".join(problem for problem, _ in remarks(path)))
            for panel, study in zip(self.panels, studies, strict=True):
                panel.begin(study)
            await self._draw()
            await self._turn()

    async def _draw(self) -> None:
        for panel in self.panels:
            await panel.draw(self._threshold.value, self._classes.value or (), self._images)

    async def _turn(self) -> None:
        for panel in self.panels:
            await panel.turn(self._stepper.value)

    def _say(self, error: str) -> None:
        self._error.set_text(error)
        self._error.set_visibility(bool(error))


def serve(ckpts: Sequence[Path], host: str, port: int, device: str = "auto", trust: Iterable[str] = ()) -> None:
    """Serve the page of one checkpoint, or of two side by side, until interrupted.

    Args:
        ckpts: of `detection fit`, or .safetensors.
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
    looks = []
    for ckpt in ckpts:
        detector = Detector.from_checkpoint(ckpt, device, trust=trust)
        looks.append(Look(detector, model_of(detector), f"{ckpt.parent.name}/{ckpt.name}"))
    app.on_startup(lambda: print(f"{ckpts[0]}: http://{host}:{port} (Ctrl-C ends it)", flush=True))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        begin_with = examples(ckpts[0], looks[0].detector.form, Path(folder), trust)
        ui.run(lambda: Page(looks, begin_with).build(), host=host, port=port, title=looks[0].name, favicon="🔍",
               dark=None, show=False, reload=False, show_welcome_message=False)  # fmt: skip
