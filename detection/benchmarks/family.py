"""The family in one table: what proposals cost, what an image costs, and what it buys (R-CNN to Cascade R-CNN)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import nn

from detection.batch import Batch
from detection.data.datamodule import DetectionDataModule
from detection.data.dataset import collate
from detection.errors import SettingsError
from detection.models.precomputed import PrecomputedProposals
from detection.models.two_stage import FasterRCNN
from detection.training.module import DetectionModule

Row = dict[str, Any]


def measure_family(
    ckpts: Sequence[Path], root: Path | None = None, images: int = 10, rounds: int = 3, trust: Sequence[str] = ()
) -> list[Row]:
    """Time and score trained detectors, slowest first.

    Every image goes alone, from the batch's arrival to its detections; Selective Search runs on the spot, though
    training reads it from a cache. The detectors take turns on each image, and medians count. AP is that of the
    validation split the checkpoints were trained with.

    Args:
        ckpts: checkpoints of `detection fit`, all of one data set.
        root: folder of the data set, if it has moved.
        images: how many of the validation split are timed.
        rounds: how often.
        trust: packages whose parts the checkpoints may use besides this one's.

    Raises:
        SettingsError: the checkpoints are of different classes.
    """
    rows: list[Row] = []
    contenders: list[tuple[DetectionModule, DetectionDataModule]] = []
    for ckpt in ckpts:
        module = DetectionModule.load_from_checkpoint(ckpt, trust, map_location="cpu").eval()
        moved = {"root": str(root)} if root is not None else {}
        data = DetectionDataModule.load_from_checkpoint(ckpt, trust, classes=module.class_names, **moved)
        if rows and module.class_names != contenders[0][0].class_names:
            raise SettingsError(f"{ckpt} is of other classes than {ckpts[0]}: compare detectors of one data set")
        figures = _score(module, data)
        contenders.append((module, data))
        rows.append({"detector": _name(module), "proposals": _source(module.detector.rpn), **figures})
    for row, (proposing, whole) in zip(rows, _take_turns(contenders, images, rounds), strict=True):
        row |= {"proposals_ms": 1000 * proposing, "rest_ms": 1000 * (whole - proposing), "image_ms": 1000 * whole}
    fastest = min(row["image_ms"] for row in rows)
    return sorted((row | {"times": row["image_ms"] / fastest} for row in rows), key=lambda row: -row["image_ms"])


def _score(module: DetectionModule, data: DetectionDataModule) -> Row:
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    return {"AP": found["val/map"], "AP50": found["val/map_50"], "AP75": found["val/map_75"]}


def _name(module: DetectionModule) -> str:
    recipe = module.detector.recipe or {}
    return str(recipe.get("class_path", type(module.detector).__name__)).rpartition(".")[2]


def _source(proposals: nn.Module) -> str:
    return type(proposals.source).__name__ if isinstance(proposals, PrecomputedProposals) else "RPN"


def _take_turns(contenders: Sequence[tuple[DetectionModule, Any]], images: int, rounds: int) -> list[Any]:
    """Of each detector the median seconds that proposals and a whole image take."""
    times: list[list[tuple[float, float]]] = [[] for _ in contenders]
    datasets = [data.val_dataloader().dataset for _, data in contenders]
    chosen = torch.linspace(0, len(datasets[0]) - 1, min(images, len(datasets[0]))).long().unique().tolist()
    for _ in range(rounds):
        for i in chosen:
            for found, (module, _), dataset in zip(times, contenders, datasets, strict=True):
                batch = replace(collate([dataset[(i, 0)]]), proposals=None, proposals_valid=None)
                found.append(time_parts(module.detector, batch))
    return [(median(a for a, _ in found), median(b for _, b in found)) for found in times]


@torch.inference_mode()
def time_parts(detector: FasterRCNN, batch: Batch) -> tuple[float, float]:
    """Seconds that a detector in evaluation mode takes for the proposals of a batch, and for the whole of it.

    The network that finds proposals counts for them; the backbone, which an RPN shares, does not.
    """
    marks: list[float] = []
    rpn = detector.rpn
    handles = [
        rpn.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter())),
        rpn.register_forward_hook(lambda *_: marks.append(time.perf_counter())),
    ]
    started = time.perf_counter()
    detector.run(batch, with_losses=False, with_detections=True)
    whole = time.perf_counter() - started
    for handle in handles:
        handle.remove()
    return marks[1] - marks[0], whole
