"""Figures of an evaluation. Each function gives a matplotlib figure of its own; no global state, no window."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from detection.evaluation.analysis import (
    BACKGROUND,
    BOTH,
    CLASS,
    DUPLICATE,
    LOCATION,
    MISTAKES,
    RIGHT,
    Analysis,
    Mistake,
    most_confused,
)
from detection.evaluation.calibration import Calibration
from detection.evaluation.coco_eval import RECALL_THRESHOLDS, Curves

INK, FAINT, ACCENT = "#1d2733", "#c8d0d9", "#1f6feb"
COLOURS = {
    RIGHT: "#2e9e6b",
    CLASS: "#e58a1f",
    LOCATION: "#3d7fd9",
    BOTH: "#8d5fd3",
    DUPLICATE: "#b59a00",
    BACKGROUND: "#d64550",
}
MISSED = "#d6338a"
PARTS = (ACCENT, "#e58a1f", "#2e9e6b", "#8d5fd3", "#d64550", "#b59a00", "#5b6776", "#d6338a")  # of the loss
NAMED_CURVES = 10
MATRIX_CLASSES = 25


def precision_recall(curves: Curves, class_names: Sequence[str]) -> Figure:
    """Interpolated precision over recall at IoU .50 for each class, with the mean; beyond ten classes five are named.

    Args:
        curves: of `evaluate`, the first threshold being .50.
        class_names: label `i` is `class_names[i - 1]`.
    """
    figure, axes = _figure(6.4, 4.6)
    precision = curves.precision[0, :, :, 0, -1]
    known = np.flatnonzero(precision[0] > -1)
    ap = precision.mean(0)
    ranked = known[np.argsort(-ap[known], kind="stable")]
    named = set(ranked[:NAMED_CURVES] if len(ranked) <= NAMED_CURVES else [*ranked[:3], *ranked[-2:]])
    for k in ranked:
        style: dict[str, Any] = (
            {"lw": 1.5, "label": f"{_text(class_names[k])}  {ap[k]:.2f}"} if k in named else {"lw": 0.6, "color": FAINT}
        )
        axes.plot(RECALL_THRESHOLDS, precision[:, k], **style)
    if len(known):
        mean = precision[:, known].mean(1)
        axes.plot(RECALL_THRESHOLDS, mean, color=INK, lw=2.6, label=f"mean  {mean.mean():.2f}")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="AP at IoU .50")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title="Precision and recall at IoU .50")
    return figure


def confusion(matrix: NDArray[np.int64], class_names: Sequence[str]) -> Figure:
    """Where the objects of each class went: colours are shares of the row over all classes, numbers are counts.

    Of more than `MATRIX_CLASSES` classes the most confused are shown, and the title says how many.

    Args:
        matrix: `(C + 1, C + 1)` of `confusion_matrix`.
        class_names: C names.
    """
    count = len(class_names)
    shown = most_confused(matrix, MATRIX_CLASSES)
    index = np.append(shown, count)
    share = (matrix / np.maximum(matrix.sum(1, keepdims=True), 1))[np.ix_(index, index)]
    part = matrix[np.ix_(index, index)]
    side = min(max(4.2, 0.42 * len(index) + 1.8), 11)
    figure, axes = _figure(side, side * 0.92)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    names = [_text(class_names[int(k)]) for k in shown]
    axes.set_xticks(range(len(index)), [*names, "undetected"], rotation=90 if len(index) > 6 else 0, fontsize=8)
    axes.set_yticks(range(len(index)), [*names, "background"], fontsize=8)
    for i, j in np.argwhere(part > 0):
        shade = "white" if share[i, j] > 0.55 else INK
        axes.text(j, i, str(part[i, j]), ha="center", va="center", fontsize=7 if len(index) > 12 else 9, color=shade)
    axes.grid(visible=False)
    some = "" if len(shown) == count else f": the {len(shown)} most confused of {count} classes"
    axes.set(xlabel="detected as", ylabel="is", title=f"Confusion{some}")
    return figure


def score_histogram(analysis: Analysis) -> Figure:
    """How many detections have which score, right ones and each kind of mistake stacked (square-root scale)."""
    figure, axes = _figure(6.4, 4.6)
    kinds = [RIGHT, *MISTAKES]
    axes.hist(
        [analysis.dt.scores[analysis.kind == kind] for kind in kinds],
        bins=np.linspace(0, 1, 41).tolist(),
        stacked=True,
        color=[COLOURS[kind] for kind in kinds],
        label=["right", *(name for name, _ in MISTAKES.values())],
    )
    axes.set_yscale("function", functions=(lambda count: np.sqrt(np.maximum(count, 0)), np.square))
    axes.set(xlim=(0, 1), xlabel="score", ylabel="detections (square-root scale)", title="Detections by score")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def reliability(found: Calibration) -> Figure:
    """The share of right detections over the score; on the diagonal the score is that share.

    Args:
        found: of `calibration`.
    """
    figure, axes = _figure(4.6, 4.6)
    full = found.count > 0
    middles = (np.arange(len(full)) + 0.5) / len(full)
    axes.bar(middles[full], found.right[full], 0.9 / len(full), color="#9cc2f7", label="right at IoU .50")
    axes.plot([0, 1], [0, 1], color="#5b6776", lw=1, ls="--")
    axes.plot(found.score[full], found.right[full], "o-", color=ACCENT, ms=4, lw=1.2, label="at the mean score")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="share of right detections", title="Reliability")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def by_size(figures: Mapping[str, float]) -> Figure:
    """AP and AR of small, medium and large objects; a size without objects has no bar.

    Args:
        figures: the keys of `MeanAP.compute`, without prefix.
    """
    figure, axes = _figure(4.6, 3.6)
    sizes = ("small", "medium", "large")
    for offset, (key, name, colour) in enumerate((("map", "AP", ACCENT), ("mar", "AR", "#9cc2f7"))):
        values = [figures[f"{key}_{size}"] for size in sizes]
        heights = [max(value, 0.0) for value in values]
        bars = axes.bar(np.arange(3) + 0.38 * offset, heights, 0.36, color=colour, label=name)
        axes.bar_label(bars, [f"{v:.3f}" if v > -1 else "none" for v in values], fontsize=8, padding=2)
    axes.set_xticks(np.arange(3) + 0.19, ["small\n< 32²", "medium", "large\n> 96²"])
    axes.set(ylim=(0, 1.08), xlabel="annotated area in pixels", ylabel="AP, AR", title="Size of objects")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def mistakes(rows: Sequence[Mistake]) -> Figure:
    """How much AP each kind of mistake costs."""
    figure, axes = _figure(6.4, 3.0)
    main = rows[: len(MISTAKES) + 1]
    colours = [*(COLOURS[kind] for kind in MISTAKES), MISSED]
    bars = axes.barh([row.name for row in main], [100 * row.delta_ap for row in main], color=colours, height=0.62)
    axes.bar_label(bars, [f"{100 * row.delta_ap:.1f}  ({row.count})" for row in main], fontsize=8, padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.22)
    label = "points of AP50 that putting this kind right would add (how many)"
    axes.set(xlabel=label, ylabel="mistake", title="What goes wrong")
    return figure


def judged_images(
    analysis: Analysis,
    images: Mapping[int, NDArray[np.uint8]],
    class_names: Sequence[str],
    score: float = 0.3,
    columns: int = 3,
) -> Figure:
    """Images with what was found and missed in them, each detection in the colour of what it is.

    Args:
        analysis: of the results that the images belong to.
        images: by position in those results, `(H, W, 3)` uint8 RGB.
        class_names: label `i` is `class_names[i - 1]`.
        score: detections below it are not drawn.
        columns: pictures a row.
    """
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    a = analysis
    for axes, (i, pixels) in zip(panels, images.items(), strict=False):
        axes.imshow(pixels)
        for j in np.flatnonzero((a.gt.image == i) & ~a.gt.crowd & ~a.found):
            _outline(axes, a.gt.boxes[j], MISSED, "--", class_names[a.gt.label[j] - 1])
        for j in np.flatnonzero((a.dt.image == i) & (a.dt.scores >= score) & np.isin(a.kind, list(COLOURS))):
            name = f"{class_names[a.dt.label[j] - 1]} {a.dt.scores[j]:.2f}"
            _outline(axes, a.dt.boxes[j], COLOURS[int(a.kind[j])], "-", name)
    for axes in panels:
        axes.axis("off")
    names = {RIGHT: "right", **{kind: name for kind, (name, _) in MISTAKES.items()}}
    keys = [Line2D([], [], color=COLOURS[kind], lw=3, label=name) for kind, name in names.items()]
    keys.append(Line2D([], [], color=MISSED, lw=2, ls="--", label="not found"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)
    return figure


def _outline(axes: Axes, box: NDArray[np.float64], colour: str, style: str, name: str) -> None:
    """A box `(4,)` x, y, width, height with its name."""
    x, y, width, height = box
    axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=colour, lw=1.8, ls=style))
    ground = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    top = style == "-"  # objects have their names below, so that both can be read
    place = (x, max(y, 6)) if top else (x, y + height)
    axes.text(*place, _text(name), fontsize=7, color="white", va="bottom" if top else "top", bbox=ground, clip_on=True)


def training_curves(rows: Sequence[Mapping[str, str]]) -> Figure:
    """Losses, the parts of the training loss, and AP over the optimiser steps of a run; losses of steps are smoothed.

    Args:
        rows: of `metrics.csv`; empty where a figure was not logged in that row.
    """
    figure = Figure(figsize=(14.4, 3.9), layout="constrained")
    keys = sorted({key for row in rows for key in row if re.fullmatch(r"train/loss_\w+", key or "")})
    names = [key.removeprefix("train/loss_").replace("_", " ") for key in keys]
    parts = {key: (name, PARTS[i % len(PARTS)]) for i, (key, name) in enumerate(zip(keys, names, strict=True))}
    panels: tuple[tuple[str, str, dict[str, tuple[str, str]]], ...] = (
        ("Loss", "loss", {"train/loss": ("training", ACCENT), "val/loss": ("validation", "#e58a1f")}),
        ("Parts of the training loss", "loss", parts),
        ("AP on validation images", "AP", {"val/map": ("AP", ACCENT), "val/map_50": ("AP50", "#9cc2f7")}),
    )
    for place, (title, unit, lines) in enumerate(panels, 1):
        axes = _style(figure.add_subplot(1, len(panels), place))
        for key, (name, colour) in lines.items():
            points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
            if not points:
                continue
            steps, values = np.array(points).T
            marker = "o" if len(points) < 40 else ""
            smooth = smoothed(values) if key.startswith("train/") else values
            if smooth is not values:
                axes.plot(steps, values, color=colour, lw=0.7, alpha=0.3)
            axes.plot(steps, smooth, color=colour, lw=1.6, label=name, marker=marker, ms=3)
        axes.set(xlabel="optimiser step", ylabel=unit, title=title, ylim=(0, None))
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return figure


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each value and its neighbours, a 25th of all on either side; fewer than 40 values as they are."""
    if len(values) < 40:
        return values
    reach = len(values) // 25
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return np.asarray((total[high] - total[low]) / (high - low))


def _text(name: str) -> str:
    """A name as it stands: matplotlib reads formulas between dollars and hides labels that start with an underscore."""
    return ("\u200a" if name.startswith("_") else "") + name.replace("$", r"\$")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, _style(figure.add_subplot())


def _style(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(color="#eef1f4", lw=0.8)
    axes.title.set(color=INK, fontsize=11)
    axes.set_axisbelow(True)
    return axes
