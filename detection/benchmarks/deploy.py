"""Time of a whole call, uint8 pixels in and boxes out, by everything that runs the same detector, and what it finds.

Each gets one image `(1, 3, H, W)` uint8 and gives arrays. They take turns in one process, with as many threads each.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.benchmarks.speed import Network, build
from detection.errors import SettingsError
from detection.inference import Detector
from detection.interop import export_detector, save_detector
from detection.interop.exported_files import Run, onnx_runner, to_onnx
from detection.interop.openvino import Precision, openvino_runner, to_openvino
from detection.interop.parity import compare
from detection.models.compose import COCO_CATEGORIES
from detection.models.two_stage import TwoStageDetector
from detection.training.compiling import compile_parts

CONTENDERS = (
    "packed", "packed bf16", "plain", "compiled", "torchvision", "detectron2", "onnxruntime", "openvino",
    "openvino bf16", "openvino int8",
)  # fmt: skip
NEEDED = {"openvino": "openvino", "onnxruntime": "onnxruntime", "detectron2": "detectron2"}
Planes = NDArray[np.uint8]


def measure_deploy(network: Network, size: int, rounds: int, contenders: Sequence[str]) -> list[dict[str, Any]]:
    """Medians of each contender's milliseconds, its time over ours, and how its detections differ from ours.

    Weights are random, with scores spread so that there are detections to suppress, and proposals that stay near their
    anchors, as after training: others overlap so much that NMS leaves 300 in float32 and 1,000 in int8. The image is
    noise, and so are those that int8 is calibrated on. `ratio` is the time over that of our packed form in the same
    precision (int8: over bf16), None where that is not among the contenders: below 1 the contender is faster.
    `cpu_ratio` is likewise of processor time, which other programs disturb less, but in which threads that wait for
    work count. Detections are compared with those of `detection predict`, see `detection.interop.parity.Parity`.

    Args:
        network: the backbone.
        size: side of the square image in pixels.
        rounds: timed calls of each; two more are thrown away.
        contenders: some of `CONTENDERS`; none for all whose packages are there, Detectron2 with its own networks alone.

    Raises:
        SettingsError: there is no such contender.
    """
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise SettingsError(f"there is no contender '{unknown[0]}'; there are: {', '.join(CONTENDERS)}")
    chosen = contenders or [name for name in CONTENDERS if _is_here(name, network)]
    torch.manual_seed(0)
    theirs, ours = build(network, size, COCO_CATEGORIES)
    for model in (theirs, ours):
        model.get_parameter("rpn.head.bbox_pred.weight").data.mul_(0.1)
    ours.transform.min_size, ours.transform.max_size = (size,), size
    detector = Detector(ours, [f"class {i}" for i in range(1, COCO_CATEGORIES)], device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        runs = dict(_runs(chosen, detector, ours.eval(), theirs.eval(), Path(folder), image))
        times = _take_turns(runs, np.ascontiguousarray(image.transpose(2, 0, 1)[None]), rounds)
        parity = {name: compare(detector, run, [image]) for name, run in runs.items()}
    rows = []
    for name, found in parity.items():
        row: dict[str, Any] = {"network": network, "size": size, "contender": name}
        for i, kind in enumerate(("", "cpu_")):
            row[f"{kind}ms"] = 1000 * median(turn[i] for turn in times[name])
            row[f"{kind}ratio"] = _over_ours(times, name, i)
        row |= {"detections": found.detections, "unmatched": found.unmatched, "pixels": found.box}
        rows.append(row | {"score": found.score, "threads": torch.get_num_threads()})
    return rows


def _over_ours(times: Mapping[str, Sequence[tuple[float, float]]], name: str, i: int) -> float | None:
    """The median of a contender's i-th time over that of our form of its precision."""
    base = "packed bf16" if name.endswith(("bf16", "int8")) else "packed"
    if base not in times:
        return None
    return median(turn[i] / ours[i] for turn, ours in zip(times[name], times[base], strict=True))


def _is_here(contender: str, network: Network) -> bool:
    name = contender.partition(" ")[0]
    if name == "detectron2" and network != "resnet50":
        return False
    if contender == "openvino int8" and importlib.util.find_spec("nncf") is None:
        return False
    return name not in NEEDED or importlib.util.find_spec(NEEDED[name]) is not None


def _runs(
    names: Sequence[str], detector: Detector, ours: TwoStageDetector, theirs: nn.Module, folder: Path, image: Planes
) -> Iterator[tuple[str, Run]]:
    """What runs the image, by name; files are written into the folder."""
    threads = torch.get_num_threads()
    packed: Any = detector.model
    makers: dict[str, Callable[[], Run]] = {
        "packed": lambda: _of_ours(detector, packed),
        "packed bf16": lambda: _of_ours(detector, packed, bf16=True),
        "plain": lambda: _of_ours(detector, ours),
        "compiled": lambda: _of_ours(detector, _compiled(ours)),
        "torchvision": lambda: _of_lists(lambda pixels: theirs([pixels.float() / 255])[0]),
        "detectron2": lambda: _of_detectron2(ours, folder, image),
        "onnxruntime": lambda: _of_onnx(ours, folder / "detector.onnx", threads),
        "openvino": lambda: _of_openvino(ours, folder / "float32.xml", "32", image, threads),
        "openvino bf16": lambda: _of_openvino(ours, folder / "bf16.xml", "bf16", image, threads),
        "openvino int8": lambda: _of_openvino(ours, folder / "int8.xml", "int8", image, threads),
    }
    for name in names:
        yield name, makers[name]()


def _of_ours(detector: Detector, model: Any, bf16: bool = False) -> Run:
    precision = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()

    def detect(pixels: Tensor) -> dict[str, Tensor]:
        with precision:
            batch = detector.batch([pixels.permute(1, 2, 0).numpy()])
            found: dict[str, Tensor] = model.run(batch, with_losses=False, with_detections=True)[1][0]
        return found

    return _of_lists(detect)


def _of_lists(detect: Callable[[Tensor], dict[str, Tensor]]) -> Run:
    """What finds boxes in `(3, H, W)` uint8, as exported files run."""

    def run(planes: Any) -> dict[str, Any]:
        with torch.inference_mode():
            found = detect(torch.from_numpy(planes[0]))
        given = {name: found[name].float().numpy()[None] for name in ("boxes", "labels", "scores")}
        return given | {"counts": np.array([len(found["labels"])])}

    return run


def _compiled(model: TwoStageDetector) -> TwoStageDetector:
    """The plain form, with its dense parts by `torch.compile`."""
    copied = deepcopy(model)
    compile_parts(copied)
    return copied


def _of_onnx(model: TwoStageDetector, path: Path, threads: int) -> Run:
    to_onnx(model, path, {})
    return onnx_runner(path, threads)


def _of_openvino(model: TwoStageDetector, path: Path, precision: Precision, image: Planes, threads: int) -> Run:
    to_openvino(model, path, {}, precision, [image] * 3)
    return openvino_runner(path, threads)


def _of_detectron2(model: TwoStageDetector, folder: Path, image: Planes) -> Run:
    """The same detector, built by Detectron2 from the files of `detection convert export`."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    save_detector(folder / "ours.safetensors", model)
    export_detector(folder / "ours.safetensors", folder / "theirs.pth", "detectron2")
    config = get_cfg()
    config.merge_from_file(str(folder / "theirs.yaml"))
    config.MODEL.DEVICE = "cpu"
    built = build_model(config).eval()
    DetectionCheckpointer(built).load(config.MODEL.WEIGHTS)
    planes = [2, 1, 0] if config.INPUT.FORMAT == "BGR" else [0, 1, 2]
    size = dict(zip(("height", "width"), image.shape[:2], strict=True))

    def detect(pixels: Tensor) -> dict[str, Tensor]:
        found = built([{"image": pixels[planes].float(), **size}])[0]["instances"]
        return {"boxes": found.pred_boxes.tensor, "labels": found.pred_classes + 1, "scores": found.scores}

    return _of_lists(detect)


def _take_turns(runs: dict[str, Run], planes: Planes, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds, and those of the processor, of each call."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            began, worked = time.perf_counter(), time.process_time()
            run(planes)
            took = time.perf_counter() - began, time.process_time() - worked
            if turn >= 2:
                times[name].append(took)
    return times
