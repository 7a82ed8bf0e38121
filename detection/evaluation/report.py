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

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from detection.batch import Id
from detection.data.spectral import Pixels, false_colour
from detection.evaluation import confusion_table, plots
from detection.evaluation.analysis import (
    MISTAKES,
    RIGHT,
    Analysis,
    Mistake,
    analyse,
    confusion_matrix,
    confusions,
    error_breakdown,
    operating_points,
    worst_images,
)
from detection.evaluation.calibration import calibration
from detection.evaluation.coco_eval import AREAS, evaluate
from detection.evaluation.coco_results import write_coco_results
from detection.evaluation.mean_ap import MeanAP, mean_valid
from detection.evaluation.page import PAGE, SCRIPT, STYLE
from detection.evaluation.results import ImageResult

LoadImage = Callable[[ImageResult], Pixels]
KINDS = {RIGHT: "right", **{kind: name for kind, (name, _) in MISTAKES.items()}}
SHOWN_SIDE = 720  # pixels of the longer side of a picture in the report
CONFIDENT = 0.5
WIDE_MATRIX = 6  # classes: a larger confusion matrix gets most of the width of the page
WORST, MOST_PICTURES = 12, 40  # pictures of the worst images; and with those that show each class and confusion

CONFUSION_NOTE = (
    f"Detections of score {CONFIDENT} and more against objects of any class at IoU .50. Colours are shares of the row "
    "over all classes; click a number for its images. "
)
CLASSES_NOTE = (
    "Click a column to sort, a class for its images. The last three are at the score of best F1 for the class."
)
MISTAKES_NOTE = (
    "Mistakes at IoU .50 (background below .10) after TIDE, and the points of AP50 that putting one kind right would "
    "add. They don't add up: one mistake hides another."
)
WORST_NOTE = (
    "Most mistakes first: scores of wrong detections, and one for each object not found. Dashed boxes are objects; one "
    "whose right detection scores below the threshold counts as not found. Hover for names, click to enlarge."
)
FOUND_COLOUR = "#8fa3b8"
FILTER = '<div id="filter" hidden><b></b> <button type="button">show the worst again</button><p class="note"></p></div>'
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
) -> dict[str, float]:
    """Compute, and write `figures.json`, `detections_bbox.json` (and `_segm`), `plots/*.png` and `report.html`.

    Args:
        folder: made if absent; files of an earlier evaluation are replaced.
        metric: has seen all images of the split, in one process.
        category_ids: the evaluated file's id of each class, for the detections; None where it lacks the class.
        load_image: gives the pixels `(H, W, C)` of an image; without it the report has no pictures.
        title, facts: head of the report, e.g. `{"checkpoint": "best.ckpt", "split": "test"}`.
        settings: of the run, as text, to be unfolded below the head.

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
    page = render(figures, results, names, judged, shown, load_image, title, facts or {}, settings)
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
    load_image: LoadImage | None,
    title: str,
    facts: Mapping[str, str],
    settings: str = "",
) -> str:
    """The report as one HTML text that loads nothing."""
    rows, crowds = error_breakdown(judged), int(judged.gt.crowd.sum())
    objects = f"{len(judged.gt.crowd)}{f' ({crowds} of them crowds, not judged)' if crowds else ''}"
    head = {**facts, "images": str(len(results)), "objects": objects, "detections": str(len(judged.dt.label))}
    pair = '<div class="pair">{}{}</div>'.format
    curve = section("Precision and recall", "Interpolated precision at IoU .50.", _plot(shown["precision_recall"]))
    scores = section("Scores", "What the detections of each score are (square-root scale).", _plot(shown["scores"]))
    matrix = confusion_table.table(confusion_matrix(judged, CONFIDENT), names)
    confused = section("Confusion", CONFUSION_NOTE + confusion_table.note(len(names)), matrix)
    sizes = section("Size of objects", "AP and AR by annotated area in pixels.", _plot(shown["sizes"]))
    reliable = section("Calibration", _calibration_note(judged), _plot(shown["reliability"]))
    body = [
        _tiles(figures),
        pair(curve, scores),
        section("What goes wrong", MISTAKES_NOTE, pair(f"<div>{_plot(shown['mistakes'])}</div>", _mistakes(rows))),
        section("Classes", CLASSES_NOTE, _classes(results, names, judged)),
        pair(confused, sizes).replace("pair", "pair uneven") if len(names) > WIDE_MATRIX else pair(confused, sizes),
        reliable,
        _gallery(results, names, judged, load_image),
        f"<section><details><summary>Settings of the run</summary><pre>{escape(settings)}</pre></details></section>"
        if settings
        else "",
    ]
    return PAGE.format(
        title=escape(title),
        facts=" &nbsp;·&nbsp; ".join(f"{escape(k)} <b>{escape(v)}</b>" for k, v in head.items()),
        style=STYLE,
        script=SCRIPT,
        body="\n".join(body),
        footer=FOOTER,
    )


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
        first = " first" if key == "map" else ""
        tiles.append(f'<div class="tile{first}"><b>{_number(value)}</b><span>{name}</span></div>')
    if "segm_map" in figures:
        tiles.append(f'<div class="tile"><b>{_number(figures["segm_map"])}</b><span>mask AP</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _mistakes(rows: Sequence[Mistake]) -> str:
    colours = {KINDS[kind]: plots.COLOURS[kind] for kind in MISTAKES} | {"missed": plots.MISSED}
    cells = [
        (
            (f"{dot(colours.get(row.name, plots.FAINT))}{row.name}", row.name),
            (row.meaning, row.meaning),
            (str(row.count), row.count),
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
        button = f'<button type="button" data-show="class" data-key="{k + 1}">{escape(name)}</button>'
        cells = [(button, name), (str(objects), objects), (str(found), found)]
        cells += [(_number(value), value if value > -1 else "") for value in values]
        cells[3] = (bar + cells[3][0], cells[3][1])
        rows.append(cells)
    heads = ("class", "objects", "detections", "AP", "AP50", "AP75", "at score", "precision", "recall")
    absent = len(names) - len(rows)
    tail = f'<p class="note">{absent} classes have neither objects nor detections here.</p>' if absent else ""
    return f'<div class="scroll">{table(heads, rows)}</div>{tail}'


def _gallery(
    results: Sequence[ImageResult], names: Sequence[str], judged: Analysis, load_image: LoadImage | None
) -> str:
    """The pictures; the controls; and which images show each class and each cell of the confusion matrix."""
    weights = dict(worst_images(judged, len(results)))
    ranked = [*weights, *(i for i in range(len(results)) if i not in weights)]
    index, classes = _index(judged, np.argsort(ranked))
    chosen = list(weights)[:WORST]
    for images in [*classes.values(), *index.values()]:  # an example of each, as far as there is room
        if len(chosen) < MOST_PICTURES and not set(images) & set(chosen):
            chosen.append(images[0])
    lists = {"class": classes, "cell": index}
    listed = {
        kind: {key: images[: confusion_table.MOST_IMAGES] for key, images in of.items()} for kind, of in lists.items()
    }
    counts = {kind: {key: len(images) for key, images in of.items()} for kind, of in lists.items()}
    files = {i: results[i].file_name for of in listed.values() for images in of.values() for i in images}
    heads = {"class": {key: names[int(key) - 1] for key in classes}, "cell": _cell_names(index, names)}
    facts = json.dumps({"images": listed, "counts": counts, "files": files, "names": heads}).replace("<", "\\u003c")
    data = f'<script type="application/json" id="shown">{facts}</script>'
    if load_image is None:
        return section(
            "Images", "The pictures are not at hand; a class or a number lists its images here.", FILTER + data
        )
    pictures = [
        picture(i, weights.get(i, 0.0), results[i], names, judged, load_image, extra=n >= WORST or i not in weights)
        for n, i in enumerate(chosen)
    ]
    gallery = f'{FILTER}{controls()}<div class="gallery">{"".join(pictures)}</div><dialog id="large"></dialog>{data}'
    return section("Worst images", WORST_NOTE, gallery)


def controls() -> str:
    """The slider of scores, and which kinds of boxes the pictures show."""
    kinds = [(KINDS[kind], plots.COLOURS[kind]) for kind in KINDS]
    kinds += [("object not found", plots.MISSED), ("found object", FOUND_COLOUR)]
    boxes = "".join(
        f'<label><input type="checkbox" data-kind="{name}"{"" if name == "found object" else " checked"}>'
        f"{dot(colour)}{name}</label>"
        for name, colour in kinds
    )
    return (
        f'<div class="controls"><label>score at least <input id="score" type="range" min="0" max="1" step="0.01" '
        f'value="0.3"> <output id="score-value">0.30</output></label>{boxes}</div>'
    )


def _index(judged: Analysis, rank: NDArray[np.int64]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The images of each cell of the confusion matrix, the largest mistakes first, and of each class; worst first."""
    cells = confusion_table.images_of(confusions(judged, CONFIDENT), rank)
    cells = dict(sorted(cells.items(), key=lambda item: -len(item[1])))
    confident = judged.dt.scores >= CONFIDENT
    labels = np.concatenate([judged.gt.label, judged.dt.label[confident]])
    images = np.concatenate([judged.gt.image, judged.dt.image[confident]])
    order = np.argsort(rank)
    classes = {str(k): order[np.unique(rank[images[labels == k]])].tolist() for k in np.unique(labels)}
    return cells, classes


def _cell_names(cells: Mapping[str, Sequence[int]], names: Sequence[str]) -> dict[str, str]:
    said = {}
    for key in cells:
        true, detected = map(int, key.split(","))
        is_, as_ = [*names, "background"][true], [*names, "undetected"][detected]
        said[key] = (
            f"{is_}, detected"
            if true == detected
            else f"{is_}, {'' if detected == len(names) else 'detected as '}{as_}"
        )
    return said


def picture(
    image: int,
    weight: float,
    result: ImageResult,
    names: Sequence[str],
    judged: Analysis,
    load_image: LoadImage,
    extra: bool = False,
) -> str:
    """An image of the results with its objects and detections; `extra` ones are shown when they are asked for."""
    rects = []
    score_of = dict(zip(judged.owner[judged.kind == RIGHT], judged.dt.scores[judged.kind == RIGHT], strict=True))
    for j in np.flatnonzero((judged.gt.image == image) & ~judged.gt.crowd):
        score = f' data-found="{score_of[j]:.4f}"' if judged.found[j] else ""
        name = names[judged.gt.label[j] - 1]
        rects.append(_rect(judged.gt.boxes[j], "object not found", plots.MISSED, name, "object", score))
    for i in np.flatnonzero(judged.dt.image == image):
        code = int(judged.kind[i])
        if code in KINDS:
            label = f"{names[judged.dt.label[i] - 1]} {judged.dt.scores[i]:.2f} ({KINDS[code]})"
            score = f' data-score="{judged.dt.scores[i]:.4f}"'
            rects.append(_rect(judged.dt.boxes[i], KINDS[code], plots.COLOURS[code], label, "found", score))
    pixels = false_colour(load_image(result))
    height, width = pixels.shape[:2]
    scale = min(1.0, SHOWN_SIDE / max(height, width))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    name, number = escape(result.file_name), escape(str(result.image_id))
    hidden = " hidden data-extra" if extra else ""
    return (
        f'<figure data-image="{image}"{hidden}><div class="frame" tabindex="0">'
        f'<img alt="{name}" src="{_data("image/jpeg", jpeg.tobytes())}">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(rects)}</svg></div>'
        f"<figcaption><b>{name}</b><br>image {number}, weight of mistakes {weight:.1f}</figcaption></figure>"
    )


def _rect(box: NDArray[np.float64], kind: str, colour: str, label: str, style: str, extra: str = "") -> str:
    x, y, w, h = (f"{value:.1f}" for value in box)
    return (
        f'<rect class="{style}" data-kind="{kind}"{extra} style="--colour:{colour}" x="{x}" y="{y}" width="{w}" '
        f'height="{h}"><title>{escape(label)}</title></rect>'
    )


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
    """A card of the page; note and content are HTML."""
    return f'<section><h2>{title}</h2><p class="note">{note}</p>{content}</section>'


def _plot(figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return f'<img class="plot" alt="" src="{_data("image/svg+xml", buffer.getvalue())}">'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def dot(colour: str) -> str:
    """A patch of colour before a word."""
    return f'<span class="dot" style="--colour:{colour}"></span>'


def _number(value: float) -> str:
    return f"{value:.3f}" if value > -1 else "&ndash;"
