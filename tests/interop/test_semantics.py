"""Converted detectors against what their libraries compute, and variants that must not pass for right."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from detection.interop import files, load_detector, save_detector
from detection.interop.detectron2 import from_detectron2
from detection.interop.rows import Style
from detection.models.two_stage import FasterRCNN
from detection.parts import FeatureMaps

TOLERANCE = 1e-4
FAR = 1e-2  # what a wrong variant differs by at least, relative to the size of the features

KINDS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    # library, what is drawn, the style to be given
    "detectron2, model zoo": ("detectron2", {}, None),
    "detectron2, torchvision's backbone": ("detectron2", {"bgr": False, "in_1x1": False}, "pytorch"),
    "detectron2, C4": ("detectron2", {"features": "c4", "mask": True}, None),
    "detectron2, DC5": ("detectron2", {"features": "dc5"}, None),
    "detectron2, DC5 with the stride in the 3x3": ("detectron2", {"features": "dc5", "in_1x1": False}, None),
    "mmdetection, pytorch": ("mmdetection", {"bgr": False, "in_1x1": False}, None),
    "mmdetection, caffe": ("mmdetection", {"mask": True}, "caffe"),
}


def write(folder: Path, theirs: SimpleNamespace, library: str, kind: Any, raw: dict[str, Tensor]) -> Path:
    """A file as the library writes it."""
    if library == "detectron2":
        arrays = {name: value.numpy() for name, value in theirs.detectron2_names(raw, kind).items()}
        path = folder / "model_final.pkl"
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    else:
        path = folder / "epoch_12.pth"
        meta = {"CLASSES": ("a", "b", "c", "d", "e"), "epoch": 12, "config": "type='FasterRCNN'"}
        torch.save({"meta": meta, "state_dict": theirs.mmdetection_names(raw, kind)}, path)
    return path


def our_features(model: FasterRCNN, image: Tensor) -> list[Tensor]:
    model.transform.min_size, model.transform.max_size = (image.shape[-2],), image.shape[-1]
    return list(model.extract(model.transform([image], None, model.num_classes)).maps)


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_converted_detector_computes_what_its_library_does(
    name: str, theirs: SimpleNamespace, photograph: Tensor, tmp_path: Path
) -> None:
    library, options, style = KINDS[name]
    kind = theirs.Kind(**options)
    raw = theirs.draw(kind)
    reference = theirs.Reference(raw, kind)
    if kind.features == "fpn":  # through the file that conversion writes, and from it without any setting
        source = write(tmp_path, theirs, library, kind, raw)
        model, saved = files.import_detector(source, style)  # type: ignore[arg-type]
        save_detector(tmp_path / "ours.safetensors", model, saved.class_names, saved.category_ids)
        model = load_detector(tmp_path / "ours.safetensors")
        assert not model.training and model.num_classes == 6
        assert saved.class_names == (["a", "b", "c", "d", "e"] if library == "mmdetection" else None)
    else:
        model = from_detectron2(theirs.detectron2_names(raw, kind), Style(kind.in_1x1, True)).eval()
        photograph = photograph[:, :123, :157]  # without a pyramid there is no padding

    expected = reference.features(photograph)
    features = our_features(model, photograph)
    assert len(features) == len(expected)
    for ours, wanted in zip(features, expected, strict=True):
        assert wanted.std() > 0.05 and relative(ours, wanted) < TOLERANCE

    maps = FeatureMaps(tuple(features), model.strides)
    logits, deltas = model.rpn.predict(maps, with_losses=False)
    shapes = [(f.shape[-2], f.shape[-1]) for f in features]
    anchors = model.rpn.anchor_generator(shapes, model.strides, tuple(photograph.shape[-2:]))
    for logit, delta, anchor, (wanted_logits, wanted_boxes) in zip(
        logits, deltas, anchors, reference.rpn(expected), strict=True
    ):
        boxes = model.rpn.box_coder.decode(delta[0], anchor)
        if kind.features != "fpn":  # their order of 15 anchors in a cell is another
            ours = torch.cat((logit[0, :, None], boxes), dim=1).unflatten(0, (-1, 3, 5)).transpose(1, 2).flatten(0, 2)
            logit, boxes = ours[None, :, 0], ours[:, 1:]
        torch.testing.assert_close(logit[0], wanted_logits, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(boxes, wanted_boxes, atol=1e-3, rtol=TOLERANCE)

    proposals = reference.proposals(expected, pre_nms=1000 if kind.features == "fpn" else 6000)
    some = proposals[:: max(1, len(proposals) // 24)]
    logits, deltas = model.roi_heads.predict(maps, some[None])
    wanted_logits, wanted_deltas = reference.head(expected, some)
    assert wanted_logits.std() > 0.3
    torch.testing.assert_close(logits[0], wanted_logits.roll(1, dims=1), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(deltas[0, :, 1:].flatten(1), wanted_deltas, atol=TOLERANCE, rtol=TOLERANCE)
    assert not deltas[0, :, 0].any()
    if kind.mask:
        assert_same_masks(model, reference, features, some)


def assert_same_masks(model: Any, reference: Any, features: list[Tensor], boxes: Tensor) -> None:
    labels = torch.arange(len(boxes)) % 5
    masks = model.roi_heads.mask_logits(FeatureMaps(tuple(features), model.strides), boxes[None], labels[None] + 1)[
        0
    ].sigmoid()
    wanted = reference.masks(features, boxes, labels)
    assert wanted.std() > 0.05
    torch.testing.assert_close(masks, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["detectron2", "mmdetection"])
@torch.no_grad()
def test_a_converted_cascade(library: str, theirs: SimpleNamespace, photograph: Tensor, tmp_path: Path) -> None:
    """Detectron2 averages probabilities, MMDetection logits; and the deltas of the last stage differ a little."""
    kind = theirs.Kind(stages=3, mask=library == "detectron2")
    raw = theirs.draw(kind)
    reference = theirs.Reference(raw, kind)
    model, _ = files.import_detector(write(tmp_path, theirs, library, kind, raw), "caffe")
    save_detector(tmp_path / "ours.safetensors", model)
    model = load_detector(tmp_path / "ours.safetensors")
    model.transform.min_size, model.transform.max_size = (photograph.shape[-2],), photograph.shape[-1]
    features = reference.features(photograph)
    stds = (0.033, 0.033, 0.067, 0.067)
    last = tuple(1 / s for s in stds) if library == "mmdetection" else (30, 30, 15, 15)
    weights = [(10, 10, 5, 5), (20, 20, 10, 10), last]
    outputs = reference.cascade(features, reference.proposals(features), weights)
    logits = torch.stack([stage_logits for stage_logits, _ in outputs])
    by_probability, by_logit = logits.softmax(dim=-1).mean(dim=0), logits.mean(dim=0).softmax(dim=-1)
    assert (by_probability - by_logit).abs().max() > 100 * TOLERANCE
    scores = (by_probability if library == "detectron2" else by_logit)[:, :-1]
    boxes = outputs[-1][1][:, None].expand(-1, scores.shape[1], -1)
    boxes, scores, labels = reference.select(boxes, scores)
    (detected,) = model([photograph])
    assert len(boxes) > 10 and scores.std() > 0.05
    torch.testing.assert_close(detected["scores"], scores, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(detected["boxes"], boxes, atol=1e-3, rtol=0)
    assert torch.equal(detected["labels"], labels + 1)
    if kind.mask:
        assert_same_masks(model, reference, features, boxes[:24])


@pytest.mark.slow
@torch.no_grad()
def test_detections_of_a_converted_detector(theirs: SimpleNamespace, photograph: Tensor, tmp_path: Path) -> None:
    kind = theirs.Kind()
    raw = theirs.draw(kind)
    reference = theirs.Reference(raw, kind)
    model, _ = files.import_detector(write(tmp_path, theirs, "detectron2", kind, raw))
    model.eval()
    model.transform.min_size, model.transform.max_size = (photograph.shape[-2],), photograph.shape[-1]
    features = reference.features(photograph)
    boxes, scores, labels = reference.detect(features, reference.proposals(features))
    (detected,) = model([photograph])
    assert len(boxes) > 10 and len(labels.unique()) > 1 and scores.std() > 0.05
    torch.testing.assert_close(detected["scores"], scores, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(detected["boxes"], boxes, atol=1e-3, rtol=0)
    assert torch.equal(detected["labels"], labels + 1)


@pytest.mark.slow
@torch.no_grad()
def test_every_wrong_reading_shows(theirs: SimpleNamespace, photograph: Tensor) -> None:
    """The stride, the colours and the backbone's style as a whole, each wrong alone."""
    kind = theirs.Kind()
    raw = theirs.draw(kind)
    state, reference = theirs.detectron2_names(raw, kind), theirs.Reference(raw, kind)
    expected = reference.features(photograph)

    def difference(style: Style, state: dict[str, Tensor] = state) -> float:
        features = our_features(from_detectron2(state, style).eval(), photograph)
        return max(relative(ours, wanted) for ours, wanted in zip(features, expected, strict=True))

    assert difference(Style(stride_in_1x1=True, bgr=True)) < TOLERANCE
    for style in (Style(False, True), Style(True, False), Style(False, False)):
        assert difference(style) > FAR
    # The right scale, but red and blue in each other's place.
    swapped = {**state, "backbone.bottom_up.stem.conv1.weight": raw["stem.weight"][:, [2, 1, 0]]}
    assert difference(Style(True, True), swapped) > FAR


@pytest.mark.slow
@torch.no_grad()
def test_torchvisions_semantics_are_others(theirs: SimpleNamespace, photograph: Tensor) -> None:
    """RoI Align without alignment, rounded anchors and anchors in the other order would show in the tests above."""
    kind = theirs.Kind()
    raw = theirs.draw(kind)
    reference = theirs.Reference(raw, kind)
    model = from_detectron2(theirs.detectron2_names(raw, kind), Style(True, True)).eval()
    expected = reference.features(photograph)
    boxes = reference.proposals(expected)[:20]
    wanted, _ = reference.head(expected, boxes)

    maps = FeatureMaps(tuple(expected), model.strides)

    def difference() -> float:
        return float((model.roi_heads.predict(maps, boxes[None])[0][0].roll(-1, 1) - wanted).abs().max())

    assert difference() < TOLERANCE
    model.roi_heads.box_roi_pool.aligned = False
    assert difference() > FAR
    model.roi_heads.box_roi_pool.aligned, model.roi_heads.box_roi_pool.sampling_ratio = True, 2
    assert difference() > 10 * TOLERANCE
    rounded = torch.tensor([[-23.0, -11, 23, 11]])
    assert (model.rpn.anchor_generator._cells[0][:1] - rounded).abs().max() > 0.3
