"""Feeds a metric from Lightning's prediction loop, so that what was predicted is at hand afterwards."""

from __future__ import annotations

from typing import Any

import lightning as L

from detection.batch import Batch
from detection.evaluation.mean_ap import MeanAP


class CollectDetections(L.Callback):
    """Gives each predicted batch to a metric; use with `trainer.predict(..., return_predictions=False)`."""

    def __init__(self, metric: MeanAP) -> None:
        self.metric = metric

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *place: int
    ) -> None:
        self.metric.update(outputs, batch.targets)
