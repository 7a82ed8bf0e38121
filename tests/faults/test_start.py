"""What a run needs of its machine, checked at its start: each lack is one sentence with the way out."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from detection.data.datamodule import DetectionDataModule
from detection.data.records import DataError
from detection.data.workers import check_shared_memory
from detection.errors import RunError
from detection.training.safety import check_start

Record = Callable[[str, object], None]
MODEL = nn.Linear(512, 1024)  # 2 MiB, a checkpoint with momentum 4


def own_mounts() -> None:
    """From now on what this process mounts, it alone sees."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise PermissionError("a mount namespace needs root")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def refused(folder: Path, model: nn.Module = MODEL, workers: int = 0) -> str:
    with pytest.raises(RunError) as error:
        check_start(folder, model, 1, workers)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.fault(
    fault="the folder of runs can only be read",
    injected="a file system mounted read-only",
    promised="refused at the start, with the folder and --output",
)
def test_read_only(tmpfs: Any, record_property: Record) -> None:
    folder = tmpfs("ro")
    said = refused(folder / "runs")
    record_property("happened", said)
    assert said == f"{folder / 'runs'} can only be read: name another with --output"


@pytest.mark.fault(
    fault="the folder of runs is no folder",
    injected="a file of that name",
    promised="refused at the start, with the folder and --output",
)
def test_no_folder(tmp_path: Path, record_property: Record) -> None:
    (tmp_path / "runs").write_text("")
    said = refused(tmp_path / "runs" / "a")
    record_property("happened", said)
    assert "can not be written (Not a directory): name another with --output" in said


@pytest.mark.fault(
    fault="the file system is too small",
    injected="a tmpfs of 6 MiB for two checkpoints of 4",
    promised="refused at the start, with what is free and what is needed",
)
def test_too_small(tmpfs: Any, record_property: Record) -> None:
    folder = tmpfs("size=6m")
    said = refused(folder)
    record_property("happened", said)
    assert "6 MiB free, but two checkpoints take 8: make room" in said
    check_start(tmpfs("size=9m"), MODEL, 1, 0)


@pytest.mark.fault(
    fault="the file system is full",
    injected="a tmpfs filled to its last byte",
    promised="refused at the start",
)
def test_full(tmpfs: Any, record_property: Record) -> None:
    folder = tmpfs("size=64k")
    with pytest.raises(OSError, match="No space left"):
        (folder / "fill").write_bytes(bytes(1 << 20))
    said = refused(folder)
    record_property("happened", said)
    assert said.startswith(f"{folder} is full: ")


@pytest.mark.fault(
    fault="the disk is over its quota or full on a real block device",
    injected="an ext4 file system of 4 MiB on a loop-back device",
    promised="refused at the start",
)
def test_loop_device(tmp_path: Path, record_property: Record) -> None:
    image, folder = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(bytes(4 << 20))
    folder.mkdir()
    if subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True, check=False).returncode:
        pytest.skip("mkfs.ext4 is not there")
    if subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a loop-back device needs root")
    try:
        said = refused(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    record_property("happened", said)
    assert "MiB free, but two checkpoints take 8" in said


def answer(question: Callable[[], None], before: Callable[[], None]) -> str:
    """What a question raises in a process of its own, in which `before` has taken something away."""
    own, other = multiprocessing.get_context("fork").Pipe()

    def ask() -> None:
        try:
            before()
            question()
            other.send("nothing")
        except (RunError, DataError, PermissionError) as error:
            other.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=ask)
    process.start()
    assert own.poll(60)
    said: str = own.recv()
    process.join()
    if said.startswith("PermissionError"):
        pytest.skip(said)
    return said


@pytest.mark.fault(
    fault="too few files may be open",
    injected="RLIMIT_NOFILE of 100, hard and soft",
    promised="refused at the start, with the limit to set",
)
def test_open_files(tmp_path: Path, record_property: Record) -> None:
    limit = (resource.RLIMIT_NOFILE, (100, 100))
    said = answer(lambda: check_start(tmp_path, MODEL, 1, 4), lambda: resource.setrlimit(*limit))
    record_property("happened", said)
    assert "may open 100 files" in said and "(ulimit -n 4096)" in said and "num_workers" in said


@pytest.mark.fault(
    fault="fewer files may be open than are needed, but the limit can be raised",
    injected="RLIMIT_NOFILE of 100, soft",
    promised="the limit is raised, the run goes on",
)
def test_open_files_soft(tmp_path: Path, record_property: Record) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def question() -> None:
        check_start(tmp_path, MODEL, 1, 4)
        raise RunError(f"the limit is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}")

    said = answer(question, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard)))
    record_property("happened", said.removeprefix("RunError: "))
    assert said == "RunError: the limit is 256"


def shared_memory() -> None:
    data = DetectionDataModule(batch_size=16, num_workers=2, min_size=800, max_size=1333)
    check_shared_memory(data.hparams, 800)


@pytest.mark.fault(
    fault="/dev/shm is missing",
    injected="an empty file system over /dev, in a mount namespace",
    promised="refused at the start: num_workers 0",
)
def test_no_shared_memory(record_property: Record) -> None:
    def before() -> None:
        own_mounts()
        subprocess.run(["mount", "-t", "tmpfs", "none", "/dev"], check=True)

    said = answer(shared_memory, before)
    record_property("happened", said)
    assert "/dev/shm is missing" in said and "data.num_workers to 0" in said


@pytest.mark.fault(
    fault="/dev/shm is too small for one batch",
    injected="a tmpfs of 8 MiB over it, in a mount namespace",
    promised="refused at the start: --shm-size",
)
def test_little_shared_memory(record_property: Record) -> None:
    def before() -> None:
        own_mounts()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", "/dev/shm"], check=True)

    said = answer(shared_memory, before)
    record_property("happened", said)
    assert "/dev/shm has 8 MiB free, but one batch takes 48" in said and "--shm-size=8g" in said


@pytest.mark.slow
@pytest.mark.fault(
    fault="the folder of runs can only be read, on the command line",
    injected="a read-only bind mount",
    promised="exit 1 with one line before anything is trained",
)
def test_command_line(fit: Any, tmp_path: Path, record_property: Record) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def before() -> None:
        own_mounts()
        subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)

    if os.geteuid():
        pytest.skip("mounting needs root")
    run = fit("--output", str(place / "runs"), before=before)
    record_property("happened", f"exit {run.code}: {run.error}")
    assert run.code == 1 and "can only be read: name another with --output" in run.error
    assert "learning rate" not in run.output
