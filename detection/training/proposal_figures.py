"""Figures of a run's proposals: how many objects they reach, and how much foreground is drawn from them.

Shape shorthand:
    P: proposals of one image
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from detection.batch import Batch, Target
from detection.boxes import resize_boxes
from detection.evaluation.coco_eval import evaluate
from detection.evaluation.results import ImageResult
from detection.parts import Hardness, Sampler

PROPOSAL_LIMITS = (100, 300, 1000)


class ProposalRecall(L.Callback):
    """At each validation `val/proposals_ar_100`, `_300` and `_1000`: how much of the ground truth proposals reach.

    COCO's average recall over IoU .50 to .95 with classes ignored, in original pixels, of that many best proposals an
    image, whatever made them. Of several processes, the images that pad their last batches count twice. Images that are
    evaluated in tiles have no such figures.
    """

    def __init__(self) -> None:
        self._hook: Any = None
        self._proposals: Any = None
        self._found = torch.zeros(1 + len(PROPOSAL_LIMITS), dtype=torch.float64)  # objects, then those reached

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._found.zero_()
        source = getattr(pl_module.detector, "rpn", None)
        if source is not None and not trainer.sanity_checking:
            self._hook = source.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        self._proposals = output[0]

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *place: int
    ) -> None:
        if self._proposals is not None:
            given, self._proposals = self._proposals, None
            if batch.tile_corners is not None:
                return
            boxes = resize_boxes(given.boxes, batch.image_sizes, batch.original_sizes)
            boxes, scores, valid = (values.float().cpu() for values in (boxes, given.scores, given.valid))
            rows = zip(boxes, scores, valid.bool(), batch.targets, strict=True)
            self._found += recalled([proposal_result(box[ok], score[ok], target) for box, score, ok, target in rows])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        total = trainer.strategy.reduce(self._found.float().to(pl_module.device), reduce_op="sum").cpu()
        if total[0]:
            for limit, count in zip(PROPOSAL_LIMITS, total[1:], strict=True):
                pl_module.log(f"val/proposals_ar_{limit}", count / total[0], rank_zero_only=False)


def proposal_result(boxes: Tensor, scores: Tensor, target: Target) -> ImageResult:
    """Proposals `(P, 4)` of an image, in its own pixels, beside its ground truth, all of one class."""
    count, one = len(target.labels), np.ones(len(boxes), np.int64)
    truth = (target.boxes.numpy(), np.ones(count, np.int64), target.areas.numpy(), target.iscrowd.numpy())
    shown = (boxes.numpy(), one, scores.numpy(), None)
    return ImageResult(target.image_id, target.file_name, target.size, *shown, *truth, np.zeros(count, bool), None)


def recalled(results: Sequence[ImageResult]) -> Tensor:
    """Objects that count, then how many of them the best proposals reach at each of `PROPOSAL_LIMITS`, float64."""
    objects = sum(int((~result.gt_iscrowd).sum()) for result in results)
    if not objects:
        return torch.zeros(1 + len(PROPOSAL_LIMITS), dtype=torch.float64)
    recall = evaluate(results, 1, PROPOSAL_LIMITS).recall[:, 0, 0].mean(0)
    return torch.tensor([objects, *(recall * objects)], dtype=torch.float64)


class CountingSampler:
    """A sampler that keeps how much foreground another one drew, on the device, so that nothing waits for the number.

    Attributes:
        foreground: boxes an image in the last batch, a tensor; None before the first.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.max_positive = sampler, sampler.max_positive
        self.wants_overlaps = getattr(sampler, "wants_overlaps", False)
        self.foreground: Tensor | None = None

    def __call__(self, labels: Tensor, *more: Hardness) -> tuple[Tensor, Tensor]:
        """As the sampler itself."""
        indices, valid = self.sampler(labels, *more)
        drawn = (labels.gather(-1, indices) > 0) & valid
        self.foreground = drawn.sum(dim=-1).float().mean()
        return indices, valid


class SampledForeground(L.Callback):
    """Logs `train/foreground_rpn` and `train/foreground_roi_heads`: positives an image in what each sampler draws.

    The samplers of the detector are wrapped while it trains, and their own again behind it.
    """

    def __init__(self) -> None:
        self._samplers: dict[str, CountingSampler] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, part in pl_module.detector.named_modules():  # type: ignore[operator, union-attr]
            sampler: Any = getattr(part, "sampler", None)
            if hasattr(sampler, "max_positive") and not isinstance(sampler, CountingSampler | nn.Module):
                part.sampler = self._samplers[name] = CountingSampler(sampler)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for name, sampler in self._samplers.items():
            if sampler.foreground is not None:  # a cascade's later stages draw none of their own
                pl_module.log(f"train/foreground_{name.split('.')[0]}", sampler.foreground, batch_size=1)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, counting in self._samplers.items():
            pl_module.detector.get_submodule(name).sampler = counting.sampler  # type: ignore[operator, union-attr]
        self._samplers.clear()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)
