"""The profile by stage counts each second once."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from detection.benchmarks.speed import Mode, _one_left_out, build, contenders, measure_forms
from detection.benchmarks.stages import Stopwatch, measure_stages
from detection.models.fast import depthwise, winograd
from detection.models.fast.convolution import QuickConv2d
from detection.models.fast.fast_pooling import GatherPooler
from detection.models.fast.folding import FoldedConv2d
from detection.models.fast.linear import OneDNNLinear
from detection.models.fast.on_cpu import FewAtOnce, TrimmedRoIHeads
from detection.models.fast.packing import PackedConv2d
from detection.models.fast.sparse_rpn import SparseRPN

STAGES = """
import torch
from detection.benchmarks.stages import Stopwatch

watch = Stopwatch("cpu")
with watch.stage("before"):
    pass
with watch.stage("large"):
    block = torch.ones(64, 2**20)  # 256 MiB, and gone with the stage
    del block
with watch.stage("after"):
    pass
print(watch.peak["before"], watch.peak["large"], watch.peak["after"])
"""


def test_a_stage_inside_another_counts_for_itself_alone() -> None:
    watch = Stopwatch("cpu")
    inner = watch.wrap("inner", lambda: time.sleep(0.05))
    with watch.stage("outer"):
        time.sleep(0.02)
        inner()
    assert watch.seconds["inner"] >= 0.05
    assert 0.02 <= watch.seconds["outer"] < watch.seconds["inner"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's high-water mark is Linux's")
def test_the_peak_of_a_stage_is_its_own() -> None:
    # In a process of its own, as the benchmarks: one that has run other tests may keep 256 MiB for the next who asks.
    done = subprocess.run([sys.executable, "-c", STAGES], capture_output=True, text=True, check=True)
    before, large, after = map(float, done.stdout.split())
    assert large - after > 200
    assert large - before > 200


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_stages_of_a_step_are_all_there(mode: str) -> None:
    rows = {row["stage"]: row for row in measure_stages(mode, "efficientnet_lite0", 64, 1, False, 1, "cpu")}  # type: ignore[arg-type]
    stages = {"transform", "backbone", "FPN", "anchors", "RPN head", "proposals", "NMS", "RoI pool", "box head"}
    stages |= {"assignment", "losses", "backward", "optimiser"} if mode == "train" else {"detections"}
    assert set(rows) == stages | {"between", "all"}
    assert sum(row["share"] for name, row in rows.items() if name != "all") == pytest.approx(1)
    assert rows["between"]["share"] < 0.3  # or a stage is missing


@pytest.mark.slow
def test_all_that_are_timed_find_the_same() -> None:
    runs = contenders("infer", "efficientnet_lite0", 128, 2, False, "cpu", plain=True)
    for theirs, ours in zip(runs["torchvision"]() * 2, runs["ours"]() + runs["plain"](), strict=True):
        count = len(ours["scores"])
        assert count == len(theirs["scores"]) > 5
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-4)
        # One by one up to ties: each box of ours is one of theirs.
        distance = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=-1).amin(dim=1)
        assert distance.max() < 1e-2


@pytest.mark.slow
def test_few_classes_and_many_boxes_can_be_timed() -> None:
    for step in contenders("train", "efficientnet_lite0", 64, 1, False, "cpu", objects=30, classes=2).values():
        step()


@pytest.mark.rehearsal
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_each_quick_form_is_left_out_once(mode: Mode) -> None:
    rows = measure_forms(mode, "efficientnet_lite0", 64, 2, False, 1, "cpu")
    forms = ["GatherPooler", "SparseRPN", "TrimmedRoIHeads", "QuickConv2d", "OneDNNLinear", "folding"]
    forms += ["packing", "FewAtOnce"] if mode == "infer" else []
    assert [row["forms"] for row in rows] == ["torchvision", "ours", *(f"without {name}" for name in forms)]
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_detector_lacks_the_form_that_is_left_out_and_no_other(mode: Mode) -> None:
    kinds = {"GatherPooler": GatherPooler, "SparseRPN": SparseRPN, "TrimmedRoIHeads": TrimmedRoIHeads}
    kinds |= {"packing": PackedConv2d, "FewAtOnce": FewAtOnce} if mode == "infer" else {"folding": FoldedConv2d}
    kinds |= {"QuickConv2d": QuickConv2d, "OneDNNLinear": OneDNNLinear} if mode == "train" else {}
    made = _one_left_out(build("efficientnet_lite0", 64, 3)[1], mode, "cpu")
    for left_out, kind in kinds.items():
        has = {name for name, form in made.items() if kind in {type(part) for part in form.modules()}}
        assert made.keys() - has == {f"without {left_out}"}


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_without_quick_convolutions_no_layer_has_them(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded and packed layers have them in themselves, so that the table of forms alone can't leave them out."""
    calls: list[int] = []
    monkeypatch.setattr(winograd, "FEWEST_TILES_AVX512", winograd.FEWEST_TILES)
    monkeypatch.setattr(winograd, "_tiles", lambda *given, plain=winograd._tiles: calls.append(1) or plain(*given))
    of_weight = depthwise.weight_gradient
    monkeypatch.setattr(depthwise, "weight_gradient", lambda *given: calls.append(2) or of_weight(*given))
    steps = contenders(mode, "efficientnet_lite0", 128, 2, False, "cpu", one_left_out=True)
    steps["without QuickConv2d"]()
    assert not calls
    steps["ours"]()
    assert set(calls) == ({1, 2} if mode == "train" else {1})
