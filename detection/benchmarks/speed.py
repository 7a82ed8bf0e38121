"""Time of a training step and of inference of ours, quick and plain, and torchvision's, with the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torchvision.models.detection import FasterRCNN as ReferenceFasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detection.batch import Batch, pad_objects
from detection.benchmarks.peers import TorchvisionDetector
from detection.models import fast, zoo
from detection.models.backbones import efficientnet_lite0_fpn
from detection.models.compose import COCO_CATEGORIES
from detection.models.fast import folding, packing
from detection.models.fast.convolution import QuickConv2d
from detection.models.two_stage import TwoStageDetector

Network = Literal["resnet50", "efficientnet_lite0"]
Mode = Literal["train", "infer"]
OBJECTS = 8  # boxes an image, about COCO's mean of 7.3


def measure_speed(
    mode: Mode,
    network: Network = "resnet50",
    size: int = 320,
    batch_size: int = 2,
    bf16: bool = False,
    rounds: int = 7,
    device: str = "cpu",
) -> dict[str, Any]:
    """Medians of the detectors, taking turns in one process, and ours over torchvision's (below 1: ours is faster).

    Each gets what it would in use: torchvision a list of float images; ours a uint8 `Batch`, with channels_last
    weights, and in its quick form, as `DetectionModule` trains it and `for_inference` makes it ready; `plain` is ours
    as it was built. Ours train with the fused optimiser. Weights are the same; random, with scores spread so that
    inference has detections to suppress. In bf16 only ours change their precision.

    Args:
        mode: a whole training step with SGD, or inference.
        network: the backbone.
        size: side of the square images in pixels.
        batch_size: images a step.
        bf16: run our network under bfloat16 autocast.
        rounds: timed steps of each; two more are thrown away.
        device: where.
    """
    steps = contenders(mode, network, size, batch_size, bf16, device, plain=True)
    times = _take_turns(steps, rounds, device)
    row: dict[str, Any] = {"mode": mode, "network": network, "size": size, "batch": batch_size, "bf16": bf16}
    for name, values in times.items():
        row[f"{name}_ms"] = 1000 * median(values)
        row[f"{name}_spread"] = (max(values) - min(values)) / median(values)
    return row | {"ratio": median(times["ours"]) / median(times["torchvision"]), "threads": torch.get_num_threads()}


def measure_flatness(network: Network, size: int, batch_size: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Milliseconds of a training step against the number of boxes an image, then against that of classes.

    `peak_mb` is the most memory that the process (on an accelerator: the device) has used so far.
    """
    rows = []
    for objects, classes in [(n, 81) for n in (1, 10, 100, 500, 2000)] + [(OBJECTS, n) for n in (2, 81, 1201)]:
        steps = contenders("train", network, size, batch_size, False, device, objects, classes)
        times = _take_turns(steps, rounds, device)
        row: dict[str, Any] = {"boxes": objects, "classes": classes - 1}
        row |= {f"{name}_ms": 1000 * median(values) for name, values in times.items()}
        on_device = (
            torch.cuda.max_memory_allocated() if device.startswith("cuda") else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        )
        rows.append(row | {"peak_mb": on_device / 2**20})
    return rows


def measure_forms(
    mode: Mode, network: Network, size: int, batch_size: int, bf16: bool, rounds: int, device: str
) -> list[dict[str, Any]]:
    """Milliseconds with all quick forms of a device, and with each of them left out in turn.

    `ratio` is the median, over the rounds, of the time without a form over the time with all. A form whose absence
    costs less than 3 % is one to remove from `detection.models.fast`. Arguments as for `measure_speed`.
    """
    times = _take_turns(contenders(mode, network, size, batch_size, bf16, device, one_left_out=True), rounds, device)
    rows = []
    for name, values in times.items():
        ratio = median(value / ours for value, ours in zip(values, times["ours"], strict=True))
        rows.append({"forms": name, "ms": 1000 * median(values), "ratio": ratio})
    return rows


def contenders(
    mode: Mode,
    network: Network,
    size: int,
    batch_size: int,
    bf16: bool,
    device: str,
    objects: int = OBJECTS,
    classes: int = COCO_CATEGORIES,
    plain: bool = False,
    one_left_out: bool = False,
) -> dict[str, Callable[[], Any]]:
    """A step of each detector on the same images, ready to be called; other arguments as for `measure_speed`.

    Args:
        objects: ground truth boxes an image.
        classes: with background.
        plain: ours in its plain form too.
        one_left_out: ours without each of its quick forms, too.
    """
    torch.manual_seed(0)
    theirs, ours = build(network, size, classes)
    theirs.to(device), ours.to(device)
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=device)
    boxes, labels = _objects(batch_size, size, device, objects, classes)
    sizes = torch.tensor([[size, size]] * batch_size, device=device)
    batch = Batch(images, sizes, *pad_objects(list(boxes), list(labels)), original_sizes=sizes)
    floats = list(images.float() / 255)
    targets = [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)]
    precision = torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()

    def run(model: Any) -> Any:
        with precision:
            losses, detections = model.run(batch, with_losses=mode == "train", with_detections=mode == "infer")
        return losses if mode == "train" else detections

    forms = {"ours": _quick(ours, mode, device)}
    if plain:
        forms["plain"] = deepcopy(ours)
    if one_left_out:
        forms |= _one_left_out(ours, mode, device)
    if mode == "train":
        steps = {name: _step(form, partial(run, form), fused=True) for name, form in forms.items()}
        return {"torchvision": _step(theirs, lambda: theirs(floats, targets), fused=False), **steps}
    runs: dict[str, Callable[[], Any]] = {name: partial(run, form.eval()) for name, form in forms.items()}
    runs = {"torchvision": partial(theirs.eval(), floats), **runs}
    return {name: torch.inference_mode()(detect) for name, detect in runs.items()}


def without_each(ours: TwoStageDetector, device: str) -> list[tuple[str, fast.Forms]]:
    """The name of each quick form of the device that the detector would have, with the forms of the device but it."""
    chosen = fast.forms_for(device)
    folded = fast.accelerate(deepcopy(ours), device, {})  # norms that a convolution carries out get no form
    parts = {type(part) for part in folded.modules()} | {ours.rpn.nms}
    names = {plain: quick.__name__ for plain, quick in chosen.items() if plain in parts}
    return [(name, {part: form for part, form in chosen.items() if part is not plain}) for plain, name in names.items()]


def _quick(ours: TwoStageDetector, mode: Mode, device: str) -> TwoStageDetector:
    return ours.for_inference() if mode == "infer" else fast.accelerate(deepcopy(ours), device)


def _one_left_out(ours: TwoStageDetector, mode: Mode, device: str) -> dict[str, TwoStageDetector]:
    """Ours with all quick forms of the device but one, by that one's name."""
    made = {}
    for name, others in without_each(ours, device):
        with patch.object(fast, "forms_for", return_value=others):
            made[name] = _quick(ours, mode, device)
    if (filters := made.get(QuickConv2d.__name__)) is not None:  # which folded and packed layers do, too
        for place, name, usual in ((folding, "conv2d", F.conv2d), (packing, "is_filtered", lambda *_, **__: False)):
            filters.run = patch.object(place, name, usual)(filters.run)  # type: ignore[method-assign]
    with patch.object(fast, "_fold"):
        made["folding"] = _quick(ours, mode, device)
    if mode == "infer" and device == "cpu":
        with patch.object(fast, "pack"):
            made["packing"] = _quick(ours, mode, device)
        with patch.object(fast, "FewAtOnce", TwoStageDetector):
            made["FewAtOnce"] = _quick(ours, mode, device)
    return {f"without {name}": form for name, form in made.items()}


def build(network: Network, size: int, classes: int) -> tuple[nn.Module, TwoStageDetector]:
    """The detector of torchvision and ours, with the same random weights, and scores spread.

    Args:
        network: the backbone.
        size: side of the square images in pixels.
        classes: with background.
    """
    sizes = {"min_size": size, "max_size": size}  # torchvision resizes by them even where it has nothing to do
    if network == "resnet50":
        ours = zoo.fasterrcnn_resnet50_fpn(norm="frozen", num_classes=classes)
        ours.load_state_dict(_with_measured_statistics(size, classes))
        trunk = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
        theirs: nn.Module = ReferenceFasterRCNN(trunk, classes, **sizes)
    else:
        ours = zoo.fasterrcnn_efficientnet_lite0_fpn(num_classes=classes)
        options = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **sizes}
        trunk = efficientnet_lite0_fpn(fpn_norm="batch")
        theirs = TorchvisionDetector(trunk, classes, **options).model
    with torch.no_grad():
        for parameter in ours.roi_heads.get_submodule("box_predictor").parameters():
            parameter.mul_(10)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def _with_measured_statistics(size: int, classes: int) -> dict[str, Tensor]:
    """Random weights whose features are as large as trained ones: others make proposals without area, and no work."""
    live = zoo.fasterrcnn_resnet50_fpn(norm="batch", num_classes=classes)
    for module in live.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of all batches
    with torch.no_grad():
        live.train().backbone(torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last))
    return live.state_dict()


def _step(model: nn.Module, losses: Callable[[], dict[str, Tensor]], fused: bool) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(parameters, lr=1e-5, momentum=0.9, weight_decay=1e-4, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()

    return step


def _take_turns(contenders: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, run in contenders.items():
            wait(device)
            started = time.perf_counter()
            run()
            wait(device)
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def wait(device: str) -> None:
    """Let the device end what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _objects(batch_size: int, size: int, device: str, count: int, classes: int) -> tuple[Tensor, Tensor]:
    corner = torch.rand(batch_size, count, 2, device=device) * size * 0.8
    extent = 8 + torch.rand(batch_size, count, 2, device=device) ** 2 * size * 0.5
    boxes = torch.cat((corner, (corner + extent).clamp(max=size)), dim=-1)
    return boxes, torch.randint(1, classes, (batch_size, count), device=device)
