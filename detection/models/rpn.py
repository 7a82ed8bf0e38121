"""Region proposal network: where objects may be, from every anchor of every level.

Faster R-CNN (Ren et al. 2015), section 3.1.

Shape shorthand:
    B: images     L: levels     C: channels     h, w: cells of a level     k: anchors a cell
    A: anchors of all levels     T: anchors kept before NMS     P: proposals kept after it
    G: ground truth boxes an image     S: anchors sampled for the loss     R = B * S
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detection import losses
from detection.anchors import Anchors, chosen_anchors
from detection.batch import Batch
from detection.boxes import BoxCoder, clip_boxes, grouped_nms, is_large_enough
from detection.fitting import PartError, check_training, expect, finish, name_of, run
from detection.matching import BalancedSampler, Matcher, draw, spare_ignored
from detection.parts import Factory2, FeatureMaps, Losses, Proposals
from detection.recipes import recorded


@recorded
class RPNHead(nn.Module):
    """A 3x3 convolution shared by all levels, then 1x1 convolutions for objectness and for box deltas.

    Args:
        in_channels: channels of the feature maps.
        num_anchors: k.
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

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps `(B, C, h, w)` of each level -> objectness logits `(B, k, h, w)` and deltas `(B, k * 4, h, w)`."""
        outputs = [self.read(self.conv(feature)) for feature in maps]
        return [logits for logits, _ in outputs], [deltas for _, deltas in outputs]

    def read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, k, h, w)` and deltas `(B, k * 4, h, w)` from a map behind the 3x3 convolutions."""
        logits = self.cls_logits(hidden)
        if self.softmax_objectness:
            background, foreground = logits.unflatten(1, (-1, 2)).unbind(2)
            logits = foreground - background
        return logits, self.bbox_pred(hidden)


@recorded
class RegionProposalNetwork(nn.Module):
    """Scores all anchors, learns from a sample of them, and proposes the best after NMS.

    Args:
        in_channels: channels of the feature maps.
        strides: of the levels.
        anchor_generator: default: `anchors.default_anchors`.
        head: see `parts.RPNHeadPart`; default: `RPNHead`.
        fg_iou_thresh, bg_iou_thresh: an anchor with IoU >= fg trains as object, < bg as background.
        batch_size_per_image, positive_fraction: the sample that the losses see (section 3.1.3).
        pre_nms_top_n: anchors of each level that go into NMS, `{"training": n, "testing": n}`.
        post_nms_top_n: proposals of each image that come out, likewise.
        nms_thresh: IoU above which NMS drops the worse box; levels do not suppress each other.
        score_thresh: proposals have an objectness >= this, in [0, 1].
        matcher, sampler: in the place of those that the thresholds and numbers above describe.
        box_coder: default: `BoxCoder()`.
        objectness_loss, box_loss: default: `losses.objectness_loss`, `SmoothL1Loss()`.
    """

    min_size = 1e-3  # pixels: proposals have sides >= this

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        anchor_generator: Anchors = None,
        head: nn.Module | Factory2 | None = None,
        fg_iou_thresh: float = 0.7,
        bg_iou_thresh: float = 0.3,
        batch_size_per_image: int = 256,
        positive_fraction: float = 0.5,
        pre_nms_top_n: Mapping[str, int] = {"training": 2000, "testing": 1000},
        post_nms_top_n: Mapping[str, int] = {"training": 2000, "testing": 1000},
        nms_thresh: float = 0.7,
        score_thresh: float = 0.0,
        matcher: Callable[..., Any] | None = None,
        sampler: Callable[..., Any] | None = None,
        box_coder: Any = None,
        objectness_loss: Callable[..., Any] | None = None,
        box_loss: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.anchor_generator = chosen_anchors(anchor_generator, len(strides))
        num_anchors = self.anchor_generator.num_anchors_per_location()[0]
        self.head = finish("rpn_head", head or RPNHead, in_channels, num_anchors)
        self.matcher: Any = matcher or Matcher(fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches=True)
        self.sampler: Any = sampler or BalancedSampler(batch_size_per_image, positive_fraction)
        self.box_coder = box_coder or BoxCoder()
        self.objectness_loss = objectness_loss or losses.objectness_loss
        self.box_loss = box_loss or losses.SmoothL1Loss()
        self.pre_nms_top_n, self.post_nms_top_n = dict(pre_nms_top_n), dict(post_nms_top_n)
        self.nms_thresh, self.score_thresh = nms_thresh, score_thresh
        self.nms: Callable[..., Tensor] = grouped_nms
        # Other libraries' rules, which `detection.interop.semantics` sets.
        self.counted_rows: Callable[..., Tensor] = losses.sampled_rows
        self.candidates: Callable[..., Tensor] | None = None

    def forward(self, features: FeatureMaps, batch: Batch, with_losses: bool) -> tuple[Proposals, Losses]:
        """Proposals from all levels and, if asked for, `loss_objectness` and `loss_rpn_box_reg`.

        Gradients flow through the losses only: proposals are detached (section 3.2, approximate joint training).
        """
        objectness, by_level = self.predict(features, with_losses)
        deltas, anchors = torch.cat(by_level, 1), torch.cat(self.lay_anchors(features, batch))
        proposals = self.propose(objectness, deltas, anchors, batch.image_sizes)
        if not with_losses:
            return proposals, {}
        return proposals, self.losses(features, torch.cat(objectness, 1), deltas, anchors, batch)

    def predict(self, features: FeatureMaps, with_losses: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness logits `(B, h * w * k)` and deltas `(B, h * w * k, 4)` of each level, in the anchors' order."""
        objectness, deltas = self.head(list(features.maps))
        return [x.permute(0, 2, 3, 1).flatten(1) for x in objectness], [
            x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for x in deltas
        ]

    def lay_anchors(self, features: FeatureMaps, batch: Batch) -> list[Tensor]:
        """The anchors `(h * w * k, 4)` of each level."""
        shapes = [(m.shape[-2], m.shape[-1]) for m in features.maps]
        image_size = (batch.images.shape[-2], batch.images.shape[-1])
        return self.anchor_generator(shapes, features.strides, image_size, features.maps[0].device)

    @torch.no_grad()
    def propose(self, objectness: Sequence[Tensor], deltas: Tensor, anchors: Tensor, image_sizes: Tensor) -> Proposals:
        """The best anchors of each level, moved by their deltas and clipped, then the best of them after NMS.

        Args:
            objectness: logits `(B, h * w * k)` of each level.
            deltas: `(B, A, 4)`.
            anchors: `(A, 4)`.
            image_sizes: `(B, 2)` as (height, width).
        """
        mode = "training" if self.training else "testing"
        logits, picks, levels, first = [], [], [], 0
        for level, score in enumerate(objectness):
            best, top = self.best(score.float(), self.pre_nms_top_n[mode])
            logits.append(best)
            picks.append(top + first)
            levels.append(torch.full_like(top, level))
            first += score.shape[1]
        picked, scores = torch.cat(picks, dim=1), torch.cat(logits, dim=1).sigmoid()  # (B, T)
        boxes = self.box_coder.decode(deltas.gather(1, picked[..., None].expand(-1, -1, 4)), anchors[picked])
        candidates = clip_boxes(boxes, image_sizes)
        # Boxes that are not finite, from diverged weights, fail the comparison too. NMS would be wrong with them.
        usable = is_large_enough(candidates, self.min_size) & (scores >= self.score_thresh)
        kept = self.suppress(candidates, scores, torch.cat(levels, dim=1), usable)
        ranked = torch.where(kept, scores, -1.0)
        best, order = self.best(ranked, self.post_nms_top_n[mode])
        valid = best >= 0
        proposals = candidates.gather(1, order[..., None].expand(-1, -1, 4))
        return Proposals(torch.where(valid[..., None], proposals, 0.0), best, valid)

    def best(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The highest `count` scores of each image, or all if there are fewer, and where they are: `(B, T)` each."""
        return scores.topk(min(count, scores.shape[1]), dim=1)

    def suppress(self, boxes: Tensor, scores: Tensor, levels: Tensor, usable: Tensor) -> Tensor:
        """NMS among the candidates of each image and level: which are kept, bool `(B, T)`.

        Args:
            boxes: `(B, T, 4)`.
            scores, levels: `(B, T)`.
            usable: `(B, T)` bool; the others are dropped.
        """
        num_levels = len(self.anchor_generator.num_anchors_per_location())
        images = torch.arange(len(boxes), device=boxes.device)[:, None]
        # Candidates that are not usable are padding to NMS, so that all shapes are fixed.
        groups = torch.where(usable, images * num_levels + levels, -1)
        points = torch.where(usable[..., None], boxes, 0.0)
        keep = self.nms(points.flatten(0, 1), scores.flatten(), groups.flatten(), self.nms_thresh)
        survives = torch.zeros(usable.numel(), dtype=torch.bool, device=boxes.device)
        return survives.scatter_(0, keep, True).view_as(usable) & usable

    def losses(
        self, features: FeatureMaps, objectness: Tensor, deltas: Tensor, anchors: Tensor, batch: Batch
    ) -> Losses:
        """`loss_objectness` and `loss_rpn_box_reg` over a sample of the anchors (section 3.1.2, equation 1).

        Both sums are divided by the number of sampled anchors of the batch, background included (`counted_rows`).

        Args:
            features: of the backbone.
            objectness: logits `(B, A)` of all levels.
            deltas: `(B, A, 4)`, likewise.
            anchors: `(A, 4)`.
            batch: for its ground truth.
        """
        usable = None if self.candidates is None else self.candidates(anchors, batch.image_sizes)
        boxes = anchors if usable is None else torch.where(usable[..., None], anchors, 0.0)  # (A, 4) or (B, A, 4)
        matched_idxs = self.matcher(batch.gt_boxes, batch.gt_valid, boxes)  # (B, A)
        matched_idxs = spare_ignored(matched_idxs, anchors, batch.gt_ignored)
        labels = torch.where(matched_idxs >= 0, 1, torch.where(matched_idxs == -1, 0, -1))
        labels = labels if usable is None else torch.where(usable, labels, -1)
        if batch.labelled is not None:
            labels = self.spare_unlabelled(labels, objectness, batch.labelled)
        sampled, valid = draw(self.sampler, labels, lambda: self._hardness(objectness, labels), boxes, batch)  # (B, S)
        logits, deltas = self.take(features, objectness, deltas, sampled)
        matched = matched_idxs.gather(1, sampled)
        foreground = ((matched >= 0) & valid).flatten()
        gt_boxes = batch.gt_boxes.gather(1, matched.clamp(min=0)[..., None].expand(-1, -1, 4)).flatten(0, 1)
        boxes = losses.box_loss_of_foreground(
            self.box_loss, deltas.flatten(0, 1), anchors[sampled].flatten(0, 1), gt_boxes, foreground, self.box_coder
        )
        rows = self.counted_rows(foreground.view_as(valid), valid)
        objects = self.objectness_loss(logits.flatten().float(), foreground.float())
        return {
            "loss_objectness": losses.mean_over(objects, valid.flatten(), rows),
            "loss_rpn_box_reg": losses.mean_over(boxes, foreground, rows),
        }

    def spare_unlabelled(self, labels: Tensor, objectness: Tensor, labelled: Tensor) -> Tensor:
        """The labels `(B, A)` without background that may be an object of a class that nobody looked for: -1.

        Which background that is, the RPN says itself: in images where not every class is labelled, anchors with an
        objectness >= 0.5 are no background. It learns from the others, and from the foreground of all images. To draw
        no background at all of such images would leave none in LVIS, where every image is one. On drawn images AP was
        42.0 so, 41.1 without their background, and 40.8 with all of it.

        Args:
            labels: 1 for foreground, 0 for background, -1 for neither.
            objectness: logits `(B, A)`.
            labelled: `(B, C)` bool, see `Batch`.
        """
        likely = ~labelled.all(dim=1, keepdim=True) & (objectness.detach() >= 0)
        return torch.where(likely & (labels == 0), -1, labels)

    def take(self, features: FeatureMaps, objectness: Tensor, deltas: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, S)` and deltas `(B, S, 4)` of the sampled anchors, with their gradients.

        Args:
            features: of the backbone, for those who compute anew.
            objectness, deltas: of all anchors, `(B, A)` and `(B, A, 4)`.
            sampled: `(B, S)` int64 into A.
        """
        return objectness.gather(1, sampled), deltas.gather(1, sampled[..., None].expand(-1, -1, 4))

    @torch.no_grad()
    def _hardness(self, objectness: Tensor, labels: Tensor) -> Tensor:
        """The objectness loss of each anchor, `(B, A)`."""
        return self.objectness_loss(objectness.flatten().float(), (labels > 0).flatten().float()).view_as(labels)

    def check(self, features: FeatureMaps) -> None:
        """Run head and anchors once on features `(1, C, h, w)`; see `detection.fitting`.

        Raises:
            PartError: it does not keep its contract, or there are not as many anchor sizes as levels.
        """
        per_cell = self.anchor_generator.num_anchors_per_location()
        if len(per_cell) != len(features.maps) or len(set(per_cell)) != 1:
            raise PartError(
                f"rpn_anchor_generator: it lays {per_cell} anchors a cell on {len(per_cell)} levels, but the backbone "
                f"gives {len(features.maps)} feature maps: give as many sizes as levels, and as many on each"
            )
        given = run("rpn_head", self.head, "__call__", list(features.maps))
        lists = given if isinstance(given, tuple | list) and len(given) == 2 else ()
        if not lists or any(not isinstance(x, tuple | list) or len(x) != len(features.maps) for x in lists):
            raise PartError(
                f"rpn_head: {name_of(self.head)} must give a list of logits and a list of deltas, one of each for each "
                f"of the {len(features.maps)} maps"
            )
        for feature, logits, delta in zip(features.maps, *lists, strict=True):
            size = tuple(feature.shape[-2:])
            expect("rpn_head", self.head, "objectness logits", logits, (1, per_cell[0], *size))
            expect("rpn_head", self.head, "box deltas", delta, (1, 4 * per_cell[0], *size))
        shapes = [(m.shape[-2], m.shape[-1]) for m in features.maps]
        image_size = tuple(side * features.strides[0] for side in shapes[0])
        device, part = features.maps[0].device, self.anchor_generator
        laid = run("rpn_anchor_generator", part, "__call__", shapes, features.strides, image_size, device)
        for (height, width), anchors in zip(shapes, laid, strict=True):
            expect("rpn_anchor_generator", part, "anchors", anchors, (height * width * per_cell[0], 4))
        two = features.maps[0].new_zeros(2, dtype=torch.float32)
        check_training("rpn_", self, self.objectness_loss, two, two)
