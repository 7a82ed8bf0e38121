"""A run that fails anywhere goes on and ends as one that did not: weights, optimiser, average, random numbers, rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from detection.cli.fit import FitCLI
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.training.resume import random_state, set_random_state
from tests.runs import TINY, differences, rehearsed, rows, scene_flags, state


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
