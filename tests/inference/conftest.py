"""What the tests of detection outside of training share: a small detector, and a folder as people have it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from detection import maskrcnn_efficientnet_lite0_fpn
from tests.inference.blobs import scene


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return maskrcnn_efficientnet_lite0_fpn(
        num_classes=3, weights_backbone=None, box_score_thresh=0.0, box_detections_per_img=5, min_size=64, max_size=96
    )


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(scene(60, 80, (0, 10, 10, 30, 40))).save(folder / "a.png")
    Image.fromarray(scene(60, 80, (2, 50, 20, 70, 50), (0, 5, 5, 25, 25))).save(folder / "more" / "b.png")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "notes.txt").write_text("no image either")
    return folder
