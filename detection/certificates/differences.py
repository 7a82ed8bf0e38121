"""The largest difference of each stage between two sides, and what it may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detection.certificates.seen import Picture
from detection.certificates.sides import Side, Traced
from detection.interop.partners import pair_boxes, pair_detections


@dataclass(frozen=True)
class Row:
    """The largest difference of one stage over all images.

    Attributes:
        stage: its name.
        unit: of the difference; `share` is of the largest value.
        difference: the largest; None where the two can't be subtracted, and for a stage that nothing was found for.
        tolerance: what it may be; None for a row that is stated but not judged.
        where: image, parameter or tensor of the largest difference.
        note: what else there is to know.
    """

    stage: str
    unit: str
    difference: float | None
    tolerance: float | None
    where: str = ""
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is within its tolerance; NaN is not."""
        if self.tolerance is None:
            return True
        return self.difference is not None and self.difference <= self.tolerance


def compare(ours: Side, theirs: Side, pictures: Sequence[Picture], small: bool = False) -> tuple[list[Row], int]:
    """The rows of all stages that both sides show, and the number of the reference's detections.

    Args:
        ours, theirs: the sides.
        pictures: what both look at.
        small: boxes of low scores may come and go, as with int8: what has no partner is stated, not judged.
    """
    worst: dict[str, Row] = {}
    total = 0
    for picture in pictures:
        a, b = ours.look(picture.pixels), theirs.look(picture.pixels)
        total += len(b.found["labels"])
        for row in _stages(a, b, picture.name, small):
            known = worst.get(row.stage)
            if known is None or _worse(row, known):
                worst[row.stage] = row
    rows = list(worst.values())
    scene = next((picture for picture in pictures if picture.target is not None), None)
    if scene is not None and ours.train is not None and theirs.train is not None:
        rows += _training(ours, theirs, scene)
    return rows, total


def _worse(row: Row, known: Row) -> bool:
    """Whether it is farther beyond its tolerance, which may differ between images."""
    if row.difference is None or known.difference is None:
        return row.difference is None and known.tolerance is not None and row.tolerance is not None
    if row.tolerance and known.tolerance:
        return not row.difference / row.tolerance <= known.difference / known.tolerance
    return not row.difference <= known.difference


def _stages(a: Traced, b: Traced, name: str, small: bool) -> Iterable[Row]:
    for level, (left, right) in enumerate(zip(a.features, b.features, strict=False)):
        yield _subtracted(f"features, level {level}", "", left, right, name, 1e-4)
    if a.anchors and b.anchors:
        orders = [_nearest(left, right) for left, right in zip(a.anchors, b.anchors, strict=True)]
        placed = [left[order] for left, order in zip(a.anchors, orders, strict=True)]
        yield _flat("anchors of a cell", "pixels", placed, b.anchors, name, 1e-3, absolute=True)
    else:
        orders = [torch.arange(len(level)) for level in a.objectness]
    for stage, left_maps, right_maps in (
        ("RPN objectness", a.objectness, b.objectness),
        ("RPN deltas", a.deltas, b.deltas),
    ):
        if left_maps and right_maps:
            moved = [level[order] for level, order in zip(left_maps, orders, strict=True)]
            yield _flat(stage, "", moved, right_maps, name, 1e-4)
    if a.proposals is not None and b.proposals is not None:
        yield from _paired("proposals", a.proposals, b.proposals, name, 0.01 * len(b.proposals))
    yield from _detections(a.found, b.found, name, small)


def _detections(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str, small: bool) -> Iterable[Row]:
    allowed = None if small else 0.0
    left, right, gaps, ties, alone = pair_detections(a, b)
    judged = {"boxes": None, "scores": None, "masks": None} if small else {"boxes": 0.01, "scores": 1e-4, "masks": 1e-3}
    if len(left):
        tied = f"without {ties} of equal scores, of which NMS kept another" if ties else ""
        yield Row("boxes", "pixels", float(gaps.max()), judged["boxes"], name, tied)
        score = (a["scores"][left] - b["scores"][right]).abs().max()
        yield Row("scores", "", float(score), judged["scores"], name)
        if "masks" in a and "masks" in b:
            mask = (a["masks"][left] - b["masks"][right]).abs().max()
            yield Row("masks", "", float(mask), judged["masks"], name)
        if "keypoints" in a and "keypoints" in b:
            point = (a["keypoints"][left] - b["keypoints"][right]).abs().max()
            note = "where two cells of a heatmap are equally high, rounding decides"
            yield Row("key points", "pixels", float(point), None, name, note)
        if "keypoints_scores" in a and "keypoints_scores" in b:
            heights = a["keypoints_scores"][left], b["keypoints_scores"][right]
            row = _subtracted("heights of key points", "", *heights, name, 1e-4)
            yield replace(row, tolerance=None) if small else row
    yield Row("detections without partner", "", float(alone), allowed, name)


def _paired(stage: str, a: Tensor, b: Tensor, name: str, allowed: float) -> Iterable[Row]:
    _, _, gaps, _, alone = pair_boxes(a, b)
    if len(gaps):
        yield Row(stage, "pixels", float(gaps.max()), 0.05, name)
    note = "at the last place that NMS or the limit gives, rounding decides"
    yield Row(f"{stage} without partner", "", float(alone), math.floor(allowed), name, note if alone else "")


def _nearest(a: Tensor, b: Tensor) -> Tensor:
    """The row of `a` that is most like each row of `b`: libraries order the anchors of a cell in their own ways."""
    return torch.cdist(b.float(), a.float()).argmin(dim=1)


def _subtracted(stage: str, unit: str, a: Tensor, b: Tensor, name: str, share: float, absolute: bool = False) -> Row:
    if a.shape != b.shape:
        return Row(stage, unit, None, share, name, f"{tuple(a.shape)} beside {tuple(b.shape)}")
    difference, largest = float((a - b).abs().max()), float(b.abs().max())
    if absolute:
        return Row(stage, unit, difference, share, name)
    return Row(stage, unit, difference, share * largest, name, f"of values up to {largest:.3g}")


def _flat(
    stage: str, unit: str, a: Sequence[Tensor], b: Sequence[Tensor], name: str, share: float, absolute: bool = False
) -> Row:
    """All levels in one row."""
    if [level.shape for level in a] != [level.shape for level in b]:
        return Row(stage, unit, None, share, name, "of other shapes")
    left, right = (torch.cat([level.flatten() for level in side]) for side in (a, b))
    return _subtracted(stage, unit, left, right, name, share, absolute)


def _training(ours: Side, theirs: Side, scene: Picture) -> list[Row]:
    """Losses and gradients on one scene, every anchor and proposal trained on."""
    assert ours.train is not None and theirs.train is not None and scene.target is not None
    losses, gradients = ours.train(scene.pixels, scene.target)
    wanted, wished = theirs.train(scene.pixels, scene.target)
    rows = []
    for name, value in wanted.items():
        ratio = float((losses[name] - value).abs() / value.abs().clamp(min=1e-12)) if name in losses else None
        rows.append(Row(f"{name}", "share", ratio, 1e-4, scene.name, f"of {float(value):.4f}"))
    shared = [name for name in wished if name in gradients]
    largest = {name: float((gradients[name] - wished[name]).abs().max()) for name in shared}
    most = max((float(value.abs().max()) for value in wished.values()), default=0.0)
    if shared and most:
        name = max(largest, key=largest.__getitem__)
        note = f"of the largest, {most:.3g}, in {len(shared)} parameters"
        # Before a ReLU a rounding error may change a sign, and with it a whole gradient.
        rows.append(Row("gradients", "share", largest[name] / most, 1e-2, name, note))
    return rows
