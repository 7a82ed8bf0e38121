"""Detectors as graphs, from uint8 pixels to boxes, without this package at the other end.

The exported graph is the detector's own parts. On a copy of it, those few steps are replaced that loop over images or
count values in Python, by others with the same results: NMS, the choice of the best, the pooling. A method that a
subclass of the user's has instead stays.
A graph pools each region from its own level alone, and leaves out the padding: ONNX Runtime's RoiAlign costs the same
for a region of a single cell as for any other.

Shape shorthand:
    B: images     H, W: their height and width     P: proposals     C: classes without background
    D: most detections of an image     m: side of a mask (28)
    R: regions of all images     V: those of them that are no padding     o: side of pooled features
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, library, nn
from torch.nn import functional as F

from detection.batch import Batch
from detection.boxes import grouped_nms, nms_apart, resize_boxes
from detection.models.family.keypoints import KeypointRoIHeads
from detection.models.masks import MaskBranch
from detection.models.pooling import RoIPool, RoIPooler, align, finest, level_indices
from detection.models.precomputed import PrecomputedProposals
from detection.models.roi_heads import RoIHeads
from detection.models.rpn import RegionProposalNetwork
from detection.models.two_stage import FasterRCNN
from detection.parts import FeatureMaps
from detection.resizing import averaged, resize_as_opencv

OUTPUTS = ("boxes", "labels", "scores", "counts")
HEATMAPS = ("heatmaps", "regions")  # of key points


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
    if any(getattr(part, "nms", grouped_nms) not in (grouped_nms, nms_apart) for part in (model.rpn, *_stages(model))):
        raise ExportError("nms of the detector is a function of your own, which no graph has: take ours to export")
    if getattr(getattr(model.rpn, "anchor_generator", None), "infer_strides", False):
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
    probabilities inside the box. Of key points come out `heatmaps (B, D, k, m, m)`, logits inside the box, and `regions
    (B, D, 4)`, the boxes in pixels of the resized image: each heatmap is to be enlarged to the size of its own region,
    which a graph of fixed sizes can't do, see `parity.locate_in_regions`.

    Args:
        model: stays as it is; the copy here is on the CPU, in float32.

    Raises:
        ExportError: see `check_exportable`.
    """

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        check_exportable(model)
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        for module in self.model.modules():
            for kind, functions in self.replacements().items():
                for name, function in functions.items() if isinstance(module, kind) else ():
                    if _is_ours(module, name, kind):
                        setattr(module, name, MethodType(function, module))
        _pad_by_constants(self.model.backbone)

    def replacements(self) -> dict[type[nn.Module], dict[str, Any]]:
        """Methods of parts, by name, and what stands in their place."""
        return {
            RegionProposalNetwork: {"best": _best, "suppress": _suppress, "nms_of_groups": _nms_of_groups},
            RoIPooler: {"pool": _pool},
            RoIHeads: {"nms_per_class": _nms_per_class, "predict": _predict, "nms_of_groups": _nms_of_groups},
            MaskBranch: {"add_masks": _add_masks},
            KeypointRoIHeads: {"add_keypoints": _add_heatmaps},
            nn.Hardtanh: {"forward": _clamp},
        }

    @property
    def outputs(self) -> list[str]:
        """The names of what comes out."""
        return outputs_of(self.model)

    @staticmethod
    def divide(numbers: Tensor, divisor: int) -> Tensor:
        """Whole numbers, none below 0, by another, rounded down."""
        divided: Tensor = torch.ops.detection.divide(numbers, divisor)
        return divided

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(count := images.shape[0], int):
            # Where PyTorch 2.11 knows the batch, it asks how large maps are, to choose the layout of convolutions.
            images = images.narrow(0, 0, _counted(torch.scalar_tensor(count, dtype=torch.int64), count))
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

    def sizes(self, images: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        """The images' size `(2,)` float64, what it becomes, and that in cells of the coarsest map."""
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
        return old, (height, width), (rows, columns)

    def _resize(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Resized and padded images in [0, 1], and their sizes `(B, 2)` after and before."""
        old, (height, width), (rows, columns) = self.sizes(images)
        divisor = self.model.transform.size_divisible
        if self.model.transform.resizing == "detectron2":
            levels = averaged(images.float(), (height, width))
            resized = levels / (255 if images.dtype == torch.uint8 else 65535)
        elif images.dtype == torch.uint8:
            resized = resize_as_opencv(images, old, (height, width), self.divide).float() / 255
        else:
            levels = F.interpolate(images.float(), (height, width), mode="bilinear", align_corners=False)
            resized = levels.round() / 65535  # to whole levels, as OpenCV gives them
        padded = F.pad(resized, (0, divisor * columns - width, 0, divisor * rows - height))
        new = torch.stack([torch.scalar_tensor(side, dtype=torch.int64) for side in (height, width)])
        return padded, new.expand(images.shape[0], 2), old.long().expand(images.shape[0], 2)


def _is_ours(module: nn.Module, name: str, kind: type[nn.Module]) -> bool:
    """Whether a method is our part's or its quick form's, rather than that of a user's subclass, which stays."""
    home = next((base for base in type(module).__mro__ if name in vars(base)), kind)
    return home is kind or home.__module__.startswith("detection.")


def _counted(number: Tensor, *most: Any) -> Any:
    """A number from 1 to each of `most` that the graph counts: a symbol of its own in all shapes behind it."""
    counted: Any = number.item()
    torch._check(counted >= 1)
    for limit in most:
        torch._check(counted <= limit)
    return counted


def _predict(self: RoIHeads, features: FeatureMaps, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """As `RoIHeads.predict`, but the head sees no padding; logits and deltas of that are 0."""
    pooler = self.box_roi_pool
    if not isinstance(pooler, RoIPooler) or not _is_ours(pooler, "pool", RoIPooler):
        return RoIHeads.predict(self, features, boxes)
    maps, strides = finest(features, pooler.num_levels)
    regions = boxes.float().nan_to_num(0.0, 0.0, 0.0)
    rows, pooled = _pool_rows(pooler, maps, strides, regions, level_indices(regions, strides))
    logits, deltas = (_in_place(x, rows, boxes) for x in self.box_predictor(self.box_head(pooled)))
    return logits, deltas.unflatten(-1, (-1, 4))


def _pool(self: RoIPooler, maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, levels: Tensor) -> Tensor:
    """As `RoIPooler.pool`, with 0 for padding."""
    rows, pooled = _pool_rows(self, maps, strides, boxes, levels)
    return _in_place(pooled, rows, boxes).flatten(0, 1)


def _pool_rows(
    self: RoIPooler, maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the regions `(B, P, 4)` have an area, `(V,)` into R and level by level, and their features."""
    image = torch.arange(boxes.shape[0], dtype=boxes.dtype)[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat((image, boxes), dim=2).flatten(0, 1)
    exists = ((boxes[..., 2:] - boxes[..., :2]) > 0).all(dim=2).flatten()
    own = [(exists & (levels.flatten() == i)).nonzero()[:, 0] for i in range(len(maps))]
    chosen = [rois.index_select(0, rows).view(-1, 5) for rows in own]  # OpenVINO has to know that these are five
    pooled = [
        align(feature.float(), regions, self.output_size, 1 / stride, self.sampling_ratio, self.aligned)
        for feature, regions, stride in zip(maps, chosen, strides, strict=True)
    ]
    return torch.cat(own), torch.cat(pooled)


def _in_place(found: Tensor, rows: Tensor, boxes: Tensor) -> Tensor:
    """What was found for the regions `rows` `(V,)` as `(B, P, ...)`, 0 for the others."""
    every = found.new_zeros((boxes.shape[0] * boxes.shape[1], *found.shape[1:]))
    return every.index_copy(0, rows, found).unflatten(0, boxes.shape[:2])


def _best(_: Any, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `RegionProposalNetwork.best`. How many there are is a number that the graph counts, where sides are open.

    As an expression of the sides it would be part of all shapes behind it, which PyTorch then simplifies for minutes.
    """
    there: int = scores.shape[1]
    if isinstance(there, int):
        return scores.topk(min(count, there), dim=1)
    least = torch.minimum(torch.scalar_tensor(there, dtype=torch.int64), torch.tensor(count))
    return scores.topk(_counted(least, count, there), dim=1)


def _suppress(self: RegionProposalNetwork, boxes: Tensor, scores: Tensor, levels: Tensor, usable: Tensor) -> Tensor:
    groups = torch.arange(boxes.shape[0])[:, None] * len(self.anchor_generator.num_anchors_per_location()) + levels
    return _survivors(self, boxes, scores, groups, usable)


def _survivors(part: Any, boxes: Tensor, scores: Tensor, groups: Tensor, usable: Tensor) -> Tensor:
    """Which of the usable `(B, N)` boxes `(B, N, 4)` survive NMS in their group, bool `(B, N)`."""
    chosen = usable.flatten().nonzero()[:, 0]
    parts = boxes.flatten(0, 1)[chosen], scores.flatten()[chosen], groups.flatten()[chosen]
    keep = part.nms_of_groups(*parts, part.nms_thresh)
    survives = torch.zeros_like(usable.flatten(), dtype=torch.int64).scatter(0, chosen[keep], 1)
    return survives.view(usable.shape) > 0


def _nms_per_class(self: RoIHeads, boxes: Tensor, scores: Tensor, usable: Tensor) -> list[dict[str, Tensor]]:
    classes = usable.shape[2]
    groups = torch.arange(boxes.shape[0])[:, None, None] * classes + torch.arange(classes)
    groups = groups.expand(-1, usable.shape[1], -1).flatten(1)
    flat = boxes.flatten(1, 2), scores.flatten(1), groups, usable.flatten(1)
    return rank(boxes, scores, _survivors(self, *flat).view(usable.shape), self.detections_per_img)


def rank(boxes: Tensor, scores: Tensor, survives: Tensor, count: int) -> list[dict[str, Tensor]]:
    """The best `count` of what survived NMS, for the whole batch in one entry, padded; `counts` says how far.

    Args:
        boxes: `(B, P, C, 4)`.
        scores: `(B, P, C)`.
        survives: likewise, bool.
        count: most detections of an image.
    """
    classes = scores.shape[2]
    boxes, scores = boxes.flatten(1, 2), scores.flatten(1)
    ranked = torch.where(survives.flatten(1), scores, -1.0)
    best, order = _best(None, ranked, count)
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
        found["masks"] = self.mask_probabilities(features, found["boxes"], found["labels"])
    return detections


def _add_heatmaps(
    self: KeypointRoIHeads, features: FeatureMaps, detections: list[dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    (found,) = detections
    return [found | {"heatmaps": self.heatmaps(features, found["boxes"]), "regions": found["boxes"]}]


def outputs_of(model: FasterRCNN) -> list[str]:
    """The names of what a graph of the detector gives, in their order."""
    return [*OUTPUTS, *(("masks",) if model.has_masks else ()), *(HEATMAPS if model.has_keypoints else ())]


def _clamp(self: nn.Hardtanh, x: Tensor) -> Tensor:
    if type(self).forward is not nn.Hardtanh.forward:
        return type(self).forward(self, x)
    return x.clamp(self.min_val, self.max_val)  # the same, and much quicker to trace


def _pad_by_constants(network: nn.Module) -> None:
    """TensorFlow's padding depends on the input's size; where that is a multiple of all strides, it is constant."""
    for parent in list(network.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, conv in children:
            if isinstance(conv, Conv2dSame):
                geometry: Any = (conv.kernel_size, conv.stride, 0, conv.dilation, conv.groups, conv.bias is not None)
                plain: Any = nn.Conv2d(conv.in_channels, conv.out_channels, *geometry)
                plain.weight, plain.bias = conv.weight, conv.bias
            elif getattr(conv, "pads_same", False):
                plain = conv
                plain.pads_same = False
            else:
                continue
            steps = zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
            sides = [max((k - 1) * d + 1 - s, 0) for k, d, s in steps]
            padding = (sides[1] // 2, sides[1] - sides[1] // 2, sides[0] // 2, sides[0] - sides[0] // 2)
            setattr(parent, name, nn.Sequential(nn.ZeroPad2d(padding), plain))


def _nms_of_groups(_: nn.Module, boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
    kept: Tensor = torch.ops.detection.grouped_nms(boxes, scores, groups, iou_thresh)
    return kept


# One operator for NMS in groups, so that ONNX's, which knows classes, can stand for it without moving boxes apart.
_SCHEMA = "(Tensor boxes, Tensor scores, Tensor groups, float iou_thresh) -> Tensor"


@library.custom_op("detection::grouped_nms", mutates_args=(), schema=_SCHEMA)
def _grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
    return grouped_nms(boxes, scores, groups, iou_thresh)


@_grouped_nms.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
    return groups.new_empty(library.get_ctx().new_dynamic_size())


# One operator for this too: PyTorch's division of whole numbers is five of ONNX, as those may be below 0.
@library.custom_op("detection::divide", mutates_args=(), schema="(Tensor numbers, int divisor) -> Tensor")
def _divide(numbers: Tensor, divisor: int) -> Tensor:
    return numbers // divisor


@_divide.register_fake
def _(numbers: Tensor, divisor: int) -> Tensor:
    return torch.empty_like(numbers)


def trace(
    model: FasterRCNN, form: type[ExportableDetector] = ExportableDetector
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The detector as a graph with open batch, height and width, and the names of its outputs.

    Args:
        model: stays as it is.
        form: with the operators that the graph shall have.

    Raises:
        ExportError: see `check_exportable`.
    """
    module = form(model)
    kind = torch.uint16 if model.transform.image_depth == 16 else torch.uint8
    example = torch.zeros((2, model.transform.channels, 200, 304), dtype=kind)
    sides = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=(sides,), strict=False)
    return program, module.outputs
