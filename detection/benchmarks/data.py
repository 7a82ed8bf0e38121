"""How fast images get from disk to a batch: our loader beside the usual Pillow and torchvision-v2 one."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from detection.batch import pad_images
from detection.data.augment import train_transform
from detection.data.dataset import DetectionDataset, collate
from detection.data.headers import EXTENSIONS
from detection.data.images import image_size
from detection.data.records import DataError, Index, Record
from detection.data.samplers import TrainBatchSampler
from detection.data.scenes import draw_scene
from detection.data.train_loader import TrainLoader
from detection.data.workers import init_worker


class _TorchvisionDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """The pipeline of torchvision's detection references, with the resize that its models do later brought forward.

    Args:
        steps: its transforms, applied to the Pillow image with its boxes.
    """

    def __init__(self, index: Index, steps: Sequence[Any]) -> None:
        self.index, self.transform = index, v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.index.records)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.index.records[i]
        image = Image.open(self.index.root / record.file_name).convert("RGB")
        size = (record.height, record.width)
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes), format="XYXY", canvas_size=size)
        result: tuple[Tensor, dict[str, Any]] = self.transform(image, {"boxes": boxes, "labels": record.labels})
        return result


def _torchvision_collate(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, list[dict[str, Any]]]:
    return pad_images([image for image, _ in samples])[0], [target for _, target in samples]


def loader_throughput(
    images: Path | None = None,
    count: int = 256,
    rounds: int = 5,
    batch_size: int = 8,
    num_workers: int = 2,
    min_size: int = 800,
    max_size: int = 1333,
) -> dict[str, float]:
    """Images per second of our training loader and of Pillow + torchvision v2, doing the same work in one run.

    The work: decode, flip half of them, resize by torchvision's rule, batch. Ours hands out uint8, since the model
    normalises on the device. torchvision's is timed twice: in the order of its documentation on uint8 tensors
    (`uint8`), and with the conversion to float32 that its models ask for (`float`). The three take turns in every
    round; workers start, and two batches are thrown away, before the clock does.

    Args:
        images: a folder of images; None draws JPEG scenes of 640 x 480.
        count: images in a round; the images are repeated or cut to it.
        rounds: of which the median counts.

    Returns:
        Medians of images per second `ours`, `torchvision_uint8` and `torchvision_float`, and the ratios
        `times_uint8` and `times_float`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        index = index_images(images or draw_images(Path(temporary)), count)
        options: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
        dataset = DetectionDataset(index, train_transform(min_size, max_size))
        sampler = TrainBatchSampler(dataset.store, batch_size)
        ours = TrainLoader(dataset, sampler, collate_fn=collate, worker_init_fn=init_worker, **options)
        steps = [v2.ToImage(), v2.RandomHorizontalFlip(0.5), v2.Resize(min_size, max_size=max_size)]
        loaders: dict[str, Any] = {"ours": ours}
        for name, extra in (("uint8", []), ("float", [v2.ToDtype(torch.float32, scale=True)])):
            theirs = _TorchvisionDataset(index, [*steps, *extra])
            loaders[f"torchvision_{name}"] = DataLoader(
                theirs, batch_size, shuffle=True, collate_fn=_torchvision_collate, **options
            )
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for turn in range(rounds):
            sampler.set_epoch(turn)
            for name, loader in loaders.items():
                speeds[name].append(_images_per_second(partial(iter, loader), batch_size))
    result = {name: statistics.median(values) for name, values in speeds.items()}
    return result | {f"times_{name}": result["ours"] / result[f"torchvision_{name}"] for name in ("uint8", "float")}


def _images_per_second(start: Callable[[], Any], batch_size: int, warm_up: int = 2) -> float:
    batches = start()
    for _ in range(warm_up):
        next(batches)
    began, seen = time.perf_counter(), 0
    for _ in batches:
        seen += batch_size
    return seen / (time.perf_counter() - began)


def draw_images(folder: Path) -> Path:
    """Draw 32 JPEG scenes of 640 x 480 into the folder."""
    for i in range(32):
        scene = draw_scene(np.random.default_rng(i))[0]
        large = cv2.resize(scene, (640, 480), interpolation=cv2.INTER_CUBIC)
        (folder / f"{i}.jpg").write_bytes(cv2.imencode(".jpg", large)[1].tobytes())
    return folder


def index_images(folder: Path, count: int) -> Index:
    """The images of a folder, repeated or cut to a number, each with seven boxes."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    if not names:
        raise DataError(f"{folder}: there is no image in the folder; name one that holds images")
    records = []
    for i in range(count):
        name = names[i % len(names)]
        height, width = image_size(folder / name)
        boxes = np.array([[0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height]] * 7, np.float32)
        flags, numbers = np.zeros(7, np.bool_), np.arange(7, dtype=np.int64)
        areas = np.full(7, 0.64 * width * height, np.float32)
        records.append(Record(i, name, width, height, boxes, numbers % 3 + 1, areas, flags, flags, numbers))
    return Index(folder, ("a", "b", "c"), (1, 2, 3), records)
