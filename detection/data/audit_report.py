"""Shows audits to a person: tables in the terminal and a picture sheet of samples with their boxes."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detection.data.audit import VERDICTS, Audit
from detection.data.images import read_image
from detection.data.records import DataError, Index, Record
from detection.data.spectral import PixelFormat, false_colour

COLOURS = {"broken": "red", "repairable": "yellow", "note": "cyan", "clean": "green"}
CELL, CAPTION = 360, 16  # pixels of a picture on the sheet and of the line below it


def print_audit(audit: Audit, console: Console, details: int = 3) -> None:
    """Print one split: verdict, defects by kind with the first `details` records that need a repair, what is in it."""
    verdict = VERDICTS[audit.code]
    console.rule(f"[bold]{escape(audit.name)}[/]: [{COLOURS[verdict]}]{verdict}[/]")
    _print_defects(audit, console, details)
    if audit.index is not None:
        _print_contents(audit.statistics, console)
        _print_channels(audit, console)
        _print_anchors(audit.anchors, console)


def _print_defects(audit: Audit, console: Console, details: int) -> None:
    if not audit.defects:
        console.print("No defect found.")
        return
    table = Table("severity", "count", "problem", "fix", "first", title="Defects", expand=True)
    for severity, kind, fix, count, first in audit.summary():
        alone = count == 1
        problem, fix = (first.problem, first.fix) if alone else (kind, fix)
        where = f"{first.file}: {first.record}"
        table.add_row(f"[{COLOURS[severity]}]{severity}[/]", str(count), *map(escape, (problem, fix, where)))
    console.print(table)
    serious = [defect for defect in audit.defects if defect.severity != "note"]
    for defect in serious[:details]:
        console.print(f"  {escape(str(defect))}", soft_wrap=True)
    if len(serious) > details:
        console.print(f"  ... and {len(serious) - details} more; --json lists every record")


def _print_contents(statistics: dict[str, Any], console: Console) -> None:
    plain = {name: value for name, value in statistics.items() if isinstance(value, int)}
    console.print(", ".join(f"{name}: [bold]{value}[/]" for name, value in plain.items()))
    table = Table("class", "objects", "images", title="Classes")
    for name, counts in sorted(statistics["classes"].items(), key=lambda item: -item[1]["objects"])[:30]:
        table.add_row(escape(name), str(counts["objects"]), str(counts["images"]))
    if len(statistics["classes"]) > 30:
        table.add_row(f"... {len(statistics['classes']) - 30} more", "", "")
    console.print(table)
    table = Table("", "min", "5 %", "median", "95 %", "max", title="Boxes, in pixels of the image file")
    for name, values in statistics["quantiles"].items():
        table.add_row(name, *(f"{value:g}" for value in values))
    console.print(table)
    areas = ", ".join(f"{name} {count}" for name, count in statistics["areas"].items())
    sizes = ", ".join(f"{size} ({count})" for size, count in statistics["image sizes"])
    console.print(f"Objects by area (small < 32 x 32 <= medium < 96 x 96 <= large): {areas}\nImage sizes: {sizes}")


def _print_channels(audit: Audit, console: Console) -> None:
    """Mean and standard deviation of each channel, as a configuration takes them."""
    if audit.channels:
        rows = [f"        {name}: {values}" for name, values in audit.channels.items()]
        form = [f"  channels: {audit.form.channels}", f"  depth: {audit.form.depth}"]
        console.print("Channels, which training measures by itself where they are not given:")
        lines = ["data:", *form, "model:", "  detector:", "    init_args:", *(row[2:] for row in rows)]
        console.print("\n".join(lines), soft_wrap=True, highlight=False)


def _print_anchors(anchors: dict[str, Any], console: Console) -> None:
    if not anchors:
        return
    table = Table("boxes", "count", "IoU .5", "IoU .7", title="Boxes that have an anchor (recall)")
    if "proposal" in anchors:
        table.add_column("proposed: IoU .5")
        table.add_column("IoU .7")
    for name, figures in anchors["recall"].items():
        shown = [figures, anchors["proposal_recall"][name]] if "proposal" in anchors else [figures]
        shares = [
            f"{grid[key]:.3f}" if grid["boxes"] else "-" for grid in shown for key in ("recall_0.5", "recall_0.7")
        ]
        table.add_row(name, str(figures["boxes"]), *shares)
    console.print(table)
    if "proposal" in anchors:
        better = anchors["proposal"]
        number = len(better["sizes"][0]) * len(better["ratios"])
        console.print(
            f"Anchors miss boxes. At min_size {better['min_size']} and max_size {better['max_size']}, {number} "
            f"anchors a cell cover them better: sizes {better['sizes']}, ratios {better['ratios']}. "
            "A larger min_size helps small objects too."
        )


def picture_sheet(audits: Sequence[Audit], path: Path, count: int = 12, columns: int = 4) -> None:
    """Draw samples with their boxes: first images with repaired records, then images spread over each split.

    Args:
        audits: those without an index are passed over.
        path: image file to write.
        count: pictures a split.
        columns: pictures a row.
    """
    cells = [
        cell
        for audit in audits
        if audit.index is not None
        for record in _samples(audit, audit.index, count)
        if (cell := _draw(audit.index, record, audit.form)) is not None
    ]
    if not cells:
        raise DataError(f"{path}: no picture can be drawn; there is no image that can be read")
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (min(columns, len(cells)) * CELL, sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            sheet.paste(cell, (j * CELL, sum(heights[:i])))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _samples(audit: Audit, index: Index, count: int) -> list[Record]:
    reported = {(d.file, d.record.split(",")[0]) for d in audit.defects if d.severity != "note"}
    stems = {Path(file).stem for file, _ in reported}
    numbers = {record for _, record in reported}
    first = [r for r in index.records if f"image {r.image_id}" in numbers or Path(r.file_name).stem in stems]
    first = first[: count // 2]
    drawn = {id(record) for record in first}
    rest = [record for record in index.records if id(record) not in drawn and len(record.boxes)]
    spread = np.linspace(0, len(rest) - 1, min(count - len(first), len(rest))).round().astype(int)
    return [*first, *(rest[i] for i in spread)]


def _draw(index: Index, record: Record, form: PixelFormat) -> Image.Image | None:
    """One cell of the sheet: the picture with its boxes and its name below; None where it can't be read."""
    try:
        pixels = read_image(index.root / record.file_name, (record.height, record.width), form=form)
    except DataError:
        return None  # the audit has reported it
    scale = min((CELL - 4) / record.width, (CELL - 4) / record.height)
    size = (max(1, round(record.width * scale)), max(1, round(record.height * scale)))
    cell = Image.new("RGB", (CELL, size[1] + 4 + CAPTION), "white")
    cell.paste(Image.fromarray(false_colour(pixels)).resize(size, Image.Resampling.BILINEAR), (2, 2))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(11)
    for box, label, crowd in zip(record.boxes, record.labels, record.iscrowd, strict=True):
        hue = colorsys.hsv_to_rgb(0.618034 * int(label) % 1, 0.6, 1)
        colour = (255, 255, 255) if crowd else tuple(round(255 * c) for c in hue)
        corners = (box * scale + 2).tolist()
        draw.rectangle(corners, outline=colour, width=1 if len(record.boxes) > 30 else 2)
        if len(record.boxes) <= 30:
            name = index.classes[label - 1] + (" (crowd)" if crowd else "")
            edge = draw.textbbox((corners[0], corners[1]), name, font)
            draw.rectangle(edge, fill=colour)
            draw.text((corners[0], corners[1]), name, "black", font)
    seen = np.zeros((0, 2)) if record.keypoints is None else record.keypoints[record.keypoints[..., 2] > 0][:, :2]
    for x, y in (seen * scale + 2).tolist():
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), "white", "black")
    caption = f"{record.file_name[-48:]}: {len(record.boxes)}"
    draw.text((3, size[1] + 3), caption, "black", font)
    return cell
