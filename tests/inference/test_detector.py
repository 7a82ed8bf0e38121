"""Detection outside of training: any form of image, what is found, and what can be done with it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from detection import maskrcnn_efficientnet_lite0_fpn, save_detector
from detection.data.augment import eval_transform
from detection.data.coco import read_coco
from detection.data.dataset import DetectionDataset, collate
from detection.inference import Detections, Detector, Tiles, predict
from detection.inference.run import detect_tiled
from detection.inference.sources import open_source
from detection.training.encoding import encode_detections, grid_of
from detection.weights import CheckpointError
from tests.inference.blobs import NAMES, Blobs, scene


def test_every_form_of_an_image_gives_the_same(model, tmp_path):
    detector = Detector(model, NAMES)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), planes, planes / 255]
    first = detector(pixels)
    assert len(first) == 5 and first.names[0] in NAMES and first.size == (60, 80)
    assert (np.diff(first.scores) <= 0).all()
    for form in forms:
        other = detector(form)
        np.testing.assert_array_equal(other.boxes, first.boxes)
        assert other.masks == first.masks


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"\(H, W, 3\) uint8"),
        (np.zeros((4, 4, 3)), r"\(H, W, 3\) uint8"),
        (torch.zeros(4, 4, 3), r"must be \(3, H, W\)"),
        (torch.full((3, 4, 4), 255.0), r"in \[0, 1\]"),
    ],
)
def test_no_image_is_said_to_be_none(model, image, message):
    with pytest.raises(ValueError, match=message):
        Detector(model, NAMES)(image)


def test_detections_are_those_of_the_evaluation_pipeline(model, tmp_path):
    rng = np.random.default_rng(0)
    images = []
    for i, (height, width) in enumerate([(60, 80), (90, 50), (64, 64)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    dataset = DetectionDataset(read_coco(tmp_path, "a.json", ""), eval_transform(64, 96))
    batch = collate([dataset[i] for i in range(3)])
    with torch.no_grad():
        wanted = encode_detections(model.for_inference().run(batch, False, True)[1], batch, grid_of(model))
    found = Detector(model, NAMES).predict([tmp_path / f"{i}.png" for i in range(3)])
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours.boxes, theirs["boxes"].numpy())
        np.testing.assert_array_equal(ours.scores, theirs["scores"].numpy())
        assert list(ours.masks) == theirs["masks"]


def test_a_file_brings_its_class_names(model, tmp_path):
    save_detector(tmp_path / "d.safetensors", model, NAMES, (7, 90))
    detector = Detector.from_checkpoint(tmp_path / "d.safetensors")
    pixels = scene(60, 80, (0, 10, 10, 30, 40))
    assert detector.class_names == NAMES and detector.category_ids == (7, 90)
    np.testing.assert_allclose(detector(pixels).boxes, Detector(model, NAMES)(pixels).boxes, atol=1e-3)
    save_detector(tmp_path / "nameless.safetensors", model)
    with pytest.raises(CheckpointError, match="does not name its classes"):
        Detector.from_checkpoint(tmp_path / "nameless.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Detector.from_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_without_images_is_refused(size, model, photos, tmp_path):
    detector, pixels = Detector(model, NAMES), scene(60, 80)
    calls = [
        lambda: detector.predict([pixels], batch_size=size),
        lambda: predict(detector, open_source(str(photos)), tmp_path / "out", batch_size=size),
        lambda: detect_tiled(detector, pixels, Tiles(32), size),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"batch_size is {size}: it must be at least 1"):
            call()
    assert not (tmp_path / "out").exists()


def test_half_precision_finds_boxes_in_float32(model):
    found = Detector(model, NAMES, precision="bf16")(scene(60, 80, (0, 10, 10, 30, 40)))
    assert found.boxes.dtype == np.float32 and np.isfinite(found.boxes).all()


def test_filters_and_coco():
    found = Blobs()._find(scene(60, 80, (0, 10, 10, 30, 40), (2, 50, 20, 70, 50), (0, 1, 1, 4, 4)))
    assert found.names == ["red", "red", "blue"]
    assert found.of(["blue"]).boxes.tolist() == [[50, 20, 70, 50]]
    assert len(found.above(0.505)) == 2 and len(found.above(1)) == 0
    with pytest.raises(ValueError, match=r"no class 'green'.*red, blue"):
        found.of(["green"])
    entry = found.of(["blue"]).to_coco(3, (7, 90))[0]
    assert (entry["image_id"], entry["category_id"], entry["bbox"]) == (3, 90, [50, 20, 20, 30])
    assert mask_api.area(entry["segmentation"]) == 600
    assert found.bitmaps().sum(axis=(1, 2)).tolist() == [9, 600, 600]


@pytest.mark.parametrize(("size", "drawn"), [((60, 80), (320, 240)), ((400, 300), (300, 400))])
def test_pictures_have_room_for_names(size, drawn):
    found = Detections(np.array([[5, 5, 40, 30]], np.float32), np.array([1]), np.array([0.9]), tuple(NAMES), size)
    picture = found.draw(np.zeros((*size, 3), np.uint8))
    assert picture.size == drawn  # width and height: its own where a name can be read


def test_supervision_gets_boxes_masks_and_names():
    supervision = pytest.importorskip("supervision", reason='needs pip install "detection[supervision]"')
    found = Blobs()._find(scene(60, 80, (0, 10, 10, 30, 40), (2, 50, 20, 70, 50)))
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert theirs.xyxy.tolist() == found.boxes.tolist() and theirs.class_id.tolist() == [0, 1]
    assert theirs.data["class_name"].tolist() == ["red", "blue"] and theirs.mask.sum() == 1200
    assert len(found.above(1).to_supervision()) == 0


def test_supervision_draws_the_key_points():
    supervision = pytest.importorskip("supervision", reason='needs pip install "detection[supervision]"')
    found = Blobs()._find(scene(60, 80, (0, 10, 10, 30, 40), (2, 50, 20, 70, 50)))
    with pytest.raises(ValueError, match="finds no key points: take to_supervision"):
        found.to_supervision_keypoints()
    points = np.array([[[12, 14, 1], [25, 35, 1]], [[55, 25, 1], [66, 44, 1]]], np.float32)
    found = replace(found, keypoints=points, keypoint_scores=np.full((2, 2), 7.5, np.float32))
    theirs = found.to_supervision_keypoints()
    assert theirs.data["class_name"].tolist() == ["red", "blue"] and theirs.class_id.tolist() == [0, 1]
    assert theirs.detection_confidence.tolist() == found.scores.tolist()
    drawn = supervision.VertexAnnotator(radius=1).annotate(np.zeros((60, 80, 3), np.uint8), theirs).any(axis=2)
    assert all(drawn[int(y), int(x)] for x, y, _ in points.reshape(-1, 3)) and drawn.sum() < 4 * 12
    assert len(found.above(1).to_supervision_keypoints()) == 0


def test_without_supervision_the_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install .*supervision"):
        Blobs()._find(scene(8, 8)).to_supervision()


def test_detections_of_one_image_draw_themselves_in_a_notebook():
    pixels = scene(60, 80)
    model = maskrcnn_efficientnet_lite0_fpn(num_classes=3, weights_backbone=None, box_score_thresh=0.0)
    kept = Detector(model, NAMES, min_size=64, max_size=64, device="cpu")(pixels)
    assert (kept.pixels == pixels).all() and kept._repr_png_().startswith(b"\x89PNG")
    found = replace(Blobs().predict([pixels])[0], pixels=pixels)
    shown = Image.open(BytesIO(found._repr_png_()))
    assert shown.size == (320, 240)
    assert (np.asarray(shown) == np.asarray(found.draw(pixels, side=320))).all()
    assert found.above(2.0).pixels is pixels and replace(found, pixels=None)._repr_png_() is None
    with pytest.raises(ValueError, match="don't keep their image"):
        replace(found, pixels=None).draw()
