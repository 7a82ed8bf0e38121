"""Whatever is set, a run trains two steps or says in one sentence why not, within seconds, and leaves no folder."""

from __future__ import annotations

import os
import random
import re
import time
import typing
import warnings
from collections.abc import Iterator
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import lightning as L
import pytest
import torch

from detection.cli.fit import FitCLI, main
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.training.module import DetectionModule
from detection.training.optimisation import CosineSchedule
from tests.runs import TINY, scene_flags

COUNT = int(os.environ.get("RANDOM_SETTINGS", "30"))  # `make settings` draws 300
SECONDS = 10.0  # of processor time
# Start processes, fetch, write elsewhere, wait for ever or for a machine that is not there: nothing to draw.
LEFT_OUT = {"num_nodes", "strategy", "profiler", "plugins", "default_root_dir", "max_time", "callbacks", "logger"}
LEFT_OUT |= {"detector", "class_names", "images_per_batch", "optimizer", "schedule", "metrics", "compile", "root"}
LEFT_OUT |= {"reader", "proposals", "augmentations", "format", "num_workers", "barebones", "accelerator", "devices"}
LEFT_OUT |= {"max_epochs", "min_epochs", "min_steps", "model_registry", "fast_dev_run", "enable_progress_bar"}
LEFT_OUT |= {name for name in signature(DetectionDataModule).parameters if name.endswith(("_split", "_images"))}
NUMBERS = {int: ("0", "1", "2", "-1", "3", "100000"), float: ("0", "0.5", "1", "-1", "2", "1e30", "nan", "inf")}
WRONG = ("abc", "", "[1, 2]", "{a: 1}", "null", "1.5", "true")


def kinds(hint: Any) -> list[Any]:
    """The plain types and choices inside a type hint."""
    if get_origin(hint) is Literal:
        return [hint]
    inner = [kind for arg in get_args(hint) if arg is not Ellipsis for kind in kinds(arg)]
    return inner or [hint]


def flags() -> list[tuple[str, list[Any]]]:
    """Name and types of every flag whose values are drawn, from the signatures."""
    makers = {"trainer": L.Trainer, "data": DetectionDataModule, "model": DetectionModule}
    found = []
    for section, maker in makers.items():
        hints = typing.get_type_hints(maker.__init__)
        for name, parameter in signature(maker).parameters.items():
            if name not in LEFT_OUT and parameter.kind is not Parameter.VAR_KEYWORD:
                found.append((f"{section}.{name}", kinds(hints.get(name, Any))))
    hints = typing.get_type_hints(CosineSchedule.__init__)
    return [*found, ("model.schedule.warmup_steps", kinds(hints["warmup_steps"]))]


def draw(rng: random.Random, types: list[Any]) -> str:
    """A value of one of the types, at its edges; or of none."""
    kind = rng.choice(types)
    if rng.random() < 0.15:
        return rng.choice(WRONG)
    if get_origin(kind) is Literal:
        return str(rng.choice(get_args(kind)))
    if kind is bool:
        return rng.choice(("true", "false"))
    return rng.choice(NUMBERS.get(kind, (*WRONG, *NUMBERS[int])))


def command_line(seed: int) -> list[str]:
    rng = random.Random(seed)
    chosen = rng.sample(flags(), rng.choice((1, 1, 2, 3)))
    return [part for name, types in chosen for part in (f"--{name}={draw(rng, types)}",)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=4, val=2)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    state = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(state[0])
    torch.backends.cudnn.benchmark = state[1]
    torch.autograd.set_detect_anomaly(False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(COUNT))
def test_it_trains_or_says_why_not(
    seed: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps: list[int] = []
    fit = FitCLI.fit

    def watched(cli: FitCLI) -> None:
        try:
            fit(cli)
        finally:
            steps.append(cli.trainer.global_step)

    monkeypatch.setattr(FitCLI, "fit", watched)
    given = command_line(seed)
    own = ["--trainer.max_steps", "2", "--data.num_workers", "0", "--output", str(tmp_path / "runs")]
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code: Any = main(["--config", "quickstart", *TINY, *scene_flags(data), *own, *given])
    except SystemExit as stop:
        code = stop.code
    seconds, said = time.process_time() - began, capsys.readouterr().err
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    folders = list((tmp_path / "runs").glob("*/*"))
    assert seconds < SECONDS, (given, seconds)
    assert "Traceback" not in said, (given, said)
    if code == 0:
        assert not sentences and len(folders) == 1, given
    else:
        assert len(sentences) == 1 and len(sentences[0]) < 700, (given, said)
        assert not re.search(r"frozen dataclass|NoneType|object is not|'int'|'str'", sentences[0]), (given, said)
        assert not folders or steps, (given, said)  # what has trained stays
