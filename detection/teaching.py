"""Pictures of how a two-stage detector works, for one image: anchors, matching, proposals, samples, feature maps.

Each function takes a detector in whatever mode it is, leaves it so, and gives a matplotlib figure of its own. Images
are `(3, h, w)` tensors as the detector itself takes them; a target holds `boxes` `(N, 4)` xyxy in pixels of the image
and `labels` `(N,)` from 1 on. What is drawn is in the pixels that the detector works in, after its resizing.

Shape shorthand:
    A: anchors of all levels     N: objects     P: proposals     S: sampled regions     C, h, w: of a feature map
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from detection.batch import Batch
from detection.boxes import pairwise_iou
from detection.matching import Matcher
from detection.models.cascade import CascadeRoIHeads
from detection.models.rpn import RegionProposalNetwork
from detection.models.transform import as_float
from detection.models.two_stage import FasterRCNN
from detection.parts import FeatureMaps, Proposals
from detection.visualize import class_colour

SCORES = colormaps["plasma"]
GT, GROUND = "#ffffff", "#5b6672"
Target = Mapping[str, Tensor]


def plot_anchors(detector: FasterRCNN, image: Tensor, point: tuple[float, float] | None = None) -> Figure:
    """The anchors of one cell of each level, over the grid of the level's cells.

    Args:
        detector: with a region proposal network.
        image: `(3, h, w)`.
        point: (x, y) in pixels after resizing, whose cell is shown; None is the middle.
    """
    batch, features = _features(detector, image)
    levels = _anchors(detector, batch, features)
    height, width = batch.image_sizes[0].tolist()
    x, y = point or (width / 2, height / 2)
    figure, panels = _panels(batch, len(levels))
    per_cell = _rpn(detector).anchor_generator.num_anchors_per_location()
    for k, (axes, anchors, feature) in enumerate(zip(panels, levels, features.maps, strict=True)):
        cells = anchors.view(*feature.shape[-2:], per_cell[k], 4)
        centres = (cells[..., 0, :2] + cells[..., 0, 2:]) / 2  # (h, w, 2)
        inside = (centres[..., 0] < width) & (centres[..., 1] < height)
        dots = centres[inside]
        axes.scatter(dots[:, 0], dots[:, 1], s=3, c=GT, alpha=0.55, lw=0)
        nearest = int((centres - torch.tensor([x, y])).square().sum(-1).flatten().argmin())
        own = cells.flatten(0, 1)[nearest]
        _draw(axes, own, [colormaps["tab10"](i % 10) for i in range(len(own))], 2.0)
        axes.set_title(f"stride {detector.strides[k]}: {len(anchors):,} anchors", fontsize=10)
        axes.set(xlim=(min(0, float(own[:, 0].min())), max(width, float(own[:, 2].max()))))
        axes.set(ylim=(max(height, float(own[:, 3].max())), min(0, float(own[:, 1].min()))))
    return figure


def plot_matching(detector: FasterRCNN, image: Tensor, target: Target) -> Figure:
    """Which anchors each object has: those that train as foreground in its colour, and those that are ignored.

    Left the foreground, with the best IoU of each object; right the anchors between both thresholds.
    """
    batch, features = _features(detector, image, target)
    anchors = torch.cat(_anchors(detector, batch, features))
    rpn = _rpn(detector)
    if not isinstance(rpn.matcher, Matcher):
        raise ValueError(f"the picture shows the thresholds of a Matcher, which {type(rpn.matcher).__name__} is not")
    matched = rpn.matcher(batch.gt_boxes, batch.gt_valid, anchors)[0]  # (A,)
    return draw_matching(batch, anchors, matched, rpn.matcher)


def draw_matching(batch: Batch, anchors: Tensor, matched: Tensor, matcher: Matcher) -> Figure:
    """The picture of `plot_matching`, of a match that was made already.

    Args:
        batch: of one image, on the CPU.
        anchors: `(A, 4)`.
        matched: `(A,)`, what the matcher gave.
        matcher: for its thresholds.
    """
    iou = pairwise_iou(batch.gt_boxes[0], anchors)  # (N, A)
    figure, (left, right) = _panels(batch, 2)
    count = int(batch.gt_valid[0].sum())
    colours = [colormaps["tab10"](n % 10) for n in range(count)]  # its neighbours differ more than those of tab20
    for n in range(count):
        own = anchors[matched == n]
        _draw(left, own, [colours[n]] * len(own), 1.5)
        _draw(right, batch.gt_boxes[0, n : n + 1], [colours[n]], 2.0)
        _text(left, batch.gt_boxes[0, n], f"{len(own)} at {float(iou[n].max()):.2f}", colours[n])
    _draw(left, batch.gt_boxes[0, :count], [GT] * count, 2.0, dashed=True)
    ignored = anchors[matched == -2]
    _draw(right, ignored[:: max(1, len(ignored) // 200)], [GT] * len(ignored), 0.4)
    low, high = matcher.bg_iou_thresh, matcher.fg_iou_thresh
    forced = int(((matched >= 0) & (iou.amax(0) < high)).sum())
    left.set_title(
        f"foreground: {int((matched >= 0).sum())} of {len(anchors):,} anchors, {forced} below IoU {high:g}\n"
        "(an object that none reaches takes its best); each object: how many, best IoU",
        fontsize=9,
    )
    right.set_title(f"ignored: {len(ignored)} with IoU {low:g} to {high:g}\n(at most 200 are drawn)", fontsize=9)
    return figure


def plot_proposals(
    detector: FasterRCNN, image: Tensor, target: Target | None = None, counts: Sequence[int] = (10, 50, 300)
) -> Figure:
    """The best proposals by score, more from panel to panel; with a target, how many objects they reach at IoU .5."""
    batch, features = _features(detector, image, target)
    proposals = _propose(detector, batch, features)
    boxes, scores = proposals.boxes[0][proposals.valid[0]], proposals.scores[0][proposals.valid[0]]
    figure, panels = _panels(batch, len(counts))
    for axes, count in zip(panels, counts, strict=True):
        best = boxes[:count].flip(0)  # the worst first, so that the best lie on top
        _draw(axes, best, list(SCORES(scores[:count].flip(0).numpy())), 1.2)
        title = f"best {len(best)} proposals"
        if target is not None and len(target["labels"]):
            gt_boxes = batch.gt_boxes[0][batch.gt_valid[0]]
            reached = pairwise_iou(gt_boxes, boxes[:count]).amax(1) >= 0.5
            _draw(axes, gt_boxes, [GT] * len(gt_boxes), 1.2, dashed=True)
            title += f"\n{int(reached.sum())} of {len(reached)} objects reached"
        axes.set_title(title, fontsize=10)
    figure.colorbar(ScalarMappable(Normalize(0, 1), SCORES), ax=panels, shrink=0.7, label="objectness")
    return figure


def plot_samples(
    detector: FasterRCNN, image: Tensor, target: Target, class_names: Sequence[str], seed: int = 0
) -> Figure:
    """The regions that train the second stage: foreground with class and IoU, and background coloured by IoU.

    Args:
        detector, image, target: see above.
        class_names: of label 1 first.
        seed: of the draw.
    """
    batch, features = _features(detector, image, target)
    heads = detector.roi_heads.stages[0] if isinstance(detector.roi_heads, CascadeRoIHeads) else detector.roi_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sample = heads.sample(features, _propose(detector, batch, features), batch)  # type: ignore[operator]
    return draw_samples(batch, sample.boxes[0][sample.valid[0]], sample.labels[0][sample.valid[0]], class_names)


def draw_samples(batch: Batch, boxes: Tensor, labels: Tensor, class_names: Sequence[str]) -> Figure:
    """The picture of `plot_samples`, of regions, or anchors, that were drawn already.

    Args:
        batch: of one image, on the CPU.
        boxes: `(S, 4)` that train.
        labels: `(S,)`, 0 for background.
        class_names: of label 1 first.
    """
    iou = pairwise_iou(batch.gt_boxes[0][batch.gt_valid[0]], boxes)
    best = iou.amax(0) if len(iou) else boxes.new_zeros(len(boxes))
    figure, (left, right) = _panels(batch, 2)
    foreground = labels > 0
    for box, label, overlap in zip(boxes[foreground], labels[foreground].tolist(), best[foreground], strict=True):
        colour = tuple(v / 255 for v in class_colour(label))
        _draw(left, box[None], [colour], 1.4)
        _text(left, box, f"{class_names[label - 1]} {float(overlap):.2f}", colour)
    background = best[~foreground]
    _draw(right, boxes[~foreground], list(SCORES(2 * background.numpy())), 1.0)
    left.set_title(f"{int(foreground.sum())} foreground: class and IoU", fontsize=10)
    right.set_title(f"{len(background)} background", fontsize=10)
    figure.colorbar(ScalarMappable(Normalize(0, 0.5), SCORES), ax=[left, right], shrink=0.7, label="IoU of background")
    return figure


def plot_pyramid(detector: FasterRCNN, image: Tensor) -> Figure:
    """The feature maps: above how strong each cell is, below its three principal components as red, green and blue."""
    batch, features = _features(detector, image)
    height, width = batch.image_sizes[0].tolist()
    columns = len(features.maps) + 1
    figure = Figure(figsize=(2.6 * columns, 2 * 2.6 * height / width + 0.6), layout="constrained")
    panels = figure.subplots(2, columns)
    panels[1, 0].axis("off")
    panels[0, 0].imshow(_pixels(batch))
    panels[0, 0].set_title(f"{width} x {height}", fontsize=10)
    for k, (feature, stride) in enumerate(zip(features.maps, features.strides, strict=True)):
        part = feature[0, :, : -(-height // stride), : -(-width // stride)].float()  # without the padding
        panels[0, k + 1].imshow(part.square().mean(0).sqrt().numpy(), cmap="magma")
        panels[1, k + 1].imshow(principal_colours(part))
        panels[0, k + 1].set_title(f"stride {stride}: {part.shape[2]} x {part.shape[1]}", fontsize=10)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def principal_colours(feature: Tensor) -> NDArray[np.float32]:
    """A feature map `(C, h, w)` as a picture `(h, w, 3)` in [0, 1]: its first three principal components."""
    cells = feature.flatten(1).T  # (h * w, C)
    centred = cells - cells.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    parts = centred @ directions[:3].T
    parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[1]))
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    shown = ((parts - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return shown.view(*feature.shape[-2:], 3).numpy()


def _rpn(detector: FasterRCNN) -> RegionProposalNetwork:
    if not isinstance(detector.rpn, RegionProposalNetwork):
        raise ValueError("this detector has no anchors: its proposals come from elsewhere")
    return detector.rpn


@torch.no_grad()
def _features(detector: FasterRCNN, image: Tensor, target: Target | None = None) -> tuple[Batch, FeatureMaps]:
    """The image as the detector sees it, with its ground truth, and its feature maps, on the CPU."""
    was_training = detector.training
    detector.eval()
    try:
        targets = None if target is None else [dict(target)]
        batch = detector.transform([image], targets, detector.num_classes)
        return batch, detector.extract(batch)
    finally:
        detector.train(was_training)


def _anchors(detector: FasterRCNN, batch: Batch, features: FeatureMaps) -> list[Tensor]:
    return _rpn(detector).lay_anchors(features, batch)


@torch.no_grad()
def _propose(detector: FasterRCNN, batch: Batch, features: FeatureMaps) -> Proposals:
    was_training = detector.training
    detector.eval()
    try:
        return detector.rpn(features, batch, with_losses=False)[0]
    finally:
        detector.train(was_training)


def _pixels(batch: Batch) -> NDArray[Any]:
    height, width = batch.image_sizes[0].tolist()
    pixels = as_float(batch.images[0, :, :height, :width]).permute(1, 2, 0).numpy()
    return pixels[..., np.arange(3) % pixels.shape[2]]  # of other channels the first three


def _panels(batch: Batch, count: int) -> tuple[Figure, list[Axes]]:
    """A row of panels that show the image."""
    height, width = batch.image_sizes[0].tolist()
    each = 5.2 if count < 4 else 3.6
    figure = Figure(figsize=(each * count, each * height / width + 0.7), layout="constrained")
    panels = list(np.atleast_1d(figure.subplots(1, count)))
    for axes in panels:
        axes.imshow(_pixels(batch), alpha=0.8)
        axes.set_facecolor(GROUND)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure, panels


def _draw(axes: Axes, boxes: Tensor, colours: Sequence[Any], width: float, dashed: bool = False) -> None:
    """Outlines of boxes `(N, 4)`, without moving the limits of the panel."""
    x1, y1, x2, y2 = boxes.double().unbind(1)
    loops = torch.stack([torch.stack((x, y), 1) for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1))], 1)
    style = "--" if dashed else "-"
    axes.add_collection(
        LineCollection(list(loops.numpy()), colors=colours, linewidths=width, linestyles=style), autolim=False
    )


def _text(axes: Axes, box: Tensor, text: str, colour: Any) -> None:
    ground = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    x, y = float(box[0]), max(0.0, float(box[1]))
    axes.text(x, y, text, fontsize=6.5, va="bottom", color="black", bbox=ground, clip_on=True)
