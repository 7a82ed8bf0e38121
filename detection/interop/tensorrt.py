"""ONNX as TensorRT takes it: one size of image, every shape known, no step that counts.

What the documentation of TensorRT's parser asks for decides here: uint8 is cast as soon as it comes in, nothing is
float64 or looks for what is not zero, `TopK` takes at most 3840, NMS has constant limits. NMS is ONNX's own operator,
for a batch of groups of known size. TensorRT itself has run none of these files: they are compared with the model by
ONNX Runtime.

Shape shorthand:
    B: images     N: boxes     C: classes without background     P: proposals     G: levels or classes
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library, nn

from detection.boxes import grouped_nms
from detection.interop.export import ExportableDetector, ExportError, check_exportable, rank
from detection.interop.exported_files import OPSET, need_onnxscript, onnx_divide, write_facts
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import RoIHeads
from detection.models.rpn import RegionProposalNetwork
from detection.models.two_stage import FasterRCNN

MOST_OF_TOPK = 3840
# What the parser's list names, of what a detector is made of; see the operators' page of onnx-tensorrt.
_NAMES = """
Add And AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose Div
Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater
GreaterOrEqual HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less
LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mod Mul Neg NonMaxSuppression Not Or Pad Pow Range
Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize RoiAlign Round Scatter
ScatterElements ScatterND Shape Sigmoid Sign Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile
TopK Transpose Unsqueeze Where
"""
OPERATORS = frozenset(_NAMES.split())


def to_tensorrt(model: FasterRCNN, path: Path, facts: Mapping[str, Any], size: tuple[int, int], batch: int = 1) -> None:
    """Write the detector as ONNX for images of one size.

    Args:
        model: see `ExportableDetector` for what goes in and comes out.
        path: of the `.onnx`.
        facts: what the file's metadata shall hold, each as JSON.
        size: height and width of the images.
        batch: how many images the file takes at once.

    Raises:
        ExportError: see `check_exportable`, and where TensorRT's documentation excludes what came out.
        ImportError: onnx and onnxscript are not installed.
    """
    need_onnxscript()
    check_exportable(model)
    module = _OfOneSize(model, size)
    kind = torch.uint16 if model.transform.image_depth == 16 else torch.uint8
    example = torch.zeros((batch, model.transform.channels, *size), dtype=kind)
    with torch.no_grad():
        program = torch.export.export(module, (example,), strict=False)
    ours = torch.ops.detection
    table: Any = {ours.batched_nms.default: _translate_nms, ours.divide.default: onnx_divide}
    written = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, custom_translation_table=table, input_names=["images"],
        output_names=module.outputs, verbose=False,
    )  # fmt: skip
    assert written is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    written.save(path, external_data=False)
    write_facts(path, facts)
    if reasons := objections(path):
        raise ExportError(f"{path}: TensorRT would not take it: {'; '.join(reasons)}")


class _OfOneSize(ExportableDetector):
    """As its base, with known shapes alone: every region is pooled from every level, padding too."""

    def __init__(self, model: FasterRCNN, size: tuple[int, int]) -> None:
        super().__init__(model)
        blank = torch.zeros((1, 1, *size), dtype=torch.uint8)
        old, self._new, self._cells = super().sizes(blank)
        self.register_buffer("_old", old)

    def replacements(self) -> dict[type[nn.Module], dict[str, Any]]:
        return super().replacements() | {
            RegionProposalNetwork: {"suppress": _suppress},
            RoIPooler: {"pool": RoIPooler.pool},  # whatever quicker form a detector that is trained has
            RoIHeads: {"nms_per_class": _nms_per_class},
        }

    def sizes(self, images: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        return self._old, self._new, self._cells  # type: ignore[return-value]


def objections(path: Path) -> list[str]:
    """Why TensorRT would refuse an ONNX file, by what the documentation of its parser says; empty if nothing is known.

    Args:
        path: of a file that is to have one size of image.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    graph, said = model.graph, list[str]()
    if unknown := sorted({node.op_type for node in graph.node} - OPERATORS):
        said.append(f"its parser has no {', '.join(unknown)}")
    for value in [*graph.input, *graph.output]:
        if any(not side.HasField("dim_value") for side in value.type.tensor_type.shape.dim):
            said.append(f"the shape of {value.name} is open")
    constants = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    constants |= {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    double = onnx.TensorProto.DOUBLE
    if any(value.type.tensor_type.elem_type == double for value in graph.value_info):
        said.append("it computes in float64")
    for node in graph.node:
        if node.op_type == "TopK" and (node.input[1] not in constants or constants[node.input[1]] > MOST_OF_TOPK):
            said.append(f"TopK {node.name} takes more than {MOST_OF_TOPK}, or an unknown number")
        if node.op_type == "NonMaxSuppression" and any(name not in constants for name in node.input[2:]):
            said.append(f"the limits of NonMaxSuppression {node.name} are no constants")
    for value in graph.input:
        readers = {node.op_type for node in graph.node if value.name in node.input}
        if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8 and readers != {"Cast"}:
            said.append(f"{value.name} is uint8, and is read by {', '.join(sorted(readers))} before it is cast")
    return said


def _suppress(self: RegionProposalNetwork, boxes: Tensor, scores: Tensor, levels: Tensor, usable: Tensor) -> Tensor:
    every = torch.arange(len(self.anchor_generator.num_anchors_per_location()))
    own = (levels[:, None] == every[:, None]) & usable[:, None]  # (B, G, N)
    table = torch.where(own, scores[:, None], -1.0)
    return torch.ops.detection.batched_nms(boxes, table, self.nms_thresh) > 0


def _nms_per_class(self: RoIHeads, boxes: Tensor, scores: Tensor, usable: Tensor) -> list[dict[str, Tensor]]:
    # Each class of each image is an image to NMS, of P boxes: nothing need be compared across classes.
    own = boxes.transpose(1, 2).flatten(0, 1), torch.where(usable, scores, -1.0).transpose(1, 2).flatten(0, 1)
    survives = torch.ops.detection.batched_nms(own[0], own[1][:, None], self.nms_thresh) > 0
    survives = survives.view(usable.shape[0], usable.shape[2], usable.shape[1]).transpose(1, 2)
    return rank(boxes, scores, survives, self.detections_per_img)


# NMS of a batch of images, each with scores for several groups: which boxes survive in any, as 0 and 1.
_SCHEMA = "(Tensor boxes, Tensor scores, float iou_thresh) -> Tensor"


@library.custom_op("detection::batched_nms", mutates_args=(), schema=_SCHEMA)
def _batched_nms(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    """Boxes `(B, N, 4)` and scores `(B, G, N)`, below 0 for those that take no part -> int64 `(B, N)`."""
    survives = torch.zeros(boxes.shape[:2], dtype=torch.int64)
    for image, group in ((b, g) for b in range(scores.shape[0]) for g in range(scores.shape[1])):
        part = (scores[image, group] >= 0).nonzero()[:, 0]
        kept = grouped_nms(boxes[image, part], scores[image, group, part], torch.zeros_like(part), iou_thresh)
        survives[image, part[kept]] = 1
    return survives


@_batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_thresh: float) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.int64)


def _translate_nms(boxes: Any, scores: Any, iou_thresh: float) -> Any:
    from onnxscript import opset18 as op

    picked = op.NonMaxSuppression(
        boxes, scores, op.Constant(value_ints=[int(boxes.shape[1])]), op.Constant(value_floats=[iou_thresh]),
        op.Constant(value_floats=[-0.5]),
    )  # fmt: skip
    # TensorRT fills what is left over with -1; as an index that would be the last box.
    image, box = (
        op.Gather(picked, op.Constant(value_int=0), axis=1),
        op.Gather(picked, op.Constant(value_int=2), axis=1),
    )
    count = int(boxes.shape[0]) * int(boxes.shape[1])
    flat = op.Add(op.Mul(image, op.Constant(value_int=int(boxes.shape[1]))), box)
    flat = op.Where(op.Less(box, op.Constant(value_int=0)), op.Constant(value_int=count), flat)
    zeros = op.ConstantOfShape(op.Constant(value_ints=[count + 1]))
    ones = op.Expand(op.Constant(value_int=1), op.Shape(flat))
    marked = op.ScatterElements(op.Cast(zeros, to=7), flat, ones, axis=0)
    kept = op.Slice(marked, op.Constant(value_ints=[0]), op.Constant(value_ints=[count]))
    return op.Reshape(kept, op.Constant(value_ints=[int(boxes.shape[0]), int(boxes.shape[1])]))
