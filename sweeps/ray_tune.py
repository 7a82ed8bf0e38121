"""Learning rate, batch and weight decay on the blood cells, by Ray Tune: `python sweeps/ray_tune.py --data.root=BCCD`.

Flags are those of scripts/fit.py. Each trial is a run of its own in runs/tune, with one GPU where there are any.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

FIT = Path(__file__).resolve().parents[1] / "scripts" / "fit.py"
METRIC, TRIALS = "val/map", 20


def trial(draw: Mapping[str, Any], flags: Sequence[str], folder: Path) -> dict[str, float]:
    """Train once with what was drawn, in a process of its own; gives the best mAP.

    Args:
        draw: flag of scripts/fit.py without its dashes -> value.
        flags: the other flags.
        folder: that the flags are relative to; Ray moves each trial to another.
    """
    output = folder / "runs" / "tune" / uuid4().hex[:8]
    drawn = [f"--{name}={value}" for name, value in draw.items()]
    command = [sys.executable, str(FIT), "--config=bccd", *flags, *drawn, f"--output={output}"]
    subprocess.run(command, cwd=folder, check=True)
    (figures,) = output.glob("*/*/metrics.csv")
    with figures.open(newline="") as file:
        return {METRIC: max(float(row[METRIC]) for row in csv.DictReader(file) if row.get(METRIC))}


def main(flags: Sequence[str], trials: int = TRIALS) -> Mapping[str, Any]:
    """Search, on all machines of Ray's cluster or on this one; gives the best draw."""
    from ray import tune

    space = {
        "model.lr": tune.loguniform(0.0005, 0.02),
        "model.weight_decay": tune.choice([0.0001, 0.01, 0.05, 0.1]),
        "data.batch_size": tune.choice([2, 4, 8]),
    }
    needs = {"gpu": 1} if torch.cuda.is_available() else {"cpu": 1}
    run = tune.with_resources(partial(trial, flags=list(flags), folder=Path.cwd()), needs)
    settings = tune.TuneConfig(metric=METRIC, mode="max", num_samples=trials)
    best = tune.Tuner(run, param_space=space, tune_config=settings).fit().get_best_result()
    return dict(best.config or {})


if __name__ == "__main__":
    print("best:", main(sys.argv[1:]))
