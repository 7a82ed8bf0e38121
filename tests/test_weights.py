"""Files of weights: what may stand in them, old names, the epsilon of frozen normalisation, rows of classes."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights
from torchvision.models import detection as reference
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from detection import weights
from detection.weights import CheckpointError, adapt_classes

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "wrap",
    [
        "bare",
        "model",
        "state_dict",
        "module.",
        "detector.",
        "_orig_mod.",
        "module._orig_mod.",
        "model.",
        "model.module.",
    ],
)
def test_files_of_all_kinds(wrap: str, tmp_path: Path) -> None:
    state = {f"{wrap}{k}": v for k, v in STATE.items()} if wrap.endswith(".") else STATE
    torch.save({wrap: state, "epoch": 3} if wrap in ("model", "state_dict") else state, tmp_path / "w.pth")
    assert same(weights.read_tensors(tmp_path / "w.pth"), STATE)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_wrappers_put_before_the_names_is_taken_off(name: str, tmp_path: Path) -> None:
    """As of the average of a compiled model, in a LightningModule; what stands before some names alone is theirs."""
    state = {f"model.module._orig_mod.{k}": v for k, v in STATE.items()} | {"model.n_averaged": torch.tensor(5)}
    part = {"module.a": torch.ones(1), "b": torch.ones(1), "n_averaged": torch.ones(3)}
    for given, wanted in ((state, STATE), (part, part)):
        if name.endswith(".pth"):
            torch.save({"model": given}, tmp_path / name)
        else:
            save_file(given, tmp_path / name)
        found = weights.find_weights(tmp_path / name)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_which_of_a_model_and_its_average_is_taken_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": STATE, "model_ema": {"module.a": torch.ones(1)}}, tmp_path / "w.pth")
    with caplog.at_level("WARNING", logger="detection"):
        assert same(weights.find_weights(tmp_path / "w.pth"), STATE) and weights.find_weights(tmp_path / "w.pth")
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{tmp_path / 'w.pth'} holds model and model_ema, an average of it: model is taken"]


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    facts = {"recipe": {"class_path": "x"}, "class_names": ["cat"], "category_ids": [17]}
    save_file(STATE, tmp_path / "w.safetensors", {"detection": json.dumps(facts)})
    saved = weights.read_saved(tmp_path / "w.safetensors")
    assert (saved.recipe, saved.class_names, saved.category_ids) == ({"class_path": "x"}, ["cat"], [17])
    assert weights.find_class_names(tmp_path / "w.safetensors") == ["cat"]
    save_file(STATE, tmp_path / "plain.safetensors")
    assert weights.find_class_names(tmp_path / "plain.safetensors") is None
    assert same(weights.find_weights(tmp_path / "plain.safetensors"), dict(sorted(STATE.items())))
    run = {"state_dict": {f"detector.{k}": v for k, v in STATE.items()}, "optimizer_states": []}
    run["hyper_parameters"] = {"detector": {"class_path": "y"}, "class_names": ["dog"], "lr": 1}
    torch.save(run, tmp_path / "best.ckpt")
    saved = weights.read_saved(tmp_path / "best.ckpt")
    assert same(saved.tensors, STATE) and saved.recipe == {"class_path": "y"} and saved.class_names == ["dog"]


def test_torchvisions_classes() -> None:
    names = FasterRCNN_ResNet50_FPN_Weights
    for given in ("DEFAULT", "COCO_V1", names.COCO_V1):
        found = weights.find_class_names(given, names)
        assert found is not None and len(found) == 90
        assert (found[0], found[11], found[89]) == ("person", "N/A", "toothbrush")
    assert weights.find_class_names("DEFAULT", ResNet18_Weights) is None  # a classifier's


class Gadget:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.mark}",)


def test_a_file_with_objects_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "hook": Gadget(tmp_path / "mark")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth: not opened, as it needs posix\.system.*keep its tensors"):
        weights.read_tensors(tmp_path / "evil.pth")
    assert not (tmp_path / "mark").exists()


def test_the_flags_that_a_training_script_saved_are_left_out(tmp_path: Path) -> None:
    """As torchvision's does: a namespace is not even made, so that no state of it can come in."""
    flags = argparse.Namespace(lr=0.02, dtype=torch.float32)
    torch.save({"model": STATE, "optimizer": {"state": {}}, "epoch": 3, "args": flags}, tmp_path / "model_3.pth")
    assert weights.read_torch(tmp_path / "model_3.pth").keys() == {"model", "optimizer", "epoch"}
    assert same(weights.find_weights(tmp_path / "model_3.pth"), STATE)
    torch.save({"model": STATE | {"b": flags}}, tmp_path / "inside.pth")
    with pytest.raises(CheckpointError, match=r"inside\.pth: no state_dict in it: b is no tensor"):
        weights.find_weights(tmp_path / "inside.pth")
    torch.save({"model": STATE, "args": argparse.Namespace(a=Gadget(tmp_path / "mark"))}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth: not opened, as it needs posix\.system"):
        weights.find_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "mark").exists()
    assert not any("Namespace" in str(known) for known in torch.serialization.get_safe_globals()), "allowed for good"


def test_the_advice_on_a_file_that_is_refused_works(tmp_path: Path) -> None:
    path, new = tmp_path / "w.pth", tmp_path / "new.pth"
    for content, advice in (
        (nn.Linear(2, 2), "torch.save(torch.load(path, weights_only=False).state_dict(), new)"),
        ({"model": STATE, "log": Path()}, 'torch.save(torch.load(path, weights_only=False)["model"], new)'),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError) as refused:
            weights.read_tensors(path)
        assert advice in str(refused.value)
        eval(advice, {"torch": torch, "path": path, "new": new})
        assert weights.read_tensors(new)
    path.write_text("<!DOCTYPE html><p>Sign in to download")
    with pytest.raises(
        CheckpointError, match=r"w\.pth: no file of torch\.save, as it begins with '<!DOCTYPE html><p>S"
    ):
        weights.read_tensors(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    save_file(STATE, tmp_path / "w.safetensors")
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=rf"{name}: not (a whole|opened)"):
        weights.read_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=name):
        weights.read_tensors(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2], {"model": {"x": "y"}}])
def test_files_without_weights(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth: .*save model\.state_dict\(\)"):
        weights.read_tensors(tmp_path / "w.pth")


def test_absent_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    wanted = r"FasterRCNN_ResNet50_FPN_Weights\.COCO_V1 are not at .*detection convert download --weights Faster"
    with pytest.raises(FileNotFoundError, match=wanted):
        weights.find_weights("DEFAULT", FasterRCNN_ResNet50_FPN_Weights)


def test_old_names_are_those_that_torchvision_upgrades() -> None:
    """Its own modules take today's names; each upgraded file must fill one of them, and hold every tensor."""
    modules: dict[str, nn.Module] = {
        "backbone.fpn": FeaturePyramidNetwork([8, 16, 32, 64], 8),
        "rpn.head": RPNHead(8, 3),
        "roi_heads.mask_head": MaskRCNNHeads(8, [8, 8, 8, 8], 1),
    }
    old: dict[str, Tensor] = {}
    for kind in ("inner", "layer"):
        for i in range(4):
            for part in ("weight", "bias"):
                old[f"backbone.fpn.{kind}_blocks.{i}.{part}"] = torch.rand(3)
    for part in ("weight", "bias"):
        old[f"rpn.head.conv.{part}"] = torch.rand(3)
        old |= {f"roi_heads.mask_head.mask_fcn{i}.{part}": torch.rand(3) for i in range(1, 5)}
        old |= {f"rpn.head.{name}.{part}": torch.rand(3) for name in ("cls_logits", "bbox_pred")}
    new = weights.upgrade_names(old)
    assert set(new) == {f"{prefix}.{name}" for prefix, module in modules.items() for name in module.state_dict()}
    assert torch.equal(new["roi_heads.mask_head.2.0.bias"], old["roi_heads.mask_head.mask_fcn3.bias"])
    assert torch.equal(new["backbone.fpn.layer_blocks.1.0.weight"], old["backbone.fpn.layer_blocks.1.weight"])
    assert same(weights.upgrade_names(new), new)


def frozen(eps: float, state: dict[str, Tensor]) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(len(state["backbone.body.bn1.weight"]), eps)
    norm.load_state_dict({name.rpartition(".")[2]: value for name, value in state.items()})
    return norm


def test_the_epsilon_changes_place_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    # The last ones are those of channels that weight decay has switched off.
    variance = torch.cat((torch.rand(50, generator=generator) * 0.01 + 2e-6, torch.tensor([1e-5, 3e-8, 1e-20, 6e-45])))
    weight = torch.cat((torch.rand(52, generator=generator), torch.tensor([1e-8, 1e-23])))
    rest = torch.rand((2, 54), generator=generator)
    state = {
        f"backbone.body.bn1.{name}": value
        for name, value in zip(
            ("weight", "bias", "running_mean", "running_var"), (weight, rest[0], rest[1], variance), strict=True
        )
    }
    images = torch.rand((1, 54, 1, 1), generator=generator)
    expected = frozen(0.0, state)(images)
    folded = weights.fold_epsilon(state)
    assert expected.isfinite().all()
    torch.testing.assert_close(frozen(1e-5, folded)(images), expected, rtol=2e-6, atol=1e-6)
    assert (frozen(1e-5, state)(images) - expected).abs().max() > 1e-2
    back = weights.unfold_epsilon(folded)
    torch.testing.assert_close(frozen(0.0, back)(images), expected, rtol=2e-6, atol=1e-6)
    ordinary = {name: value[:50] for name, value in state.items()}
    torch.testing.assert_close(weights.unfold_epsilon(weights.fold_epsilon(ordinary)), ordinary, rtol=3e-7, atol=0)


def last_layers(names: list[str], seed: int, mask: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    count = len(names) + 1
    state = {
        "roi_heads.box_head.fc7.weight": torch.rand(4, 4),
        "roi_heads.box_predictor.cls_score.weight": torch.rand(count, 4),
        "roi_heads.box_predictor.cls_score.bias": torch.rand(count),
        "roi_heads.box_predictor.bbox_pred.weight": torch.rand(4 * count, 4),
        "roi_heads.box_predictor.bbox_pred.bias": torch.rand(4 * count),
    }
    if mask:
        state["roi_heads.mask_predictor.mask_fcn_logits.weight"] = torch.rand(count, 8, 1, 1)
    return state


def test_classes_of_the_same_name_keep_their_rows() -> None:
    old_names, new_names = ["person", "cat", "dog"], ["Dog", "zebra", "person"]
    old, fresh = last_layers(old_names, 0), last_layers(new_names, 1)
    adapted = adapt_classes(old, fresh, old_names, new_names)
    assert list(adapted) == list(old)
    assert torch.equal(adapted["roi_heads.box_head.fc7.weight"], old["roi_heads.box_head.fc7.weight"])
    origin = {0: (old, 0), 1: (old, 3), 2: (fresh, 2), 3: (old, 1)}  # background, dog, zebra, person
    for name, rows in (("cls_score.weight", 1), ("cls_score.bias", 1), ("bbox_pred.weight", 4), ("bbox_pred.bias", 4)):
        key = f"roi_heads.box_predictor.{name}"
        for new, (state, row) in origin.items():
            assert torch.equal(adapted[key][new * rows : (new + 1) * rows], state[key][row * rows : (row + 1) * rows])
    key = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    assert torch.equal(adapted[key], torch.stack([state[key][row] for state, row in origin.values()]))
    assert torch.equal(fresh[key], last_layers(new_names, 1)[key]), "the new model's tensors were written to"


def test_one_box_for_all_classes_is_kept_as_it_is() -> None:
    names = ["a", "b"]
    old, fresh = last_layers(names, 0, mask=False), last_layers(["b"], 1, mask=False)
    single, one = "roi_heads.stages.0.box_predictor.bbox_pred", "roi_heads.box_predictor.bbox_pred"
    for state in (old, fresh):
        for part in (".weight", ".bias"):
            state[single + part] = state.pop(one + part)[:4]
    adapted = adapt_classes(old, fresh, names, ["b"])
    assert torch.equal(adapted[single + ".weight"], old[single + ".weight"])
    bias = "roi_heads.box_predictor.cls_score.bias"
    assert torch.equal(adapted[bias], old[bias][[0, 2]])


def test_names_that_do_not_count_up_raise() -> None:
    old = last_layers(["a", "b"], 0)
    with pytest.raises(CheckpointError, match=r"cls_score\.weight has 3 rows for 3 class names"):
        adapt_classes(old, last_layers(["a"], 1), ["a", "b", "c"], ["a"])


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_rows_by_class_are_all_that_change_with_the_classes(name: str) -> None:
    """Of torchvision's own detectors: whatever has another shape with other classes, and nothing else."""
    with torch.device("meta"):
        few, many = (
            getattr(reference, name)(weights=None, weights_backbone=None, num_classes=k).state_dict() for k in (3, 5)
        )
    for key in few:
        assert (few[key].shape != many[key].shape) == bool(weights.class_rows(key)), key
        if weights.class_rows(key):
            assert len(few[key]) == 3 * weights.class_rows(key)
