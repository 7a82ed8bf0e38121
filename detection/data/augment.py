"""Augmentation and resizing of one image with its objects: every albumentations call of the project.

Images stay uint8 (H, W, 3) from the file to the device, where the model normalises them once. Only boxes and an index
travel through albumentations; the caller picks labels, areas and flags by that index, so that no two per-object arrays
can fall out of step.

Albumentations 2.0.8 (the last MIT release) keeps a random generator inside the pipeline, which a fork copies to every
worker and every epoch. Here the pipeline is given a fresh generator for every sample instead. It is *one* generator
for all transforms: `Compose.set_random_seed` would give each transform the same seed, and a horizontal flip would then
come with a vertical flip every time.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import, which otherwise asks the network for a new version

import albumentations as A  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
from albumentations.core.type_definitions import Targets  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

FILL = (124, 116, 104)  # ImageNet's mean colour, which the model normalises to about zero


def resized_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Torchvision's size rule: the short side becomes `min_size` unless the long side would exceed `max_size`.

    Returns:
        `(height, width)`, each rounded down, at least 1 pixel.
    """
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, int(height * scale)), max(1, int(width * scale))


class Resize(A.DualTransform):
    """Resize by torchvision's rule, to a short side drawn from `min_sizes` for every image.

    Bilinear without antialiasing, as torchvision's detectors do it, within one grey level (OpenCV works in fixed
    point).
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    def __init__(self, min_sizes: Sequence[int], max_size: int) -> None:
        super().__init__(p=1.0)
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        return {"size": resized_size(height, width, self.py_random.choice(self.min_sizes), self.max_size)}

    def apply(self, img: NDArray[np.uint8], size: tuple[int, int], **params: Any) -> NDArray[np.uint8]:
        return _resize(img, size, cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: NDArray[np.uint8], size: tuple[int, int], **params: Any) -> NDArray[np.uint8]:
        return _resize(mask, size, cv2.INTER_NEAREST)

    def apply_to_bboxes(self, bboxes: NDArray[np.float32], **params: Any) -> NDArray[np.float32]:
        return bboxes  # albumentations holds them as fractions of the image


class ScaleJitter(Resize):
    """Resize so that the image, fitted into a square of `size`, is scaled by a factor drawn from `scales`.

    With a crop or padding to the square this is large-scale jitter (Ghiasi et al. 2021, section 3; 0.1 to 2.0).
    """

    def __init__(self, size: int, scales: tuple[float, float]) -> None:
        super().__init__((size,), size)
        self.scales = scales

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        scale = self.py_random.uniform(*self.scales) * self.max_size / max(height, width)
        return {"size": (max(1, round(height * scale)), max(1, round(width * scale)))}


def _resize(image: NDArray[np.uint8], size: tuple[int, int], interpolation: int) -> NDArray[np.uint8]:
    return image if image.shape[:2] == size else cv2.resize(image, size[::-1], interpolation=interpolation)


class Augmented(NamedTuple):
    """What a `Transform` returns.

    Attributes:
        image: `(h, w, 3)` uint8 RGB.
        boxes: `(M, 4)` float32 xyxy in the pixels of `image`, inside it, at least `min_box_side` wide and high.
        index: `(M,)` int64, which of the objects given each of them is.
        masks: `(M, h, w)` uint8 0/1, or None when none were given.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    index: NDArray[np.int64]
    masks: NDArray[np.uint8] | None


class Transform:
    """A pipeline of albumentations that moves an image, its boxes and masks together.

    Args:
        transforms: albumentations transforms, applied in order.
        min_box_side: boxes thinner than this many pixels afterwards are dropped.
    """

    def __init__(self, transforms: Sequence[A.BasicTransform], min_box_side: float = 1.0) -> None:
        self.min_box_side = min_box_side
        self._compose = A.Compose(
            list(transforms),
            bbox_params=A.BboxParams("pascal_voc", label_fields=["index"], clip=True, filter_invalid_bboxes=True),
        )

    def __call__(
        self,
        image: NDArray[np.uint8],
        boxes: NDArray[np.float32],
        masks: NDArray[np.uint8] | None = None,
        seed: int = 0,
    ) -> Augmented:
        """Transform one image.

        Args:
            image: `(H, W, 3)` uint8 RGB.
            boxes: `(N, 4)` xyxy pixels; degenerate boxes are dropped.
            masks: `(N, H, W)` uint8 0/1.
            seed: decides every random choice; the same seed gives the same result in any process.
        """
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        index = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        data: dict[str, Any] = {"image": image, "bboxes": boxes[index], "index": index}
        if masks is not None and len(masks):  # albumentations takes no empty stack of masks
            data["masks"] = masks
        out = self._compose(**data)
        image, (height, width) = out["image"], out["image"].shape[:2]
        boxes = np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4)
        boxes = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
        keep = (boxes[:, 2:] - boxes[:, :2] >= self.min_box_side).all(axis=1)
        index = np.asarray(out["index"], dtype=np.int64)[keep]
        if masks is not None:
            moved = np.asarray(out.get("masks", ()), dtype=np.uint8).reshape(-1, height, width)
            masks = moved[index]
        return Augmented(np.ascontiguousarray(image), boxes[keep], index, masks)


def eval_transform(min_size: int = 800, max_size: int = 1333) -> Transform:
    """Resize only, by torchvision's rule: the pipeline of validation, test and prediction."""
    return Transform([Resize((min_size,), max_size)])


def train_transform(
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    hflip: float = 0.5,
    vflip: float = 0.0,
    photometric: float = 0.0,
    scale_jitter: tuple[float, float] | None = None,
) -> Transform:
    """The pipeline of training. Flips and colours come before resizing, where the image is usually smaller.

    Args:
        min_size: short side in pixels; several make multi-scale training, one drawn for every image.
        max_size: cap of the long side.
        hflip, vflip: probability of a horizontal, a vertical flip.
        photometric: probability of each of the brightness and contrast, hue and saturation, and gamma changes.
        scale_jitter: range of factors for large-scale jitter; then images are crops of `max_size` x `max_size`, padded
            with the mean colour, and `min_size` has no say.
    """
    steps: list[A.BasicTransform] = [A.HorizontalFlip(p=hflip), A.VerticalFlip(p=vflip)]
    if photometric:
        steps += [
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.3, p=photometric),
            A.HueSaturationValue(hue_shift_limit=10, sat_shift_limit=40, val_shift_limit=0, p=photometric),
            A.RandomGamma(gamma_limit=(70, 140), p=photometric),
        ]
    if scale_jitter:
        steps += [
            ScaleJitter(max_size, scale_jitter),
            A.RandomCrop(max_size, max_size, pad_if_needed=True, pad_position="top_left", fill=FILL),
        ]
    else:
        steps += [Resize([min_size] if isinstance(min_size, int) else min_size, max_size)]
    return Transform(steps)
