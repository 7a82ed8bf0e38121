"""What can't be exported, or be used when it is, says why."""

from __future__ import annotations

import sys
import zipfile

import pytest

from detection import (
    AnchorGenerator,
    Detector,
    RoIPool,
    TestTimeAugmentation,
    fasterrcnn_efficientnet_lite0_fpn,
    rcnn_efficientnet_lite0,
)
from detection.__main__ import main as command
from detection.interop.export import ExportError, check_exportable
from detection.interop.exported_files import to_onnx, torch_runner, write_torch_facts
from detection.interop.openvino import to_openvino
from detection.weights import CheckpointError


def test_files_that_do_not_say_enough_are_refused(tmp_path):
    (tmp_path / "d.pt2").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"it can't be read as \.pt2"):
        Detector.from_checkpoint(tmp_path / "d.pt2")
    with zipfile.ZipFile(tmp_path / "d.pt2", "w") as archive:
        archive.writestr("d/version", "3")
    with pytest.raises(CheckpointError, match="does not say its class_names: write it with `detection export`"):
        Detector.from_checkpoint(tmp_path / "d.pt2")


def test_machine_code_of_an_earlier_version_is_not_run(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.pt2", "w") as archive:
        archive.writestr("d/version", "3")
    write_torch_facts(tmp_path / "d.pt2", {"compiled": True, "outputs": ["boxes"]})
    with pytest.raises(ValueError, match=r"d\.pt2: is machine code of an earlier version, .*: export it again"):
        torch_runner(tmp_path / "d.pt2")


def test_without_openvino_the_install_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", pytest)  # stands for a package that is there
    with pytest.raises(ImportError, match=r"pip install .*openvino"):
        to_openvino(build(), tmp_path / "d.xml", {}, "int8")
    assert sys.modules["openvino_telemetry"] is None  # nobody is told that they are imported
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"OpenVINO is not installed: pip install .*openvino"):
        to_openvino(build(), tmp_path / "d.xml", {})


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--output", "d.txt"], "write .onnx, .xml"),
        (["--output", "d.onnx", "--target", "openvino"], "a file of openvino ends in .xml"),
        (["--output", "d.onnx", "--precision", "int8"], "is for OpenVINO"),
        (["--output", "d.onnx", "--target", "tensorrt"], "takes images of one size"),
        (["--output", "d.onnx", "--size", "[4, 5]"], "only TensorRT needs --size"),
        (["--output", "d.onnx", "--target", "tensorrt", "--size", "[4]"], "give height and width"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, reason):
    assert reason in str(command(["export", "--ckpt", "x.ckpt", *flags]))


def build(**arguments):
    return fasterrcnn_efficientnet_lite0_fpn(num_classes=2, weights_backbone=None, **arguments)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: rcnn_efficientnet_lite0(num_classes=2, weights_backbone=None), "Selective Search"),
        (lambda: build(soft_nms_sigma=0.5), "Soft-NMS"),
        (lambda: build(box_roi_pool=RoIPool()), "RoI Pool"),
        (lambda: TestTimeAugmentation(build()), "several times"),
        (
            lambda: build(rpn_anchor_generator=AnchorGenerator(infer_strides=True)),
            "infer_strides",
        ),
    ],
)
def test_what_cannot_be_exported_says_why(make, reason):
    with pytest.raises(ExportError, match=reason):
        check_exportable(make())


def test_without_onnxscript_the_install_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install .*export"):
        to_onnx(build(), tmp_path / "d.onnx", {})
