"""Cascade R-CNN: heads in a row, each trained on the boxes of the one before, at a higher IoU.

Cascade R-CNN (Cai and Vasconcelos 2018), section 4; with masks section 4 of the journal version (2019).

Shape shorthand:
    B: images     P: proposals an image     S: sampled regions an image     R: regions of all images
    K: classes with background
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from detection.batch import Batch
from detection.boxes import clip_boxes, is_large_enough
from detection.fitting import PartError, name_of
from detection.losses import class_probabilities
from detection.models.masks import MaskBranch
from detection.models.roi_heads import RoIHeads, RoISample
from detection.parts import Detections, FeatureMaps, Losses, Proposals
from detection.recipes import recorded


@recorded
class CascadeRoIHeads(MaskBranch):
    """RoI heads of several stages.

    In training, the first stage samples regions, and these go through all stages. Each stage moves them by its
    class-agnostic deltas; the next one matches the moved regions to the ground truth anew, at its own IoU. No stage
    samples again. In evaluation, the class probabilities are the mean over the stages, each on the boxes that it was
    given, and the boxes are those of the last stage.

    Args:
        stages: heads whose predictors give deltas `(R, 4)`, class-agnostic; IoU thresholds rise from one to the next.
        mask_roi_pool, mask_head, mask_predictor, mask_loss, mask_grid: one branch, on the boxes that the first stage
            samples in training and on the detections in evaluation; None for boxes alone, or where each stage has a
            branch, whose probabilities are averaged.
        mean_of_logits: average the stages' logits, as MMDetection does, and not their probabilities.
    """

    def __init__(
        self,
        stages: Sequence[RoIHeads],
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
        mask_loss: Callable[..., Any] | None = None,
        mean_of_logits: bool = False,
        mask_grid: Any = None,
    ) -> None:
        super().__init__(mask_roi_pool, mask_head, mask_predictor, mask_loss, mask_grid)
        self.mean_of_logits = mean_of_logits
        self.stages = nn.ModuleList(stages)
        self.training_rule: Callable[..., Losses] | None = None  # another way to train: (self, ...) as for `losses`

    @property
    def num_classes(self) -> int:
        """K."""
        return self._heads[0].num_classes

    @property
    def has_masks(self) -> bool:
        """As `MaskBranch.has_masks`, of the stages too."""
        return super().has_masks or self._heads[0].has_masks

    @property
    def _heads(self) -> list[RoIHeads]:
        return list(self.stages)  # type: ignore[arg-type]

    def losses(self, features: FeatureMaps, proposals: Proposals, batch: Batch) -> Losses:
        """`loss_classifier_stage0`, `loss_box_reg_stage0` and so on and, with a mask branch, `loss_mask`."""
        if self.training_rule is not None:
            return self.training_rule(self, features, proposals, batch)
        first = self._heads[0]
        sample = first.sample(features, proposals, batch)
        found: Losses = {}
        masks = self.mask_losses(features, *first.foreground_part(sample), batch)
        for i, stage in enumerate(self._heads):
            if i:
                sample = self._rematch(stage, sample, batch)
            # The stages share the features, whose gradient would otherwise be three times that of one stage.
            logits, deltas = stage.predict(features, sample.boxes, gradient_share=1 / len(self.stages))
            stage_losses = stage.box_losses(logits, deltas, sample, batch)
            found |= {f"{name}_stage{i}": loss for name, loss in stage_losses.items()}
            sample = replace(sample, boxes=self._refine(stage, sample.boxes, deltas, batch.image_sizes))
        return found | masks

    @torch.no_grad()
    def _rematch(self, stage: RoIHeads, sample: RoISample, batch: Batch) -> RoISample:
        """The moved regions of a sample with their labels at a stage's IoU.

        Regions that have shrunk below `min_size`, or lie between the thresholds, are no longer valid.
        """
        labels, matched_idxs = stage.match(sample.boxes, batch)
        valid = sample.valid & is_large_enough(sample.boxes, stage.min_size) & (labels >= 0)
        return RoISample(sample.boxes, torch.where(valid, labels, 0), matched_idxs.clamp(min=0), valid)

    @staticmethod
    def _refine(stage: RoIHeads, boxes: Tensor, deltas: Tensor, image_sizes: Tensor) -> Tensor:
        """Boxes `(B, P, 4)` moved by deltas `(B, P, 1, 4)`, inside the image, without a gradient."""
        return clip_boxes(stage.box_coder.decode(deltas.detach()[:, :, 0], boxes), image_sizes)

    def detect(self, features: FeatureMaps, proposals: Proposals, image_sizes: Tensor) -> Detections:
        """As `RoIHeads.detect`."""
        every: list[Tensor] = []
        *earlier, last = self._heads
        for stage in earlier:
            logits, deltas = stage.predict(features, proposals.boxes)
            every.append(logits.float())
            proposals = replace(proposals, boxes=self._refine(stage, proposals.boxes, deltas, image_sizes))
        logits, deltas = last.predict(features, proposals.boxes)
        stacked = torch.stack([*every, logits.float()])
        stacked = stacked.mean(dim=0, keepdim=True) if self.mean_of_logits else stacked
        scores = class_probabilities(last.class_loss, stacked).mean(dim=0)
        return self.add_masks(features, last.postprocess(scores, deltas, proposals, image_sizes))

    def mask_probabilities(self, features: FeatureMaps, boxes: Tensor, labels: Tensor) -> Tensor:
        """As `MaskBranch.mask_probabilities`; of a branch in each stage the mean."""
        if super().has_masks:
            return super().mask_probabilities(features, boxes, labels)
        return torch.stack([stage.mask_probabilities(features, boxes, labels) for stage in self._heads]).mean(dim=0)

    def check(self, features: FeatureMaps) -> None:
        """As `RoIHeads.check`, for each stage; and refuse predictors with deltas of each class.

        Raises:
            PartError: see above.
        """
        boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0]]], device=features.maps[0].device)
        for i, stage in enumerate(self._heads):
            stage.check(features)
            deltas = stage.predict(features, boxes)[1]
            if deltas.shape[2] != 1:
                raise PartError(
                    f"box_predictor of stage {i}: {name_of(stage.box_predictor)} gave box deltas (1, "
                    f"{4 * deltas.shape[2]}) in the place of (1, 4): the next stage needs one box of each region"
                )
        if super().has_masks:
            self.mask_logits(features, boxes, torch.zeros((1, 1), dtype=torch.int64, device=boxes.device))
