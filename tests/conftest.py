"""Fixtures that every test may use."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# CI draws the same examples every time, so that it judges the change and not the day; everybody else explores.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Runs start W&B by default, which takes seconds; the tests that are about it set the variable themselves.
os.environ.setdefault("WANDB_MODE", "disabled")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is left to `make rehearsal` is slow, too: `-m 'not slow'` leaves out both.

    Files with most slow tests come first: at the end one of them would keep one process busy, and the others waiting.
    """
    slow = Counter[Path]()
    for item in items:
        if item.get_closest_marker("rehearsal"):
            item.add_marker("slow")
        elif item.get_closest_marker("slow"):
            slow[item.path] += 1
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that lies beside the checkout; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data sets are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def _autograd_knows_the_devices() -> None:
    """It counts them once; after a fake tensor of CUDA it would find a GPU, start its thread and refuse to fork."""
    torch.ones(1, requires_grad=True).backward()


@pytest.fixture(autouse=True)
def _as_at_the_start() -> Iterator[None]:
    """A command sets up its own process, which here is also that of other tests."""
    _forget_commands()
    yield
    _forget_commands()


def _forget_commands() -> None:
    for name in ("detection", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.getLogger("detection").setLevel(logging.NOTSET)
    os.environ.pop("DETECTION_RUN_FOLDER", None)
    if parser := sys.modules.get("jsonargparse"):  # which a resumed run forbids all packages but those it knows
        parser._common.parsing_settings["import_path_verdicts"].pop("*", None)
