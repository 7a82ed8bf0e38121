"""The images of a run's own data, for commands that compare a file with its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection.batch import Target
from detection.data.datamodule import DetectionDataModule
from detection.data.images import read_image
from detection.data.records import DataError
from detection.data.spectral import PixelFormat, Pixels
from detection.interop.openvino import CALIBRATION_IMAGES
from detection.weights import read_saved, read_torch


def labelled_images(ckpt: Path, trust: Sequence[str], root: Path | None, split: str) -> Iterator[tuple[Pixels, Target]]:
    """Each image `(H, W, C)` of a split of the run's data, and its ground truth.

    Args:
        ckpt: of the run.
        trust: packages whose parts it may use.
        root: folder of the data, if it has moved.
        split: val or test.

    Raises:
        DataError: the checkpoint does not say what it was trained on, or that is not there.
    """
    data = _data_of(ckpt, trust, root)
    if split == "test" and data.hparams["test_split"] is None:
        raise DataError(f"{ckpt}: the model was trained without naming a test split; use --split val")
    yield from _samples(data, split)


def _samples(data: DetectionDataModule, split: str) -> Iterator[tuple[Pixels, Target]]:
    data.predict_split = "test" if split == "test" else "val"
    data.prepare_data()
    data.setup("predict")
    dataset: Any = data.predict_dataloader().dataset
    for i in range(len(dataset)):
        sample = dataset[i]
        yield sample.pixels, sample.target


def labelled_folder(root: Path, ckpt: Path, form: PixelFormat) -> Iterator[tuple[Pixels, Target]]:
    """The same of a data set that no run names: its validation images, with the detector's classes by name.

    Args:
        root: folder of the data.
        ckpt: of the detector.
        form: the pixels that it takes.

    Raises:
        DataError: the detector does not name its classes, or the data can't be read.
    """
    saved = read_saved(ckpt)
    if saved.class_names is None:
        raise DataError(f"{ckpt}: it does not name its classes, so they can't be found in {root}: leave --data out")
    masks = any(name.startswith("roi_heads.mask_predictor.") for name in saved.tensors)
    settings: dict[str, Any] = {"classes": saved.class_names, "channels": form.channels, "depth": form.depth}
    data = DetectionDataModule(str(root), masks=masks, **settings)
    yield from _samples(data, "val")


def training_images(ckpt: Path, trust: Sequence[str], root: Path | None) -> Iterator[Pixels]:
    """At most `CALIBRATION_IMAGES` training images, evenly from the whole list; arguments as for `labelled_images`."""
    data = _data_of(ckpt, trust, root)
    data.prepare_data()
    index = data.read("train")
    count = min(CALIBRATION_IMAGES, len(index.records))
    for i in np.unique(np.linspace(0, len(index.records) - 1, count).astype(int)):
        record = index.records[i]
        yield read_image(index.root / record.file_name, (record.height, record.width), form=data.form)


def _data_of(ckpt: Path, trust: Sequence[str], root: Path | None) -> DetectionDataModule:
    known = read_torch(ckpt).get("datamodule_hyper_parameters") if ckpt.suffix == ".ckpt" else None
    if "min_size" not in (known or {}):
        raise DataError(
            f"{ckpt}: it does not say what it was trained on: name images, --images or, for int8, --calibration"
        )
    settings: dict[str, Any] = {"classes": read_saved(ckpt).class_names}
    settings |= {} if root is None else {"root": str(root)}
    return DetectionDataModule.load_from_checkpoint(ckpt, trust, **settings)
