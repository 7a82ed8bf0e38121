"""Exported detectors as files of OpenVINO (`.xml` and `.bin`): float32, bfloat16, or int8 by NNCF.

OpenVINO and NNCF report their use to their makers when they are imported. Here they don't: nothing of this package
calls anybody unasked.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detection.data.spectral import Pixels
from detection.interop.export import outputs_of
from detection.interop.exported_files import Run, to_onnx
from detection.models.two_stage import FasterRCNN

Precision = Literal["32", "bf16", "int8"]
CALIBRATION_IMAGES = 100  # as many activations say where int8's range should end
HINT = "inference_precision"
FACTS = "detection"  # the section of our facts in the file
HINTS = {"32": "f32", "bf16": "bf16", "int8": "f32"}  # what is not int8 in an int8 file stays float32
# Arithmetic of boxes, in which 256 levels would be pixels; NNCF leaves out what it takes for post-processing itself.
EXACT = (
    "Divide",
    "Exp",
    "Gather",
    "Log",
    "Maximum",
    "Minimum",
    "Multiply",
    "Pad",
    "Reshape",
    "ShapeOf",
    "Sqrt",
    "Subtract",
)


def to_openvino(
    model: FasterRCNN,
    path: Path,
    facts: Mapping[str, Any],
    precision: Precision = "32",
    calibration: Iterable[Pixels] = (),
) -> None:
    """Write the detector as OpenVINO's `.xml`, with a `.bin` of its weights beside it.

    Args:
        model: see `detection.interop.export.ExportableDetector` for what goes in and comes out.
        path: of the `.xml`.
        facts: what the file shall hold, such as class names, each as JSON.
        precision: of convolutions and linear layers. A bf16 file keeps its weights in float32, and says that they are
            to be multiplied in bfloat16; OpenVINO 2026.4 decodes and ranks boxes in float32 then. For int8 NNCF chooses
            scales from what `calibration` lights up.
        calibration: `(H, W, C)` images as in training, for int8; the first `CALIBRATION_IMAGES` of them.

    Raises:
        ExportError: see `detection.interop.export.check_exportable`.
        ImportError: OpenVINO, or for int8 NNCF, is not installed.
        ValueError: int8 without images.
    """
    openvino = _openvino()
    if precision == "int8":
        _nncf()  # before the minutes that the rest takes
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(model, Path(folder) / "detector.onnx", {})
        graph = openvino.Core().read_model(Path(folder) / "detector.onnx")
        if precision == "int8":
            graph = _quantise(graph, calibration)
        for port, name in zip(graph.outputs, outputs_of(model), strict=True):
            port.get_tensor().set_names({name})  # an output may have a name of the trace beside its own
        for name, value in facts.items():
            graph.set_rt_info(json.dumps(value), [FACTS, name])
        graph.set_rt_info(json.dumps(HINTS[precision]), [FACTS, HINT])
        path.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(graph, path, compress_to_fp16=False)


def write_openvino_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Add entries to the `.xml`, each as JSON; the weights stay as they are."""
    openvino = _openvino()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        graph = openvino.Core().read_model(path)
        for name, value in facts.items():
            graph.set_rt_info(json.dumps(value), [FACTS, name])
        openvino.save_model(graph, Path(folder) / path.name, compress_to_fp16=False)
        del graph  # which may have the old weights mapped
        for suffix in (".bin", ".xml"):
            (Path(folder) / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))


def read_openvino_facts(path: Path) -> dict[str, Any]:
    """What `to_openvino` has written into the file."""
    graph = _openvino().Core().read_model(path)
    if not graph.has_rt_info(FACTS):
        return {}
    return {name: json.loads(value) for name, value in graph.get_rt_info(FACTS).value.items()}


def openvino_runner(path: Path, threads: int | None = None) -> Run:
    """Runs a file on the CPU in its precision: `(B, C, H, W)` uint8 or uint16 -> outputs by name.

    Args:
        path: of the `.xml`.
        threads: of the CPU; OpenVINO's choice by default.
    """
    # Without the hint OpenVINO takes bfloat16 wherever the CPU has it.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": read_openvino_facts(path)[HINT]}
    settings |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    compiled = _openvino().Core().compile_model(path, "CPU", settings)
    return lambda images: {port.any_name: np.array(value) for port, value in compiled(images).items()}


def _quantise(graph: Any, calibration: Iterable[Pixels]) -> Any:
    """The graph with its convolutions and linear layers in int8; the arithmetic of boxes stays in float32."""
    nncf = _nncf()
    planes = [image.transpose(2, 0, 1)[None] for image, _ in zip(calibration, range(CALIBRATION_IMAGES), strict=False)]
    if not planes:
        raise ValueError("int8 needs images to measure activations on: name a folder of them, --calibration")
    images = nncf.Dataset([np.ascontiguousarray(image) for image in planes])
    nncf.set_log_level(logging.WARNING)  # else it names each layer that stays as it is
    return nncf.quantize(
        graph,
        images,
        preset=nncf.QuantizationPreset.MIXED,  # networks without ReLU have activations on both sides of 0
        subset_size=len(planes),
        ignored_scope=nncf.IgnoredScope(types=list(EXACT), validate=False),
    )


def _openvino() -> Any:
    _report_nothing()
    try:
        import openvino
    except ImportError as error:
        raise ImportError('OpenVINO is not installed: pip install "detection[openvino]"') from error
    return openvino


def _nncf() -> Any:
    _report_nothing()
    try:
        import nncf
    except ImportError as error:
        raise ImportError('int8 needs NNCF: pip install "detection[openvino]"') from error
    return nncf


def _report_nothing() -> None:
    """Both packages import `openvino_telemetry`, and go without where there is none."""
    # Python's import takes None for a module that is not there, which the types don't know.
    modules: Any = sys.modules
    modules.setdefault("openvino_telemetry", None)
