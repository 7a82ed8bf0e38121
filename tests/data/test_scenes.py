"""The embedded data set: what it promises of its objects, that it repeats, and that it is written safely."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from detection.data import scenes
from detection.data.coco import read_coco
from detection.data.images import read_image
from detection.data.records import Index


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("cache"), train=120, val=10)


@pytest.fixture(scope="module")
def index(root: Path) -> Index:
    return read_coco(root, *scenes.SPLITS["train"], masks=True)


def test_the_coco_reader_finds_no_defect(index: Index) -> None:
    assert index.defects == [] and index.classes == scenes.CLASSES and len(index.records) == 120


def test_objects_are_as_varied_as_promised(index: Index) -> None:
    counts = np.bincount(np.concatenate([r.labels for r in index.records]), minlength=7)[1:]
    assert counts.min() > 60
    sides = np.concatenate([(r.boxes[:, 2:] - r.boxes[:, :2]).max(axis=1) for r in index.records])
    short = np.concatenate([np.full(len(r.labels), min(r.width, r.height)) for r in index.records])
    assert (sides < 10).mean() > 0.03 and (sides > 0.35 * short).mean() > 0.03 and (sides / short).max() < 0.7
    shapes = {(r.height, r.width) for r in index.records}
    assert len(shapes) > 60 and min(min(s) for s in shapes) >= 160 and max(max(s) for s in shapes) <= 224
    assert any(not len(r.labels) for r in index.records) and any(r.iscrowd.any() for r in index.records)


def test_boxes_areas_and_masks_agree_with_pycocotools(root: Path) -> None:
    coco = COCO(root / scenes.SPLITS["train"][0])
    shared = 0
    for image_id in coco.getImgIds():
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        masks = [coco.annToMask(a) for a in annotations]
        for a, mask in zip(annotations, masks, strict=True):
            rows, columns = np.nonzero(mask)
            x, y, w, h = a["bbox"]
            assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert a["area"] == mask.sum() > 0
        if masks:
            assert np.sum(masks, axis=0).max() == 1  # masks hold the visible part only
        boxes = np.array([a["bbox"] for a in annotations]).reshape(-1, 4)
        overlap = (boxes[:, None, :2] < boxes[None, :, :2] + boxes[None, :, 2:]).all(-1)
        shared += int((overlap & overlap.T).sum() > len(boxes))
    assert shared > 30  # images in which boxes overlap


def test_nothing_is_hidden_beyond_recognition(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was painted of each object, against what is left of it in the end."""
    painted: list[scenes._Canvas] = []

    class Canvas(scenes._Canvas):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            painted.append(self)

    monkeypatch.setattr(scenes, "_Canvas", Canvas)
    for seed in range(40):
        scenes.draw_scene(np.random.default_rng(seed))
    assert len(painted) == 40
    for canvas in painted:
        left = np.bincount(canvas.owner.ravel(), minlength=len(canvas.areas))[1:]
        things = canvas.areas[1:] > 0  # a crowd has no area of its own
        assert (left[things] >= scenes.MIN_VISIBLE * canvas.areas[1:][things]).all()


def test_pictures_repeat(root: Path, tmp_path: Path) -> None:
    again = scenes.draw(tmp_path, train=3, val=2)
    for split, number in (("train", 3), ("val", 2)):
        for i in range(number):
            name = f"{split}/{i:06d}.jpg"
            assert (again / name).read_bytes() == (root / name).read_bytes()
    other = scenes.draw(tmp_path, train=3, val=2, seed=1)
    assert other != again and (other / "val/000000.jpg").read_bytes() != (again / "val/000000.jpg").read_bytes()
    first, second = (read_image(again / f"{split}/000000.jpg") for split in ("train", "val"))
    assert first.shape != second.shape or (first != second).any()


def test_a_finished_folder_is_left_alone_and_a_recipe_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = scenes.draw(tmp_path, train=1, val=1)
    stamp = (root / "train/000000.jpg").stat().st_mtime_ns
    assert scenes.draw(tmp_path, train=1, val=1) == root
    assert (root / "train/000000.jpg").stat().st_mtime_ns == stamp
    monkeypatch.setattr(scenes, "RECIPE", scenes.RECIPE + 1)
    assert scenes.draw(tmp_path, train=1, val=1) != root


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "write_coco", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scenes.draw(tmp_path, train=2, val=1)
    assert list(tmp_path.iterdir()) == []
    assert json.loads((scenes.draw(tmp_path, train=2, val=1) / "annotations/train.json").read_text())["images"]


def test_processes_may_draw_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        roots = pool.starmap(scenes.draw, [(tmp_path, 4, 2)] * 3)
    assert len(set(roots)) == 1 and [p.name for p in tmp_path.iterdir()] == [roots[0].name]
    assert len(list((roots[0] / "train").iterdir())) == 4
