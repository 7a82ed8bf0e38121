"""Any metrics of torchmetrics beside ours, fed in torchvision's form."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from detection.batch import Target
from detection.data import rle

log = logging.getLogger(__name__)
Plain = list[dict[str, Tensor]]


class OwnMetrics(nn.Module):
    """Metrics under the names of their classes; of several of one class, the second is called `Name_2`.

    Of several processes each metric merges its own states, in torchmetrics' way: images that a sampler has repeated, so
    that all processes have equally many, count twice there. `MeanAP` counts an image once.

    Args:
        metrics: updated with `(preds, target)`, see `plain`.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict()
        for metric in metrics:
            name = type(metric).__name__
            number = sum(known.partition("_")[0] == name for known in self.metrics) + 1
            self.metrics[name if number == 1 else f"{name}_{number}"] = metric
        self._skipped: set[str] = set()

    def __iter__(self) -> Iterator[Metric]:
        return iter(self.metrics.values())  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget all images."""
        for metric in self:
            metric.reset()

    def update(self, detections: Sequence[Mapping[str, Any]], targets: Sequence[Target]) -> None:
        """Add images; detections as `DetectionModule.predict_step` gives them."""
        if len(self.metrics):
            preds, target = plain(detections, targets)
            for metric in self:
                metric.update(preds, target)

    def compute(self) -> dict[str, float]:
        """`<name>/<key>` of each figure, `<name>` where a metric is one number; every process must call this.

        What is no single number is left out, with a warning once.
        """
        figures: dict[str, float] = {}
        for name, metric in self.metrics.items():
            found = metric.compute()  # type: ignore[operator]
            for key, value in found.items() if isinstance(found, Mapping) else [("", found)]:
                label = f"{name}/{key}" if key else name
                if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                    figures[label] = float(value)
                elif label not in self._skipped:
                    self._skipped.add(label)
                    log.warning("%s is no single number, so it is not logged", label)
        return figures


def plain(detections: Sequence[Mapping[str, Any]], targets: Sequence[Target]) -> tuple[Plain, Plain]:
    """Detections and ground truth of images in torchvision's form, in original pixels, on the detections' device.

    Returns:
        For each image `boxes` `(D, 4)`, `scores`, `labels` and, where there are masks, `masks` `(D, h, w)` bool; and
        `boxes` `(N, 4)`, `labels`, `iscrowd`, `area`, `image_id` and `masks`.
    """
    preds, truths = list[dict[str, Tensor]](), list[dict[str, Tensor]]()
    for detection, target in zip(detections, targets, strict=True):
        device = detection["boxes"].device
        found = {name: detection[name] for name in ("boxes", "scores", "labels")}
        truth = {"boxes": target.boxes, "labels": target.labels, "area": target.areas}
        truth |= {"iscrowd": target.iscrowd.long(), "image_id": torch.tensor(target.image_id)}
        if "masks" in detection:
            found["masks"] = _dense(detection["masks"], target.size).to(device)
        if target.masks is not None:
            truth["masks"] = _dense(target.masks, target.size)
        preds.append(found)
        truths.append({name: value.to(device) for name, value in truth.items()})
    return preds, truths


def _dense(masks: Sequence[dict[str, Any]], size: tuple[int, int]) -> Tensor:
    dense = [torch.from_numpy(rle.decode(mask)).bool() for mask in masks]
    return torch.stack(dense) if dense else torch.zeros((0, *size), dtype=torch.bool)
