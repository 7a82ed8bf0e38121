"""Models from their recipes: the same keys, gradients and outputs, and nothing but parts of detectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from detection.anchors import AnchorGenerator
from detection.models import zoo
from detection.models.backbones import resnet_fpn
from detection.models.roi_heads import TwoFCHead
from detection.models.rpn import RPNHead
from detection.models.two_stage import FasterRCNN
from detection.recipes import RecipeError, rebuild, recorded

SMALL = {"num_classes": 4, "min_size": 64, "max_size": 96}


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


def test_parts_without_a_recipe_leave_the_model_without() -> None:
    class Head(TwoFCHead):
        """Somebody's own."""

    assert zoo.fasterrcnn_mobilenet_v3_large_fpn(box_head=Head(256), **SMALL).recipe is None
    assert zoo.faster_rcnn(resnet_fpn("resnet18"), 4).recipe is None


def test_defaults_are_written_down() -> None:
    """A later version may have others."""
    assert RPNHead(8, 3).recipe == {
        "class_path": "detection.models.rpn.RPNHead",
        "init_args": {"in_channels": 8, "num_anchors": 3, "conv_depth": 1, "softmax_objectness": False},
    }


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "torch.load",
        "None",
        "",
        "detectionx.models.zoo.fasterrcnn_resnet_fpn",
        "detection",
        "detection.recipes.importlib",
        "detection.recipes.importlib.import_module",
        "detection.recipes.wraps",
        "detection.recipes.rebuild",
        "detection.models.zoo.nn",
        "detection.models.zoo.FrozenBatchNorm2d",
        "detection.models.zoo.reference.fasterrcnn_resnet50_fpn",
        "detection.weights.read_tensors",
        "detection.data.writers.write_coco",
        "detection.models.zoo.nothing",
        "detection.nowhere.nothing",
    ],
)
def test_nothing_but_parts_of_detectors_can_be_named(path: str) -> None:
    for recipe in (
        {"class_path": path, "init_args": {}},
        {
            "class_path": "detection.models.zoo.fasterrcnn_resnet_fpn",
            "init_args": {"box_head": {"class_path": path, "init_args": {"args": ["touch", "x"]}}},
        },
        {
            "class_path": "detection.anchors.AnchorGenerator",
            "init_args": {"sizes": [[{"class_path": path}]]},
        },
    ):
        with pytest.raises(RecipeError, match="the recipe names"):
            rebuild(recipe)


def test_arguments_of_another_version_raise() -> None:
    recipe = {"class_path": "detection.models.rpn.RPNHead", "init_args": {"in_channels": 8, "anchors": 3}}
    with pytest.raises(RecipeError, match=r"RPNHead does not fit this version of detection: .*anchors"):
        rebuild(recipe)


def test_a_subclass_is_not_recorded_as_its_parent() -> None:
    @recorded
    class Part(nn.Module):
        def __init__(self, size: int = 3) -> None:
            super().__init__()

    class Child(Part):
        pass

    assert Part(4).recipe["init_args"] == {"size": 4}
    assert getattr(Child(4), "recipe", None) is None
