"""COCO mean average precision for one process or many.

Results are keyed by image id and kept on the CPU; processes merge by one object gather, without the images that a
sampler repeated as padding; all figures, per-class AP too, come in double precision from one precision array; and what
would silently give a wrong number (NaN, an unknown label, -1) is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torchmetrics import Metric

from detection.batch import Id, Target
from detection.data.skeletons import Skeleton, numbered
from detection.evaluation import oks
from detection.evaluation.coco_eval import AREA_LIMITS, AREAS, evaluate
from detection.evaluation.results import ImageResult, image_result

IouType = Literal["bbox", "segm", "keypoints"]
FREQUENCIES = {"r": "map_rare", "c": "map_common", "f": "map_frequent"}


class MeanAP(Metric):
    """The twelve COCO figures and AP by class over everything seen since `reset`, the same on every rank.

    Args:
        class_names: foreground classes; label `i` is `class_names[i - 1]`.
        detections_per_img: how many detections of an image and class count (COCO's largest `maxDets`). The figures
            are at this limit, and the last recall key is named after it: `mar_100`.
        iou_type: `"bbox"`, `"segm"`, `"keypoints"`, or several, in which case keys start with `bbox_`, `segm_` or
            `keypoints_`. Of key points there are COCO's ten figures, at most 20 detections of a class and image, with
            `mar`, `mar_50` and `mar_75` in the place of limits.
        frequencies: `"r"`, `"c"` or `"f"` for each class, as LVIS has them, for three figures more: `map_rare`,
            `map_common` and `map_frequent`.
        skeleton: of the key points, whose sigmas OKS takes; None takes the default for as many as there are.

    Images that say which classes were looked for are evaluated as LVIS does (Gupta et al. 2019, section 3.3):
    detections of other classes are dropped, those of classes that are not annotated in full are ignored where they
    match nothing, and `detections_per_img` limits all classes of an image together.
    VOC's `difficult` means nothing to COCO: such objects count like any other here (see `voc.py` for VOC's own AP).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    def __init__(
        self,
        class_names: Sequence[str],
        detections_per_img: int = 100,
        iou_type: IouType | tuple[IouType, ...] = "bbox",
        frequencies: Sequence[str] | None = None,
        skeleton: Skeleton | None = None,
    ) -> None:
        if detections_per_img < 1:
            raise ValueError(f"detections_per_img is {detections_per_img}; it must be at least 1")
        super().__init__(sync_on_compute=False)  # `compute` merges by itself: torchmetrics sends tensors alone
        self.class_names = list(class_names)
        self.frequencies, self.skeleton = frequencies, skeleton
        self.iou_type: tuple[IouType, ...] = (iou_type,) if isinstance(iou_type, str) else tuple(iou_type)
        self.max_detection_thresholds = [1, min(10, detections_per_img), detections_per_img]
        self._clear()

    def _clear(self) -> None:
        self._results: dict[Id, ImageResult] = {}
        self._class_ap: dict[str, dict[str, float]] = {}
        self._absent: dict[str, int] = {}

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._clear()

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not there: the figures of one batch mean nothing."""
        raise NotImplementedError("MeanAP has no figures of one batch: call update for each batch, then compute")

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        # State stays on the CPU, wherever the module that owns the metric moves.
        return self

    @property
    def results(self) -> list[ImageResult]:
        """Every image seen, by image id; after `compute`, rank 0 holds those of all ranks."""
        order = sorted(self._results, key=lambda image_id: (isinstance(image_id, str), image_id))
        return [self._results[image_id] for image_id in order]

    def update(  # type: ignore[override]
        self, detections: Sequence[dict[str, Tensor]], targets: Sequence[Target], results: Iterable[ImageResult] = ()
    ) -> None:
        """Add images.

        Args:
            detections: for each image `boxes (D, 4)` xyxy in original pixels, `labels (D,)` in `[1, C]`,
                `scores (D,)`, for `segm` masks as `encode_masks` takes them, and `keypoints (D, k, 3)` for key points.
            targets: ground truth of the same images, in the same order.
            results: images that are checked already, e.g. from files.

        Raises:
            ValueError: as `image_result` raises, or two different images with one id.
        """
        if len(detections) != len(targets):
            raise ValueError(f"{len(detections)} detections for {len(targets)} targets; pass one of each an image")
        masks, points = ("segm" in self.iou_type, "keypoints" in self.iou_type)
        limit = self.max_detection_thresholds[-1]
        self._add(
            image_result(detection, target, len(self.class_names), masks, limit, points)
            for detection, target in zip(detections, targets, strict=True)
        )
        self._add(results)

    def _add(self, results: Iterable[ImageResult]) -> None:
        for result in results:
            first = self._results.setdefault(result.image_id, result)
            # The same image again is a sampler's padding and counts once; another image under its id is a mistake.
            if first.file_name != result.file_name:
                raise ValueError(f"image id {result.image_id} is both {first.file_name} and {result.file_name}")

    def compute(self) -> dict[str, float]:
        """The twelve COCO figures: `map, map_50, map_75, map_small|medium|large, mar_1, mar_10, mar_100, mar_small...`.

        Of key points the ten: `map, map_50, map_75, map_medium|large` and `mar, mar_50, mar_75, mar_medium|large`.
        -1 means what it means in COCO: no ground truth (of that size). Every rank must call this; rank 0 evaluates.

        Raises:
            RuntimeError: on every rank, where rank 0 failed or an aggregate is -1 although there is ground truth.
        """
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not distributed:
            figures, self._class_ap, self._absent = self._evaluate()
            return figures
        leader = dist.get_rank() == 0
        shards: list[Any] | None = [None] * dist.get_world_size() if leader else None
        dist.gather_object(list(self._results.values()), shards, dst=0)
        answer: list[Any] = [None, None]
        if leader:
            try:
                for shard in (shards or [])[1:]:
                    self._add(shard)
                answer = [self._evaluate(), None]
            except (ValueError, RuntimeError) as error:  # the other ranks wait for an answer: this is theirs
                answer = [None, str(error)]
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise RuntimeError(f"evaluation failed on rank 0: {answer[1]}")
        figures, self._class_ap, self._absent = answer[0]
        return figures

    def per_class(self, iou_type: IouType | None = None) -> dict[str, float]:
        """AP of each class that has ground truth, from the arrays of the last `compute`."""
        return dict(self._class_ap.get(iou_type or self.iou_type[0], {}))

    def objects_per_class(self) -> dict[str, int]:
        """Objects of each class that this process has seen; no crowds."""
        labels = _concat([r.gt_labels[~r.gt_iscrowd] for r in self.results])
        counts = np.bincount(labels, minlength=len(self.class_names) + 1)
        return dict(zip(self.class_names, counts[1:].tolist(), strict=True))

    def absent_detections(self) -> dict[str, int]:
        """Detections on classes that have no ground truth: COCO's mean leaves them out, so they cost nothing."""
        return dict(self._absent)

    def _evaluate(self) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[str, int]]:
        results = self.results
        figures: dict[str, float] = {}
        class_ap: dict[str, dict[str, float]] = {}
        arrays = self._arrays(results)
        for iou_type in self.iou_type:
            precision, recall = arrays[iou_type]
            counts = self.object_counts(iou_type)
            if iou_type == "keypoints":
                summary = oks.figures(precision, recall, mean_valid)
            else:
                summary = summarize(precision, recall, self.max_detection_thresholds)
            for name, value in summary.items():
                if value == -1 and counts.get(name.split("_")[-1], counts["all"]):
                    raise RuntimeError(
                        f"{name} is -1 although there is ground truth; the {iou_type} evaluator is wrong"
                    )
            prefix = f"{iou_type}_" if len(self.iou_type) > 1 else ""
            for group, name in FREQUENCIES.items() if self.frequencies and iou_type != "keypoints" else ():
                own = [k for k, frequency in enumerate(self.frequencies or ()) if frequency == group]
                summary[name] = mean_valid(precision[:, :, own, 0, -1])
            figures |= {prefix + name: value for name, value in summary.items()}
            ap = [mean_valid(precision[:, :, k, 0, -1]) for k in range(len(self.class_names))]
            class_ap[iou_type] = {n: v for n, v in zip(self.class_names, ap, strict=True) if v > -1}
        detected = np.bincount(_concat([r.labels for r in results]), minlength=len(self.class_names) + 1)
        known = class_ap[self.iou_type[0]]
        absent = {n: int(c) for n, c in zip(self.class_names, detected[1:], strict=True) if c and n not in known}
        return figures, class_ap, absent

    def object_counts(self, iou_type: IouType | None = None) -> dict[str, int]:
        """Objects of each of COCO's sizes, `all, small, medium, large`, that this process has seen; no crowds.

        For `keypoints` those with a key point that is annotated.
        """
        counted = [~r.gt_iscrowd for r in self.results]
        if iou_type == "keypoints":
            seen = [(r.gt_keypoints[..., 2] > 0).any(axis=1) for r in self.results if r.gt_keypoints is not None]
            counted = [own & labelled for own, labelled in zip(counted, seen, strict=True)]
        areas = np.concatenate(
            [r.gt_areas[own] for r, own in zip(self.results, counted, strict=True)] or [np.zeros(0, np.float32)]
        )
        inside = [(areas >= low) & (areas <= high) for low, high in AREA_LIMITS]
        return {name: int(mask.sum()) for name, mask in zip(AREAS, inside, strict=True)}

    def _arrays(self, results: Sequence[ImageResult]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """Precision `(T, R, C, A, M)` and recall `(T, C, A, M)` by IoU type, -1 where a class has no ground truth."""
        limits, classes = self.max_detection_thresholds, len(self.class_names)
        curves = {
            t: evaluate(results, classes, [oks.MOST], sigmas=self.sigmas(results))
            if t == "keypoints"
            else evaluate(results, classes, limits, use_masks=t == "segm")
            for t in self.iou_type
        }
        return {iou_type: (curve.precision, curve.recall) for iou_type, curve in curves.items()}

    def sigmas(self, results: Sequence[ImageResult]) -> tuple[float, ...]:
        """Those of OKS, one a key point of these images; nothing where there is no image and no skeleton."""
        known = self.skeleton
        points = next((r.gt_keypoints for r in results if r.gt_keypoints is not None), None)
        if known is None or (points is not None and points.shape[1] != len(known)):
            known = Skeleton(numbered(0 if points is None else points.shape[1]))
        return known.oks_sigmas


def summarize(precision: NDArray[Any], recall: NDArray[Any], max_detections: Sequence[int]) -> dict[str, float]:
    """The twelve figures of the official summary.

    Args:
        precision: `(T, R, C, 4, 3)` at IoU .50:.05:.95 for all, small, medium and large objects, at 3 limits.
        recall: `(T, C, 4, 3)`.
        max_detections: the three limits, ascending; they name the recall keys.
    """
    figures = {"map": mean_valid(precision[:, :, :, 0, -1])}
    figures["map_50"] = mean_valid(precision[0, :, :, 0, -1])
    figures["map_75"] = mean_valid(precision[5, :, :, 0, -1])
    figures |= {f"map_{area}": mean_valid(precision[:, :, :, a, -1]) for a, area in enumerate(AREAS) if a}
    figures |= {f"mar_{limit}": mean_valid(recall[:, :, 0, m]) for m, limit in enumerate(max_detections)}
    figures |= {f"mar_{area}": mean_valid(recall[:, :, a, -1]) for a, area in enumerate(AREAS) if a}
    return figures


def mean_valid(values: NDArray[Any]) -> float:
    """Mean over the entries that have ground truth; -1 without any, as COCO has it."""
    valid = values[values > -1]
    return float(valid.mean()) if len(valid) else -1.0


def _concat(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(arrays or [np.zeros(0, np.int64)])
