"""What large data sets cost: the time and memory of each stage against the number of images, and the way to more.

Records are drawn, so no data set is needed: objects an image and classes as COCO or Objects365 has them, the pictures
links to a few small JPEGs. Each size is measured in a process of its own; the line through the two largest sizes says
what a data set of the full size would cost. It is a forecast: where the line bends, e.g. as memory runs out, it is
wrong, and the table says of each quantity how straight its line is. Small sizes hide a slope under what any size takes:
the tables of precision of 365 classes are 67 MiB, so that of Objects365's shape the memory of validation's figures
grows from 50,000 images on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from detection.benchmarks.data import draw_images
from detection.benchmarks.evaluation import draw_detections
from detection.benchmarks.memory import forget_peak, peak_memory
from detection.data.augment import train_transform
from detection.data.coco import read_coco
from detection.data.dataset import DetectionDataset, collate
from detection.data.samplers import TrainBatchSampler
from detection.data.train_loader import TrainLoader
from detection.data.workers import init_worker
from detection.errors import SettingsError
from detection.evaluation.mean_ap import MeanAP


class Shape(NamedTuple):
    """What a data set looks like.

    Attributes:
        images: to train on.
        classes: without background.
        objects: an image, in the mean.
        validated: images to evaluate on.
    """

    images: int
    classes: int
    objects: float
    validated: int


# Lin et al. 2014; Shao et al. 2019, tables 1 and 2.
SHAPES = {"coco": Shape(118_287, 80, 7.3, 5_000), "objects365": Shape(1_900_000, 365, 15.8, 80_000)}
BATCH, WORKERS, LINKS = 8, 2, 20_000  # LINKS: to one file; file systems allow some 30,000


def measure_scale(shape: str, sizes: Sequence[int], folder: Path | None = None) -> list[dict[str, Any]]:
    """One row a quantity: its figure at each size, what 1,000 images more add, and the forecast.

    `straight` is the slope between the last two sizes over that between the first two: 1 is a line.

    Args:
        shape: a key of `SHAPES`.
        sizes: three numbers of images, ascending; validation images are as many for each as `shape` has.
        folder: where the pictures are laid; None is a temporary one.

    Raises:
        SettingsError: the sizes are others than three, or don't ascend.
    """
    if len(sizes) != 3 or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise SettingsError(
            f"sizes are {list(sizes)}: give three numbers of images, ascending, to compare their slopes"
        )
    full = SHAPES[shape]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source = Path(temporary) / "drawn"
        source.mkdir()
        draw_images(source)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:  # one that may have loader processes
            for size in sizes:
                pool.submit(_write, Path(temporary) / str(size), source, size, full).result()
            found = [pool.submit(_measure, full, size, Path(temporary) / str(size)).result() for size in sizes]
    rows = []
    for quantity in found[0]:
        values = [figures[quantity] for figures in found]
        first, last = ((values[i + 1] - values[i]) / (sizes[i + 1] - sizes[i]) for i in (0, 1))
        row: dict[str, Any] = {"what": quantity} | dict(zip(map(str, sizes), values, strict=True))
        row |= {"per 1,000 images": 1000 * last, "straight": last / first if first else float("nan")}
        rows.append(row | {f"{full.images:,} images": values[-1] + last * (full.images - sizes[-1])})
    return rows


def _measure(full: Shape, count: int, root: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    figures["annotation file, MiB"] = (root / "train.json").stat().st_size / 2**20
    with _watch(figures, "read"):
        index = read_coco(root, "train.json")
    with _watch(figures, "store"):
        dataset = DetectionDataset(index, train_transform(64, 96))
    del index
    sampler = TrainBatchSampler(dataset.store, BATCH)
    with _watch(figures, "order of an epoch"):
        next(iter(sampler))
    sampler.load_state_dict({"epoch": 1, "start_batch": len(sampler) // 2})
    with _watch(figures, "resume in the middle"):
        next(iter(sampler))
    figures |= _of_workers(dataset)
    figures |= _of_evaluation(full, max(count * full.validated // full.images, 1))
    return figures


@contextmanager
def _watch(figures: dict[str, float], name: str) -> Iterator[None]:
    before, start = forget_peak(), time.perf_counter()
    yield
    figures[f"{name}, s"] = time.perf_counter() - start
    figures[f"{name}, MiB"] = peak_memory() - before


def _write(root: Path, drawn: Path, count: int, shape: Shape) -> None:
    """A COCO file of drawn boxes, and a picture for each name in it."""
    root.mkdir()
    pictures, sources = root / "images", sorted(drawn.iterdir())
    pictures.mkdir()
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        name = f"{i:09}.jpg"
        source = sources[i // LINKS % len(sources)]
        os.link(source, pictures / name)
        images.append({"id": i, "file_name": name, "width": 640, "height": 480})
        corners = rng.integers(0, 400, (rng.poisson(shape.objects), 2))
        for x, y in corners.tolist():
            width, height, category = rng.integers(8, 80), rng.integers(8, 80), rng.integers(1, shape.classes + 1)
            box = [x, y, int(width), int(height)]
            annotation = {"id": len(annotations), "image_id": i, "category_id": int(category), "bbox": box}
            annotations.append(annotation | {"area": int(width * height), "iscrowd": 0})
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, shape.classes + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "train.json").write_text(json.dumps(content))


def _of_workers(dataset: DetectionDataset) -> dict[str, float]:
    """Memory that the largest loader process has for itself, shared with nobody, after some batches."""
    sampler = TrainBatchSampler(dataset.store, BATCH)
    options: dict[str, Any] = {"num_workers": WORKERS, "collate_fn": collate, "worker_init_fn": init_worker}
    options["multiprocessing_context"] = "fork"  # as in a run on Linux; a spawned process would spawn its own
    start = time.perf_counter()
    batches = iter(TrainLoader(dataset, sampler, **options))
    next(batches)
    first = time.perf_counter() - start
    for _ in range(min(50, len(sampler) - 1)):
        next(batches)
    own = [_own_memory(process.pid or 0) for process in multiprocessing.active_children()]
    return {"first batch of workers, s": first, "memory of a worker alone, MiB": max(own)}


def _own_memory(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _of_evaluation(shape: Shape, images: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    targets, found = draw_detections(images, 100, shape.classes)
    metric = MeanAP([f"class {k}" for k in range(shape.classes)])
    metric.update(found, targets)
    del found
    with _watch(figures, "figures of validation"):
        metric.compute()
    return figures
