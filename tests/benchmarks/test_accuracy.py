"""The benchmark of AP: time to torchvision's AP is read off the way, and every contender trains and is tested."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from detection.benchmarks.accuracy import measure_accuracy, summarise, times_to_ap
from detection.benchmarks.commands import CONFIGS
from tests.data.drawn_sets import Style, write_voc


def _run(name: str, ap: float, seconds: float, way: list[tuple[float, float]]) -> dict[str, object]:
    return {"detector": name, "seed": 0, "map": ap, "train_cpu_s": seconds, "way": way}


def test_time_to_ap_is_that_of_the_first_evaluation_with_it():
    ours = _run("ours", 0.5, 80.0, [(20.0, 0.1), (40.0, 0.35), (60.0, 0.3), (80.0, 0.5)])
    found = times_to_ap([_run("torchvision", 0.3, 100.0, []), ours, _run("torchvision, our settings", 0.6, 90.0, [])])
    assert [row["ratio"] for row in found] == [0.4, math.inf]
    assert [row["peer"] for row in found] == ["torchvision", "torchvision, our settings"]
    assert times_to_ap([_run("torchvision", 0.3, 100.0, [])]) == []


@pytest.mark.rehearsal
@pytest.mark.parametrize("every", [None, 4])
def test_contenders_train_and_are_tested(tmp_path: Path, every: int | None) -> None:
    write_voc(tmp_path / "data", Style())
    found = {"train_split": None, "val_split": None, "min_size": 64, "max_size": 96}
    rows = measure_accuracy(
        CONFIGS / "bccd.yaml", tmp_path / "data", [0], output=tmp_path, data=found, images=8, every=every
    )
    assert [row["detector"] for row in rows] == ["torchvision", "torchvision, our settings", "ours"]
    for row in rows:
        assert row["images"] == 8
        assert row["train_cpu_s"] > 0
        seconds = [at for at, _ in row.get("way", [])]
        assert bool(seconds) == bool(every)
        assert seconds == sorted(seconds)
        assert not seconds or 0 < seconds[-1] <= row["train_cpu_s"]
    assert (tmp_path / "ours_0.ckpt").is_file()
    assert len(summarise(rows)) == 3
    if every:
        assert len(times_to_ap(rows)) == 2
