"""Models from their recipes: the same keys, gradients and outputs."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from detection.anchors import AnchorGenerator
from detection.losses import GIoULoss
from detection.models import zoo
from detection.models.backbones import resnet_fpn
from detection.models.compose import cascade_rcnn, fast_rcnn, faster_rcnn, mask_rcnn
from detection.models.roi_heads import RoIHeads, TwoFCHead
from detection.models.rpn import RegionProposalNetwork, RPNHead
from detection.models.transform import ImageTransform
from detection.models.two_stage import FasterRCNN
from detection.recipes import (
    blame,
    describe,
    rebuild,
    recorded,
)
from detection.upgrades import upgrade

SMALL = {"num_classes": 4, "min_size": 64, "max_size": 96}


@recorded
class Part(nn.Module):
    """A recorded part."""

    def __init__(self, size: int = 3, activation: Any = None) -> None:
        super().__init__()
        self.size, self.activation = size, activation


class Child(Part):
    """Not recorded, though its parent is."""


@recorded
class Grandchild(Child):
    """Recorded, with an argument of its own."""

    def __init__(self, depth: int, **options: Any) -> None:
        super().__init__(**options)
        self.depth = depth


@pytest.fixture(scope="module")
def resnet_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(resnet18().state_dict(), folder / "resnet18.pth")
    return folder


def custom() -> FasterRCNN:
    """Parts of one's own choice, and options that are not the defaults."""
    return zoo.fasterrcnn_mobilenet_v3_large_fpn(
        **SMALL,
        norm="group",
        rpn_anchor_generator=AnchorGenerator([(16, 32)] * 3, (0.5, 2.0), offset=0.5, ratio_is_width_over_height=True),
        rpn_head=RPNHead(256, 4, conv_depth=2, softmax_objectness=True),
        box_head=TwoFCHead(256, out_channels=32),
        rpn_nms_thresh=0.6,
        box_detections_per_img=7,
        image_mean=[0.1, 0.2, 0.3],
    )


def same_outputs(a: FasterRCNN, b: FasterRCNN) -> bool:
    images = [torch.rand((3, 70, 90), generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        first, second = a.eval()(images)[0], b.eval()(images)[0]
    return all(torch.equal(first[key], second[key]) for key in first)


BUILDERS: dict[str, Callable[[Path], FasterRCNN]] = {
    "resnet": lambda _: zoo.fasterrcnn_resnet_fpn(**SMALL),
    "resnet with weights": lambda w: zoo.fasterrcnn_resnet_fpn(weights_backbone=w / "resnet18.pth", **SMALL),
    "resnet with weights, live": lambda w: zoo.fasterrcnn_resnet_fpn(
        weights_backbone=w / "resnet18.pth", norm="batch", **SMALL
    ),
    "resnet with weights, all training": lambda w: zoo.fasterrcnn_resnet_fpn(
        weights_backbone=w / "resnet18.pth", trainable_backbone_layers=5, **SMALL
    ),
    "mobilenet": lambda _: zoo.fasterrcnn_mobilenet_v3_large_320_fpn(trainable_backbone_layers=2, **SMALL),
    "lite0": lambda _: zoo.fasterrcnn_efficientnet_lite0_fpn(**SMALL),
    "lite0 without weights": lambda _: zoo.fasterrcnn_efficientnet_lite0_fpn(weights_backbone=None, **SMALL),
    "timm": lambda _: zoo.fasterrcnn_timm_fpn(backbone_name="resnet10t", fpn_channels=64, **SMALL),
    "custom": lambda _: custom(),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_rebuilt_model_is_the_same(name: str, resnet_weights: Path) -> None:
    model = BUILDERS[name](resnet_weights)
    again = rebuild(json.loads(json.dumps(model.recipe)))
    assert_same_parameters(model, again)
    assert again.recipe == model.recipe
    again.load_state_dict(model.state_dict())
    assert same_outputs(model, again)


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    flags = [[(name, p.requires_grad, p.shape) for name, p in model.named_parameters()] for model in (a, b)]
    assert flags[0] == flags[1]
    assert [type(module) for module in a.modules()] == [type(module) for module in b.modules()]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trainable_backbone_layers": 1}])
def test_the_v2_detector_keeps_what_its_weights_decided(options: dict[str, Any], tmp_path: Path) -> None:
    torch.save(resnet50().state_dict(), tmp_path / "resnet50.pth")
    model = zoo.fasterrcnn_resnet50_fpn_v2(weights_backbone=tmp_path / "resnet50.pth", num_classes=4, **options)
    with torch.device("meta"):
        again = rebuild(model.recipe)
    assert_same_parameters(model, again)
    assert not model.backbone.body.conv1.weight.requires_grad


def test_weights_are_not_part_of_a_recipe(resnet_weights: Path) -> None:
    path = resnet_weights / "resnet18.pth"
    recipe = zoo.fasterrcnn_resnet_fpn(weights_backbone=path, **SMALL).recipe
    assert recipe is not None and str(path) not in json.dumps(recipe)
    assert recipe["init_args"]["norm"] == "frozen" and recipe["init_args"]["trainable_backbone_layers"] == 3


class OwnHead(TwoFCHead):
    """Somebody's own, not decorated."""


def test_a_part_without_a_recipe_is_named_where_the_model_has_none() -> None:
    model = zoo.fasterrcnn_mobilenet_v3_large_fpn(box_head=OwnHead(256), **SMALL)
    assert model.recipe is None and model.unrecorded == {"box_head": "OwnHead"}
    assert Part(activation=[nn.ReLU, OwnHead(256)]).unrecorded == {"activation.1": "OwnHead"}
    inner = Part(activation=OwnHead(256))
    outer = Part(activation=partial(Part, activation={"first": inner}))
    assert outer.recipe is None and outer.unrecorded == {"activation.activation.first.activation": "OwnHead"}
    assert Part(activation=lambda x: x).unrecorded == {
        "activation": f"{inspect.currentframe().f_code.co_qualname}.<locals>.<lambda>"
    }


def test_what_a_script_or_a_function_defines_has_no_recipe() -> None:
    @recorded
    class Local(nn.Module):
        pass

    assert Local().recipe is None and blame(Local(), "box_head")["box_head"].endswith("Local")
    assert describe(Local) is NotImplemented


def test_composed_models_have_recipes() -> None:
    for build in (faster_rcnn, mask_rcnn, cascade_rcnn, fast_rcnn):
        model = build(resnet_fpn("resnet18"), 4)
        with torch.device("meta"):
            assert_same_parameters(model, rebuild(json.loads(json.dumps(model.recipe))))


class Mode(Enum):
    """An argument that is a choice."""

    FAST = "fast"


@pytest.mark.parametrize(
    "value",
    [
        Mode.FAST,
        [1, 2.5, None, True, "text"],
        {"inner": {"values": [1]}},
        nn.ReLU,
        partial(Part, size=2),
        partial(OwnHead, out_channels=3),
        torch.nn.functional.relu,
        same_outputs,
    ],
)
def test_arguments_come_back_as_they_were(value: Any) -> None:
    again = rebuild(json.loads(json.dumps(Part(activation=value).recipe)), trust=["tests"]).activation
    if isinstance(value, partial):
        assert (again.func, again.keywords) == (value.func, value.keywords)
    else:
        assert again == value and type(again) is type(value)


def test_numbers_of_numpy_become_plain() -> None:
    described = describe([np.float64(0.5), np.float64(1)])
    assert described == [0.5, 1.0] and type(described[0]) is float


def test_defaults_are_written_down() -> None:
    """A later version may have others."""
    assert RPNHead(8, 3).recipe == {
        "class_path": "detection.models.rpn.RPNHead",
        "init_args": {"in_channels": 8, "num_anchors": 3, "conv_depth": 1, "softmax_objectness": False},
    }


def test_a_detector_of_ones_own_parts_has_a_recipe() -> None:
    backbone = resnet_fpn("resnet18")
    parts = (RegionProposalNetwork(256, backbone.strides), RoIHeads(256, 4), ImageTransform(64, 96))
    model = FasterRCNN(backbone, *parts)
    with torch.device("meta"):
        again = rebuild(json.loads(json.dumps(model.recipe)))
    assert_same_parameters(model, again)
    assert (again.transform.min_size, again.transform.max_size) == (model.transform.min_size, 96)


OLD = json.loads((Path(__file__).parent / "old_recipes.json").read_text())


@pytest.mark.parametrize("name", OLD)
def test_checkpoints_of_before_the_parts_had_contracts_come_out_again(name: str) -> None:
    """Recipes of checkpoints that the version before wrote, and a digest of their tensors' names and shapes."""
    with torch.device("meta"):
        model = rebuild(OLD[name]["recipe"])
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == OLD[name]["tensors"]


def test_losses_of_older_recipes_are_parts_now() -> None:
    with torch.device("meta"):
        models = {name: rebuild(OLD[name]["recipe"]) for name in ("mobile", "lite0", "cascade", "c4")}
    mobile, lite0 = models["mobile"], models["lite0"]
    assert isinstance(mobile.rpn.box_loss, GIoULoss) and mobile.rpn.box_loss.weight == 2.0
    assert isinstance(lite0.roi_heads.box_loss, GIoULoss) and lite0.roi_heads.box_loss.weight == 1.0
    assert (mobile.roi_heads.box_loss.beta, lite0.rpn.box_loss.beta) == (0.0, 0.5)
    assert [stage.box_loss.beta for stage in models["cascade"].roi_heads.stages] == [0.25] * 3
    assert models["c4"].rpn.box_loss.beta == 1 / 9
    stack = upgrade("detection.interop.heads.ConvStack", {"norm": "group", "channels": 64, "convs": 2})
    assert stack == ("detection.models.masks.MaskHead", {"norm": "group", "layers": [64, 64]})
    head = upgrade("detection.models.masks.MaskHead", {"in_channels": 8, "batch_norm": True})
    assert head == ("detection.models.masks.MaskHead", {"in_channels": 8, "norm": "batch"})
    own = ("my_parts.Loss", {"box_beta": 1, "box_overlap_loss": None})
    assert upgrade(own[0], dict(own[1])) == own


def test_a_subclass_is_not_recorded_as_its_parent() -> None:
    assert Part(4).recipe["init_args"] == {"size": 4, "activation": None}
    assert getattr(Child(4), "recipe", None) is None
    grandchild = Grandchild(2, size=5)
    assert grandchild.recipe == {"class_path": f"{__name__}.Grandchild", "init_args": {"depth": 2, "size": 5}}
    again = rebuild(grandchild.recipe, trust=["tests"])
    assert type(again) is Grandchild and (again.depth, again.size) == (2, 5)


def test_a_subclass_that_is_not_decorated_gets_its_own_recipe_where_it_is_made_from_one() -> None:
    made = rebuild({"class_path": f"{__name__}.Child", "init_args": {"size": 9}}, trust=["tests"])
    assert made.recipe == {"class_path": f"{__name__}.Child", "init_args": {"size": 9}} and made.size == 9
