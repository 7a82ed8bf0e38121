"""The page on what was measured on a GPU, made from `gpu.json` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COMMAND = "detection benchmark gpu --minutes 8"
NOTHING = f"""# On a GPU

**Nothing has been measured on a GPU yet.** `make gpu` (`{COMMAND}`) measures all of it in one command that stops by
itself, and makes this page from the `gpu.json` that it writes. On a machine without a GPU it is a rehearsal in tiny
sizes, whose figures mean nothing.
"""
HEADINGS = {
    "machine": ("The machine", ""),
    "parity": ("Parity with torchvision", "Same weights, same images, TF32 off. Losses relatively, boxes in pixels."),
    "waits": (
        "Where the host waits",
        "Operations of one step after which the host waits for the device, by function.",
    ),
    "training": ("Training step, R50-FPN, bf16", "Medians in turns. A ratio below 1: ours is faster."),
    "inference": ("Inference, R50-FPN, bf16", "Medians in turns. A ratio below 1: ours is faster."),
    "memory": ("Memory of a training step", "The most in MiB beside the weights, with gradients and momentum."),
    "limit": ("The limit", "The convolutions and products of matrices of our step alone."),
    "stages": ("Where the time goes", "By CUDA events; a stage inside another counts for itself alone."),
    "forms": ("Quick forms", "A ratio above 1: without the form a step takes that much longer."),
    "out_of_memory": ("Out of memory", ""),
    "tests": ("Tests marked `gpu`", ""),
    "fit": ("A real training", "From the command to its end, with validation."),
    "family": ("The family", "Medians in turns. A ratio below 1: ours is faster."),
    "loader": ("Loader", "Images a second. `waits`: the share of the time that the steps lose to the loader."),
    "compiled": ("With `torch.compile`", "Our dense parts; torchvision's backbone, RPN head and box head."),
}


def page(content: Mapping[str, Any] | None) -> str:
    """Markdown of what `gpu.json` holds; that nothing was measured where there is none.

    Args:
        content: of the file.
    """
    if content is None:
        return NOTHING
    parts = ["# On a GPU"]
    if content["rehearsal"]:
        parts.append("**A rehearsal on a CPU, in tiny sizes: its figures mean nothing.**")
    parts.append(f"Made from `gpu.json`, which `{COMMAND}` writes.")
    for name, section in content["sections"].items():
        heading, remark = HEADINGS.get(name, (name, ""))
        parts.append(f"## {heading}")
        if section["state"] != "done":
            why = str(section["why"]).splitlines()[0] if section["why"] else ""
            parts.append(f"**{section['state'].capitalize()}**{': ' + _cell(why) if why else ''}.")
        if remark and section["rows"]:
            parts.append(remark)
        if section["rows"]:
            parts.append(_table(section["rows"]))
        if any(row.get("batch", 0) != row.get("asked", row.get("batch", 0)) for row in section["rows"]):
            parts.append("Where `batch` is below `asked`, so many images did not fit into memory.")
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One column for each key of any row; a single row is laid on its side."""
    if len(rows) == 1:
        lines = [(name, value) for name, value in rows[0].items()]
        return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in lines)])
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = [f"| {' | '.join(map(_cell, columns))} |", "|---" * len(columns) + "|"]
    return "\n".join(head + [f"| {' | '.join(_cell(row.get(name, '')) for name in columns)} |" for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
