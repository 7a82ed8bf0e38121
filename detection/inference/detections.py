"""What was found in one image, in its own pixels, with class names; and as supervision, COCO or a picture has it.

Shape shorthand:
    D: detections of the image     H, W: its height and width in pixels     k: key points of an object
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detection.batch import Id
from detection.data import rle
from detection.data.spectral import Pixels
from detection.visualize import SMALLEST_SIDE, Names, draw_objects

ARRAYS = ("boxes", "labels", "scores", "keypoints", "keypoint_scores", "ids")  # one row a detection, or None
SHOWN_SIDE = 1000  # pixels of the longer side of the picture that a notebook shows


@dataclass(frozen=True, slots=True)
class Detections:
    """The objects of one image, best first.

    Attributes:
        boxes: `(D, 4)` float32 xyxy in pixels of the image.
        labels: `(D,)` int64 from 1 on.
        scores: `(D,)` float32 in [0, 1].
        class_names: of all classes, label 1 first.
        size: (height, width) of the image.
        masks: the COCO RLE of each object; None of a detector that finds boxes alone.
        pixels: the image `(H, W, C)`, where one alone was looked at: then a notebook shows it with what was found.
        keypoints: `(D, k, 3)` float32 x, y in pixels and 1, as torchvision gives them; None of a detector without.
        keypoint_scores: `(D, k)` float32, the logits of the heatmaps at the points.
        edges: positions of key points that a picture joins by a line.
        ids: `(D,)` int64, of a film: the number of each object from 1 on, -1 without one; else None. See `tracks`.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    class_names: tuple[str, ...]
    size: tuple[int, int]
    masks: tuple[dict[str, Any], ...] | None = None
    pixels: Pixels | None = field(default=None, repr=False, compare=False)
    keypoints: NDArray[np.float32] | None = None
    keypoint_scores: NDArray[np.float32] | None = None
    edges: tuple[tuple[int, int], ...] = ()
    ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """The class of each detection."""
        return [self.class_names[label - 1] for label in self.labels]

    def take(self, index: NDArray[Any]) -> Detections:
        """Those that a bool or integer array of numpy selects."""
        index = np.flatnonzero(index) if index.dtype == np.bool_ else index
        masks = None if self.masks is None else tuple(self.masks[i] for i in index)
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ARRAYS}
        chosen = {name: values[index] for name, values in arrays.items() if values is not None}
        return replace(self, **chosen, masks=masks)

    def above(self, score: float) -> Detections:
        """Those that score at least `score`."""
        return self.take(self.scores >= score)

    def of(self, classes: Sequence[str]) -> Detections:
        """Those of the named classes; a ValueError says which name is none of `class_names`."""
        unknown = [name for name in classes if name not in self.class_names]
        if unknown:
            raise ValueError(f"there is no class '{unknown[0]}'; the detector knows: {', '.join(self.class_names)}")
        return self.take(np.isin(self.labels, [self.class_names.index(name) + 1 for name in classes]))

    def bitmaps(self) -> NDArray[np.bool_]:
        """The masks `(D, H, W)`; a ValueError where there are none."""
        if self.masks is None:
            raise ValueError("the detector finds boxes alone: there are no masks")
        return np.array([rle.decode(mask) for mask in self.masks], np.bool_).reshape(-1, *self.size)

    def draw(
        self,
        image: Pixels | None = None,
        side: int | None = None,
        labels: Names = "auto",
        line_width: int | None = None,
    ) -> Image.Image:
        """The image `(H, W, C)` with boxes, names, scores, masks and key points; of a film with a colour for each id.

        Args:
            image: of the detections; `pixels` by default. A ValueError where there are none.
            side: longer side of the result in pixels; None keeps the image's own size, or a larger where no name fits.
            labels: `auto` shrinks names, or leaves them out, where they would cover the picture; `all`, `none`.
            line_width: of the boxes, in pixels of the result; None takes a 300th of its longer side.
        """
        image = self.pixels if image is None else image
        if image is None:
            raise ValueError("these detections don't keep their image: give it, draw(image)")
        masks = None if self.masks is None else list(self.masks)
        objects = (self.boxes, self.labels, self.class_names, self.scores, masks)
        more: dict[str, Any] = {"keypoints": self.keypoints, "edges": self.edges, "ids": self.ids}
        return draw_objects(image, *objects, side=side, names=labels, line_width=line_width, **more)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: the image with what was found; None, for the text, where the image is not kept."""
        if self.pixels is None:
            return None
        file = BytesIO()
        self.draw(side=max(SMALLEST_SIDE, min(SHOWN_SIDE, max(self.size)))).save(file, "png")
        return file.getvalue()

    def to_coco(self, image_id: Id, category_ids: Sequence[Id | None] | None = None) -> list[dict[str, Any]]:
        """One entry of a COCO results file for each detection.

        Args:
            image_id: of the data set.
            category_ids: of the data set, one for each of `class_names`; by default the labels. Detections of a class
                whose id is None are left out.
        """
        ids: Sequence[Id | None] = category_ids or range(1, len(self.class_names) + 1)
        entries: list[dict[str, Any]] = []
        for i, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            category = ids[int(self.labels[i]) - 1]
            if category is None:
                continue
            entry: dict[str, Any] = {"image_id": image_id, "category_id": category}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(self.scores[i])}
            if self.ids is not None and self.ids[i] >= 0:
                entry["track_id"] = int(self.ids[i])
            if self.masks is not None:
                counts = self.masks[i]["counts"]
                text = counts.decode() if isinstance(counts, bytes) else counts
                entry["segmentation"] = {"size": list(self.size), "counts": text}
            if self.keypoints is not None:
                entry["keypoints"] = self.keypoints[i].ravel().tolist()
            entries.append(entry)
        return entries

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`: class ids are labels less one, names in `data["class_name"]`.

        Raises:
            ImportError: supervision is not installed.
        """
        return _supervision().Detections(
            xyxy=self.boxes.reshape(-1, 4),
            mask=self.bitmaps() if self.masks is not None and len(self) else None,
            confidence=self.scores,
            class_id=self.labels - 1,
            tracker_id=self.ids,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_supervision_keypoints(self) -> Any:
        """The key points as `supervision.KeyPoints`, in the order of `to_supervision`.

        A heatmap's score is a logit and no confidence, so that of the detection is all that is given.

        Raises:
            ImportError: supervision is not installed.
            ValueError: of a detector that finds none.
        """
        if self.keypoints is None:
            raise ValueError("this detector finds no key points: take to_supervision")
        return _supervision().KeyPoints(
            xy=self.keypoints[..., :2],
            class_id=self.labels - 1,
            detection_confidence=self.scores,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_fiftyone(self) -> Any:
        """The same as `fiftyone.Detections`, whose boxes are x, y, width and height as shares of the image's sides.

        Raises:
            ImportError: FiftyOne is not installed.
        """
        try:
            import fiftyone
        except ImportError as error:
            raise ImportError('FiftyOne is not installed: pip install "detection[fiftyone]"') from error
        height, width = self.size
        masks = self.bitmaps() if self.masks is not None else [None] * len(self)
        rows = zip(self.boxes.astype(float).tolist(), self.names, self.scores.tolist(), masks, strict=True)
        labels = []
        for (x1, y1, x2, y2), name, score, mask in rows:
            label = fiftyone.Detection(
                label=name,
                confidence=score,
                bounding_box=[x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height],
            )
            if mask is not None:  # theirs covers the box alone, in whole pixels
                label.mask = mask[int(y1) : max(int(y1) + 1, round(y2)), int(x1) : max(int(x1) + 1, round(x2))]
            labels.append(label)
        return fiftyone.Detections(detections=labels)


def _supervision() -> Any:
    try:
        import supervision
    except ImportError as error:
        raise ImportError('supervision is not installed: pip install "detection[supervision]"') from error
    return supervision
