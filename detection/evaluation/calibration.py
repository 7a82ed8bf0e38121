"""Whether a score is the chance that the detection is right, and which temperature brings it nearest.

A detection is right where it matches an object at IoU .50 (`analysis.analyse`); those that don't count are left out.
The expected calibration error (Naeini et al. 2015; of detections Küppers et al. 2020) is the mean gap between score and
share of right detections, over bins of the score, each weighing as many as are in it. A temperature T (Guo et al. 2017)
turns the score s into `sigmoid(logit(s) / T)`: above 1 the detector is too sure. The order of scores stays, and with it
AP.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from detection.evaluation.analysis import IGNORED, RIGHT, Analysis

BINS = 10
CERTAIN = 1e-6  # scores are held so far from 0 and 1, whose logits are infinite
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well scores say what is right.

    Attributes:
        count: `(BINS,)` detections in each bin of the score.
        score, right: `(BINS,)` mean score and share of right ones there; NaN in an empty bin.
        error: expected calibration error, NaN without detections.
        temperature: that fits best; NaN where all detections are right or all are wrong.
        error_after: with a temperature that was fitted on the other half of the images.
    """

    count: NDArray[np.int64]
    score: NDArray[np.float64]
    right: NDArray[np.float64]
    error: float
    temperature: float
    error_after: float


def calibration(judged: Analysis) -> Calibration:
    """Of all detections that count."""
    counted = judged.kind != IGNORED
    scores, right = judged.dt.scores[counted], judged.kind[counted] == RIGHT
    half = judged.dt.image[counted] % 2 == 0
    after = np.full(len(scores), np.nan)
    for own in (half, ~half):
        after[own] = cooled(scores[own], fitted_temperature(scores[~own], right[~own]))
    count, score, share = _bins(scores, right)
    return Calibration(
        count, score, share, _error(scores, right), fitted_temperature(scores, right), _error(after, right)
    )


def cooled(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """The scores `(D,)` at a temperature."""
    return np.asarray(special.expit(special.logit(np.clip(scores, CERTAIN, 1 - CERTAIN)) / temperature))


def fitted_temperature(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """The temperature of the highest likelihood; NaN where there is nothing to tell right from wrong."""
    if not right.any() or right.all():
        return float("nan")

    def loss(log_temperature: float) -> float:
        chance = cooled(scores, np.exp(log_temperature))
        return float(-np.log(np.clip(np.where(right, chance, 1 - chance), 1e-300, 1)).mean())

    found = optimize.minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded")
    return float(np.exp(found.x))


def _bins(
    scores: NDArray[np.float64], right: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    place = np.minimum((scores * BINS).astype(np.int64), BINS - 1)  # a bin has its lower end
    count = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return count, np.bincount(place, scores, BINS) / count, np.bincount(place, right, BINS) / count


def _error(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    if not len(scores) or np.isnan(scores).any():
        return float("nan")
    count, score, share = _bins(scores, right)
    full = count > 0
    return float((count[full] * np.abs(score[full] - share[full])).sum() / count.sum())
