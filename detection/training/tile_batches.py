"""Evaluation of large images in tiles: a batch of the tiles of one image, and what was found in the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from detection.batch import Batch
from detection.tiling import merge_tiles

Ran = tuple[dict[str, Tensor], list[dict[str, Any]]]
AT_ONCE = 8  # tiles; an image may have hundreds


class Run(Protocol):
    """Gives the losses of a batch, if they are wanted, and the detections of each of its images, masks as RLE."""

    def __call__(self, batch: Batch, with_losses: bool) -> Ran: ...


def run_in_parts(run: Run, batch: Batch, with_losses: bool) -> Ran:
    """What `run` gives of a batch; of the tiles of an image, the mean of their losses and the image's detections."""
    if batch.tile_corners is None:
        return run(batch, with_losses)
    parts = batch.split(AT_ONCE)
    ran = [run(part, with_losses) for part in parts]
    shares = [len(part) / len(batch) for part in parts]
    terms = [{name: value * share for name, value in own.items()} for share, (own, _) in zip(shares, ran, strict=True)]
    losses = {name: torch.stack([own[name] for own in terms]).sum() for name in terms[0]}
    return losses, [_merged([found for _, some in ran for found in some], batch)]


def _merged(found: Sequence[dict[str, Any]], batch: Batch) -> dict[str, Any]:
    """What was found in the tiles of a batch as what is in their image, in its pixels, on the CPU."""
    assert batch.tile_corners is not None
    corners, sizes = batch.tile_corners.tolist(), batch.original_sizes.tolist()
    windows = [(x, y, x + width, y + height) for (x, y), (height, width) in zip(corners, sizes, strict=True)]
    names = ("boxes", "labels", "scores")
    plain = [{name: one[name].cpu().numpy() for name in names} | {"masks": one.get("masks")} for one in found]
    merged = merge_tiles(plain, windows, batch.targets[0].size)
    detection: dict[str, Any] = {name: torch.from_numpy(merged[name]) for name in names}
    return detection if merged["masks"] is None else detection | {"masks": list(merged["masks"])}
