"""The comparison of two detectors on disk: JSON, and one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from detection.evaluation import gallery_looks
from detection.evaluation.coco_eval import AREAS
from detection.evaluation.gallery import SHOWN, Pictures, gallery, link
from detection.evaluation.page import PAGE, SCRIPT, STYLE
from detection.evaluation.report import LoadImage, dot, section, table
from detection.evaluation.results import ImageResult
from detection.evaluation.significance import LEVEL, POWER, Contrast, Difference

PICTURES = "comparison_images"  # folder beside the page
# What is no setting of a run
NO_SETTINGS = (
    *("config", "resume", "find", "print_config", "name", "output", "wandb_group"),
    *("trainer.logger", "trainer.callbacks"),
)
# Differences of 0 are drawn in the middle; right is better for A, except for mistakes.
OWN_STYLE = """
svg.whisker { display: inline-block; width: min(11rem, 30vw); height: 1.1rem; vertical-align: middle;
  overflow: visible; }
svg.whisker line { stroke: var(--soft); stroke-width: 1; }
svg.whisker .reach { stroke-width: 3; stroke-linecap: round; }
svg.whisker circle { fill: var(--soft); }
svg.whisker.decided .reach { stroke: var(--accent); }
svg.whisker.decided circle { fill: var(--accent); }
p.verdict { font-size: 1.15rem; margin: 1.1rem 0 0; }
td.wrap { white-space: normal; overflow-wrap: anywhere; text-align: left; }
"""
FIGURES_NOTE = (
    "Mean over the runs of each side. A bar is the interval of the difference; a coloured one leaves out zero. "
    "p: that chance of images and seeds gives such a difference; p images: of images alone, with these very weights, "
    "by permutation."
)
CLASSES_NOTE = (
    "AP of each class; click one for the images where the sides differ in it. Of many classes some differ by chance: p "
    "adjusted counts that in (Benjamini and Hochberg)."
)
MISTAKES_NOTE = (
    "How many of each kind at IoU .50, after TIDE; fewer is better. dAP50 is by how many points more AP50 the kind "
    "costs A."
)
SETTINGS_NOTE = "What is not the same on both sides; where the runs of a side differ, each value."
IMAGES_NOTE = (
    "The first run of each side beside each other. An image changed by how much lighter the mistakes that the filters "
    "select weigh on one side: scores of wrong detections, and one for each object not found. The sides differ where "
    "one alone finds an object, or their detections are not of the same kinds and classes. Dashed boxes are objects. "
    "Click to enlarge, then the space bar changes sides."
)
METHOD = (
    "The images were drawn {draws} times with replacement, the same for all runs, and all figures computed anew for "
    "each draw (bootstrap). A draw without an object of a class leaves that class out of its mean, as COCO does.",
    "The variance of a difference is <i>images + s² h</i>: s² is the variance of a figure between the runs of a side, "
    "pooled over both; h = 1 / runs of A + 1 / runs of B; images is the bootstrap's variance less the share of the "
    "runs in it. The interval is t times its root, with Satterthwaite's degrees of freedom.",
    "p images: the detections of an image change sides by chance, {draws} times; it is how often the difference is "
    "then as large. It is of these very weights, and knows nothing of other seeds.",
    "Seeds that would decide: the least n with difference² &ge; (1.96 + 0.84)² (images + 2 s² / n), so that "
    "{power:.0%} of such comparisons would find a difference as large as the one measured. Images that would: "
    "(1.96 + 0.84)² images / (difference² - (1.96 + 0.84)² s² h) times as many.",
)
SURE = f"{100 * LEVEL:.0f} %"
NAMES = {"map": "AP", "map_50": "AP50", "map_75": "AP75"} | {f"map_{area}": f"AP {area}" for area in AREAS[1:]}


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two detectors.

    Attributes:
        name: what to call it.
        runs: name of each run.
        results: of the first run, for the pictures.
        facts, settings: of each run.
        load_image: gives the pixels of an image, or None where the images are not at hand.
    """

    name: str
    runs: list[str]
    results: Sequence[ImageResult]
    facts: Sequence[Mapping[str, str]]
    settings: Sequence[Mapping[str, Any]]
    load_image: LoadImage | None


def write_comparison(
    folder: Path, found: Contrast, a: Side, b: Side, names: Sequence[str], draws: int, beside: bool = False
) -> None:
    """Write `comparison.json` and `comparison.html`; pictures beside it where it would be larger than 60 MB.

    Args:
        folder: made if absent.
        found: what was computed.
        a, b: the sides.
        names: C classes.
        draws: of the bootstrap.
        beside: put the pictures into `comparison_images/` in any case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    load = a.load_image or b.load_image
    layers = {f"A: {a.name}": found.judged_a, f"B: {b.name}": found.judged_b}
    images = gallery(a.results, names, layers, Pictures(load, folder, PICTURES, beside), found.change)
    said = verdict(found.figures[0], a.name, b.name)
    content = {
        "verdict": said,
        "compared": found.compared,
        "level": LEVEL,
        "draws": draws,
        "images": len(a.results),
        "a": {"name": a.name, "runs": a.runs, "facts": list(a.facts)},
        "b": {"name": b.name, "runs": b.runs, "facts": list(b.facts)},
        "figures": [_plain(row) for row in found.figures],
        "classes": [_plain(row) | {"p_adjusted": p} for row, p in zip(found.classes, found.adjusted, strict=True)],
        "mistakes": [_plain(row) | {"delta_ap50": found.delta_ap[row.name]} for row in found.mistakes],
        "settings": [{"name": name, "a": left, "b": right} for name, left, right in differing(a, b)],
        "images_changed": {
            str(a.results[i].image_id): round(float(found.change[i]), 4)
            for i in np.argsort(-np.abs(found.change), kind="stable")[:100]
        },
    }
    (folder / "comparison.json").write_text(json.dumps(content, indent=2, allow_nan=False))
    (folder / "comparison.html").write_text(_render(found, a, b, draws, said, images), encoding="utf-8")


def verdict(ap: Difference, a: str, b: str) -> str:
    """In words whether a figure differs, and if that is not known what would tell."""
    if math.isnan(ap.difference):
        return "There is no ground truth, so there is nothing to compare."
    interval = f"{ap.difference:+.4f} AP, {SURE} interval {ap.low:+.4f} to {ap.high:+.4f}"
    unknown = (
        " The interval is of the images alone: with one run on each side nothing is known of other seeds. Train two "
        "more of each to know."
    )
    one_run = unknown if math.isnan(ap.seed) else ""
    if ap.decided:
        better, worse = (a, b) if ap.difference > 0 else (b, a)
        return f"{better} is better than {worse} ({a} - {b}: {interval}).{one_run}"
    said = f"The difference is within noise ({a} - {b}: {interval})."
    return said + (one_run or f" {_what_would_decide(ap)}")


def _what_would_decide(ap: Difference) -> str:
    """How many seeds, or images, if the difference is what was measured."""
    seeds, images = ap.seeds_needed(), ap.images_needed()
    now = min(len(ap.a), len(ap.b))
    if ap.difference == 0 or (seeds == images == math.inf):
        return "Neither more seeds nor more images alone would decide: the difference is too small for both."
    if math.isfinite(seeds):
        more = max(1, int(seeds) - now)
        plural = "s" * (more > 1)
        return f"If it is what was measured, {more} more seed{plural} of each would decide ({int(seeds)} in all)."
    return f"No number of seeds would decide on these images: it takes {images:.1f} times as many images."


def shown_figures(found: Contrast) -> list[tuple[str, ...]]:
    """The rows of the table in the terminal; a figure without ground truth has dashes."""
    return [
        (
            NAMES.get(row.name, row.name.replace("mar_", "AR ")),
            *(_values(side) for side in (row.a, row.b)),
            _signed(row.difference, 3),
            "-" if math.isnan(row.low) else f"{row.low:+.3f} to {row.high:+.3f}",
            _chance(row.p),
            _chance(row.p_images),
        )
        for row in found.figures
    ]


def differing(a: Side, b: Side) -> list[tuple[str, str, str]]:
    """Name and value of each setting and fact that is not the same on both sides."""
    rows = []
    for left, right in ((a.settings, b.settings), (a.facts, b.facts)):
        for name in dict.fromkeys(key for run in (*left, *right) for key in run):
            if name.startswith(NO_SETTINGS) or name == "sha256":
                continue
            values = [_distinct(run.get(name, "not there") for run in runs) for runs in (left, right)]
            if values[0] != values[1] and all((left[0], right[0])):
                rows.append((name, ", ".join(values[0]), ", ".join(values[1])))
    return rows


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys("none" if value is None else str(value) for value in values))


def _render(found: Contrast, a: Side, b: Side, draws: int, said: str, images: str) -> str:
    first = found.figures[0]
    facts = {"A": f"{a.name} ({_runs(a)})", "B": f"{b.name} ({_runs(b)})", "images": str(len(a.results))}
    facts |= {"compared": found.compared, "draws": str(draws)}
    tiles = [(f"{np.mean(first.a):.3f}", f"AP of A, {a.name}"), (f"{np.mean(first.b):.3f}", f"AP of B, {b.name}")]
    tiles.append((_signed(first.difference, 3), f"A - B, {SURE} interval {first.low:+.3f} to {first.high:+.3f}"))
    tiles += [(_chance(first.p), "p"), (_chance(first.p_images), "p of images alone")]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{escape(text)}</span></div>' for value, text in tiles)
    settings = differing(a, b)
    of_boxes = "" if found.compared == "boxes" else f" Of the boxes, not of the {found.compared}."
    body = [
        f'<div class="tiles">{shown}</div>',
        section("Verdict", "", f'<p class="verdict">{escape(said)}</p>'),
        section("Figures", FIGURES_NOTE, _figures(found)),
        section("Classes", CLASSES_NOTE, _classes(found)),
        section("Mistakes", MISTAKES_NOTE + of_boxes, _mistakes(found)),
        section("What differs", SETTINGS_NOTE, _settings(settings)) if settings else "",
        section("Runs", "", _table_of_runs(a, b)),
        section("Images", IMAGES_NOTE + of_boxes, images),
        section("How it is computed", "", _method(first, draws)),
    ]
    return PAGE.format(
        title=escape(f"{a.name} against {b.name}"),
        facts=" &nbsp;·&nbsp; ".join(f"{escape(key)} <b>{escape(value)}</b>" for key, value in facts.items()),
        style=STYLE + gallery_looks.STYLE + OWN_STYLE,
        script=SCRIPT + gallery_looks.SCRIPT,
        body="\n".join(body),
        footer="Figures by the COCO protocol. A dash: there is no ground truth.",
    )


def _figures(found: Contrast) -> str:
    widest = _widest(found.figures)
    rows = [[(_figure(row.name), row.name), *_cells(row, widest), _p(row.p_images)] for row in found.figures]
    return _scroll(("figure", "A - B", "interval", "A", "B", "p", "p images"), rows)


def _figure(key: str) -> str:
    """Its name; of one size a link to the images with such objects."""
    name, size = NAMES.get(key, key.replace("mar_", "AR ")), key.rpartition("_")[2]
    return link(name, size=size, differ="1") if size in AREAS else escape(name)


def _classes(found: Contrast) -> str:
    widest = _widest(found.classes)
    rows = [
        [(link(row.name, **{"class": row.name}, differ="1"), row.name), *_cells(row, widest), _p(p)]
        for row, p in zip(found.classes, found.adjusted, strict=True)
    ]
    return _scroll(("class", "A - B", "interval", "A", "B", "p", "p adjusted"), rows)


def _mistakes(found: Contrast) -> str:
    widest = _widest(found.mistakes)
    rows = []
    for row in found.mistakes:
        cost = 100 * found.delta_ap[row.name]
        name = (f"{dot(SHOWN[row.name][1])}{link(row.name, mistake=row.name, differ='1')}", row.name)
        rows.append([name, *_cells(row, widest, 1), (f"{cost:+.1f}", cost)])
    return _scroll(("mistake", "A - B", "interval", "A", "B", "p", "dAP50"), rows)


def _cells(row: Difference, widest: float, digits: int = 3) -> list[tuple[str, Any]]:
    """The difference, its interval, both means and p, each with what it is sorted by."""
    a, b = float(np.mean(row.a)), float(np.mean(row.b))
    if math.isnan(row.difference):
        return [("&ndash;", "")] * 5
    spread = (_spread(row.a, digits), _spread(row.b, digits))
    means = [(f"{value:.{digits}f}{wide}", value) for value, wide in zip((a, b), spread, strict=True)]
    title = f"{row.low:+.{digits + 1}f} to {row.high:+.{digits + 1}f}"
    gap = (_signed(row.difference, digits), row.difference)
    return [gap, (_whisker(row, widest, title), row.low), *means, _p(row.p)]


def _whisker(row: Difference, widest: float, title: str) -> str:
    """The interval as a bar on a line, zero in the middle; in words for who can't see it."""
    if math.isnan(row.low) or not widest:
        return ""
    low, high, middle = (100 + 96 * value / widest for value in (row.low, row.high, row.difference))
    decided = " decided" if row.decided else ""
    return (
        f'<svg class="whisker{decided}" viewBox="0 0 200 20" preserveAspectRatio="none" role="img">'
        f'<title>{title}</title><line x1="100" y1="0" x2="100" y2="20"/>'
        f'<line class="reach" x1="{low:.1f}" y1="10" x2="{high:.1f}" y2="10"/>'
        f'<circle cx="{middle:.1f}" cy="10" r="5"/></svg>'
    )


def _settings(rows: Sequence[tuple[str, str, str]]) -> str:
    cells = [[(escape(text), text) for text in row] for row in rows]
    return _scroll(("setting", "A", "B"), cells, text=(0, 1, 2))


def _table_of_runs(a: Side, b: Side) -> str:
    keys = dict.fromkeys(key for side in (a, b) for facts in side.facts for key in facts)
    rows = []
    for letter, side in (("A", a), ("B", b)):
        for run, facts in zip(side.runs, side.facts, strict=True):
            values = [facts.get(key, "") if key != "sha256" else facts.get(key, "")[:12] for key in keys]
            rows.append([(escape(text), text) for text in (letter, run, *values)])
    return _scroll(("side", "run", *keys), rows, text=tuple(range(2 + len(keys))))


def _method(ap: Difference, draws: int) -> str:
    lines = [line.format(draws=draws, power=POWER) for line in METHOD]
    if not math.isnan(ap.seed):
        known = f"Of AP: images {math.sqrt(ap.images):.4f}, seeds {math.sqrt(ap.seed):.4f} (standard deviations)."
        lines.append(known)
    return "".join(f"<p>{line}</p>" for line in lines)


def _plain(row: Difference) -> dict[str, Any]:
    """A row as JSON has it: null in the place of NaN, "inf" of infinity."""
    values = asdict(row) | {"decided": row.decided, "seeds_needed": row.seeds_needed()}
    values |= {"images_needed": row.images_needed()}
    return {name: _finite(value) for name, value in values.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value


def _widest(rows: Sequence[Difference]) -> float:
    ends = [abs(end) for row in rows for end in (row.low, row.high) if not math.isnan(end)]
    return max(ends, default=0.0)


def _scroll(heads: Sequence[str], rows: Sequence[Sequence[tuple[str, Any]]], text: Sequence[int] = (0,)) -> str:
    return f'<div class="scroll">{table(heads, rows, text)}</div>'


def _runs(side: Side) -> str:
    return f"{len(side.runs)} run{'s' * (len(side.runs) != 1)}"


def _spread(values: Sequence[float], digits: int) -> str:
    """Standard deviation between the runs of a side."""
    return f" &plusmn; {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""


def _values(values: Sequence[float]) -> str:
    if math.isnan(values[0]):
        return "-"
    spread = f" ±{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _signed(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:+.{digits}f}"


def _chance(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _p(value: float) -> tuple[str, Any]:
    return ("&ndash;", "") if math.isnan(value) else (escape(_chance(value)), value)
