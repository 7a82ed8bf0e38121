"""torchmetrics' metric with either of its backends, behind our interface: what `MeanAP` is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.detection import MeanAveragePrecision

from detection.evaluation.coco_eval import AREAS, IOU_THRESHOLDS, RECALL_THRESHOLDS, xywh
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.results import ImageResult


class ReferenceMeanAP(MeanAP):
    """`MeanAP` whose matching and accumulating are done by others.

    Args:
        backend: of torchmetrics.
    """

    def __init__(self, *args: Any, backend: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.other = MeanAveragePrecision(
            iou_type=self.iou_type,
            # Its own come from a float32 linspace (0.6000000238...), which moves AP in the third digit.
            iou_thresholds=IOU_THRESHOLDS.tolist(),
            rec_thresholds=RECALL_THRESHOLDS.tolist(),
            max_detection_thresholds=self.max_detection_thresholds,
            backend=backend,  # type: ignore[arg-type]
            extended_summary=True,
            sync_on_compute=False,
        )
        self.other.warn_on_many_detections = False

    def _arrays(self, results: Sequence[ImageResult]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        self.other.reset()
        self._fill(results)
        answer = self.other.compute()
        arrays: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        for iou_type in self.iou_type:
            prefix = f"{iou_type}_" if len(self.iou_type) > 1 else ""
            shape = (10, 101, len(self.class_names), len(AREAS), len(self.max_detection_thresholds))
            precision, recall = np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
            if f"{prefix}precision" in answer:
                seen = np.atleast_1d(answer["classes"].numpy()) - 1
                precision[:, :, seen] = answer[f"{prefix}precision"].numpy()
                recall[:, seen] = answer[f"{prefix}recall"].numpy()
            arrays[iou_type] = precision, recall
        return arrays

    def _fill(self, results: Sequence[ImageResult]) -> None:
        """Its state lists hold boxes as xywh and masks as (size, counts)."""
        other = self.other
        other.detection_labels = [torch.from_numpy(r.labels) for r in results]
        other.detection_scores = [torch.from_numpy(r.scores) for r in results]
        other.groundtruth_labels = [torch.from_numpy(r.gt_labels) for r in results]
        other.groundtruth_crowds = [torch.from_numpy(r.gt_iscrowd.astype(np.int64)) for r in results]
        other.groundtruth_area = [torch.from_numpy(r.gt_areas) for r in results]
        if "bbox" in self.iou_type:
            other.detection_box = [torch.from_numpy(xywh(r.boxes)) for r in results]
            other.groundtruth_box = [torch.from_numpy(xywh(r.gt_boxes)) for r in results]
        if "segm" in self.iou_type:
            other.detection_mask = [_pairs(r.masks) for r in results]
            other.groundtruth_mask = [_pairs(r.gt_masks) for r in results]


def mean_ap(*args: Any, backend: str = "arrays", **options: Any) -> MeanAP:
    """Ours, or a reference."""
    return MeanAP(*args, **options) if backend == "arrays" else ReferenceMeanAP(*args, backend=backend, **options)


def _pairs(masks: list[dict[str, Any]] | None) -> Any:
    return tuple((tuple(mask["size"]), mask["counts"]) for mask in masks or ())
