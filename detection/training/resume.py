"""A run that goes on as if it had not been stopped: `last.ckpt` with all that Lightning leaves out, and signals.

Lightning's checkpoint has weights, optimiser, schedule, counters and callbacks. `KeepLast` adds the state of the random
numbers, the place in the data and the number of rows in `metrics.csv`, and saves where Lightning resumes exactly:
between two steps, at either end of a validation, at the end of an epoch without one.
"""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint

from detection.training.checkpoints import LAST
from detection.training.loggers import MetricsFile

log = logging.getLogger(__name__)

INTERRUPTED = 75  # exit code, EX_TEMPFAIL of sysexits.h: stopped before the end, try again later


class Interrupted(Exception):  # noqa: N818
    """The run was told to stop and has saved; it ends with the exit code `INTERRUPTED`."""


class Request:
    """What a process wants at the end of a step; the largest of all ranks counts."""

    NOTHING, SAVE, STOP, REQUEUE = range(4)


class Signals:
    """Notes down SIGTERM, SIGUSR1 and SIGINT (Ctrl-C); a second one, a second or more after the first, kills at once.

    A signal that launchers pass on to a process that has got it already is no second one, hence the second. SIGUSR1 is
    what a cluster sends before a time limit, if asked to (`sbatch --signal=USR1@120`).
    """

    def __init__(self) -> None:
        self.request, self.name = Request.NOTHING, ""
        self._process, self._first = os.getpid(), 0.0

    def install(self) -> None:
        """Take over from Lightning, which would save in the middle of a step; its end restores what was before it."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a loader's process, which got the handler by fork, leaves it to its parent
        if self.request and time.monotonic() - self._first > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)
        if not self.request:
            self._first = time.monotonic()
            self.name = signal.Signals(number).name
            os.write(2, f"{self.name}: saving after this step, then stopping; once more stops at once\n".encode())
            self.request = Request.REQUEUE if number == signal.SIGUSR1 else Request.STOP


class KeepLast(Checkpoint):
    """Saves `last.ckpt`: between two steps, before and after each validation, after each epoch without, at the end.

    From any of them the run goes on as if it had not been stopped; on the CPU bit for bit. When a signal came, to any
    rank, all ranks save after the step and raise `Interrupted`; a validation is broken off, and done anew later.

    Args:
        folder: of the run.
        every: minutes between two saves within an epoch; 0 saves after each step.
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.path, self.every = folder / LAST, every
        self._signals = Signals()
        self._saved_at = time.monotonic()
        self._saved_step = self._step = -1
        self._validating = self._due = False
        self._restored: dict[str, Any] | None = None

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.install()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.install()
        self._watch_loader(trainer)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        if self._restored is not None:
            # Lightning restores a loader only where it makes it after reading the checkpoint. Ours is made before, when
            # the schedule asks for the number of steps (`estimated_stepping_batches`).
            batches = self._restored.get("batches", {}).get("batches")
            trainer.train_dataloader.load_state_dict(_next(self._restored["loader"], batches))  # type: ignore[union-attr]
            _share_epoch_anew(trainer, batches)
            # The counts that `_begin_anew` wrote were for Lightning alone: the next checkpoint has true ones.
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
            states = self._restored["random"]
            if trainer.global_rank < len(states):
                set_random_state(states[trainer.global_rank])
            self._restored = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch_loader(trainer)

    def _watch_loader(self, trainer: L.Trainer) -> None:
        trainer.train_dataloader.between_steps = partial(self._between_steps, trainer)  # type: ignore[union-attr]

    def _between_steps(self, trainer: L.Trainer) -> None:
        """Save if it is time, stop if a signal came.

        Lightning has no hook here: `on_train_batch_end` comes before the figures of the step are logged,
        `on_train_batch_start` after the next batch was taken.
        """
        if not self._fitting(trainer) or trainer.global_step == self._step:
            return  # between two accumulated batches: their gradients are in no checkpoint
        self._step = trainer.global_step
        due = self._due or time.monotonic() - self._saved_at >= 60 * self.every
        request = self._agree(trainer, Request.SAVE if due else Request.NOTHING)
        if request and self._saved_step != trainer.global_step:
            self._save(trainer)
        self._stop(trainer, request)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # After the last step of all Lightning would not validate again
        if self._fitting(trainer) and not trainer.should_stop:
            self._validating = True
            self._save(trainer)
            self._validating = False

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.state.fn == "fit":
            self._stop(trainer, self._agree(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._fitting(trainer):
            self._save(trainer)
            self._stop(trainer, self._agree(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._fitting(trainer) and self._saved_step != trainer.global_step:
            if trainer.max_steps == -1:
                self._save(trainer)
            else:
                self._due = True  # Lightning would resume here with a step too many: save after the next

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._fitting(trainer) and self._saved_step != trainer.global_step:
            self._save(trainer)

    @staticmethod
    def _fitting(trainer: L.Trainer) -> bool:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fitting and not getattr(trainer, "fast_dev_run", False)

    def _agree(self, trainer: L.Trainer, request: int = Request.NOTHING) -> int:
        request = max(request, self._signals.request)
        if trainer.world_size == 1:
            return request
        largest = torch.tensor(request, device=trainer.strategy.root_device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved_at, self._saved_step, self._due = time.monotonic(), trainer.global_step, False

    def _stop(self, trainer: L.Trainer, request: int) -> None:
        if request < Request.STOP:
            return
        if trainer.is_global_zero and request == Request.REQUEUE:
            requeue()
        reason = self._signals.name or "another rank was told to stop"
        way_on = f"go on with --resume {self.path.parent}" if self.path.exists() else "there was nothing to save yet"
        raise Interrupted(f"{reason}: stopped at step {trainer.global_step}; {way_on}")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.train_dataloader is None:
            return  # Lightning's search for a learning rate saves before there is anything to go on with
        state = random_state(trainer.strategy.root_device)
        states = [state] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(states, state)
        rows = [logger.rows for logger in trainer.loggers if isinstance(logger, MetricsFile)]
        loader = trainer.train_dataloader.state_dict()
        batches = {"batches": trainer.num_training_batches, "accumulated": trainer.accumulate_grad_batches}
        checkpoint["resume"] = {"random": states, "loader": loader, "rows": rows, "batches": batches}
        if self._validating:
            _begin_anew(checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get("resume")
        if self._restored is not None:
            logs = [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
            for logger, rows in zip(logs, self._restored["rows"], strict=False):
                logger.cut(rows)


def _begin_anew(progress: dict[str, Any]) -> None:
    """Let Lightning do a validation from its first image: to it these counts say that the first batch was cut off."""
    for counts in (progress["total"], progress["current"]):
        counts.update(ready=1, started=1, processed=0, completed=0)


def _next(loader: dict[str, int], batches: float | None) -> dict[str, int]:
    """Where the loader goes on: with the next epoch, where `limit_train_batches` has ended one before its data did.

    Args:
        loader: its state, which does not know of the limit.
        batches: see `_share_epoch_anew`.
    """
    is_over = batches is not None and loader["start_batch"] >= batches
    return loader | {"epoch": loader["epoch"] + 1, "start_batch": 0} if is_over else loader


def _share_epoch_anew(trainer: L.Trainer, batches: float | None) -> None:
    """Count the place in the epoch in today's batches, where the epoch had others, or Lightning would end it too soon.

    Args:
        trainer: restored, its loader too.
        batches: that the epoch had on each device when it was saved; None where that is not known.
    """
    place: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    now = trainer.num_training_batches
    if batches is not None and batches != now:
        begun: int = trainer.train_dataloader.state_dict()["start_batch"]  # type: ignore[union-attr]
        done = now if place.completed >= batches else min(begun, now)
        place.ready = place.started = place.processed = place.completed = done


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all generators that this process draws from, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()  # the legacy form is a plain tuple
    state: dict[str, Any] = {"python": random.getstate()}
    state["numpy"] = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    state["torch"] = torch.get_rng_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Draw on from where `random_state` was taken."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def requeue() -> None:
    """Ask SLURM to start this job again, if it is one; the job's command must have `--resume auto`."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not re.fullmatch(r"\d+(_\d+)?", job):
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        log.error("scontrol requeue %s failed (%s); start the job again yourself", job, error)
    else:
        log.info("job %s is queued again", job)
