"""The mask branch: which pixels of its box an object covers.

Mask R-CNN (He et al. 2017), section 3.

Shape shorthand:
    B: images     S: sampled regions an image     M: those of them that the branch sees     R = B * M
    D: detections an image     K: classes with background     G: ground truth objects an image
    C: channels     o: side of pooled features     m: side of a predicted mask (28)
    h, w: height and width of a stored mask     H, W: an image's height and width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection import losses
from detection.batch import Batch, pad_objects
from detection.models.pooling import align
from detection.parts import Detections, FeatureMaps, Losses
from detection.recipes import recorded


@recorded
class MaskHead(nn.Sequential):
    """3x3 convolutions over the pooled features (figure 4, right): `(R, C, o, o)` -> `(R, layers[-1], o, o)`.

    Args:
        in_channels: C.
        layers: channels of each convolution.
        batch_norm: normalise after each, as torchvision's v2 detector does.
    """

    def __init__(
        self, in_channels: int, layers: Sequence[int] = (256, 256, 256, 256), batch_norm: bool = False
    ) -> None:
        blocks = []
        for a, b in zip((in_channels, *layers), layers, strict=False):
            conv = nn.Conv2d(a, b, 3, padding=1, bias=not batch_norm)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            norm = [nn.BatchNorm2d(b)] if batch_norm else []
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            blocks.append(nn.Sequential(conv, *norm, nn.ReLU(inplace=True)))
        super().__init__(*blocks)
        self.out_channels = layers[-1]


@recorded
class MaskPredictor(nn.Module):
    """Twice the resolution, then one mask a class (figure 4, right): `(R, C, o, o)` -> logits `(R, K, 2o, 2o)`."""

    def __init__(self, in_channels: int, num_classes: int, hidden_channels: int = 256) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, hidden_channels, 2, stride=2)
        self.mask_fcn_logits = nn.Conv2d(hidden_channels, num_classes, 1)
        for layer in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        return self.mask_fcn_logits(F.relu(self.conv5_mask(features)))


class MaskBranch(nn.Module):
    """The mask branch of RoI heads. They inherit it, so that the `state_dict` has its keys beside theirs.

    Args:
        mask_roi_pool, mask_head, mask_predictor: see `detection.parts`; all None for heads that find boxes alone.
        mask_loss: default: `losses.mask_loss`.
    """

    def __init__(
        self,
        mask_roi_pool: nn.Module | None,
        mask_head: nn.Module | None,
        mask_predictor: nn.Module | None,
        mask_loss: Callable[..., Any] | None,
    ) -> None:
        super().__init__()
        self.mask_roi_pool, self.mask_head, self.mask_predictor = mask_roi_pool, mask_head, mask_predictor
        self.mask_loss = mask_loss or losses.mask_loss

    @property
    def has_masks(self) -> bool:
        """Whether detections get masks."""
        return self.mask_predictor is not None

    def mask_logits(self, features: FeatureMaps, boxes: Tensor, labels: Tensor) -> Tensor:
        """The mask of each region's own class: boxes `(B, M, 4)`, labels `(B, M)` -> logits `(B, M, m, m)` float32."""
        pooled = self.mask_roi_pool(features, boxes)  # type: ignore[misc]
        logits = self.mask_predictor(self.mask_head(pooled))  # type: ignore[misc]
        side = logits.shape[-1]
        own = logits.gather(1, labels.flatten()[:, None, None, None].expand(-1, 1, side, side))
        return own.float().view(*labels.shape, side, side)

    def mask_losses(
        self, features: FeatureMaps, boxes: Tensor, labels: Tensor, matched_idxs: Tensor, batch: Batch
    ) -> Losses:
        """`loss_mask`: the mean, over the foreground regions of the batch, of the loss of the true class's mask.

        Section 3: masks of other classes have no loss. Without a branch there is no loss.

        Args:
            features: as for the box head.
            boxes, labels, matched_idxs: `(B, M, ...)` of a `RoISample`, foreground first. Label 0 doesn't count.
            batch: for its masks.

        Raises:
            ValueError: the batch has no masks.
        """
        if not self.has_masks:
            return {}
        if batch.gt_masks is None or batch.gt_mask_windows is None:
            raise ValueError("the detector learns masks but there are none: give targets `masks`, or set data.masks")
        foreground = labels > 0
        logits = self.mask_logits(features, boxes, labels)
        with torch.no_grad():
            first = torch.arange(len(boxes), device=boxes.device)[:, None] * batch.gt_masks.shape[1]
            index = torch.where(foreground, first + matched_idxs, -1)
            wanted = project_masks(batch.gt_masks, batch.gt_mask_windows, index, boxes, logits.shape[-1])
        loss = self.mask_loss(logits.flatten(0, 1), wanted.flatten(0, 1))
        return {"loss_mask": losses.mean_over(loss, foreground.flatten(), foreground)}

    def add_masks(self, features: FeatureMaps, detections: Detections) -> Detections:
        """Detections, whose boxes are in pixels of the batch, with `masks` `(D, m, m)`: probabilities inside the box.

        Without a branch they come back as they are.
        """
        if not self.has_masks:
            return detections
        boxes, labels, _ = pad_objects(*([d[name] for d in detections] for name in ("boxes", "labels")))
        probabilities = self.mask_logits(features, boxes, labels).sigmoid()
        return [d | {"masks": p[: len(d["labels"])]} for d, p in zip(detections, probabilities, strict=True)]


def project_masks(gt_masks: Tensor, windows: Tensor, index: Tensor, boxes: Tensor, side: int) -> Tensor:
    """What each region should predict: the mask of its object, sampled by RoI Align inside the region's box.

    Args:
        gt_masks: `(B, G, h, w)` uint8, 255 inside.
        windows: `(B, G, 4)`, the part of the image that each mask shows, see `Batch`.
        index: `(B, M)` int64, the object of each region as its row among all `B * G`; -1 for none.
        boxes: `(B, M, 4)` of the regions, in pixels of the batch.
        side: m.

    Returns:
        `(B, M, m, m)` float32 in [0, 1].
    """
    masks, rows = gt_masks.flatten(0, 1)[:, None].float() / 255, index.clamp(min=0)
    window = windows.flatten(0, 1)[rows]  # (B, M, 4)
    extent = window[..., 2:] - window[..., :2]
    # A number divided by a tensor would be its reciprocal times the number, which is not the same to the last bit.
    cells = torch.stack([torch.full_like(extent[..., 0], side) for side in masks.shape[:-3:-1]], dim=-1)
    scale = (cells / extent).repeat(1, 1, 2)
    # torchvision takes the value of pixel i to lie at i, not at i + 0.5 (RoI Align without `aligned`), in masks of the
    # image's size. To give the same, the shift is half a pixel of the image, and not of the smaller mask.
    shift = (0.5 - window[..., :2].repeat(1, 1, 2)) * scale - 0.5
    placed = torch.where(index[..., None] >= 0, boxes * scale + shift, 0.0)
    rois = torch.cat((rows[..., None].to(placed), placed), dim=-1).flatten(0, 1)
    return align(masks, rois, side, 1.0)[:, 0].view(*index.shape, side, side)


def paste_masks(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Lay predicted masks on the image, as torchvision does, pixel for pixel.

    A mask gets a border of one empty cell, and its box grows by that border. The corners of the box are cut down to
    whole pixels, and the mask is resized to the box bilinearly.

    Args:
        probabilities: `(D, m, m)`.
        boxes: `(D, 4)` xyxy in pixels of the image.
        size: (height, width).

    Returns:
        `(D, 1, H, W)` float32 probabilities, 0 outside the box.
    """
    height, width = size
    laid = probabilities.new_zeros((len(probabilities), 1, height, width))
    if not len(probabilities):
        return laid
    border = F.pad(probabilities, (1, 1, 1, 1))
    side = probabilities.shape[-1]
    centre, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((side + 2) / side)
    corners = torch.cat((centre - half, centre + half), dim=1).to(torch.int64).tolist()
    for slot, mask, (x1, y1, x2, y2) in zip(laid[:, 0], border, corners, strict=True):
        w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
        resized = F.interpolate(mask[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0]
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, width), min(y2 + 1, height)
        if right > left and bottom > top:
            slot[top:bottom, left:right] = resized[top - y1 : bottom - y1, left - x1 : right - x1]
    return laid
