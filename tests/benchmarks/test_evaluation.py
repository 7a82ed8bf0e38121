"""The benchmark of the evaluator runs, and what it compares agrees."""

from __future__ import annotations

import pytest

from detection.benchmarks.evaluation import benchmark_eval


@pytest.mark.rehearsal
def test_rows_agree_and_have_a_time_and_a_size():
    rows = benchmark_eval(images=40, detections=20, classes=5)
    assert [row["evaluator"] for row in rows] == [
        "MeanAP",
        "torchmetrics, faster_coco_eval",
        "torchmetrics, pycocotools",
    ]
    for row in rows:
        assert 0 < row["map"] < 1
        assert row["largest difference"] < 1e-6
        assert row["compute s"] > 0
        assert row["peak MiB"] >= 0
    assert rows[-1]["times as fast"] == 1
