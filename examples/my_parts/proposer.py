"""A proposer: feature maps -> regions, see `detection.parts.Proposer`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detection.anchors import AnchorGenerator
from detection.batch import Batch
from detection.boxes import clip_boxes, is_large_enough, pairwise_iou
from detection.parts import FeatureMaps, Losses, Proposals


class Lattice(nn.Module):
    """Boxes that lie everywhere, at each cell of the coarsest map; how much each is worth is learned."""

    def __init__(self, in_channels: int, strides: Sequence[int], sizes: Sequence[float] = (24, 48, 96, 160)) -> None:
        super().__init__()
        self.lay = AnchorGenerator([sizes], aspect_ratios=[1.0])
        self.score = nn.Conv2d(in_channels, len(sizes), 1)

    def forward(self, features: FeatureMaps, batch: Batch, with_losses: bool) -> tuple[Proposals, Losses]:
        """Regions of each image, best first; the loss is whether each overlaps an object by half."""
        coarsest, size = features.maps[-1], tuple(batch.images.shape[-2:])
        (boxes,) = self.lay([tuple(coarsest.shape[-2:])], features.strides[-1:], size, coarsest.device)  # (P, 4)
        logits = self.score(coarsest).permute(0, 2, 3, 1).flatten(1)  # (B, P), in the order of the boxes
        inside = clip_boxes(boxes.expand(logits.shape[0], -1, 4), batch.image_sizes)
        scores = torch.where(is_large_enough(inside, 1.0), logits.detach().sigmoid(), -1.0)
        scores, order = scores.sort(dim=1, descending=True)
        valid = scores >= 0  # others lie in the padding
        proposals = Proposals(inside.gather(1, order[..., None].expand(-1, -1, 4)) * valid[..., None], scores, valid)
        if not with_losses:
            return proposals, {}
        iou = (pairwise_iou(batch.gt_boxes, boxes) * batch.gt_valid[..., None]).amax(dim=1)
        return proposals, {"loss_lattice": F.binary_cross_entropy_with_logits(logits, (iou >= 0.5).float())}
