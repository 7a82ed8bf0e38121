"""Parts that do not fit are refused when the detector is built, and building it leaves no trace."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detection.anchors import AnchorGenerator
from detection.fitting import PartError
from detection.losses import ClassWeights
from detection.matching import Matcher
from detection.models.compose import cascade_rcnn, faster_rcnn, mask_rcnn
from detection.models.roi_heads import FastRCNNPredictor, TwoFCHead
from detection.parts import FeatureMaps, Proposals


class Net(nn.Module):
    """Two maps; as the arguments say, not what a backbone should give."""

    def __init__(
        self, widths: Sequence[int] = (16, 16), steps: Sequence[int] = (8, 16), declares: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, width, 3, step, 1), nn.BatchNorm2d(width), nn.Dropout())
            for width, step in zip(widths, steps, strict=True)
        )
        if declares is not None:
            self.strides, self.out_channels = tuple(declares), widths[0]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(i): stage(images) for i, stage in enumerate(self.stages)}


class Head(nn.Module):
    """An RPN head whose maps `change` has its way with."""

    def __init__(self, in_channels: int, num_anchors: int, change: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.change, self.k = nn.Conv2d(in_channels, 5 * num_anchors, 1), change, num_anchors

    def forward(self, maps: list[Tensor]) -> Any:
        found = [self.layer(x).split([self.k, 4 * self.k], 1) for x in maps]
        return self.change([x for x, _ in found], [x for _, x in found])


class OneMoreMask(nn.Module):
    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(in_channels, num_classes + 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features)


class Predictor(nn.Module):
    """Right, but nobody can know its classes."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(in_channels, num_classes), nn.Linear(in_channels, 4 * num_classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(features), self.boxes(features)


class TooFewDeltas(Predictor):
    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.num_classes = num_classes

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(features), self.boxes(features)[:, 4:]


class Proposing(nn.Module):
    """Gives what it was made with."""

    def __init__(self, in_channels: int, strides: Sequence[int], gives: Any) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, features: FeatureMaps, batch: Any, with_losses: bool) -> Any:
        return self.gives


class Heads(nn.Module):
    """RoI heads that find nothing, and have what `names` says."""

    def __init__(self, in_channels: int, num_classes: int, names: str, found: Any = ()) -> None:
        super().__init__()
        for name in names.split():
            setattr(self, name, {"num_classes": num_classes, "has_masks": False}.get(name, lambda *_: found))


class Pool(nn.Module):
    output_size = 7

    def forward(self, features: FeatureMaps, boxes: Tensor) -> Tensor:
        return features.maps[0].new_zeros((boxes.shape[1], 16, 5, 5))


class WithoutArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()


class NoQuota:
    def __call__(self, labels: Tensor, hardness: Any) -> Tensor:
        return labels


class OneTensor(NoQuota):
    max_positive = 1


class OnlyEncodes:
    def encode(self, gt_boxes: Tensor, boxes: Tensor) -> Tensor:
        return boxes


def head(change: Callable[[list[Tensor], list[Tensor]], Any]) -> dict[str, Any]:
    return {"rpn_head": partial(Head, change=change)}


def proposals(*shape: int) -> Proposals:
    boxes = torch.zeros(shape)
    return Proposals(boxes, boxes[..., 0], boxes[..., 0] > 0)


LIST = "rpn_head: Head must give a list of logits and a list of deltas, one of each for each of the 2 maps"
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "RPN head with other anchors": (
        head(lambda logits, deltas: ([x[:, 1:] for x in logits], deltas)),
        "rpn_head: Head gave objectness logits (1, 14, 8, 8) in the place of (1, 15, 8, 8)",
    ),
    "RPN head with two deltas": (
        head(lambda logits, deltas: (logits, [x[:, ::2] for x in deltas])),
        "rpn_head: Head gave box deltas (1, 30, 8, 8) in the place of (1, 60, 8, 8)",
    ),
    "RPN head with smaller maps": (
        head(lambda logits, deltas: ([x[..., 1:] for x in logits], deltas)),
        "rpn_head: Head gave objectness logits (1, 15, 8, 7) in the place of (1, 15, 8, 8)",
    ),
    "RPN head for one level": (head(lambda logits, deltas: (logits[:1], deltas)), LIST),
    "RPN head without deltas": (head(lambda logits, deltas: logits), LIST),
    "RPN head that fails": (
        head(lambda logits, deltas: logits[2]),
        "rpn_head: Head([(1, 16, 8, 8), (1, 16, 4, 4)]) failed: IndexError: list index out of range",
    ),
    "RPN head that is no module": (
        {"rpn_head": lambda in_channels, num_anchors: len},
        "rpn_head: <lambda>(16, 15) made builtin_function_or_method, which is no torch.nn.Module",
    ),
    "RPN head's factory takes nothing": (
        {"rpn_head": WithoutArguments},
        "rpn_head: WithoutArguments can't be called with (16, 15): WithoutArguments.__init__() takes 1 positional",
    ),
    "box head that is no module": (
        {"box_head": lambda in_channels, output_size: "head"},
        "box_head: <lambda>(16, 7) made str, which is no torch.nn.Module",
    ),
    "box head that keeps cells": (
        {"box_head": lambda in_channels, output_size: nn.Conv2d(in_channels, 8, 1)},
        "box_head: Conv2d gave features (1, 8, 7, 7) in the place of (1, F)",
    ),
    "predictor for another head": (
        {"box_predictor": FastRCNNPredictor(99, 4)},
        "box_predictor: FastRCNNPredictor((1, 1024)) failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    ),
    "predictor without num_classes": (
        {"box_predictor": Predictor},
        "box_predictor: Predictor does not say how many classes it has: give it an attribute num_classes",
    ),
    "predictor with too few deltas": (
        {"box_predictor": TooFewDeltas},
        "box_predictor: TooFewDeltas gave box deltas (1, 12) in the place of (1, 16)",
    ),
    "pooler of another size": (
        {"box_roi_pool": Pool()},
        "box_roi_pool: Pool gave features (1, 16, 5, 5) in the place of (1, 16, 7, 7)",
    ),
    "pooler without a size": ({"box_roi_pool": nn.Identity()}, "box_roi_pool: Identity has no output_size"),
    "other strides than declared": (
        {"backbone": Net(declares=(4, 8))},
        "backbone: Net declares the strides (4, 8), but its maps have (8, 16)",
    ),
    "more strides than maps": (
        {"backbone": Net(declares=(8, 16, 32))},
        "backbone: Net gave 2 maps, but declares the strides (8, 16, 32)",
    ),
    "maps of different widths": (
        {"backbone": Net((16, 32))},
        "Net is no backbone: all its maps need the same number of channels, not [16, 32]; put a pyramid on it",
    ),
    "maps of other widths than declared": (
        {"backbone": Net((16, 32), declares=(8, 16))},
        "backbone: Net gave map 1 (1, 32, 4, 4) in the place of (1, 16, h, w)",
    ),
    "coarsest map first": (
        {"backbone": Net(steps=(16, 8))},
        "Net is no backbone: maps must come finest first, but their strides are {'0': 16, '1': 8}",
    ),
    "one map without a name": (
        {"backbone": nn.Conv2d(3, 16, 3, 8)},
        'Conv2d is no backbone: it gives Tensor, not a dictionary of maps; return {"0": map}',
    ),
    "proposer that gives a tensor": (
        {"rpn": partial(Proposing, gives=torch.zeros(1, 5, 4))},
        "rpn: Proposing gave (1, 5, 4) in the place of (Proposals, losses by name)",
    ),
    "proposer that gives tensor and losses": (
        {"rpn": partial(Proposing, gives=(torch.zeros(1, 5, 4), {}))},
        "rpn: Proposing gave [(1, 5, 4), dict] in the place of (Proposals, losses by name)",
    ),
    "proposer without losses": (
        {"rpn": partial(Proposing, gives=(proposals(1, 5, 4), None))},
        "rpn: Proposing gave [Proposals, nothing] in the place of (Proposals, losses by name)",
    ),
    "proposer for one image": (
        {"rpn": partial(Proposing, gives=(proposals(5, 4), {}))},
        "rpn: Proposing gave boxes (5, 4) in the place of (1, P, 4)",
    ),
    "proposer with too few scores": (
        {"rpn": partial(Proposing, gives=(Proposals(torch.zeros(1, 5, 4), torch.zeros(1, 4), torch.zeros(1, 5)), {}))},
        "rpn: Proposing gave scores (1, 4) in the place of (1, 5)",
    ),
    "RoI heads without detect": (
        {"roi_heads": partial(Heads, names="num_classes has_masks losses")},
        "roi_heads: Heads has no detect; detection.parts says what it must have",
    ),
    "RoI heads without num_classes": (
        {"roi_heads": partial(Heads, names="has_masks losses detect")},
        "roi_heads: Heads has no num_classes; detection.parts says what it must have",
    ),
    "RoI heads that forget an image": (
        {"roi_heads": partial(Heads, names="num_classes has_masks losses detect", found=[])},
        "roi_heads: Heads.detect gave [], not a list of a dictionary an image",
    ),
    "RoI heads without scores": (
        {
            "roi_heads": partial(
                Heads,
                names="num_classes has_masks losses detect",
                found=[{"boxes": torch.zeros(3, 4), "labels": torch.ones(3)}],
            )
        },
        "roi_heads: Heads gave scores nothing in the place of (3,)",
    ),
    "a size for each of three levels": (
        {"rpn_anchor_generator": AnchorGenerator([[8], [16], [32]])},
        "rpn_anchor_generator: it lays [3, 3, 3] anchors a cell on 3 levels, but the backbone gives 2 feature maps",
    ),
    "loss that is one number": (
        {"class_loss": nn.CrossEntropyLoss()},
        "class_loss: CrossEntropyLoss gave losses () in the place of (2,)",
    ),
    "weights of other classes": (
        {"class_loss": ClassWeights([1.0, 2.0, 3.0])},
        "class_loss: ClassWeights((2, 4), (2,)) failed: ValueError: 3 class weights for 4 classes",
    ),
    "objectness loss that is one number": (
        {"rpn_objectness_loss": nn.BCEWithLogitsLoss()},
        "rpn_objectness_loss: BCEWithLogitsLoss gave losses () in the place of (2,)",
    ),
    "box loss of each delta": (
        {"box_loss": lambda deltas, boxes, gt_boxes, box_coder: deltas},
        "box_loss: <lambda> gave losses (2, 4) in the place of (2,)",
    ),
    "box loss of the RPN of two arguments": (
        {"rpn_box_loss": nn.SmoothL1Loss()},
        "rpn_box_loss: SmoothL1Loss((2, 4), (2, 4), (2, 4), BoxCoder) failed: TypeError",
    ),
    "sampler without a quota": ({"box_sampler": NoQuota()}, "box_sampler: NoQuota has no max_positive"),
    "sampler that gives indices alone": (
        {"rpn_sampler": OneTensor()},
        "rpn_sampler: OneTensor gave which of them are valid nothing in the place of (1, 2)",
    ),
    "class of a matcher": ({"box_matcher": Matcher}, "box_matcher: Matcher((1, 1, 4), (1, 1), (1, 2, 4)) failed"),
    "coder that can't decode": ({"box_coder": OnlyEncodes()}, "box_coder: OnlyEncodes has no method decode"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfit_is_refused_by_part_method_and_shape(case: str) -> None:
    arguments, said = MISFITS[case]
    with pytest.raises(PartError, match=re.escape(said)) as caught:
        faster_rcnn(**{"backbone": Net(), "num_classes": 4} | arguments)
    assert "\n" not in str(caught.value)


def test_misfit_of_a_cascade_names_the_stage() -> None:
    with pytest.raises(PartError, match=r"box_predictor of stage 0: .* \(1, 16\) in the place of \(1, 4\): the next"):
        cascade_rcnn(Net(), 4, box_predictor=FastRCNNPredictor)
    with pytest.raises(PartError, match="box_head: TwoFCHead is one object, but each of the 3 stages needs its own"):
        cascade_rcnn(Net(), 4, box_head=TwoFCHead(16))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"mask_predictor": OneMoreMask},
            "mask_predictor: OneMoreMask gave logits (1, 5, 14, 14) in the place of (1, 4",
        ),
        ({"mask_head": lambda channels: nn.Flatten()}, "mask_head: Flatten gave features (1, 3136) in the place of"),
        ({"mask_loss": nn.BCEWithLogitsLoss()}, "mask_loss: BCEWithLogitsLoss gave losses () in the place of (1,)"),
    ],
)
def test_misfit_of_a_mask_branch(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PartError, match=re.escape(said)):
        mask_rcnn(Net(), 4, **arguments)


def test_network_that_cuts_borders_off_may_declare_its_strides() -> None:
    """Without padding there are fewer cells than pixels over stride, which is no other stride."""

    class Unpadded(Net):
        def __init__(self) -> None:
            super().__init__(declares=(8, 16))
            for stage in self.stages:
                stage[0].padding, stage[0].kernel_size = (0, 0), (9, 9)
                stage[0].weight = nn.Parameter(torch.zeros(16, 3, 9, 9))

    assert Unpadded()(torch.zeros(1, 3, 64, 64))["0"].shape[-1] == 7
    assert faster_rcnn(Unpadded(), 4).strides == (8, 16)


def test_building_draws_nothing_and_leaves_modes_and_statistics() -> None:
    backbone = Net()
    backbone.stages[1].eval()  # type: ignore[operator]
    before = copy.deepcopy(backbone.state_dict())
    modes = [module.training for module in backbone.modules()]
    parts: dict[str, Any] = {"box_head": TwoFCHead(16), "box_predictor": FastRCNNPredictor(1024, 4)}
    parts["rpn_head"] = Head(16, 15, lambda logits, deltas: (logits, deltas))  # all made before, so no weight is drawn
    state = torch.get_rng_state()
    model = faster_rcnn(backbone, 4, **parts)
    model.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.backbone.modules()] == modes and model.training
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
