"""`predict --runtime`: the same detections from a file beside the checkpoint, which follows the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.cli import predict
from detection.inference import runtimes
from detection.inference.runtimes import file_of
from detection.interop import save_detector
from detection.interop.exported_files import read_facts, write_facts
from detection.models.two_stage import TwoStageDetector


def run(ckpt: Path, photos: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    flags = ("--ckpt", str(ckpt), "--source", str(photos), "--output", str(output), "--score_thresh", "0", *flags)
    assert predict.main([*flags, "--pictures", "false"]) is None
    found: list[dict[str, Any]] = json.loads((output / "predictions.json").read_text())["annotations"]
    return found


@pytest.fixture
def ckpt(model: TwoStageDetector, tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_detector(path, model, ("a", "b"))
    return path


@pytest.mark.rehearsal  # an export takes half a minute
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_finds_what_pytorch_finds(
    runtime: Any, ckpt: Path, photos: Path, model: TwoStageDetector, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    plain = run(ckpt, photos, tmp_path / "plain")
    found = run(ckpt, photos, tmp_path / "other", "--runtime", runtime)
    assert [(a["image_id"], a["category_id"]) for a in found] == [(a["image_id"], a["category_id"]) for a in plain]
    for key, tolerance in (("bbox", 0.01), ("score", 1e-4)):
        torch.testing.assert_close(*(torch.tensor([a[key] for a in rows]) for rows in (found, plain)),
                                   rtol=0, atol=tolerance)  # fmt: skip


def test_a_file_is_written_again_for_other_weights_alone(
    ckpt: Path, model: TwoStageDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, Any]] = []

    onnx = pytest.importorskip("onnx")

    def write(model: TwoStageDetector, path: Path, facts: dict[str, Any]) -> None:
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), path)
        write_facts(path, facts)
        written.append(facts)

    monkeypatch.setattr(runtimes, "to_onnx", write)
    path = file_of(ckpt, "onnxruntime")
    assert path == ckpt.with_suffix(".onnxruntime.onnx") and file_of(ckpt, "onnxruntime") == path and len(written) == 1
    assert read_facts(path) == written[0] and written[0]["class_names"] == ["a", "b"]
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[1] += 1
    save_detector(ckpt, model, ("a", "b"))
    assert file_of(ckpt, "onnxruntime") == path and len(written) == 2
    monkeypatch.setattr(runtimes, "code_version", lambda: "another")
    assert file_of(ckpt, "onnxruntime") == path and len(written) == 3
    assert {p.name for p in ckpt.parent.iterdir()} == {ckpt.name, path.name}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--runtime", "openvino", "--device", "cuda"], "--device cuda is not for --runtime openvino"),
        (["--runtime", "onnxruntime", "--precision", "bf16"], "--precision bf16 is not for --runtime onnxruntime"),
        (["--runtime", "tensorflow"], "tensorflow"),
    ],
)
def test_what_a_runtime_does_not_have_is_said(
    flags: list[str], said: str, ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        told = predict.main(["--ckpt", str(ckpt), "--source", str(photos), *flags])
    except SystemExit:
        told = capsys.readouterr().err
    assert said in (told or "")


def test_an_exported_file_has_its_runtime(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exported already"):
        file_of(tmp_path / "d.onnx", "onnxruntime")
