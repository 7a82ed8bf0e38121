"""Whether two detectors differ by more than chance: of images, and of the seeds that they were trained with.

Both are evaluated on the same images, so that a hard image is hard for both. What is compared is the mean over the
seeds (runs) of each side. Its variance has two parts:

- `images`: another set of images would have given another difference. Bootstrap (Efron & Tibshirani 1993): the images
  are drawn with replacement, the same for all runs, and the figures computed anew for each draw.
- `seed`: another seed would have given other weights. s² is the variance of a figure between the runs of one side,
  pooled over both sides, which are taken to vary alike.

s² was measured on one set of images, so what a seed does on just these images is in it, and in the bootstrap as well.
The bootstrap tells how much: `i`, the variance between runs of the deviations of the draws. With `h = 1/nA + 1/nB` for
nA and nB runs, the variance of the difference is `images + s² h`, where `images = bootstrap - i h`. The interval is the
difference plus and minus t of its root, with Satterthwaite's degrees of freedom. With one run on each side nothing is
known of seeds, and the interval is that of these very weights.

Shape shorthand:
    S: draws     I: images     G: runs     C: classes     F: figures
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from detection.evaluation.analysis import IGNORED, MISTAKES, RIGHT, Analysis, analyse, error_breakdown
from detection.evaluation.coco_eval import Floats, Judged, judge
from detection.evaluation.resampling import drawn, figure_names, pooled
from detection.evaluation.results import ImageResult

LEVEL = 0.95  # of the intervals
POWER = 0.8  # share of comparisons that shall find a difference as large as the one measured
KINDS = [name for name, _ in MISTAKES.values()] + ["missed"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of both sides; NaN where there is no ground truth for it.

    Attributes:
        name: of the figure, the class or the kind of mistake.
        a, b: of each run.
        difference: mean of `a` less mean of `b`.
        low, high: ends of its interval.
        p: that chance alone gives such a difference, by the same variance.
        p_images: the same by permutation, of these very weights; NaN where it was not tested.
        images, seed: variances as the head of this module has them; `seed` is s², NaN with one run on each side.
        draws: in how many draws there was ground truth for it.
    """

    name: str
    a: tuple[float, ...]
    b: tuple[float, ...]
    difference: float
    low: float
    high: float
    p: float
    p_images: float
    images: float
    seed: float
    draws: int

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def seeds_needed(self) -> float:
        """Seeds of each side that would decide, if the difference is what was measured.

        The least n with `difference² >= (z.975 + z.8)² (images + 2 s² / n)`: then four of five comparisons find it.
        Infinite where no number does, as the images alone leave more doubt; NaN where nothing is known of seeds.
        """
        left = (self.difference / _reach()) ** 2 - self.images
        if math.isnan(self.seed) or math.isnan(left):
            return math.nan
        return max(1, math.ceil(2 * self.seed / left)) if left > 0 else math.inf

    def images_needed(self) -> float:
        """How many times as many images would decide, with no more seeds; infinite where the seeds alone forbid it."""
        runs = 1 / len(self.a) + 1 / len(self.b)
        left = (self.difference / _reach()) ** 2 - (0 if math.isnan(self.seed) else self.seed * runs)
        return self.images / left if left > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two sides, compared.

    Attributes:
        compared: `boxes`, `masks` or `key points`: what the figures and the classes are of. The rest is of boxes.
        figures: COCO's, the first is AP.
        classes: AP of each class that has objects.
        adjusted: `p` of each class after Benjamini and Hochberg (1995): of the classes that are said to differ at it,
            so many are expected not to.
        mistakes: how many of each kind, at IoU .50.
        delta_ap: of each kind, the points of AP50 that it costs `a` less those that it costs `b`.
        change: `(I,)` how much lighter the mistakes of `a` weigh in each image, on average over the runs.
        judged_a, judged_b: the mistakes of the first run of each side.
    """

    compared: str
    figures: list[Difference]
    classes: list[Difference]
    adjusted: list[float]
    mistakes: list[Difference]
    delta_ap: dict[str, float]
    change: Floats
    judged_a: Analysis
    judged_b: Analysis


def compare(
    a: Sequence[Sequence[ImageResult]],
    b: Sequence[Sequence[ImageResult]],
    names: Sequence[str],
    limits: Sequence[int] = (1, 10, 100),
    use_masks: bool = False,
    draws: int = 1000,
    seed: int = 0,
    sigmas: Sequence[float] = (),
) -> Contrast:
    """Compare the runs of `a` with those of `b`, all on the same images, in the order of their ids.

    Args:
        a, b: the results of each run.
        names: C classes.
        limits: three limits of detections of a class in an image, of key points one; the figures are at the last.
        use_masks: compare masks instead of boxes.
        draws: S, of the bootstrap and of the permutation test.
        seed: of the draws.
        sigmas: compare key points, by OKS with these; there are no figures of small objects then, as COCO has none.
    """
    images = len(a[0])
    runs = [list(judge(results, len(names), max(limits), use_masks, sigmas=sigmas)) for results in (*a, *b)]
    rng = np.random.default_rng(seed)
    one = np.ones((1, images), np.int16)
    weights = rng.multinomial(images, np.full(images, 1 / images), draws).astype(np.int16)
    measured = [np.concatenate(drawn(run, len(names), one, one, limits), 1)[0] for run in runs]
    resampled = [np.concatenate(drawn(run, len(names), weights, weights, limits), 1) for run in runs]
    shuffled = _shuffled(runs, len(a), images, len(names), limits, draws, rng)
    side = len(a)
    found = []
    for f, name in enumerate([*figure_names(limits), *names]):
        here = np.array([run[f] for run in measured]), np.stack([run[:, f] for run in resampled])
        found.append(_tested(difference(name, *here, side, images), shuffled[:, f]))
    figures = [own for own in found[: -len(names)] if not (sigmas and own.name.endswith("_small"))]
    classes = [own for own in found[-len(names) :] if not math.isnan(own.difference)]
    judged = [analyse(results, len(names), limit=max(limits)) for results in (*a, *b)]
    counts = np.stack([_mistakes(run, images) for run in judged])
    mistakes = [
        difference(kind, counts[..., k].sum(1), counts[..., k] @ weights.T.astype(np.float64), side, images)
        for k, kind in enumerate(KINDS)
    ]
    costs = [{row.name: row.delta_ap for row in error_breakdown(run)} for run in judged]
    weight = np.stack([mistake_weight(run, images) for run in judged])
    chances = np.nan_to_num([own.p for own in classes], nan=1.0)
    return Contrast(
        compared="key points" if sigmas else "masks" if use_masks else "boxes",
        figures=figures,
        classes=classes,
        adjusted=stats.false_discovery_control(chances).tolist(),
        mistakes=mistakes,
        delta_ap={
            kind: float(np.mean([run[kind] for run in costs[:side]]) - np.mean([run[kind] for run in costs[side:]]))
            for kind in KINDS
        },
        change=weight[side:].mean(0) - weight[:side].mean(0),
        judged_a=judged[0],
        judged_b=judged[side],
    )


def difference(name: str, measured: Floats, draws: Floats, side: int, images: int) -> Difference:
    """A figure of both sides and the interval of its difference.

    Args:
        name: of the figure.
        measured: `(G,)` of each run; the first `side` are those of `a`.
        draws: `(G, S)` of each run in each draw; draws without ground truth (NaN) are left out.
        side: number of runs of `a`.
        images: I, of which there is one more than degrees of freedom in the bootstrap.
    """
    draws = draws[:, ~np.isnan(draws).any(0)]
    sign = np.where(np.arange(len(measured)) < side, 1 / side, -1 / max(1, len(measured) - side))
    value, h, free = float(sign @ measured), float((sign**2).sum()), len(measured) - 2
    variance = float(np.var(sign @ draws, ddof=1)) if draws.shape[1] > 1 else math.nan
    seed = _between(measured[:, None], side) if free else math.nan
    between = seed * h if free else 0.0
    of_images = max(0.0, variance - _between(draws - measured[:, None], side) * h) if free else variance
    error = math.sqrt(of_images + between) if not math.isnan(variance) else math.nan
    freedom = _freedom((of_images, images - 1), (between, free))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom)) if error else float(value == 0)
    return Difference(
        name=name,
        a=tuple(measured[:side].tolist()),
        b=tuple(measured[side:].tolist()),
        difference=value,
        low=value - reach,
        high=value + reach,
        p=p,
        p_images=math.nan,
        images=of_images,
        seed=seed,
        draws=draws.shape[1],
    )


def _freedom(*parts: tuple[float, int]) -> float:
    """Degrees of freedom of a sum of variances, each with its own (Satterthwaite 1946)."""
    doubt = sum(part**2 / own for part, own in parts if part > 0)
    return sum(part for part, _ in parts) ** 2 / doubt if doubt > 0 else 1.0


def _between(values: Floats, side: int) -> float:
    """Variance between the runs of a side, pooled over both, of `(G, S)`; the mean over draws, NaN without any."""
    if not values.shape[1]:
        return math.nan
    groups = [values[:side], values[side:]]
    squares = sum(((own - own.mean(0)) ** 2).sum(0) for own in groups)
    return float(np.mean(squares / (len(values) - 2)))


def _shuffled(
    runs: Sequence[list[Judged]],
    side: int,
    images: int,
    num_classes: int,
    limits: Sequence[int],
    draws: int,
    rng: np.random.Generator,
) -> Floats:
    """`(S, F + C)` differences as they would be if it were chance which side has which detections of an image.

    With as many runs on both sides the detections of the k-th of each change places, in each image or not; otherwise
    all runs are shuffled in each image.
    """
    pairs = [(k, side + k) for k in range(side)] if 2 * side == len(runs) else [tuple(range(len(runs)))]
    total = np.zeros((draws, len(figure_names(limits)) + num_classes))
    objects = np.ones((draws, images), np.int16)
    for members in pairs:
        merged = pooled([runs[r] for r in members], images)
        order = np.argsort(rng.random((draws, images, len(members))), -1)
        for place, run in enumerate(members):
            chosen = order[:, :, place, None] == np.arange(len(members))  # whose detections take the run's place
            weights = chosen.transpose(0, 2, 1).reshape(draws, -1).astype(np.int16)
            figures = np.concatenate(drawn(merged, num_classes, weights, objects, limits), 1)
            total += figures / side if run < side else -figures / (len(runs) - side)
    return total


def _tested(own: Difference, shuffled: Floats) -> Difference:
    """The figure with its `p_images`; the measured difference counts as one of the draws (Phipson & Smyth 2010)."""
    if math.isnan(own.difference):
        return own
    extreme = int((np.abs(shuffled) >= abs(own.difference) - 1e-12).sum())
    values = {name: getattr(own, name) for name in Difference.__slots__}
    return Difference(**values | {"p_images": (1 + extreme) / (1 + len(shuffled))})


def _mistakes(judged: Analysis, images: int) -> NDArray[np.float64]:
    """`(I, K)` mistakes of each kind in each image."""
    columns = [np.bincount(judged.dt.image[judged.kind == kind], minlength=images) for kind in MISTAKES]
    return np.stack([*columns, np.bincount(judged.gt.image[judged.missed], minlength=images)], 1).astype(np.float64)


def mistake_weight(judged: Analysis, images: int) -> Floats:
    """`(I,)` as `worst_images` weighs: scores of wrong detections, and one for each object not found."""
    wrong = (judged.kind != RIGHT) & (judged.kind != IGNORED)
    lost = ~judged.found & ~judged.gt.crowd
    weight = np.bincount(judged.dt.image[wrong], judged.dt.scores[wrong], minlength=images).astype(np.float64)
    return weight + np.bincount(judged.gt.image[lost], minlength=images).astype(np.float64)


def _reach() -> float:
    return float(stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER))
