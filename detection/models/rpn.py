"""Region proposal network: where objects may be, from every anchor of every level.

Faster R-CNN (Ren et al. 2015), section 3.1.

Shape shorthand:
    B: images     L: levels     K: anchors a cell     A: anchors of all levels
    T: anchors kept before NMS     P: proposals kept after it     S: anchors sampled for the loss     R = B * S
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection import losses
from detection.anchors import AnchorGenerator
from detection.batch import Batch
from detection.boxes import BoxCoder, clip_boxes, grouped_nms, is_large_enough
from detection.matching import BalancedSampler, Matcher
from detection.recipes import recorded


@dataclass(frozen=True, slots=True)
class Proposals:
    """Regions of a batch, best first: boxes `(B, P, 4)` xyxy (0 if not valid), scores `(B, P)`, valid `(B, P)` bool."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor

    def trimmed(self) -> Proposals:
        """On a CPU without the places at the end that no image fills, each of which would cost as much as a proposal.

        On an accelerator nothing changes: it would have to stop and count.
        """
        if self.valid.device.type != "cpu":
            return self
        places = max(1, int(self.valid.sum(dim=1).max()))
        return Proposals(self.boxes[:, :places], self.scores[:, :places], self.valid[:, :places])


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
        outputs = [self._read(self.conv(feature)) for feature in features]
        return [logits.flatten(1) for logits, _ in outputs], [deltas.flatten(1, 3) for _, deltas in outputs]

    def at(self, features: Sequence[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor]:
        """The same for some of the anchors, `(B, S)` int64 into A: logits `(B, S)` and deltas `(B, S, 4)`.

        The convolutions run on the surroundings of these cells alone. In training this makes the head's backward pass,
        a sixth of the whole step's arithmetic when it goes over all cells, next to nothing, with the same gradients.
        """
        reach = len(self.conv)  # cells that the convolutions see to each side
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        per_cell = self.bbox_pred.out_channels // 4
        level, row, column = _cells(anchors // per_cell, shapes)
        steps = torch.arange(-reach, reach + 1, device=anchors.device)
        rows, columns = row[..., None] + steps, column[..., None] + steps  # (B, S, k)
        patches, exists = features[0].new_zeros(()), torch.zeros(1, dtype=torch.bool, device=anchors.device)
        for i, (feature, (height, width)) in enumerate(zip(features, shapes, strict=True)):
            inside = [(at >= 0) & (at < n) for at, n in ((rows, height), (columns, width))]
            own = (inside[0][..., :, None] & inside[1][..., None, :]) & (level == i)[..., None, None]  # (B, S, k, k)
            image = torch.arange(len(feature), device=anchors.device)[:, None, None, None]
            cell = (image * height + rows[..., :, None]) * width + columns[..., None, :]
            values = F.embedding(torch.where(own, cell, 0).flatten(0, 1), feature.permute(0, 2, 3, 1).flatten(0, 2))
            own = own.flatten(0, 1)[..., None]  # (R, k, k, 1)
            patches, exists = patches + values * own, exists | own
        hidden = patches.permute(0, 3, 1, 2)  # (R, C, k, k)
        exists = exists.permute(0, 3, 1, 2)
        for layer in self.conv:
            conv: Any = layer[0]  # type: ignore[index]
            # Beyond the edge of a map each convolution reads zeros, not what the one before would give there.
            hidden, exists = F.relu(F.conv2d(hidden, conv.weight, conv.bias)), exists[..., 1:-1, 1:-1]
            hidden = hidden * exists
        logits, deltas = self._read(hidden)  # (R, 1, 1, K) and (R, 1, 1, K, 4)
        which = (anchors % per_cell).flatten()[:, None]
        logits = logits.flatten(1).gather(1, which).view(anchors.shape)
        deltas = deltas.flatten(1, 3).gather(1, which[..., None].expand(-1, -1, 4))
        return logits, deltas.view(*anchors.shape, 4)

    def _read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, h, w, K)` and deltas `(B, h, w, K, 4)` from a map behind the 3x3 convolutions."""
        logits = self.cls_logits(hidden).permute(0, 2, 3, 1)
        if self.softmax_objectness:
            background, foreground = logits.unflatten(-1, (-1, 2)).unbind(-1)
            logits = foreground - background
        return logits, self.bbox_pred(hidden).permute(0, 2, 3, 1).unflatten(-1, (-1, 4))


def _cells(cells: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Level, row and column of cells that are counted through all levels, finest first."""
    counts = [height * width for height, width in shapes]
    starts = torch.tensor([0, *counts], device=cells.device).cumsum(0)
    level = torch.bucketize(cells, starts[1:-1], right=True)
    within = cells - starts[level]
    width = torch.tensor([width for _, width in shapes], device=cells.device)[level]
    return level, within // width, within % width


class RegionProposalNetwork(nn.Module):
    """Scores all anchors, learns from a sample of them, and proposes the best after NMS.

    Args:
        anchor_generator: lays the anchors.
        head: feature maps -> objectness and deltas of all anchors, and, as `RPNHead.at`, of some.
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
        # Gradients come from the sampled anchors alone, which the head then looks at once more.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not with_losses):
            objectness, deltas = self.head(features)
        shapes = [(f.shape[-2], f.shape[-1]) for f in features]
        image_size = (batch.images.shape[-2], batch.images.shape[-1])
        anchors = self.anchor_generator(shapes, self.strides, image_size, features[0].device)
        proposals = self.propose(objectness, deltas, anchors, batch.image_sizes)
        if not with_losses:
            return proposals, {}
        return proposals, self.losses(features, torch.cat(anchors), batch)

    @torch.no_grad()
    def propose(
        self, objectness: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], image_sizes: Tensor
    ) -> Proposals:
        """The best anchors of each level, moved by their deltas, clipped, and thinned by NMS."""
        mode = "training" if self.training else "testing"
        boxes, logits, levels = [], [], []
        for level, (score, delta, anchor) in enumerate(zip(objectness, deltas, anchors, strict=True)):
            top_score, top = score.float().topk(torch.sym_min(self.pre_nms_top_n[mode], score.shape[1]), dim=1)
            boxes.append(self.box_coder.decode(delta.gather(1, top[..., None].expand(-1, -1, 4)), anchor[top]))
            logits.append(top_score)
            levels.append(torch.full_like(top, level))
        candidates = clip_boxes(torch.cat(boxes, dim=1), image_sizes)  # (B, T, 4)
        scores = torch.cat(logits, dim=1).sigmoid()
        # Boxes that are not finite (from diverged weights) fail the comparison too, and so never reach NMS.
        usable = is_large_enough(candidates, self.min_size) & (scores >= self.score_thresh)
        kept = self._suppress(candidates, scores, torch.cat(levels, dim=1), usable)
        ranked = torch.where(kept, scores, -1.0)
        best, order = ranked.topk(torch.sym_min(self.post_nms_top_n[mode], ranked.shape[1]), dim=1)
        valid = best >= 0
        proposals = candidates.gather(1, order[..., None].expand(-1, -1, 4))
        return Proposals(torch.where(valid[..., None], proposals, 0.0), best, valid)

    def _suppress(self, boxes: Tensor, scores: Tensor, levels: Tensor, usable: Tensor) -> Tensor:
        """Which of the candidates `(B, T)` survive NMS among those of their image and level, bool `(B, T)`."""
        images = torch.arange(len(boxes), device=boxes.device)[:, None]
        # Candidates that are not usable become points of no group, so that all shapes stay fixed.
        groups = torch.where(usable, images * len(self.strides) + levels, -1)
        points = torch.where(usable[..., None], boxes, 0.0)
        keep = grouped_nms(points.flatten(0, 1), scores.flatten(), groups.flatten(), self.nms_thresh)
        survives = torch.zeros(usable.numel(), dtype=torch.bool, device=boxes.device)
        return survives.scatter_(0, keep, True).view_as(usable) & usable

    def losses(self, features: Sequence[Tensor], anchors: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`loss_objectness` and `loss_rpn_box_reg` over a sample of the anchors.

        Args:
            features: maps of all levels.
            anchors: `(A, 4)`.
            batch: for its ground truth.
        """
        matched_idxs = self.matcher.match(batch.gt_boxes, batch.gt_valid, anchors)  # (B, A)
        labels = torch.where(matched_idxs >= 0, 1, torch.where(matched_idxs == -1, 0, -1))
        sampled, valid = self.sampler(labels)  # (B, S)
        logits, deltas = self.head.at(features, sampled)  # type: ignore[operator]
        matched = matched_idxs.gather(1, sampled)
        foreground = ((matched >= 0) & valid).flatten()
        index = matched.clamp(min=0)[..., None].expand(-1, -1, 4)
        gt_boxes, sampled_anchors = batch.gt_boxes.gather(1, index), anchors[sampled]
        if self.overlap_loss is not None:
            boxes = self.box_coder.decode(deltas, sampled_anchors)
            box_loss = self.overlap_loss(boxes.flatten(0, 1), gt_boxes.flatten(0, 1), foreground, valid.flatten())
        else:
            gt_deltas = self.box_coder.encode(gt_boxes, sampled_anchors).flatten(0, 1)
            box_loss = losses.box_loss(deltas.flatten(0, 1), gt_deltas, foreground, valid.flatten(), self.box_beta)
        objects = losses.objectness_loss(logits.flatten(), foreground, valid.flatten())
        return {"loss_objectness": objects, "loss_rpn_box_reg": box_loss}
