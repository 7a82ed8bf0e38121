"""The benchmark of large data sets runs, and its forecast is a line."""

from __future__ import annotations

import pytest

from detection.benchmarks.scale import SHAPES, measure_scale
from detection.errors import SettingsError


@pytest.mark.rehearsal
def test_rows_have_a_figure_a_size_and_a_forecast(tmp_path):
    rows = {row["what"]: row for row in measure_scale("coco", [100, 200, 300], tmp_path)}
    stages = ("read", "store", "order of an epoch", "resume in the middle", "figures of validation")
    assert {f"{stage}, {unit}" for stage in stages for unit in ("s", "MiB")} < rows.keys()
    assert {"first batch of workers, s", "memory of a worker alone, MiB"} < rows.keys()
    for row in rows.values():
        assert all(row[size] >= 0 for size in ("100", "200", "300"))
        forecast = row["300"] + row["per 1,000 images"] / 1000 * (SHAPES["coco"].images - 300)
        assert row["118,287 images"] == pytest.approx(forecast)
    file = rows["annotation file, MiB"]
    assert file["straight"] == pytest.approx(1, abs=0.2)
    assert file["per 1,000 images"] * 1.048 == pytest.approx(0.9, abs=0.2)  # some 7.3 x 110 + 70 bytes an image
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes", [[10, 20], [10, 20, 30, 40], [10, 30, 20], [10, 10, 20], [0, 1, 2]])
def test_other_than_three_ascending_sizes_are_refused_at_once(sizes):
    with pytest.raises(SettingsError, match=r"sizes are \[.*\]: give three numbers of images, ascending"):
        measure_scale("coco", sizes)
