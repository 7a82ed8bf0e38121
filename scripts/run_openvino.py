"""Run a detector exported to OpenVINO: `python run_openvino.py detector.xml photo.jpg`; copy it with run_onnx.py."""

import json
import sys
from collections.abc import Callable
from typing import Any

from run_onnx import main


def open_openvino(path: str) -> tuple[Callable[[Any], dict[str, Any]], list[str] | None]:
    """What runs the file on `(1, 3, H, W)` uint8, in the precision it names, and its classes."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # else OpenVINO tells its makers of the import
    import openvino

    facts = openvino.Core().read_model(path).get_rt_info("detection").value
    settings = {"INFERENCE_PRECISION_HINT": json.loads(facts["inference_precision"])}
    compiled, classes = openvino.compile_model(path, "CPU", settings), json.loads(facts.get("class_names", "null"))
    return lambda planes: {port.any_name: value for port, value in compiled(planes).items()}, classes


if __name__ == "__main__":
    main(open_openvino)
