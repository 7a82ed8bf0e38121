"""How far a file is from the model it was made of: in pixels and scores, and in AP.

The model is what `detection predict` runs, on the same images, each alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from detection.batch import Target
from detection.data.spectral import Pixels
from detection.evaluation.mean_ap import IouType, MeanAP
from detection.interop.export import HEATMAPS
from detection.interop.exported_files import Run
from detection.interop.partners import pair_detections
from detection.models.family.keypoints import locate_keypoints
from detection.training.encoding import encode_detections, grid_of

if TYPE_CHECKING:
    from detection.inference.detector import Detector

Found = dict[str, Any]  # of one image: boxes (D, 4), labels (D,), scores (D,), and with a mask branch masks (D, m, m)


@dataclass(frozen=True)
class Parity:
    """How far an exported detector is from the model, over some images.

    Attributes:
        images, detections: how many were compared.
        unmatched: detections that only one of the two has.
        box: largest difference of a coordinate, in pixels.
        score: largest difference of a score.
        mask: largest difference of a probability in a mask; 0 without masks.
        keypoint: largest difference of a key point's coordinate, in pixels; None without key points.
        ties: pairs that were not compared: of two boxes of equal score NMS kept one here, the other there.
    """

    images: int
    detections: int
    unmatched: int
    box: float
    score: float
    mask: float
    keypoint: float | None = None
    ties: int = 0

    def __str__(self) -> str:
        differences = f"{self.box:.2g} pixels, {self.score:.2g} of a score, {self.mask:.2g} in a mask"
        differences += "" if self.keypoint is None else f", {self.keypoint:.2g} pixels of a key point"
        alone = f"{self.ties} of equal scores, of which NMS kept another, " if self.ties else ""
        alone += f"{self.unmatched} in one of the two alone, the largest differences of the others {differences}"
        return f"{self.detections} detections on {self.images} image{'s' * (self.images != 1)}, {alone}"

    def as_dict(self) -> dict[str, float]:
        """For a file."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def compare(detector: Detector, run: Run, images: Sequence[Pixels]) -> Parity:
    """Detections as `detection predict` makes them and those of an exported file, on `(H, W, C)` images, each alone.

    Which detection is which, and what a tie is, says `detection.interop.partners.pair_detections`.

    Args:
        detector: on the CPU, in float32; it resizes as prediction does.
        run: the file.
        images: to compare on.
    """
    parts = {"score": "scores", "mask": "masks"} | ({"keypoint": "keypoints"} if detector.model.has_keypoints else {})
    total = unmatched = ties = 0
    worst = dict.fromkeys(("box", *parts), 0.0)
    for image in images:
        ours, theirs = found_by_model(detector, image), found_by_file(run, image)
        pairs = pair_detections(ours, theirs)
        total, unmatched, ties = total + len(ours["labels"]), unmatched + pairs.alone, ties + pairs.ties
        differences = {"box": pairs.gaps}
        for name, part in parts.items():
            if part in ours:
                differences[name] = (theirs[part][pairs.right] - ours[part][pairs.left]).abs()
        for name, values in differences.items():
            if values.numel() and not float(values.max()) <= worst[name]:  # which NaN is not
                worst[name] = float(values.max())
    return Parity(len(images), total, unmatched, ties=ties, **worst)


@dataclass(frozen=True)
class Accuracy:
    """COCO's AP of the model and of its file on the same images; of masks where the detector has them."""

    images: int
    model: float
    file: float

    @property
    def lost(self) -> float:
        """How much lower the file's AP is."""
        return self.model - self.file

    def __str__(self) -> str:
        return f"AP {self.file:.4f} of the file, {self.model:.4f} of the model, {self.lost:+.4f} lost"

    def as_dict(self) -> dict[str, float]:
        """For a file."""
        return asdict(self)


def compare_accuracy(detector: Detector, run: Run, labelled: Iterable[tuple[Pixels, Target]]) -> Accuracy:
    """The AP of both on annotated `(H, W, C)` images.

    Args:
        detector, run: as for `compare`.
        labelled: each image and its ground truth, with masks if the detector has them.

    Raises:
        ValueError: as `MeanAP` raises, and where there is no ground truth.
    """
    kind: IouType = "segm" if detector.model.has_masks else "bbox"
    metrics = [MeanAP(detector.class_names, iou_type=kind) for _ in range(2)]
    for image, target in labelled:
        batch = detector.batch([image])
        for metric, found in zip(metrics, (found_by_model(detector, image), found_by_file(run, image)), strict=True):
            metric.update(encode_detections([found], batch, grid_of(detector.model)), [target])
    model, file = (metric.compute()["map"] for metric in metrics)
    if min(model, file) < 0:
        raise ValueError("no image that was compared has annotated objects, so there is no AP: name another split")
    return Accuracy(len(metrics[0].results), model, file)


def found_by_model(detector: Detector, image: Pixels) -> Found:
    """What the model finds in an image `(H, W, C)`, in its pixels."""
    with torch.no_grad():
        found: dict[str, Tensor] = detector.model.run(detector.batch([image]), False, True)[1][0]
    return dict(found)


def found_by_file(run: Run, image: Pixels) -> Found:
    """What a file finds in it."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    given = {name: values[0] for name, values in run(planes[None]).items()}
    count = int(given.pop("counts"))
    return locate_in_regions({name: torch.from_numpy(np.array(values[:count])) for name, values in given.items()})


def locate_in_regions(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a graph has found in one image, with `keypoints` `(D, k, 3)` and their scores in the place of its heatmaps.

    Args:
        found: `boxes (D, 4)` in pixels of the image and, if there are key points, `heatmaps (D, k, m, m)` and
            `regions (D, 4)`.
    """
    if "heatmaps" not in found:
        return found
    points, scores = locate_keypoints(found["heatmaps"], found["regions"])
    low, box = found["regions"][:, None, :2], found["boxes"][:, None]
    share = (points[..., :2] - low) / (found["regions"][:, None, 2:] - low)
    points[..., :2] = box[..., :2] + share * (box[..., 2:] - box[..., :2])
    kept = {name: values for name, values in found.items() if name not in HEATMAPS}
    return kept | {"keypoints": points, "keypoints_scores": scores}
