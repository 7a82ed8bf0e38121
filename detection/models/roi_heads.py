"""RoI heads: proposals -> classes and refined boxes, and in training a sample of regions and its losses.

Fast R-CNN (Girshick 2015), section 2; Faster R-CNN (Ren et al. 2015), section 3.2.

Shape shorthand:
    B: images     P: proposals an image     G: ground truth boxes an image     S: sampled regions an image
    M: of those the places that can be foreground     R: regions of all images     K: classes with background
    C: channels of the maps     o: side of pooled features     F: features of a region     D: detections of an image
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection import losses
from detection.batch import Batch
from detection.boxes import BoxCoder, clip_boxes, grouped_nms, is_large_enough, soft_nms
from detection.fitting import (
    attribute_of,
    check_prediction,
    check_training,
    count_classes,
    expect,
    finish,
    run,
    width_of,
)
from detection.matching import BalancedSampler, Matcher, draw, spare_ignored
from detection.models.masks import MaskBranch, MaskHead
from detection.models.pooling import RoIPooler
from detection.parts import Detections, Factory, Factory2, FeatureMaps, Losses, Proposals
from detection.recipes import recorded

SOFT_NMS_CANDIDATES = 1000  # detections of an image, the best, among which Soft-NMS looks for the next at every step


@recorded
class TwoFCHead(nn.Module):
    """Two fully connected layers over the pooled features (FPN, section 4.2): `(R, C, o, o)` -> `(R, out_channels)`."""

    def __init__(self, in_channels: int, output_size: int = 7, out_channels: int = 1024) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_channels * output_size**2, out_channels)
        self.fc7 = nn.Linear(out_channels, out_channels)
        self.in_channels, self.out_channels = in_channels, out_channels

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.fc7(F.relu(self.fc6(pooled.flatten(1)))))


@recorded
class ConvFCHead(nn.Sequential):
    """Four normalised 3x3 convolutions, then one fully connected layer: the box head of torchvision's v2 detector."""

    def __init__(
        self, in_channels: int, output_size: int = 7, conv_channels: int = 256, out_channels: int = 1024
    ) -> None:
        convs = MaskHead(in_channels, [conv_channels] * 4, "batch")
        linear = nn.Linear(conv_channels * output_size**2, out_channels)
        super().__init__(*convs, nn.Flatten(), linear, nn.ReLU(inplace=True))
        self.out_channels = out_channels


@recorded
class FastRCNNPredictor(nn.Module):
    """Class logits and the box deltas of each class (Fast R-CNN, section 2.1): `(R, F)` -> `(R, K)`, `(R, K * 4)`.

    Args:
        in_channels: F.
        num_classes: K, with background.
        class_agnostic: the same deltas for all classes, `(R, 4)`, as Cascade R-CNN has them.
    """

    def __init__(self, in_channels: int, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4 if class_agnostic else num_classes * 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        features = features.flatten(1)
        return self.cls_score(features), self.bbox_pred(features)


@dataclass(frozen=True, slots=True)
class RoISample:
    """The regions that train the heads: boxes `(B, S, 4)`; labels and matched_idxs `(B, S)` int64; valid `(B, S)`.

    Labels are 0 for background; matched_idxs point into the ground truth of the image where the label is above 0.
    """

    boxes: Tensor
    labels: Tensor
    matched_idxs: Tensor
    valid: Tensor


@recorded
class RoIHeads(MaskBranch):
    """Pools each proposal, classifies it and refines its box.

    Args:
        in_channels: channels of the feature maps.
        num_classes: K.
        box_roi_pool: default: `RoIPooler()`.
        box_head: default: `TwoFCHead`.
        box_predictor: default: `FastRCNNPredictor`.
        fg_iou_thresh, bg_iou_thresh: a proposal with IoU >= fg is foreground, < bg background, else ignored.
        batch_size_per_image, positive_fraction: the sample that the losses see (Fast R-CNN, section 2.3).
        bbox_reg_weights: see `BoxCoder`.
        score_thresh: detections have a score > this.
        nms_thresh: IoU above which NMS drops the worse of two boxes of a class.
        detections_per_img: most detections of an image.
        soft_nms_sigma: Soft-NMS with this sigma (0.5 in the paper) in place of `nms_thresh`; None for plain NMS.
        matcher, sampler, box_coder: in the place of those that the numbers above describe.
        class_loss, box_loss: default: `losses.classification_loss`, `SmoothL1Loss()`.
        mask_roi_pool, mask_head, mask_predictor, mask_loss, mask_grid: see `MaskBranch`.
    """

    min_size = 1e-2  # pixels: detections have sides >= this

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        box_roi_pool: nn.Module | None = None,
        box_head: nn.Module | Factory2 | None = None,
        box_predictor: nn.Module | Factory2 | None = None,
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.5,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        bbox_reg_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        soft_nms_sigma: float | None = None,
        matcher: Callable[..., Any] | None = None,
        sampler: Callable[..., Any] | None = None,
        box_coder: Any = None,
        class_loss: Callable[..., Any] | None = None,
        box_loss: Callable[..., Any] | None = None,
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | Factory | None = None,
        mask_predictor: nn.Module | Factory2 | None = None,
        mask_loss: Callable[..., Any] | None = None,
        mask_grid: Any = None,
    ) -> None:
        box_roi_pool = box_roi_pool or RoIPooler()
        side = attribute_of("box_roi_pool", box_roi_pool, "output_size")
        head = finish("box_head", box_head or TwoFCHead, in_channels, side)
        width = width_of("box_head", head, (1, in_channels, side, side), (1, "F"))
        predictor = finish("box_predictor", box_predictor or FastRCNNPredictor, width, num_classes)
        masked: tuple[nn.Module | None, nn.Module | None] = None, None
        if mask_roi_pool is not None and mask_head is not None and mask_predictor is not None:
            size = attribute_of("mask_roi_pool", mask_roi_pool, "output_size")
            wide = finish("mask_head", mask_head, in_channels)
            width = width_of("mask_head", wide, (1, in_channels, size, size), (1, "C", "o", "o"))
            masked = wide, finish("mask_predictor", mask_predictor, width, num_classes)
        super().__init__(mask_roi_pool, *masked, mask_loss, mask_grid)
        self.box_roi_pool, self.box_head, self.box_predictor = box_roi_pool, head, predictor
        self.matcher: Callable[..., Any] = matcher or Matcher(fg_iou_thresh, bg_iou_thresh)
        self.sampler: Any = sampler or BalancedSampler(batch_size_per_image, positive_fraction)
        self.box_coder = box_coder or BoxCoder(bbox_reg_weights)
        self.class_loss = class_loss or losses.classification_loss
        self.box_loss = box_loss or losses.SmoothL1Loss()
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_img, self.soft_nms_sigma = detections_per_img, soft_nms_sigma
        self.nms: Callable[..., Tensor] = grouped_nms

    @property
    def num_classes(self) -> int:
        """K, as the predictor says it."""
        return count_classes(self.box_predictor)

    def predict(self, features: FeatureMaps, boxes: Tensor, gradient_share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Class logits `(B, P, K)` and deltas `(B, P, K, 4)` of regions `(B, P, 4)`; `(B, P, 1, 4)` class-agnostic.

        Args:
            features: of the backbone.
            boxes: in pixels of the batch.
            gradient_share: factor on the gradient that reaches the features; Cascade R-CNN's stages share them.
        """
        pooled = self.box_roi_pool(features, boxes)
        if gradient_share != 1.0:
            pooled = gradient_share * pooled + (1 - gradient_share) * pooled.detach()
        logits, deltas = self.box_predictor(self.box_head(pooled))
        regions = boxes.shape[:2]
        return logits.unflatten(0, regions), deltas.unflatten(0, regions).unflatten(-1, (-1, 4))

    @torch.no_grad()
    def sample(self, features: FeatureMaps, proposals: Proposals, batch: Batch) -> RoISample:
        """Match the proposals to the ground truth, and draw the regions that train.

        The ground truth boxes are appended to the proposals, P + G in all, so that there is foreground before the RPN
        has learned to find any.
        """
        boxes = torch.cat((proposals.boxes, batch.gt_boxes), dim=1)
        exists = torch.cat((proposals.valid, batch.gt_valid), dim=1)
        labels, matched_idxs = self.match(boxes, batch)
        every = RoISample(boxes, labels.clamp(min=0), matched_idxs.clamp(min=0), exists)
        labels = torch.where(exists, labels, -1)
        sampled, valid = draw(self.sampler, labels, lambda: self._hardness(features, every, batch), boxes, batch)
        labels = torch.where(valid, labels.gather(1, sampled), 0)
        boxes = boxes.gather(1, sampled[..., None].expand(-1, -1, 4))
        return RoISample(boxes, labels, every.matched_idxs.gather(1, sampled), valid)

    @torch.no_grad()
    def match(self, boxes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labels of boxes `(B, P, 4)`, and the ground truth that they match: both `(B, P)`.

        Labels are 0 for background and -1 for what is ignored; matches are those of `Matcher`.
        """
        matched_idxs = self.matcher(batch.gt_boxes, batch.gt_valid, boxes)
        matched_idxs = spare_ignored(matched_idxs, boxes, batch.gt_ignored)
        labels = batch.gt_labels.gather(1, matched_idxs.clamp(min=0))
        return torch.where(matched_idxs >= 0, labels, torch.where(matched_idxs == -1, 0, -1)), matched_idxs

    @torch.no_grad()
    def _hardness(self, features: FeatureMaps, regions: RoISample, batch: Batch) -> Tensor:
        """The sum of the class and box losses of each region, `(B, P)`."""
        classes, boxes, _ = self._row_losses(*self.predict(features, regions.boxes), regions, batch)
        return (classes + boxes).view_as(regions.labels)

    def losses(self, features: FeatureMaps, proposals: Proposals, batch: Batch) -> Losses:
        """`loss_classifier` and `loss_box_reg` of a sample of regions and, with a mask branch, `loss_mask`."""
        sample = self.sample(features, proposals, batch)
        boxes = self.box_losses(*self.predict(features, sample.boxes), sample, batch)
        return boxes | self.mask_losses(features, *self.foreground_part(sample), batch)

    def foreground_part(self, sample: RoISample) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, labels and matched_idxs `(B, M, ...)` of the first `max_positive` places, where all foreground is."""
        part = slice(0, self.sampler.max_positive)
        return sample.boxes[:, part], sample.labels[:, part], sample.matched_idxs[:, part]

    def box_losses(self, logits: Tensor, deltas: Tensor, sample: RoISample, batch: Batch) -> Losses:
        """`loss_classifier` and `loss_box_reg` of sampled regions (Fast R-CNN, section 2.3, equation 1).

        Both sums are divided by the number of sampled regions of the batch, background included.

        Args:
            logits, deltas: `(B, S, K)` and `(B, S, K or 1, 4)`, what `predict` gave for the sample.
            sample: of the proposals.
            batch: for its ground truth.
        """
        classes, boxes, foreground = self._row_losses(logits, deltas, sample, batch)
        return {
            "loss_classifier": losses.mean_over(classes, sample.valid.flatten(), sample.valid),
            "loss_box_reg": losses.mean_over(boxes, foreground, sample.valid),
        }

    def _row_losses(
        self, logits: Tensor, deltas: Tensor, sample: RoISample, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Class losses, box losses (0 for background) and which regions are foreground, each `(R,)`, R = B * S."""
        foreground = ((sample.labels > 0) & sample.valid).flatten()
        gt_boxes = batch.gt_boxes.gather(1, sample.matched_idxs[..., None].expand(-1, -1, 4)).flatten(0, 1)
        # Only the deltas of the true class have a loss.
        column = sample.labels if deltas.shape[2] > 1 else torch.zeros_like(sample.labels)
        own = deltas.gather(2, column[..., None, None].expand(-1, -1, 1, 4)).flatten(0, 2)
        boxes = losses.box_loss_of_foreground(
            self.box_loss, own, sample.boxes.flatten(0, 1), gt_boxes, foreground, self.box_coder
        )
        classes = losses.class_loss_of_rows(self.class_loss, logits, sample.labels, sample.valid, batch.labelled)
        return classes, torch.where(foreground, boxes, 0.0), foreground

    def detect(self, features: FeatureMaps, proposals: Proposals, image_sizes: Tensor) -> Detections:
        """Each image's `boxes` `(D, 4)` in pixels of the batch, `labels` and `scores` `(D,)`, best first.

        With a mask branch also `masks` `(D, m, m)`: probabilities inside the box, which `mask_grid` lays on the image.
        """
        logits, deltas = self.predict(features, proposals.boxes)
        scores = losses.class_probabilities(self.class_loss, logits)
        return self.add_masks(features, self.postprocess(scores, deltas, proposals, image_sizes))

    def postprocess(self, scores: Tensor, deltas: Tensor, proposals: Proposals, image_sizes: Tensor) -> Detections:
        """Detections from class probabilities `(B, P, K)` and deltas `(B, P, K or 1, 4)` of the proposals."""
        scores = scores[..., 1:]
        deltas = deltas[:, :, 1:] if deltas.shape[2] > 1 else deltas
        boxes = self.box_coder.decode(deltas, proposals.boxes[:, :, None])  # (B, P, K - 1 or 1, 4)
        boxes = clip_boxes(boxes.flatten(1, 2), image_sizes).view_as(boxes).expand(*scores.shape, 4)
        usable = (scores > self.score_thresh) & is_large_enough(boxes, self.min_size) & proposals.valid[..., None]
        return self.nms_per_class(boxes, scores, usable)

    def nms_per_class(self, boxes: Tensor, scores: Tensor, usable: Tensor) -> Detections:
        """NMS in each class of each image, and the best `detections_per_img` of what is left.

        Args:
            boxes: `(B, P, K - 1, 4)`.
            scores: `(B, P, K - 1)`.
            usable: `(B, P, K - 1)` bool; the others are no candidates.
        """
        if self.soft_nms_sigma is not None:
            return self._soft_nms_per_class(boxes, scores, usable, self.soft_nms_sigma)
        place = image, _, label = usable.nonzero(as_tuple=True)
        boxes, scores = boxes[place], scores[place]
        keep = self.nms(boxes, scores, image * usable.shape[2] + label, self.nms_thresh)
        keep = keep[image[keep].argsort(stable=True)]  # by image, in each the best first
        counts = (image[keep] == torch.arange(len(usable), device=image.device)[:, None]).sum(dim=1).tolist()
        best = [own[: self.detections_per_img] for own in keep.split(counts)]
        return [{"boxes": boxes[own], "labels": label[own] + 1, "scores": scores[own]} for own in best]

    def _soft_nms_per_class(self, boxes: Tensor, scores: Tensor, usable: Tensor, sigma: float) -> Detections:
        classes = usable.shape[2]
        ranked = torch.where(usable, scores, 0.0).flatten(1)
        ranked, order = ranked.topk(min(SOFT_NMS_CANDIDATES, ranked.shape[1]), dim=1)
        candidates = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))
        taken, faded = soft_nms(candidates, ranked, order % classes, sigma, self.detections_per_img)
        detections = []
        for i in range(len(usable)):
            own = taken[i][faded[i] > self.score_thresh]
            found = {"boxes": candidates[i][own], "labels": order[i][own] % classes + 1}
            detections.append(found | {"scores": faded[i][faded[i] > self.score_thresh]})
        return detections

    def check(self, features: FeatureMaps) -> None:
        """Run each part once on a region of features `(1, C, h, w)`; see `detection.fitting`.

        Raises:
            PartError: one does not keep its contract.
        """
        boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0]]], device=features.maps[0].device)
        channels, side = features.maps[0].shape[1], self.box_roi_pool.output_size
        pooled = run("box_roi_pool", self.box_roi_pool, "__call__", features, boxes)
        expect("box_roi_pool", self.box_roi_pool, "features", pooled, (1, channels, side, side))  # type: ignore[arg-type]
        rows = run("box_head", self.box_head, "__call__", pooled)
        given = run("box_predictor", self.box_predictor, "__call__", rows)
        check_prediction(self.box_predictor, given, self.num_classes)
        labels = torch.zeros(2, dtype=torch.int64, device=boxes.device)
        check_training("box_", self, self.class_loss, boxes.new_zeros((2, self.num_classes)), labels)
        if self.has_masks:
            pooled = run("mask_roi_pool", self.mask_roi_pool, "__call__", features, boxes)
            wide = run("mask_head", self.mask_head, "__call__", pooled)
            masks = run("mask_predictor", self.mask_predictor, "__call__", wide)
            expect("mask_predictor", self.mask_predictor, "logits", masks, (1, self.num_classes, "m", "m"))
            for name in ("targets", "windows", "inside"):
                attribute_of("mask_grid", self.mask_grid, name)
            losses = run("mask_loss", self.mask_loss, "__call__", masks[:, 0].float(), masks[:, 0].float())
            expect("mask_loss", self.mask_loss, "losses", losses, (1,))
