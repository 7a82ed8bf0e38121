"""Whole runs on a GPU: killed and resumed; and several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from detection.data import scenes
from tests.runs import ROOT, TINY, differences, rows, scene_flags, state
from tests.test_distributed import Losses, make_batch, make_module, part_of

pytestmark = [pytest.mark.gpu, pytest.mark.rehearsal]  # the CPU has its own of both, in every run of the tests
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def begin(data: Path, output: Path, device: str) -> subprocess.Popen[bytes]:
    accelerator = ["--trainer.accelerator", "gpu" if device == "cuda" else "cpu", "--trainer.devices", "1"]
    fixed = ["--output", str(output), "--data.num_workers", "0", "--wandb", "off", "--save_every", "0"]
    same = ["--trainer.deterministic", "true", "--trainer.max_epochs", "3", "--resume", "auto"]
    command = [sys.executable, str(ROOT / "scripts" / "fit.py"), *TINY, *scene_flags(data), *fixed]
    output.mkdir(exist_ok=True)
    with (output / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [*command, *accelerator, *same],
            env=os.environ | ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def folder_of(output: Path) -> Path:
    (folder,) = (output / "quickstart").iterdir()
    return folder


def test_a_killed_run_goes_on_bit_for_bit(device: str, tmp_path: Path) -> None:
    data = scenes.draw(tmp_path / "scenes", train=8, val=4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run, beside = begin(data, killed, device), begin(data, whole, device)
    for _ in range(6000):
        found = list(killed.glob("quickstart/*/metrics.csv"))
        if found and len(found[0].read_text().splitlines()) > 4:
            break
        assert run.poll() is None, (killed / "log.txt").read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait(30) == -signal.SIGKILL  # and so it was not done
    assert begin(data, killed, device).wait(300) == 0, (killed / "log.txt").read_text()[-3000:]
    assert beside.wait(300) == 0, (whole / "log.txt").read_text()[-3000:]
    assert rows(folder_of(whole)) == rows(folder_of(killed))
    assert differences(*(state(folder_of(output) / "last.ckpt") for output in (whole, killed))) == []


def learn(rank: int, world: int, backend: str, device: str, folder: Path) -> None:
    """Some steps of one rank; its weights go into a file."""
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    if device == "cuda":
        torch.cuda.set_device(0)
        torch.backends.cudnn.allow_tf32 = False  # kernels may differ with the batch, and TF32 keeps 11 bits
    module = DistributedDataParallel(Losses(make_module()).to(device))
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.00003, momentum=0.9)
    for number in range(3):
        batch = make_batch(number)
        loss = module((part_of(batch, rank) if world > 1 else batch).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.save(weights.cpu(), folder / f"{backend}-{world}-{rank}.pt")
    dist.destroy_process_group()


def begin_learning(world: int, backend: str, device: str, folder: Path) -> list[subprocess.Popen[bytes]]:
    folder.mkdir()
    command = [sys.executable, "-m", "tests.gpu.test_processes", str(world), backend, device, str(folder)]
    return [subprocess.Popen([*command, str(rank)], env=os.environ | ENVIRONMENT, cwd=ROOT) for rank in range(world)]


def test_two_processes_on_one_device_learn_what_one_learns(device: str, tmp_path: Path) -> None:
    """Two with gloo against one with NCCL, which takes no two processes on one device."""
    runs = begin_learning(1, "nccl" if device == "cuda" else "gloo", device, tmp_path / "one")
    runs += begin_learning(2, "gloo", device, tmp_path / "two")
    assert [run.wait(300) for run in runs] == [0, 0, 0]
    one, first, second = (
        torch.load(path, weights_only=True)
        for name in ("one", "two")
        for path in sorted((tmp_path / name).glob("*.pt"))
    )
    start = torch.cat([p.detach().flatten() for p in make_module().parameters()])
    assert (one - start).abs().max() > 1e-4  # it has learned
    assert torch.equal(first, second)
    torch.testing.assert_close(first, one, rtol=0, atol=1e-5)


if __name__ == "__main__":
    learn(int(sys.argv[5]), int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
