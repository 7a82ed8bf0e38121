"""Models from their recipes: the same keys, gradients and outputs, and nothing but parts of detectors."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models.detection
import torchvision.ops
from safetensors.torch import save_file
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
    A_RUN,
    EVERYTHING,
    RecipeError,
    _is_harmless,
    blame,
    describe,
    import_path,
    rebuild,
    recorded,
)
from detection.upgrades import upgrade
from detection.weights import FACTS, CheckpointError

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


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "torch.load",
        "torch.hub.load",
        "torch.nn.parallel.DistributedDataParallel",
        "torch.nn.Module.__init__",
        "torch.nn.modules.module._WrappedHook",
        "torch.nn.modules.torch.load",
        "torch.nn.functional.warnings.warn",
        "torch.optim.swa_utils.AveragedModel",
        "torchvision.ops.misc.warnings.warn",
        "torchvision.models.detection.faster_rcnn.fasterrcnn_resnet50_fpn",
        "torchmetrics.detection.mean_ap.json.loads",
        "albumentations.from_dict",
        "albumentations.load",
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


@pytest.mark.parametrize(
    "path",
    [
        "albumentationsx.Evil",
        "torch.nnx.Evil",
        "torchvision.ops_of_mine.Evil",
        "torchmetrics.detectionx.Evil",
        "evil.Evil",
    ],
)
def test_a_name_that_only_begins_like_a_known_one_is_not_imported(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a module of a like name lies where Python looks | injected: one that leaves a mark when it is imported |
    promise: it is refused before it is imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    package = path.partition(".")[0]
    if package not in ("torch", "torchvision", "torchmetrics"):
        (tmp_path / f"{package}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(RecipeError, match="the recipe names"):
        rebuild({"class_path": path})
    assert not (tmp_path / "mark").exists() and package not in set(sys.modules) - {
        "torch",
        "torchvision",
        "torchmetrics",
    }


def test_the_advice_is_not_to_trust_the_whole_of_a_library() -> None:
    for path in ("torch.load", "os.system", "torch.hub.load"):
        with pytest.raises(RecipeError) as refused:
            rebuild({"class_path": path})
        assert "--trust" not in str(refused.value)


def harmless() -> list[str]:
    import albumentations
    import torchmetrics.classification
    import torchmetrics.detection

    modules = [nn, torch.optim, torch.optim.lr_scheduler, torchvision.ops, torchvision.models.detection]
    modules += [torchmetrics.classification, torchmetrics.detection, albumentations]
    found = {f"{module.__name__}.{name}" for module in modules for name in dir(module) if name[0] != "_"}
    return sorted(path for path in found if callable(import_path(path)) and _is_harmless(import_path(path)))


def test_constructors_that_a_checkpoint_may_call_open_nothing() -> None:
    """Each class that may be named is looked at: no constructor of it mentions files or the network."""
    paths = harmless()
    assert {"torch.nn.Linear", "torch.optim.SGD", "torch.optim.lr_scheduler.StepLR"} < set(paths)
    assert {
        "albumentations.HorizontalFlip",
        "albumentations.OneOf",
        "torchmetrics.detection.MeanAveragePrecision",
    } < set(paths)
    calls = r"\b(open|exec|eval|urlopen|load_state_dict_from_url|download\w*|from_pretrained|system|Popen|load|loads)\("
    for path in paths:
        for kind in import_path(path).__mro__ if inspect.isclass(import_path(path)) else ():
            source = inspect.getsource(kind.__init__) if inspect.isfunction(vars(kind).get("__init__")) else ""
            assert not re.search(calls, source), (path, kind)


def test_what_a_trusted_recipe_opens_is_not_trusted(tmp_path: Path) -> None:
    """Fault: a configuration of the user names somebody's file | injected: a file that names another package |
    promise: the trust in the configuration doesn't reach into the file."""
    recipe = zoo.fasterrcnn_resnet_fpn(**SMALL).recipe
    recipe["init_args"]["box_head"] = {"class_path": "evil.Head", "init_args": {}}
    facts = {"recipe": recipe, "class_names": ["a", "b", "c"]}
    save_file({"x": torch.zeros(1)}, tmp_path / "theirs.safetensors", {"format": "pt", FACTS: json.dumps(facts)})
    outer = {
        "class_path": "detection.detector_for_classes",
        "init_args": {"path": str(tmp_path / "theirs.safetensors")},
    }
    for trust in ([EVERYTHING], [A_RUN]):
        with pytest.raises(CheckpointError, match=r"theirs\.safetensors: the recipe names evil\.Head: .*--trust evil"):
            rebuild(outer, trust)
    with pytest.raises(RecipeError, match="not a part of a detector"):
        rebuild(outer)


def test_a_recipe_reads_no_file_of_weights() -> None:
    recipe = {"class_path": "detection.models.zoo.fasterrcnn_resnet_fpn", "init_args": {"weights_backbone": "/x.pth"}}
    with pytest.raises(RecipeError, match="names weights_backbone: a checkpoint has its own"):
        rebuild(recipe)
    with pytest.raises(FileNotFoundError, match=r"/x\.pth"):
        rebuild(recipe, trust=[A_RUN])


@pytest.mark.parametrize("name", ["hf-hub:somebody/network", "hf_hub:somebody/network", "local-dir:/somewhere"])
def test_a_recipe_fetches_no_network(name: str) -> None:
    recipe = {"class_path": "detection.models.zoo.fasterrcnn_timm_fpn", "init_args": {"backbone_name": name}}
    with pytest.raises(RecipeError, match=f"{name} is no network of timm's own"):
        rebuild(recipe)


def test_a_detector_of_ones_own_parts_has_a_recipe() -> None:
    backbone = resnet_fpn("resnet18")
    parts = (RegionProposalNetwork(256, backbone.strides), RoIHeads(256, 4), ImageTransform(64, 96))
    model = FasterRCNN(backbone, *parts)
    with torch.device("meta"):
        again = rebuild(json.loads(json.dumps(model.recipe)))
    assert_same_parameters(model, again)
    assert (again.transform.min_size, again.transform.max_size) == (model.transform.min_size, 96)


def test_no_recipe_is_larger_than_memory() -> None:
    itself: list[Any] = []
    itself.append(itself)
    deep: Any = {"class_path": "torch.nn.ReLU"}
    for _ in range(2000):
        deep = [deep]
    wide: Any = [0]
    for _ in range(40):
        wide = [wide] * 10  # 10 ** 40 values in some bytes
    for value in (itself, deep, wide):
        with pytest.raises(RecipeError, match="too large, or nested too deeply"):
            rebuild({"class_path": "detection.anchors.AnchorGenerator", "init_args": {"sizes": value}})


@pytest.mark.parametrize("given", [[1], "text", {1: 2}, {"sizes": "no sizes"}, {"sizes": [[{}]]}])
def test_arguments_that_make_no_sense_are_one_sentence(given: Any) -> None:
    with pytest.raises(RecipeError, match=r"the recipe of detection\.anchors\.AnchorGenerator") as refused:
        rebuild({"class_path": "detection.anchors.AnchorGenerator", "init_args": given})
    assert "\n" not in str(refused.value)


def test_a_module_that_fails_to_import_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_parts.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "torn_parts.py").write_text("class Head(\n")
    for module, said in (("broken_parts", "nowhere_to_be_found"), ("torn_parts", "SyntaxError")):
        with pytest.raises(RecipeError, match=rf"names {module}.Head, but {module} can't be imported: .*{said}"):
            rebuild({"class_path": f"{module}.Head"}, trust=[module])
    with pytest.raises(RecipeError, match=r"but tests\.runs has no Head, in .*runs\.py"):
        rebuild({"class_path": "tests.runs.Head"}, trust=["tests"])


def test_the_working_directory_shadows_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "timm.py").write_text("raise RuntimeError")
    (tmp_path / "parts_here.py").write_text("class Head:\n    def __init__(self, size=1):\n        self.size = size\n")
    made = rebuild({"class_path": "parts_here.Head", "init_args": {"size": 2}}, trust=["parts_here"])
    assert made.size == 2 and made.recipe == {"class_path": "parts_here.Head", "init_args": {"size": 2}}
    assert sys.path[-1] == str(tmp_path)
    found = importlib.util.find_spec("timm")
    assert found is not None and found.origin != str(tmp_path / "timm.py")


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
    own = ("my_parts.Loss", {"box_beta": 1, "box_overlap_loss": None})
    assert upgrade(own[0], dict(own[1])) == own


def test_arguments_of_another_version_raise() -> None:
    recipe = {"class_path": "detection.models.rpn.RPNHead", "init_args": {"in_channels": 8, "anchors": 3}}
    with pytest.raises(RecipeError, match=r"RPNHead does not fit this version of detection: .*anchors"):
        rebuild(recipe)


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
