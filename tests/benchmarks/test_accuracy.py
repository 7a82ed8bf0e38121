"""The benchmark of AP: time to torchvision's AP is read off the way, and every contender trains and is tested."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from detection.benchmarks.accuracy import _detector, measure_accuracy, summarise, times_to_ap
from detection.benchmarks.commands import CONFIGS
from tests.data.drawn_sets import Style, write_voc


def _run(name: str, seconds: float, way: list[tuple[float, float]]) -> dict[str, object]:
    return {"detector": name, "seed": 0, "map": 0.9, "train_cpu_s": seconds, "way": way}  # `map` is of the test


def test_time_to_ap_is_that_of_the_first_evaluation_with_it():
    ours = _run("ours", 80.0, [(20.0, 0.1), (40.0, 0.35), (60.0, 0.3), (80.0, 0.5)])
    peers = [_run("torchvision", 100.0, [(100.0, 0.3)]), _run("torchvision, our settings", 90.0, [(90.0, 0.6)])]
    found = times_to_ap([*peers, ours, _run("ours, bf16", 45.0, [(45.0, 0.6)])])
    assert [(row["ours"], row["peer"], row["ratio"]) for row in found] == [
        ("ours", "torchvision", 0.4),
        ("ours", "torchvision, our settings", math.inf),
        ("ours, bf16", "torchvision", 0.45),
        ("ours, bf16", "torchvision, our settings", 0.5),
    ]
    assert times_to_ap([_run("torchvision", 100.0, [(100.0, 0.3)])]) == []


def test_torchvision_with_our_settings_has_all_of_them() -> None:
    settings = yaml.safe_load((CONFIGS / "bccd.yaml").read_text())
    names = "torchvision, our settings", "ours"
    made = [_detector(settings["model"]["detector"], name, 4, settings["data"]) for name in names]
    theirs, ours = made[0].model, made[1]
    assert theirs.rpn._pre_nms_top_n == ours.rpn.pre_nms_top_n and ours.rpn.pre_nms_top_n["training"] == 1000
    assert theirs.rpn._post_nms_top_n == ours.rpn.post_nms_top_n
    pairs = [(theirs.rpn.fg_bg_sampler, ours.rpn.sampler), (theirs.roi_heads.fg_bg_sampler, ours.roi_heads.sampler)]
    for one, other in pairs:
        assert one.batch_size_per_image == other.batch_size_per_image
        assert one.positive_fraction == other.positive_fraction
    assert theirs.rpn.nms_thresh == ours.rpn.nms_thresh
    for name in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(theirs.roi_heads, name) == getattr(ours.roi_heads, name)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (theirs, ours)]
    assert sorted(map(str, shapes[0].values())) == sorted(map(str, shapes[1].values()))


@pytest.mark.rehearsal
@pytest.mark.parametrize("every", [None, 4])
def test_contenders_train_and_are_tested(tmp_path: Path, every: int | None) -> None:
    contenders = ["torchvision", "torchvision, our settings", "ours", *(["ours, bf16"] if every else [])]
    write_voc(tmp_path / "data", Style())
    found = {"train_split": None, "val_split": None, "min_size": 64, "max_size": 96}
    rows = measure_accuracy(
        CONFIGS / "bccd.yaml", tmp_path / "data", [0], contenders, output=tmp_path, data=found, images=8, every=every
    )
    assert [row["detector"] for row in rows] == contenders
    for row in rows:
        assert row["images"] == 8
        assert row["train_cpu_s"] > 0
        seconds = [at for at, _ in row.get("way", [])]
        assert bool(seconds) == bool(every)
        assert seconds == sorted(seconds)
        assert not seconds or 0 < seconds[-1] <= row["train_cpu_s"]
    assert (tmp_path / "ours_0.ckpt").is_file()
    assert len(summarise(rows)) == len(contenders)
    if every:
        assert len(times_to_ap(rows)) == 4
