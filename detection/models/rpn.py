"""Region proposal network: where objects may be, from every anchor of every level.

Faster R-CNN (Ren et al. 2015), section 3.1.

Shape shorthand:
    B: images     L: levels     K: anchors a cell     A: anchors of all levels
    T: anchors kept before NMS     P: proposals kept after it     S: anchors sampled for the loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detection import losses
from detection.anchors import AnchorGenerator
from detection.boxes import BoxCoder, clip_boxes, grouped_nms, is_large_enough
from detection.data.batch import Batch
from detection.matching import BalancedSampler, Matcher
from detection.recipes import recorded


@dataclass(frozen=True, slots=True)
class Proposals:
    """Regions of a batch, best first: boxes `(B, P, 4)` xyxy (0 if not valid), scores `(B, P)`, valid `(B, P)` bool."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor


@recorded
class RPNHead(nn.Module):
    """A 3x3 convolution shared by all levels, then 1x1 convolutions for objectness and for box deltas.

    Args:
        in_channels: channels of the feature maps.
        num_anchors: K.
        conv_depth: number of 3x3 convolutions; torchvision's v2 detector has 2.
        softmax_objectness: two logits an anchor (background, object) as in the paper. Their difference is the logit
            of the softmax's probability, so nothing behind the head has to know.
    """

    def __init__(
        self, in_channels: int, num_anchors: int, conv_depth: int = 1, softmax_objectness: bool = False
    ) -> None:
        super().__init__()
        layers = [
            nn.Sequential(nn.Conv2d(in_channels, in_channels, 3, padding=1), nn.ReLU(inplace=True))
            for _ in range(conv_depth)
        ]
        self.conv = nn.Sequential(*layers)
        self.cls_logits = nn.Conv2d(in_channels, num_anchors * (1 + softmax_objectness), 1)
        self.bbox_pred = nn.Conv2d(in_channels, num_anchors * 4, 1)
        self.softmax_objectness = softmax_objectness
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps `(B, C, h, w)` of each level -> objectness logits `(B, h * w * K)` and deltas `(B, h * w * K, 4)`."""
        objectness, deltas = [], []
        for feature in features:
            hidden = self.conv(feature)
            logits = self.cls_logits(hidden).permute(0, 2, 3, 1)
            if self.softmax_objectness:
                background, foreground = logits.unflatten(-1, (-1, 2)).unbind(-1)
                logits = foreground - background
            objectness.append(logits.flatten(1))
            deltas.append(self.bbox_pred(hidden).permute(0, 2, 3, 1).reshape(len(feature), -1, 4))
        return objectness, deltas


class RegionProposalNetwork(nn.Module):
    """Scores all anchors, learns from a sample of them, and proposes the best after NMS.

    Args:
        anchor_generator: lays the anchors.
        head: feature maps -> objectness and deltas.
        strides: of the levels, as the backbone declares them.
        fg_iou_thresh, bg_iou_thresh: an anchor with IoU >= fg trains as object, < bg as background.
        batch_size_per_image, positive_fraction: the sample that the losses see (section 3.1.3).
        pre_nms_top_n: anchors of each level that go into NMS, `{"training": n, "testing": n}`.
        post_nms_top_n: proposals of each image that come out, likewise.
        nms_thresh: IoU above which NMS drops the worse box; levels do not suppress each other.
        score_thresh: least objectness of a proposal, in [0, 1].
        box_beta: see `losses.box_loss`.
        overlap_loss: in place of smooth L1, on the boxes themselves.
    """

    min_size = 1e-3  # pixels: sides that a proposal must have

    def __init__(
        self,
        anchor_generator: AnchorGenerator,
        head: nn.Module,
        strides: Sequence[int],
        fg_iou_thresh: float = 0.7,
        bg_iou_thresh: float = 0.3,
        batch_size_per_image: int = 256,
        positive_fraction: float = 0.5,
        pre_nms_top_n: Mapping[str, int] = {"training": 2000, "testing": 1000},
        post_nms_top_n: Mapping[str, int] = {"training": 2000, "testing": 1000},
        nms_thresh: float = 0.7,
        score_thresh: float = 0.0,
        box_beta: float = 1 / 9,
        overlap_loss: losses.OverlapLoss | None = None,
    ) -> None:
        super().__init__()
        self.anchor_generator = anchor_generator
        self.head = head
        self.strides = tuple(strides)
        self.box_coder = BoxCoder()
        self.matcher = Matcher(fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches=True)
        self.sampler = BalancedSampler(batch_size_per_image, positive_fraction)
        self.pre_nms_top_n, self.post_nms_top_n = dict(pre_nms_top_n), dict(post_nms_top_n)
        self.nms_thresh, self.score_thresh, self.box_beta = nms_thresh, score_thresh, box_beta
        self.overlap_loss = overlap_loss

    def forward(
        self, features: Sequence[Tensor], batch: Batch, with_losses: bool
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals from the feature maps `(B, C, h, w)` of all levels and, if asked for, the two losses.

        Gradients flow through the losses only: proposals are detached (section 3.2, approximate joint training).
        """
        objectness, deltas = self.head(features)
        shapes = [(f.shape[-2], f.shape[-1]) for f in features]
        image_size = (batch.images.shape[-2], batch.images.shape[-1])
        anchors = self.anchor_generator(shapes, self.strides, image_size, features[0].device)
        proposals = self.propose(objectness, deltas, anchors, batch.image_sizes)
        if not with_losses:
            return proposals, {}
        return proposals, self.losses(torch.cat(objectness, dim=1), torch.cat(deltas, dim=1), torch.cat(anchors), batch)

    @torch.no_grad()
    def propose(
        self, objectness: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], image_sizes: Tensor
    ) -> Proposals:
        """The best anchors of each level, moved by their deltas, clipped, and thinned by NMS."""
        mode = "training" if self.training else "testing"
        boxes, logits, levels = [], [], []
        for level, (score, delta, anchor) in enumerate(zip(objectness, deltas, anchors, strict=True)):
            top_score, top = score.float().topk(min(self.pre_nms_top_n[mode], score.shape[1]), dim=1)
            boxes.append(self.box_coder.decode(delta.gather(1, top[..., None].expand(-1, -1, 4)), anchor[top]))
            logits.append(top_score)
            levels.append(torch.full_like(top, level))
        candidates = clip_boxes(torch.cat(boxes, dim=1), image_sizes)  # (B, T, 4)
        scores = torch.cat(logits, dim=1).sigmoid()
        # Boxes that are not finite (from diverged weights) fail the comparison too, and so never reach NMS.
        usable = is_large_enough(candidates, self.min_size) & (scores >= self.score_thresh)
        kept = self._suppress(candidates, scores, torch.cat(levels, dim=1), usable)
        ranked = torch.where(kept, scores, -1.0)
        best, order = ranked.topk(min(self.post_nms_top_n[mode], ranked.shape[1]), dim=1)
        valid = best >= 0
        proposals = candidates.gather(1, order[..., None].expand(-1, -1, 4))
        return Proposals(torch.where(valid[..., None], proposals, 0.0), best, valid)

    def _suppress(self, boxes: Tensor, scores: Tensor, levels: Tensor, usable: Tensor) -> Tensor:
        """Which of the candidates `(B, T)` survive NMS among those of their image and level, bool `(B, T)`."""
        images = torch.arange(len(boxes), device=boxes.device)[:, None]
        # Candidates that are not usable become points of a group of their own, so that all shapes stay fixed.
        groups = torch.where(usable, images * len(self.strides) + levels, len(boxes) * len(self.strides))
        points = torch.where(usable[..., None], boxes, 0.0)
        keep = grouped_nms(points.flatten(0, 1), scores.flatten(), groups.flatten(), self.nms_thresh)
        survives = torch.zeros(usable.numel(), dtype=torch.bool, device=boxes.device)
        return survives.scatter_(0, keep, True).view_as(usable) & usable

    def losses(self, objectness: Tensor, deltas: Tensor, anchors: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`loss_objectness` and `loss_rpn_box_reg` over a sample of the anchors.

        Args:
            objectness: `(B, A)` logits.
            deltas: `(B, A, 4)`.
            anchors: `(A, 4)`.
            batch: for its ground truth.
        """
        matched_idxs = self.matcher.match(batch.gt_boxes, batch.gt_valid, anchors)  # (B, A)
        labels = torch.where(matched_idxs >= 0, 1, torch.where(matched_idxs == -1, 0, -1))
        sampled, valid = self.sampler(labels)  # (B, S)
        matched = matched_idxs.gather(1, sampled)
        foreground = (matched >= 0) & valid
        index = matched.clamp(min=0)[..., None].expand(-1, -1, 4)
        gt_boxes, sampled_anchors = batch.gt_boxes.gather(1, index), anchors[sampled]
        sampled_deltas = deltas.gather(1, sampled[..., None].expand(-1, -1, 4))
        foreground, valid = foreground.flatten(), valid.flatten()
        if self.overlap_loss is not None:
            boxes = self.box_coder.decode(sampled_deltas, sampled_anchors)
            box_loss = self.overlap_loss(boxes.flatten(0, 1), gt_boxes.flatten(0, 1), foreground, valid)
        else:
            gt_deltas = self.box_coder.encode(gt_boxes, sampled_anchors).flatten(0, 1)
            box_loss = losses.box_loss(sampled_deltas.flatten(0, 1), gt_deltas, foreground, valid, self.box_beta)
        objects = losses.objectness_loss(objectness.gather(1, sampled).flatten(), foreground, valid)
        return {"loss_objectness": objects, "loss_rpn_box_reg": box_loss}
