"""Where the cells of a predicted mask lie in its box: what they should predict, and what they say of the image.

Mask R-CNN (He et al. 2017), section 3.

Shape shorthand:
    B: images     M: regions of an image that the mask branch sees     G: ground truth objects an image
    D: masks     m: side of a predicted mask (28)     h, w: height and width of a stored mask, or of a window
    H, W: an image's height and width
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torchvision  # noqa: F401 (its operators)
from torch import Tensor
from torch.nn import functional as F

from detection.parts import MaskGridPart
from detection.recipes import recorded

Window = tuple[slice, slice, Tensor]


@recorded
class MaskGrid:
    """The m x m cells fill the box, edge to edge, and have their values at their centres, as pixels have theirs.

    As Detectron2 and MMDetection have it. In training a cell is 1 where the object covers at least half of it.
    """

    def targets(self, gt_masks: Tensor, windows: Tensor, index: Tensor, boxes: Tensor, side: int) -> Tensor:
        """Aligned RoI Align with as many samples as a cell has pixels; 1.0 where it gives >= 0.5, else 0.0."""
        return (_sample(gt_masks, windows, index, boxes, side, aligned=True) >= 0.5).float()

    def windows(self, probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[Window]:
        """Pixels whose centres lie in the box, each with the bilinear value of the mask there; outside of it are zeros.

        So a mask fades within half a cell of its box's edge, and at the edge it has half of its value.
        """
        xs, ys = (
            (torch.arange(length, device=boxes.device) + 0.5 - low[:, None]) / (high - low)[:, None] * 2 - 1
            for length, low, high in ((size[1], boxes[:, 0], boxes[:, 2]), (size[0], boxes[:, 1], boxes[:, 3]))
        )
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            left, top = max(math.ceil(x1 - 0.5), 0), max(math.ceil(y1 - 0.5), 0)
            right = max(min(math.floor(x2 + 0.5), size[1]), left)
            bottom = max(min(math.floor(y2 + 0.5), size[0]), top)
            values = probabilities.new_zeros((bottom - top, right - left))
            if values.numel():
                places = xs[i, None, left:right].expand_as(values), ys[i, top:bottom, None].expand_as(values)
                grid = torch.stack(places, dim=-1)[None]
                values = F.grid_sample(probabilities[i, None, None], grid, align_corners=False)[0, 0]
            yield slice(top, bottom), slice(left, right), values

    def inside(self, probabilities: Tensor) -> Tensor:
        """Where an object is: from 0.5 on, bool."""
        return probabilities >= 0.5


@recorded
class TorchvisionMaskGrid:
    """As torchvision has it: pixel for pixel in the image, to the last bit in training.

    In training the value of pixel i is taken to lie at i, not at i + 0.5 (RoI Align without `aligned`), so targets are
    half a pixel off, and those on the edge of an object lie between 0 and 1. In the image the corners of the box are
    cut down to whole pixels, which makes small objects too large: of 12 pixels by a fifth of their area.
    """

    def targets(self, gt_masks: Tensor, windows: Tensor, index: Tensor, boxes: Tensor, side: int) -> Tensor:
        """RoI Align that is not aligned, in [0, 1]."""
        return _sample(gt_masks, windows, index, boxes, side, aligned=False)

    def windows(self, probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[Window]:
        """A mask gets a border of one empty cell, and its box grows by that border, and is cut to whole pixels."""
        border, side = F.pad(probabilities, (1, 1, 1, 1)), probabilities.shape[-1]
        centre, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((side + 2) / side)
        corners = torch.cat((centre - half, centre + half), dim=1).to(torch.int64).tolist()
        for mask, (x1, y1, x2, y2) in zip(border, corners, strict=True):
            shape = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
            resized = F.interpolate(mask[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0]
            left, top = max(x1, 0), max(y1, 0)
            right, bottom = max(min(x2 + 1, size[1]), left), max(min(y2 + 1, size[0]), top)
            yield slice(top, bottom), slice(left, right), resized[top - y1 : bottom - y1, left - x1 : right - x1]

    def inside(self, probabilities: Tensor) -> Tensor:
        """Where an object is: above 0.5, bool."""
        return probabilities > 0.5


def paste_masks(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], grid: MaskGridPart) -> Tensor:
    """Lay predicted masks on the image.

    Args:
        probabilities: `(D, m, m)`.
        boxes: `(D, 4)` xyxy in pixels of the image.
        size: (height, width).
        grid: says where the cells lie.

    Returns:
        `(D, 1, H, W)` float32 probabilities, 0 outside of the window that the grid gives.
    """
    laid = probabilities.new_zeros((len(probabilities), 1, *size))
    for i, (rows, columns, values) in enumerate(grid.windows(probabilities, boxes, size)):
        laid[i, 0, rows, columns] = values
    return laid


def _sample(gt_masks: Tensor, windows: Tensor, index: Tensor, boxes: Tensor, side: int, aligned: bool) -> Tensor:
    """The masks of the regions' objects, sampled by RoI Align inside the regions' boxes, see `MaskGridPart.targets`."""
    masks, rows = gt_masks.flatten(0, 1)[:, None].float() / 255, index.clamp(min=0)
    window = windows.flatten(0, 1)[rows]  # (B, M, 4)
    extent = window[..., 2:] - window[..., :2]
    # A number divided by a tensor would be its reciprocal times the number, which is not the same to the last bit.
    cells = torch.stack([torch.full_like(extent[..., 0], side) for side in masks.shape[:-3:-1]], dim=-1)
    scale = (cells / extent).repeat(1, 1, 2)
    # Not aligned, the shift is half a pixel of the image, and not of the smaller mask, as torchvision's masks have the
    # image's size.
    offset = 0.0 if aligned else 0.5
    shift = (offset - window[..., :2].repeat(1, 1, 2)) * scale - offset
    placed = torch.where(index[..., None] >= 0, boxes * scale + shift, 0.0)
    rois = torch.cat((rows[..., None].to(placed), placed), dim=-1).flatten(0, 1)
    # The operator itself: `roi_align` leaves it under deterministic algorithms, for the sake of a gradient.
    sampled: Tensor = torch.ops.torchvision.roi_align(masks, rois, 1.0, side, side, 0, aligned)
    return sampled[:, 0].view(*index.shape, side, side)
