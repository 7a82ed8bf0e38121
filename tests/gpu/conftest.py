"""The tests of this folder need a GPU. `make gpu` runs them, and its rehearsal runs them on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

from detection.benchmarks.gpu import Setting
from detection.benchmarks.gpu_runs import ON_CPU
from detection.benchmarks.gpu_sizes import REHEARSAL, Sizes


@pytest.fixture(scope="session")
def device() -> str:
    if os.environ.get(ON_CPU):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return "cuda"


@pytest.fixture
def setting(device: str) -> Setting:
    return Setting(device, REHEARSAL if device == "cpu" else Sizes())
