"""What a recipe may name: nothing but parts of detectors and what the user trusts; all else is one sentence."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models.detection
import torchvision.ops
from safetensors.torch import save_file
from torch import nn

from detection.models import zoo
from detection.recipes import rebuild
from detection.trust import A_RUN, EVERYTHING, RecipeError, _is_harmless, import_path
from detection.weights import FACTS, CheckpointError
from tests.test_recipes import SMALL


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


def test_arguments_of_another_version_raise() -> None:
    recipe = {"class_path": "detection.models.rpn.RPNHead", "init_args": {"in_channels": 8, "anchors": 3}}
    with pytest.raises(RecipeError, match=r"RPNHead does not fit this version of detection: .*anchors"):
        rebuild(recipe)
