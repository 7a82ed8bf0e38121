"""A proposer: feature maps -> regions, see `detection.parts.Proposer`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.anchors import AnchorGenerator
from detection.batch import Batch
from detection.boxes import clip_boxes, is_large_enough, pairwise_iou
from detection.parts import FeatureMaps, Losses, Proposals


class Lattice(nn.Module):
    """Boxes that lie everywhere, at every cell of the coarsest map; how much each is worth is learned."""

    def __init__(self, in_channels: int, strides: Sequence[int], sizes: Sequence[float] = (24, 48, 96, 160)) -> None:
        super().__init__()
        self.boxes = AnchorGenerator([sizes], aspect_ratios=[1.0])
        self.score = nn.Conv2d(in_channels, len(sizes), 1)

    def forward(self, features: FeatureMaps, batch: Batch, with_losses: bool) -> tuple[Proposals, Losses]:
        """Regions of each image, best first; with losses, whether each overlaps an object by half."""
        logits = self.score(features.maps[-1]).permute(0, 2, 3, 1).flatten(1)  # (B, P), in the order of the boxes
        boxes = self._lay(features, batch)
        inside = clip_boxes(boxes.expand(logits.shape[0], -1, 4), batch.image_sizes)
        scores = torch.where(is_large_enough(inside, 1.0), logits.detach().sigmoid(), -1.0)
        scores, order = scores.sort(dim=1, descending=True)
        valid = scores >= 0  # others lie in the padding
        found = inside.gather(1, order[..., None].expand(-1, -1, 4)) * valid[..., None]
        if not with_losses:
            return Proposals(found, scores, valid), {}
        iou = (pairwise_iou(batch.gt_boxes, boxes) * batch.gt_valid[..., None]).amax(dim=1)
        loss = F.binary_cross_entropy_with_logits(logits, (iou >= 0.5).float())
        return Proposals(found, scores, valid), {"loss_lattice": loss}

    def _lay(self, features: FeatureMaps, batch: Batch) -> Tensor:
        """The boxes `(P, 4)`."""
        cells, size = features.maps[-1].shape[-2:], batch.images.shape[-2:]
        return self.boxes([tuple(cells)], features.strides[-1:], tuple(size), features.maps[-1].device)[0]
