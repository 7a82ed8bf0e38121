"""Callbacks that only watch: throughput, a progress bar, pictures of predictions, and the tables of results."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import RichProgressBar
from PIL import ImageColor
from rich import get_console
from rich.progress import TaskID, TextColumn
from rich.table import Table

from detection.batch import Batch
from detection.data.images import read_image
from detection.evaluation.analysis import BACKGROUND, IGNORED, RIGHT, analyse
from detection.evaluation.plots import COLOURS, FAINT, MISSED
from detection.evaluation.results import ImageResult, spread
from detection.training.loaders import image_folder, image_format
from detection.training.module import DetectionModule
from detection.training.optimisation import rates
from detection.visualize import Colour, draw_objects, side_by_side

log = logging.getLogger(__name__)


class Throughput(L.Callback):
    """Logs `images/s` over all devices, the fraction of time spent waiting for data, the learning rates and memory.

    `lr` is the rate that the step was taken with, `lr/<part>` that of each part with a rate of its own.

    Memory is that of the first process, without its workers, and the most that tensors took on its GPU. And what the
    data lost, on the first device: `data/dropped_boxes`, the share of objects of which the augmentation left nothing,
    and `data/unreadable`, how many times an image could not be read and another took its place.

    Args:
        window: steps that are averaged.
        line_every: seconds between lines in the log; 0 for none, where a progress bar shows the same.
    """

    def __init__(self, window: int = 20, line_every: float = 0.0) -> None:
        self._steps: deque[tuple[float, float, int, int, int]] = deque(maxlen=window)
        self._unreadable = 0
        self._line_every, self._last_line = line_every, time.perf_counter()
        self._ended = self._started = 0.0
        self._rates: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = time.perf_counter()  # validation in the middle of an epoch is no waiting for data

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()
        self._rates = rates(trainer.optimizers[0])  # at the end of the batch they are those of the next step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        objects = batch.objects_given, batch.objects_dropped
        self._steps.append((now - self._ended, self._started - self._ended, len(batch) * trainer.world_size, *objects))
        self._ended = now
        seconds, waiting, images, given, dropped = (sum(column) for column in zip(*self._steps, strict=True))
        self._unreadable += len(batch.unreadable)
        figures = {"images/s": images / seconds, "time/data": waiting / seconds, **self._rates}
        figures |= {"data/dropped_boxes": dropped / max(given, 1), "data/unreadable": float(self._unreadable)}
        figures["memory/process_gib"] = resident_bytes() / 2**30
        if torch.cuda.is_available():
            figures["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        # Of a number Lightning makes a tensor on the GPU, and waits for the copy: a tensor stays where it is
        pl_module.log_dict({name: torch.tensor(value) for name, value in figures.items()}, batch_size=1)
        if self._line_every and now - self._last_line > self._line_every and trainer.is_global_zero:
            self._last_line = now
            loss = float(trainer.callback_metrics.get("train/loss", torch.nan))
            log.info(
                "step %d of %g: loss %.3f, %.1f images/s",
                trainer.global_step,
                trainer.estimated_stepping_batches,
                loss,
                images / seconds,
            )


def resident_bytes() -> int:
    """Memory of this process, now on Linux, elsewhere at its peak."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Bar(RichProgressBar):
    """One line: epochs from 1, time left for the whole run, and as many figures as there is room for.

    The time left is what the steps to come take at the pace of those so far, validations included.
    """

    FIGURES: Mapping[str, str] = {  # the last are left out first where the line is full
        "train/loss": "loss {:.3f}",
        "val/map": "mAP {:.3f}",
        "images/s": "{:.3g} img/s",
        "gpu": "{:.1f} GiB",
    }
    SHORTEST = 5  # columns of the bar itself

    def __init__(self) -> None:
        super().__init__(refresh_rate=4)
        self._read = self._began = 0.0
        self._first_step = 0

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """All but the bar keep their width."""
        texts = ("{task.completed:.0f}/{task.total:.0f}", "{task.fields[left]}", "{task.fields[figures]}")
        return [*super().configure_columns(trainer)[:2], *map(TextColumn, texts)]

    def _add_task(self, total_batches: float, description: str, visible: bool = True) -> TaskID:
        assert self.progress is not None
        return self.progress.add_task(description, total=total_batches, visible=visible, left="", figures="")

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        name = f"epoch {current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")
        return f"{name:{len(self.validation_description)}}"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began, self._first_step = time.perf_counter(), trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read = 0.0
        self._update_metrics(trainer, pl_module)
        self._stop_progress()  # or it would be drawn over the table of results

    def _update_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Twice a second, as each reading of a figure waits for the device."""
        if self.progress is None or self.train_progress_bar_id is None or time.perf_counter() - self._read < 0.5:
            return
        self._read, task = time.perf_counter(), self.train_progress_bar
        logged = trainer.callback_metrics  # what is logged with `prog_bar` Lightning reads in every step
        metrics = {name: float(logged[name]) for name in self.FIGURES if name in logged}
        if torch.cuda.is_available():
            metrics["gpu"] = torch.cuda.max_memory_allocated() / 2**30
        left = time_left(trainer, self._first_step, self._read - self._began)
        taken = (task.description, f"{task.total:.0f}/{task.total:.0f}", left)
        room = self.progress.console.width - sum(map(len, taken)) - self.SHORTEST - 5  # spaces between columns
        texts = [form.format(metrics[name]) for name, form in self.FIGURES.items() if name in metrics]
        while texts and len(" ".join(texts)) > room:
            texts.pop()
        self.progress.update(self.train_progress_bar_id, left=left, figures=" ".join(texts))


def time_left(trainer: L.Trainer, first_step: int, seconds: float) -> str:
    """Hours, minutes and seconds until the end of a run that took `seconds` since `first_step`; nothing if unknown."""
    done, total = trainer.global_step - first_step, trainer.estimated_stepping_batches
    if done <= 0 or not math.isfinite(total):
        return ""
    return f"{timedelta(seconds=round(seconds / done * max(total - trainer.global_step, 0)))} left"


class PredictionPictures(L.Callback):
    """After each validation `predictions.jpg`: the same images each time, ground truth beside predictions.

    Objects are found or missed, predictions right or wrong, judged at IoU .50 among those that are drawn.

    It reads the image files, which only `DetectionDataModule` knows; with other loaders there is no picture.

    Args:
        folder: where the picture goes.
        count: how many images, spread over the validation split.
        score_thresh: detections below it are not drawn.
    """

    def __init__(self, folder: str, count: int = 8, score_thresh: float = 0.5) -> None:
        self.path = Path(folder) / "predictions.jpg"
        self.count, self.score_thresh = count, score_thresh
        self._told = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: DetectionModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking or not trainer.is_global_zero or is_rehearsal(trainer):
            return
        root, names = image_folder(trainer), pl_module.class_names
        if root is None:
            if not self._told:
                log.warning(
                    "no %s: the files of these images are not known, as those of DetectionDataModule are", self.path
                )
            self._told = True
            return
        pairs = []
        for result in spread(pl_module.metric.results, self.count):
            image = read_image(root / result.file_name, result.size, form=image_format(trainer))
            shown = above(result, self.score_thresh)
            of_objects, of_found = judged_colours(shown, len(names))
            truth = (shown.gt_boxes, shown.gt_labels, names, None, shown.gt_masks)
            found = (shown.boxes, shown.labels, names, shown.scores, shown.masks)
            edges = skeleton.edges if (skeleton := pl_module.metric.skeleton) is not None else ()
            left = draw_objects(image, *truth, colours=of_objects, keypoints=shown.gt_keypoints, edges=edges)
            right = draw_objects(image, *found, colours=of_found, keypoints=shown.keypoints, edges=edges)
            pairs.append((left, right))
        if pairs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            titles = ("ground truth", f"predictions with score >= {self.score_thresh}")
            sheet = side_by_side(pairs, titles, legend=LEGEND)
            sheet.save(self.path, quality=88)


FOUND, WRONG, LOST, CROWD = (ImageColor.getrgb(c)[:3] for c in (COLOURS[RIGHT], COLOURS[BACKGROUND], MISSED, FAINT))
LEGEND = {"right, found": FOUND, "wrong": WRONG, "missed": LOST, "crowd, not judged": CROWD}


def above(result: ImageResult, score: float) -> ImageResult:
    """The result with those detections alone that score at least `score`."""
    keep = np.flatnonzero(result.scores >= score)
    masks = None if result.masks is None else [result.masks[i] for i in keep.tolist()]
    points = None if result.keypoints is None else result.keypoints[keep]
    kept = {name: getattr(result, name)[keep] for name in ("boxes", "labels", "scores")}
    return replace(result, **kept, masks=masks, keypoints=points)


def judged_colours(result: ImageResult, num_classes: int) -> tuple[list[Colour], list[Colour]]:
    """The colours of `LEGEND` of each object and of each detection of an image."""
    judged = analyse([result], num_classes, limit=max(1, len(result.labels)))
    objects, found = [CROWD] * len(result.gt_labels), [CROWD] * len(result.labels)
    for place, is_found, is_crowd in zip(judged.gt.place, judged.found, judged.gt.crowd, strict=True):
        objects[place] = CROWD if is_crowd else FOUND if is_found else LOST
    for place, kind in zip(judged.dt.place, judged.kind, strict=True):
        found[place] = FOUND if kind == RIGHT else CROWD if kind == IGNORED else WRONG
    return objects, found


class SplitFile(L.Callback):
    """Writes which images train and which validate to `split.json`, where the data module has made that split.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """By then a run that goes on has its own split back."""
        made_split = getattr(getattr(trainer, "datamodule", None), "made_split", lambda: None)
        if trainer.is_global_zero and not is_rehearsal(trainer) and (made := made_split()):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "split.json").write_text(json.dumps(made.to_plain(), indent=1, ensure_ascii=False))


def is_rehearsal(trainer: L.Trainer) -> bool:
    """Whether it is `--trainer.fast_dev_run`, which leaves nothing on disk."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


class Results(L.Callback):
    """A line in the log after each validation, and a table of the best one by class at the end."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self.best_step = -1

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # or a run that ends in the middle of an epoch would end without validation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "val/map" not in metrics:
            return
        if metrics["val/map"] > self.best.get("val/map", -1.0):  # -1: there was no object to find
            self.best = {name: value for name, value in metrics.items() if name.startswith("val/")}
            self.best_step = trainer.global_step
        shown = {"train/loss": "loss", "val/loss": "validation loss", "val/map": "mAP", "val/map_50": "AP50"}
        shown |= {"val/segm_map": "mask mAP", "val/keypoints_map": "OKS mAP"}
        figures = [f"{title} {metrics[name]:.3f}" for name, title in shown.items() if metrics.get(name, -1.0) != -1]
        if "images/s" in metrics:
            figures.append(f"{metrics['images/s']:.1f} images/s")
        if trainer.is_global_zero:
            log.info("epoch %d, step %d: %s", trainer.current_epoch + 1, trainer.global_step, ", ".join(figures))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.best:
            get_console().print(result_table(self.best, "val", f"Validation at step {self.best_step}, the best"))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero and "test/map" in metrics:
            get_console().print(result_table(metrics, "test", "Test"))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]


SUMMARY = {
    "map": "AP",
    "map_50": "AP50",
    "map_75": "AP75",
    "map_small": "AP small",
    "map_medium": "AP medium",
    "map_large": "AP large",
    "mar_100": "AR100",
    "proposals_ar_100": "AR100 of proposals",
    "segm_map": "mask AP",
    "segm_map_50": "mask AP50",
    "segm_map_75": "mask AP75",
    "keypoints_map": "OKS AP",
    "keypoints_map_50": "OKS AP50",
    "keypoints_map_75": "OKS AP75",
}


def result_table(metrics: Mapping[str, float], stage: str, title: str) -> Table:
    """AP of each class, then the summary figures; a class without ground truth has no AP and no row.

    Args:
        metrics: as the module logs them, `"<stage>/map"` and `"<stage>/ap/<class>"`.
        stage: `val` or `test`.
        title: of the table.
    """
    table = Table(title=title, min_width=len(title) + 2)
    table.add_column("class")
    table.add_column("AP", justify="right")
    prefix = f"{stage}/ap/"
    for name, value in metrics.items():
        if name.startswith(prefix):
            table.add_row(name.removeprefix(prefix), f"{value:.3f}")
    table.add_section()
    for key, label in SUMMARY.items():
        value = metrics.get(f"{stage}/{key}", -1.0)
        if value > -1:
            table.add_row(label, f"{value:.3f}", style="bold" if key == "map" else None)
    return table
