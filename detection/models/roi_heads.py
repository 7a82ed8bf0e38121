"""Second stage: what each proposed region shows, and where exactly it is.

Fast R-CNN (Girshick 2015), section 2; Faster R-CNN (Ren et al. 2015), section 3.2.

Shape shorthand:
    B: images     P: proposals an image     G: ground truth boxes an image     S: sampled regions an image
    R: regions of all images     K: classes with background     D: detections of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection import losses
from detection.batch import Batch
from detection.boxes import BoxCoder, clip_boxes, grouped_nms, is_large_enough, soft_nms
from detection.matching import BalancedSampler, Matcher
from detection.models.masks import MaskBranch
from detection.models.pooling import RoIPooler
from detection.models.rpn import Proposals
from detection.recipes import recorded

SOFT_NMS_CANDIDATES = 1000  # best detections of an image that go into Soft-NMS, which takes a step for each result


@recorded
class TwoFCHead(nn.Module):
    """Two fully connected layers over the pooled features (FPN, section 4.2): `(R, C, o, o)` -> `(R, out_channels)`."""

    def __init__(self, in_channels: int, output_size: int = 7, out_channels: int = 1024) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_channels * output_size**2, out_channels)
        self.fc7 = nn.Linear(out_channels, out_channels)
        self.out_channels = out_channels

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.fc7(F.relu(self.fc6(pooled.flatten(1)))))


@recorded
class ConvFCHead(nn.Sequential):
    """Four normalised 3x3 convolutions, then one fully connected layer: the box head of torchvision's v2 detector."""

    def __init__(
        self, in_channels: int, output_size: int = 7, conv_channels: int = 256, out_channels: int = 1024
    ) -> None:
        widths = [in_channels, conv_channels, conv_channels, conv_channels, conv_channels]
        convs = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        ]
        linear = nn.Linear(conv_channels * output_size**2, out_channels)
        super().__init__(*convs, nn.Flatten(), linear, nn.ReLU(inplace=True))
        for conv, _, _ in convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        self.out_channels = out_channels


@recorded
class FastRCNNPredictor(nn.Module):
    """Class logits and one box refinement a class (Fast R-CNN, section 2.1): `(R, F)` -> `(R, K)`, `(R, K * 4)`.

    Args:
        in_channels: F.
        num_classes: K, with background.
        class_agnostic: one refinement for all classes, `(R, 4)`, as Cascade R-CNN has it.
    """

    def __init__(self, in_channels: int, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4 if class_agnostic else num_classes * 4)
        self.class_agnostic = class_agnostic

    def forward(self, features: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As above; `labels` `(B, Q)` int64 ask for deltas `(B * Q, 4)` of these classes for the first Q of each image.

        In training no other delta has a gradient; with 1,200 classes all of them would take a fifth of the step.
        """
        features = features.flatten(1)
        if labels is None or self.class_agnostic:
            return self.cls_score(features), self.bbox_pred(features)
        own = features.unflatten(0, (len(labels), -1))[:, : labels.shape[1]].flatten(0, 1)
        weight = F.embedding(labels.flatten(), self.bbox_pred.weight.unflatten(0, (-1, 4)).flatten(1))
        bias = F.embedding(labels.flatten(), self.bbox_pred.bias.unflatten(0, (-1, 4)))
        deltas = torch.baddbmm(bias[..., None], weight.unflatten(1, (4, -1)), own[..., None])
        return self.cls_score(features), deltas.squeeze(-1)


@dataclass(frozen=True, slots=True)
class RoISample:
    """The regions that train the heads: boxes `(B, S, 4)`; labels and matched_idxs `(B, S)` int64; valid `(B, S)`.

    Labels are 0 for background; matched_idxs point into the ground truth of the image where the label is above 0.
    """

    boxes: Tensor
    labels: Tensor
    matched_idxs: Tensor
    valid: Tensor


class RoIHeads(MaskBranch):
    """Pools each proposal, classifies it and refines its box.

    Args:
        box_roi_pool: feature maps and boxes -> `(R, C, o, o)`.
        box_head: `(R, C, o, o)` -> `(R, F)`.
        box_predictor: `(R, F)` -> class logits `(R, K)` and deltas `(R, K * 4)`, or `(R, 4)` for all classes.
        strides: of the feature maps.
        fg_iou_thresh, bg_iou_thresh: proposals with IoU >= fg are foreground, < bg background, between them ignored.
        batch_size_per_image, positive_fraction: the sample that the losses see (Fast R-CNN, section 2.3).
        bbox_reg_weights: see `BoxCoder`.
        score_thresh: detections score above this.
        nms_thresh: IoU above which the worse of two boxes of a class goes.
        detections_per_img: most detections of an image.
        box_beta: see `losses.box_loss`.
        overlap_loss: in place of smooth L1, on the boxes themselves.
        soft_nms_sigma: Soft-NMS with this sigma (0.5 in the paper) in place of `nms_thresh`; None for plain NMS.
        mask_roi_pool, mask_head, mask_predictor: the mask branch of `detection.models.masks`; None for boxes alone.
    """

    min_size = 1e-2  # pixels: sides that a detection must have

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_head: nn.Module,
        box_predictor: nn.Module,
        strides: Sequence[int],
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.5,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        bbox_reg_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        box_beta: float = 1 / 9,
        soft_nms_sigma: float | None = None,
        overlap_loss: losses.OverlapLoss | None = None,
        mask_roi_pool: RoIPooler | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
    ) -> None:
        super().__init__(mask_roi_pool, mask_head, mask_predictor, strides)
        self.box_roi_pool, self.box_head, self.box_predictor = box_roi_pool, box_head, box_predictor
        self.matcher = Matcher(fg_iou_thresh, bg_iou_thresh)
        self.sampler = BalancedSampler(batch_size_per_image, positive_fraction)
        self.box_coder = BoxCoder(bbox_reg_weights)
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_img, self.box_beta = detections_per_img, box_beta
        self.soft_nms_sigma, self.overlap_loss = soft_nms_sigma, overlap_loss

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.box_predictor.cls_score.out_features)  # type: ignore[union-attr, arg-type]

    def predict(
        self,
        features: Sequence[Tensor],
        boxes: Tensor,
        gradient_share: float = 1.0,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Class logits `(B, P, K)` and deltas `(B, P, K, 4)` of regions `(B, P, 4)`; `(B, P, 1, 4)` class-agnostic.

        Args:
            features, boxes: as in `RoIPooler`.
            gradient_share: how much of the gradient goes on to the features.
            labels: `(B, Q)` int64: only the deltas of these classes are wanted, of the first Q regions of each image.
                A `FastRCNNPredictor` with deltas a class then gives `(B, Q, 1, 4)`; others give what they have.
        """
        pooled = self.box_roi_pool(features, boxes, self.strides)
        if gradient_share != 1.0:
            pooled = gradient_share * pooled + (1 - gradient_share) * pooled.detach()
        rows = self.box_head(pooled)
        predictor, regions = self.box_predictor, boxes.shape[:2]
        if labels is not None and isinstance(predictor, FastRCNNPredictor) and not predictor.class_agnostic:
            logits, deltas = predictor(rows, labels)
            return logits.unflatten(0, regions), deltas.unflatten(0, labels.shape).unflatten(-1, (-1, 4))
        logits, deltas = predictor(rows)
        return logits.unflatten(0, regions), deltas.unflatten(0, regions).unflatten(-1, (-1, 4))

    @torch.no_grad()
    def sample(self, proposals: Proposals, batch: Batch) -> RoISample:
        """Match proposals and ground truth itself to the ground truth, and draw the regions to train on.

        Ground truth joins the proposals (at their end) so that there is foreground before the RPN has learned any.
        """
        boxes = torch.cat((proposals.boxes, batch.gt_boxes), dim=1)
        exists = torch.cat((proposals.valid, batch.gt_valid), dim=1)
        labels, matched_idxs = self.match(boxes, batch)
        sampled, valid = self.sampler(torch.where(exists, labels, -1))
        return RoISample(
            boxes=boxes.gather(1, sampled[..., None].expand(-1, -1, 4)),
            labels=torch.where(valid, labels.gather(1, sampled), 0),
            matched_idxs=matched_idxs.gather(1, sampled).clamp(min=0),
            valid=valid,
        )

    @torch.no_grad()
    def match(self, boxes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labels `(B, P)` (0 background, -1 ignored) of boxes `(B, P, 4)` and the ground truth they match, `(B, P)`."""
        matched_idxs = self.matcher.match(batch.gt_boxes, batch.gt_valid, boxes)
        labels = batch.gt_labels.gather(1, matched_idxs.clamp(min=0))
        return torch.where(matched_idxs >= 0, labels, torch.where(matched_idxs == -1, 0, -1)), matched_idxs

    def losses(self, features: Sequence[Tensor], proposals: Proposals, batch: Batch) -> dict[str, Tensor]:
        """`loss_classifier` and `loss_box_reg` of a sample of regions and, with a mask branch, `loss_mask`."""
        sample = self.sample(proposals, batch)
        part = slice(0, self.sampler.max_positive)  # the sampler puts foreground first
        logits, deltas = self.predict(features, sample.boxes, labels=sample.labels[:, part])
        masks = self.mask_losses(
            features, sample.boxes[:, part], sample.labels[:, part], sample.matched_idxs[:, part], batch
        )
        return self.box_losses(logits, deltas, sample, batch) | masks

    def box_losses(self, logits: Tensor, deltas: Tensor, sample: RoISample, batch: Batch) -> dict[str, Tensor]:
        """`loss_classifier` and `loss_box_reg` of what `predict` gave for the sampled regions.

        Deltas may be those of the first regions of each image alone, if no other is foreground.
        """
        boxes, own, index = (x[:, : deltas.shape[1]] for x in (sample.boxes, sample.labels, sample.matched_idxs))
        gt_boxes = batch.gt_boxes.gather(1, index[..., None].expand(-1, -1, 4)).flatten(0, 1)
        foreground = ((own > 0) & sample.valid[:, : deltas.shape[1]]).flatten()
        # The refinement of the true class alone is trained.
        column = own if deltas.shape[2] > 1 else torch.zeros_like(own)
        deltas = deltas.gather(2, column[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        labels, valid = sample.labels.flatten(), sample.valid.flatten()
        if self.overlap_loss is not None:
            refined = self.box_coder.decode(deltas, boxes).flatten(0, 1)
            box_loss = self.overlap_loss(refined, gt_boxes, foreground, valid)
        else:
            gt_deltas = self.box_coder.encode(gt_boxes, boxes.flatten(0, 1))
            box_loss = losses.box_loss(deltas.flatten(0, 1), gt_deltas, foreground, valid, self.box_beta)
        classes = losses.classification_loss(logits.flatten(0, 1), labels, valid)
        return {"loss_classifier": classes, "loss_box_reg": box_loss}

    def detect(self, features: Sequence[Tensor], proposals: Proposals, image_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Each image's `boxes` `(D, 4)` in pixels of the batch, `labels` and `scores` `(D,)`, best first.

        With a mask branch also `masks` `(D, m, m)`: probabilities inside the box, to be laid out by `paste_masks`.
        """
        logits, deltas = self.predict(features, proposals.boxes)
        detections = self.decide(logits.float().softmax(dim=-1), deltas, proposals, image_sizes)
        return self.add_masks(features, detections)

    def decide(
        self, scores: Tensor, deltas: Tensor, proposals: Proposals, image_sizes: Tensor
    ) -> list[dict[str, Tensor]]:
        """Detections from class probabilities `(B, P, K)` and deltas `(B, P, K or 1, 4)` of the proposals."""
        scores = scores[..., 1:]
        deltas = deltas[:, :, 1:] if deltas.shape[2] > 1 else deltas
        boxes = self.box_coder.decode(deltas, proposals.boxes[:, :, None])  # (B, P, K - 1 or 1, 4)
        boxes = clip_boxes(boxes.flatten(1, 2), image_sizes).view_as(boxes).expand(*scores.shape, 4)
        usable = (scores > self.score_thresh) & is_large_enough(boxes, self.min_size) & proposals.valid[..., None]
        return self.select(boxes, scores, usable)

    def select(self, boxes: Tensor, scores: Tensor, usable: Tensor) -> list[dict[str, Tensor]]:
        """Per-class NMS and the best `detections_per_img` of each image.

        Args:
            boxes: `(B, P, K - 1, 4)`.
            scores, usable: `(B, P, K - 1)`.
        """
        if self.soft_nms_sigma is not None:
            return self._select_softly(boxes, scores, usable, self.soft_nms_sigma)
        image, _, label = usable.nonzero(as_tuple=True)
        boxes, scores = boxes[usable], scores[usable]
        keep = grouped_nms(boxes, scores, image * usable.shape[2] + label, self.nms_thresh)
        detections = []
        for i in range(len(usable)):
            own = keep[image[keep] == i][: self.detections_per_img]
            detections.append({"boxes": boxes[own], "labels": label[own] + 1, "scores": scores[own]})
        return detections

    def _select_softly(self, boxes: Tensor, scores: Tensor, usable: Tensor, sigma: float) -> list[dict[str, Tensor]]:
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
