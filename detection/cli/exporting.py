"""The command `export`: a detector as ONNX, for TensorRT too, as OpenVINO, or as .pt2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from detection.certificates.making import Job
from detection.cli.certifying import certify, of_split
from detection.cli.flags import check_ranges, chosen, run_command
from detection.cli.run_data import labelled_images, training_images
from detection.data.records import DataError
from detection.data.spectral import PixelFormat, Pixels
from detection.inference import Detector
from detection.inference.exported import kept_facts
from detection.inference.sources import Images, open_source
from detection.interop import load_detector
from detection.interop.export import ExportError
from detection.interop.exported_files import (
    Run,
    onnx_runner,
    to_onnx,
    to_torch,
    torch_runner,
    write_facts,
    write_torch_facts,
)
from detection.interop.openvino import Precision, openvino_runner, to_openvino, write_openvino_facts
from detection.interop.parity import compare, compare_accuracy
from detection.interop.tensorrt import to_tensorrt
from detection.models.two_stage import FasterRCNN
from detection.weights import read_saved

Target = Literal["onnx", "openvino", "tensorrt", "torch"]
SUFFIXES: dict[Target, str] = {"onnx": ".onnx", "openvino": ".xml", "tensorrt": ".onnx", "torch": ".pt2"}


def export(
    ckpt: Path,
    output: Path,
    target: Target | None = None,
    precision: Precision = "32",
    size: list[int] | None = None,
    images: str | None = None,
    count: int = 20,
    split: Literal["val", "test"] | None = None,
    root: Path | None = None,
    calibration: str | None = None,
    tolerance: float | None = None,
    ap_tolerance: float = 0.01,
    trust: list[str] = [],  # noqa: B006
    certificate: bool = True,
) -> None:
    """Write the detector to a file that needs nothing of this package: uint8 pixels in, boxes in those pixels out.

    Inputs and outputs are described by `detection.interop.export.ExportableDetector`.

    Args:
        ckpt: run's folder, its checkpoint, or .safetensors of `detection convert`.
        output: .onnx, .xml for OpenVINO, or .pt2 for torch.export.
        target: onnx, openvino, tensorrt (ONNX for images of one `size`) or torch; by default what the suffix says.
        precision: of an OpenVINO file: 32, bf16, or int8, which needs images to calibrate on.
        size: height and width of the images that a file for TensorRT takes, e.g. '[480, 640]'.
        images: image, folder or pattern to check the file on, against `detection predict`; the file keeps the figures.
        count: check on so many.
        split: val or test of the run's data: compare the AP of the file and of the model on it.
        root: folder of the run's data, if it has moved.
        calibration: folder or pattern of images for int8; training images of the run's data by default.
        tolerance: largest difference of a coordinate, in pixels, that passes the check; 0.01 by default. What bf16 and
            int8 change is stated, and an error only where this is given.
        ap_tolerance: largest loss of AP on `split` that passes.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
        certificate: compare once more, on a few of the images or on drawn scenes, and write what came out beside the
            file and into it; see `detection verify`.
    """
    check_ranges(count=(count, 1), tolerance=(tolerance, 0), ap_tolerance=(ap_tolerance, 0))
    target = _target(output, target, precision, size)
    ckpt = chosen(ckpt)
    model, saved = load_detector(ckpt, trust), read_saved(ckpt)
    form = PixelFormat.of(model)
    given = (pixels for _, pixels in _images(calibration, form)) if calibration else training_images(ckpt, trust, root)
    facts = kept_facts(model, saved.class_names, saved.category_ids, saved.tiles)
    written = _write(model, output, target, facts, precision, size, given)
    files = [output, output.with_suffix(".bin")] if target == "openvino" else [output]
    weight = sum(path.stat().st_size for path in files)
    unchecked = ", not checked (see --images and --split)" if images is split is None else ""
    print(f"{output}: {weight / 1e6:.1f} MB{unchecked}")
    names = saved.class_names or ["?"] * (model.num_classes - 1)
    detector = Detector(model, names, device="cpu")
    if images is not None:
        most = tolerance if tolerance is not None else 0.01 if precision == "32" else None
        fitting = (pixels for _, pixels in _images(images, form) if size is None or list(pixels.shape[:2]) == size)
        _check(output, detector, written, list(islice(fitting, count)), images, most)
    accuracy = None
    if split is not None:
        accuracy = compare_accuracy(detector, written.run, labelled_images(ckpt, trust, root, split))
        print(f"on {accuracy.images} images of {split}: {accuracy}")
        written.keep({"accuracy": {"split": split} | accuracy.as_dict()})
    if certificate:
        settings: dict[str, Any] = {"target": target, "precision": precision, "size": size}
        settings |= {"tolerance": tolerance, "ap_tolerance": ap_tolerance}
        certify(Job("export", output, ckpt, settings, trust), images, known=of_split(accuracy, split))
    if accuracy is not None and accuracy.lost > ap_tolerance:
        raise ExportError(f"{output}: it loses {accuracy.lost:.4f} AP, more than --ap_tolerance {ap_tolerance:g}")


class _Written(NamedTuple):
    """A file: what runs it, and what puts facts into it."""

    run: Run
    keep: Callable[[Mapping[str, Any]], None]


def _target(output: Path, target: Target | None, precision: Precision, size: list[int] | None) -> Target:
    """What is to be written; an `ExportError` where the flags contradict each other."""
    found = target or next((name for name, suffix in SUFFIXES.items() if suffix == output.suffix), None)
    if found is None:
        raise ExportError(f"{output}: write .onnx, .xml (OpenVINO) or .pt2")
    if output.suffix != SUFFIXES[found]:
        raise ExportError(f"{output}: a file of {found} ends in {SUFFIXES[found]}")
    if precision != "32" and found != "openvino":
        raise ExportError(f"--precision {precision} is for OpenVINO: write .xml, or leave it out")
    if (found == "tensorrt") != (size is not None):
        told = "a file for TensorRT takes images of one size: name it" if size is None else "only TensorRT needs --size"
        raise ExportError(f"{told}, --target tensorrt --size '[HEIGHT, WIDTH]'")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ExportError(f"--size is {size}: give height and width in pixels, e.g. '[480, 640]'")
    return found


def _write(
    model: FasterRCNN,
    output: Path,
    target: Target,
    facts: Mapping[str, Any],
    precision: Precision,
    size: list[int] | None,
    calibration: Iterable[Pixels],
) -> _Written:
    if target == "openvino":
        to_openvino(model, output, facts, precision, calibration)
        return _Written(openvino_runner(output), partial(write_openvino_facts, output))
    if target == "torch":
        to_torch(model, output, facts)
        return _Written(torch_runner(output), partial(write_torch_facts, output))
    if size is not None:
        to_tensorrt(model, output, {**facts, "size": size}, (size[0], size[1]))
    else:
        to_onnx(model, output, facts)
    return _Written(onnx_runner(output), partial(write_facts, output))


def _images(source: str, form: PixelFormat) -> Images:
    found = open_source(source, form)
    if not isinstance(found, Images):
        raise DataError(f"{source}: the check takes images, not a video")
    return found


def _check(
    output: Path, detector: Detector, written: _Written, pixels: list[Pixels], images: str, tolerance: float | None
) -> None:
    """Compare the file with the model, keep the figures in it, and raise an `ExportError` if they are too large."""
    parity = compare(detector, written.run, pixels)
    if parity.detections or parity.unmatched:
        print(f"checked against the model: {parity}")
    else:
        print(f"nothing was found on {images}, so nothing was compared: give images with objects", file=sys.stderr)
    written.keep({"parity": parity.as_dict()})
    if tolerance is not None and (parity.unmatched or parity.box > tolerance):
        raise ExportError(f"{output}: its detections are not those of the model: {parity}")


def main(args: Sequence[str]) -> str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    return run_command("export", export, args, ValueError, ImportError)
