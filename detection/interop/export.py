"""Detectors as ONNX or torch.export files, from uint8 pixels to boxes, without this package at the other end.

The exported graph is the detector's own parts. On a copy of it, those few steps are replaced that loop over images or
count values in Python, by others with the same results: NMS, the choice of the best, the pooling, the anchors' cache.

Shape shorthand:
    B: images     H, W: their height and width     P: proposals     C: classes without background
    D: most detections of an image     m: side of a mask (28)
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import Conv2dSame
from torch import Tensor, library, nn
from torch.nn import functional as F
from torchvision.ops import nms

from detection.anchors import AnchorGenerator
from detection.batch import Batch
from detection.boxes import grouped_nms, resize_boxes
from detection.data.spectral import Pixels
from detection.models.masks import MaskBranch
from detection.models.pooling import RoIPool, RoIPooler
from detection.models.precomputed import PrecomputedProposals
from detection.models.roi_heads import RoIHeads
from detection.models.rpn import RegionProposalNetwork
from detection.models.two_stage import FasterRCNN
from detection.parts import FeatureMaps

if TYPE_CHECKING:
    from detection.inference.detector import Detector

OUTPUTS = ("boxes", "labels", "scores", "counts", "masks")
ONE = 2048  # a weight of 1 in OpenCV's fixed point
OPSET = 18  # the first with all that is needed; later ones add nothing for a detector
Run = Callable[[Pixels], Mapping[str, NDArray[Any]]]


class ExportError(ValueError):
    """A detector that can't be exported; the message gives the reason."""


def check_exportable(model: nn.Module) -> None:
    """Raise an `ExportError` with the reason, if there is one why the detector can't be exported."""
    if not isinstance(model, FasterRCNN):
        raise ExportError(f"{type(model).__name__} runs a detector several times an image: export the detector itself")
    if isinstance(model.rpn, PrecomputedProposals):
        raise ExportError("R-CNN and Fast R-CNN take proposals from Selective Search, which no graph can run")
    if any(heads.soft_nms_sigma is not None for heads in _stages(model)):
        raise ExportError(
            "Soft-NMS takes one step a detection, which ONNX has no operator for: set soft_nms_sigma null"
        )
    if isinstance(model.rpn, RegionProposalNetwork) and model.rpn.anchor_generator.infer_strides:
        raise ExportError("anchors with infer_strides depend on the size of the batch: build it with declared strides")
    if any(isinstance(module, RoIPool) for module in model.modules()):
        raise ExportError("RoI Pool rounds differently in ONNX (MaxRoiPool): train with RoIPooler to export")


def _stages(model: FasterRCNN) -> list[RoIHeads]:
    heads = model.roi_heads
    return [module for module in heads.modules() if isinstance(module, RoIHeads)]


class ExportableDetector(nn.Module):
    """`(B, 3, H, W)` uint8 RGB of one size -> padded detections in pixels of these images.

    A detector of other channels takes as many, one of 16-bit images uint16.

    Resizing (to the sizes of the model, pixel by pixel as `Detector` does it), padding and normalisation are inside.
    The results are `boxes (B, D, 4)` float32 xyxy, `labels (B, D)` int64 from 1 on, `scores (B, D)` float32, best
    first, `counts (B,)` int64: how many of the D are detections, and with a mask branch `masks (B, D, m, m)`:
    probabilities inside the box.

    Args:
        model: stays as it is; the copy here is on the CPU, in float32.

    Raises:
        ExportError: see `check_exportable`.
    """

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        check_exportable(model)
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        replacements: dict[type[nn.Module], dict[str, Any]] = {
            RegionProposalNetwork: {"suppress": _suppress},
            AnchorGenerator: {"forward": _lay_anchors},
            RoIPooler: {"pool": RoIPooler.pool},  # whatever quicker form a detector that is trained has
            RoIHeads: {"nms_per_class": _nms_per_class},
            MaskBranch: {"add_masks": _add_masks},
        }
        for module in self.model.modules():
            for kind, functions in replacements.items():
                if isinstance(module, kind):
                    for name, function in functions.items():
                        setattr(module, name, MethodType(function, module))
        _pad_by_constants(self.model.backbone)

    @property
    def outputs(self) -> list[str]:
        """The names of what comes out."""
        return list(OUTPUTS if self.model.has_masks else OUTPUTS[:-1])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        padded, size, original = self._resize(images)
        model = self.model
        # As `FasterRCNN.run`, but for a batch of one size.
        nothing = images.new_zeros(0)
        batch = Batch(padded, size, nothing, nothing, nothing, original)
        features = model.extract(batch)
        proposals, _ = model.rpn(features, batch, with_losses=False)
        (found,) = model.roi_heads.detect(features, proposals, size)
        found["boxes"] = resize_boxes(found["boxes"], size, original)
        return tuple(found[name] for name in self.outputs)

    def _resize(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Resized and padded images in [0, 1], and their sizes `(B, 2)` after and before."""
        transform, divisor = self.model.transform, self.model.transform.size_divisible
        old = torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in images.shape[-2:]])
        # A number divided by a tensor would be its reciprocal times the number, and lose a pixel at some sizes.
        short, long = (torch.full_like(old[0], side) for side in (transform.min_size[-1], transform.max_size))
        scale = torch.minimum(short / old.min(), long / old.max())
        half = 0.0 if transform.resizing == "torchvision" else 0.5
        new = (old * scale + half).floor().clamp(min=1).long()
        height, width = new.tolist()
        # Sides in cells of the coarsest map, so that those of all maps are known to be whole.
        rows, columns = ((new + divisor - 1) // divisor).tolist()
        for side, cells in ((height, rows), (width, columns)):
            torch._check(side >= 1)
            torch._check(cells >= 1)
            torch._check(side <= divisor * cells)
        if transform.resizing == "detectron2":  # Pillow's filter, to a level
            options: Any = {"mode": "bilinear", "align_corners": False, "antialias": True}
            levels = F.interpolate(images.float(), (height, width), **options).round()
            resized = levels / (255 if images.dtype == torch.uint8 else 65535)
        elif images.dtype == torch.uint8:
            resized = _resize_as_opencv(images, old, (height, width)).float() / 255
        else:
            levels = F.interpolate(images.float(), (height, width), mode="bilinear", align_corners=False)
            resized = levels.round() / 65535  # to whole levels, as OpenCV gives them
        padded = F.pad(resized, (0, divisor * columns - width, 0, divisor * rows - height))
        return padded, new.expand(images.shape[0], 2), old.long().expand(images.shape[0], 2)


def _resize_as_opencv(images: Tensor, old: Tensor, new: tuple[int, int]) -> Tensor:
    """uint8 `(B, 3, H, W)` as `(B, 3, *new)` int32: bilinear in the fixed point of `cv2.resize`, as data is loaded.

    Args:
        images: of one size.
        old: that size, two float64.
        new: height and width.
    """
    left, right, a0, a1 = _taps(old[1], images.shape[3], new[1])
    alone = left == right  # beyond the edge, where OpenCV rounds once along rows, but twice along columns
    a0, a1 = torch.where(alone, ONE, a0), torch.where(alone, 0, a1)
    pixels = images.int()
    across = (pixels.index_select(3, left) * a0 + pixels.index_select(3, right) * a1) // 16
    upper, lower, b0, b1 = _taps(old[0], images.shape[2], new[0])
    parts = [across.index_select(2, i) * b[:, None] // 65536 for i, b in ((upper, b0), (lower, b1))]
    return (parts[0] + parts[1] + 2) // 4


def _taps(old: Tensor, size: int, new: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each of `new` pixels along a side the two of the old ones it is made of, and their weights in 2048ths."""
    place = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    first = place.floor()
    share = place - first
    taps = [(first.long() + i).clamp(0, size - 1) for i in (0, 1)]
    return *taps, ((1 - share) * ONE).round().int(), (share * ONE).round().int()  # type: ignore[return-value]


def _lay_anchors(
    self: AnchorGenerator, shapes: Sequence[tuple[int, int]], strides: Sequence[int], *_: Any
) -> list[Tensor]:
    return [self._lay(c, s, (step, step)) for c, s, step in zip(self._cells, shapes, strides, strict=True)]


def _suppress(self: RegionProposalNetwork, boxes: Tensor, scores: Tensor, levels: Tensor, usable: Tensor) -> Tensor:
    groups = torch.arange(boxes.shape[0])[:, None] * len(self.anchor_generator.num_anchors_per_location()) + levels
    return _survivors(boxes, scores, groups, usable, self.nms_thresh)


def _survivors(boxes: Tensor, scores: Tensor, groups: Tensor, usable: Tensor, iou_thresh: float) -> Tensor:
    """Which of the usable `(B, N)` boxes `(B, N, 4)` survive NMS in their group, bool `(B, N)`."""
    chosen = usable.flatten().nonzero()[:, 0]
    parts = boxes.flatten(0, 1)[chosen], scores.flatten()[chosen], groups.flatten()[chosen]
    keep = torch.ops.detection.grouped_nms(*parts, iou_thresh)
    survives = torch.zeros_like(usable.flatten(), dtype=torch.int64).scatter(0, chosen[keep], 1)
    return survives.view(usable.shape) > 0


def _nms_per_class(self: RoIHeads, boxes: Tensor, scores: Tensor, usable: Tensor) -> list[dict[str, Tensor]]:
    """As `RoIHeads.nms_per_class`, for the whole batch in one entry, padded; `counts` says how far."""
    classes = usable.shape[2]
    groups = torch.arange(boxes.shape[0])[:, None, None] * classes + torch.arange(classes)
    boxes, scores, usable = boxes.flatten(1, 2), scores.flatten(1), usable.flatten(1)
    groups = groups.expand(-1, usable.shape[1] // classes, -1).flatten(1)
    survives = _survivors(boxes, scores, groups, usable, self.nms_thresh)
    ranked = torch.where(survives, scores, -1.0)
    best, order = ranked.topk(torch.sym_min(self.detections_per_img, ranked.shape[1]), dim=1)
    valid = best >= 0
    found = {
        "boxes": torch.where(valid[..., None], boxes.gather(1, order[..., None].expand(-1, -1, 4)), 0.0),
        "labels": torch.where(valid, order % classes + 1, 0),
        "scores": torch.where(valid, best, 0.0),
        "counts": valid.sum(dim=1),
    }
    return [found]


def _add_masks(self: Any, features: FeatureMaps, detections: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    (found,) = detections
    if self.has_masks:
        found["masks"] = self.mask_logits(features, found["boxes"], found["labels"]).sigmoid()
    return detections


def _pad_by_constants(network: nn.Module) -> None:
    """TensorFlow's padding depends on the input's size; where that is a multiple of all strides, it is constant."""
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, Conv2dSame):
                geometry: Any = (conv.kernel_size, conv.stride, 0, conv.dilation, conv.groups, conv.bias is not None)
                plain: Any = nn.Conv2d(conv.in_channels, conv.out_channels, *geometry)
                plain.weight, plain.bias = conv.weight, conv.bias
            elif getattr(conv, "pads_same", False):
                plain = conv
                plain.pads_same = False
            else:
                continue
            sides = [max((k - 1) * d + 1 - s, 0) for k, d, s in zip(conv.kernel_size, conv.dilation, conv.stride)]  # type: ignore[call-overload, arg-type]  # noqa: B905
            padding = (sides[1] // 2, sides[1] - sides[1] // 2, sides[0] // 2, sides[0] - sides[0] // 2)
            setattr(parent, name, nn.Sequential(nn.ZeroPad2d(padding), plain))


# One operator for NMS in groups, so that ONNX's, which knows classes, can stand for it without moving boxes apart.
_SCHEMA = "(Tensor boxes, Tensor scores, Tensor groups, float iou_thresh) -> Tensor"


@library.custom_op("detection::grouped_nms", mutates_args=(), schema=_SCHEMA)
def _grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
    return grouped_nms(boxes, scores, groups, iou_thresh)


@_grouped_nms.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
    return groups.new_empty(library.get_ctx().new_dynamic_size())


def trace(model: FasterRCNN) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The detector as a graph with open batch, height and width, and the names of its outputs.

    Raises:
        ExportError: see `check_exportable`.
    """
    module = ExportableDetector(model)
    kind = torch.uint16 if model.transform.image_depth == 16 else torch.uint8
    example = torch.zeros((2, model.transform.channels, 200, 304), dtype=kind)
    sides = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=(sides,), strict=False)
    return program, module.outputs


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
    table: Any = {torch.ops.detection.grouped_nms.default: translate}
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


def _onnx_nms() -> Callable[..., Any]:
    """ONNX's NonMaxSuppression with our groups as its classes."""
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ImportError('ONNX needs more packages: pip install "detection[export]"') from error

    def translate(boxes: Any, scores: Any, groups: Any, iou_thresh: float) -> Any:
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        first = op.Constant(value_ints=[0])
        # One more group, so that there is one even without boxes.
        last = op.ReduceMax(op.Concat(groups, first, axis=0), keepdims=0)
        every = op.Unsqueeze(op.Range(zero, op.Add(last, one), one), op.Constant(value_ints=[1]))
        own = op.Equal(every, op.Unsqueeze(groups, first))
        table = op.Where(own, op.Unsqueeze(scores, first), op.Constant(value_float=-1.0))
        picked = op.NonMaxSuppression(
            op.Unsqueeze(boxes, first), op.Unsqueeze(table, first), op.Constant(value_ints=[2**31]),
            op.Constant(value_floats=[iou_thresh]), op.Constant(value_floats=[-0.5]),
        )  # fmt: skip
        return op.Gather(picked, op.Constant(value_int=2), axis=1)

    return translate


def to_torch(model: FasterRCNN, path: Path, compiled: bool = False) -> None:
    """Write the detector as a `.pt2` file: of `torch.export`, or `compiled` to machine code by AOTInductor.

    Raises:
        ExportError: see `check_exportable`.
    """
    program, _ = trace(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*create_unbacked_symint")  # torchvision's call of PyTorch
        warnings.filterwarnings("ignore", "No complete tensor found")  # concerns weights on a GPU
        # torchvision's operator in the place of ours, which nobody knows without this package.
        program = program.run_decompositions({torch.ops.detection.grouped_nms.default: _nms_apart})
        if compiled:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        else:
            torch.export.save(program, path)


def _nms_apart(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
    """NMS of groups that are moved so far apart that they can't overlap; in float64, where that costs no accuracy."""
    boxes = boxes.double()
    extent = F.pad(boxes.flatten(), (0, 1)).amax() + 1
    return nms(boxes + (groups * extent)[:, None], scores.double(), iou_thresh)


def onnx_runner(path: Path) -> Run:
    """Runs an ONNX file on the CPU: `(B, C, H, W)` uint8 or uint16 -> outputs by name."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('checking needs onnxruntime: pip install "detection[export]"') from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"images": images}), strict=True))


def torch_runner(path: Path, compiled: bool, with_masks: bool) -> Run:
    """The same for a `.pt2` file."""
    names = OUTPUTS if with_masks else OUTPUTS[:-1]
    module = torch._inductor.aoti_load_package(str(path)) if compiled else torch.export.load(path).module()
    return lambda images: {
        name: value.numpy() for name, value in zip(names, module(torch.from_numpy(images)), strict=True)
    }


@dataclass(frozen=True)
class Parity:
    """How far an exported detector is from the model, over some images.

    Attributes:
        images, detections: how many were compared.
        unmatched: detections that only one of the two has.
        box: largest difference of a coordinate, in pixels.
        score: largest difference of a score.
        mask: largest difference of a probability in a mask; 0 without masks.
    """

    images: int
    detections: int
    unmatched: int
    box: float
    score: float
    mask: float

    def __str__(self) -> str:
        differences = f"{self.box:.2g} pixels, {self.score:.2g} of a score, {self.mask:.2g} in a mask"
        alone = f"{self.unmatched} in one of the two alone, the largest differences of the others {differences}"
        return f"{self.detections} detections on {self.images} image{'s' * (self.images != 1)}, {alone}"

    def as_dict(self) -> dict[str, float]:
        """For a file."""
        return asdict(self)


def compare(detector: Detector, run: Run, images: Sequence[Pixels]) -> Parity:
    """Detections as `detection predict` makes them and those of an exported file, on `(H, W, C)` images, each alone.

    A detection's partner has its label and the nearest box, less than a pixel away and not taken.

    Args:
        detector: on the CPU, in float32; it resizes as prediction does.
        run: the file.
        images: to compare on.
    """
    total = unmatched = 0
    worst = dict.fromkeys(("box", "score", "mask"), 0.0)
    for image in images:
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        theirs = {name: value[0] for name, value in run(planes[None]).items()}
        with torch.no_grad():
            found = detector.model.run(detector.batch([image]), False, True)[1][0]
        ours = {name: value.numpy() for name, value in found.items()}
        free = list(range(int(theirs["counts"])))
        total += len(ours["labels"])
        for i, (box, label) in enumerate(zip(ours["boxes"], ours["labels"], strict=True)):
            gaps = {j: float(np.abs(theirs["boxes"][j] - box).max()) for j in free if theirs["labels"][j] == label}
            j = min(gaps, key=gaps.__getitem__, default=-1)
            if j < 0 or gaps[j] >= 1:
                unmatched += 1
                continue
            free.remove(j)
            differences = {"box": gaps[j], "score": abs(float(theirs["scores"][j] - ours["scores"][i]))}
            if "masks" in ours:
                differences["mask"] = float(np.abs(theirs["masks"][j] - ours["masks"][i]).max())
            worst = {name: max(worst[name], differences.get(name, 0.0)) for name in worst}
        unmatched += len(free)
    return Parity(len(images), total, unmatched, **worst)
