"""Any metrics of torchmetrics beside ours, fed in torchvision's form."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torchmetrics import Metric

from detection.data import rle
from detection.evaluation.results import ImageResult

log = logging.getLogger(__name__)
Plain = dict[str, Tensor]


class OwnMetrics(nn.Module):
    """Metrics under the names of their classes; of several of one class, the second is called `Name_2`.

    They are updated at the end of an epoch, image by image in the order of the ids, with what `MeanAP` has gathered. So
    they see each image once, however many processes share them: torchmetrics' own merging would count those twice that
    a sampler repeats, and waits for ever where processes have seen unequally many.

    Args:
        metrics: each is called as `update([preds], [target])`, see `plain`.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict()
        for metric in metrics:
            name = type(metric).__name__
            number = sum(type(known) is type(metric) for known in self) + 1
            self.metrics[name if number == 1 else f"{name}_{number}"] = metric
            metric.distributed_available_fn = _alone
        self._skipped: set[str] = set()

    def check(self, with_masks: bool) -> None:
        """Give each metric a detection before a run does, hours later.

        Raises:
            ValueError: one does not take it.
        """
        boxes, labels = torch.tensor([[2.0, 2.0, 12.0, 10.0]]), torch.ones(1, dtype=torch.int64)
        found = {"boxes": boxes, "scores": torch.full((1,), 0.5), "labels": labels}
        truth = {"boxes": boxes, "labels": labels, "area": torch.full((1,), 80.0), "iscrowd": torch.zeros_like(labels)}
        truth["image_id"] = torch.tensor(1)
        if with_masks:
            found["masks"] = truth["masks"] = torch.ones((1, 16, 16), dtype=torch.bool)
        for name, metric in zip(self.metrics, self, strict=True):
            try:
                metric.update([_to(found, metric.device)], [_to(truth, metric.device)])
            except Exception as error:
                raise ValueError(
                    f"model.metrics: {name} does not take detections as torchmetrics.detection has them: "
                    f"{type(error).__name__}: {error}"
                ) from error
            metric.reset()

    def __iter__(self) -> Iterator[Metric]:
        return iter(self.metrics.values())  # type: ignore[arg-type]

    def compute(self, results: Sequence[ImageResult]) -> dict[str, float]:
        """`<name>/<key>` of each figure, `<name>` where a metric is one number; every process must call this.

        Args:
            results: all images, in the order of their ids; those of the first process count.

        Raises:
            RuntimeError: on the other processes, where a metric failed on the first.
        """
        if not len(self.metrics):
            return {}
        answer: list[Any] = [None, None]
        try:
            if not _is_shared() or dist.get_rank() == 0:
                answer[0] = self._figures(results)
        except Exception as error:
            answer[1] = f"{type(error).__name__}: {error}"
            raise
        finally:  # the other processes wait for an answer
            if _is_shared():
                dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise RuntimeError(f"a metric failed on rank 0: {answer[1]}")
        figures: dict[str, float] = answer[0]
        return figures

    def _figures(self, results: Sequence[ImageResult]) -> dict[str, float]:
        for metric in self:
            metric.reset()
        for result in results:
            preds, target = plain(result)
            for metric in self:
                metric.update([_to(preds, metric.device)], [_to(target, metric.device)])
        figures: dict[str, float] = {}
        for name, metric in zip(self.metrics, self, strict=True):
            found = metric.compute()
            for key, value in found.items() if isinstance(found, Mapping) else [("", found)]:
                label = f"{name}/{key}" if key else name
                if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                    figures[label] = float(value)
                elif label not in self._skipped:
                    self._skipped.add(label)
                    log.warning("%s is no single number, so it is not logged", label)
        return figures


def plain(result: ImageResult) -> tuple[Plain, Plain]:
    """Detections and ground truth of an image in torchvision's form, in original pixels.

    Returns:
        `boxes` `(D, 4)`, `scores`, `labels` and, where there are masks, `masks` `(D, h, w)` bool; and `boxes` `(N, 4)`,
        `labels`, `iscrowd`, `area`, `masks`, and `image_id` unless it is text or larger than a tensor can hold.
    """
    preds = {"boxes": result.boxes, "scores": result.scores, "labels": result.labels}
    found = {name: torch.from_numpy(value) for name, value in preds.items()}
    target = {"boxes": result.gt_boxes, "labels": result.gt_labels, "area": result.gt_areas}
    truth = {name: torch.from_numpy(value) for name, value in target.items()}
    truth["iscrowd"] = torch.from_numpy(result.gt_iscrowd).long()
    if isinstance(result.image_id, int) and abs(result.image_id) < 2**63:
        truth["image_id"] = torch.tensor(result.image_id)
    if result.masks is not None and result.gt_masks is not None:
        found["masks"], truth["masks"] = (_dense(masks, result.size) for masks in (result.masks, result.gt_masks))
    return found, truth


def _dense(masks: Sequence[dict[str, Any]], size: tuple[int, int]) -> Tensor:
    dense = [torch.from_numpy(rle.decode(mask)).bool() for mask in masks]
    return torch.stack(dense) if dense else torch.zeros((0, *size), dtype=torch.bool)


def _to(values: Plain, device: torch.device) -> Plain:
    return {name: value.to(device) for name, value in values.items()}


def _is_shared() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _alone() -> bool:
    """Tells torchmetrics that there is nothing to merge."""
    return False
