"""Exported detectors as files of ONNX and of `torch.export`, and what runs such a file."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from detection.data.spectral import Pixels
from detection.interop.export import ExportableDetector, trace
from detection.models.roi_heads import RoIHeads
from detection.models.rpn import RegionProposalNetwork
from detection.models.two_stage import FasterRCNN

FACTS = "detection"  # folder of our facts in a .pt2 file
OPSET = 18  # the first with all that is needed; later ones add nothing for a detector
Run = Callable[[Pixels], Mapping[str, NDArray[Any]]]


def to_onnx(model: FasterRCNN, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the detector as ONNX.

    Args:
        model: see `ExportableDetector` for what goes in and comes out.
        path: of the file.
        facts: what the file's metadata shall hold, such as class names, each as JSON.

    Raises:
        ExportError: see `check_exportable`.
        ImportError: onnx and onnxscript are not installed.
    """
    translate = _onnx_nms()
    program, names = trace(model)
    table: Any = {torch.ops.detection.grouped_nms.default: translate, torch.ops.detection.divide.default: onnx_divide}
    onnx_program = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, custom_translation_table=table, input_names=["images"],
        output_names=names, verbose=False,
    )  # fmt: skip
    assert onnx_program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_program.save(path, external_data=False)
    write_facts(path, facts)


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Add entries to the metadata of an ONNX file, each as JSON."""
    import onnx

    model = onnx.load(path)
    for name, value in facts.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.save(model, path)


def read_facts(path: Path) -> dict[str, Any]:
    """What `write_facts` has written into an ONNX file."""
    import onnx

    return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def _onnx_nms() -> Callable[..., Any]:
    """ONNX's NonMaxSuppression with our groups as its classes."""
    need_onnxscript()
    from onnxscript import opset18 as op

    def translate(boxes: Any, scores: Any, groups: Any, iou_thresh: float) -> Any:
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        first = op.Constant(value_ints=[0])
        # One more group, so that there is one even without boxes.
        last = op.ReduceMax(op.Concat(groups, first, axis=0), keepdims=0)
        every = op.Unsqueeze(op.Range(zero, op.Add(last, one), one), op.Constant(value_ints=[1]))
        own = op.Equal(every, op.Unsqueeze(groups, first))
        table = op.Where(own, op.Unsqueeze(scores, first), op.Constant(value_float=-1.0))
        corners = op.Reshape(boxes, op.Constant(value_ints=[1, -1, 4]))  # OpenVINO has to know that they are four
        picked = op.NonMaxSuppression(
            corners, op.Unsqueeze(table, first), op.Constant(value_ints=[2**31]),
            op.Constant(value_floats=[iou_thresh]), op.Constant(value_floats=[-0.5]),
        )  # fmt: skip
        return op.Gather(picked, op.Constant(value_int=2), axis=1)

    return translate


def onnx_divide(numbers: Any, divisor: int) -> Any:
    """ONNX's division, which rounds towards 0, for `detection.interop.export.divide`."""
    from onnxscript import opset18 as op

    return op.Div(numbers, op.CastLike(op.Constant(value_int=divisor), numbers))


def need_onnxscript() -> None:
    """Raise an `ImportError` that names the extra, where onnxscript is not installed."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('ONNX needs more packages: pip install "detection[export]"') from error


def to_torch(model: FasterRCNN, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the detector as a `.pt2` file of `torch.export`.

    Args:
        model, path, facts: as for `to_onnx`.

    Raises:
        ExportError: see `check_exportable`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*create_unbacked_symint")  # torchvision's call of PyTorch
        warnings.filterwarnings("ignore", "No complete tensor found")  # concerns weights on a GPU
        program, names = trace(model, _OfPyTorch)
        torch.export.save(program, path)
    write_torch_facts(path, {**facts, "outputs": names})


class _OfPyTorch(ExportableDetector):
    """With operators of PyTorch and torchvision in the place of ours, which nobody knows without this package."""

    def replacements(self) -> dict[type[nn.Module], dict[str, Any]]:
        methods = super().replacements()
        for part in (RegionProposalNetwork, RoIHeads):
            methods[part] |= {"nms_of_groups": _nms_apart}
        return methods

    @staticmethod
    def divide(numbers: Tensor, divisor: int) -> Tensor:
        return numbers // divisor


def _nms_apart(_: nn.Module, boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
    """NMS of groups that are moved so far apart that they can't overlap; in float64, where that costs no accuracy."""
    boxes = boxes.double()
    extent = F.pad(boxes.flatten(), (0, 1)).amax() + 1
    return nms(boxes + (groups * extent)[:, None], scores.double(), iou_thresh)


def onnx_runner(path: Path, threads: int | None = None) -> Run:
    """Runs an ONNX file on the CPU: `(B, C, H, W)` uint8 or uint16 -> outputs by name.

    Args:
        path: of the file.
        threads: of the CPU; ONNX Runtime's choice by default.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('ONNX files need onnxruntime: pip install "detection[export]"') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"images": images}), strict=True))


def write_torch_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Add entries to a `.pt2` file, each as JSON."""
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]  # in which PyTorch has all that it reads
        for name, value in facts.items():
            archive.writestr(f"{folder}/{FACTS}/{name}.json", json.dumps(value))


def read_torch_facts(path: Path) -> dict[str, Any]:
    """What `write_torch_facts` has written into the file."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if PurePosixPath(name).parent.name == FACTS]
        return {PurePosixPath(name).stem: json.loads(archive.read(name)) for name in names}


def torch_runner(path: Path, threads: int | None = None) -> Run:
    """The same for a `.pt2` file; its threads are PyTorch's."""
    facts = read_torch_facts(path)
    if facts.get("compiled"):  # by AOTInductor, which earlier versions could ask for
        raise ValueError(f"{path}: is machine code of an earlier version, which found other boxes: export it again")
    names, module = facts["outputs"], torch.export.load(path).module()
    return lambda images: {
        name: value.numpy() for name, value in zip(names, module(torch.from_numpy(images)), strict=True)
    }
