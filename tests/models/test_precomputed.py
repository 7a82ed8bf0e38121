"""Proposals from outside the network: those of the batch, and those made on the spot from the picture itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.batch import Batch, pad_images
from detection.models.precomputed import PrecomputedProposals


def make_batch(images: list[Tensor]) -> Batch:
    padded, sizes = pad_images(images)
    nothing = torch.zeros(len(images), 1)
    return Batch(padded, sizes, torch.zeros(len(images), 1, 4), nothing.long(), nothing.bool(), sizes)


def with_proposals(batch: Batch, counts: list[int]) -> Batch:
    valid = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]
    boxes = torch.arange(max(counts) * 4.0).view(1, -1, 4).expand(len(counts), -1, -1) * valid[..., None]
    return replace(batch, proposals=boxes, proposals_valid=valid)


class Recorder:
    """Stands for a search: keeps the pictures, and proposes as many boxes as it has been asked before."""

    def __init__(self) -> None:
        self.seen: list[NDArray[np.uint8]] = []

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.seen.append(image)
        return np.array([[i, 0, i + 9, 9] for i in range(len(self.seen) - 1)], np.float32).reshape(-1, 4)


def test_the_best_of_the_batch_are_handed_on() -> None:
    batch = with_proposals(make_batch([torch.zeros(3, 40, 50)] * 2), [5, 2])
    part = PrecomputedProposals({"training": 3, "testing": 9})
    assert list(part.parameters()) == [] and part.state_dict() == {}
    for mode, count in ((True, 3), (False, 5)):
        found, losses = part.train(mode)([], batch, with_losses=True)
        assert losses == {}
        assert batch.proposals is not None and torch.equal(found.boxes, batch.proposals[:, :count])
        assert found.valid.sum(dim=1).tolist() == [count, 2]
        assert torch.equal(found.scores, found.valid.float())


@pytest.mark.parametrize("as_float", [False, True])
def test_others_are_proposed_from_the_picture_itself(as_float: bool) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (3, *size), dtype=np.uint8) for size in ((40, 50), (60, 30), (33, 64))]
    images = [torch.from_numpy(p) / 255 if as_float else torch.from_numpy(p) for p in pictures]
    source = Recorder()
    part = PrecomputedProposals({"training": 1, "testing": 9}, source)  # type: ignore[arg-type]
    found, _ = part.eval()([], make_batch(images), with_losses=False)
    assert found.valid.tolist() == [[False, False], [True, False], [True, True]]
    assert found.boxes[2].tolist() == [[0, 0, 9, 9], [1, 0, 10, 9]] and not found.boxes[0].any()
    for seen, picture in zip(source.seen, pictures, strict=True):
        np.testing.assert_array_equal(seen, picture.transpose(1, 2, 0))
        assert seen.dtype == np.uint8 and seen.flags.c_contiguous


def test_without_a_source_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="give the data module `proposals`, or the detector a source"):
        PrecomputedProposals()([], make_batch([torch.zeros(3, 40, 50)]), with_losses=False)
