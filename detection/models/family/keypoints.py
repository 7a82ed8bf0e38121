"""The key point branch: where the joints of a detected person are, or any points that each object has in one order.

Mask R-CNN (He et al. 2017), section 5, as torchvision has it.

Shape shorthand:
    B: images     G: ground truth objects an image     M: regions of an image that the branch sees     R = B * M
    k: key points of an object     C: channels     o: side of pooled features     m: side of a heatmap (56)
    D: detections of an image     h, w: height and width of a box in whole pixels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection import losses
from detection.batch import Batch, pad_objects
from detection.fitting import attribute_of, expect, finish, run, width_of
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import RoIHeads
from detection.parts import Detections, Factory, Factory2, FeatureMaps, Losses, Proposals
from detection.recipes import rebuildable, recorded


@recorded
class KeypointHead(nn.Sequential):
    """3x3 convolutions over the pooled features: `(R, C, o, o)` -> `(R, layers[-1], o, o)`.

    Args:
        in_channels: C.
        layers: channels of each convolution.
    """

    def __init__(self, in_channels: int, layers: Sequence[int] = (512,) * 8) -> None:
        convs = []
        for a, b in zip((in_channels, *layers), layers, strict=False):
            conv = nn.Conv2d(a, b, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            convs += [conv, nn.ReLU(inplace=True)]
        super().__init__(*convs)
        self.out_channels = [in_channels, *layers][-1]


@recorded
class KeypointPredictor(nn.Module):
    """One heatmap a key point, four times as fine: `(R, C, o, o)` -> logits `(R, k, 4o, 4o)` float32.

    A transposed convolution doubles the resolution, and a bilinear enlargement doubles it again.

    Args:
        in_channels: C.
        num_keypoints: k.
    """

    def __init__(self, in_channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.kps_score_lowres = nn.ConvTranspose2d(in_channels, num_keypoints, 4, stride=2, padding=1)
        nn.init.kaiming_normal_(self.kps_score_lowres.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.kps_score_lowres.bias)  # type: ignore[arg-type]
        self.out_channels = num_keypoints

    def forward(self, features: Tensor) -> Tensor:
        # In float32 under autocast too, where an enlargement in half precision would make equal cells of unequal ones.
        return enlarge_twice(self.kps_score_lowres(features).float())


def enlarge_twice(maps: Tensor) -> Tensor:
    """Maps `(..., h, w)` at twice the resolution `(..., 2h, 2w)` by bilinear interpolation.

    As `F.interpolate`, whose gradient an accelerator adds up in another order each time.
    """
    for axis in (-2, -1):
        count = maps.shape[axis] - 1
        before = torch.cat((maps.narrow(axis, 0, 1), maps.narrow(axis, 0, count)), dim=axis)
        after = torch.cat((maps.narrow(axis, 1, count), maps.narrow(axis, count, 1)), dim=axis)
        maps = torch.stack((maps.lerp(before, 0.25), maps.lerp(after, 0.25)), dim=axis).flatten(axis - 1, axis)
    return maps


@rebuildable
def heatmap_loss(logits: Tensor, cells: Tensor) -> Tensor:
    """Softmax cross-entropy over the cells of each heatmap: logits `(Q, S)` against the true cell `(Q,)` -> `(Q,)`.

    Mask R-CNN (He et al. 2017), section 5: one cell is the true one, and all cells of the heatmap are its rivals.
    """
    return F.cross_entropy(logits, cells, reduction="none")


def keypoint_cells(keypoints: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The cell of its region's heatmap in which each key point lies, and whether it counts.

    A cell holds its left and upper edge. A key point on the right or lower edge of the box belongs to the last cell.
    Those that are not annotated (visibility 0), and those outside of the box, do not count. Hidden ones (1) do.

    Args:
        keypoints: `(..., k, 3)` x, y and visibility.
        boxes: `(..., 4)` xyxy of the regions, in the same pixels.
        side: m.

    Returns:
        cells `(..., k)` int64, y * m + x, 0 where one does not count; and bool `(..., k)`.
    """
    inside, cells = keypoints[..., 2] > 0, torch.zeros_like(keypoints[..., 0], dtype=torch.int64)
    for axis in (1, 0):
        low, high = boxes[..., axis, None], boxes[..., axis + 2, None]
        place = keypoints[..., axis]
        cell = ((place - low) * (side / (high - low))).floor().long()
        cell = torch.where(place == high, side - 1, cell)
        inside = inside & (cell >= 0) & (cell < side)
        cells = cells * side + cell
    return torch.where(inside, cells, 0), inside


def locate_keypoints(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The key points of detections: where each heatmap, enlarged to its box by bicubic interpolation, is highest.

    A box of less than a pixel counts as one pixel. The enlarged heatmap has a whole number of pixels, rounded up, and
    the point is the centre of the highest. The host reads the sizes of the boxes once, for all of them.

    Args:
        heatmaps: `(D, k, m, m)` logits.
        boxes: `(D, 4)` xyxy.

    Returns:
        key points `(D, k, 3)` x, y and 1.0, in the pixels of the boxes; and the height of each, `(D, k)`.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    whole = sides.ceil()
    peaks, scores = [heatmaps.new_zeros((0, heatmaps.shape[1], 2))], [heatmaps.new_zeros((0, heatmaps.shape[1]))]
    for maps, (width, height) in zip(heatmaps, whole.long().tolist(), strict=True):  # each of its own size
        enlarged = F.interpolate(maps[:, None], size=(height, width), mode="bicubic", align_corners=False)
        score, place = enlarged.flatten(1).max(dim=1)
        peaks.append(torch.stack((place % width, place // width), dim=-1)[None].to(maps))
        scores.append(score[None])
    places = boxes[:, None, :2] + (torch.cat(peaks) + 0.5) * (sides / whole)[:, None]
    return F.pad(places, (0, 1), value=1.0), torch.cat(scores)


@recorded
class KeypointRoIHeads(RoIHeads):
    """`RoIHeads` with a key point branch beside those for boxes and, where it is wanted, for masks.

    Args:
        in_channels: channels of the feature maps.
        num_classes: with background. All classes share the branch.
        num_keypoints: k.
        keypoint_roi_pool: default: RoI Align 14x14 with 2x2 samples on all levels but the last.
        keypoint_head: default: eight convolutions of 512 channels.
        keypoint_predictor: default: heatmaps of 56x56; made by (in_channels, num_keypoints).
        keypoint_loss: see `detection.parts.KeypointLoss`; default: `heatmap_loss`.
        **kwargs: see `RoIHeads`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_keypoints: int = 17,
        keypoint_roi_pool: nn.Module | None = None,
        keypoint_head: nn.Module | Factory | None = None,
        keypoint_predictor: nn.Module | Factory2 | None = None,
        keypoint_loss: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, num_classes, **kwargs)
        self._num_keypoints = num_keypoints
        self.keypoint_roi_pool = keypoint_roi_pool or RoIPooler(14)
        size = attribute_of("keypoint_roi_pool", self.keypoint_roi_pool, "output_size")
        self.keypoint_head = finish("keypoint_head", keypoint_head or KeypointHead, in_channels)
        width = width_of("keypoint_head", self.keypoint_head, (1, in_channels, size, size), (1, "C", "o", "o"))
        predictor = keypoint_predictor or KeypointPredictor
        self.keypoint_predictor = finish("keypoint_predictor", predictor, width, num_keypoints)
        self.keypoint_loss: Callable[..., Any] = keypoint_loss or heatmap_loss

    @property
    def has_keypoints(self) -> bool:
        """Whether detections get key points: they do."""
        return True

    @property
    def num_keypoints(self) -> int:
        """k, as the predictor says it in `out_channels`, which torchvision's has too; else as given."""
        return int(getattr(self.keypoint_predictor, "out_channels", self._num_keypoints))

    def heatmaps(self, features: FeatureMaps, boxes: Tensor) -> Tensor:
        """The logits of each region's key points: boxes `(B, M, 4)` -> `(B, M, k, m, m)` float32."""
        pooled = self.keypoint_roi_pool(features, boxes)
        logits: Tensor = self.keypoint_predictor(self.keypoint_head(pooled))
        return logits.float().unflatten(0, boxes.shape[:2])

    def losses(self, features: FeatureMaps, proposals: Proposals, batch: Batch) -> Losses:
        """As `RoIHeads.losses`, with `loss_keypoint`."""
        sample = self.sample(features, proposals, batch)
        part = self.foreground_part(sample)
        found = self.box_losses(*self.predict(features, sample.boxes), sample, batch)
        return found | self.mask_losses(features, *part, batch) | self.keypoint_losses(features, *part, batch)

    def keypoint_losses(
        self, features: FeatureMaps, boxes: Tensor, labels: Tensor, matched_idxs: Tensor, batch: Batch
    ) -> Losses:
        """`loss_keypoint`: the mean loss of the key points, of the batch's foreground regions, that count.

        The mean is over the key points of all processes, as for the other losses. torchvision and Detectron2 average
        the means of the processes, so that a key point counts for less where there are more of them. Without any the
        loss is 0, and the branch gets gradients of 0.

        Args:
            features: as for the box head.
            boxes, labels, matched_idxs: `(B, M, ...)` of a `RoISample`, foreground first. Label 0 doesn't count.
            batch: for its key points.

        Raises:
            ValueError: the batch has no key points, or another number of them.
        """
        wanted = batch.gt_keypoints
        if wanted is None or wanted.shape[2] != self.num_keypoints:
            found = "there are none" if wanted is None else f"the data has {wanted.shape[2]}"
            raise ValueError(
                f"the detector learns {self.num_keypoints} key points but {found}: give targets `keypoints` (N, "
                f"{self.num_keypoints}, 3), or set data.keypoints and num_keypoints"
            )
        logits = self.heatmaps(features, boxes)
        own = wanted.gather(1, matched_idxs[..., None, None].expand(-1, -1, *wanted.shape[2:]))
        cells, counted = keypoint_cells(own, boxes, logits.shape[-1])
        counted = (counted & (labels > 0)[..., None]).flatten()
        loss = self.keypoint_loss(logits.flatten(3).flatten(0, 2), cells.flatten())
        return {"loss_keypoint": losses.mean_over(loss, counted, counted)}

    def detect(self, features: FeatureMaps, proposals: Proposals, image_sizes: Tensor) -> Detections:
        """As `RoIHeads.detect`, with `keypoints` `(D, k, 3)`, in pixels of the batch, and `keypoints_scores` `(D, k)`.

        Each key point is x, y and 1.0, as torchvision has it. Its score is the height of its heatmap, a logit.
        """
        return self.add_keypoints(features, super().detect(features, proposals, image_sizes))

    def add_keypoints(self, features: FeatureMaps, detections: Detections) -> Detections:
        """Detections, whose boxes are in pixels of the batch, with their key points, see `detect`."""
        boxes, _, _ = pad_objects(*([d[name] for d in detections] for name in ("boxes", "labels")))
        counts = [len(d["boxes"]) for d in detections]
        maps = torch.cat([rows[:n] for rows, n in zip(self.heatmaps(features, boxes), counts, strict=True)])
        points, scores = locate_keypoints(maps, torch.cat([d["boxes"] for d in detections]))
        rows = zip(detections, points.split(counts), scores.split(counts), strict=True)
        return [d | {"keypoints": p, "keypoints_scores": s} for d, p, s in rows]

    def check(self, features: FeatureMaps) -> None:
        """As `RoIHeads.check`, and run each part of the branch once.

        Raises:
            PartError: one does not keep its contract.
        """
        super().check(features)
        boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0]]], device=features.maps[0].device)
        pooled = run("keypoint_roi_pool", self.keypoint_roi_pool, "__call__", features, boxes)
        wide = run("keypoint_head", self.keypoint_head, "__call__", pooled)
        logits = run("keypoint_predictor", self.keypoint_predictor, "__call__", wide)
        expect("keypoint_predictor", self.keypoint_predictor, "logits", logits, (1, self.num_keypoints, "m", "m"))
        rows = logits.float().flatten(2)[0]
        given = run("keypoint_loss", self.keypoint_loss, "__call__", rows, torch.zeros_like(rows[:, 0]).long())
        expect("keypoint_loss", self.keypoint_loss, "losses", given, (self.num_keypoints,))
