"""A trained detector with all it needs: weights, class names, the sizes it was evaluated at.

```python
from detection import Detector

detector = Detector.from_checkpoint("runs/quickstart/<time>/best.ckpt")
detections = detector("street.jpg")
```
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detection.batch import Batch, Target
from detection.data.dataset import Sample, collate
from detection.data.images import from_array, from_pil, read_image
from detection.data.skeletons import edges_of
from detection.data.spectral import RGB, PixelFormat, Pixels
from detection.devices import HALVES, emulation
from detection.inference.detections import Detections
from detection.inference.tiles import Tiles
from detection.inference.tta import TestTimeAugmentation
from detection.interop import CheckpointError, load_detector
from detection.models.two_stage import FasterRCNN
from detection.resizing import resized_size
from detection.training.checkpoints import best_or_last
from detection.training.encoding import encode_detections, grid_of
from detection.weights import NO_NAMES, read_saved

ImageLike: TypeAlias = str | Path | Image.Image | Pixels | Tensor
Precision = Literal["32", "bf16", "16"]
EXPORTED = (".onnx", ".xml", ".pt2")  # what `ExportedDetector` takes
log = logging.getLogger(__name__)


class Detector:
    """Images of any size -> detections in their pixels. Images are resized exactly as evaluation does it.

    Attributes:
        form: channels and depth that images must have, those of training.
        has_masks: whether detections get masks.
        detections_per_img: the most of an image.
        tiles: that it was trained on, and that `predict` of files looks at large images in; None of whole images.

    Args:
        model: the detector, of which this uses a copy (`FasterRCNN.for_inference`), or its test-time augmentation.
        class_names: of the foreground, label 1 first.
        category_ids: of the data set, likewise, for COCO files; by default the labels.
        min_size, max_size: see `ImageTransform`; by default the model's own.
        device: `auto` is the first GPU, or the CPU.
        precision: of the network; boxes are always computed in float32. 32 gives the figures of evaluation.
        edges: positions of key points that pictures join by a line; None takes COCO's where there are 17.
    """

    tiles: Tiles | None = None

    def __init__(
        self,
        model: FasterRCNN | TestTimeAugmentation,
        class_names: Sequence[str],
        category_ids: Sequence[int] | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
        device: str = "auto",
        precision: Precision = "32",
        edges: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        if model.num_classes != len(class_names) + 1:
            raise ValueError(f"{len(class_names)} class names are given for {model.num_classes - 1} classes")
        self.device = _device(device)
        if precision in HALVES and (said := emulation(self.device, HALVES[precision], "--precision")):
            log.warning("%s", said)
        copied = model.for_inference(self.device) if isinstance(model, FasterRCNN) else model.eval().to(self.device)
        self.model: FasterRCNN | TestTimeAugmentation = copied
        self.has_masks = bool(model.has_masks)
        self.detections_per_img = most_detections(model)
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids or range(1, len(class_names) + 1))
        transform = model.transform
        self._divisor, self._resizing = transform.size_divisible, transform.resizing
        self.min_size, self.max_size = min_size or transform.min_size[-1], max_size or transform.max_size
        self.precision, self.form = precision, PixelFormat.of(model)
        self.edges = edges_of(getattr(model, "num_keypoints", 0)) if edges is None else tuple((a, b) for a, b in edges)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str = "auto", precision: Precision = "32", trust: Iterable[str] = ()
    ) -> Detector:
        """The detector of a run, or of a `.safetensors` file of `save_detector` or `detection convert`.

        A file of `detection export` gives an `ExportedDetector`: `.onnx`, `.xml` or `.pt2`.

        Args:
            path: of the file, or of a run's folder, for its `best.ckpt`, or else its `last.ckpt`.
            device, precision: see the class. An exported file runs on the CPU, in the precision it was written in.
            trust: packages whose parts it may use besides this one's, e.g. `("my_parts",)`: their code runs.

        Raises:
            CheckpointError: the file doesn't say how to build its detector, or what its classes are called.
            FileNotFoundError: there is none, or a folder has neither.
            ValueError: a device or a precision that an exported file does not have.
        """
        path = best_or_last(Path(path)) if Path(path).is_dir() else Path(path)
        if path.suffix in EXPORTED:
            from detection.inference.exported import ExportedDetector

            if device not in ("auto", "cpu") or precision != "32":
                raise ValueError(
                    f"{path}: an exported file runs on the CPU, in the precision it was exported in: leave --device "
                    "and --precision out, or name the checkpoint"
                )
            return ExportedDetector(path)
        model = load_detector(path, trust)
        saved = read_saved(path)
        if saved.class_names is None:
            raise CheckpointError(f"{path}: {NO_NAMES}")
        options: dict[str, Any] = {"device": device, "precision": precision, "edges": saved.edges}
        detector = cls(model, saved.class_names, saved.category_ids, **options)
        detector.tiles = Tiles(*saved.tiles) if saved.tiles else None
        return detector

    def __call__(self, image: ImageLike) -> Detections:
        """Detections of one image, which keep it, so that a notebook shows it with them.

        Args:
            image: a path, a PIL image, an array `(H, W, 3)` RGB or `(H, W)` grey, or a tensor `(3, H, W)` RGB; of
                whole numbers of 8 or 16 bits, tensors also float in [0, 1]. Of 16 bits the high byte counts, and a
                PIL image with EXIF is turned, both as in files.
                A detector of other channels or of 16 bits takes arrays `(H, W, C)` and tensors `(C, H, W)` of these.

        Raises:
            DataError: a file that can't be read.
            ValueError: something that is no image.
        """
        pixels = to_pixels(image, self.form)
        return replace(self._detect([pixels])[0], pixels=pixels)

    def predict(self, images: Sequence[ImageLike], batch_size: int = 8) -> list[Detections]:
        """Detections of several images, `batch_size` at a time; images as for a call.

        A detector whose images are not padded (`size_divisible` 1) gets them one at a time, or the largest of a batch
        would pad the others.

        Raises:
            ValueError: `batch_size` is less than 1.
        """
        check_batch_size(batch_size)
        batch_size = 1 if self._divisor == 1 else batch_size
        pixels = [to_pixels(image, self.form) for image in images]
        parts = [pixels[i : i + batch_size] for i in range(0, len(pixels), batch_size)]
        return [found for part in parts for found in self._detect(part)]

    def batch(self, pixels: Sequence[Pixels]) -> Batch:
        """The batch that the model sees of `(H, W, C)` images."""
        return collate([self._sample(image) for image in pixels], self._divisor).to(self.device)

    def _sample(self, pixels: Pixels) -> Sample:
        height, width = pixels.shape[:2]
        boxes, labels = torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64)
        flags = torch.zeros(0, dtype=torch.bool)
        target = Target(0, "", (height, width), boxes, labels, torch.zeros(0), flags, flags)
        size = resized_size(height, width, self.min_size, self.max_size, self._resizing)
        return Sample(pixels, size, boxes, labels, target, resizing=self._resizing)

    @torch.inference_mode()
    def _detect(self, pixels: Sequence[Pixels]) -> list[Detections]:
        batch = self.batch(pixels)
        half = self.precision != "32"
        with torch.autocast(self.device.type, HALVES.get(self.precision, torch.bfloat16), enabled=half):
            detections = self.model.run(batch, with_losses=False, with_detections=True)[1]
        found = encode_detections(detections, batch, grid_of(self.model))
        return [self._pack(d, image.shape[:2]) for d, image in zip(found, pixels, strict=True)]

    def _pack(self, detection: dict[str, Any], size: tuple[int, ...]) -> Detections:
        boxes, labels, scores = (detection[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
        order = np.argsort(-scores, kind="stable")
        masks = tuple(detection["masks"]) if "masks" in detection else None
        shape = (int(size[0]), int(size[1]))
        found = Detections(boxes.astype(np.float32), labels, scores.astype(np.float32), self.class_names, shape, masks)
        if "keypoints" in detection:
            points, certain = (detection[name].float().cpu().numpy() for name in ("keypoints", "keypoints_scores"))
            found = replace(found, keypoints=points, keypoint_scores=certain, edges=self.edges)
        return found.take(order)


def check_batch_size(batch_size: int) -> None:
    """Raise a ValueError where a batch would have no image."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")


def most_detections(model: nn.Module) -> int:
    """How many detections of an image a detector gives at most; COCO's 100 where its parts don't say."""
    limits: list[Any] = [getattr(part, "detections_per_img", None) for part in model.modules()]
    return int(next((limit for limit in reversed(limits) if limit is not None), 100))


def to_pixels(image: ImageLike, form: PixelFormat = RGB) -> Pixels:
    """Any of the forms that a `Detector` takes as `(H, W, C)` uint8 or uint16; errors as there."""
    order = " in RGB order" if form.channels == 3 else ""
    kind = np.dtype(form.dtype).name
    if isinstance(image, str | Path):
        return read_image(Path(image), form=form)
    if isinstance(image, Image.Image) and form == RGB:
        return from_pil(image)
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != form.channels:
            raise ValueError(f"an image as tensor must be ({form.channels}, H, W){order}, not {tuple(image.shape)}")
        if image.is_floating_point():
            if not (image.amin() >= 0 and image.amax() <= 1):
                raise ValueError(
                    f"an image as float tensor must be in [0, 1]: divide by {form.highest}, or give {kind}"
                )
            image = (image * form.highest).round().to(torch.from_numpy(np.empty(0, form.dtype)).dtype)
        array = image.permute(1, 2, 0).cpu().numpy()
    else:
        array = np.asarray(image)
    if form == RGB:
        return from_array(array)
    if array.ndim == 2 and form.channels == 1:
        array = array[..., None]
    if array.dtype != form.dtype or array.ndim != 3 or array.shape[2] != form.channels or min(array.shape) < 1:
        raise ValueError(
            f"an image as array must be (H, W, {form.channels}) {kind}{order}, not {array.shape} {array.dtype}"
        )
    return np.ascontiguousarray(array)


def _device(name: str) -> torch.device:
    """The device of a name, tried out; `auto` is the first GPU, or the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else None
    try:
        device = device or torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        has = f"cuda:0 to cuda:{torch.cuda.device_count() - 1} and cpu" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"--device {name}: this machine has no such device that PyTorch can use, but {has}") from error
    return device
