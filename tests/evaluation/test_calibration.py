"""Calibration on scores whose chance of being right is known, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import special
from torch import tensor
from torchmetrics.functional.classification import binary_calibration_error

from detection.evaluation.analysis import BACKGROUND, IGNORED, RIGHT, analyse
from detection.evaluation.calibration import calibration, cooled, fitted_temperature
from detection.evaluation.results import ImageResult


def judged(scores, kind):
    """An analysis of detections of these scores and kinds, one an image."""
    boxes = np.array([[0.0, 0.0, 10.0, 10.0]])
    truth = (boxes[:0], np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool), np.zeros(0, bool))
    one = np.ones(1, np.int64)
    images = [
        ImageResult(i, str(i), (20, 20), boxes, one, scores[i : i + 1], None, *truth, None) for i in range(len(scores))
    ]
    return replace(analyse(images, 1), kind=np.asarray(kind))


def drawn(count, temperature):
    """Scores, and whether each is right, of a detector whose logits are `temperature` times too large."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, count)
    return special.expit(logits * temperature), rng.random(count) < special.expit(logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_a_drawn_detector_is_found(temperature):
    scores, right = drawn(20000, temperature)
    assert fitted_temperature(scores, right) == pytest.approx(temperature, rel=0.04)
    found = calibration(judged(scores[:4000], np.where(right[:4000], RIGHT, BACKGROUND)))
    assert found.error_after < 0.03 and (found.error > 0.05) == (temperature != 1)
    assert (np.diff(cooled(np.sort(scores), 3.0)) >= 0).all()


def test_the_error_is_that_of_torchmetrics():
    scores, right = drawn(500, 2.0)
    found = calibration(judged(scores, np.where(right, RIGHT, BACKGROUND)))
    wanted = binary_calibration_error(tensor(scores), tensor(right).long(), n_bins=10, norm="l1")
    assert found.error == pytest.approx(float(wanted), abs=1e-6)


def test_by_hand():
    kind = [RIGHT, BACKGROUND, RIGHT, IGNORED]
    found = calibration(judged(np.array([0.92, 0.98, 0.41, 0.99]), kind))
    assert found.count.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 2]
    assert found.right[[4, 9]].tolist() == [1.0, 0.5] and found.score[9] == pytest.approx(0.95)
    assert found.error == pytest.approx((0.59 + 2 * 0.45) / 3)


def test_nothing_to_tell():
    nothing = calibration(judged(np.zeros(0), np.zeros(0, np.int64)))
    assert math.isnan(nothing.error) and math.isnan(nothing.temperature)
    perfect = calibration(judged(np.array([0.9, 1.0]), [RIGHT, RIGHT]))
    assert perfect.error == pytest.approx(0.05) and math.isnan(perfect.error_after)
