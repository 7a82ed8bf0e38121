"""The command `export`: a detector as ONNX or .pt2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from detection.cli.flags import check_ranges, chosen, run_command
from detection.data.records import DataError
from detection.data.spectral import PixelFormat
from detection.inference import Detector
from detection.inference.sources import Images, open_source
from detection.interop import load_detector
from detection.interop.export import ExportError, compare, onnx_runner, to_onnx, to_torch, torch_runner, write_facts
from detection.weights import read_saved


def export(
    ckpt: Path,
    output: Path,
    images: str | None = None,
    count: int = 20,
    compiled: bool = False,
    tolerance: float = 0.01,
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Write the detector to a file that needs nothing of this package: uint8 pixels in, boxes in those pixels out.

    Inputs and outputs are described by `detection.interop.export.ExportableDetector`.

    Args:
        ckpt: run's folder, its checkpoint, or .safetensors of `detection convert`.
        output: .onnx, or .pt2 for torch.export.
        images: image, folder or pattern to check the file on, against `detection predict`; an ONNX file keeps the
            figures.
        count: check on so many.
        compiled: write a .pt2 file of machine code for this machine's CPU, by AOTInductor.
        tolerance: largest difference of a coordinate, in pixels, that passes the check.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
    """
    check_ranges(count=(count, 1), tolerance=(tolerance, 0))
    if output.suffix not in (".onnx", ".pt2"):
        raise ExportError(f"{output}: write .onnx or .pt2")
    ckpt = chosen(ckpt)
    model, saved = load_detector(ckpt, trust), read_saved(ckpt)
    if output.suffix == ".onnx":
        to_onnx(model, output, {"class_names": saved.class_names})
        run = onnx_runner(output)
    else:
        to_torch(model, output, compiled)
        run = torch_runner(output, compiled, model.has_masks)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB{', not checked (see --images)' if images is None else ''}")
    if images is None:
        return
    source = open_source(images, PixelFormat.of(model))
    if not isinstance(source, Images):
        raise DataError(f"{images}: the check takes images, not a video")
    names = saved.class_names or ["?"] * (model.num_classes - 1)
    parity = compare(Detector(model, names, device="cpu"), run, [pixels for _, pixels in islice(source, count)])
    if parity.detections or parity.unmatched:
        print(f"checked against the model: {parity}")
    else:
        print(f"nothing was found on {images}, so nothing was compared: give images with objects", file=sys.stderr)
    if output.suffix == ".onnx":
        write_facts(output, {"parity": parity.as_dict()})
    if parity.unmatched or parity.box > tolerance:
        raise ExportError(f"{output}: its detections are not those of the model: {parity}")


def main(args: Sequence[str]) -> str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    return run_command("export", export, args, ValueError, ImportError)
