"""The mask branch: which pixels of its box an object covers.

Mask R-CNN (He et al. 2017), section 3.

Shape shorthand:
    B: images     S: sampled regions an image     M: those of them that the branch sees     R = B * M
    D: detections an image     K: classes with background
    C: channels     o: side of pooled features     m: side of a predicted mask (28)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection import losses
from detection.batch import Batch, pad_objects
from detection.mask_grid import MaskGrid
from detection.models.norms import NORM_LAYERS, Norm
from detection.parts import Detections, FeatureMaps, Losses, MaskGridPart
from detection.recipes import recorded


@recorded
class MaskHead(nn.Sequential):
    """3x3 convolutions over the pooled features (figure 4, right): `(R, C, o, o)` -> `(R, layers[-1], o, o)`.

    Args:
        in_channels: C.
        layers: channels of each convolution; without any, the features stay as they are.
        norm: behind each, as `batch` in torchvision's v2 detector; None for a bias instead.
    """

    def __init__(
        self, in_channels: int, layers: Sequence[int] = (256, 256, 256, 256), norm: Norm | None = None
    ) -> None:
        blocks = []
        for a, b in zip((in_channels, *layers), layers, strict=False):
            conv = nn.Conv2d(a, b, 3, padding=1, bias=norm is None)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            blocks.append(nn.Sequential(conv, *([NORM_LAYERS[norm](b)] if norm else []), nn.ReLU(inplace=True)))
        super().__init__(*blocks)
        self.out_channels = [in_channels, *layers][-1]


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
        mask_grid: where a mask's cells lie in its box, in training and on the image; default: `MaskGrid`.
    """

    def __init__(
        self,
        mask_roi_pool: nn.Module | None,
        mask_head: nn.Module | None,
        mask_predictor: nn.Module | None,
        mask_loss: Callable[..., Any] | None,
        mask_grid: MaskGridPart | None,
    ) -> None:
        super().__init__()
        self.mask_roi_pool, self.mask_head, self.mask_predictor = mask_roi_pool, mask_head, mask_predictor
        self.mask_loss, self.mask_grid = mask_loss or losses.mask_loss, mask_grid or MaskGrid()

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

    def mask_probabilities(self, features: FeatureMaps, boxes: Tensor, labels: Tensor) -> Tensor:
        """As `mask_logits`, in [0, 1]."""
        return self.mask_logits(features, boxes, labels).sigmoid()

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
            stored = batch.gt_masks, batch.gt_mask_windows
            wanted = self.mask_grid.targets(*stored, index, boxes, logits.shape[-1])
        loss = self.mask_loss(logits.flatten(0, 1), wanted.flatten(0, 1))
        return {"loss_mask": losses.mean_over(loss, foreground.flatten(), foreground)}

    def add_masks(self, features: FeatureMaps, detections: Detections) -> Detections:
        """Detections, whose boxes are in pixels of the batch, with `masks` `(D, m, m)`: probabilities inside the box.

        Without a branch they come back as they are.
        """
        if not self.has_masks:
            return detections
        boxes, labels, _ = pad_objects(*([d[name] for d in detections] for name in ("boxes", "labels")))
        probabilities = self.mask_probabilities(features, boxes, labels)
        return [d | {"masks": p[: len(d["labels"])]} for d, p in zip(detections, probabilities, strict=True)]
