"""The table of an ablation as a paper prints it, in Markdown, LaTeX and JSON, and where its cells come from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detection.evaluation.comparison_page import NAMES, SURE
from detection.evaluation.significance import Difference

FIGURES = tuple(NAMES)  # the six APs; the first is that of the difference
AP = FIGURES[0]
MINUS = "\N{MINUS SIGN}"
LEGEND = (
    "AP of {} in points, mean ± standard deviation over the seeds. Difference: AP less that of the base, with its "
    f"{SURE} interval over images and seeds (of images alone with one seed each); bold where the interval leaves out "
    "zero. A dash: there is nothing to compute it from."
)


@dataclass(frozen=True, slots=True)
class Row:
    """The base, or a swap.

    Attributes:
        name: of the row.
        settings: the flags in which it differs from the base.
        runs: of each finished run where its figures come from: folder, seed, commit, checksums.
        figures: of each finished run, by name; NaN where there is no ground truth for it.
        difference: of AP to the base; None where there is nothing to compare.
        remarks: on runs that failed, were left out, or could not be compared.
    """

    name: str
    settings: str
    runs: Sequence[Mapping[str, str]] = ()
    figures: Sequence[Mapping[str, float]] = ()
    difference: Difference | None = None
    remarks: Sequence[str] = field(default_factory=list)

    def values(self, figure: str) -> list[float]:
        """A figure of each run."""
        return [run[figure] for run in self.figures]


def write_table(folder: Path, rows: Sequence[Row], base: str, compared: str) -> None:
    """Write `table.md`, `table.tex` and `table.json`.

    Args:
        folder: of the plan.
        rows: the base first.
        base: what the base is, its configuration and flags.
        compared: what the figures are of: boxes, masks or key points.
    """
    (folder / "table.md").write_text(markdown(rows, base, compared), encoding="utf-8")
    (folder / "table.tex").write_text(latex(rows, base, compared), encoding="utf-8")
    content = {"base": base, "compared": compared, "rows": [_plain(row) for row in rows]}
    (folder / "table.json").write_text(json.dumps(content, indent=2, allow_nan=False))


def markdown(rows: Sequence[Row], base: str, compared: str) -> str:
    """The table, what was left out, and a second table with the runs that the cells of a row are the mean of."""
    heads = ["", *NAMES.values(), "difference", "p", "seeds"]
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for row in rows:
        gap = _gap(row.difference)
        gap = f"**{gap}**" if row.difference is not None and row.difference.decided else gap
        cells = [_mean(row.values(name)) for name in FIGURES]
        lines.append(_line([_in_cell(row.name), *cells, gap, _chance(row.difference), str(len(row.runs))]))
    lines += ["", LEGEND.format(compared), ""]
    lines += [f"- {row.name}: {remark}" for row in rows for remark in row.remarks]
    keys = list(dict.fromkeys(key for row in rows for run in row.runs for key in run))
    lines += ["", f"Base: `{base}`", *(f"{row.name}: `{row.settings}`" for row in rows if row.settings), ""]
    lines = [f"{line}  " if line.endswith("`") else line for line in lines]  # a break within a paragraph
    lines += ["Where the cells come from: those of a row are the mean of its runs.", ""]
    lines += [_line(["row", *keys]), _line(["---"] * (len(keys) + 1))]
    for row in rows:
        lines += [_line([_in_cell(row.name), *(_in_cell(_short(k, run.get(k, ""))) for k in keys)]) for run in row.runs]
    return "\n".join(lines) + "\n"


def latex(rows: Sequence[Row], base: str, compared: str) -> str:
    """The table with the rules of `booktabs`; where its cells come from stands in comments."""
    heads = ["", *(re.sub(r"^AP ?(\w+)$", r"AP$_{\\text{\1}}$", name) for name in NAMES.values()), "difference", "$p$"]
    lines = [r"% needs \usepackage{booktabs,amsmath}", f"% base: {_comment(base)}", f"% AP of {compared}"]
    for row in rows:
        lines += [f"% {row.name}: {_comment(row.settings)}"] if row.settings else []
        lines += [
            f"% {row.name}: {_comment(', '.join(f'{key} {_short(key, run[key])}' for key in run))}" for run in row.runs
        ]
        lines += [f"% {row.name}: {_comment(remark)}" for remark in row.remarks]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", " & ".join(heads) + r" \\", r"\midrule"]
    for row in rows:
        gap = _gap(row.difference).replace(MINUS, "$-$").replace("+", "$+$")
        gap = rf"\textbf{{{gap}}}" if row.difference is not None and row.difference.decided else gap
        cells = [_mean(row.values(name)).replace("±", r"$\pm$") for name in FIGURES]
        chance = _chance(row.difference).replace("<", "$<$")
        lines.append(" & ".join([_escaped(row.name), *cells, gap, chance]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON has it: each cell with the runs that it is the mean of; null in the place of NaN."""
    cells, gap = {}, row.difference
    for name in FIGURES:
        values = row.values(name)
        known = bool(values) and not math.isnan(values[0])
        of = [dict(run) | {"value": own if known else None} for run, own in zip(row.runs, values, strict=True)]
        mean = float(np.mean(values)) if known else None
        spread = float(np.std(values, ddof=1)) if known and len(values) > 1 else None
        cells[name] = {"mean": mean, "sd": spread, "of": of}
    difference = None
    if gap is not None and not math.isnan(gap.low):
        difference = {"points": gap.difference, "low": gap.low, "high": gap.high, "p": gap.p, "decided": gap.decided}
    return {"name": row.name, "settings": row.settings, "cells": cells, "difference": difference} | {
        "remarks": list(row.remarks)
    }


def _mean(values: Sequence[float]) -> str:
    if not values or math.isnan(values[0]):
        return "-"
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def _gap(gap: Difference | None) -> str:
    if gap is None or math.isnan(gap.low):
        return "-"
    value, low, high = (f"{100 * number:+.1f}".replace("-", MINUS) for number in (gap.difference, gap.low, gap.high))
    return f"{value} [{low}, {high}]"


def _chance(gap: Difference | None) -> str:
    if gap is None or math.isnan(gap.p):
        return "-"
    return "< 0.001" if gap.p < 0.001 else f"{gap.p:.3f}"


def _short(key: str, value: str) -> str:
    return value[:12] if key in ("checkpoint", "data", "config") else value


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _in_cell(text: str) -> str:
    return text.replace("|", r"\|")


def _comment(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(names.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
