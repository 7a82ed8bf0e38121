"""An evaluation on disk: figures and detections as JSON, plots, and one HTML report that explains them."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from detection.batch import Id
from detection.data.spectral import Pixels
from detection.evaluation import confusion_table, gallery_looks, plots
from detection.evaluation.analysis import (
    Analysis,
    Mistake,
    analyse,
    confusion_matrix,
    error_breakdown,
    operating_points,
)
from detection.evaluation.calibration import calibration
from detection.evaluation.coco_eval import AREAS, evaluate
from detection.evaluation.coco_results import write_coco_results
from detection.evaluation.gallery import CONFIDENT, OUTLINE_SCORE, OUTLINED, SHOWN, Pictures, fragment, gallery, link
from detection.evaluation.mean_ap import MeanAP, mean_valid
from detection.evaluation.page import PAGE, SCRIPT, STYLE
from detection.evaluation.results import ImageResult

LoadImage = Callable[[ImageResult], Pixels]
PICTURES = "report_images"  # folder beside the report
WIDE_MATRIX = 6  # classes: a larger confusion matrix gets most of the width of the page

CONFUSION_NOTE = (
    f"Detections of score {CONFIDENT} and more against objects of any class at IoU .50. Colours are shares of the row "
    "over all classes; click a number for its boxes. "
)
CLASSES_NOTE = (
    "Click a column to sort, a class or its detections for the images. The last three are at the score of best F1 for "
    "the class."
)
MISTAKES_NOTE = (
    "Mistakes at IoU .50 (background below .10) after TIDE, and the points of AP50 that putting one kind right would "
    "add. They don't add up: one mistake hides another. Click a bar or a count for the images."
)
IMAGES_NOTE = (
    "All images, and in them the boxes that the filters select. Mistakes weigh the scores of wrong detections, and one "
    "for each object not found. Dashed boxes are objects; one whose right detection scores below the threshold counts "
    "as not found. Hover for names, click to enlarge. The address keeps the filters."
)
LEADS_NOTE = (
    'What can be asked next. Scores that are no chances of being right: see <a href="#calibration">calibration</a>.'
)
FOOTER = (
    "Figures by the COCO protocol: the best detections of each class and image, crowds ignored. A dash: there "
    "is no ground truth."
)


def write_evaluation(
    folder: Path,
    metric: MeanAP,
    category_ids: Sequence[Id | None],
    load_image: LoadImage | None = None,
    title: str = "Evaluation",
    facts: Mapping[str, str] | None = None,
    settings: str = "",
    leads: Sequence[tuple[str, str]] = (),
    beside: bool = False,
) -> dict[str, float]:
    """Compute, and write `figures.json`, `detections_bbox.json` (`_segm`, `_keypoints`), `plots/*.png`, `report.html`.

    The pictures are in the report; where it would be larger than 60 MB, in `report_images/`.

    Args:
        folder: made if absent; files of an earlier evaluation are replaced.
        metric: has seen all images of the split, in one process.
        category_ids: the evaluated file's id of each class, for the detections; None where it lacks the class.
        load_image: gives the pixels `(H, W, C)` of an image; without it the report has no pictures.
        title, facts: head of the report, e.g. `{"checkpoint": "best.ckpt", "split": "test"}`.
        settings: of the run, as text, to be unfolded below the head.
        leads: commands that lead on from here, and what each says.
        beside: put the pictures into `report_images/` in any case.

    Returns:
        the figures of `metric.compute`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = metric.compute()
    results, names = metric.results, metric.class_names
    for iou_type in metric.iou_type:
        write_coco_results(folder / f"detections_{iou_type}.json", results, category_ids, iou_type)
    summary = {"figures": figures, "per_class": metric.per_class(), "absent_detections": metric.absent_detections()}
    summary |= {"images": len(results), "facts": dict(facts or {})}
    judged = analyse(results, len(names))
    summary["mistakes"] = {
        row.name: {"count": row.count, "delta_ap50": row.delta_ap} for row in error_breakdown(judged)
    }
    found = calibration(judged)
    known = {"error": found.error, "temperature": found.temperature, "error_after": found.error_after}
    summary["calibration"] = {name: value for name, value in known.items() if not math.isnan(value)}
    (folder / "figures.json").write_text(json.dumps(summary, indent=2, allow_nan=False))
    shown = draw_plots(results, names, judged)
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in shown.items():
        figure.savefig(folder / "plots" / f"{name}.png", dpi=120)
    body = render(figures, results, names, judged, shown)
    pictures = Pictures(load_image, folder, PICTURES, beside)
    images = section("Images", _images_note(results, load_image), gallery(results, names, {"": judged}, pictures))
    page = _page(title, _head(results, judged, facts or {}), [body, _leads(leads), images, _settings(settings)])
    (folder / "report.html").write_text(page, encoding="utf-8")
    return figures


def draw_plots(results: Sequence[ImageResult], names: Sequence[str], judged: Analysis) -> dict[str, Figure]:
    """All figures of the report, by name."""
    curves = evaluate(results, len(names))
    size = {f"map_{area}": mean_valid(curves.precision[:, :, :, a, -1]) for a, area in enumerate(AREAS)}
    size |= {f"mar_{area}": mean_valid(curves.recall[:, :, a, -1]) for a, area in enumerate(AREAS)}
    return {
        "precision_recall": plots.precision_recall(curves, names),
        "mistakes": plots.mistakes(error_breakdown(judged)),
        "confusion": plots.confusion(confusion_matrix(judged, CONFIDENT), names),
        "scores": plots.score_histogram(judged),
        "sizes": plots.by_size(size),
        "reliability": plots.reliability(calibration(judged)),
    }


def render(
    figures: Mapping[str, float],
    results: Sequence[ImageResult],
    names: Sequence[str],
    judged: Analysis,
    shown: Mapping[str, Figure],
) -> str:
    """The sections of the report before its images, as HTML that loads nothing."""
    rows = error_breakdown(judged)
    pair = '<div class="pair">{}{}</div>'.format
    curve = section("Precision and recall", "Interpolated precision at IoU .50.", _plot(shown["precision_recall"]))
    scores = section("Scores", "What the detections of each score are (square-root scale).", _plot(shown["scores"]))
    matrix = confusion_table.table(confusion_matrix(judged, CONFIDENT), names)
    confused = section("Confusion", CONFUSION_NOTE + confusion_table.note(len(names)), matrix)
    size_bars = [fragment(size=size) for size in AREAS[1:]] * 2
    sizes = section(
        "Size of objects", "AP and AR by annotated area in pixels.", _linked(shown["sizes"], size_bars, "y")
    )
    reliable = section("Calibration", _calibration_note(judged), _plot(shown["reliability"]))
    bars = [fragment(mistake=row.name, score="0") for row in rows]
    costs = _linked(shown["mistakes"], bars, "x")
    body = [
        _tiles(figures),
        pair(curve, scores),
        section("What goes wrong", MISTAKES_NOTE, pair(f"<div>{costs}</div>", _mistakes(rows))),
        section("Classes", CLASSES_NOTE, _classes(results, names, judged)),
        pair(confused, sizes).replace("pair", "pair uneven") if len(names) > WIDE_MATRIX else pair(confused, sizes),
        reliable,
    ]
    return "\n".join(body)


def _page(title: str, head: Mapping[str, str], body: Sequence[str]) -> str:
    return PAGE.format(
        title=escape(title),
        facts=" &nbsp;·&nbsp; ".join(f"{escape(k)} <b>{escape(v)}</b>" for k, v in head.items()),
        style=STYLE + gallery_looks.STYLE,
        script=SCRIPT + gallery_looks.SCRIPT,
        body="\n".join(body),
        footer=FOOTER,
    )


def _head(results: Sequence[ImageResult], judged: Analysis, facts: Mapping[str, str]) -> dict[str, str]:
    crowds = int(judged.gt.crowd.sum())
    objects = f"{len(judged.gt.crowd)}{f' ({crowds} of them crowds, not judged)' if crowds else ''}"
    return {**facts, "images": str(len(results)), "objects": objects, "detections": str(len(judged.dt.label))}


def _images_note(results: Sequence[ImageResult], load_image: LoadImage | None) -> str:
    note = IMAGES_NOTE if load_image else f"The pictures are not at hand: boxes alone. {IMAGES_NOTE}"
    if results and results[0].gt_masks is None and results[0].gt_keypoints is not None:
        return f"{note} Crosses are key points, those of detections from a score of {OUTLINE_SCORE} on."
    if not results or results[0].gt_masks is None:
        return note
    if len(results) > OUTLINED:
        return f"{note} Of more than {OUTLINED} images masks are not drawn, but their boxes."
    return f"{note} Masks are outlined, those of detections from a score of {OUTLINE_SCORE} on; others are boxes."


def _leads(leads: Sequence[tuple[str, str]]) -> str:
    """The commands that lead on; none, and there is no section."""
    rows = [[(f"<code>{escape(command)}</code>", command), (escape(text), text)] for command, text in leads]
    if not rows:
        return ""
    return section(
        "What next", LEADS_NOTE, f'<div class="scroll">{table(("command", "it tells"), rows, text=(0, 1))}</div>'
    )


def _settings(settings: str) -> str:
    if not settings:
        return ""
    return f"<section><details><summary>Settings of the run</summary><pre>{escape(settings)}</pre></details></section>"


def _calibration_note(judged: Analysis) -> str:
    found = calibration(judged)
    if math.isnan(found.error):
        return "There are no detections."
    said = f"Expected calibration error {found.error:.3f}: the mean gap between score and share of right detections."
    if math.isnan(found.error_after):
        return said
    return (
        f"{said} A temperature of {found.temperature:.2f} fits these images best; fitted on one half of them "
        f"and measured on the other it leaves {found.error_after:.3f}."
    )


def _tiles(figures: Mapping[str, float]) -> str:
    keys = {"map": "AP", "map_50": "AP50", "map_75": "AP75"}
    keys |= {f"map_{area}": f"AP {area}" for area in AREAS[1:]}
    recall = [key for key in figures if key.removeprefix("bbox_").removeprefix("mar_").isdigit() and "mar_" in key]
    keys |= {recall[-1].removeprefix("bbox_"): f"AR at {recall[-1].split('_')[-1]}"} if recall else {}
    tiles = []
    for key, name in keys.items():
        value = figures.get(key, figures.get(f"bbox_{key}", -1.0))
        first, size = " first" if key == "map" else "", key.removeprefix("map_")
        inside = f"<b>{_number(value)}</b><span>{name}</span>"
        if size in AREAS:
            tiles.append(f'<a class="tile" href="{fragment(size=size)}">{inside}</a>')
        else:
            tiles.append(f'<div class="tile{first}">{inside}</div>')
    if "segm_map" in figures:
        tiles.append(f'<div class="tile"><b>{_number(figures["segm_map"])}</b><span>mask AP</span></div>')
    if "keypoints_map" in figures:
        tiles.append(f'<div class="tile"><b>{_number(figures["keypoints_map"])}</b><span>OKS AP</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _mistakes(rows: Sequence[Mistake]) -> str:
    cells = [
        (
            (f"{dot(SHOWN[row.name][1])}{link(row.name, mistake=row.name)}", row.name),
            (row.meaning, row.meaning),
            (link(str(row.count), mistake=row.name, score="0"), row.count),
            (f"{100 * row.delta_ap:+.1f}", row.delta_ap),
        )
        for row in rows
    ]
    return f'<div class="scroll">{table(("mistake", "meaning", "count", "dAP50"), cells, text=(0, 1))}</div>'


def _classes(results: Sequence[ImageResult], names: Sequence[str], judged: Analysis) -> str:
    precision = evaluate(results, len(names)).precision[:, :, :, 0, -1]
    points = operating_points(judged)
    rows = []
    for k, name in enumerate(names):
        objects = int((judged.gt.label[~judged.gt.crowd] == k + 1).sum())
        found = int((judged.dt.label == k + 1).sum())
        if not objects and not found:
            continue
        ap = mean_valid(precision[:, :, k])
        values = [ap, *(mean_valid(precision[t, :, k]) for t in (0, 5))]
        point = points.get(k + 1)
        values += [point.score, point.precision, point.recall] if point else [-1.0] * 3
        bar = f'<span class="bar" style="width:{max(ap, 0) * 5:.2f}rem"></span>'
        every = link(str(found), **{"class": name}, score="0")
        cells = [(link(name, **{"class": name}), name), (str(objects), objects), (every, found)]
        cells += [(_number(value), value if value > -1 else "") for value in values]
        cells[3] = (bar + cells[3][0], cells[3][1])
        rows.append(cells)
    heads = ("class", "objects", "detections", "AP", "AP50", "AP75", "at score", "precision", "recall")
    absent = len(names) - len(rows)
    tail = f'<p class="note">{absent} classes have neither objects nor detections here.</p>' if absent else ""
    return f'<div class="scroll">{table(heads, rows)}</div>{tail}'


def table(heads: Sequence[str], rows: Sequence[Sequence[tuple[str, Any]]], text: Sequence[int] = (0,)) -> str:
    """A sortable table of cells `(html, value to sort by)`."""
    css = [' class="text"' if i in text else "" for i in range(len(heads))]
    top = "".join(f'<th{c}><button type="button">{head}</button></th>' for head, c in zip(heads, css, strict=True))
    lines = [
        "".join(f'<td{c} data-value="{escape(str(v))}">{html}</td>' for (html, v), c in zip(row, css, strict=True))
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def section(title: str, note: str, content: str) -> str:
    """A card of the page, which `#title` leads to; note and content are HTML."""
    name = title.lower().replace(" ", "-")
    return f'<section id="{name}"><h2>{title}</h2><p class="note">{note}</p>{content}</section>'


def _plot(figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return f'<img class="plot" alt="" src="{_data("image/svg+xml", buffer.getvalue())}">'


def _linked(figure: Figure, links: Sequence[str], along: str) -> str:
    """A plot whose bars are links, each over the whole width (x) or height (y) of the axes."""
    image = _plot(figure)  # which also settles where everything is
    axes, width, height = figure.axes[0].get_window_extent(), figure.bbox.width, figure.bbox.height
    spots = []
    for bar, href in zip(figure.axes[0].patches, links, strict=False):
        box = bar.get_window_extent()
        left, right = (axes.x0, axes.x1) if along == "x" else (box.x0, box.x1)
        low, high = (axes.y0, axes.y1) if along == "y" else (box.y0, box.y1)
        place = {"left": left / width, "top": 1 - high / height, "width": (right - left) / width}
        style = "; ".join(f"{k}: {v:.2%}" for k, v in (place | {"height": (high - low) / height}).items())
        spots.append(f'<a href="{escape(href)}" style="{style}" aria-label="{escape(href[1:])}"></a>')
    return f'<div class="linked">{image}{"".join(spots)}</div>'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def dot(colour: str) -> str:
    """A patch of colour before a word."""
    return f'<span class="dot" style="--colour:{colour}"></span>'


def _number(value: float) -> str:
    return f"{value:.3f}" if value > -1 else "&ndash;"
