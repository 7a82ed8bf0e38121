"""Certificates: what a converted file is compared with, where the figures lie, and what a changed weight does."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import detection as reference

from detection.__main__ import main as command
from detection.certificates.certificate import CertificateError, Measured, checksum, path_of, read, rows_of, write
from detection.certificates.certificate_files import read_inside, write_inside
from detection.certificates.certificate_page import shown, verdict, write_page
from detection.certificates.differences import Row, compare
from detection.certificates.making import _round_trip, _same_tensors
from detection.certificates.seen import Picture, drawn
from detection.certificates.sides import Side, Traced, as_tensor
from detection.cli.verifying import broken
from detection.interop.detectron2 import choose_style, from_detectron2
from detection.interop.mmdetection import from_mmdetection
from detection.interop.rows import STYLES

MOBILE = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of torchvision, what `detection convert` makes of it, and the certificate."""
    folder = tmp_path_factory.mktemp("certified")
    torch.manual_seed(0)
    model: Any = getattr(reference, MOBILE)(weights=None, weights_backbone=None, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # statistics of real features, and scores of all sizes, whose order no rounding changes
        model.train().backbone(model.transform([as_tensor(picture.pixels) for picture in drawn()])[0].tensors)
        for layer, spread in ((model.rpn.head.cls_logits, 0.1), (model.roi_heads.box_predictor.cls_score, 0.2)):
            layer.weight.normal_(0, spread)
    torch.save(model.state_dict(), folder / f"{MOBILE}.pth")
    arguments = ["--source", str(folder / f"{MOBILE}.pth"), "--output", str(folder / "ours.safetensors")]
    assert not command(["convert", "import", *arguments])
    return folder


def changed(folder: Path, tmp_path: Path, name: str, by: float) -> Path:
    """A copy of the folder in which one weight of the converted file is another; metadata and certificate stay."""
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "ours.safetensors"
    text = read_inside(file)
    tensors = load_file(file)
    tensors[name].view(-1)[3] += by
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    assert read_inside(file) == text
    return file


@pytest.mark.slow
def test_an_import_states_each_stage_and_holds(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = converted / "ours.safetensors"
    content, wrong = read(file)
    rows = {row.stage: row for row in rows_of(content)}
    stages = ["features, level 0", "anchors of a cell", "RPN objectness", "RPN deltas", "proposals", "boxes", "scores"]
    stages += ["detections without partner", "loss_classifier", "loss_box_reg", "loss_objectness", "gradients"]
    assert not wrong and content["holds"] and content["detections"] > 20 and set(stages) <= set(rows)
    assert all(row.holds for row in rows.values()) and rows["boxes"].difference is not None
    assert rows["boxes"].difference < 1e-3 and content["reference"].startswith("torchvision ")
    assert json.loads(str(read_inside(file))) == json.loads(path_of(file).read_text())
    page = path_of(file).with_suffix(".html").read_text()
    assert "agrees" in page and content["file"]["sha256"] in page and "http" not in page
    assert command(["verify", str(file)]) is None
    said = capsys.readouterr().out
    assert "ours.safetensors holds" in said and "gradients" in said


@pytest.mark.slow
def test_one_changed_weight_fails_by_checksum_and_by_stage(converted: Path, tmp_path: Path) -> None:
    file = changed(converted, tmp_path, "backbone.fpn.layer_blocks.0.0.weight", 0.5)
    said = str(command(["verify", str(file)]))
    assert "something in it was changed" in said and "features, level 0 differ by" in said


def test_what_cannot_be_repeated_ends_with_2(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lonely = tmp_path / "ours.safetensors"
    shutil.copy(converted / "ours.safetensors", lonely)
    assert command(["verify", str(lonely)]) == 2  # its certificate inside is enough to know what is missing
    assert (
        f"{MOBILE}.pth, which ours.safetensors was made of" in (said := capsys.readouterr().err) and "--source" in said
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    assert command(["verify", str(tmp_path / "plain.safetensors")]) == 2
    assert "has no certificate" in capsys.readouterr().err
    assert command(["verify", str(tmp_path / "absent.onnx")]) == 2


def archive(path: Path) -> None:
    torch.save({"a": torch.arange(5.0)}, path)


def graph(path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason='needs pip install "detection[export]"')
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    value = helper.make_tensor_value_info("x", kind, [1])
    node = helper.make_node("Add", ["x", "w"], ["y"])
    weight = helper.make_tensor("w", kind, [1], [2.0])
    body = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", kind, [1])], [weight])
    model = helper.make_model(body)
    model.metadata_props.add(key="class_names", value='["a"]')
    onnx.save(model, path)


def network(path: Path) -> None:
    path.write_text('<?xml version="1.0"?>\n<net name="d">\n<rt_info>\n<detection>\n<class_names value="[]" />\n'
                    "</detection>\n</rt_info>\n</net>\n")  # fmt: skip
    path.with_suffix(".bin").write_bytes(bytes(range(200)))


def tensors(path: Path) -> None:
    save_file({"a": torch.arange(5.0)}, path, {"format": "pt", "detection": "{}"})


@pytest.mark.parametrize(
    ("suffix", "make"), [(".safetensors", tensors), (".pth", archive), (".onnx", graph), (".xml", network)]
)
def test_a_certificate_inside_changes_nothing_else(suffix: str, make: Any, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    make(path)
    before = checksum(path)
    assert read_inside(path) is None
    text = json.dumps({"certificate": 1, "name": 'ü "quoted" <&>'})
    assert write_inside(path, text) and read_inside(path) == text and checksum(path) == before
    if suffix == ".safetensors":
        assert torch.equal(load_file(path)["a"], torch.arange(5.0))
    if suffix == ".pth":
        assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(5.0))
        with zipfile.ZipFile(path) as opened:
            assert opened.testzip() is None
    data = path.with_suffix(".bin") if suffix == ".xml" else path
    content = bytearray(data.read_bytes())
    place = content.find(np.float32(2.0).tobytes()) if suffix != ".xml" else 100  # a weight
    content[place] ^= 1
    data.write_bytes(content)
    if suffix == ".pth":
        with pytest.raises(zipfile.BadZipFile):
            checksum(path)
    else:
        assert checksum(path) != before


def side(name: str = "one", move: float = 0.0, **parts: Any) -> Side:
    """A side that has seen what is given, with one feature moved by so much."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    boxes = some(6, 2) * 100
    found = {"boxes": torch.cat((boxes, boxes + 20), 1), "labels": torch.tensor([1, 1, 2, 2, 3, 3]), "scores": some(6)}
    traced = Traced(found, [some(2, 4, 4)], [some(3, 4) * 50], [some(3, 4, 4)], [some(3, 4, 4, 4)], found["boxes"])
    traced.features[0][1, 2, 3] += move
    return Side(name, lambda _: replace(traced, **{k: v(traced) for k, v in parts.items()}))


PICTURES = [Picture("one", np.zeros((8, 8, 3), np.uint8))]


def moved(name: str, by: float) -> Any:
    """The detections with one value moved."""

    def change(traced: Traced) -> dict[str, Tensor]:
        found = {key: value.clone() for key, value in traced.found.items()}
        found[name].view(-1)[0] += by
        return found

    return change


@pytest.mark.parametrize(
    ("other", "stage", "difference"),
    [
        (side(move=0.25), "features, level 0", 0.25),
        (side(move=float("nan")), "features, level 0", float("nan")),
        (side(features=lambda t: [t.features[0][:1]]), "features, level 0", None),
        (side(anchors=lambda t: [t.anchors[0] + 0.5]), "anchors of a cell", 0.5),
        (side(objectness=lambda t: [t.objectness[0] - 0.1]), "RPN objectness", 0.1),
        (side(deltas=lambda t: [t.deltas[0] + 0.2]), "RPN deltas", 0.2),
        (side(proposals=lambda t: t.proposals[:4]), "proposals without partner", 2),
        (side(proposals=lambda t: t.proposals + 0.125), "proposals", 0.125),
        (side(found=moved("boxes", 0.125)), "boxes", 0.125),
        (side(found=moved("boxes", 30.0)), "detections without partner", 2),
        (side(found=moved("scores", 0.0625)), "scores", 0.0625),
        (side(found=moved("labels", 1)), "detections without partner", 2),
    ],
)
def test_a_difference_is_found_in_its_stage(other: Side, stage: str, difference: float | None) -> None:
    rows, count = compare(other, side("two"), PICTURES)
    beyond = {row.stage: row for row in rows if not row.holds}
    assert list(beyond) == [stage] and count == 6
    found = beyond[stage].difference
    assert found is None if difference is None else found == pytest.approx(difference, rel=1e-4, nan_ok=True)
    same, _ = compare(side(), side("two"), PICTURES)
    assert all(row.holds and row.difference == 0 for row in same)
    told = [replace(row, tolerance=beyond[stage].tolerance) if row.stage == stage else row for row in same]
    (sentence,) = broken(told, Measured("two", rows=rows))
    assert sentence.startswith(stage)
    assert broken([replace(row, tolerance=None) for row in told], Measured("two", rows=rows)) == []


def test_anchors_and_detections_in_another_order_are_the_same() -> None:
    turned = torch.tensor([2, 0, 1])
    other = side(
        anchors=lambda t: [t.anchors[0][turned]],
        objectness=lambda t: [t.objectness[0][turned]],
        deltas=lambda t: [t.deltas[0][turned]],
        found=lambda t: {name: value.flip(0) for name, value in t.found.items()},
        proposals=lambda t: t.proposals.flip(0),
    )
    rows, _ = compare(side(), other, PICTURES)
    assert len(rows) == 9 and all(row.difference == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["Detectron2", "MMDetection"])
def test_without_the_library_tensors_are_taken_back_bit_for_bit(theirs: SimpleNamespace, library: str) -> None:
    kind = theirs.Kind(mask=True)
    raw = theirs.draw(kind)
    if library == "Detectron2":
        state = theirs.detectron2_names(raw, kind)
        model = from_detectron2(state, choose_style(state, None))
    else:
        state = theirs.mmdetection_names(raw, kind)
        model = from_mmdetection(state, STYLES["caffe"])
    rows = _round_trip(model, state)
    assert [row.stage for row in rows] == ["tensors, taken back", "first convolution, taken back"]
    assert rows[0].difference == 0 and all(row.holds for row in rows) and rows[0].note == f"{len(state) - 1} tensors"
    again, name = _same_tensors(model, model), next(name for name in state if "deltas" in name or "rpn_reg" in name)
    assert again.difference == 0 and again.holds
    state = {**state, name: state[name].clone()}
    state[name].view(-1)[0] += 1e-6
    (first, _) = _round_trip(model, state)
    assert first.where == name and not first.holds


def test_scenes_are_the_same_for_everybody_and_have_objects() -> None:
    first, again = drawn(), drawn()
    assert [p.as_dict() for p in first] == [p.as_dict() for p in again] and len(first) == 2
    for picture in first:
        assert picture.target is not None and len(picture.target["boxes"]) >= 3
        boxes, (height, width) = picture.target["boxes"], picture.pixels.shape[:2]
        for box, mask in zip(boxes.long().tolist(), picture.target["masks"], strict=True):
            assert mask[box[1] : box[3], box[0] : box[2]].sum() == mask.sum() > 0
        assert bool((boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all())
    assert drawn(size=(64, 96))[0].pixels.shape == (64, 96, 3)


def test_a_certificate_is_read_as_data_and_never_trusted(tmp_path: Path) -> None:
    file, source = tmp_path / "a.safetensors", tmp_path / "b.pth"
    tensors(file)
    archive(source)
    rows = [Row("boxes", "pixels", float("nan"), 0.01, "<script>"), Row("scores", "", 0.5, None)]
    pictures = drawn(count=1)
    content = write(file, source, "import", {}, Measured("them", rows=rows, detections=3), pictures, {"drawn": 0})
    assert not content["holds"] and content["rows"][0]["difference"] is None and "boxes" in verdict(content)
    write_page(tmp_path / "a.html", content, pictures)
    assert "<script>" not in (tmp_path / "a.html").read_text().replace("<script></script>", "")
    assert read(file)[1] == []
    path_of(file).write_text(json.dumps({**content, "holds": True}))
    assert "is not the one in" in read(file)[1][0]
    odd = [{**content, "certificate": 9}, {**content, "images": {"drawn": 0}}, {**content, "accuracy": {"lost": "no"}}]
    odd += [{**content, "rows": [{**content["rows"][1], "difference": "0"}]}, {**content, "source": {"name": "b"}}]
    for text in ("{", "[]", '{"certificate": 1}', '{"rows": [{"a": 1}]}', *map(json.dumps, odd)):
        path_of(file).write_text(text)
        with pytest.raises(CertificateError, match="certificate"):
            read(file)


def test_figures_are_said_in_two_digits() -> None:
    assert [shown(value) for value in (None, 0.0, 3.0, 4.577e-5)] == ["not comparable", "0", "3", "4.6e-05"]
