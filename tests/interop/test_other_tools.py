"""FiftyOne and SAHI get what was found; the lines of the page on other tools run as they stand there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detection import fasterrcnn_efficientnet_lite0_fpn, save_detector
from detection.data.spectral import RGB
from detection.interop.sahi import to_sahi
from tests.inference.blobs import Blobs, scene

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "other-tools.md"
NEEDED = {"supervision": "supervision", "FiftyOne": "fiftyone", "SAHI": "sahi"}


@pytest.mark.parametrize("heading", NEEDED)
def test_the_lines_of_the_page_run(heading, tmp_path, monkeypatch):
    pytest.importorskip(NEEDED[heading], reason=f"{NEEDED[heading]} is not installed", exc_type=ImportError)
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    torch.manual_seed(0)
    model = fasterrcnn_efficientnet_lite0_fpn(num_classes=3, weights_backbone=None, min_size=64, max_size=96)
    save_detector(tmp_path / "best.ckpt.safetensors", model, ["cell", "nucleus"])
    Image.fromarray(np.zeros((160, 200, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("best.ckpt", "best.ckpt.safetensors"), {})


class SahiBlobs(Blobs):
    form, device, model = RGB, "cpu", SimpleNamespace(has_masks=True)

    def __call__(self, image):
        return self._find(image)


def test_sahi_puts_the_tiles_together():
    predict = pytest.importorskip("sahi.predict", reason="sahi is not installed", exc_type=ImportError)
    image = scene(120, 160, (0, 10, 10, 30, 40), (2, 50, 20, 70, 50), (0, 90, 70, 110, 110))
    model = to_sahi(SahiBlobs(), confidence_threshold=0.5)
    sizes = {"slice_height": 60, "slice_width": 60, "overlap_height_ratio": 0.6, "overlap_width_ratio": 0.6}
    for found in (
        predict.get_prediction(image, model).object_prediction_list,
        predict.get_sliced_prediction(image, model, **sizes, verbose=0).object_prediction_list,
    ):
        rows = sorted((p.category.name, *map(round, p.bbox.to_xyxy())) for p in found)
        boxes = np.array([row[1:] for row in rows])
        assert [row[0] for row in rows] == ["blue", "red", "red"]
        wanted = np.array([(50, 20, 70, 50), (10, 10, 30, 40), (90, 70, 110, 110)])
        assert np.abs(boxes - wanted).max() <= 1  # a polygon ends in the middle of its last pixel


def test_without_sahi_the_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sahi.models.base", None)
    with pytest.raises(ImportError, match=r"pip install --no-deps sahi"):
        to_sahi(SahiBlobs())


def check_fiftyone(theirs):
    blue = theirs.detections[1]
    assert [d.label for d in theirs.detections] == ["red", "blue"]
    assert blue.bounding_box == pytest.approx([50 / 80, 20 / 60, 20 / 80, 30 / 60])
    assert blue.mask.shape == (30, 20) and blue.mask.all() and 0.5 < blue.confidence < 1


def test_fiftyone_gets_shares_of_the_sides_and_masks_of_the_boxes(monkeypatch):
    """With a stand-in that keeps what it is given, so that it runs where FiftyOne and its database are absent."""
    found = Blobs()._find(scene(60, 80, (0, 10, 10, 30, 40), (2, 50, 20, 70, 50)))
    keep = SimpleNamespace(
        Detection=lambda **kept: SimpleNamespace(**kept), Detections=lambda **kept: SimpleNamespace(**kept)
    )
    monkeypatch.setitem(sys.modules, "fiftyone", keep)
    check_fiftyone(found.to_fiftyone())
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(ImportError, match=r"pip install .*fiftyone"):
        found.to_fiftyone()


@pytest.mark.rehearsal
def test_fiftyone_itself():
    pytest.importorskip("fiftyone", reason="fiftyone is not installed")
    check_fiftyone(Blobs()._find(scene(60, 80, (0, 10, 10, 30, 40), (2, 50, 20, 70, 50))).to_fiftyone())
