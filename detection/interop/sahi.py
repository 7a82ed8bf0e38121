"""A detector as SAHI's `DetectionModel`, for its slicing and merging. `detection predict --tile` does without SAHI.

SAHI wants opencv-python, which must not lie beside opencv-python-headless: install it with `--no-deps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detection.data.spectral import Pixels
from detection.inference.detector import Detector

INSTALL = "SAHI is not installed: pip install --no-deps sahi && pip install shapely fire requests"


def to_sahi(detector: Detector, confidence_threshold: float = 0.3) -> Any:
    """The detector as `sahi.models.base.DetectionModel`; category ids are labels less one.

    Args:
        detector: of RGB images.
        confidence_threshold: detections that score less are dropped.

    Raises:
        ImportError: SAHI is not installed.
        ValueError: the detector takes other images than SAHI gives.
    """
    try:
        from sahi.models.base import DetectionModel
        from sahi.prediction import ObjectPrediction
        from sahi.utils.cv import get_coco_segmentation_from_bool_mask
    except ImportError as error:
        raise ImportError(INSTALL) from error
    if detector.form.channels != 3 or detector.form.depth != 8:
        raise ValueError(f"SAHI gives RGB images of 8 bits, not {detector.form}: see `detection predict --tile`")

    class Adapter(DetectionModel):  # type: ignore[misc]
        def load_model(self) -> None:
            self.set_model(detector)

        def set_model(self, model: Detector, **_: Any) -> None:
            self.model = model
            self.category_mapping = {str(i): name for i, name in enumerate(model.class_names)}

        @property
        def num_categories(self) -> int:
            return len(detector.class_names)

        @property
        def has_mask(self) -> bool:
            return bool(detector.has_masks)

        @property
        def category_names(self) -> list[str]:
            return list(detector.class_names)

        def perform_inference(self, image: Pixels) -> None:
            self._original_predictions = [detector(image)]

        def perform_batch_inference(self, images: Sequence[Pixels]) -> None:
            self._original_predictions = detector.predict(images)

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = None, full_shape_list: Any = None
        ) -> None:
            count = len(self._original_predictions)
            shifts, shapes = _each(shift_amount_list or [0, 0], count), _each(full_shape_list, count)
            self._object_prediction_list_per_image = [
                self._predictions(*image) for image in zip(self._original_predictions, shifts, shapes, strict=True)
            ]

        def _predictions(self, found: Any, shift: list[int], shape: list[int] | None) -> list[Any]:
            found = found.above(self.confidence_threshold)
            masks = found.bitmaps() if found.masks is not None else [None] * len(found)
            return [
                ObjectPrediction(
                    bbox=box,
                    category_id=int(label) - 1,
                    category_name=name,
                    score=float(score),
                    segmentation=None if mask is None else get_coco_segmentation_from_bool_mask(mask),
                    shift_amount=shift,
                    full_shape=shape or list(found.size),
                )
                for box, label, name, score, mask in zip(
                    found.boxes.tolist(), found.labels, found.names, found.scores, masks, strict=True
                )
                if mask is None or mask.any()
            ]

    return Adapter(model=detector, confidence_threshold=confidence_threshold, device=str(detector.device))


def _each(given: Any, count: int) -> list[Any]:
    """SAHI's shifts and shapes, one pair for all images or one each, as one each."""
    if given is None or not isinstance(given[0], Sequence):
        return [given] * count
    return list(given) if len(given) == count else [given[0]] * count
