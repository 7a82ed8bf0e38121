"""`--find`: a rate in the unit of `--model.lr` from a search that diverges, a batch that fits, nothing left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.tuner.lr_finder import _LRCallback
from PIL import Image

from detection.cli.fit import FitCLI, main
from detection.data import scenes
from detection.training import tuning
from detection.training.module import DetectionModule
from tests.runs import TINY, differences, scene_flags


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=16, val=2)


def test_curve_is_what_lightnings_finder_saw() -> None:
    losses = [3.0, 2.5, 2.7, 1.0, 8.0, math.nan, 1.0]
    finder = _LRCallback(len(losses), None)
    scheduler = SimpleNamespace(scheduler=SimpleNamespace(lr=[0.1]))
    for step, loss in enumerate(losses):
        trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(batch_idx=step), accumulate_grad_batches=1)
        trainer.lr_scheduler_configs, trainer.global_step, trainer.should_stop = [scheduler], step + 1, False
        trainer.strategy = SimpleNamespace(broadcast=lambda value: value)
        finder.on_train_batch_start(trainer, None, None, step)  # type: ignore[arg-type]
        finder.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, None, step)  # type: ignore[arg-type]
    rates, found = tuning.curve({"lr": [*finder.lrs, 9.0], "loss": finder.losses})
    assert found == pytest.approx(losses[:5])  # up to the first that is not finite
    assert len(rates) == 5


def test_smoothing_finds_the_valley_of_a_noisy_curve() -> None:
    place = np.linspace(-5, 0, 100)
    losses = 3 - 2 / (1 + np.exp(-4 * (place + 3))) + np.exp(np.minimum(6 * (place + 0.8), 9))
    noisy = losses + np.random.default_rng(0).normal(0, 0.1, 100)
    assert losses[tuning.smoothed(noisy).argmin()] < losses.min() + 0.1
    assert tuning.smoothed(np.full(20, 2.5)) == pytest.approx(np.full(20, 2.5))  # to the ends


def quick(monkeypatch: pytest.MonkeyPatch, steps: int, highest: float) -> None:
    monkeypatch.setattr(tuning, "STEPS", steps)
    monkeypatch.setattr(tuning, "HIGHEST", highest)
    monkeypatch.setitem(tuning.SETTINGS, "max_steps", steps)


def test_rate_is_in_the_unit_of_the_flag_and_nothing_changes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 images in 2 accumulated parts: a flag of 1 is a rate of 4 / 16 in the optimiser."""
    quick(monkeypatch, 12, 1e4)  # far beyond where the losses end in NaN, which is no error here
    used: list[float] = []
    shares: list[float] = []
    step = torch.optim.SGD.step

    def watch(optimizer: torch.optim.SGD, *args: Any, **options: Any) -> Any:
        used.append(optimizer.param_groups[0]["lr"])
        shares.append(optimizer.param_groups[-1]["lr"] / used[-1])
        return step(optimizer, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", watch)
    flags = ["--find", "lr", "--output", str(tmp_path), "--trainer.accumulate_grad_batches", "2"]
    cli = FitCLI(
        [
            *flags,
            "--model.optimizer",
            "SGD",
            "--model.lr_mult",
            "{rpn: 0.5}",
            "--config",
            "quickstart",
            *TINY,
            *scene_flags(data),
            "--data.num_workers",
            "0",
        ]
    )
    before = {name: value.clone() for name, value in cli.model.state_dict().items()}
    found: dict[str, float] = {}
    original = tuning.find_lr

    def keep(*args: Any) -> float:
        found["lr"] = original(*args)
        return found["lr"]

    monkeypatch.setattr(tuning, "find_lr", keep)
    cli.fit()
    assert used[0] == pytest.approx(tuning.LOWEST * 4 / 16)
    assert shares == pytest.approx([0.5] * len(used))  # parts keep their share, where Lightning gives all the same
    ratios = [abs(math.log(rate * 16 / 4 / tuning.MARGIN / found["lr"])) for rate in used]
    assert min(ratios) < 0.05  # to two digits, a third of one that was used, in the unit of the flag
    assert used[-1] > 1
    assert differences(before, cli.model.state_dict()) == []
    (folder,) = (tmp_path / "quickstart").iterdir()
    assert folder.name.endswith("_find_lr")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names == {"config.yaml", "plots", "plots/lr_finder.png"}
    assert min(Image.open(folder / "plots" / "lr_finder.png").size) > 300


def out_of_memory_above(images: int) -> Callable[..., Any]:
    step = DetectionModule.training_step

    def training_step(module: DetectionModule, batch: Any, batch_idx: int) -> Any:
        if len(batch) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(module, batch, batch_idx)

    return training_step


def find_batch(data: Path, folder: Path) -> tuple[FitCLI, int]:
    flags = [
        "--find",
        "batch_size",
        "--output",
        str(folder),
        "--config",
        "quickstart",
        *TINY,
        *scene_flags(data),
        "--data.num_workers",
        "0",
    ]
    cli = FitCLI(flags)
    before = {name: value.clone() for name, value in cli.model.state_dict().items()}
    size = tuning.largest_batch(cli.trainer, cli.model, cli.datamodule)
    assert differences(before, cli.model.state_dict()) == []
    return cli, size


def test_largest_batch_that_fits(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS_A_TRIAL", 1)
    monkeypatch.setattr(DetectionModule, "training_step", out_of_memory_above(5))
    cli, size = find_batch(data, tmp_path)
    assert size == 4  # 5 less 5 %, in whole images
    assert cli.datamodule.hparams["batch_size"] == 2
    (folder,) = (tmp_path / "quickstart").iterdir()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_not_even_two_images_fit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DetectionModule, "training_step", out_of_memory_above(1))
    with pytest.raises(tuning.RunError, match=r"two images does not fit: give --data.batch_size 1"):
        find_batch(data, tmp_path)


@pytest.mark.parametrize(
    ("flags", "expected", "code"),
    [
        (["--find", "batch_size"], "needs an accelerator", 1),
        (["--find", "lr", "--resume", "auto"], "leave --resume", 2),
        (["--find", "lr", "--trainer.fast_dev_run", "true"], "fast_dev_run out", 2),
    ],
)
def test_what_can_not_be_found_is_refused_in_one_line(
    flags: list[str], expected: str, code: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--config", "quickstart", *TINY, *scene_flags(data), "--output", str(tmp_path)]) == code
    message = capsys.readouterr().err.strip().splitlines()
    assert message[-1].startswith("error: ") and expected in message[-1]
    assert not list(tmp_path.rglob("*.ckpt"))
