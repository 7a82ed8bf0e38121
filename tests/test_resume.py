"""A run that fails anywhere goes on and ends as one that did not: weights, optimiser, average, random numbers, rows."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from detection.cli.fit import FitCLI, main
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.errors import RunError
from detection.training import locking
from detection.training.locking import LOCK, alone, locked
from detection.training.resume import random_state, set_random_state
from tests.runs import ROOT, TINY, differences, rehearsed, rows, scene_flags, state


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=8, val=4)


def make(data: Path, output: Path, *flags: str) -> FitCLI:
    """A run of two epochs of four steps, with an average of the weights."""
    fixed = ["--output", str(output), "--trainer.max_epochs", "2", "--data.num_workers", "0", "--save_every", "0"]
    average = ["--trainer.callbacks+=EMAWeightAveraging"]
    return FitCLI(["--config", "quickstart", *TINY, *fixed, *average, *scene_flags(data), *flags])


def only_folder(output: Path) -> Path:
    (folder,) = (output / "quickstart").iterdir()
    return folder


class Failure(Exception):  # noqa: N818
    """What `Fail` raises."""


class Fail(L.Callback):
    """Fails in the given hook, the given time."""

    def __init__(self, hook: str, time: int) -> None:
        self.left = time
        setattr(self, hook, self._count)

    def _count(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.left -= 1
            if self.left < 0:
                raise Failure


HOOKS = ("on_train_batch_start", "on_validation_batch_start", "on_validation_end", "on_train_epoch_start")
START, VALIDATION, VALIDATED, EPOCH = HOOKS
# Flags of a run, and where it fails, and fails again: before the nth batch, in the nth validation batch, ...
RUNS = {
    "validated": ([], [(START, 0), (START, 2), (VALIDATION, 1), (VALIDATION, 0), (VALIDATED, 0), (EPOCH, 0)]),
    "twice an epoch": (
        ["--trainer.val_check_interval", "0.5"],
        [(VALIDATION, 1), (START, 1), (VALIDATED, 0), (START, 1)],
    ),
    "accumulated": (["--trainer.accumulate_grad_batches", "2"], [(START, 3), (START, 2), (VALIDATION, 0)]),
    "so many steps": (
        ["--trainer.max_steps", "6", "--trainer.max_epochs=-1"],
        [(START, 3), (EPOCH, 0), (VALIDATION, 1)],
    ),
    "never validated": (["--trainer.limit_val_batches", "0"], [(START, 3), (EPOCH, 0), (START, 1)]),
    "so many steps, never validated": (
        ["--trainer.max_steps", "6", "--trainer.max_epochs=-1", "--trainer.limit_val_batches", "0"],
        [(START, 3), (EPOCH, 0), (START, 1)],
    ),
    "part of an epoch": (["--trainer.limit_train_batches", "3"], [(START, 2), (EPOCH, 0)]),
    "frozen at first": (["--model.freeze", "{backbone.body: 1}"], [(START, 3), (EPOCH, 0), (START, 1), (VALIDATED, 0)]),
    "the same batches": (["--trainer.overfit_batches", "2"], [(START, 1), (EPOCH, 0)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", rehearsed(RUNS, "validated", "accumulated"))
def test_failures_change_nothing(kind: str, data: Path, tmp_path: Path) -> None:
    flags, failures = RUNS[kind]
    make(data, tmp_path / "whole", *flags).fit()
    for hook, time in failures:
        broken = make(data, tmp_path / "broken", *flags, "--resume", "auto")
        broken.trainer.callbacks.insert(0, Fail(hook, time))
        with pytest.raises(Failure):
            broken.fit()
    make(data, tmp_path / "broken", *flags, "--resume", "auto").fit()
    whole, resumed = only_folder(tmp_path / "whole"), only_folder(tmp_path / "broken")
    assert rows(resumed) == rows(whole)
    for name in {"last.ckpt", "best.ckpt"} & {path.name for path in whole.iterdir()}:
        assert differences(state(whole / name), state(resumed / name)) == [], name


def test_random_numbers_go_on_from_a_file(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    draw()  # half of a pair of normal numbers waits for the next call
    torch.save(random_state(torch.device("cpu")), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_loaders_leave_the_random_numbers_alone(data: Path) -> None:
    splits = {f"{split}_split": file for split, (file, _) in scenes.SPLITS.items()}
    splits |= {f"{split}_images": images for split, (_, images) in scenes.SPLITS.items()}
    datamodule = DetectionDataModule(root=str(data), format="coco", num_workers=0, **splits)  # type: ignore[arg-type]
    datamodule.setup("fit")
    before = torch.get_rng_state()
    iter(datamodule.val_dataloader())
    next(iter(datamodule.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_another_process_trains_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locking, "PATIENCE", 0.0)
    make(data, tmp_path, "--trainer.max_epochs", "1").fit()
    folder = only_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    lock = locked(folder / LOCK)
    assert lock is not None
    for resume in (folder, folder / "last.ckpt"):
        assert main(["--resume", str(resume), "--trainer.max_epochs", "2"]) == 1
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"{folder}: another process is training this run: wait for it" in said
    assert main(["--resume", str(folder), "--trainer.fast_dev_run", "true"]) == 0  # leaves nothing
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    os.close(lock)
    assert main(["--resume", str(folder), "--trainer.max_epochs", "2"]) == 0


def test_a_lock_is_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone(tmp_path):
        with monkeypatch.context() as patched:
            patched.setattr(locking, "PATIENCE", 0.0)
            with pytest.raises(RunError, match="another process is training"), alone(tmp_path):
                pass
        loader = multiprocessing.get_context("fork").Process(target=sleep, args=(60,), daemon=True)
        loader.start()  # as of a loader, which outlives a run that is killed
    with alone(tmp_path):
        loader.kill()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(tmp_path), alone(tmp_path):  # a file system without locks is no reason not to train
        pass


@pytest.mark.slow
def test_of_two_processes_one_trains_and_a_kill_leaves_no_lock(data: Path, tmp_path: Path) -> None:
    own = ["--output", str(tmp_path), "--data.num_workers", "1", "--save_every", "0", "--wandb", "off"]
    flags = ["--config", "quickstart", *TINY, *own, *scene_flags(data), "--resume", "auto", "--trainer.max_epochs"]
    command = [sys.executable, "-m", "detection", "fit", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def begin(epochs: int) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, str(epochs)], env=environment, stderr=subprocess.PIPE, text=True)

    with begin(1000) as first:
        try:
            while not list(tmp_path.glob("*/*/last.ckpt")):
                assert first.poll() is None
                sleep(0.1)
            with begin(1000) as second:
                said = second.communicate(timeout=300)[1]
            assert second.returncode == 1 and "another process is training this run" in said
            assert first.poll() is None
        finally:
            first.kill()
    epochs = 1 + torch.load(only_folder(tmp_path) / "last.ckpt", weights_only=True)["epoch"]
    with begin(epochs + 1) as third:
        said = third.communicate(timeout=300)[1]
    assert third.returncode == 0, said
    steps = [row["step"] for row in rows(only_folder(tmp_path)) if row["lr"]]
    assert steps == [str(step) for step in range(4 * (epochs + 1))]
