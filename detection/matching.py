"""Which boxes train on what: the matcher (IoU -> assignment) and the sampler (assignment -> mini-batch).

Shape shorthand:
    B: images     G: ground truth boxes an image, padded     A: anchors or proposals an image     S: sampled ones
    I: ignore regions an image, padded
"""

from __future__ import annotations

import torch
from torch import Tensor

from detection.batch import Batch
from detection.boxes import pairwise_iou
from detection.parts import Hardness, Sampler
from detection.recipes import recorded

BELOW_LOW_THRESHOLD = -1
BETWEEN_THRESHOLDS = -2

# Elements of one block of an IoU matrix, 128 MB in float32: a batch with more is matched in blocks of anchors.
MAX_IOU_ELEMENTS = 32 * 1024 * 1024

# COCO does not count a detection at IoU .5 of which this share lies in a crowd; so it is not taught as background.
IGNORED_SHARE = 0.5


@recorded
class Matcher:
    """Assigns each anchor or proposal the ground truth box that it overlaps most.

    Faster R-CNN (Ren et al. 2015), section 3.1.2:
        best IoU >= fg_iou_thresh                    foreground: the index of that ground truth
        bg_iou_thresh <= best IoU < fg_iou_thresh    ignored: `BETWEEN_THRESHOLDS` (-2)
        best IoU < bg_iou_thresh                     background: `BELOW_LOW_THRESHOLD` (-1)
    With `allow_low_quality_matches` (rule (i) of the paper) the anchors with the highest IoU of each ground truth are
    foreground too, however low that IoU is, ties included. A ground truth that no anchor overlaps has none. Each such
    anchor is assigned the ground truth that it overlaps most itself, which may be another one.

    Args:
        fg_iou_thresh, bg_iou_thresh: see above.
        allow_low_quality_matches: true in the RPN, false in the RoI heads.

    Raises:
        ValueError: `bg_iou_thresh` is above `fg_iou_thresh`.
    """

    def __init__(self, fg_iou_thresh: float, bg_iou_thresh: float, allow_low_quality_matches: bool = False) -> None:
        if bg_iou_thresh > fg_iou_thresh:
            raise ValueError(f"bg_iou_thresh {bg_iou_thresh} is above fg_iou_thresh {fg_iou_thresh}")
        self.fg_iou_thresh = fg_iou_thresh
        self.bg_iou_thresh = bg_iou_thresh
        self.allow_low_quality_matches = allow_low_quality_matches

    def assign(self, iou: Tensor) -> Tensor:
        """Assignment from a matrix of IoU `(..., G, A)`, negative for padding of G -> `(..., A)` int64."""
        if iou.shape[-2] == 0:
            return iou.new_full((*iou.shape[:-2], iou.shape[-1]), BELOW_LOW_THRESHOLD, dtype=torch.int64)
        best_iou, best_gt = iou.max(dim=-2)
        forced = self._is_best(iou, iou.amax(dim=-1)) if self.allow_low_quality_matches and iou.shape[-1] else None
        return self._assign(best_iou, best_gt, forced)

    def __call__(self, gt_boxes: Tensor, gt_valid: Tensor, boxes: Tensor) -> Tensor:
        """Assignment of boxes to the ground truth of their image, in blocks of a bounded size.

        Args:
            gt_boxes: `(B, G, 4)` xyxy.
            gt_valid: `(B, G)` bool, False for padding.
            boxes: `(A, 4)`, the same for all images, or `(B, A, 4)`.

        Returns:
            `(B, A)` int64: an index into G, or one of the two negative constants.
        """
        padding = 2.0 * ~gt_valid[..., None]  # taken off, it leaves less than any IoU

        def overlap(block: Tensor) -> Tensor:
            return pairwise_iou(gt_boxes, block).sub_(padding)

        blocks = _blocks(gt_valid, boxes)
        if len(blocks) == 1:
            return self.assign(overlap(boxes))
        # The best IoU of a ground truth is known only after all blocks, so low-quality matches take a second pass.
        peak = torch.stack([overlap(block).amax(dim=-1) for block in blocks]).amax(dim=0)
        assigned = []
        for block in blocks:
            iou = overlap(block)
            best_iou, best_gt = iou.max(dim=-2)
            forced = self._is_best(iou, peak) if self.allow_low_quality_matches else None
            assigned.append(self._assign(best_iou, best_gt, forced))
        return torch.cat(assigned, dim=-1)

    def _is_best(self, iou: Tensor, peak: Tensor) -> Tensor:
        # No difference is above 0, so the largest is 0 where an anchor reaches a peak. `any` would not be vectorised.
        reached = torch.where(peak > 0, peak, torch.inf)
        return (iou - reached[..., None]).amax(dim=-2) == 0

    def _assign(self, best_iou: Tensor, best_gt: Tensor, forced: Tensor | None) -> Tensor:
        foreground = best_iou >= self.fg_iou_thresh
        if forced is not None:
            foreground = foreground | forced
        unmatched = torch.where(best_iou < self.bg_iou_thresh, BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS)
        return torch.where(foreground, best_gt, unmatched)


def _blocks(gt_valid: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
    """The boxes `(..., A, 4)` in parts whose IoU with the ground truth is no larger than `MAX_IOU_ELEMENTS`."""
    return boxes.split(max(1, MAX_IOU_ELEMENTS // max(1, gt_valid.numel())), dim=-2)


def best_overlaps(gt_boxes: Tensor, gt_valid: Tensor, boxes: Tensor) -> Tensor:
    """The highest IoU of each box with the ground truth of its image, `(B, A)`, 0 where there is none.

    Args:
        gt_boxes, gt_valid, boxes: as for `Matcher`.
    """
    if gt_boxes.shape[1] == 0:
        return boxes.new_zeros((len(gt_boxes), boxes.shape[-2]))
    exists = gt_valid[..., None]
    found = [torch.where(exists, pairwise_iou(gt_boxes, b), 0.0).amax(dim=-2) for b in _blocks(gt_valid, boxes)]
    return torch.cat(found, dim=-1)


def spare_ignored(matched_idxs: Tensor, boxes: Tensor, ignored: Tensor | None) -> Tensor:
    """An assignment in which no background lies in an ignore region: it becomes `BETWEEN_THRESHOLDS`.

    Args:
        matched_idxs: `(B, A)`, what a matcher gave.
        boxes: `(A, 4)` xyxy, the same for all images, or `(B, A, 4)`.
        ignored: `(B, I, 4)` xyxy, see `Batch.gt_ignored`. Inside is a box of which `IGNORED_SHARE` lies in one region.
    """
    if ignored is None:
        return matched_idxs
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    inside = torch.zeros_like(matched_idxs, dtype=torch.bool)
    for region in ignored.unbind(1):  # one by one: a matrix of all would be as large as that of the ground truth
        low = torch.maximum(boxes[..., :2], region[:, None, :2])
        high = torch.minimum(boxes[..., 2:], region[:, None, 2:])
        shared = (high - low).clamp(min=0).prod(dim=-1)
        inside |= (shared >= IGNORED_SHARE * area) & (shared > 0)
    return torch.where(inside & (matched_idxs == BELOW_LOW_THRESHOLD), BETWEEN_THRESHOLDS, matched_idxs)


@recorded
class BalancedSampler:
    """Draws a mini-batch of fixed size from each image, with at most a given share of foreground.

    Faster R-CNN, section 3.1.3. Background fills the places that foreground leaves. Where there is not enough of both,
    the last places are marked as not valid.

    Args:
        batch_size_per_image: anchors or proposals that are drawn of each image.
        positive_fraction: the largest share of foreground, in [0, 1].
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.max_positive = int(batch_size_per_image * positive_fraction)

    def __call__(
        self, labels: Tensor, hardness: Hardness | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample from labels `(B, A)`: above 0 foreground, 0 background, below 0 never drawn.

        Returns:
            indices `(B, S)` int64 into A, foreground first, and which of them are valid, `(B, S)` bool, with
            S = min(batch_size_per_image, A).
        """
        foreground, background = labels > 0, labels == 0
        size = min(self.batch_size_per_image, labels.shape[-1])
        # Random keys and top-k in place of permuting lists of indices, whose lengths the host would have to wait for.
        key = torch.rand(labels.shape, device=labels.device, generator=generator)
        quota = min(self.max_positive, labels.shape[-1])
        order = torch.where(foreground, key, -1.0).topk(quota, dim=-1).indices
        chosen = torch.zeros_like(foreground).scatter_(-1, order, True) & foreground
        rank = torch.where(chosen, 2.0 + key, torch.where(background, key, -1.0))
        value, indices = rank.topk(size, dim=-1)
        return indices, value >= 0


@recorded
class HardExampleSampler:
    """Takes the regions with the largest loss, foreground or not: online hard example mining (Shrivastava et al. 2016).

    Section 4.1. The paper applies NMS to the regions first; here it is left out, as proposals have been through NMS.

    Args:
        batch_size_per_image: regions that are taken of each image; the paper has 128 of two images together.
    """

    def __init__(self, batch_size_per_image: int = 64) -> None:
        self.batch_size_per_image = self.max_positive = batch_size_per_image

    def __call__(self, labels: Tensor, hardness: Hardness) -> tuple[Tensor, Tensor]:
        """As `BalancedSampler`; what can be drawn is ranked by `hardness()`, `(B, A)`."""
        size = min(self.batch_size_per_image, labels.shape[-1])
        value, indices = torch.where(labels >= 0, hardness(), -torch.inf).topk(size, dim=-1)
        valid = value > -torch.inf
        foreground = (labels.gather(-1, indices) > 0) & valid
        order = (2 * foreground.int() + valid.int()).argsort(dim=-1, descending=True, stable=True)
        return indices.gather(-1, order), valid.gather(-1, order)


@recorded
class IoUBalancedSampler:
    """Draws background evenly over its overlap with objects (Libra R-CNN, Pang et al. 2019, section 3.1).

    Most background touches no object, most mistakes are made beside one. IoU from 0 to `max_iou` is divided into bins
    of one width, and each gives as many rows, drawn at random. Where a bin has too few, the others give more in turn.
    Foreground is drawn as by `BalancedSampler`.

    Args:
        batch_size_per_image, positive_fraction: as `BalancedSampler` has them.
        num_bins: 3 in the paper.
        max_iou: where the last bin ends: the IoU from which boxes are no background, 0.5 in the heads. What overlaps
            more, with an object that it was not assigned to, is in the last bin.
    """

    wants_overlaps = True

    def __init__(
        self, batch_size_per_image: int = 512, positive_fraction: float = 0.25, num_bins: int = 3, max_iou: float = 0.5
    ) -> None:
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        self.num_bins, self.max_iou = num_bins, max_iou
        self.max_positive = int(batch_size_per_image * positive_fraction)

    def __call__(self, labels: Tensor, hardness: Hardness, overlaps: Hardness) -> tuple[Tensor, Tensor]:
        """As `BalancedSampler`; `overlaps()` is the highest IoU of each row with an object, `(B, A)`."""
        foreground, background = labels > 0, labels == 0
        key = torch.rand(labels.shape, device=labels.device)
        quota = min(self.max_positive, labels.shape[-1])
        order = torch.where(foreground, key, -1.0).topk(quota, dim=-1).indices
        chosen = torch.zeros_like(foreground).scatter_(-1, order, True) & foreground
        bins = (overlaps() * (self.num_bins / self.max_iou)).long().clamp(max=self.num_bins - 1)
        bins = torch.where(background, bins, self.num_bins)
        # The place of each row among those of its bin, at random: 0, 1, 2, ... The first of all bins are drawn first.
        place = (bins + key).argsort(dim=-1).argsort(dim=-1)
        before = torch.stack([(bins < i).sum(dim=-1) for i in range(self.num_bins + 1)], dim=-1)
        turn = place - before.gather(-1, bins)
        rank = torch.where(chosen, 1.0, torch.where(background, -(turn + torch.rand_like(key)), -torch.inf))
        value, indices = rank.topk(min(self.batch_size_per_image, labels.shape[-1]), dim=-1)
        return indices, value > -torch.inf


def draw(sampler: Sampler, labels: Tensor, hardness: Hardness, boxes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """What a sampler draws, see `parts.Sampler`; one that `wants_overlaps` is given these too.

    Args:
        sampler, labels, hardness: see there.
        boxes: the anchors or proposals, `(A, 4)` or `(B, A, 4)`.
        batch: for its ground truth.
    """
    if getattr(sampler, "wants_overlaps", False):
        return sampler(labels, hardness, lambda: best_overlaps(batch.gt_boxes, batch.gt_valid, boxes))  # type: ignore[call-arg]
    return sampler(labels, hardness)
