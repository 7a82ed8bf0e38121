"""Throughput counts training time only; no figure is waited for; bar and table show what was logged, in order."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import rich
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from detection.batch import Batch
from detection.evaluation.results import ImageResult
from detection.training.callbacks import (
    LEGEND,
    Bar,
    Results,
    Throughput,
    above,
    judged_colours,
    result_table,
    time_left,
)
from detection.training.module import DetectionModule
from tests.test_distributed import make_batch, make_module


class Module:
    """Stands in for the LightningModule: keeps what is logged."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def log(self, name: str, value: float, **options: Any) -> None:
        self.logged[name] = value

    def log_dict(self, values: dict[str, float], **options: Any) -> None:
        self.logged |= values


def trainer(**values: Any) -> Any:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}])
    return SimpleNamespace(world_size=2, optimizers=[optimizer], is_global_zero=True, sanity_checking=False, **values)


def test_throughput_counts_all_devices_and_no_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    callback, module = Throughput(), Module()

    def step(wait: float, work: float, dropped: int, *unreadable: str) -> None:
        batch = Batch(*[torch.zeros(4)] * 6, objects_given=10, objects_dropped=dropped, unreadable=unreadable)
        clock[0] += wait
        callback.on_train_batch_start(trainer(), module, batch, 0)  # type: ignore[arg-type]
        clock[0] += work
        callback.on_train_batch_end(trainer(), module, None, batch, 0)  # type: ignore[arg-type]

    callback.on_train_epoch_start(trainer(), module)  # type: ignore[arg-type]
    step(1.0, 3.0, 4, "a.png: truncated")
    clock[0] += 100
    callback.on_validation_end(trainer(), module)  # type: ignore[arg-type]
    step(1.0, 3.0, 1)
    assert 0.01 < module.logged.pop("memory/process_gib") < 100
    module.logged.pop("memory/gpu_peak_gib", None)
    assert module.logged == {
        "images/s": pytest.approx(2 * 4 * 2 / 8),
        "time/data": pytest.approx(2 / 8),
        "data/dropped_boxes": pytest.approx(5 / 20),
        "data/unreadable": 1,
        "lr": 0.25,
    }


def test_no_step_waits_for_a_figure_that_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device of tensors without values a number is lost, as on a GPU it is waited for; a bar reads at once."""
    monkeypatch.setattr(DetectionModule, "device", property(lambda module: torch.device("meta")))
    shown: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            shown.append((dict(trainer.progress_bar_metrics), dict(trainer.callback_metrics)))

        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            shown.append(
                {
                    name: float(trainer.callback_metrics[name])
                    for name in Bar.FIGURES
                    if name in trainer.callback_metrics
                }
            )

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "devices": 1, "use_distributed_sampler": False}
    run = L.Trainer(max_steps=2, callbacks=[Throughput(), Look()], **quiet)  # type: ignore[arg-type]
    module = make_module()
    module.images_per_batch = 4
    run.fit(module, DataLoader([make_batch(0), make_batch(1)], batch_size=None))  # type: ignore[arg-type]
    (_, (bar, figures), last) = shown
    assert bar == {} and {"train/loss", "images/s", "lr", "memory/process_gib"} <= figures.keys()
    assert {value.device.type for value in figures.values()} == {"cpu"}
    assert last["train/loss"] > 0 and last["images/s"] > 0


def test_best_epoch_is_kept_and_survives_a_checkpoint() -> None:
    results = Results()
    for step, value in enumerate([0.1, 0.4, 0.3]):
        metrics = {"val/map": value, "val/ap/cat": value, "train/loss": 1.0}
        run = trainer(callback_metrics=metrics, global_step=step, current_epoch=step)
        results.on_validation_end(run, Module())  # type: ignore[arg-type]
    run = trainer(callback_metrics={"val/map": 0.9}, global_step=3, current_epoch=3)
    run.sanity_checking = True
    results.on_validation_end(run, Module())  # type: ignore[arg-type]
    restored = Results()
    restored.load_state_dict(results.state_dict())
    assert (restored.best_step, restored.best) == (1, {"val/map": 0.4, "val/ap/cat": 0.4})


def test_validation_without_an_object_is_no_result(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    results = Results()
    run = trainer(callback_metrics={"val/map": -1.0, "val/loss": 0.5}, global_step=1, current_epoch=0)
    results.on_validation_end(run, Module())  # type: ignore[arg-type]
    assert results.best == {} and "step 1: validation loss 0.500" in caplog.text and "mAP" not in caplog.text


def test_table_has_a_row_for_each_class_and_figure() -> None:
    metrics = {"val/ap/cat": 0.25, "val/ap/dog": 0.75, "val/map": 0.5, "val/map_50": 0.875, "val/map_small": -1.0}
    console = Console(width=60)
    with console.capture() as capture:
        console.print(result_table(metrics, "val", "Validation"))
    text = capture.get()
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    found = {row[0].strip(): row[1].strip() for row in rows}
    assert found == {"cat": "0.250", "dog": "0.750", "AP": "0.500", "AP50": "0.875"}


class Steps(L.LightningModule):
    """Trains nothing, but logs what the bar and the table show."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("train/loss", 1.25)
        self.log("images/s", 123.4)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log_dict({"val/map": 0.5, "val/ap/cat": 0.25, "val/ap/dog": 0.75})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What goes to rich's console, as if it were a terminal."""
    yield io.StringIO()
    rich.reconfigure()


def screen(text: str, width: int) -> list[str]:
    """The lines of a terminal of that width, as far as rich moves its cursor: up, to the left, and erasing."""
    lines, row, column = [""], 0, 0
    for code, letter in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|(.)", text, re.DOTALL):
        if code.endswith("A"):
            row -= int(code[:-1] or 1)
        elif code == "2K":
            lines[row] = ""
        elif letter == "\r":
            column = 0
        elif letter:
            if letter == "\n" or column == width:
                row, column = row + 1, 0
                lines += [""] * (row == len(lines))
            if letter != "\n":
                lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
                column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_bar_is_one_line_and_leaves_the_table_whole(
    width: int, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10.25 * 2**30)
    bar = Bar()
    bar._console_kwargs = {"file": written, "width": width, "force_terminal": True, "legacy_windows": False}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 1}
    run = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[bar, Results()], **quiet)  # type: ignore[arg-type]
    run.fit(Steps(), DataLoader(torch.zeros(4)), DataLoader(torch.zeros(2)))  # type: ignore[arg-type]
    lines = [line for line in screen(written.getvalue(), width) if line]
    assert lines[0].startswith("epoch 3/3") and "4/4" in lines[0] and "0:00:00 left loss 1.250" in lines[0]
    assert lines[0].endswith("loss 1.250 mAP 0.500 123 img/s 10.2 GiB" if width > 60 else "loss 1.250 mAP 0.500")
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in lines if line.startswith("│")]
    assert rows == [["cat", "0.250"], ["dog", "0.750"], ["AP", "0.500"]] and lines[-1].startswith("└")
    assert not any("epoch" in line for line in lines[1:])


def test_time_left_is_that_of_the_whole_run() -> None:
    run = trainer(global_step=30, estimated_stepping_batches=3630)
    assert time_left(run, first_step=20, seconds=10.0) == "1:00:00 left"
    assert time_left(run, first_step=30, seconds=1.0) == ""  # nothing to judge by
    run.estimated_stepping_batches = float("inf")
    assert time_left(run, first_step=20, seconds=10.0) == ""


def test_pictures_colour_what_is_right_wrong_and_missed() -> None:
    """A right one, one below the threshold whose object is missed then, one where nothing is, one on a crowd."""
    boxes = np.array([[10, 10, 30, 30], [50, 50, 70, 70], [80, 0, 99, 20], [0, 60, 20, 90]], np.float32)
    scores = np.array([0.9, 0.3, 0.8, 0.7], np.float32)
    gt = np.array([[0, 60, 40, 99], [10, 10, 30, 30], [50, 50, 70, 70]], np.float32)
    crowd = np.array([True, False, False])
    result = ImageResult(1, "a.jpg", (100, 100), boxes, np.ones(4, int), scores, None, gt, np.ones(3, int),
                         np.full(3, 400, np.float32), crowd, np.zeros(3, bool), None)  # fmt: skip
    objects, found = judged_colours(above(result, 0.5), num_classes=2)
    grey, right, wrong, missed = (LEGEND[name] for name in ("crowd, not judged", "right, found", "wrong", "missed"))
    assert objects == [grey, right, missed] and found == [right, wrong, grey]
    assert judged_colours(result, num_classes=2)[0] == [grey, right, right]
