"""What a run's folder holds besides checkpoints and figures: `config.yaml` and `README.md`; and its removal."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from detection.training.changes import differences, shown
from detection.training.checkpoints import BEST, LAST

log = logging.getLogger(__name__)

CONFIG, README = "config.yaml", "README.md"
OF_THIS_CALL = ("config", "resume", "find", "print_config")  # no settings of the run


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder; what a run that goes on refuses leaves the old one.

    Args:
        folder: of the run.
        resumed: whether the run goes on: then it is written when training starts.
        **options: Lightning's.
    """

    def __init__(self, *args: Any, folder: Path, resumed: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.folder, self.resumed = folder, resumed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.resumed:
            self._save(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.resumed:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        config = self.config.clone()
        config.resume = None  # or `--config` with it would go on with this run, where it should begin another
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(config, str(self.folder / CONFIG), skip_unset=False, overwrite=True, multifile=False)


def say_changes(folder: Path, new: dict[str, Any]) -> None:
    """Log what differs from the `config.yaml` of a run that goes on; model and data are compared by its checkpoint."""
    try:
        old = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, yaml.YAMLError):
        return
    if not isinstance(old, dict):
        return
    own = {key: value for key, value in new.items() if key not in (*OF_THIS_CALL, "model", "data")}
    changes = [(name.removeprefix("."), was, now) for name, was, now in differences(old, own, "")]
    if changes:
        log.info("settings of the run changed from here on: %s", shown(changes))


def write_readme(folder: Path, packages: list[str], validated: bool, saved: bool) -> None:
    """Say what the folder is for.

    Args:
        folder: of the run.
        packages: to trust when its checkpoints are opened.
        validated: whether there is, or will be, a best checkpoint; else the last one is named.
        saved: whether there are checkpoints at all.
    """
    flag = f" --trust {' '.join(packages)}" if packages else ""
    trust = f", trust={packages}" if packages else ""
    text = INTRODUCTION + (USE if saved else "")
    checkpoint = BEST if validated else LAST
    (folder / README).write_text(text.format(folder=folder.as_posix(), file=checkpoint, flag=flag, trust=trust))


INTRODUCTION = """A training run: `config.yaml` repeats it; curves: `metrics.csv`, `plots`; pictures: `predictions.jpg`.
"""
USE = """
Go on with it:   detection fit --resume {folder}{flag}    (stopped by a signal: exit code 75)
Begin with its weights another:   detection fit --weights {folder}{flag}
Evaluate it:     detection evaluate --ckpt {folder}/{file}{flag}
Detect with it:  detection predict --ckpt {folder}/{file} --source IMAGES{flag}

    from detection import Detector

    detector = Detector.from_checkpoint("{folder}/{file}"{trust})
    detections = detector("photo.jpg")  # its boxes, class names and scores, in its pixels
"""


def never_validates(trainer: L.Trainer) -> str | None:
    """Why a run has no validation, as far as its settings tell; None where it has."""
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches is 0"
    if every is not None and epochs is not None and epochs > 0 and every > epochs:
        return f"trainer.check_val_every_n_epoch {every} is more than the run's {epochs} epochs"
    return None


def remove(folder: Path) -> None:
    """Take away the folder of a run that never trained, and that of its name where it is empty then."""
    shutil.rmtree(folder, ignore_errors=True)
    remove_empty(folder.parent)


def remove_empty(*folders: Path) -> None:
    """Take away folders in turn, up to the first that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
