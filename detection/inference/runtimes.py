"""A checkpoint at work in another runtime: the exported file is written beside it once, and used from then on."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from detection.commit import code_version
from detection.inference.exported import RUNTIMES, kept_facts
from detection.interop import load_detector
from detection.interop.exported_files import to_onnx
from detection.interop.openvino import to_openvino
from detection.weights import NO_NAMES, CheckpointError, read_saved

Runtime = Literal["pytorch", "onnxruntime", "openvino"]


def file_of(ckpt: Path, runtime: Runtime, precision: str = "32", trust: Iterable[str] = ()) -> Path:
    """The file by which `runtime` runs a checkpoint.

    It lies beside the checkpoint, `best.openvino.xml` for `best.ckpt`. It is written where it is absent, or was made of
    other weights or by another version of this package.

    Args:
        ckpt: `.ckpt` or `.safetensors`.
        runtime: onnxruntime or openvino.
        precision: of the network: 32, or with OpenVINO bf16.
        trust: packages whose parts the checkpoint may use besides this one's: their code runs.

    Raises:
        CheckpointError: the checkpoint does not name its classes.
        ExportError: the detector can't be exported.
        ImportError: the runtime is not installed.
        ValueError: a precision that the runtime does not have.
    """
    if ckpt.suffix in RUNTIMES:
        raise ValueError(f"{ckpt}: it is exported already and has its runtime: leave --runtime out")
    if precision not in (("32", "bf16") if runtime == "openvino" else ("32",)):
        raise ValueError(f"--precision {precision} is not for --runtime {runtime}: leave one of them out")
    suffix = ".xml" if runtime == "openvino" else ".onnx"
    path = ckpt.with_suffix(f".{runtime}{'-bf16' * (precision == 'bf16')}{suffix}")
    with ckpt.open("rb") as file:
        made_of = [hashlib.file_digest(file, "sha256").hexdigest(), code_version()]
    if path.is_file() and RUNTIMES[suffix].facts(path).get("made_of") == made_of:
        return path
    model, saved = load_detector(ckpt, trust), read_saved(ckpt)
    if saved.class_names is None:
        raise CheckpointError(f"{ckpt}: {NO_NAMES}")
    facts = {**kept_facts(model, saved.class_names, saved.category_ids, saved.tiles), "made_of": made_of}
    with tempfile.TemporaryDirectory(dir=ckpt.parent) as folder:  # so that no half of a file is ever found
        new = Path(folder) / path.name
        if runtime == "openvino":
            to_openvino(model, new, facts, "bf16" if precision == "bf16" else "32")
        else:
            to_onnx(model, new, facts)
        for part in sorted(Path(folder).iterdir()):  # .bin before .xml
            part.replace(path.parent / part.name)
    return path
