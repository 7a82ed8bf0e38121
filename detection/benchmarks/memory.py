"""The most memory that training and evaluation take: ours against torchvision's and torchmetrics'.

Each contender runs in a process of its own, as what a process once had can't be told from what it has.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from detection.batch import Target
from detection.benchmarks.evaluation import PLAIN, draw_detections, thresholds
from detection.benchmarks.speed import Network, contenders
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.results import Rle, encode_masks

SIDE = 640  # of the drawn images, in pixels
ENCODED = "MeanAP, RLE"


def measure_training(network: Network, size: int, batch_size: int, bf16: bool, steps: int = 3) -> list[dict[str, Any]]:
    """Peak memory of a few steps of training, on the CPU.

    Args:
        network, size, batch_size, bf16: see `detection.benchmarks.speed.measure_speed`.
        steps: after the first, memory hardly grows.

    Returns:
        A row for torchvision and for ours: MiB of the whole process, MiB above what it had before the first step, and
        the ratio of each to torchvision's.
    """
    arguments = (network, size, batch_size, bf16, steps)
    return _rows(_train, ["torchvision", "ours"], arguments, "torchvision")


def measure_masks(
    images: int, detections: int = 100, classes: int = 80, evaluators: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Peak memory of evaluating masks of the size of COCO val: masks in, figures out.

    Args:
        images, detections, classes: images, detections an image, classes.
        evaluators: `MeanAP, RLE`, which is given masks as our detectors and data sets have them; `MeanAP`, given dense
            ones; or torchmetrics with a backend, which takes no others. All are compared with the last one.

    Returns:
        A row an evaluator, as `measure_training`, with its mask AP. That of torchmetrics is higher where there are
        images without objects, one in 1,500: it leaves them out of masks, with all that is found on them.
    """
    evaluators = evaluators or (ENCODED, "MeanAP", PLAIN + "faster_coco_eval", PLAIN + "pycocotools")
    return _rows(_evaluate, list(evaluators), (images, detections, classes), evaluators[-1])


def _rows(
    measure: Callable[..., dict[str, float]], names: list[str], arguments: tuple[Any, ...], peer: str
) -> list[dict[str, Any]]:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = {name: pool.apply(measure, (name, *arguments)) for name in names}
    ratios = {f"{key} over {peer}": key for key in ("peak MiB", "above start MiB")}
    return [
        {"what": name, **figures, **{ratio: figures[key] / found[peer][key] for ratio, key in ratios.items()}}
        for name, figures in found.items()
    ]


def _peaks(before: float) -> dict[str, float]:
    peak = peak_memory()
    return {"peak MiB": peak, "above start MiB": peak - before}


def peak_memory() -> float:
    """MiB of the most memory that this process has had since `forget_peak`, or ever."""
    return _status("VmHWM")


def forget_peak() -> float:
    """Measure the peak from now on; MiB that the process has now."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: proc(5)
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _train(name: str, network: Network, size: int, batch_size: int, bf16: bool, steps: int) -> dict[str, float]:
    torch.set_num_threads(1)
    step = contenders("train", network, size, batch_size, bf16, "cpu")[name]
    gc.collect()  # the other's weights
    before = forget_peak()
    for _ in range(steps):
        step()
    return _peaks(before)


def _evaluate(evaluator: str, images: int, detections: int, classes: int) -> dict[str, float]:
    torch.set_num_threads(1)
    targets, found = draw_detections(images, detections, classes)
    before = forget_peak()
    plain = evaluator.startswith(PLAIN)
    metric: Any = MeanAP([str(k) for k in range(classes)], iou_type="segm")
    if plain:
        backend: Any = evaluator.removeprefix(PLAIN)
        metric = MeanAveragePrecision(iou_type="segm", backend=backend, **thresholds())
    masks: Any = _encoded if evaluator == ENCODED else _dense
    for target, detection in zip(targets, found, strict=True):
        detection = detection | {"masks": masks(detection["boxes"])}
        metric.update([detection], [_with_masks(target, plain, masks)])
    figures = metric.compute()
    return _peaks(before) | {"mask AP": float(figures["map"])}


def _with_masks(target: Target, plain: bool, masks: Callable[[Tensor], Any]) -> Any:
    if not plain:
        return replace(target, masks=encode_masks(masks(target.boxes)))
    crowd = target.iscrowd.to(torch.int64)
    return {"masks": masks(target.boxes), "labels": target.labels, "area": target.areas, "iscrowd": crowd}


def _dense(boxes: Tensor) -> Tensor:
    """`(D, SIDE, SIDE)` bool: the ellipse in each box."""
    masks: NDArray[np.uint8] = np.zeros((len(boxes), SIDE, SIDE), np.uint8)
    for mask, box in zip(masks, boxes.tolist(), strict=True):
        _draw(mask, box)
    return torch.from_numpy(masks.view(np.bool_))


def _encoded(boxes: Tensor) -> list[Rle]:
    """The same, each encoded before the next is drawn."""
    found = []
    for box in boxes.tolist():
        mask: NDArray[np.uint8] = np.zeros((1, SIDE, SIDE), np.uint8)
        _draw(mask[0], box)
        found += encode_masks(mask)
    return found


def _draw(mask: NDArray[np.uint8], box: tuple[float, float, float, float]) -> None:
    x1, y1, x2, y2 = box
    cv2.ellipse(mask, (((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1, y2 - y1), 0), 1, -1)
