"""Augmentation and framing of one image with its objects: what is shown of it, how large, and which way round.

Images stay as the file has them, (H, W, C) uint8 or uint16, up to the device, which normalises them once. A pipeline of
albumentations comes first, where there is one (`detection.data.pipeline`). Flips and framing are written here, for
image, boxes and masks at once, because albumentations spends half a millisecond on the boxes of each image, while
decoding it takes one. Both say by its index which object each box is, so that labels can't fall out of step with boxes.
Resizing comes last: here its size is chosen, and `collate` resizes straight into the batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.data.pipeline import ROUNDING, Pipeline, Step, colour_steps
from detection.data.skeletons import inside
from detection.data.spectral import RGB, PixelFormat, Pixels
from detection.resizing import Resizing, resize_into, resized_size

__all__ = ["Augmented", "ScaleJitter", "ShortSide", "Transform", "View", "crop_masks", "eval_transform", "resize_into",
           "resized_size", "train_transform"]  # fmt: skip


class View(NamedTuple):
    """What is shown of an image: a window `(x1, y1, x2, y2)` in whole pixels, resized to `size` `(height, width)`."""

    window: tuple[int, int, int, int]
    size: tuple[int, int]

    def boxes(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes `(N, 4)` of the image in pixels of the view, clipped to it, which may leave nothing of some."""
        x1, y1, x2, y2 = self.window
        scale = np.array([self.size[1] / (x2 - x1), self.size[0] / (y2 - y1)] * 2, dtype=np.float32)
        moved = (boxes - np.array([x1, y1] * 2, dtype=np.float32)) * scale
        return np.asarray(moved.clip(0, np.array(self.size[::-1] * 2, dtype=np.float32)))

    def shares(self, boxes: NDArray[np.float32], shown: NDArray[np.float32]) -> NDArray[np.float32]:
        """The share of each box `(N, 4)` of the image that is left in `shown`, which `boxes` gave: `(N,)`."""
        x1, y1, x2, y2 = self.window
        scale = self.size[0] * self.size[1] / ((x2 - x1) * (y2 - y1))
        whole, left = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, shown))
        return np.asarray(left / np.maximum(whole * scale, 1e-12))

    def keypoints(self, keypoints: NDArray[np.float32]) -> NDArray[np.float32]:
        """Key points `(N, k, 3)` of the image in pixels of the view; those outside of it are not annotated there."""
        x1, y1, x2, y2 = self.window
        scale = np.array([self.size[1] / (x2 - x1), self.size[0] / (y2 - y1), 1], dtype=np.float32)
        return inside((keypoints - np.array([x1, y1, 0], dtype=np.float32)) * scale, *self.size)

    def masks(self, masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Masks `(N, H, W)` of the image as `(N, *size)`, each pixel the nearest."""
        x1, y1, x2, y2 = self.window
        out = np.empty((len(masks), *self.size), np.uint8)
        for mask, slot in zip(masks[:, y1:y2, x1:x2], out, strict=True):
            cv2.resize(mask, self.size[::-1], dst=slot, interpolation=cv2.INTER_NEAREST_EXACT)
        return out


class Framing(Protocol):
    """Chooses the view of an image of the given height and width, with whatever chance it needs from `rng`."""

    def __call__(self, height: int, width: int, rng: random.Random) -> View: ...


@dataclass(frozen=True)
class ShortSide:
    """The whole image by a size rule, its short side drawn from `min_sizes` for every image."""

    min_sizes: tuple[int, ...]
    max_size: int
    resizing: Resizing = "torchvision"

    def __call__(self, height: int, width: int, rng: random.Random) -> View:
        sizes = rng.choice(self.min_sizes), self.max_size
        return View((0, 0, width, height), resized_size(height, width, *sizes, self.resizing))


@dataclass(frozen=True)
class ScaleJitter:
    """Large-scale jitter (Ghiasi et al. 2021, section 3): scale at random, then cut out at most `size` x `size`.

    The image that fits a square of `size` is scaled by a factor drawn evenly from `scales`. Smaller ones are not padded
    here: the batch is.
    """

    size: int
    scales: tuple[float, float]

    def __call__(self, height: int, width: int, rng: random.Random) -> View:
        scale = rng.uniform(*self.scales) * self.size / max(height, width)
        h, w = (min(side, max(1, round(self.size / scale))) for side in (height, width))
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        new_h, new_w = (min(self.size, max(1, round(side * scale))) for side in (h, w))
        return View((x, y, x + w, y + h), (new_h, new_w))


class Augmented(NamedTuple):
    """What a `Transform` returns.

    Attributes:
        image: `(h, w, C)` pixels, still to be resized to `size`.
        size: `(height, width)` of the result.
        boxes: `(M, 4)` float32 xyxy in pixels of the result, inside it, at least `min_box_side` wide and high.
        kept: `(M,)` int64, which of the objects given each of them is.
        masks: None when none were given, else what each object covers of its window, see `crop_masks`.
        windows: `(M, 4)` float32 xyxy in pixels of the result, one a mask.
        resizing: how it is resized, see `detection.resizing`.
        keypoints: None when none were given, else `(M, k, 3)` float32 in pixels of the result; those that are no longer
            in it are not annotated.
    """

    image: Pixels
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    kept: NDArray[np.int64]
    masks: NDArray[np.uint8] | None = None
    windows: NDArray[np.float32] | None = None
    resizing: Resizing = "torchvision"
    keypoints: NDArray[np.float32] | None = None

    def flipped(self, horizontally: bool, vertically: bool, swap: NDArray[np.int64] | None = None) -> Augmented:
        """The same in a mirror: left and right change places, or top and bottom, or both.

        Args:
            horizontally, vertically: which mirrors. Two turn the image by half, and leave left hands left.
            swap: `Skeleton.flip` of the key points: in one mirror, of either kind, a left hand becomes a right one.
        """
        out = self
        for axis in [0] * horizontally + [1] * vertically:
            side = out.size[1 - axis]
            image: Any = cv2.flip(out.image, 1 - axis)  # without the axis of a single channel
            out = out._replace(image=image.reshape(out.image.shape), boxes=_mirror(out.boxes, axis, side))
            if out.masks is not None and out.windows is not None:
                masks = np.ascontiguousarray(np.flip(out.masks, 2 - axis))
                out = out._replace(masks=masks, windows=_mirror(out.windows, axis, side))
            if out.keypoints is not None:
                assert swap is not None  # `DetectionDataModule` sees to it
                points = out.keypoints[:, swap]
                points[..., axis] = np.where(points[..., 2] > 0, side - points[..., axis], 0)
                out = out._replace(keypoints=points)
        return out


def _mirror(boxes: NDArray[np.float32], axis: int, side: int) -> NDArray[np.float32]:
    """Boxes `(N, 4)` in a picture of `side` pixels that is mirrored along x (axis 0) or y (axis 1)."""
    mirrored = boxes.copy()
    mirrored[:, [axis, axis + 2]] = side - boxes[:, [axis + 2, axis]]
    return mirrored


MASK_SIDE = 112  # pixels: four times the side of the masks that Mask R-CNN learns


def crop_masks(
    masks: NDArray[np.uint8], boxes: NDArray[np.float32], view: View
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Each object's mask inside the view, cut out and brought to one size, whatever the size of object and image.

    Args:
        masks: `(N, H, W)` uint8 0/1.
        boxes: `(N, 4)` of the objects, in pixels of the view.
        view: what is shown of the image.

    Returns:
        `(N, MASK_SIDE, MASK_SIDE)` uint8, the share of each pixel that is covered, 255 for all of it; and the windows
        that they show, `(N, 4)` float32 in pixels of the view: box and mask, whichever reaches further.
    """
    x1, y1, x2, y2 = view.window
    per_pixel = np.array([(x2 - x1) / view.size[1], (y2 - y1) / view.size[0]] * 2)
    sources = boxes * per_pixel  # in pixels of the window
    corners = np.concatenate([np.floor(sources[:, :2] + 1e-3), np.ceil(sources[:, 2:] - 1e-3)], axis=1).astype(int)
    crops = np.zeros((len(masks), MASK_SIDE, MASK_SIDE), np.uint8)
    for mask, corner, slot in zip(masks[:, y1:y2, x1:x2], corners, crops, strict=True):
        x, y, w, h = cv2.boundingRect(mask)
        if w and h:
            corner[:] = *np.minimum(corner[:2], (x, y)), *np.maximum(corner[2:], (x + w, y + h))
        left, top, right, bottom = corner
        slot[:] = _to_square(mask[top:bottom, left:right] * np.uint8(255))
    return crops, (corners / per_pixel).astype(np.float32)


def _to_square(crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # One axis at a time: averaging is for the axis that shrinks, and OpenCV averages only where both do.
    for width, height in ((MASK_SIDE, crop.shape[0]), (MASK_SIDE, MASK_SIDE)):
        shrinks = width < crop.shape[1] or height < crop.shape[0]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        crop = np.asarray(cv2.resize(crop, (width, height), interpolation=method), np.uint8)
    return crop


class Transform:
    """A pipeline that moves an image, its boxes and masks together.

    Attributes:
        resizing: how the image will be resized, see `take_resizing`.

    Args:
        framing: chooses what is shown of the image and how large, after everything else.
        steps: albumentations transforms of any kind, applied in order before flips and framing.
        flips: probability of a horizontal and of a vertical flip.
        min_box_side: boxes that end up thinner than this many pixels are dropped.
        min_visibility: boxes of which `steps` and `framing` leave less than this share are dropped.
        swap: `(k,)`, `Skeleton.flip` of the key points; None where there are none, or nothing is mirrored.
    """

    def __init__(
        self,
        framing: Framing,
        steps: Sequence[Step] = (),
        flips: tuple[float, float] = (0.0, 0.0),
        min_box_side: float = 1.0,
        min_visibility: float = 0.0,
        swap: NDArray[np.int64] | None = None,
    ) -> None:
        self.framing, self.flips, self.swap = framing, flips, swap
        self.min_box_side, self.min_visibility = min_box_side, min_visibility
        self._pipeline = Pipeline(steps, min_visibility, swap) if steps else None
        self.resizing: Resizing = "torchvision"

    def take_resizing(self, resizing: Resizing) -> None:
        """Resize as the detector does that is trained or evaluated."""
        self.resizing = resizing
        if isinstance(self.framing, ShortSide):
            self.framing = replace(self.framing, resizing=resizing)

    def __call__(
        self,
        image: Pixels,
        boxes: NDArray[np.float32],
        masks: NDArray[np.uint8] | None = None,
        seed: int = 0,
        keypoints: NDArray[np.float32] | None = None,
    ) -> Augmented:
        """Transform one image.

        Args:
            image: `(H, W, C)` uint8 or uint16.
            boxes: `(N, 4)` xyxy pixels; degenerate ones are dropped.
            masks: `(N, H, W)` uint8 0/1.
            seed: decides every random choice; the same seed gives the same result in any process.
            keypoints: `(N, k, 3)` x, y and visibility.

        Raises:
            DataError: a step does not take this image.
        """
        rng = random.Random(seed)
        given, shares = np.arange(len(boxes)), np.ones(len(boxes), np.float32)
        if self._pipeline is not None:
            moved = self._pipeline(image, boxes, masks, seed, rng, keypoints)
            image, boxes, masks, given, shares, keypoints = moved
        flip_x, flip_y = (rng.random() < chance for chance in self.flips)
        view = self.framing(image.shape[0], image.shape[1], rng)
        x1, y1, x2, y2 = view.window
        shown = view.boxes(boxes)
        left = (shown[:, 2:] - shown[:, :2] >= self.min_box_side).all(axis=1)
        if self.min_visibility:
            left &= shares * view.shares(boxes, shown) >= self.min_visibility - ROUNDING
        kept = np.flatnonzero(left)
        out = Augmented(image[y1:y2, x1:x2], view.size, shown[kept], given[kept], resizing=self.resizing)
        if masks is not None:
            crops, windows = crop_masks(masks[kept], out.boxes, view)
            out = out._replace(masks=crops, windows=windows)
        if keypoints is not None:
            out = out._replace(keypoints=view.keypoints(keypoints[kept]))
        return out.flipped(flip_x, flip_y, self.swap)


def eval_transform(min_size: int = 800, max_size: int = 1333) -> Transform:
    """Resize only: the pipeline of validation, test and prediction."""
    return Transform(ShortSide((min_size,), max_size))


def train_transform(
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    hflip: float = 0.5,
    vflip: float = 0.0,
    photometric: float = 0.0,
    scale_jitter: tuple[float, float] | None = None,
    augmentations: Sequence[Step] = (),
    min_visibility: float = 0.0,
    form: PixelFormat = RGB,
    swap: NDArray[np.int64] | None = None,
) -> Transform:
    """The pipeline of training.

    Args:
        min_size: short side in pixels; several make multi-scale training, one drawn for every image.
        max_size: cap of the long side.
        hflip, vflip: probability of a horizontal, a vertical flip.
        photometric: probability of each of the brightness and contrast, hue and saturation, and gamma changes. Hue and
            saturation are those of 8-bit RGB alone.
        scale_jitter: range of factors for large-scale jitter into `max_size` x `max_size`; `min_size` then has no say.
        augmentations: albumentations transforms, applied in order before all others.
        min_visibility: objects of which augmentations and jitter leave less than this share of their box are dropped.
        form: channels and depth of the images.
        swap: `Skeleton.flip` of the key points, where there are any.
    """
    steps = [*augmentations, *(colour_steps(photometric, form) if photometric else ())]
    framing: Framing = ShortSide((min_size,) if isinstance(min_size, int) else tuple(min_size), max_size)
    if scale_jitter:
        framing = ScaleJitter(max_size, scale_jitter)
    return Transform(framing, steps, (hflip, vflip), min_visibility=min_visibility, swap=swap)
