"""Faults in the middle of a run: each ends it, or is lived with, as promised and within a minute."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
Record = Callable[[str, object], None]
MINUTE = 60


def poison(trainer: Any, module: Any) -> None:
    """One loss of the next step is not a number."""
    run = module.detector.run

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        losses, detections = run(*args, **kwargs)
        return losses | {"loss_classifier": losses["loss_classifier"] * torch.nan}, detections

    module.detector.run = poisoned


def folder_of(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    return folder


@pytest.mark.slow
@pytest.mark.fault(
    fault="a loss is not a number",
    injected="loss_classifier times NaN in the second epoch",
    promised="stops before the step, names term, images and step, dumps the batch; last.ckpt is that of before",
)
def test_nan(fit: Any, tmp_path: Path, record_property: Record) -> None:
    def action(trainer: Any, module: Any) -> None:
        poison(trainer, module)
        (tmp_path / "before").write_bytes((folder_of(tmp_path) / "last.ckpt").read_bytes())

    run = fit(action=action, at=5)
    folder = folder_of(tmp_path)
    record_property("happened", f"exit {run.code}, {run.seconds:.0f} s: {run.error}")
    facts = json.loads((folder / "nonfinite.json").read_text())
    part = facts["ranks"][0]["parts"][0]
    names = [image["file"] for image in part["images"]]
    assert run.code == 1 and run.seconds < MINUTE
    assert f"step {facts['step']} of epoch 1" in run.error and "loss_classifier is nan on" in run.error
    assert f"detection replay {folder} --step 5" in run.error.replace(str(tmp_path.resolve()), str(tmp_path))
    assert facts["step"] == 5 and len(names) == 2 and all(name in run.error for name in names)
    assert part["losses"]["loss_classifier"] == "nan" and part["losses"]["loss_objectness"] > 0
    assert load_file(folder / "nonfinite-rank0.safetensors")["0.images"].shape[0] == 2
    assert (folder / "last.ckpt").read_bytes() == (tmp_path / "before").read_bytes()


@pytest.mark.slow
@pytest.mark.fault(
    fault="a loss of one of two ranks is not a number",
    injected="loss_classifier times NaN in the process of rank 1",
    promised="both stop at the same step, the message names the rank and its images",
)
def test_nan_on_one_rank(fit: Any, tmp_path: Path, record_property: Record) -> None:
    run = fit(action=poison, at=1, ranks=2, rank=1)
    record_property("happened", f"exit {run.code}, {run.seconds:.0f} s: {run.error}")
    ranks = json.loads((folder_of(tmp_path) / "nonfinite.json").read_text())["ranks"]
    assert run.code == 1 and run.seconds < MINUTE and run.output.count("error: ") == 1
    assert "loss_classifier is nan on" in run.error and "(rank 1)" in run.error
    assert [rank["parts"][0]["losses"]["loss"] == "nan" for rank in ranks] == [False, True]


@pytest.mark.fault(
    fault="weights are damaged between two steps",
    injected="a weight set to infinity at the last step before saving",
    promised="nothing is saved, the message names the tensor",
)
def test_damaged_weights_are_not_saved(fit: Any, tmp_path: Path, record_property: Record) -> None:
    def action(trainer: Any, module: Any) -> None:
        before = trainer.optimizers[0].step

        def step(*args: Any, **kwargs: Any) -> Any:
            out = before(*args, **kwargs)
            next(p for p in module.parameters() if p.ndim == 1).data[0] = torch.inf
            return out

        trainer.optimizers[0].step = step

    run = fit("--trainer.limit_val_batches", "0", action=action, at=3)
    record_property("happened", f"exit {run.code}: {run.error}")
    assert run.code == 1 and "is not finite any more, so nothing was saved" in run.error
    assert not list(folder_of(tmp_path).glob("*.ckpt"))


def kill_worker(trainer: Any, module: Any) -> None:
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)


def stop_workers(trainer: Any, module: Any) -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGSTOP)


WORKERS = ("--data.num_workers", "1", "--trainer.max_epochs", "9")


@pytest.mark.fault(
    fault="a loader's process is killed",
    injected="SIGKILL to a worker",
    promised="the run ends within a minute and names process, signal and what to lower",
)
def test_killed_worker(fit: Any, record_property: Record) -> None:
    run = fit(*WORKERS, action=kill_worker)
    record_property("happened", f"exit {run.code}, {run.seconds:.0f} s: {run.error}")
    assert run.code == 1 and run.seconds < MINUTE
    assert "the loader's process" in run.error and ("Killed" in run.error or "exited" in run.error)


@pytest.mark.slow
@pytest.mark.fault(
    fault="a loader's process hangs",
    injected="SIGSTOP to a worker, data.timeout 4",
    promised="the run ends soon after the timeout, with the cause",
)
def test_stopped_worker(fit: Any, record_property: Record) -> None:
    run = fit(*WORKERS, "--data.timeout", "4", action=stop_workers)
    record_property("happened", f"exit {run.code}, {run.seconds:.0f} s: {run.error}")
    assert run.code == 1 and run.seconds < MINUTE
    assert "was stopped" in run.error or "is stopped" in run.error


@pytest.mark.slow
@pytest.mark.fault(
    fault="storage hangs under a loader's process",
    injected="images become pipes that nobody writes to, data.timeout 4",
    promised="the run ends soon after the timeout, with the cause",
)
def test_hanging_storage(fit: Any, data: list[str], tmp_path: Path, record_property: Record) -> None:
    root = copy_of(data, tmp_path)

    def action(trainer: Any, module: Any) -> None:
        for path in (root / "train").iterdir():
            path.unlink()
            os.mkfifo(path)

    run = fit(*WORKERS, "--data.timeout", "4", "--data.root", str(root), action=action)
    record_property("happened", f"exit {run.code}, {run.seconds:.0f} s: {run.error}")
    assert run.code == 1 and run.seconds < MINUTE
    assert "no batch came from the loader's processes for 4 seconds" in run.error


def copy_of(data: list[str], tmp_path: Path) -> Path:
    source = data[data.index("--data.root") + 1]
    return Path(subprocess.check_output(["cp", "-rv", source, str(tmp_path / "copy")]) and tmp_path / "copy")


@pytest.mark.fault(
    fault="out of memory",
    injected="RLIMIT_AS 64 MiB above what the process has, then a training step",
    promised="the message says the batch's shape and what to lower",
)
def test_out_of_memory(fit: Any, record_property: Record) -> None:
    def action(trainer: Any, module: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)

    run = fit("--data.min_size", "640", "--data.max_size", "960", action=action, at=0)
    record_property("happened", f"exit {run.code}: {run.error}")
    assert run.code == 1 and "out of memory" in run.error
    assert "the batch was 2x3x" in run.error and "lower data.batch_size" in run.error


@pytest.mark.fault(
    fault="one absurd allocation",
    injected="4 PiB asked of PyTorch's allocator in a step",
    promised="the message says how much was asked for",
)
def test_absurd_allocation(fit: Any, record_property: Record) -> None:
    run = fit(action=lambda trainer, module: torch.empty(2**50), at=1)
    record_property("happened", f"exit {run.code}: {run.error}")
    assert run.code == 1 and "when asked for 4503599627370496 bytes" in run.error


KILL = """
import os, signal, time, lightning as L

class Kill(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 1 and trainer.global_rank == int(os.environ["BAD_RANK"]):
            open("injected", "w").write(str(time.time()))
            if os.environ["BAD_DEED"] == "raise":
                raise KeyError("a mistake in the code of one rank")
            os.kill(os.getpid(), signal.SIGKILL)
"""


FAILURES = [
    pytest.param("kill", 0, id="kill0"),
    pytest.param("kill", 1, id="kill1", marks=pytest.mark.rehearsal),
    pytest.param("raise", 1, id="raise1", marks=pytest.mark.rehearsal),
]


@pytest.mark.slow
@pytest.mark.fault(
    fault="one of two ranks fails: {case}",
    injected="SIGKILL to itself, or an exception, in two processes that scripts/fit.py has started",
    promised="the whole job ends within a minute, not with 0, and no process is left",
)
@pytest.mark.parametrize(("deed", "rank"), FAILURES)
def test_failing_rank(
    deed: str, rank: int, small: list[str], data: list[str], tmp_path: Path, record_property: Record
) -> None:
    (tmp_path / "kill.py").write_text(KILL)
    flags = [
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--trainer.callbacks+=kill.Kill",
        "--output",
        "runs",
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "BAD_RANK": str(rank), "BAD_DEED": deed}
    command = [sys.executable, str(ROOT / "scripts" / "fit.py"), *small, *data, *flags]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
        code = process.wait(300)
    since = float((tmp_path / "injected").read_text())
    while left := ranks_in(tmp_path):
        assert time.time() - since < MINUTE, left
        time.sleep(0.5)
    seconds, text = time.time() - since, (tmp_path / "said").read_text()
    last = [line for line in text.splitlines() if line.startswith(("error: ", "rank "))]
    record_property("happened", f"exit {code}, {seconds:.0f} s: {'; '.join(last)}")
    assert code != 0 and seconds < MINUTE
    assert "has ended" in text


def ranks_in(folder: Path) -> list[str]:
    """Processes that run in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.readlink(path / "cwd") == str(folder)
                and "Z" not in (path / "stat").read_text().rpartition(")")[2][:3]
            ):
                found.append(path.name)
        except OSError:
            continue
    return found
