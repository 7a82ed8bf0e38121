"""PointRend's masks (Kirillov et al. 2020): a coarse mask, made finer where it is uncertain, point by point.

Shape shorthand:
    B: images     M: regions an image     R = B * M     K: classes with background     C: channels of the finest map
    s: side of the coarse mask     N: points of a region
Points are (x, y) in [0, 1] of their box: (0, 0) is its upper left corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection import losses
from detection.batch import Batch
from detection.fitting import finish
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import RoIHeads
from detection.parts import Factory, Factory2, FeatureMaps, Losses
from detection.recipes import recorded


@recorded
class CoarseMaskHead(nn.Sequential):
    """A convolution of stride 2, by which the coarse mask sees 14x14 features: `(R, C, o, o)` -> `(R, C, o/2, o/2)`."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, in_channels, 2, stride=2), nn.ReLU(inplace=True))
        self.out_channels = in_channels


@recorded
class CoarseMaskPredictor(nn.Module):
    """Two layers and one mask a class: `(R, C, s, s)` -> logits `(R, K, s, s)`.

    Args:
        in_channels: C.
        num_classes: K, with background.
        side: s, 7 in the paper.
        hidden_channels: of the two layers, 1024 in the paper.
    """

    def __init__(self, in_channels: int, num_classes: int, side: int = 7, hidden_channels: int = 1024) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels * side**2, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, hidden_channels)
        self.mask_logits = nn.Linear(hidden_channels, num_classes * side**2)
        nn.init.normal_(self.mask_logits.weight, std=0.001)
        nn.init.zeros_(self.mask_logits.bias)
        self.shape = (num_classes, side, side)

    def forward(self, features: Tensor) -> Tensor:
        rows = F.relu(self.fc2(F.relu(self.fc1(features.flatten(1)))))
        return self.mask_logits(rows).unflatten(1, self.shape)


@recorded
class PointHead(nn.Module):
    """Features of points -> their logits (section 3.3): `(R, C, N)` and coarse logits `(R, K, N)` -> `(R, K, N)`.

    Args:
        in_channels: C.
        num_classes: K, with background.
        layers: channels of each layer, which sees the coarse logits, too.
    """

    def __init__(self, in_channels: int, num_classes: int, layers: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        widths = [in_channels, *layers]
        pairs = zip(widths, layers, strict=False)
        self.layers = nn.ModuleList(nn.Conv1d(width + num_classes, wanted, 1) for width, wanted in pairs)
        self.point_logits = nn.Conv1d(widths[-1] + num_classes, num_classes, 1)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.point_logits.weight, std=0.001)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        for layer in self.layers:
            fine = F.relu(layer(torch.cat((fine, coarse), dim=1)))
        return self.point_logits(torch.cat((fine, coarse), dim=1))


@recorded
class PointRendRoIHeads(RoIHeads):
    """`RoIHeads` with PointRend's mask branch.

    In training points are drawn where the coarse mask is uncertain, its logit near 0 (section 3.1). In evaluation the
    mask grows from `first_side` to `first_side` * 2^steps: each step doubles it by interpolation, and predicts the
    `step_points` most uncertain places anew (section 3.2; 28 to 224 with 784 of them). In training labels are read from
    the masks of a `Batch`, which have 112 cells along a side of an object. Weights serve the same classes alone, as the
    point head reads the coarse logits of all.

    Args:
        in_channels, num_classes: see `RoIHeads`.
        mask_roi_pool: default: aligned RoI Align 14x14 with one sample a bin, on the finest map.
        mask_head, mask_predictor: of the coarse mask; default: `CoarseMaskHead`, `CoarseMaskPredictor`.
        point_head: default: `PointHead`; a part, or a factory of (in_channels, num_classes).
        train_points: N of a region, 14^2 in the paper.
        oversample, uncertain_share: k and beta of section 3.1: of `oversample` times as many random points the most
            uncertain are this share of N; the others are random.
        first_side, steps, step_points: see above. As the paper's 28^2 points cover the first three masks whole, it
            begins at 28.
        **kwargs: see `RoIHeads`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | Factory | None = None,
        mask_predictor: nn.Module | Factory2 | None = None,
        point_head: nn.Module | Factory2 | None = None,
        train_points: int = 196,
        oversample: int = 3,
        uncertain_share: float = 0.75,
        first_side: int = 28,
        steps: int = 3,
        step_points: int = 784,
        **kwargs: Any,
    ) -> None:
        pool = mask_roi_pool or RoIPooler(14, sampling_ratio=1, aligned=True, num_levels=1)
        coarse: dict[str, Any] = {"mask_head": mask_head or CoarseMaskHead}
        coarse["mask_predictor"] = mask_predictor or CoarseMaskPredictor
        super().__init__(in_channels, num_classes, mask_roi_pool=pool, **coarse, **kwargs)
        self.point_head = finish("point_head", point_head or PointHead, in_channels, num_classes)
        self.train_points, self.oversample, self.uncertain_share = train_points, oversample, uncertain_share
        self.first_side, self.steps, self.step_points = first_side, steps, step_points

    def coarse_logits(self, features: FeatureMaps, boxes: Tensor) -> Tensor:
        """Boxes `(B, M, 4)` -> logits `(R, K, s, s)` float32."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()  # type: ignore[misc]

    def point_logits(
        self, features: FeatureMaps, boxes: Tensor, labels: Tensor, coarse: Tensor, points: Tensor
    ) -> Tensor:
        """Logits `(R, N)` float32 of the true class, `(B, M)`, at points `(R, N, 2)` of boxes `(B, M, 4)`."""
        fine, stride = features.maps[0].float(), features.strides[0]
        height, width = fine.shape[-2:]
        where = (
            boxes[:, :, None, :2] + points.unflatten(0, boxes.shape[:2]) * (boxes[..., 2:] - boxes[..., :2])[:, :, None]
        )
        placed = torch.stack((where[..., 0] / (width * stride), where[..., 1] / (height * stride)), dim=-1)
        rows = F.grid_sample(fine, 2 * placed - 1, align_corners=False).transpose(1, 2).flatten(0, 1)
        logits = self.point_head(rows, sample_points(coarse, points)).float()
        return own_class(logits, labels)

    def mask_losses(
        self, features: FeatureMaps, boxes: Tensor, labels: Tensor, matched_idxs: Tensor, batch: Batch
    ) -> Losses:
        """`loss_mask` of the coarse mask, as `MaskBranch`, and `loss_mask_point`: the mean over regions and points."""
        if batch.gt_masks is None or batch.gt_mask_windows is None:
            raise ValueError("the detector learns masks but there are none: give targets `masks`, or set data.masks")
        foreground = labels > 0
        coarse = self.coarse_logits(features, boxes)
        own = own_class(coarse, labels)
        with torch.no_grad():
            first = torch.arange(len(boxes), device=boxes.device)[:, None] * batch.gt_masks.shape[1]
            index = torch.where(foreground, first + matched_idxs, -1)
            stored = batch.gt_masks, batch.gt_mask_windows
            wanted = self.mask_grid.targets(*stored, index, boxes, own.shape[-1]).flatten(0, 1)
            points = uncertain_points(own[:, None], self.train_points, self.oversample, self.uncertain_share)
            inside = masks_at(*stored, index, boxes, points)
        found = {"loss_mask": self.mask_loss(own, wanted)}
        logits = self.point_logits(features, boxes, labels, coarse, points)
        found["loss_mask_point"] = F.binary_cross_entropy_with_logits(logits, inside, reduction="none").mean(dim=1)
        return {name: losses.mean_over(loss, foreground.flatten(), foreground) for name, loss in found.items()}

    def mask_probabilities(self, features: FeatureMaps, boxes: Tensor, labels: Tensor) -> Tensor:
        """As `MaskBranch.mask_probabilities`, of side `first_side` * 2^steps."""
        coarse, side = self.coarse_logits(features, boxes), self.first_side
        points = grid_points(torch.arange(side**2, device=boxes.device).expand(coarse.shape[0], -1), side)
        look = partial(self.point_logits, features, boxes, labels, coarse)
        logits = look(points).unflatten(1, (side, side))
        for _ in range(self.steps):
            logits = F.interpolate(logits[:, None], scale_factor=2.0, mode="bilinear", align_corners=False).flatten(1)
            side *= 2
            index = logits.abs().topk(min(self.step_points, side**2), dim=1, largest=False).indices
            logits = logits.scatter(1, index, look(grid_points(index, side))).unflatten(1, (side, side))
        return logits.sigmoid().unflatten(0, boxes.shape[:2])


def own_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits `(R, K, ...)` those of each region's class, labels `(B, M)` -> `(R, ...)`."""
    index = labels.flatten().view(-1, *[1] * (logits.ndim - 1)).expand(-1, 1, *logits.shape[2:])
    return logits.gather(1, index).squeeze(1)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps `(R, K, s, s)` at points `(R, N, 2)` -> `(R, K, N)`; beyond the edge zeros mix in."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False).squeeze(3)


def grid_points(index: Tensor, side: int) -> Tensor:
    """Centres of cells, by their index `(R, N)` in a grid of side x side -> points `(R, N, 2)`."""
    return torch.stack((index % side, index // side), dim=-1).float().add(0.5).div(side)


def uncertain_points(logits: Tensor, count: int, oversample: int, share: float) -> Tensor:
    """Points `(R, count, 2)`: a share of them the most uncertain of random ones, the rest random (section 3.1).

    Uncertain is where the logit, sampled at the point itself, is near 0.

    Args:
        logits: `(R, 1, s, s)`.
        count, oversample, share: N, k and beta.
    """
    candidates = torch.rand((len(logits), count * oversample, 2), device=logits.device)
    doubt = sample_points(logits, candidates).abs().squeeze(1)
    index = doubt.topk(int(share * count), dim=1, largest=False).indices
    chosen = candidates.gather(1, index[..., None].expand(-1, -1, 2))
    rest = torch.rand((len(logits), count - index.shape[1], 2), device=logits.device)
    return torch.cat((chosen, rest), dim=1)


def masks_at(gt_masks: Tensor, windows: Tensor, index: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
    """How much of each point its object covers, `(R, N)` in [0, 1]; arguments as of `MaskGridPart.targets`."""
    rows = index.clamp(min=0)
    masks = gt_masks.flatten(0, 1)[rows.flatten()][:, None].float() / 255
    window, regions = windows.flatten(0, 1)[rows.flatten()], boxes.flatten(0, 1)
    where = regions[:, None, :2] + points * (regions[:, 2:] - regions[:, :2])[:, None]
    extent = (window[:, 2:] - window[:, :2]).clamp(min=1e-6)  # of padding it is 0
    return sample_points(masks, (where - window[:, None, :2]) / extent[:, None]).squeeze(1)
