"""Throughput counts training time only; no figure is waited for; the table shows what was logged."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from detection.batch import Batch
from detection.training.callbacks import Bar, Results, Throughput, result_table
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
            shown.append(Bar().get_metrics(trainer, module))

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "devices": 1, "use_distributed_sampler": False}
    run = L.Trainer(max_steps=2, callbacks=[Throughput(), Look()], **quiet)  # type: ignore[arg-type]
    module = make_module()
    module.images_per_batch = 4
    run.fit(module, DataLoader([make_batch(0), make_batch(1)], batch_size=None))  # type: ignore[arg-type]
    (_, (bar, figures), last) = shown
    assert bar == {} and {"train/loss", "images/s", "lr", "memory/process_gib"} <= figures.keys()
    assert {value.device.type for value in figures.values()} == {"cpu"}
    assert last["loss"] > 0 and last["images/s"] > 0


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
    logging.getLogger("detection").propagate = True  # other tests have set up the command line's output
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
