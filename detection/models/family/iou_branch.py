"""Scores that know how well a box fits: a branch that predicts its IoU with the object.

IoU-Net (Jiang et al. 2018) has the branch; IoU-aware detectors (Wu et al. 2020, section 3) train it with the others and
multiply its output into the score, as here.

Shape shorthand:
    B: images     P: proposals an image     S: sampled regions an image     K: classes with background
    F: features of a region
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection import losses
from detection.batch import Batch
from detection.boxes import clip_boxes, pairwise_iou
from detection.fitting import width_of
from detection.models.roi_heads import RoIHeads, RoISample
from detection.parts import Detections, FeatureMaps, Losses, Proposals
from detection.recipes import recorded


@recorded
class IoURoIHeads(RoIHeads):
    """`RoIHeads` whose score is p^(1 - a) * IoU^a: p of the class, IoU as one more layer predicts it from the features.

    The layer has an output a class, as each class refines the box by its own deltas. Detections of a low score come up:
    with a of 0.5 and an IoU of 0.5, one of p = 0.01 has 0.07. So `score_thresh` leaves more of them than before.

    Args:
        in_channels, num_classes: see `RoIHeads`.
        iou_share: a, from 0, the class alone, to below 1; 0.5 in the paper of IoU-aware detectors.
        **kwargs: see `RoIHeads`.

    Raises:
        ValueError: a share that is not from 0 to below 1.
    """

    def __init__(self, in_channels: int, num_classes: int, iou_share: float = 0.5, **kwargs: Any) -> None:
        super().__init__(in_channels, num_classes, **kwargs)
        if not 0 <= iou_share < 1:
            raise ValueError(f"iou_share is {iou_share}: it must be from 0, the class alone, to below 1")
        self.iou_share = iou_share
        side = self.box_roi_pool.output_size
        width = width_of("box_head", self.box_head, (1, in_channels, side, side), (1, "F"))  # type: ignore[arg-type]
        self.iou_score = nn.Linear(width, num_classes)
        nn.init.normal_(self.iou_score.weight, std=0.01)
        nn.init.zeros_(self.iou_score.bias)

    def predict_with_iou(self, features: FeatureMaps, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `predict`, and the logits of each class's IoU `(B, P, K)`."""
        rows = self.box_head(self.box_roi_pool(features, boxes))
        given = *self.box_predictor(rows), self.iou_score(rows)
        logits, deltas, ious = (x.unflatten(0, boxes.shape[:2]) for x in given)
        return logits, deltas.unflatten(-1, (-1, 4)), ious

    def losses(self, features: FeatureMaps, proposals: Proposals, batch: Batch) -> Losses:
        """As `RoIHeads.losses`, and `loss_iou`."""
        sample = self.sample(features, proposals, batch)
        logits, deltas, ious = self.predict_with_iou(features, sample.boxes)
        found = self.box_losses(logits, deltas, sample, batch) | self.iou_losses(ious, deltas, sample, batch)
        return found | self.mask_losses(features, *self.foreground_part(sample), batch)

    def iou_losses(self, ious: Tensor, deltas: Tensor, sample: RoISample, batch: Batch) -> Losses:
        """`loss_iou`: binary cross-entropy of the true class's output against the IoU of its refined box.

        The mean over the foreground regions of the batch. The box gets no gradient from it.

        Args:
            ious, deltas: `(B, S, K)` and `(B, S, K or 1, 4)`, what `predict_with_iou` gave for the sample.
            sample: of the proposals.
            batch: for its ground truth.
        """
        foreground = (sample.labels > 0) & sample.valid
        wanted = torch.where(foreground, self.refined_iou(deltas, sample, batch), 0.0)
        own = ious.float().gather(2, sample.labels[..., None]).squeeze(2)
        loss = F.binary_cross_entropy_with_logits(own, wanted, reduction="none")
        return {"loss_iou": losses.mean_over(loss, foreground, foreground)}

    @torch.no_grad()
    def refined_iou(self, deltas: Tensor, sample: RoISample, batch: Batch) -> Tensor:
        """IoU `(B, S)` of each region, refined by its true class's deltas and cut to the image, with its object."""
        column = sample.labels if deltas.shape[2] > 1 else torch.zeros_like(sample.labels)
        own = deltas.gather(2, column[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        refined = clip_boxes(self.box_coder.decode(own, sample.boxes), batch.image_sizes)
        gt_boxes = batch.gt_boxes.gather(1, sample.matched_idxs[..., None].expand(-1, -1, 4))
        return pairwise_iou(refined[:, :, None], gt_boxes[:, :, None])[:, :, 0, 0]

    def detect(self, features: FeatureMaps, proposals: Proposals, image_sizes: Tensor) -> Detections:
        """As `RoIHeads.detect`, with the scores above."""
        logits, deltas, ious = self.predict_with_iou(features, proposals.boxes)
        classes = losses.class_probabilities(self.class_loss, logits)
        scores = classes ** (1 - self.iou_share) * ious.float().sigmoid() ** self.iou_share
        return self.add_masks(features, self.postprocess(scores, deltas, proposals, image_sizes))
