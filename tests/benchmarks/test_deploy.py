"""The table of runtimes: each is timed, and compared with what `detection predict` finds."""

from __future__ import annotations

import pytest

from detection.benchmarks.deploy import _over_ours, measure_deploy
from detection.errors import SettingsError


@pytest.mark.slow
def test_forms_and_torchvision_find_the_same() -> None:
    rows = measure_deploy("efficientnet_lite0", 96, 2, ["packed", "plain", "torchvision"])
    assert [row["contender"] for row in rows] == ["packed", "plain", "torchvision"]
    assert rows[0]["ratio"] == 1 and rows[0]["unmatched"] == 0 and rows[0]["pixels"] == 0
    for row in rows[1:]:
        # Random scores lie close together, so rounding decides between a few boxes that overlap.
        assert row["detections"] > 20 and row["unmatched"] <= 0.05 * row["detections"] and row["pixels"] < 0.1
        assert row["ms"] > 0 and row["cpu_ms"] > 0


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(SettingsError, match="there is no contender 'tensorflow'; there are: packed, "):
        measure_deploy("efficientnet_lite0", 96, 2, ["tensorflow"])


def test_a_time_is_compared_with_ours_of_its_precision_alone() -> None:
    times = {"packed": [(2.0, 4.0), (4.0, 4.0), (2.0, 4.0)], "torchvision": [(4.0, 6.0), (6.0, 6.0), (5.0, 6.0)]}
    times |= {"openvino int8": [(1.0, 1.0)] * 3}
    assert _over_ours(times, "torchvision", 0) == 2.0 and _over_ours(times, "torchvision", 1) == 1.5
    assert _over_ours(times, "openvino int8", 0) is None
    assert _over_ours(times | {"packed bf16": [(4.0, 2.0)] * 3}, "openvino int8", 0) == 0.25
