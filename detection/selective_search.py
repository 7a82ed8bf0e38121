"""Selective Search: regions that may hold an object, grown from a segmentation of the image by grouping neighbours.

Uijlings, van de Sande, Gevers and Smeulders, "Selective Search for Object Recognition", IJCV 2013. The initial
segmentation (Felzenszwalb and Huttenlocher 2004) is scikit-image's, in the optional extra `proposals`.

Shape shorthand:
    H, W: pixels of the image     C: channels of a colour space     N: segments of the initial segmentation
    D: values of a region's histograms     K: pairs of neighbours     P: proposals
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.recipes import recorded

ColourSpace = Literal["hsv", "lab", "rgi", "hue", "intensity"]
Measures = Literal["CTSF", "TSF", "F", "S"]  # colour, texture, size, fill: the sums of table 6

VERSION = 1  # raise it when the same image and arguments give other boxes: stored proposals are marked with it
SMOOTHING = 0.8  # pixels: sigma before the segmentation (section 3.1)
COLOUR_BINS, TEXTURE_BINS, ORIENTATIONS = 25, 10, 8  # section 3.2

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Regions(NamedTuple):
    """The segments of an image and what their similarity is computed from.

    Attributes:
        boxes: `(N, 4)` int64 xyxy, x2 and y2 one past the last pixel.
        sizes: `(N,)` int64 pixels.
        colour, texture: `(N, D)` float32 histograms that sum to 1.
        image_size: pixels of the image.
    """

    boxes: Ints
    sizes: Ints
    colour: Floats
    texture: Floats
    image_size: int


@recorded
class SelectiveSearch:
    """Proposes boxes for an image; the same image always gets the same.

    The defaults are the paper's "fast" mode, 8 groupings, at the image width that R-CNN used. Its "quality" mode has
    80: all five colour spaces, all four sums of similarities, and scales 50, 100, 150 and 300 (table 6).

    Args:
        colour_spaces: in which to segment and group.
        measures: whose sum decides what is grouped next: Colour, Texture, Size, Fill.
        scales: k of the initial segmentation: larger prefers larger segments, none of which has fewer than k pixels.
        width: pixels that images are resized to, so that scales mean the same on all; None leaves them as they are.
        min_side: boxes thinner than this many pixels of the resized image are left out.
        max_proposals: how many of the best come out.
    """

    def __init__(
        self,
        colour_spaces: Sequence[ColourSpace] = ("hsv", "lab"),
        measures: Sequence[Measures] = ("CTSF", "TSF"),
        scales: Sequence[int] = (50, 100),
        width: int | None = 500,
        min_side: int = 10,
        max_proposals: int = 2000,
    ) -> None:
        self.colour_spaces, self.measures, self.scales = tuple(colour_spaces), tuple(measures), tuple(scales)
        self.width, self.min_side, self.max_proposals = width, min_side, max_proposals

    @property
    def settings(self) -> dict[str, Any]:
        """What the boxes depend on besides the image, in plain values."""
        arguments = ("colour_spaces", "measures", "scales", "width", "min_side", "max_proposals")
        return {"method": "selective search", "version": VERSION} | {name: getattr(self, name) for name in arguments}

    def __call__(self, image: NDArray[np.uint8]) -> Floats:
        """Boxes `(P, 4)` float32 xyxy in pixels of the image `(H, W, 3)` uint8 RGB, best first.

        Raises:
            ImportError: scikit-image is not installed.
        """
        felzenszwalb = _segmentation()
        height, width = image.shape[:2]
        if self.width is not None and self.width != width:
            size = (self.width, max(1, round(height * self.width / width)))
            method = cv2.INTER_AREA if self.width < width else cv2.INTER_LINEAR
            image = np.asarray(cv2.resize(image, size, interpolation=method), np.uint8)
        # A fixed seed: the paper's draws make the order fair between groupings, they are no part of the result.
        rng = np.random.default_rng(0)
        boxes, ranks = [], []
        for space in self.colour_spaces:
            pixels = convert(image, space)
            bins = colour_bins(pixels), texture_bins(pixels)
            for scale in self.scales:
                segments = felzenszwalb(pixels, scale, SMOOTHING, scale, channel_axis=-1)
                regions, pairs = describe(segments, *bins), neighbours(segments)
                for measures in self.measures:
                    grouped = group(regions, pairs, measures).boxes
                    boxes.append(grouped)
                    # Equation after section 3.3: the whole image has position 1, the segment grouped last the largest.
                    ranks.append(rng.random(len(grouped)) * np.arange(len(grouped), 0, -1))
        best = self._best(np.concatenate(boxes), np.concatenate(ranks))
        scale_back = np.array([width / image.shape[1], height / image.shape[0]] * 2, np.float32)
        return np.minimum(best.astype(np.float32) * scale_back, np.array([width, height] * 2, np.float32))

    def _best(self, boxes: Ints, ranks: NDArray[np.float64]) -> Ints:
        """Boxes of the lowest rank first, each once (at its best rank), without the thin ones."""
        boxes = boxes[np.argsort(ranks, kind="stable")]
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2] >= self.min_side).all(axis=1)]
        first = np.unique(boxes, axis=0, return_index=True)[1] if len(boxes) else np.zeros(0, np.int64)
        return boxes[np.sort(first)[: self.max_proposals]]


def _segmentation() -> Any:
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise ImportError("Selective Search needs scikit-image: pip install 'detection[proposals]'") from error
    return felzenszwalb


def convert(image: NDArray[np.uint8], space: ColourSpace) -> Floats:
    """`(H, W, 3)` uint8 RGB -> `(H, W, C)` float32 in [0, 1] of another colour space (section 3.2)."""
    rgb = image.astype(np.float32) / 255
    if space == "lab":
        lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)
        return np.asarray((lab + np.array([0, 128, 128], np.float32)) / np.array([100, 255, 255], np.float32))
    if space in ("hsv", "hue"):
        hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV) / np.array([360, 1, 1], np.float32)
        return np.ascontiguousarray(hsv if space == "hsv" else hsv[..., :1], np.float32)
    total = rgb.sum(axis=2, keepdims=True)
    if space == "intensity":
        return np.asarray(total / 3)
    return np.concatenate((rgb[..., :2] / np.maximum(total, 1e-6), total / 3), axis=2)


def colour_bins(pixels: Floats) -> Ints:
    """The bin of each pixel's value in each channel: `(H, W, C)` -> `(C, H, W)` in [0, 25)."""
    return _bins(np.ascontiguousarray(pixels.transpose(2, 0, 1)), 1.0, COLOUR_BINS)


def texture_bins(pixels: Floats) -> Ints:
    """Bins of the Gaussian derivatives (sigma 1) in eight directions: `(H, W, C)` -> `(8 * C, H, W)` in [0, 10).

    A derivative counts where it rises in its direction, and the steepest of the channel ends the last bin.
    """
    x = np.arange(-4, 5, dtype=np.float32)
    gauss = np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi, dtype=np.float32)
    bins = []
    for channel in np.moveaxis(pixels, 2, 0):
        dx = cv2.sepFilter2D(channel, cv2.CV_32F, x * gauss, gauss, borderType=cv2.BORDER_REFLECT)
        dy = cv2.sepFilter2D(channel, cv2.CV_32F, gauss, x * gauss, borderType=cv2.BORDER_REFLECT)
        steepest = max(float(np.hypot(dx, dy).max()), 1e-6)
        for angle in np.arange(ORIENTATIONS) * (2 * np.pi / ORIENTATIONS):
            slope = np.float32(np.cos(angle)) * dx + np.float32(np.sin(angle)) * dy
            bins.append(_bins(slope.clip(min=0), steepest, TEXTURE_BINS))
    return np.stack(bins)


def _bins(values: Floats, highest: float, count: int) -> Ints:
    """Values in [0, highest] -> bins in [0, count)."""
    return np.minimum((values * np.float32(count / highest)).astype(np.int64), count - 1)


def describe(segments: Ints, colours: Ints, textures: Ints) -> Regions:
    """The regions of a segmentation `(H, W)` numbered from 0, from the bins of its pixels `(channels, H, W)`."""
    count = int(segments.max()) + 1
    flat = segments.ravel()
    sizes = np.bincount(flat, minlength=count)
    y, x = np.indices(segments.shape)
    corners = np.empty((count, 4), np.int64)
    corners[:, :2], corners[:, 2:] = max(segments.shape), 0
    for column, values in ((0, x), (1, y)):
        np.minimum.at(corners[:, column], flat, values.ravel())
        np.maximum.at(corners[:, column + 2], flat, values.ravel() + 1)
    colour = _histograms(flat, colours, count, COLOUR_BINS)
    texture = _histograms(flat, textures, count, TEXTURE_BINS)
    return Regions(corners, sizes, colour, texture, segments.size)


def _histograms(flat: Ints, bins: Ints, count: int, levels: int) -> Floats:
    """One histogram a channel and region, side by side and together of sum 1: `(N, channels * levels)`."""
    first_bin = flat * levels
    parts = [
        np.bincount(first_bin + channel.ravel(), minlength=count * levels).reshape(count, levels) for channel in bins
    ]
    histograms = np.concatenate(parts, axis=1).astype(np.float32)
    return np.asarray(histograms / histograms.sum(axis=1, keepdims=True))


def neighbours(segments: Ints) -> Ints:
    """Pairs of segments `(K, 2)` that share an edge between two pixels, each once with the lower number first."""
    count = int(segments.max()) + 1
    numbers = []
    for a, b in ((segments[:, :-1], segments[:, 1:]), (segments[:-1], segments[1:])):
        edge = a != b
        numbers.append(np.minimum(a[edge], b[edge]) * count + np.maximum(a[edge], b[edge]))
    return np.stack(np.divmod(np.unique(np.concatenate(numbers)), count), axis=1)


def similarity(regions: Regions, first: Ints | int, second: Ints | int, measures: Measures) -> NDArray[np.float64]:
    """How similar regions are, by the sum of the measures chosen (equations 1, 2, 4, 5 and 6).

    Args:
        regions: of which `first` and `second` are rows, `(K,)` each or one of them a single row.
        first, second: the two of each pair.
        measures: which to add up; each lies in [0, 1].
    """
    total = np.zeros(np.broadcast_shapes(np.shape(first), np.shape(second)))
    for letter, histograms in (("C", regions.colour), ("T", regions.texture)):
        if letter in measures:
            total += np.minimum(histograms[first], histograms[second]).sum(axis=-1)
    size = regions.sizes[first] + regions.sizes[second]
    if "S" in measures:
        total += 1 - size / regions.image_size
    if "F" in measures:
        low = np.minimum(regions.boxes[first, :2], regions.boxes[second, :2])
        high = np.maximum(regions.boxes[first, 2:], regions.boxes[second, 2:])
        total += 1 - ((high - low).prod(axis=-1) - size) / regions.image_size
    return total


def group(regions: Regions, pairs: Ints, measures: Measures) -> Regions:
    """The N segments and, behind them, the N - 1 groups in the order made, the whole image last (algorithm 1).

    Args:
        regions: the segments.
        pairs: `(K, 2)` that touch; together they connect all segments.
        measures: see `similarity`. Of equally similar pairs the one with the lower numbers is grouped first.
    """
    count = len(regions.sizes)
    grown = regions._replace(
        boxes=_with_room(regions.boxes),
        sizes=_with_room(regions.sizes),
        colour=_with_room(regions.colour),
        texture=_with_room(regions.texture),
    )
    touching: list[set[int]] = [set() for _ in range(2 * count - 1)]
    for a, b in pairs.tolist():
        touching[a].add(b)
        touching[b].add(a)
    # Pairs of which one has been grouped since stay in the heap and are passed over: a group has a number of its own.
    scores = similarity(grown, pairs[:, 0], pairs[:, 1], measures)
    heap = [(-score, a, b) for score, (a, b) in zip(scores.tolist(), pairs.tolist(), strict=True)]
    heapq.heapify(heap)
    alive = [True] * count + [False] * (count - 1)
    new = count
    while heap:
        _, a, b = heapq.heappop(heap)
        if not (alive[a] and alive[b]):
            continue
        _merge(grown, a, b, new)
        touching[new] = (touching[a] | touching[b]) - {a, b}
        alive[a], alive[b], alive[new] = False, False, True
        around = [c for c in sorted(touching[new]) if alive[c]]
        for c in around:
            touching[c].add(new)
        if around:
            scores = similarity(grown, np.array(around), new, measures)
            for score, c in zip(scores.tolist(), around, strict=True):
                heapq.heappush(heap, (-score, c, new))
        new += 1
    return grown


def _with_room(rows: NDArray[Any]) -> NDArray[Any]:
    """`(N, ...)` -> `(2 * N - 1, ...)`: with a row for each group to come."""
    return np.concatenate((rows, np.zeros_like(rows[1:])))


def _merge(regions: Regions, a: int, b: int, new: int) -> None:
    """Fill row `new` with the union of rows `a` and `b`; histograms are averaged by size (equation 3)."""
    boxes, sizes = regions.boxes, regions.sizes
    boxes[new, :2] = np.minimum(boxes[a, :2], boxes[b, :2])
    boxes[new, 2:] = np.maximum(boxes[a, 2:], boxes[b, 2:])
    sizes[new] = sizes[a] + sizes[b]
    share = np.float32(sizes[a] / sizes[new])
    for histograms in (regions.colour, regions.texture):
        histograms[new] = share * histograms[a] + (1 - share) * histograms[b]
