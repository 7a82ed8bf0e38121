"""Quick forms of the plain parts in `detection.models`: the same results in less time.

The plain form defines what a part does, and the tests compare the quick one with it. Which of them run is chosen here
and nowhere else: by `accelerate` for training, by `for_inference` for detection. Without either the plain ones run.
A quick form takes the place of exactly one plain class, so that a part of your own, or a subclass, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from detection.boxes import grouped_nms, nms_apart
from detection.fitting import trial
from detection.models.cascade import CascadeRoIHeads
from detection.models.family.keypoints import KeypointRoIHeads
from detection.models.fast.convolution import QuickConv2d
from detection.models.fast.fast_pooling import CanvasPooler, GatherPool, GatherPooler
from detection.models.fast.folding import OnePassNorm, OnePassNormAct, fold_for_good, fold_frozen_norms
from detection.models.fast.linear import OneDNNLinear
from detection.models.fast.on_cpu import FewAtOnce, TrimmedCascade, TrimmedKeypoints, TrimmedRoIHeads
from detection.models.fast.packing import pack
from detection.models.fast.sparse_rpn import SparseRPN
from detection.models.norms import freeze_norms
from detection.models.pooling import RoIPool, RoIPooler
from detection.models.roi_heads import RoIHeads
from detection.models.rpn import RegionProposalNetwork, RPNHead
from detection.models.two_stage import TwoStageDetector
from detection.parts import FeatureMaps

Forms = Mapping[Any, Any]  # a plain class or function, and the quick one
NORMS: Forms = {FrozenBatchNorm2d: OnePassNorm, FrozenBatchNormAct2d: OnePassNormAct}  # those that can't be folded
ON_CPU: Forms = {
    RoIPooler: GatherPooler,
    RegionProposalNetwork: SparseRPN,
    RoIHeads: TrimmedRoIHeads,
    CascadeRoIHeads: TrimmedCascade,
    KeypointRoIHeads: TrimmedKeypoints,
    nn.Conv2d: QuickConv2d,
    nn.Linear: OneDNNLinear,
    **NORMS,
}
ON_ACCELERATOR: Forms = {RoIPooler: CanvasPooler, RegionProposalNetwork: SparseRPN, grouped_nms: nms_apart, **NORMS}
# Where PyTorch is to be deterministic: the gradients of RoI Align and RoI Pool as sums in a fixed order.
REPEATABLE: Forms = {RoIPooler: GatherPooler, RoIPool: GatherPool}


def forms_for(device: torch.device | str) -> Forms:
    """What takes the place of what on a device.

    Whether PyTorch is to be deterministic counts at this moment (`torch.use_deterministic_algorithms`, which
    `trainer.deterministic` sets).
    """
    if torch.device(device).type == "cpu":  # deterministic as it is
        return ON_CPU
    return {**ON_ACCELERATOR, **REPEATABLE} if torch.are_deterministic_algorithms_enabled() else ON_ACCELERATOR


def accelerate(detector: TwoStageDetector, device: torch.device | str, forms: Forms | None = None) -> TwoStageDetector:
    """Replace plain parts of a detector by the quick forms for a device, and fold its frozen normalisation.

    Parameters and buffers, and their names, stay the same. Doing it again changes nothing.

    Args:
        detector: changed in place.
        device: where it will run.
        forms: in the place of `forms_for(device)`, for a measurement of each.
    """
    _fold(detector)
    exchange(detector, forms_for(device) if forms is None else forms)
    return detector


def exchange(detector: nn.Module, forms: Forms) -> None:
    """Replace plain parts, and their NMS, in place."""
    made: dict[int, nn.Module] = {}  # a part that several others hold stays one object
    for parent in list(detector.modules()):
        for name, child in list(parent.named_children()):
            kind = forms.get(type(child))
            if kind is not None and (kind is not SparseRPN or type(child.head) is RPNHead):
                setattr(parent, name, made.setdefault(id(child), _as(child, kind)))
    for part in detector.modules():
        if isinstance(part, RegionProposalNetwork | RoIHeads):
            part.nms = forms.get(part.nms, part.nms)


def for_inference(detector: TwoStageDetector, device: torch.device | str | None = None) -> TwoStageDetector:
    """A copy in evaluation mode that can no longer be trained: faster, with the same detections.

    The backbone's normalisation is folded into its convolutions. On a CPU, the first call in each precision casts the
    weights and orders them for the kernels, and large images of a batch are detected in one after the other.
    """
    copied = deepcopy(detector).eval().requires_grad_(False)
    if device is not None:
        copied.to(device)
    device = next((p.device for p in copied.parameters()), torch.device("cpu"))
    copied.backbone = freeze_norms(copied.backbone)  # in evaluation live statistics are constant, so they fold too
    accelerate(copied, device)
    fold_for_good(copied)
    if device.type != "cpu":
        return copied
    pack(copied)
    return _as(copied, FewAtOnce) if type(copied) is TwoStageDetector else copied


def _as(part: Any, kind: Any) -> Any:
    """The part as an object of another class, with the same parameters and settings."""
    twin = kind.__new__(kind)
    twin.__dict__ = dict(part.__dict__)
    return twin


def _fold(detector: TwoStageDetector) -> None:
    """Fold frozen normalisation in the backbone and in box heads, such as the fourth stage of a ResNet."""
    parameter = next(detector.parameters(), torch.empty(()))
    image = parameter.new_zeros((1, detector.transform.channels, 64, 64))
    fold_frozen_norms(detector.backbone, image)
    with trial(detector.backbone):
        maps = tuple(detector.backbone(image).values())
    boxes = image.new_tensor([[[0.0, 0.0, 32.0, 32.0]]])
    for heads in [module for module in detector.modules() if isinstance(module, RoIHeads)]:
        with torch.no_grad():
            pooled = heads.box_roi_pool(FeatureMaps(maps, detector.strides), boxes)
        fold_frozen_norms(heads.box_head, pooled)
