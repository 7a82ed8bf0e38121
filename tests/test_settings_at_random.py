"""Whatever is set, a run trains two steps or says in one sentence why not, within seconds, and leaves no folder."""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import sys
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
from lightning.pytorch import callbacks, loggers

from detection.cli.fit import FitCLI, main
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.training.module import DetectionModule
from detection.training.optimisation import CosineSchedule
from tests.runs import ROOT, TINY, rehearsed, scene_flags

COUNT = int(os.environ.get("RANDOM_SETTINGS", "30"))  # `make settings` draws 300
SECONDS = 10.0  # of processor time
# From the data, or chosen in a user's own code; `compile` takes a compiler's minutes.
LEFT_OUT = {"detector", "class_names", "images_per_batch", "reader", "proposals", "augmentations", "compile"}
LEFT_OUT |= {name for name in signature(DetectionDataModule).parameters if name.endswith(("_split", "_images"))}
NUMBERS = {int: ("0", "1", "2", "-1", "3", "100000"), float: ("0", "0.5", "1", "-1", "2", "1e30", "nan", "inf")}
# Of those whose type tells too little, and of those that could wait for a machine that is not there.
CHOICES: dict[str, tuple[str, ...]] = {
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "tpu", "mps", "cup"),
    "trainer.devices": ("1", "auto", "0", "-1", "2", "[0]", "0,", "abc"),
    "trainer.num_nodes": ("0", "1", "-1", "abc"),
    "trainer.strategy": ("auto", "ddp", "ddp_spawn", "ddp_find_unused_parameters_true", "fsdp", "deepspeed", "dpd"),
    "trainer.profiler": ("simple", "advanced", "pytorch", "PassThroughProfiler", "xla", "simpel"),
    "trainer.plugins": ("TorchCheckpointIO", "AsyncCheckpointIO", "MixedPrecision", "abc", "[]"),
    "trainer.max_time": ("00:00:00:05", "00:00:00:00", "5", "{seconds: 5}", "{secs: 5}", "-00:00:00:05"),
    "trainer.default_root_dir": ("elsewhere", "null"),
    "trainer.callbacks": (
        *(*callbacks.__all__, "EarlyStoping", "abc", "[]", "[LearningRateMonitor, DeviceStatsMonitor]"),
        *(
            f"{{class_path: {name}, init_args: {{{arguments}}}}}"
            for name, arguments in (
                ("EarlyStopping", "monitor: val/map"),
                ("EarlyStopping", "monitor: val/loss, patience: -1"),
                ("EarlyStopping", "monitor: 3"),
                ("ModelCheckpoint", "monitor: val/map_50, save_top_k: 2"),
                ("ModelCheckpoint", "monitor: map"),
                ("StochasticWeightAveraging", "swa_lrs: 0.01"),
                ("GradientAccumulationScheduler", "scheduling: {0: 2}"),
                ("Timer", "duration: '00:00:00:05'"),
            )
        ),
    ),
    "trainer.logger": (*loggers.__all__, "CVSLogger", "true", "false", "[]"),
    "trainer.fast_dev_run": ("true", "false", "1", "2", "0", "-1"),
    "trainer.val_check_interval": ("0", "1", "2", "0.5", "-1", "100", "00:00:00:01", "nan"),
    "model.optimizer": (*(name for name in torch.optim.__all__ if name[0].isupper()), "Adem", "abc"),
    "model.schedule": (
        *("CosineSchedule", "detection.MultiStepSchedule", "CosineSchedul", "{milestones: [0.5]}"),
        *(f"torch.optim.lr_scheduler.{name}" for name in torch.optim.lr_scheduler.__all__),
    ),
    "model.metrics": ("[]", "[torchmetrics.MeanMetric]", "[abc]", "torchmetrics.detection.MeanAveragePrecision"),
    "model.lr_mult": ("{backbone: 0.1}", "{backbon: 0.1}", "{roi_heads: 0}", "{rpn: -1}", "{}"),
    "model.freeze": ("[backbone]", "{backbone: 1}", "[roi_head]", "{rpn: -1}", "[backbone, rpn, roi_heads]"),
    "data.root": ("nowhere", "", "."),
    "data.num_workers": ("0", "1", "-1", "abc"),
    "data.classes": ("[ball]", "[bal]", "[]", "ball", "[ball, ball]"),
}
# Flags whose run is another process: Lightning starts the others by its command line, and processes leave a group.
PROCESSES = ("trainer.devices", "trainer.strategy", "trainer.num_nodes")
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


def draw(rng: random.Random, name: str, types: list[Any]) -> str:
    """A value of one of the types, at its edges; or of none."""
    if name in CHOICES:
        return rng.choice(CHOICES[name])
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
    chosen = {name: draw(rng, name, types) for name, types in rng.sample(flags(), rng.choice((1, 1, 2, 3)))}
    if seed % 2:  # the flags with most values, which are drawn as seldom as all others
        chosen |= dict([rng.choice([(name, value) for name, values in CHOICES.items() for value in values])])
    return [f"--{name}={value}" for name, value in chosen.items()]


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
@pytest.mark.parametrize("seed", rehearsed(range(COUNT), *range(8)))
def test_it_trains_or_says_why_not(
    seed: int, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = command_line(seed)
    own = ["--trainer.max_steps", "2", "--data.num_workers", "0", "--output", str(tmp_path / "runs")]
    line = ["--config", "quickstart", *TINY, *scene_flags(data), *own, *given]
    alone = any(flag.startswith(f"--{name}=") for flag in given for name in PROCESSES)
    seconds, code, steps = (in_a_process if alone else in_this_process)(line, monkeypatch)
    said = capfd.readouterr().err
    sentences = [part for part in said.splitlines() if part.startswith("error: ")]
    folders = list((tmp_path / "runs").glob("*/*"))
    assert seconds < SECONDS * (4 if alone else 1), (given, seconds)
    assert "Traceback" not in said, (given, said)
    if code == 0:
        rehearsal = any(flag.startswith("--trainer.fast_dev_run=") for flag in given)
        assert not sentences and (rehearsal or (steps and len(folders) == 1)), (given, said)
    else:
        assert len(sentences) == 1 and len(sentences[0]) < 700, (given, said)
        assert not re.search(r"frozen dataclass|NoneType|object is not|'int'|'str'", sentences[0]), (given, said)
        assert not folders or steps, (given, said)  # what has trained stays


def in_this_process(line: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[float, Any, int]:
    """Seconds of processor time, exit code and steps of a run."""
    steps = [0]
    fit = FitCLI.fit

    def watched(cli: FitCLI) -> None:
        try:
            fit(cli)
        finally:
            steps.append(cli.trainer.global_step)

    monkeypatch.setattr(FitCLI, "fit", watched)
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code: Any = main(line)
    except SystemExit as stop:
        code = stop.code
    return time.process_time() - began, code, steps[-1]


def in_a_process(line: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[float, Any, int]:
    """The same of a run that may start others; steps count as taken where it went well, or wrote a checkpoint."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-m", "detection", "fit", *line], env=environment, timeout=240)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    trained = done.returncode == 0 or any(Path().glob("runs/*/*/last.ckpt"))
    return seconds, done.returncode, int(trained)
