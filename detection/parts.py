"""The contracts: what each part of a detector is called with, and what it gives.

Any class that keeps its contract is a part, yours as well as ours: there is no base class and no registry. A builder
takes a part as an object or as a factory. A factory is a class, a `functools.partial`, or in YAML a `class_path` that
leaves out some arguments; the builder calls it with what only the builder knows. `Made by` names these arguments, in
their order. A part that does not fit is refused when the detector is built, see `detection.fitting`.

Shape shorthand:
    B: images     H, W: padded height and width     h, w: cells of a map     L: levels     C: channels
    G: ground truth boxes an image     A: anchors, P: proposals, S: sampled regions of an image
    R: regions of all images     K: classes with background     k: anchors a cell     F: features of a region
    o: side of pooled features     m: side of a mask     D: masks
Boxes are `(x1, y1, x2, y2)` float32 pixels of the padded batch; label 0 is background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from detection.batch import Batch

if TYPE_CHECKING:  # models know nothing of data
    from detection.data.records import Index

Losses = dict[str, Tensor]
Detections = list[dict[str, Tensor]]
Hardness = Callable[[], Tensor]
# What builders take in the place of a module, and call with what only they know.
Factory = Callable[[int], nn.Module]
Factory2 = Callable[[int, int], nn.Module]
ProposerFactory = Callable[[int, Sequence[int]], nn.Module]


@dataclass(frozen=True, slots=True)
class FeatureMaps:
    """The maps of a backbone, finest first, each `(B, C, h, w)`, and the pixels between neighbouring cells of each."""

    maps: tuple[Tensor, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proposals:
    """Regions of a batch: boxes `(B, P, 4)` xyxy, scores `(B, P)`, valid `(B, P)` bool.

    Each image has its best first. Places that are not valid hold boxes of 0 and come last.
    """

    boxes: Tensor
    scores: Tensor
    valid: Tensor


class BackbonePart(Protocol):
    """Images -> named feature maps, all with the same number of channels.

    It may declare `strides`, the pixels between neighbouring cells of each map, and `out_channels`. What it does not
    declare is measured on a blank image, see `detection.measuring`.
    """

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        """Normalised images `(B, 3, H, W)`, or with the data's channels, -> `{name: (B, C, h, w)}`, finest first."""
        ...


class Pyramid(Protocol):
    """The maps of a network's stages -> maps of one width. Made by (in_channels: list of each map's channels)."""

    def __call__(self, maps: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`{name: (B, C_i, h_i, w_i)}`, finest first -> `{name: (B, C, h_i, w_i)}`; coarser maps may be added."""
        ...


class Proposer(Protocol):
    """Feature maps -> proposals, and the losses of what it learns. Made by (in_channels, strides)."""

    def __call__(self, features: FeatureMaps, batch: Batch, with_losses: bool) -> tuple[Proposals, Losses]:
        """Proposals without a gradient, any number P of them; losses by name, which may be none."""
        ...


class RPNHeadPart(Protocol):
    """Feature maps -> objectness and deltas of each anchor, as torchvision's heads. Made by (in_channels, k)."""

    def __call__(self, maps: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Maps `(B, C, h, w)` of each level -> logits `(B, k, h, w)` and deltas `(B, k * 4, h, w)` of each level."""
        ...


class MatcherPart(Protocol):
    """Which ground truth each anchor or proposal trains on."""

    def __call__(self, gt_boxes: Tensor, gt_valid: Tensor, boxes: Tensor) -> Tensor:
        """Ground truth `(B, G, 4)`, which of it is valid `(B, G)`, boxes `(A, 4)` or `(B, A, 4)` -> `(B, A)` int64.

        An index into G, or -1 for background, or -2 for what trains nothing.
        """
        ...


class Sampler(Protocol):
    """Draws the anchors or proposals that train.

    Attributes:
        max_positive: most foreground that it draws of an image. Foreground comes first.
    """

    max_positive: int

    def __call__(self, labels: Tensor, hardness: Hardness) -> tuple[Tensor, Tensor]:
        """Labels `(B, A)`: above 0 foreground, 0 background, below 0 never drawn -> indices `(B, S)`, valid `(B, S)`.

        `hardness()` gives the present loss of each row, `(B, A)`, without a gradient. In the heads a call costs a pass
        of the box head over all proposals. A sampler with an attribute `wants_overlaps = True` is called with a third
        argument: `overlaps()` gives the highest IoU of each row with an object, `(B, A)`.
        """
        ...


class BoxCoderPart(Protocol):
    """Boxes as deltas against reference boxes, and back."""

    def encode(self, gt_boxes: Tensor, boxes: Tensor) -> Tensor:
        """Deltas `(..., 4)` that turn boxes `(..., 4)` into ground truth `(..., 4)`."""
        ...

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes `(..., 4)` that deltas `(..., 4)` describe relative to boxes `(..., 4)`."""
        ...


class ObjectnessLoss(Protocol):
    """A loss of each sampled anchor. The RPN divides their sum by the number of sampled anchors of the batch."""

    def __call__(self, logits: Tensor, is_object: Tensor) -> Tensor:
        """Logits `(R,)` float32, and 1.0 for objects and 0.0 for background `(R,)` -> `(R,)`."""
        ...


class ClassificationLoss(Protocol):
    """A loss of each sampled region. The heads divide their sum by the number of sampled regions of the batch.

    Classes that were not looked for are part of the background in the logits, see `losses.merge_unlabelled`.

    Logits are read by a softmax over K, unless the loss has a method `probabilities` that reads them otherwise: float32
    `(..., K)` -> probabilities `(..., K)`. Detections have those of columns 1 to K - 1. In rows of background, classes
    that were not looked for then have logits of next to nothing, and the background keeps its own. A loss with an
    attribute `wants_valid = True` is called with a third argument, `(R,)` bool, False for rows that are padding.
    A loss may be a module; each stage of a cascade has a copy.
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `(R, K)` float32 and labels `(R,)` int64 -> `(R,)`."""
        ...


class BoxLoss(Protocol):
    """A loss of each refined box, in the RPN and in the heads.

    Foreground alone counts, but the sum is divided by the number of all sampled anchors or regions of the batch.
    """

    def __call__(self, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, box_coder: BoxCoderPart) -> Tensor:
        """Predicted deltas `(R, 4)` of boxes `(R, 4)`, and their ground truth `(R, 4)`, all float32 -> `(R,)`."""
        ...


class MaskLoss(Protocol):
    """A loss of each region's mask. The heads take the mean over the foreground regions of the batch."""

    def __call__(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Logits `(R, m, m)` float32 of the true class, and masks `(R, m, m)` in [0, 1] -> `(R,)`."""
        ...


class MaskGridPart(Protocol):
    """Where the m x m cells of a predicted mask lie in its box: in training, and on the image."""

    def targets(self, gt_masks: Tensor, windows: Tensor, index: Tensor, boxes: Tensor, side: int) -> Tensor:
        """What each region should predict, `(B, M, m, m)` float32 in [0, 1].

        Args:
            gt_masks: `(B, G, h, w)` uint8, 255 inside.
            windows: `(B, G, 4)`, the part of the image that each mask shows, see `Batch`.
            index: `(B, M)` int64, the object of each region as its row among all `B * G`; -1 for none.
            boxes: `(B, M, 4)` of the regions, in pixels of the batch.
            side: m.
        """
        ...

    def windows(
        self, probabilities: Tensor, boxes: Tensor, size: tuple[int, int]
    ) -> Iterable[tuple[slice, slice, Tensor]]:
        """Of each mask the rows and columns of the image that it may cover, and its probabilities there, `(h, w)`.

        Args:
            probabilities: `(D, m, m)`.
            boxes: `(D, 4)` xyxy in pixels of the image.
            size: (height, width) of the image.
        """
        ...

    def inside(self, probabilities: Tensor) -> Tensor:
        """Which probabilities, of any shape, count as the object: bool."""
        ...


class KeypointHead(Protocol):
    """Pooled features -> features of heatmaps. Made by (in_channels)."""

    def __call__(self, pooled: Tensor) -> Tensor:
        """`(R, C, o, o)` -> `(R, C', o', o')`."""
        ...


class KeypointPredictor(Protocol):
    """Features of heatmaps -> one heatmap a key point. Made by (in_channels, num_keypoints)."""

    def __call__(self, features: Tensor) -> Tensor:
        """`(R, C', o', o')` -> logits `(R, k, m, m)`, k key points of an object."""
        ...


class KeypointLoss(Protocol):
    """A loss of each key point. The heads take the mean over those of the batch that are annotated and in their box."""

    def __call__(self, logits: Tensor, cells: Tensor) -> Tensor:
        """Logits `(Q, S)` float32 of the S = m * m cells of each heatmap, and the true cell `(Q,)` int64 -> `(Q,)`.

        Q are the key points of all regions, those that do not count among them.
        """
        ...


class RoIPoolPart(Protocol):
    """Feature maps and boxes -> features of one size for each region.

    Attributes:
        output_size: o.
    """

    output_size: int

    def __call__(self, features: FeatureMaps, boxes: Tensor) -> Tensor:
        """Boxes `(B, P, 4)` -> `(B * P, C, o, o)`."""
        ...


class BoxHead(Protocol):
    """Pooled features -> features of each region. Made by (in_channels, output_size)."""

    def __call__(self, pooled: Tensor) -> Tensor:
        """`(R, C, o, o)` -> `(R, F)`."""
        ...


class BoxPredictor(Protocol):
    """Features of regions -> class logits and box deltas. Made by (in_channels, num_classes).

    K is its `num_classes`, or the outputs of its `cls_score`, as torchvision's predictors have it.
    """

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`(R, F)` -> logits `(R, K)`, and deltas `(R, K * 4)` of each class, or `(R, 4)` for all."""
        ...


class MaskHead(Protocol):
    """Pooled features -> features of masks. Made by (in_channels)."""

    def __call__(self, pooled: Tensor) -> Tensor:
        """`(R, C, o, o)` -> `(R, C', o', o')`."""
        ...


class MaskPredictor(Protocol):
    """Features of masks -> one mask a class. Made by (in_channels, num_classes)."""

    def __call__(self, features: Tensor) -> Tensor:
        """`(R, C', o', o')` -> logits `(R, K, m, m)`."""
        ...


class RoIHeadsPart(Protocol):
    """Feature maps and proposals -> losses, or classes and boxes. Made by (in_channels, num_classes).

    Attributes:
        num_classes: K.
        has_masks: whether detections have masks.
        has_keypoints, num_keypoints: whether they have key points, and how many. Heads without need neither.
    """

    num_classes: int
    has_masks: bool

    def losses(self, features: FeatureMaps, proposals: Proposals, batch: Batch) -> Losses:
        """Losses by name."""
        ...

    def detect(self, features: FeatureMaps, proposals: Proposals, image_sizes: Tensor) -> Detections:
        """Of each image `boxes` `(D, 4)` inside it, `labels` `(D,)` from 1 on and `scores` `(D,)`, best first."""
        ...


class Reader(Protocol):
    """Annotations as the user has them -> records. A function will do; `data.reader` takes it in place of a format."""

    def __call__(self, root: Path, split: str) -> Index:
        """The folder of the data set, and the name of a split (`data.train_split`, ...) -> its images and objects.

        All splits may have their own lists of classes: labels are translated into those of the training split by name.
        What is repaired or left out is noted in the index's `defects`; what can't be used is a `DataError`.
        """
        ...
