"""A type that a device only emulates is said aloud, and never given as advice."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

import pytest
import torch

from detection import devices
from detection.devices import emulation, has_kernels
from detection.errors import explain
from detection.inference import Detector
from detection.training.precision import choose_precision
from tests.test_drift import build

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU of capability 7.5."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(),
    reason="reads the flags of an x86 CPU on Linux",
)
def test_a_cpu_has_bfloat16_where_its_flags_say_avx512() -> None:
    flags = Path("/proc/cpuinfo").read_text().split("flags")[1].split("\n")[0].split()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags):
        assert has_kernels(CPU, torch.bfloat16)
    elif "avx2" in flags and not any(flag.startswith(("avx_ne_convert", "amx", "avx512")) for flag in flags):
        assert not has_kernels(CPU, torch.bfloat16)
    assert has_kernels(CPU, torch.float32)


@pytest.mark.usefixtures("turing")
def test_a_gpu_without_bfloat16_is_named_with_the_type_that_it_has() -> None:
    assert has_kernels(GPU, torch.float16) and has_kernels(GPU, torch.float32)
    said = emulation(GPU, torch.bfloat16, "--trainer.precision")
    assert said == (
        "Tesla T4 has no bfloat16, which PyTorch emulates many times slower: --trainer.precision 16-mixed is faster"
    )
    assert str(emulation(GPU, torch.bfloat16, "--precision")).endswith(": --precision 16 is faster")
    assert emulation(GPU, torch.float16, "--precision") is None


@pytest.mark.usefixtures("turing")
def test_out_of_memory_names_a_type_that_the_gpu_has() -> None:
    text = str(explain(torch.OutOfMemoryError("CUDA out of memory")))
    assert text.endswith("lower data.batch_size or data.max_size, or try --trainer.precision 16-mixed")


def test_out_of_memory_names_no_type_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_kernels", lambda device, dtype: False)
    assert str(explain(MemoryError("out of memory"))).endswith("lower data.batch_size or data.max_size")
    monkeypatch.setattr(devices, "has_kernels", lambda device, dtype: dtype == torch.bfloat16)
    assert str(explain(MemoryError("out of memory"))).endswith("or try --trainer.precision bf16-mixed")
    full = str(explain(RuntimeError("unable to allocate shared memory(shm)")))
    assert full.endswith("or lower data.batch_size or data.max_size")  # pixels are bytes there in any precision


class FakeTrainer:
    """As far as `choose_precision` looks."""

    def __init__(self, precision: str) -> None:
        self.strategy = self
        self.precision_plugin = self
        self.precision, self.root_device = precision, CPU


@pytest.mark.parametrize(("precision", "warns"), [("bf16-mixed", True), ("bf16-true", True), ("32-true", False)])
def test_training_and_predictions_say_what_is_emulated(
    precision: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "has_kernels", lambda device, dtype: dtype == torch.float32)
    with caplog.at_level(logging.WARNING):
        choose_precision(FakeTrainer(precision))  # type: ignore[arg-type]
        Detector(build(), ["a", "b", "c"], device="cpu", precision="bf16" if warns else "32")
    said = [record.getMessage() for record in caplog.records]
    start = "this processor has no bfloat16, which PyTorch emulates many times slower: "
    flags = [f"{start}--trainer.precision 32-true is faster", f"{start}--precision 32 is faster"]
    assert said == (flags if warns else [])
