"""torchvision's detectors here and back: the same tensors, the same features, COCO's two ways of counting classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import detection as reference
from torchvision.ops import FrozenBatchNorm2d

from detection import Detector
from detection.cli.convert import main as convert
from detection.interop import CheckpointError, export_detector, import_detector, load_detector, rows, save_detector
from detection.interop.torchvision import (
    MOBILE_320,
    WITHOUT_EPSILON,
    advice,
    find_builder,
    from_torchvision,
    to_torchvision,
)
from detection.models import zoo
from detection.models.backbones import resnet_fpn
from detection.models.pooling import RoIPool
from detection.recipes import rebuild

TWINS = [
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
]
MOBILE = "fasterrcnn_mobilenet_v3_large_fpn"


def torchvisions(name: str, num_classes: int = 5) -> nn.Module:
    """torchvision's detector with random weights; statistics too, and frozen where its published files have them so."""
    torch.manual_seed(0)
    model: nn.Module = getattr(reference, name)(weights=None, weights_backbone=None, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the published files of 2019 have them."""
    old = {}
    for name, value in state.items():
        if name.startswith("backbone.fpn."):
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(4):
            name = name.replace(f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.")
        old[name] = value
    return old


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_here_and_back(name: str) -> None:
    theirs = torchvisions(name)
    state = theirs.state_dict()
    live = name.endswith("_v2")
    published = state if live else old_names(without_counters(state))
    assert live or set(published) != set(state)
    model = from_torchvision(published, f"{name}-0123abcd.pth").eval()
    assert model.recipe is not None and model.recipe["class_path"].startswith("detection.models.")
    with torch.device("meta"):
        again = rebuild(model.recipe)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    image = torch.rand(1, 3, 64, 96)
    ours, expected = model.backbone(image), theirs.backbone(image)
    for key in expected:
        assert (ours[key] - expected[key]).abs().max() < 1e-5 * expected[key].abs().max()
    back, wanted = to_torchvision(model), state if live else without_counters(state)
    assert set(back) == set(wanted) and all(torch.equal(back[key], wanted[key]) for key in wanted)
    counts = "num_classes=5, num_keypoints=17" if name.startswith("keypoint") else "num_classes=5"
    assert f"torchvision.models.detection.{name}(weights=None, {counts})" in advice(model, back)
    missing, extra = theirs.load_state_dict(back, strict=False)
    assert not extra and all(key.endswith("num_batches_tracked") for key in missing)


@pytest.mark.slow
def test_here_and_back_through_files(tmp_path: Path) -> None:
    state = without_counters(torchvisions(MOBILE).state_dict())
    torch.save(old_names(state), tmp_path / f"{MOBILE}-0123abcd.pth")
    model, saved = import_detector(tmp_path / f"{MOBILE}-0123abcd.pth")
    assert saved.class_names is None  # four classes could be any
    save_detector(tmp_path / "ours.safetensors", model)
    for suffix, read in ((".pth", torch.load), (".safetensors", load_file)):
        export_detector(tmp_path / "ours.safetensors", tmp_path / f"back{suffix}", "torchvision")
        back = read(tmp_path / f"back{suffix}")
        assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)


def test_a_detector_of_own_classes_is_named_when_it_is_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / f"{MOBILE}-mine.pth", tmp_path / "ours.safetensors"
    torch.save({"model": torchvisions(MOBILE).state_dict()}, source)
    flags = ["import", "--source", str(source), "--output", str(output), "--certificate", "false"]
    assert convert(flags) is None and "--class_names '[car, tractor, ...]'" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"ours\.safetensors: does not name its classes: .* --class_names"):
        Detector.from_checkpoint(output, "cpu")
    assert "mine.pth: 3 class names are given for 4 classes" in str(convert([*flags, "--class_names", "[a, b, c]"]))
    assert convert([*flags, "--class_names", "[cat, dog, fox, hen]"]) is None
    assert "note:" not in capsys.readouterr().out
    detector = Detector.from_checkpoint(output, "cpu")
    assert detector.class_names == ("cat", "dog", "fox", "hen")
    assert "it names its classes, cat, dog, fox, hen: give no others" in str(named_anew(output, tmp_path / "best.ckpt"))


def named_anew(file: Path, run: Path) -> str | None:
    """What is said of a run whose classes are given other names than it has."""
    model = load_detector(file)
    content: dict[str, Any] = {"state_dict": {f"detector.{k}": v for k, v in model.state_dict().items()}}
    content["hyper_parameters"] = {"detector": model.recipe, "class_names": ["cat", "dog", "fox", "hen"]}
    torch.save(content, run)
    return convert(["import", "--source", str(run), "--output", str(file), "--class_names", "[a, b, c, d]"])


def test_a_mobilenet_of_another_file_name_may_be_either(caplog: pytest.LogCaptureFixture) -> None:
    state = torchvisions(MOBILE).state_dict()
    with caplog.at_level("WARNING", logger="detection"):
        assert from_torchvision(state, f"{MOBILE_320}-mine.pth").transform.min_size == (320,)
        assert from_torchvision(state, f"{MOBILE}-mine.pth").transform.min_size == (800,) and not caplog.records
        assert from_torchvision(state, "mine_320.pth").transform.min_size == (800,)
    said = caplog.records[0].getMessage()
    assert said.startswith("mine_320.pth: the two MobileNet detectors") and f"begin with {MOBILE_320} where" in said


@pytest.mark.rehearsal
@torch.no_grad()
def test_a_key_point_detector_here_and_back_through_files(tmp_path: Path) -> None:
    """It finds persons, unless it says otherwise, and torchvision's finds the same from the file written for it."""
    sizes: dict[str, Any] = {"min_size": 96, "max_size": 128, "box_score_thresh": 0.0}
    first, second = (
        reference.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, **sizes).eval() for _ in range(2)
    )
    torch.save(first.state_dict(), tmp_path / "keypointrcnn.pth")
    model, saved = import_detector(tmp_path / "keypointrcnn.pth")
    assert saved.class_names == ["person"] and saved.category_ids == [1]
    save_detector(tmp_path / "ours.safetensors", model, saved.class_names, saved.category_ids)
    said = export_detector(tmp_path / "ours.safetensors", tmp_path / "back.pth", "torchvision")
    assert "keypointrcnn_resnet50_fpn(weights=None, num_classes=2, num_keypoints=17)" in said
    second.load_state_dict(torch.load(tmp_path / "back.pth"), strict=True)
    image = torch.rand(3, 90, 120)
    wanted, found = first([image])[0], second([image])[0]
    assert len(wanted["boxes"]) > 5 and all(torch.equal(wanted[name], found[name]) for name in wanted)
    again, model = load_detector(tmp_path / "ours.safetensors"), model.eval()
    again.transform.min_size = model.transform.min_size = (96,)
    assert all(torch.equal(value, again([image])[0][name]) for name, value in model([image])[0].items())


def test_builders_are_found_by_the_tensors_and_the_name() -> None:
    with torch.device("meta"):
        states = {name: getattr(reference, name)(weights=None, weights_backbone=None).state_dict() for name in TWINS}
    for name, state in states.items():
        assert find_builder(state, f"{name}-0123abcd.pth") == name
    for name in TWINS[:2]:
        assert find_builder(states[name], "model.pth") == name
    state = states[TWINS[0]]
    with pytest.raises(CheckpointError, match="not a Faster, Mask or Keypoint R-CNN of torchvision"):
        find_builder({"some.weight": torch.zeros(2)})
    fewer = {k: v for k, v in state.items() if "layer3.5" not in k}
    with pytest.raises(CheckpointError, match="5 blocks in its third stage"):
        find_builder(fewer)


def test_an_odd_file_is_named_with_its_tensors(tmp_path: Path) -> None:
    state = torchvisions(MOBILE).state_dict()
    path = tmp_path / f"{MOBILE}-0123abcd.pth"
    lacking = {k: v for k, v in state.items() if not k.startswith("roi_heads.box_head.fc7")}
    torch.save(lacking | {"head.extra": torch.zeros(1)}, path)
    message = (
        r"0123abcd\.pth: 2 tensors are missing \(roi_heads\.box_head\.fc7\.weight, roi_heads\.box_head\.fc7\.bias\) "
        r"and 1 tensors have no place in such a detector \(head\.extra\)"
    )
    with pytest.raises(CheckpointError, match=message):
        import_detector(path)
    torch.save(state | {"roi_heads.box_head.fc7.bias": torch.zeros(7)}, path)
    with pytest.raises(CheckpointError, match=r"fc7\.bias is \(7,\) where \(1024,\) is wanted"):
        import_detector(path)


@pytest.mark.slow
def test_the_epsilon_of_published_files(tmp_path: Path) -> None:
    """torchvision's COCO_V1 normalises without epsilon, and so does the exported file, with the same values."""
    theirs = torchvisions("fasterrcnn_resnet50_fpn")
    state = without_counters(theirs.state_dict())
    for name, value in state.items():
        if "body" in name and name.endswith("running_var"):
            value.mul_(0.01)
        elif "body" in name and name.endswith(("bn1.weight", "bn2.weight", "bn3.weight")):
            value.fill_(0.01 if "bn3" in name else 0.1)
    exact = FrozenBatchNorm2d(64, eps=0.0)
    exact.load_state_dict({k.rpartition(".")[2]: v for k, v in state.items() if k.startswith("backbone.body.bn1.")})
    image = torch.rand(1, 3, 32, 32)
    expected = exact(theirs.backbone.body.conv1(image))

    def difference(model: Any) -> float:
        return float((model.backbone.body["bn1"](model.backbone.body["conv1"](image)) - expected).abs().max())

    with torch.no_grad():
        assert difference(from_torchvision(state, WITHOUT_EPSILON[0])) < 1e-6
        assert difference(from_torchvision(state, "mine.pth", without_epsilon=True)) < 1e-6
        assert difference(from_torchvision(state, "mine.pth")) > 1e-5
    back = to_torchvision(from_torchvision(state, WITHOUT_EPSILON[0]), without_epsilon=True)
    torch.testing.assert_close(back, state, rtol=2e-6, atol=0)
    assert WITHOUT_EPSILON == (
        "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
        "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
        "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    )


def test_cocos_gaps() -> None:
    assert len(rows.COCO_IDS) == len(rows.COCO_NAMES) == 80
    assert sorted(set(range(1, 91)) - set(rows.COCO_IDS)) == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert (rows.COCO_NAMES[0], rows.COCO_NAMES[11], rows.COCO_NAMES[79]) == ("person", "stop sign", "toothbrush")
    assert (rows.COCO_IDS[11], rows.COCO_IDS[79]) == (13, 90)


@pytest.mark.slow
def test_91_classes_become_80_and_91_again(tmp_path: Path) -> None:
    theirs = torchvisions(MOBILE, 91)
    path = tmp_path / f"{MOBILE}-0123abcd.pth"
    torch.save(theirs.state_dict(), path)
    _, saved = import_detector(path)
    assert saved.class_names is not None and len(saved.class_names) == 90 and saved.category_ids == list(range(1, 91))
    model, saved = import_detector(path, contiguous=True)
    assert model.num_classes == 81 and saved.class_names == rows.COCO_NAMES and saved.category_ids == rows.COCO_IDS
    features = torch.rand(3, 1024)
    with torch.no_grad():
        logits, deltas = model.roi_heads.box_predictor(features)
        wanted_logits, wanted_deltas = theirs.roi_heads.box_predictor(features)
        kept = [0, *rows.COCO_IDS]
        torch.testing.assert_close(logits, wanted_logits[:, kept])
        torch.testing.assert_close(deltas.view(3, 81, 4), wanted_deltas.view(3, 91, 4)[:, kept])
        save_detector(tmp_path / "ours.safetensors", model, saved.class_names, saved.category_ids)
        export_detector(tmp_path / "ours.safetensors", tmp_path / "back.pth", "torchvision", category_ids=True)
        again = torchvisions(MOBILE, 91)
        again.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=False)
        back_logits, back_deltas = again.roi_heads.box_predictor(features)
    torch.testing.assert_close(back_logits[:, kept], logits)
    torch.testing.assert_close(back_deltas.view(3, 91, 4)[:, kept], deltas.view(3, 81, 4))
    absent = [i for i in range(91) if i not in kept]
    assert (back_logits.softmax(dim=1)[:, absent] < 1e-30).all()


def test_what_torchvision_can_not_have_is_refused() -> None:
    with torch.device("meta"):
        moved = zoo.faster_rcnn(resnet_fpn("resnet50", norm="frozen", stride_in_1x1=True), 5)
    with pytest.raises(CheckpointError, match="stride in the 1x1 convolutions"):
        to_torchvision(moved)


def test_another_pooling_than_torchvisions_is_named() -> None:
    model = zoo.fasterrcnn_efficientnet_lite0_fpn(weights_backbone=None, num_classes=3, box_roi_pool=RoIPool(7))
    state = zoo.fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=3).state_dict()
    assert "it pools by RoI Align where this detector has RoIPool: expect other boxes" in advice(model, state)
