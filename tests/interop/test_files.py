"""Files: what is written in them, prefixes and metadata of others, round trips through Detectron2, the script."""

from __future__ import annotations

import json
import pickle
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models import ResNet18_Weights
from torchvision.models._api import Weights

from detection.interop import (
    CheckpointError,
    detector_for_classes,
    fetch_weights,
    files,
    import_detector,
    load_detector,
    mmdetection,
    save_detector,
)
from detection.interop.builders import Layout, build
from detection.interop.detectron2 import (
    choose_style,
    from_detectron2,
    read_layout,
    settings_of,
    to_detectron2,
)
from detection.interop.foreign import read_foreign
from detection.interop.rows import STYLES
from detection.models import zoo
from detection.models.two_stage import FasterRCNN

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert.py"
NAMES = ["cat", "dog", "fox"]


@pytest.fixture
def small() -> FasterRCNN:
    torch.manual_seed(0)
    return zoo.fasterrcnn_resnet_fpn(num_classes=4, norm="frozen", min_size=64, max_size=96, rpn_nms_thresh=0.6)


def test_a_file_says_everything(small: FasterRCNN, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ours.safetensors"
    save_detector(path, small, NAMES, [3, 5, 9])
    assert [p.name for p in path.parent.iterdir()] == ["ours.safetensors"]
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["detection"])
    assert facts == {"recipe": small.recipe, "class_names": NAMES, "category_ids": [3, 5, 9]}
    model = load_detector(path)
    assert not model.training and model.rpn.nms_thresh == 0.6 and model.recipe == small.recipe
    images = [torch.rand(3, 70, 90)]
    with torch.no_grad():
        ours, expected = model(images)[0], small.eval()(images)[0]
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_a_run_is_a_file_of_ours_too(small: FasterRCNN, tmp_path: Path) -> None:
    content = {
        "state_dict": {f"detector.{k}": v for k, v in small.state_dict().items()},
        "hyper_parameters": {"detector": small.recipe, "class_names": NAMES},
    }
    torch.save(content, tmp_path / "best.ckpt")
    model = load_detector(tmp_path / "best.ckpt")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in small.state_dict().items())
    model, saved = import_detector(tmp_path / "best.ckpt")
    assert saved.class_names == NAMES and model.recipe == small.recipe


def test_other_classes_keep_those_of_the_same_name(small: FasterRCNN, tmp_path: Path) -> None:
    save_detector(tmp_path / "ours.safetensors", small, NAMES)
    model = detector_for_classes(tmp_path / "ours.safetensors", ["fox", "bear"])
    assert model.training and model.num_classes == 3
    assert model.recipe is not None and model.recipe["init_args"]["num_classes"] == 3
    old, new = small.state_dict(), model.state_dict()
    key = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(new[key][:2], old[key][[0, 3]]) and not torch.equal(new[key][2], old[key][2])
    assert torch.equal(new["roi_heads.box_head.fc6.weight"], old["roi_heads.box_head.fc6.weight"])
    save_detector(tmp_path / "unnamed.safetensors", small)
    with pytest.raises(CheckpointError, match=r"unnamed\.safetensors: does not name its classes"):
        detector_for_classes(tmp_path / "unnamed.safetensors", ["fox"])


@pytest.mark.parametrize("begin", ["take_weights", "builder"])
def test_a_file_that_does_not_name_its_classes_is_begun_with(
    begin: str, small: FasterRCNN, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.pth"
    torch.save(small.state_dict(), path)
    score, box = (f"roi_heads.box_predictor.{name}.weight" for name in ("cls_score", "bbox_pred"))
    old = small.state_dict()
    for names, told in ((NAMES, "they are taken for those of the data"), (["a", "b"], "anew, for 2 in place of 3")):
        options: dict[str, Any] = {"num_classes": len(names) + 1, "norm": "frozen"}
        with caplog.at_level("INFO", logger="detection"):
            if begin == "builder":
                new = zoo.fasterrcnn_resnet_fpn(**options, weights=path, class_names=names).state_dict()
            else:
                model = zoo.fasterrcnn_resnet_fpn(**options)
                fresh = {name: value.clone() for name, value in model.state_dict().items()}
                files.take_weights(model, path, names)
                new = model.state_dict()
                assert names == NAMES or torch.equal(new[score][1:], fresh[score][1:])
        said = caplog.records[-1].getMessage()
        assert said.startswith(f"{path} does not name its classes: ") and told in said
        assert torch.equal(new["roi_heads.box_head.fc6.weight"], old["roi_heads.box_head.fc6.weight"])
        assert torch.equal(new[score][0], old[score][0]) and torch.equal(new[box][:4], old[box][:4])
        assert torch.equal(new[score][1:3], old[score][1:3]) == (names == NAMES)


def test_files_that_can_not_be_used(small: FasterRCNN, tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*ours\.safetensors"):
        load_detector(path)
    with pytest.raises(CheckpointError, match="2 class names are given for 3 classes"):
        save_detector(path, small, ["a", "b"])
    state = {k: v.contiguous() for k, v in small.state_dict().items()}
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"ours\.safetensors: does not say how to build.*`detection convert`"):
        load_detector(path)

    def write(recipe: Any, tensors: dict[str, Tensor] = state) -> None:
        save_file(tensors, path, {"detection": json.dumps({"recipe": recipe})})

    write({"class_path": "os.system", "init_args": {"command": "true"}})
    with pytest.raises(CheckpointError, match=r"ours\.safetensors: the recipe names os\.system"):
        load_detector(path)
    write({"class_path": "detection.models.rpn.RPNHead", "init_args": {"in_channels": 8, "num_anchors": 3}})
    with pytest.raises(CheckpointError, match="not that of a detector"):
        load_detector(path)
    del state["rpn.head.cls_logits.bias"]
    write(small.recipe, state | {"more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"missing \(rpn\.head\.cls_logits\.bias\) and 1 tensors .* \(more\)"):
        load_detector(path)
    small.recipe = None
    with pytest.raises(CheckpointError, match=r"no recipe describes .*detection\.recorded"):
        save_detector(path, small)


def test_what_is_ours_already_is_not_converted(small: FasterRCNN, tmp_path: Path) -> None:
    save_detector(tmp_path / "ours.safetensors", small)
    with pytest.raises(CheckpointError, match="written by this project already"):
        import_detector(tmp_path / "ours.safetensors")


def test_detectron2s_parameters_are_counted_right() -> None:
    """Its detector has no box row for the background; its own test has this number for R50-FPN on COCO."""
    layout = Layout("resnet50", "fpn", 81, 1, False)
    with torch.device("meta"):
        model = build(layout, STYLES["pytorch"])
        theirs = to_detectron2(model)
        frozen = {name for name in theirs if ".norm." in name}
        assert sum(value.numel() for name, value in theirs.items() if name not in frozen) == 41_699_936
        assert read_layout(theirs) == layout


@pytest.mark.parametrize(
    "layout",
    [
        Layout("resnet101", "fpn", 81, 1, True),
        Layout("resnet50", "fpn", 21, 3, True),
        Layout("resnet101", "fpn", 21, 3, False),
        Layout("resnet101", "c4", 21, 1, False),
        Layout("resnet50", "c4", 81, 1, True),
        Layout("resnet152", "dc5", 81, 1, False),
    ],
    ids=str,
)
def test_every_layout_goes_there_and_is_known_again(layout: Layout) -> None:
    with torch.device("meta"):
        theirs = to_detectron2(build(layout, STYLES["pytorch"]))
    assert read_layout(theirs) == layout
    boxes = theirs[f"roi_heads.box_predictor.{'2.' if layout.stages == 3 else ''}bbox_pred.weight"]
    assert len(boxes) == (4 if layout.stages == 3 else 4 * (layout.num_classes - 1))
    if layout.mask:
        assert len(theirs["roi_heads.mask_head.predictor.weight"]) == layout.num_classes - 1
    assert any("mask_fcn" in name for name in theirs) == (layout.mask and layout.features == "fpn")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bgr": False, "in_1x1": False, "features": "c4"}])
def test_to_detectron2_and_back(options: dict[str, Any], theirs: SimpleNamespace) -> None:
    kind = theirs.Kind(**options)
    state = theirs.detectron2_names(theirs.draw(kind), kind)
    model = from_detectron2(state, STYLES["caffe" if kind.bgr else "pytorch"])
    back = to_detectron2(model)
    assert set(back) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(back[name], value, rtol=3e-7, atol=0, msg=name)
    said = settings_of(model, Path("back.pth"))
    assert said["INPUT"]["FORMAT"] == ("BGR" if kind.bgr else "RGB")
    assert said["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] == kind.bgr and said["MODEL"]["WEIGHTS"] == "back.pth"
    assert said["MODEL"]["PIXEL_MEAN"] == pytest.approx([103.53, 116.28, 123.675][:: 1 if kind.bgr else -1])


@pytest.mark.slow
@pytest.mark.parametrize("style", ["caffe", "pytorch"])
def test_files_for_detectron2(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Layout("resnet50", "c4", 4, 1, False), STYLES[style])
    monkeypatch.setattr(files, "load_detector", lambda *_: model)
    expected = to_detectron2(model)  # without pixel statistics, which Detectron2 loads strictly without
    for suffix in (".pkl", ".pth", ".safetensors"):
        files.export_detector(tmp_path / "ours.safetensors", tmp_path / f"back{suffix}", "detectron2")
    arrays = pickle.loads((tmp_path / "back.pkl").read_bytes())["model"]
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    for read in (
        {name: torch.from_numpy(value) for name, value in arrays.items()},
        torch.load(tmp_path / "back.pth", weights_only=True)["model"],
        load_file(tmp_path / "back.safetensors"),
    ):
        assert set(read) == set(expected) and all(torch.equal(read[name], expected[name]) for name in expected)
    for suffix in (".pkl", ".pth", ".safetensors"):  # or it would be taken for the zoo's, of other strides and colours
        told = choose_style(read_foreign(tmp_path / f"back{suffix}")[0])
        assert (told.bgr, told.stride_in_1x1) == (style == "caffe", style == "caffe")
    for name in ("back.onnx", "back"):
        with pytest.raises(CheckpointError, match=r"write \.pth or \.safetensors, or \.pkl"):
            files.export_detector(tmp_path / "ours.safetensors", tmp_path / name, "detectron2")


@pytest.mark.slow
def test_what_detectron2_files_carry_besides(theirs: SimpleNamespace, tmp_path: Path) -> None:
    """Pixel means and anchors of old versions; and statistics that are not there are not made up."""
    kind = theirs.Kind()
    raw = theirs.draw(kind)
    state = theirs.detectron2_names(raw, kind)
    plain = from_detectron2(state, STYLES["caffe"]).state_dict()
    more = state | {
        "pixel_mean": torch.tensor([103.53, 116.28, 123.675])[:, None, None],
        "pixel_std": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
    }
    torch.save({"model": more, "iteration": 3}, tmp_path / "model.pth")
    model, saved = import_detector(tmp_path / "model.pth")
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    assert saved.class_names is None
    with pytest.raises(CheckpointError, match="pixel_mean is that of BGR, not RGB"):
        import_detector(tmp_path / "model.pth", "pytorch")
    lacking = {k: v for k, v in state.items() if "res3.1.conv2.norm.running" not in k}
    with pytest.raises(CheckpointError, match=r"2 tensors are missing \(backbone\.bottom_up\.res3\.1\.conv2\.norm"):
        from_detectron2(lacking, STYLES["caffe"])
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(roi_heads\.box_head\.fc2\.bias\)"):
        from_detectron2({k: v for k, v in state.items() if k != "roi_heads.box_head.fc2.bias"}, STYLES["caffe"])
    with pytest.raises(CheckpointError, match="this is an RPN alone"):
        from_detectron2({"proposal_generator.x": torch.zeros(1)}, STYLES["caffe"])


def test_a_detector_that_detectron2_does_not_have() -> None:
    with torch.device("meta"):
        model = zoo.fasterrcnn_resnet50_fpn_v2(num_classes=4)
    with pytest.raises(CheckpointError, match=r"no place in such a detector \(roi_heads\.box_head\.0\.0\.weight"):
        to_detectron2(model)


@pytest.mark.slow
def test_prefixes_and_metadata_of_mmdetection(theirs: SimpleNamespace, tmp_path: Path) -> None:
    kind = theirs.Kind()
    state = theirs.mmdetection_names(theirs.draw(kind), kind)
    counters = {k.replace("running_var", "num_batches_tracked"): torch.tensor(7) for k in state if "running_var" in k}
    config = "model = dict(type='FasterRCNN', backbone=dict(type='ResNet', style='caffe'))"
    files_and_states: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
        "r50_caffe_fpn": ({}, {f"module.{k}": v for k, v in (state | counters).items()}),
        "ema": ({}, {f"ema_{k}": v for k, v in state.items()}),
        "version_2": (
            {"config": config, "CLASSES": tuple("abcde")},
            state | {f"ema_{k.replace('.', '_')}": v for k, v in counters.items()},
        ),
        "version_3": ({"cfg": config, "dataset_meta": {"classes": tuple("abcde"), "palette": None}}, state),
    }
    expected = mmdetection.from_mmdetection(state, STYLES["caffe"]).state_dict()
    for name, (meta, tensors) in files_and_states.items():
        path = tmp_path / f"{name}.pth"
        torch.save({"meta": {"epoch": 12} | meta, "state_dict": tensors}, path)
        model, saved = import_detector(path, "caffe" if name == "ema" else None)
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items()), name
        assert saved.class_names == (list("abcde") if meta else None)
        assert model.recipe is not None and model.recipe["init_args"]["backbone"]["init_args"]["stride_in_1x1"]
        path.unlink()


def test_files_of_mmdetection_that_can_not_be_used() -> None:
    for names, message in (
        (["bbox_head.fc_cls.weight"], "written by MMDetection 1"),
        (["rpn_head.rpn_cls.weight"], "not a Faster, Mask or Cascade R-CNN of MMDetection"),
    ):
        with pytest.raises(CheckpointError, match=message):
            mmdetection.read_layout({name: torch.zeros(1) for name in names})


@pytest.mark.parametrize("classes", [81, 21, 91, 4])
def test_classes_of_known_data_sets(classes: int) -> None:
    names, ids = files._classes(classes, None)
    known = {81: ("toothbrush", 90), 21: ("tvmonitor", 20), 91: ("toothbrush", 90)}
    assert (names is None) == (classes == 4)
    if names and ids:
        assert len(names) == len(ids) == classes - 1 and (names[-1], ids[-1]) == known[classes]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as torchvision publishes it, at an address without a network, and an empty cache."""
    source = tmp_path / "resnet18-5c106cde.pth"
    source.write_bytes(b"not the file that was published")
    fake = Weights(url=source.as_uri(), transforms=lambda: None, meta={})
    monkeypatch.setattr(ResNet18_Weights.DEFAULT, "_value_", fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return source


def test_weights_are_fetched_when_asked(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, target = "ResNet18_Weights.DEFAULT", published.parent / "hub" / "checkpoints" / published.name
    with pytest.raises(CheckpointError, match=r"can't be fetched \(invalid hash value.*put it at .*resnet18-5c106cde"):
        fetch_weights(name)
    assert not target.exists()
    published.unlink()
    with pytest.raises(CheckpointError, match="can't be fetched"):
        fetch_weights(name)
    target.write_bytes(b"from elsewhere")
    assert fetch_weights(name) == target and target.read_bytes() == b"from elsewhere"
    with pytest.raises(CheckpointError, match=r"torchvision has no weights ResNet18_Weights\.BEST"):
        fetch_weights("ResNet18_Weights.BEST")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """What the script ends with: None where all is well, else what it says."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stopped.value.code


@pytest.mark.slow
def test_the_script(
    small: FasterRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = zoo.fasterrcnn_mobilenet_v3_large_fpn(num_classes=91, norm="frozen")
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    ours, back = str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pth")
    source = ("--source", str(tmp_path / "theirs.pth"), "--certificate", "false")
    assert run(monkeypatch, "import", *source, "--output", ours, "--contiguous", "true") is None
    assert "ours.safetensors: 80 classes, 19,3" in capsys.readouterr().out
    assert load_detector(ours).num_classes == 81
    flags = (
        "--source",
        ours,
        "--output",
        back,
        "--to",
        "torchvision",
        "--category_ids",
        "true",
        "--certificate",
        "false",
    )
    assert run(monkeypatch, "export", *flags) is None
    assert "(weights=None, num_classes=91)" in capsys.readouterr().out
    for arguments, message in (
        (("import", "--source", "nowhere.pth", "--output", ours), "error: no checkpoint at nowhere.pth"),
        (("export", "--source", ours, "--output", back, "--to", "detectron2"), "no such"),
        (("download", "--weights", "Nothing.AT_ALL"), "error: torchvision has no weights"),
    ):
        code = run(monkeypatch, *arguments)
        assert message in str(code) or (message == "no such" and code is not None), code
