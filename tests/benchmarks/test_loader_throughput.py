"""The loader benchmark runs, and refuses a folder without images."""

from __future__ import annotations

from pathlib import Path

import pytest

from detection.benchmarks.data import loader_throughput
from detection.data.records import DataError


def test_throughput_compares_three_loaders() -> None:
    figures = loader_throughput(count=12, rounds=1, batch_size=2, num_workers=0, min_size=100, max_size=200)
    assert set(figures) == {"ours", "torchvision_uint8", "torchvision_float", "times_uint8", "times_float"}
    assert all(value > 0 for value in figures.values())
    assert figures["times_float"] == figures["ours"] / figures["torchvision_float"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image"):
        loader_throughput(tmp_path)
