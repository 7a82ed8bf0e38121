"""Box arithmetic: areas, IoU, clipping, resizing, the box coder and non-maximum suppression.

Shape shorthand:
    N, M: boxes     B: images     ...: any leading dimensions (images, classes)
Boxes are `(x1, y1, x2, y2)` pixels with x2 > x1 and y2 > y1; widths are `x2 - x1`, without the legacy "+1".
Everything here runs in float32, whatever the precision of the network around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from detection.recipes import recorded

PAIRS_OF_A_CALL = 16_000  # that NMS on a CPU compares in the time that a call of it takes besides
BLOCK = 128  # boxes whose overlap with all others NMS on a CPU computes at once
FEWEST_IN_BLOCKS = 200  # with fewer the kernel is quicker


def box_area(boxes: Tensor) -> Tensor:
    """Area in square pixels of boxes `(..., N, 4)` -> `(..., N)`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair: `(..., N, 4)` and `(..., M, 4)` -> `(..., N, M)` float32 in [0, 1].

    Leading dimensions broadcast. Two boxes without area have IoU 0 (not NaN).
    """
    # Each coordinate is a contiguous tensor of its own: loops over four interleaved ones would not be vectorised.
    ax1, ay1, ax2, ay2 = boxes1.float().movedim(-1, 0).contiguous()[..., :, None]
    bx1, by1, bx2, by2 = boxes2.float().movedim(-1, 0).contiguous()[..., None, :]
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0)
    intersection = width.mul_(height)
    areas = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)
    return intersection.div_(areas.sub_(intersection).clamp_(min=torch.finfo(torch.float32).tiny))


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes `(..., N, 4)` to images of `sizes` `(..., 2)`, (height, width) in pixels: 0 <= x <= width."""
    height, width = sizes[..., 0, None].to(boxes.dtype), sizes[..., 1, None].to(boxes.dtype)
    limit = torch.stack((width, height, width, height), dim=-1)
    return torch.minimum(boxes.clamp(min=0), limit)


def resize_boxes(boxes: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Scale boxes `(..., N, 4)` from images of size `old` to size `new`, both `(..., 2)` as (height, width)."""
    ratio = new.to(torch.float32) / old.to(torch.float32)
    width_first = ratio.flip(-1)
    return boxes * torch.cat((width_first, width_first), dim=-1).unsqueeze(-2)


def resize_keypoints(keypoints: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Scale key points `(..., k, 3)` x, y and a third value that stays, from images of size `old` to `new`, `(2,)`."""
    ratio = new.to(torch.float32) / old.to(torch.float32)
    return torch.cat((keypoints[..., :2] * ratio.flip(-1), keypoints[..., 2:]), dim=-1)


def resize_detection(detection: dict[str, Tensor], old: Tensor, new: Tensor) -> None:
    """Scale the boxes and key points of one image, in place, from images of size `old` to `new`, both `(2,)`."""
    for name, resize in (("boxes", resize_boxes), ("keypoints", resize_keypoints)):
        if name in detection:
            detection[name] = resize(detection[name], old, new)


def is_large_enough(boxes: Tensor, min_size: float) -> Tensor:
    """Which boxes `(..., N, 4)` have both sides >= `min_size` pixels -> bool `(..., N)`."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides >= min_size).all(dim=-1)


@recorded
class BoxCoder:
    """Boxes as deltas against reference boxes (anchors or proposals), and back.

    R-CNN (Girshick et al. 2014), appendix C, equations 6-9 and 1-4: offsets of the centre in units of the reference's
    size, and log ratios of the sizes, each times a weight that brings its variance near 1.

    Args:
        weights: factors on (dx, dy, dw, dh): 1 for the RPN, (10, 10, 5, 5) for the box head.
        max_log_ratio: upper bound of dw and dh when decoding, so that `exp` can't overflow. A box grows at most
            1000 / 16 times, from the smallest useful anchor to a large image.
        min_log_ratio: lower bound, below 0; MMDetection has the negative of the upper one. Default: none.
    """

    def __init__(
        self,
        weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        max_log_ratio: float = math.log(1000.0 / 16),
        min_log_ratio: float | None = None,
    ) -> None:
        self.weights = tuple(weights)
        self.max_log_ratio, self.min_log_ratio = max_log_ratio, min_log_ratio

    def encode(self, gt_boxes: Tensor, boxes: Tensor) -> Tensor:
        """Deltas `(..., N, 4)` that turn `boxes` `(..., N, 4)` into `gt_boxes` `(..., N, 4)`, pixels.

        A ground truth without width or height gives -inf: such boxes must have been removed before.
        """
        gt_centre, gt_size = _centre_and_size(gt_boxes.float())
        centre, size = _centre_and_size(boxes.float())
        shift = (gt_centre - centre) / size
        scale = torch.log(gt_size / size)
        return _in_columns(torch.mul, torch.cat((shift, scale), dim=-1), self.weights)

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes `(..., N, 4)` in pixels that `deltas` `(..., N, 4)` describe relative to `boxes` `(..., N, 4)`."""
        deltas = _in_columns(torch.div, deltas.float(), self.weights)
        centre, size = _centre_and_size(boxes.float())
        new_centre = deltas[..., :2] * size + centre
        half = 0.5 * torch.exp(deltas[..., 2:].clamp(self.min_log_ratio, self.max_log_ratio)) * size
        return torch.cat((new_centre - half, new_centre + half), dim=-1)


def _in_columns(operate: Callable[[Tensor, float], Tensor], rows: Tensor, numbers: Sequence[float]) -> Tensor:
    """Rows `(..., 4)`, each column by its number. As a tensor the numbers would be a copy that the host waits for."""
    if len(set(numbers)) == 1:
        return rows if numbers[0] == 1 else operate(rows, numbers[0])
    return torch.stack([operate(x, n) for x, n in zip(rows.unbind(-1), numbers, strict=True)], dim=-1)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
    """Non-maximum suppression inside each group: a box is compared with boxes of its own group alone.

    A box is dropped when its IoU with a better box of its group is above (not equal to) `iou_thresh`. A group is a
    level (RPN) or a class (RoI heads) of one image, so that one call serves a whole batch.

    Args:
        boxes: `(N, 4)` float32.
        scores: `(N,)`.
        groups: `(N,)` int64, the number of each box's group, from 0 on. -1 marks padding, of which the result may or
            may not name rows: the caller leaves them out.
        iou_thresh: in [0, 1].

    Returns:
        `(M,)` int64 indices of the boxes that are kept, best score first.
    """
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups + 1).tolist()
    parts = [part for part in order.split(counts)[1:] if len(part)]

    if boxes.device.type == "cpu" and len(boxes) ** 2 < PAIRS_OF_A_CALL * len(parts):
        return nms_apart(boxes, scores, groups, iou_thresh)
    one = nms_in_blocks if boxes.device.type == "cpu" else nms
    found = [one(boxes[part], scores[part], iou_thresh) for part in parts]
    keep = torch.cat([part[rows] for part, rows in zip(parts, found, strict=True)]) if parts else order
    return keep[torch.argsort(scores[keep], descending=True, stable=True)]


@torch.no_grad()
def nms_in_blocks(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """`nms` on a CPU, where the kernel compares one pair of boxes after the other.

    The best boxes that are left are compared among themselves by the kernel, and those of them that stay with all
    others at once, so that many pairs are compared by each instruction.

    Args:
        boxes: `(N, 4)`.
        scores: `(N,)`.
        iou_thresh: in [0, 1].

    Returns:
        `(M,)` int64 indices of the boxes that are kept, best score first.
    """
    if len(boxes) < FEWEST_IN_BLOCKS:
        kept: Tensor = nms(boxes, scores, iou_thresh)
        return kept
    left = torch.argsort(scores, descending=True, stable=True)
    sides = boxes[left].t().contiguous()
    descending, found = torch.arange(len(boxes), 0, -1, dtype=boxes.dtype), []
    while True:
        count = BLOCK if len(left) > FEWEST_IN_BLOCKS else len(left)
        best, sides = sides[:, :count], sides[:, count:]
        # Without the function around it, which takes a sixth of so small a call.
        stay = torch.ops.torchvision.nms(best.t(), descending[:count], iou_thresh)
        found.append(left[stay])
        if not sides.shape[1]:
            return torch.cat(found)
        alive = (pairwise_iou(best[:, stay].t(), sides.t()).amax(0) > iou_thresh).logical_not_().nonzero()[:, 0]
        left, sides = left[count:][alive], sides[:, alive]


def nms_apart(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
    """As `grouped_nms` in one call of the kernel: each group is moved so far that no two of them overlap.

    For accelerators, which wait between calls. A CPU's kernel is quadratic in the number of boxes, so that each group
    by itself is faster there, unless there are many small ones.
    """
    # In float32 the boxes of the last of a thousand groups would be off by a tenth of a pixel.
    exact = torch.float32 if boxes.device.type == "mps" else torch.float64
    boxes, scores = boxes.to(exact), scores.to(exact)
    extent = boxes.amax() - boxes.amin() + 1 if boxes.numel() else boxes.new_zeros(())
    return nms(boxes + (groups.to(boxes) * extent)[:, None], scores, iou_thresh)


def soft_nms(boxes: Tensor, scores: Tensor, groups: Tensor, sigma: float, count: int) -> tuple[Tensor, Tensor]:
    """Soft-NMS (Bodla et al. 2017, equation 4): no box is dropped, but overlap with better boxes lowers its score.

    Each step takes the best box that is left, and multiplies the scores of the others of its group by
    exp(-IoU^2 / sigma).

    Args:
        boxes: `(B, N, 4)` float32.
        scores: `(B, N)`, not negative; 0 for padding.
        groups: `(B, N)` int64; boxes of different groups have no effect on each other.
        sigma: above 0; 0.5 in the paper.
        count: how many boxes are taken.

    Returns:
        `(B, min(count, N))` int64 indices into N, best first, and their lowered scores.
    """
    scores, rows = scores.clone(), torch.arange(len(boxes), device=boxes.device)
    taken, values = [], []
    for _ in range(min(count, scores.shape[1])):
        value, best = scores.max(dim=1)
        iou = pairwise_iou(boxes[rows, best][:, None], boxes)[:, 0]
        fades = torch.where(groups == groups[rows, best][:, None], torch.exp(-iou.square() / sigma), 1.0)
        scores = (scores * fades).scatter(1, best[:, None], -1.0)  # taken: below all others, 0 included
        taken.append(best)
        values.append(value)
    if not taken:
        return groups[:, :0], scores[:, :0]
    return torch.stack(taken, dim=1), torch.stack(values, dim=1)
