"""Pictures that are looked at in tiles: every object once and whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from detection import save_detector
from detection.cli.predict import predict_in
from detection.data import rle
from detection.data.records import DataError
from detection.data.spectral import RGB
from detection.inference import Detector, Tiles, predict
from detection.inference.run import detect_tiled
from detection.inference.sources import open_source
from detection.tiling import merge_tiles, shift_mask
from detection.weights import read_saved
from tests.inference.blobs import NAMES, Blobs, scene


def test_huge_pictures_are_looked_at_in_tiles(photos, tmp_path, monkeypatch):
    class Near(Blobs):
        form = RGB
        min_size, seen, _divisor = 100, [], 32

        def predict(self, images, batch_size=8):
            assert len(images) <= batch_size
            self.seen += [image.shape[:2] for image in images]
            return super().predict(images)

    rectangles = [(0, 70, 30, 95, 60), (2, 120, 90, 150, 120)]
    Image.fromarray(scene(150, 200, *rectangles)).save(photos / "aerial.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14_000)
    for module in ("data.headers", "data.images", "inference.run"):
        monkeypatch.setattr(f"detection.{module}.LARGEST", 20_000)
    monkeypatch.setattr("detection.inference.run.DRAWN", 120)
    done = predict(Near(), open_source(str(photos)), tmp_path / "out", batch_size=3)
    assert done.images == 3 and done.counts == {"red": 3, "blue": 2}
    assert Near.seen == [(60, 80), (100, 100)] + [(100, 100)] * 5 + [(60, 80)]
    (note,) = done.notes
    assert note.startswith("aerial.tif: 150 x 200 pixels (height x width), looked at in tiles of 100")
    assert Image.open(tmp_path / "out" / "annotated" / "aerial.tif").size == (120, 90)
    document = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sorted(entry["bbox"] for entry in document["annotations"])[3:] == [[70, 30, 25, 30], [120, 90, 30, 30]]
    with pytest.raises(DataError, match=r"aerial.tif: 150x200 pixels .* too many"):
        Detector.predict(Near(), [photos / "aerial.tif"])


def test_windows_cover_the_image_with_overlap():
    for height, width in [(100, 100), (250, 999), (101, 100), (333, 70)]:
        seen = np.zeros((height, width), int)
        windows = Tiles(100, 0.2).windows(height, width)
        for x1, y1, x2, y2 in windows:
            seen[y1:y2, x1:x2] += 1
            assert x2 - x1 == min(100, width) and y2 - y1 == min(100, height)
        assert seen.min() == 1
        starts = sorted({x for x, *_ in windows})
        assert all(b - a <= 80 for a, b in zip(starts, starts[1:], strict=False))
    with pytest.raises(ValueError, match="tiles of 0 pixels"):
        Tiles(0)


@pytest.mark.parametrize(
    "rectangles",
    [
        [(0, 70, 30, 95, 60)],  # across the border of two tiles, whole in neither or one
        [(0, 20, 20, 60, 60), (2, 65, 65, 95, 95)],  # across a corner of four
        [(0, 10, 40, 190, 60)],  # longer than a tile
        [(0, 85, 10, 95, 20), (0, 85, 24, 95, 34)],  # two neighbours inside the overlap
        [(0, 0, 0, 200, 150)],  # everything
        [(0, 78, 10, 82, 40), (0, 84, 10, 100, 40), (2, 100, 10, 120, 40)],
    ],
)
def test_objects_on_tile_borders_are_found_once_and_whole(rectangles):
    image = scene(150, 200, *rectangles)
    found = detect_tiled(Blobs(), image, Tiles(100, 0.25))
    whole = Blobs()._find(image)
    order = np.lexsort(found.boxes.T)
    assert found.boxes[order].tolist() == whole.boxes[np.lexsort(whole.boxes.T)].tolist()
    assert found.size == (150, 200)
    masks = found.bitmaps()[order]
    np.testing.assert_array_equal(masks, whole.bitmaps()[np.lexsort(whole.boxes.T)])


def test_mask_of_a_window_moves():
    mask = np.random.default_rng(0).random((20, 30)) > 0.5
    mask[:, 4:7] = True
    for corner, size in [((5, 7), (40, 50)), ((0, 0), (20, 30)), ((20, 0), (20, 50))]:
        laid = np.zeros(size, bool)
        laid[corner[1] : corner[1] + 20, corner[0] : corner[0] + 30] = mask
        moved = shift_mask(rle.encode(mask), corner, size)
        np.testing.assert_array_equal(mask_api.decode(moved), laid)
        assert moved["counts"] == rle.encode(laid)["counts"]


def test_predict_looks_at_the_tiles_of_the_training(model, photos, tmp_path, monkeypatch, capsys):
    seen = list[Tiles | None]()
    monkeypatch.setattr("detection.cli.predict.predict", lambda *args, **_: seen.append(args[6]) or Done())

    class Done:
        images, counts, left_out, notes, problems = 1, {}, {}, (), ()

    whole, tiled, other = (tmp_path / f"{name}.safetensors" for name in ("whole", "tiled", "other"))
    save_detector(whole, model, NAMES)
    save_detector(tiled, model, NAMES, tiles=(40, 0.25))
    save_detector(other, model, NAMES, tiles=(50, 0.25))
    source = str(photos)
    predict_in(whole, source, tmp_path / "o")
    assert "looked at in" not in capsys.readouterr().out
    predict_in(tiled, source, tmp_path / "o")
    assert "looked at in tiles of 40 pixels, overlap 0.25, as it was trained (--tile sets it" in capsys.readouterr().out
    predict_in(tiled, source, tmp_path / "o", tile=0)
    predict_in(tiled, source, tmp_path / "o", tile=64)
    predict_in(whole, source, tmp_path / "o", tile=64)
    predict_in(tiled, source, tmp_path / "o", overlap=0.5)
    assert seen == [None, Tiles(40, 0.25), None, Tiles(64, 0.25), Tiles(64, 0.2), Tiles(40, 0.5)]
    with pytest.raises(DataError, match="were trained on different tiles: give --tile, 0 for whole images"):
        predict_in([tiled, other], source, tmp_path / "o", fuse="wbf")
    with pytest.raises(DataError, match="--overlap is that of tiles"):
        predict_in(whole, source, tmp_path / "o", overlap=0.5)


def test_a_run_says_its_tiles(tmp_path):
    for tile, wanted in {None: None, 640: (640, 0.3)}.items():
        data = {"tile": tile, "tile_overlap": 0.3}
        torch.save({"state_dict": {"a": torch.zeros(1)}, "datamodule_hyper_parameters": data}, tmp_path / "a.ckpt")
        assert read_saved(tmp_path / "a.ckpt").tiles == wanted


def test_key_points_are_those_of_the_view_that_stays():
    """An object at 70 to 95 is cut by the first tile at 80, and whole in the second; another is in the first alone."""
    windows = [(0, 0, 80, 80), (60, 0, 140, 80)]
    boxes = [[[70, 10, 80, 30], [5, 40, 25, 60]], [[10, 10, 35, 30]]]
    parts = [
        {
            "boxes": np.array(own, np.float32),
            "labels": np.ones(len(own), np.int64),
            "scores": np.linspace(0.9, 0.8, len(own), dtype=np.float32),
            "masks": None,
            "keypoints": np.array([[[box[0] + 1, box[1] + 2, 1]] for box in own], np.float32),
            "keypoint_scores": np.full((len(own), 1), tile, np.float32),
        }
        for tile, own in enumerate(boxes)
    ]
    merged = merge_tiles(parts, windows, (80, 140))
    assert merged["boxes"].tolist() == [[70, 10, 95, 30], [5, 40, 25, 60]]
    assert merged["keypoints"].tolist() == [[[71, 12, 1]], [[6, 42, 1]]]
    assert merged["keypoint_scores"].tolist() == [[1], [0]]
