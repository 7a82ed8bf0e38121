"""Real signals to real trainings through scripts/fit.py, each of which must end as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from detection.data import scenes
from tests.runs import ROOT, TINY, differences, rows, scene_flags, state

KILLS = int(os.environ.get("FAULTS_KILLS", "3"))  # `FAULTS_KILLS=20 pytest tests/faults/test_resume_kills.py` for more
EPOCHS = ["--trainer.max_epochs", str(max(5, KILLS // 2))]
RUNS: list[subprocess.Popen[bytes]] = []
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=8, val=4)


def begin(data: Path, output: Path, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a run in a session of its own, so that a signal to its group reaches nobody else."""
    fixed = ["--output", str(output), "--data.num_workers", "1", "--wandb", "off", "--save_every", "0"]
    command = [
        sys.executable,
        str(ROOT / "scripts" / "fit.py"),
        "--config",
        "quickstart",
        *TINY,
        *scene_flags(data),
        *fixed,
        *flags,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    output.mkdir(exist_ok=True)
    with (output / "log.txt").open("ab") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    RUNS.append(run)
    return run


@pytest.fixture(autouse=True)
def _leave_nothing_running() -> Iterator[None]:
    yield
    while RUNS:
        with suppress(ProcessLookupError):
            os.killpg(RUNS.pop().pid, signal.SIGKILL)


def finish(run: subprocess.Popen[bytes], output: Path, code: int = 0) -> None:
    assert run.wait(900) == code, (output / "log.txt").read_text()[-5000:]


def folder_of(output: Path) -> Path:
    (folder,) = (output / "quickstart").iterdir()
    return folder


def await_rows(output: Path, count: int, run: subprocess.Popen[bytes]) -> None:
    """Wait until `metrics.csv` has so many rows."""
    for _ in range(3000):
        found = list(output.glob("quickstart/*/metrics.csv"))
        if found and len(found[0].read_text().splitlines()) - 1 > count:
            return
        assert run.poll() is None, (output / "log.txt").read_text()[-5000:]
        time.sleep(0.05)
    raise AssertionError("no row in time")


def assert_same(whole: Path, resumed: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        assert differences(state(whole / name), state(resumed / name)) == [], name
    assert rows(whole) == rows(resumed)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nothing disturbed, and the seconds that it took."""
    output, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    finish(begin(data, output, *EPOCHS, "--trainer.callbacks+=EMAWeightAveraging"), output)
    return folder_of(output), time.monotonic() - began


@pytest.mark.rehearsal
@pytest.mark.fault(
    fault="the run is killed",
    injected="SIGKILL to all its processes at random moments, FAULTS_KILLS times",
    promised="--resume auto ends with the same weights, optimiser, average and rows, bit for bit, as one W&B run",
)
def test_kills_at_random_moments(
    data: Path, whole: tuple[Path, float], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = int(os.environ.get("FAULTS_SEED", time.time()))
    moments, kills, landed = random.Random(seed), 0, []
    flags = [*EPOCHS, "--trainer.callbacks+=EMAWeightAveraging", "--wandb", "offline", "--resume", "auto"]
    while kills < KILLS:
        run = begin(data, tmp_path, *flags, env={"WANDB_MODE": "offline"})
        reached = sum(len(rows(path.parent)) for path in tmp_path.glob("quickstart/*/metrics.csv"))
        if kills % 5:  # in training, on the whole a twentieth of it further; every fifth at any time, start-up too
            await_rows(tmp_path, reached, run)
        time.sleep(moments.uniform(0, whole[1] / (KILLS + 5)))
        assert run.poll() is None, "the run has ended before all kills: give it more epochs"
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        kills += 1
        landed.append(sum(len(rows(path.parent)) for path in tmp_path.glob("quickstart/*/metrics.csv")))
    finish(begin(data, tmp_path, *flags, env={"WANDB_MODE": "offline"}), tmp_path)
    happened = f"{kills} kills (FAULTS_SEED={seed}) after rows {landed} of {len(rows(whole[0]))}; all equal"
    print(happened)
    assert_same(whole[0], folder_of(tmp_path))
    parts = [path.name.split("-", 3)[3] for path in folder_of(tmp_path).glob("wandb/offline-run-*")]
    assert len(parts) > 1 and len(set(parts)) == 1
    record_property("happened", happened)


@pytest.mark.fault(
    fault="preemption, a time limit of SLURM, Ctrl-C",
    injected="SIGTERM, then SIGUSR1 to all processes, workers too, then SIGINT to the first; a fake scontrol",
    promised="saved after the step, exit code 75, at the time limit queued again, and it goes on bit for bit",
)
def test_signals_save_and_stop(
    data: Path, whole: tuple[Path, float], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    env = {"SLURM_JOB_ID": "123", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    flags = [*EPOCHS, "--trainer.callbacks+=EMAWeightAveraging", "--save_every", "1000", "--resume", "auto"]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        reached = sum(len(rows(path.parent)) for path in tmp_path.glob("quickstart/*/metrics.csv"))
        run = begin(data, tmp_path, *flags, env=env)
        await_rows(tmp_path, reached, run)
        os.kill(run.pid, number) if number == signal.SIGINT else os.killpg(run.pid, number)
        finish(run, tmp_path, code=75)
    assert (tmp_path / "asked").read_text() == "requeue 123\n"
    finish(begin(data, tmp_path, *flags, env=env), tmp_path)
    assert_same(whole[0], folder_of(tmp_path))
    record_property("happened", "three times code 75, requeue 123, then equal to the undisturbed run")


@pytest.mark.fault(
    fault="a run that does not heed SIGTERM, as its step hangs",
    injected="SIGSTOP to its worker, SIGTERM twice",
    promised="the second SIGTERM ends it at once",
)
def test_second_signal_ends_at_once(data: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    run = begin(data, tmp_path, "--trainer.max_epochs", "100", "--save_every", "1000", "--data.timeout", "1000")
    await_rows(tmp_path, 1, run)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    time.sleep(2)
    os.kill(run.pid, signal.SIGTERM)
    time.sleep(2)
    assert run.poll() is None
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(30) == -signal.SIGTERM
    record_property("happened", "alive after the first, ended by the second")


@pytest.mark.rehearsal
@pytest.mark.fault(
    fault="SIGTERM reaches one rank only",
    injected="SIGTERM to the second of two processes (gloo)",
    promised="both save at the same step, exit code 75, and the run goes on bit for bit",
)
def test_one_of_two_ranks_is_told_to_stop(
    data: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "3"]
    before = tmp_path / "whole"
    finish(begin(data, before, *flags), before)
    output = tmp_path / "broken"
    run = begin(data, output, *flags, "--save_every", "1000")
    await_rows(output, 1, run)
    os.kill(second_rank(run.pid), signal.SIGTERM)
    finish(run, output, code=75)
    assert len(state(folder_of(output) / "last.ckpt")["random"]) == 2
    finish(begin(data, output, *flags, "--resume", "auto"), output)
    assert_same(folder_of(before), folder_of(output))
    record_property("happened", "code 75, the random numbers of both ranks saved, then equal to the undisturbed run")


def second_rank(first: int) -> int:
    for child in Path(f"/proc/{first}/task/{first}/children").read_text().split():
        if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("no second rank")
