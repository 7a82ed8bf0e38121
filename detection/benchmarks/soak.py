"""Whether a long run stays as it began: memory of its processes, open files and time a step, as slopes over the steps.

A tiny detector trains on the drawn scenes, with validation and saving. After each step the resident memory and the open
files of this process and of its loaders' are read from /proc. The first fifth of the steps is left out, as caches fill
and workers start in it; the rest is averaged in ten parts, through which a line is laid. Its slope is given for 1,000
steps with its 95 % interval: a leak is a slope whose interval has no zero in it and that matters.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray

from detection.data.datamodule import DetectionDataModule
from detection.models.zoo import fasterrcnn_efficientnet_lite0_fpn
from detection.training.module import DetectionModule
from detection.training.safety import Guard

PARTS, T_975 = 10, 2.306  # Student's t of 10 - 2 degrees of freedom
WARM_UP = 0.2
UNITS = ("MiB", "MiB", "files", "files", "ms")
QUANTITIES = ("memory", "memory of the largest worker", "open files", "open files of workers", "time a step")


class Samples(L.Callback):
    """One row a step: what `QUANTITIES` names."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []
        self._started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        seconds = time.perf_counter() - self._started
        workers = [process.pid or 0 for process in multiprocessing.active_children()]
        memory = [_resident(pid) for pid in workers]
        files = [_open_files(pid) for pid in workers]
        own = os.getpid()
        self.rows.append((_resident(own), max(memory, default=0), _open_files(own), sum(files), 1000 * seconds))


def _resident(pid: int) -> float:
    """MiB of memory that a process has, what it shares with others included; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return 0.0


def _open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def slope(values: NDArray[np.float64]) -> tuple[float, float]:
    """Of a line through the means of `PARTS` parts of equal length: its slope a step, and half its 95 % interval.

    Means, because neighbouring samples say the same thing: each for itself would make the interval far too small.
    """
    parts = np.array_split(np.arange(len(values)), PARTS)
    x = np.array([part.mean() for part in parts])
    y = np.array([values[part].mean() for part in parts])
    x = x - x.mean()
    steepness = float((x * y).sum() / (x**2).sum())
    rest = y - y.mean() - steepness * x
    return steepness, T_975 * float(np.sqrt((rest**2).sum() / (PARTS - 2) / (x**2).sum()))


def soak(steps: int = 2000, num_workers: int = 2, validate_every: int = 200) -> list[dict[str, Any]]:
    """Train for that many steps; one row for each quantity.

    Args:
        steps: of training.
        num_workers: loader processes, for training and for validation each.
        validate_every: steps between validations; after each a checkpoint is saved.
    """
    data = DetectionDataModule(batch_size=4, num_workers=num_workers, min_size=64, max_size=128)
    detector = fasterrcnn_efficientnet_lite0_fpn(
        num_classes=len(data.class_names) + 1,
        weights_backbone=None,
        fpn_channels=16,
        min_size=64,
        max_size=128,
        box_batch_size_per_image=32,
    )
    samples = Samples()
    with tempfile.TemporaryDirectory() as folder:
        saved = ModelCheckpoint(folder, "last", enable_version_counter=False)
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=validate_every,
            check_val_every_n_epoch=None,
            limit_val_batches=10,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Guard(Path(folder)), samples, saved],
        )
        trainer.fit(DetectionModule(detector, data.class_names), datamodule=data)
    return summarise(np.array(samples.rows))


def summarise(rows: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Where each quantity was after the warm-up and at the end, and its slope for 1,000 steps."""
    kept, found = rows[int(WARM_UP * len(rows)) :], []
    for name, unit, values in zip(QUANTITIES, UNITS, kept.T, strict=True):
        steepness, half = slope(values)
        tenth = max(1, len(values) // PARTS)
        ends = float(np.median(values[:tenth])), float(np.median(values[-tenth:]))
        found.append(
            {"quantity": name, "unit": unit, "steps": len(rows), "after warm-up": ends[0], "at the end": ends[1]}
            | {"slope / 1000 steps": 1000 * steepness, "+-": 1000 * half}
        )
    return found
