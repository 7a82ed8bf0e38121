"""The pictures of a replayed step: its images with their objects, and what each anchor and region trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from detection.batch import Batch
from detection.data.spectral import false_colour
from detection.matching import Matcher
from detection.models.two_stage import FasterRCNN
from detection.teaching import draw_matching, draw_samples
from detection.training.replay import Part
from detection.visualize import draw_objects, side_by_side


def draw_step(parts: Sequence[Part], detector: FasterRCNN, class_names: Sequence[str], folder: Path) -> None:
    """Write `batch.jpg`, and of image N `N_matching.png`, `N_anchors.png` and `N_regions.png`, from 1.

    Args:
        parts: of the step.
        detector: that trained.
        class_names: of label 1 first.
        folder: which is there.
    """
    pairs, number = [], 0
    for part in parts:
        for i, one in enumerate(part.batch.to("cpu", non_blocking=False).split()):
            number += 1
            pairs.append(_pair(one, class_names))
            for name, figure in _figures(one, part, i, detector, class_names).items():
                figure.savefig(folder / f"{number}_{name}.png", dpi=120)
    side_by_side(pairs, ("as augmented", "with its objects")).save(folder / "batch.jpg", quality=88)


def _pair(one: Batch, class_names: Sequence[str]) -> tuple[Image.Image, Image.Image]:
    """An image of a batch of one, without and with its objects."""
    height, width = one.image_sizes[0].tolist()
    image = false_colour(one.images[0, :, :height, :width].permute(1, 2, 0).contiguous().numpy())
    there = one.gt_valid[0]
    boxes, labels = one.gt_boxes[0][there].numpy(), one.gt_labels[0][there].numpy()
    points = None if one.gt_keypoints is None else one.gt_keypoints[0][there].numpy()
    bare = draw_objects(image, boxes[:0], labels[:0], class_names)
    return bare, draw_objects(image, boxes, labels, class_names, keypoints=points)


def _figures(one: Batch, part: Part, i: int, detector: FasterRCNN, class_names: Sequence[str]) -> dict[str, Figure]:
    """Of image `i` of a batch, given as a batch of its own, on the CPU."""
    found: dict[str, Figure] = {}
    anchors, matcher = part.anchors, getattr(detector.rpn, "matcher", None)
    if anchors.boxes is not None and anchors.matched is not None:
        boxes, matched = anchors.boxes.cpu(), anchors.matched[i].cpu()
        if isinstance(matcher, Matcher):
            found["matching"] = draw_matching(one, boxes, matched, matcher)
        if anchors.drawn is not None and anchors.valid is not None:
            drawn = anchors.drawn[i][anchors.valid[i]].cpu()
            found["anchors"] = draw_samples(one, boxes[drawn], (matched[drawn] >= 0).long(), ["object"])
    if part.regions is not None:
        kept = part.regions.valid[i]
        regions, labels = part.regions.boxes[i][kept].cpu(), part.regions.labels[i][kept].cpu()
        found["regions"] = draw_samples(one, regions, labels, class_names)
    return found
