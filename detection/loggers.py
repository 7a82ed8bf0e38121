"""Where figures go: `metrics.csv` in the run's folder, and W&B where wanted."""

from __future__ import annotations

import csv
import logging
import netrc
import os
import re
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger

log = logging.getLogger(__name__)

WandbMode = Literal["off", "auto", "online", "offline"]


class MetricsFile(CSVLogger):
    """`metrics.csv`, which a resumed run continues (Lightning's logger would delete it)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=20)

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: `config.yaml` has them."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer; made with the earlier rows out of its reach."""
        if self._experiment is not None:
            return self._experiment
        path = Path(self.log_dir) / "metrics.csv"
        aside = path.with_suffix(".earlier")
        if path.is_file():
            path.replace(aside)
        writer = super().experiment
        if aside.is_file():
            aside.replace(path)
            with path.open(newline="") as file:
                writer.metrics_keys = list(csv.DictReader(file).fieldnames or [])
        return writer


def wandb_logger(mode: WandbMode, folder: Path) -> WandbLogger:
    """A W&B run that never asks for a key and is the same run again when resumed.

    Args:
        mode: `online`, `offline`, or `auto`: online when a key is known, else offline.
        folder: of the run; its name identifies the run, its files go there.
    """
    offline = mode == "offline" or (mode == "auto" and not logged_in())
    if mode == "auto" and offline:
        log.info("W&B: not logged in, so offline; send the run later with: wandb sync %s/wandb/offline-run-*", folder)
    return WandbLogger(
        project="detection",
        name=f"{folder.parent.name}/{folder.name}",
        id=re.sub(r"\W+", "-", f"{folder.parent.name}-{folder.name}"),
        save_dir=str(folder),
        offline=offline,
        resume="allow",
    )


def logged_in() -> bool:
    """Whether W&B would find a key without asking."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
