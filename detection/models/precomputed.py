"""Proposals that no network learns: those that came with the data, or Selective Search on the spot.

With them in the place of the region proposal network the detector is Fast R-CNN (Girshick 2015) or R-CNN (Girshick et
al. 2014).

Shape shorthand:
    B: images     H, W: padded height and width     h, w: one image's own     P: proposals an image
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.batch import Batch, pad_objects
from detection.models.transform import as_float
from detection.parts import FeatureMaps, Losses, Proposals
from detection.recipes import recorded
from detection.selective_search import SelectiveSearch


@recorded
class PrecomputedProposals(nn.Module):
    """Hands on the proposals of the batch; has nothing to learn, and so no losses.

    Args:
        top_n: how many of the best are taken of each image, `{"training": n, "testing": n}`.
        source: proposes for images that come without proposals, as those of `model(images)` do. It takes a second an
            image, on the CPU, so for training they are computed beforehand, see `detection.data.proposals`. None makes
            such images an error.
    """

    def __init__(
        self,
        top_n: Mapping[str, int] = {"training": 2000, "testing": 2000},
        source: SelectiveSearch | None = None,
    ) -> None:
        super().__init__()
        self.top_n, self.source = dict(top_n), source

    def forward(self, features: FeatureMaps, batch: Batch, with_losses: bool) -> tuple[Proposals, Losses]:
        """The proposals of the batch, each valid one with a score of 1, and no losses.

        Raises:
            ValueError: the batch has no proposals, and there is no `source`.
        """
        if batch.proposals is None or batch.proposals_valid is None:
            boxes, valid = self._propose(batch)
        else:
            boxes, valid = batch.proposals, batch.proposals_valid
        top_n = self.top_n["training" if self.training else "testing"]
        boxes, valid = boxes[:, :top_n], valid[:, :top_n]
        return Proposals(boxes, valid.float(), valid), {}

    def _propose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Boxes `(B, P, 4)` from the source, and which are valid."""
        if self.source is None:
            raise ValueError(
                "the images have no proposals: give the data module `proposals`, or the detector a source of them"
            )
        device = batch.images.device
        found = [torch.from_numpy(self.source(pixels)).to(device) for pixels in _pictures(batch)]
        boxes, _, valid = pad_objects(found, [torch.zeros(len(f), dtype=torch.int64, device=device) for f in found])
        return boxes, valid


def _pictures(batch: Batch) -> list[NDArray[np.uint8]]:
    """The images without their padding, `(h, w, 3)` uint8, of other channels the first three or the only one."""
    colours = batch.images[:, torch.arange(3) % batch.images.shape[1]]
    whole = (as_float(colours) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sizes = batch.image_sizes.tolist()
    return [np.ascontiguousarray(image[:h, :w]) for image, (h, w) in zip(whole, sizes, strict=True)]
