"""The command `evaluate`: the figures of a checkpoint on the data it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, Literal

import lightning as L

from detection.cli.flags import chosen, run_command
from detection.cli.wording import check_ranges
from detection.data.datamodule import DetectionDataModule
from detection.data.images import read_image
from detection.data.records import DataError
from detection.evaluation.collect import CollectDetections
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.report import write_evaluation
from detection.training.module import DetectionModule
from detection.weights import readable


def evaluate(
    ckpt: Path,
    split: Literal["val", "test"] = "val",
    root: str | None = None,
    output: Path | None = None,
    batch_size: int | None = None,
    accelerator: str = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Write figures, COCO results JSON, plots and an HTML report; the figures are those that training logged.

    Args:
        ckpt: run's folder, or its checkpoint; model, classes and data settings come from it.
        split: split of that data; `test` must have been named in training.
        root: folder of the data, if it has moved.
        output: folder to write to; beside the checkpoint by default.
        batch_size: images a batch; that of training by default.
        accelerator: as of Lightning's trainer: cpu, gpu or auto.
        precision: likewise.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
    """
    check_ranges(batch_size=(batch_size, 1, inf))
    ckpt = chosen(ckpt)
    module = DetectionModule.load_from_checkpoint(ckpt, trust, map_location="cpu")
    changes: Any = {k: v for k, v in {"root": root, "batch_size": batch_size}.items() if v is not None}
    with readable(ckpt):
        data = DetectionDataModule.load_from_checkpoint(ckpt, trust, classes=module.class_names, **changes)
    if split == "test" and data.hparams["test_split"] is None:
        raise DataError(f"{ckpt}: the model was trained without naming a test split; use --split val")
    data.prepare_data()
    data.setup("validate" if split == "val" else "test")
    loader: Any = data.val_dataloader() if split == "val" else data.test_dataloader()
    metric = MeanAP(module.class_names, module.hparams["detections_per_img"], module.metric.iou_type)
    settings: dict[str, Any] = {"logger": False, "callbacks": [CollectDetections(metric)], "precision": precision}
    L.Trainer(accelerator=accelerator, devices=1, **settings).predict(module, loader, return_predictions=False)
    folder, home = output or ckpt.parent / f"evaluation_{split}", loader.dataset.root
    facts = {"checkpoint": ckpt.name, "data": home.name, "split": split, "precision": precision}
    figures = write_evaluation(folder, metric, data.category_ids, lambda r: read_image(home / r.file_name, r.size),
                               f"Evaluation of {ckpt.resolve().parent.name}", facts)  # fmt: skip
    for name, value in figures.items():
        print(f"{name:<12}{value:8.4f}")
    print(f"report: {folder / 'report.html'}")


def main(args: Sequence[str]) -> str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    return run_command("evaluate", evaluate, args, ValueError)
