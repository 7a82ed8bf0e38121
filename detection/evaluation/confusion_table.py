"""The confusion matrix of the report: a table whose cells are links to their images."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from detection.evaluation.analysis import most_confused
from detection.evaluation.gallery import link

MOST_CLASSES = 100  # a table of more is too large for a page


def table(matrix: NDArray[np.int64], names: Sequence[str]) -> str:
    """The matrix `(C + 1, C + 1)` as HTML; shares are those of a row over all classes, shown or not."""
    count = len(names)
    shown = np.append(most_confused(matrix, MOST_CLASSES), count)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    heads = [*(escape(names[k]) for k in shown[:-1]), "undetected"]
    top = "".join(f"<th><span>{head}</span></th>" for head in heads)
    lines = []
    for i, head in zip(shown, [*heads[:-1], "background"], strict=True):
        cells = "".join(_cell(int(i), int(j), int(matrix[i, j]), float(share[i, j])) for j in shown)
        lines.append(f"<tr><th>{head}</th>{cells}</tr>")
    body = "".join(lines)
    return f'<div class="scroll"><table class="confusion"><tr><th>is / as</th>{top}</tr>{body}</table></div>'


def note(count: int) -> str:
    """Which classes the table has."""
    if count <= MOST_CLASSES:
        return "All classes are shown."
    return f"The {MOST_CLASSES} most confused of {count} classes are shown."


def _cell(i: int, j: int, count: int, share: float) -> str:
    if not count:
        return "<td></td>"
    style = "dark" if share > 0.55 else "light"
    button = link(str(count), cell=f"{i},{j}", score="0.5")
    return f'<td class="{style}" style="--share:{share:.3f}" title="{share:.0%} of the row">{button}</td>'
