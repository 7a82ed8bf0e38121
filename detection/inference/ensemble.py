"""Several detectors asked as one, whose detections are fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from detection.data.records import DataError
from detection.data.spectral import PixelFormat
from detection.inference.detections import Detections
from detection.inference.detector import Detector, ImageLike, to_pixels
from detection.inference.fusing import Fusion, check_members, fuse


class Ensemble:
    """Several detectors that are asked as one; it takes the place of a `Detector`. Each resizes images as it learned.

    Attributes:
        class_names, category_ids, form: as of `Detector`, those of all members.
        min_size: the largest of the members.

    Args:
        members: detectors of the same classes and kind of images.
        how: see `fuse`.
        names: of the members, for what is refused.

    Raises:
        DataError: their classes or kinds of images differ, or some find masks and some don't.
    """

    def __init__(self, members: Sequence[Detector], how: Fusion = "wbf", names: Sequence[str] = ()) -> None:
        names = names or [f"detector {i + 1}" for i in range(len(members))]
        check_members(names, [m.class_names for m in members], [m.has_masks for m in members])
        if other := next((n for n, m in zip(names, members, strict=True) if m.form != members[0].form), None):
            raise DataError(f"{other} and {names[0]} take images of other channels or another depth: fuse those of one")
        self.members, self.how = list(members), how
        self.class_names, self.category_ids = members[0].class_names, members[0].category_ids
        self.form: PixelFormat = members[0].form
        self.min_size = max(m.min_size for m in members)
        self._limit = max(m.detections_per_img for m in members)

    def __call__(self, image: ImageLike) -> Detections:
        """Detections of one image, see `Detector`."""
        pixels = to_pixels(image, self.form)
        return replace(self.predict([pixels])[0], pixels=pixels)

    def predict(self, images: Sequence[ImageLike], batch_size: int = 8) -> list[Detections]:
        """Detections of several images, see `Detector`."""
        pixels = [to_pixels(image, self.form) for image in images]
        found = [member.predict(pixels, batch_size) for member in self.members]
        return [fuse(own, self.how, self._limit) for own in zip(*found, strict=True)]
