"""What is left of a run's steps, to repeat one and to compare it with: checkpoints, and figures that were logged."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detection.training.checkpoints import progress

Figures = dict[str, float]  # by the names of `metrics.csv`
NOTED = ("train/loss", "train/grad_norm", "lr")  # beginnings of the names that are compared


class Saved(NamedTuple):
    """A checkpoint that a run can go on from: the optimiser steps it has done, and who trained it."""

    steps: int
    path: Path
    code: str
    world: int


def saved(run: Path) -> list[Saved]:
    """All whole checkpoints in a run's folder that have the state of a training, by their steps."""
    found = []
    for path in run.rglob("*.ckpt"):
        try:
            steps = progress(path)[1]
        except ValueError:  # weights alone, or damaged
            continue
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "resume" in content:
            world = int(content["resume"]["loader"]["world"])
            found.append(Saved(steps, path, str(content.get("code", "")), world))
    return sorted(found)


def read_rows(run: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv`, none where there is no such file."""
    path = run / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logged(run: Path, rank: int = 0) -> dict[int, Figures]:
    """What was logged of each step: in `metrics.csv`, and of a step that was not taken in `nonfinite.json`.

    Args:
        run: its folder.
        rank: whose figures are wanted. `metrics.csv` has the losses of the first alone; gradient and rate are those of
            all.
    """
    found: dict[int, Figures] = {}
    for row in read_rows(run):
        names = NOTED if rank == 0 else NOTED[1:]
        noted = {n: float(value) for n, value in row.items() if value and n.startswith(names)}
        if noted:
            found.setdefault(int(row["step"]), {}).update(noted)
    bad = run / "nonfinite.json"
    if bad.is_file():
        content = json.loads(bad.read_text())
        for own in (report for report in content["ranks"] if report["rank"] == rank):
            figures = {f"train/{n}": float(value) for n, value in own["parts"][-1]["losses"].items() if n != "loss"}
            found.setdefault(content["step"], figures | {"train/grad_norm": float(own["gradient_norm"])})
    return found


@dataclass(slots=True)
class Comparison:
    """Replayed figures beside those logged.

    Attributes:
        steps: logged steps that were compared.
        at: of the step itself, name -> replayed, logged, whether they have the same bits; empty if it was not logged.
        first: the first step that differs, if one does.
        largest: the largest relative difference, and its name.
    """

    steps: list[int] = field(default_factory=list)
    at: dict[str, tuple[float, float, bool]] = field(default_factory=dict)
    first: int | None = None
    largest: tuple[float, str] = (0.0, "")


def compare(replayed: Mapping[int, Mapping[str, Tensor]], known: Mapping[int, Figures], step: int) -> Comparison:
    """Set the figures of all repeated steps beside the logged ones, by those names that both have."""
    found = Comparison()
    for number in sorted(replayed.keys() & known.keys()):
        pairs = {n: (float(value), known[number][n]) for n, value in replayed[number].items() if n in known[number]}
        judged = {n: (*pair, _same(*pair)) for n, pair in pairs.items()}
        if not judged:
            continue
        found.steps.append(number)
        if number == step:
            found.at = judged
        for name, (ours, theirs, same) in judged.items():
            if not same:
                found.first = number if found.first is None else found.first
                away = abs(ours - theirs) / max(abs(theirs), 1e-12)
                found.largest = max(found.largest, (math.inf if math.isnan(away) else away, name))
    return found


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def verdict(found: Comparison, step: int, reasons: str) -> str:
    """In a sentence or two: bit-equal, or by how much not, and what may be why, see `reasons`."""
    before = [number for number in found.steps if number != step]
    if found.first is not None:
        away, name = found.largest
        return (
            f"step {step} is not drawn again exactly: the figures differ from step {found.first} on, at most by "
            f"{away:.2g} of what was logged ({name}). {reasons}"
        )
    steps = f"{len(before)} logged step{'s' * (len(before) != 1)} on the way"
    if found.at:
        return f"step {step} is drawn again bit for bit: its {len(found.at)} figures equal those logged" + (
            f", and so do those of {steps}" if before else ""
        )
    missing = f"step {step} itself was not logged (trainer.log_every_n_steps)"
    if not before:
        return f"{missing}, nor was any on the way: there is nothing to compare with"
    return f"{missing}; the figures of {steps} equal those logged, bit for bit"


def reasons(last: Saved | None, on_gpu: bool, facts: Mapping[str, Any]) -> str:
    """Why a step may come out otherwise today.

    Args:
        last: the newest checkpoint of the run.
        on_gpu: whether it was trained on one.
        facts: `code`, `world` and `device` of today.
    """
    found = []
    if last is not None and last.code != facts["code"]:
        found.append(f"It was trained by other code: {last.code or 'unknown'}, and this is {facts['code']}.")
    if last is not None and last.world != facts["world"]:
        found.append(f"It was trained by {last.world} processes, and these are {facts['world']}.")
    if on_gpu and facts["device"] == "cpu":
        found.append("It was trained on a GPU, and this is a CPU.")
    elif on_gpu:
        found.append("A GPU adds in any order, unless it was trained with --trainer.deterministic true.")
    return " ".join(found) or "Settings, data, PyTorch or the machine may be others than then."


def was_on_gpu(run: Path) -> bool:
    """Whether a run was trained on a GPU, whose memory it logs."""
    return any(row.get("memory/gpu_peak_gib") for row in read_rows(run))
