"""Figures that callbacks watch: one that will never be logged is an error at the start, and not epochs later."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from detection.errors import SettingsError
from detection.evaluation.mean_ap import MeanAP

LOSSES = ("loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
WATCHED = (
    "images/s",
    "time/data",
    "data/dropped_boxes",
    "data/unreadable",
    "lr",
    "train/grad_norm",
    "memory/process_gib",
)


def known_figures(class_names: Sequence[str], iou_type: Any, masks: bool) -> list[str]:
    """Names of what every run logs; cascades, parts with rates of their own, and own metrics log more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are no images yet, as torchmetrics remarks
        figures = MeanAP(class_names, 100, iou_type).compute()
    losses = [*LOSSES, *(["loss_mask"] if masks else []), *(["loss_keypoint"] if "keypoints" in iou_type else [])]
    names = [*(name.removeprefix("bbox_") for name in figures), *losses, *(f"ap/{name}" for name in class_names)]
    names += [f"proposals_ar_{limit}" for limit in (100, 300, 1000)]
    return [*(f"val/{name}" for name in names), *(f"train/{name}" for name in losses), *WATCHED]


def check_monitors(trainer: L.Trainer, known: Sequence[str]) -> None:
    """Refuse a callback that waits for a figure which looks like a misspelt one, or that no validation brings.

    A name unlike all of them may be the user's own figure, of which nothing is known here.

    Raises:
        SettingsError: with the nearest name.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = getattr(callback, "monitor", None)
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or not isinstance(name, str):
            continue
        kind = type(callback).__name__
        if isinstance(callback, EarlyStopping) and name.startswith("val") and trainer.limit_val_batches == 0:
            raise SettingsError(f"{kind} watches {name}, but trainer.limit_val_batches is 0: it is never logged")
        if name in known or name.startswith(("train/loss_", "val/loss_", "lr/")) or _is_of_own_metric(name):
            continue
        near = get_close_matches(name, known, 1, 0.6) or get_close_matches(f"val/{name}", known, 1, 0.6)
        if near:
            raise SettingsError(f"{kind} watches {name}, which this run does not log (did you mean {near[0]}?)")


def _is_of_own_metric(name: str) -> bool:
    """`val/<metric>/<key>`, see `OwnMetrics`."""
    return name.count("/") > 1 and not name.startswith("val/ap/")
