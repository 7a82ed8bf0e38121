"""Our detectors against torchvision's with the same weights, on real images, stage by stage.

Every anchor and every proposal trains, so that sampling plays no part. The images' padded sides are multiples of 32 but
not of 64, where the strides that torchvision infers are wrong, so ours are told to infer them as well.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection as reference
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor as ReferencePredictor
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.rpn import RPNHead as ReferenceHead
from torchvision.ops import FrozenBatchNorm2d

from detection.anchors import AnchorGenerator, default_anchors
from detection.boxes import BoxCoder
from detection.models import zoo
from detection.models.family.keypoint_builders import keypointrcnn_resnet50_fpn
from detection.models.fast import accelerate
from detection.models.two_stage import FasterRCNN
from detection.recipes import rebuild
from tests.runs import rehearsed

Sample = tuple[list[Tensor], list[dict[str, Tensor]]]
Calibrated = Callable[[Callable[[], nn.Module]], nn.Module]

EVERYTHING = 10**6
NUM_CLASSES = 11
OPTIONS: dict[str, Any] = {
    "num_classes": NUM_CLASSES,
    "rpn_pre_nms_top_n_train": 150,
    "rpn_pre_nms_top_n_test": 150,
    "rpn_post_nms_top_n_train": 60,
    "rpn_post_nms_top_n_test": 60,
    "rpn_batch_size_per_image": EVERYTHING,
    "box_batch_size_per_image": EVERYTHING,
}
SMALL = {"min_size": 160, "max_size": 224}


@dataclass
class Trace:
    """What a detector computes on the way: for each level or each image a tensor."""

    features: list[Tensor]
    objectness: list[Tensor]
    deltas: list[Tensor]
    anchors: Tensor
    proposals: list[Tensor]
    detections: list[dict[str, Tensor]]
    losses: dict[str, Tensor]


@torch.no_grad()
def trace(model: nn.Module, sample: Sample) -> Trace:
    """Run one of either project's detectors; statistics of normalisation stay fixed for the losses too."""
    seen: dict[str, list[Any]] = defaultdict(list)  # ours looks at one image after the other
    rpn = model.rpn
    parts = {"features": model.backbone, "head": rpn.head, "anchors": rpn.anchor_generator, "proposals": rpn}
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen[name].append(output))
        for name, module in parts.items()
    ]
    detections = model.eval()(sample[0])
    for handle in handles:
        handle.remove()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    losses = model(*sample)
    objectness, deltas = (
        [torch.cat(level) for level in zip(*maps, strict=True)] for maps in zip(*seen["head"], strict=True)
    )
    proposals, anchors = seen["proposals"][0][0], seen["anchors"][0]
    objectness = [by_anchor(level, 1)[..., 0] for level in objectness]
    deltas = [by_anchor(level, 4) for level in deltas]
    if isinstance(model, FasterRCNN):
        found = [p for p, _ in seen["proposals"]]
        proposals = [boxes[valid] for p in found for boxes, valid in zip(p.boxes, p.valid, strict=True)]
        anchors = [torch.cat(anchors)]
    features = [torch.cat(level) for level in zip(*(maps.values() for maps in seen["features"]), strict=True)]
    return Trace(features, objectness, deltas, anchors[0], proposals, detections, losses)


def by_anchor(output: Tensor, values: int) -> Tensor:
    """`(B, K * values, h, w)` -> `(B, h * w * K, values)`."""
    return output.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def assert_same(ours: Trace, theirs: Trace) -> None:
    """Raise an AssertionError that says which stage differs."""
    for stage in ("features", "objectness", "deltas"):
        for level, (a, b) in enumerate(zip(getattr(ours, stage), getattr(theirs, stage), strict=True)):
            difference = float((a - b).abs().max() / b.abs().max())
            assert difference <= 2e-5, f"{stage} of level {level} differ by {difference:.1e} of their largest"
    assert torch.equal(ours.anchors, theirs.anchors), "anchors differ"
    for image, (a, b) in enumerate(zip(ours.proposals, theirs.proposals, strict=True)):
        assert one_to_one((a[:, None] - b).abs().amax(dim=-1) <= 1e-3), f"proposals of image {image} differ"
    assert_same_detections(ours.detections, theirs.detections)
    for name, value in theirs.losses.items():
        difference = float((ours.losses[name] / value - 1).abs())
        assert difference <= 1e-5, f"{name} differs by {difference:.1e}"


def assert_same_detections(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    for image, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert len(a["scores"]) == len(b["scores"]), f"image {image}: another number of detections"
        difference = float((a["scores"] - b["scores"]).abs().max())
        assert difference <= 1e-5, f"ranked scores of image {image} differ by {difference:.1e}"
        # Whoever has the same label, box and score; detections with equal scores may have swapped places.
        same = (a["labels"][:, None] == b["labels"]) & ((a["scores"][:, None] - b["scores"]).abs() <= 1e-5)
        same &= (a["boxes"][:, None] - b["boxes"]).abs().amax(dim=-1) <= 1e-3
        assert one_to_one(same), f"detections of image {image} differ"
        if "masks" in b:
            difference = float((a["masks"] - b["masks"][same.float().argmax(dim=1)]).abs().max())
            assert difference <= 1e-4, f"masks of image {image} differ by {difference:.1e}"
        if "keypoints" in b:
            partner = same.float().argmax(dim=1)
            for name, limit in (("keypoints", 1e-3), ("keypoints_scores", 1e-4)):
                difference = float((a[name] - b[name][partner]).abs().max())
                assert difference <= limit, f"{name} of image {image} differ by {difference:.1e}"


def one_to_one(same: Tensor) -> bool:
    """Whether each row has its own column: so many and so exact that chance can't pair them otherwise."""
    return same.shape[0] == same.shape[1] and bool(same.any(dim=0).all() and same.any(dim=1).all())


def tv_resnet(
    name: str, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, layers: int = 5, **options: Any
) -> nn.Module:
    """torchvision's detector on a ResNet that it has no builder for."""
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm, trainable_layers=layers)
    return reference.FasterRCNN(backbone, **options)


UNTRAINED = {"weights": None, "weights_backbone": None}
TWINS: dict[str, tuple[Callable[..., nn.Module], Callable[..., FasterRCNN], int, dict[str, int]]] = {
    "resnet50": (partial(reference.fasterrcnn_resnet50_fpn, **UNTRAINED), zoo.fasterrcnn_resnet50_fpn, 5, SMALL),
    "resnet50_v2": (
        partial(reference.fasterrcnn_resnet50_fpn_v2, **UNTRAINED),
        zoo.fasterrcnn_resnet50_fpn_v2,
        5,
        SMALL,
    ),
    "resnet101": (partial(tv_resnet, "resnet101"), zoo.fasterrcnn_resnet101_fpn, 5, SMALL),
    "mobilenet_320": (  # at its own size
        partial(reference.fasterrcnn_mobilenet_v3_large_320_fpn, **UNTRAINED),
        zoo.fasterrcnn_mobilenet_v3_large_320_fpn,
        3,
        {},
    ),
    "mask_resnet50": (partial(reference.maskrcnn_resnet50_fpn, **UNTRAINED), zoo.maskrcnn_resnet50_fpn, 5, SMALL),
    "mask_resnet50_v2": (
        partial(reference.maskrcnn_resnet50_fpn_v2, **UNTRAINED),
        zoo.maskrcnn_resnet50_fpn_v2,
        5,
        SMALL,
    ),
    "keypoint_resnet50": (
        partial(reference.keypointrcnn_resnet50_fpn, **UNTRAINED),
        keypointrcnn_resnet50_fpn,
        5,
        SMALL,
    ),
}


# What users have: as built, as trained on a CPU or an accelerator (run on the CPU here), and made ready for inference.
FORMS: dict[str, Callable[[FasterRCNN], FasterRCNN]] = {
    "plain": lambda model: model,
    "accelerated for a CPU": lambda model: accelerate(deepcopy(model), "cpu"),
    "accelerated for an accelerator": lambda model: accelerate(deepcopy(model), "cuda"),
    "for inference": lambda model: model.for_inference(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", rehearsed(TWINS, "resnet50", "mobilenet_320", "mask_resnet50"))
def test_twins_agree(name: str, calibrated: Calibrated, real_samples: Sample) -> None:
    build_theirs, build_ours, levels, size = TWINS[name]
    theirs = calibrated(partial(build_theirs, **OPTIONS, **size))
    ours = build_ours(rpn_anchor_generator=default_anchors(levels, infer_strides=True), **OPTIONS, **size)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = trace(theirs, real_samples)
    assert_worth_comparing(expected)
    for form in FORMS.values():
        assert_same(trace(form(ours), real_samples), expected)
    with torch.inference_mode():
        assert_same_detections(ours.for_inference()(real_samples[0]), expected.detections)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def assert_worth_comparing(found: Trace) -> None:
    """Weights and images that give few or equal results would let anything pass."""
    for detections in found.detections:
        assert len(detections["scores"]) >= 50 and len(detections["labels"].unique()) >= 5
        assert detections["scores"].max() > 0.2 and detections["scores"].std() > 0.02
    assert all(float(loss) > 1e-3 for loss in found.losses.values())


@pytest.fixture(scope="module")
def frozen_twins(calibrated: Calibrated) -> tuple[FasterRCNN, nn.Module]:
    """A small detector whose normalisation is frozen, as with pretrained weights, and torchvision's."""
    options = {**OPTIONS, **SMALL}
    live = calibrated(partial(tv_resnet, "resnet18", **options))
    theirs = tv_resnet("resnet18", FrozenBatchNorm2d, 3, **options)
    theirs.load_state_dict(live.state_dict())
    ours = zoo.fasterrcnn_resnet_fpn(
        norm="frozen", rpn_anchor_generator=default_anchors(5, infer_strides=True), **options
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, name
    return ours, theirs


@pytest.fixture(scope="module")
def frozen_twin(frozen_twins: tuple[FasterRCNN, nn.Module], real_samples: Sample) -> tuple[FasterRCNN, Trace]:
    """Ours of the two, and torchvision's trace."""
    ours, theirs = frozen_twins
    found = trace(theirs, real_samples)
    assert_worth_comparing(found)
    return ours, found


@pytest.mark.parametrize("form", FORMS)
def test_frozen_twins_agree(form: str, frozen_twin: tuple[FasterRCNN, Trace], real_samples: Sample) -> None:
    ours, expected = frozen_twin
    assert_same(trace(FORMS[form](ours), real_samples), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", ["losses", "scores", "boxes"])
def test_gradients_reach_the_images(
    of: str, form: str, frozen_twins: tuple[FasterRCNN, nn.Module], real_samples: Sample
) -> None:
    """As adversarial examples and saliency maps need them; images of different sizes, so that one is padded."""
    ours, theirs = frozen_twins
    ours = FORMS[form](ours)
    found, expected = (image_gradients(model, of, real_samples) for model in (ours, theirs))
    for image, (a, b) in enumerate(zip(found, expected, strict=True)):
        differs = (a - b).abs() > 1e-3 * b.square().mean().sqrt()
        # Of cells that are equal but for rounding the stem's maximum takes either, and whose is the gradient: a few.
        share = float(differs.float().mean())
        assert share <= 0.05, f"the gradient of image {image} differs in {share:.1%} of its values"


def image_gradients(model: nn.Module, of: str, sample: Sample) -> list[Tensor]:
    """The gradient `(3, h, w)` of each image, of the sum of losses, or of the squares of a part of the detections.

    The photographs get noise, as one has columns of a single colour, where cells of the stem are equal.
    """
    generator = torch.Generator().manual_seed(0)
    images = [(image + torch.rand(image.shape, generator=generator)) / 2 for image in sample[0]]
    images = [image.requires_grad_() for image in images]
    if of == "losses":
        total = sum(model.train()(images, sample[1]).values())
    else:
        total = sum(found[of].square().sum() for found in model.eval()(images))
    return list(torch.autograd.grad(total, images))


TV = "torchvision.models.detection"
# Given as objects, and as factories, which the builder calls with channels and numbers of anchors or classes. The
# reference's box head wants the length of the flattened features, which no builder knows.
OBJECTS = (ReferenceHead(256, 3), TwoMLPHead(256 * 7**2, 1024), ReferencePredictor(1024, NUM_CLASSES))
FACTORIES = (
    partial(ReferenceHead, conv_depth=1),
    {"class_path": f"{TV}.faster_rcnn.TwoMLPHead", "init_args": {"in_channels": 12544, "representation_size": 1024}},
    ReferencePredictor,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [OBJECTS, FACTORIES], ids=["objects", "factories"])
def test_parts_of_torchvision_are_parts(
    form: str, parts: tuple[Any, ...], frozen_twin: tuple[FasterRCNN, Trace], real_samples: Sample
) -> None:
    ours, expected = frozen_twin
    names = ("rpn_head", "box_head", "box_predictor")
    given = {name: rebuild(part) if isinstance(part, dict) else part for name, part in zip(names, parts, strict=True)}
    model = zoo.fasterrcnn_resnet_fpn(norm="frozen", rpn_anchor_generator=anchors(), **given, **OPTIONS, **SMALL)
    kinds = (ReferenceHead, TwoMLPHead, ReferencePredictor)
    own = (model.rpn.head, model.roi_heads.box_head, model.roi_heads.box_predictor)
    assert tuple(map(type, own)) == kinds
    model.load_state_dict(ours.state_dict(), strict=True)
    assert_same(trace(FORMS[form](model), real_samples), expected)
    if parts is FACTORIES:
        again = rebuild(json.loads(json.dumps(model.recipe)))
        assert (type(again.rpn.head), type(again.roi_heads.box_head), type(again.roi_heads.box_predictor)) == kinds
        again.load_state_dict(model.state_dict(), strict=True)


def anchors(**options: Any) -> AnchorGenerator:
    return default_anchors(5, **{"infer_strides": True, **options})


# One constant at a time: where it is, what it becomes, and the stage that has to notice.
CHANGES: dict[str, tuple[str, str, Any, str]] = {
    "epsilon of frozen normalisation": ("", "eps", 0.0, "features"),
    "image mean": ("transform", "mean", torch.tensor([0.485, 0.456, 0.407]).view(1, 3, 1, 1), "features"),
    "longer side": ("transform", "max_size", 223, "features"),
    "anchor size": ("rpn", "anchor_generator", AnchorGenerator([[33], [64], [128], [256], [512]]), "anchors"),
    "anchor rounding": ("rpn", "anchor_generator", anchors(round_anchors=False), "anchors"),
    "anchor offset": ("rpn", "anchor_generator", anchors(offset=0.5), "anchors"),
    "declared strides": ("rpn", "anchor_generator", anchors(infer_strides=False), "anchors"),
    "weights of the proposals' deltas": ("rpn", "box_coder", BoxCoder((1, 1, 1, 1.01)), "proposals"),
    "NMS threshold of the proposals": ("rpn", "nms_thresh", 0.65, "proposals"),
    "candidates of a level": ("rpn", "pre_nms_top_n", {"training": 150, "testing": 20}, "proposals"),
    "number of proposals": ("rpn", "post_nms_top_n", {"training": 60, "testing": 59}, "proposals"),
    "samples of a bin": ("roi_heads.box_roi_pool", "sampling_ratio", 1, "scores"),
    "pooling with half a pixel's shift": ("roi_heads.box_roi_pool", "aligned", True, "scores"),
    "pooled levels": ("roi_heads.box_roi_pool", "num_levels", 1, "scores"),
    "weights of the detections' deltas": ("roi_heads", "box_coder", BoxCoder((10, 10, 5, 5.01)), "detections"),
    "NMS threshold of the detections": ("roi_heads", "nms_thresh", 0.45, "scores|number"),
    "least score of a detection": ("roi_heads", "score_thresh", 0.2, "scores|number"),
    "number of detections": ("roi_heads", "detections_per_img", 99, "number"),
    "low-quality matches": ("rpn.matcher", "allow_low_quality_matches", False, "loss_objectness"),
    "foreground IoU of anchors": ("rpn.matcher", "fg_iou_thresh", 0.6, "loss_objectness"),
    "background IoU of anchors": ("rpn.matcher", "bg_iou_thresh", 0.25, "loss_objectness"),
    "sample of anchors": ("rpn.sampler", "batch_size_per_image", 4096, "loss_objectness"),
    "beta of the proposals": ("rpn.box_loss", "beta", 1 / 8, "loss_rpn_box_reg"),
    "foreground IoU of proposals": ("roi_heads.matcher", "fg_iou_thresh", 0.7, "loss_classifier"),
    "sample of proposals": ("roi_heads.sampler", "batch_size_per_image", 50, "loss_classifier"),
    "beta of the detections": ("roi_heads.box_loss", "beta", 1 / 8, "loss_box_reg"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_comparison_notices_one_changed_constant(
    change: str, frozen_twin: tuple[FasterRCNN, Trace], real_samples: Sample
) -> None:
    ours, expected = frozen_twin
    path, attribute, value, stage = CHANGES[change]
    parts: list[Any] = [attrgetter(path)(ours)] if path else [m for m in ours.modules() if hasattr(m, attribute)]
    before = [getattr(part, attribute) for part in parts]
    try:
        for part in parts:
            setattr(part, attribute, value)
        changed = trace(ours, real_samples)
    finally:
        for part, old in zip(parts, before, strict=True):
            setattr(part, attribute, old)
    with pytest.raises(AssertionError, match=stage):
        assert_same(changed, expected)
