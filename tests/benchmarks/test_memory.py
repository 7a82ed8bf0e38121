"""The benchmark of memory runs, and what it compares agrees."""

from __future__ import annotations

import pytest

from detection.benchmarks.memory import measure_masks, measure_training


@pytest.mark.rehearsal
def test_masks_of_both_sides_give_one_figure():
    encoded, ours, theirs = measure_masks(12, 10, 3, ("MeanAP, RLE", "MeanAP", "torchmetrics, pycocotools"))
    assert 0 < ours["mask AP"] == encoded["mask AP"] < 1
    assert ours["mask AP"] == pytest.approx(theirs["mask AP"], abs=1e-6)
    assert ours["peak MiB"] >= ours["above start MiB"] >= 0
    assert theirs["peak MiB over torchmetrics, pycocotools"] == 1


@pytest.mark.rehearsal
def test_training_takes_no_more_than_torchvision():
    theirs, ours = measure_training("efficientnet_lite0", 320, 2, False, steps=2)
    assert (theirs["what"], ours["what"]) == ("torchvision", "ours")
    assert ours["above start MiB"] < theirs["above start MiB"]
