"""What both sides of a certificate see: scenes that everybody can draw again, or photographs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from detection.certificates.sides import Target
from detection.data.images import read_image
from detection.data.scenes import draw_scene
from detection.data.spectral import RGB, PixelFormat, Pixels

SEED, COUNT = 0, 2  # of the drawn scenes


@dataclass(frozen=True)
class Picture:
    """An image that both sides saw.

    Attributes:
        name: of the file or scene.
        pixels: `(H, W, C)`.
        target: objects of a drawn scene, with labels of `draw_scene`.
    """

    name: str
    pixels: Pixels
    target: Target | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the certificate."""
        height, width = self.pixels.shape[:2]
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).tobytes()).hexdigest()
        return {"name": self.name, "width": width, "height": height, "sha256": digest}


def drawn(
    form: PixelFormat = RGB, count: int = COUNT, seed: int = SEED, size: Sequence[int] | None = None
) -> list[Picture]:
    """Scenes of this project, the same for everybody.

    Args:
        form: of the pixels; other channels than RGB get its mean, 16 bits 257 times the level.
        count: of the scenes.
        seed: of their drawing.
        size: height and width that they are resized to, as a file of one size needs; then without objects.
    """
    pictures = []
    for i in range(count):
        number = 0
        while True:  # without a scene of few objects
            pixels, objects = draw_scene(np.random.default_rng([seed, i, number]))
            if sum(not crowd for _, _, crowd in objects) >= 3:
                break
            number += 1
        kept = [(label, mask) for label, mask, crowd in objects if not crowd]
        masks = torch.from_numpy(np.stack([mask for _, mask in kept]))
        spans = [(mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]) for mask in masks]
        boxes = [[float(x[0]), float(y[0]), float(x[-1] + 1), float(y[-1] + 1)] for x, y in spans]
        target = {"boxes": torch.tensor(boxes), "labels": torch.tensor([label for label, _ in kept])}
        target["masks"] = masks.to(torch.uint8)
        if size is not None:
            pixels = np.asarray(cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR))
        named = Picture(f"scene {seed}-{i}-{number}", _in_form(pixels, form), None if size else target)
        pictures.append(named)
    return pictures


def _in_form(pixels: Pixels, form: PixelFormat) -> Pixels:
    if form.channels != 3:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True).astype(np.uint8), form.channels, axis=2)
    return pixels.astype(np.uint16) * 257 if form.depth == 16 else pixels


def photographs(folder: Path, names: Iterable[str], form: PixelFormat = RGB) -> list[Picture]:
    """Images of a folder, by name."""
    return [Picture(name, read_image(folder / name, form=form)) for name in names]


def fit_labels(
    pictures: Sequence[Picture], num_classes: int, with_masks: bool, num_keypoints: int = 0
) -> list[Picture]:
    """The pictures with the scenes' labels as ones of the detector, small enough for a quick step of training.

    Its key points lie along the diagonal of each box, from one fifth on, as the scenes have none.
    """
    fitted = []
    for picture in pictures:
        target = picture.target
        if target is not None:
            target = {**target, "labels": (target["labels"] - 1) % (num_classes - 1) + 1}
            target = target if with_masks else {name: value for name, value in target.items() if name != "masks"}
        if target is not None and num_keypoints:
            low, high = target["boxes"][:, None].split(2, dim=-1)
            places = low + (high - low) * torch.linspace(0.2, 0.8, num_keypoints)[:, None]
            target = {**target, "keypoints": torch.nn.functional.pad(places, (0, 1), value=2.0)}
        fitted.append(Picture(picture.name, picture.pixels, target))
    return fitted
