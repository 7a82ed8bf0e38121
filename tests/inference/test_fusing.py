"""Weighted box fusion against sums done by hand from the paper's steps, and what fuses several detectors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from detection import save_detector
from detection.cli.flags import join_ckpts, members
from detection.cli.predict import predict_in
from detection.data.records import DataError
from detection.inference import Detections, Detector
from detection.inference.ensemble import Ensemble
from detection.inference.fusing import fuse, weighted_boxes
from detection.inference.tta import TestTimeAugmentation
from tests.inference.blobs import NAMES, scene
from tests.test_tta import make_batch


def test_the_steps_of_the_paper_by_hand():
    """Three models. Two see one object, of three overlapping boxes; one sees another; a third class lies on top."""
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 8], [0, 2, 10, 10], [50, 50, 60, 60], [0, 0, 10, 10]], np.float32)
    scores, labels = np.array([0.9, 0.6, 0.3, 0.6, 0.5], np.float32), np.array([1, 1, 1, 1, 2])
    found = weighted_boxes(boxes, scores, labels, 3)
    # (0.9 * 0 + 0.6 * 0 + 0.3 * 2) / 1.8 and (0.9 * 10 + 0.6 * 8 + 0.3 * 10) / 1.8; mean score 0.6, of all three
    np.testing.assert_allclose(found.boxes[0], [0, 0.6 / 1.8, 10, 16.8 / 1.8], rtol=1e-6)
    np.testing.assert_allclose(found.boxes[1:], boxes[3:], rtol=1e-6)
    np.testing.assert_allclose(found.scores, [0.6, 0.6 / 3, 0.5 / 3], rtol=1e-6)
    assert found.best.tolist() == [0, 3, 4] and found.boxes.dtype == found.scores.dtype == np.float32


def test_a_box_is_compared_with_the_fused_ones():
    """The third overlaps the first by 1/3 alone, but the fused box of the first two by 7.5 / 12.5 = 0.6."""
    boxes = np.array([[0, 0, 10, 1], [4, 0, 14, 1], [5, 0, 15, 1], [20, 0, 30, 1]], np.float64)
    scores, labels = np.array([0.5, 0.5, 0.1, 0.1]), np.ones(4, np.int64)
    # IoU of the first two is 6 / 14, so they fuse at 0.4: to 2..12; with the third, of 3 in 13, 7 / 13
    found = weighted_boxes(boxes, scores, labels, 2, iou_thresh=0.4)
    np.testing.assert_allclose(found.boxes[0], [(0 + 2 + 0.5) / 1.1, 0, (5 + 7 + 1.5) / 1.1, 1])
    np.testing.assert_allclose(found.scores, [1.1 / 3, 0.1 / 2])  # three of two models: min(T, M) / M is 1
    assert len(weighted_boxes(boxes, scores, labels, 2).boxes) == 3  # at 0.55 the second and third alone fuse


def test_nothing_and_empty_boxes():
    none = weighted_boxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), 2)
    assert none.boxes.shape == (0, 4) and len(none.scores) == len(none.best) == 0
    empty = weighted_boxes(np.ones((2, 4)), np.zeros(2), np.ones(2, np.int64), 2)
    assert np.isfinite(empty.boxes).all() and np.isfinite(empty.scores).all()


def found(*rows, masks=None):
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4].astype(np.int64), table[:, 5], NAMES, (60, 80), masks)


def test_a_fused_box_has_the_mask_of_its_best_member():
    one = found([0, 0, 10, 10, 1, 0.4], [30, 30, 40, 40, 2, 0.9], masks=({"counts": b"a"}, {"counts": b"b"}))
    two = found([0, 0, 10, 12, 1, 0.8], masks=({"counts": b"c"},))
    both = fuse([one, two], "wbf", 100)
    assert [mask["counts"] for mask in both.masks] == [b"c", b"b"]
    np.testing.assert_allclose(both.scores, [0.6, 0.45])
    assert both.boxes[0, 3] == pytest.approx((4 + 0.8 * 12) / 1.2)
    assert len(fuse([one, two], "wbf", 1)) == 1
    kept = fuse([one, two], "nms", 100)
    assert [mask["counts"] for mask in kept.masks] == [b"b", b"c"] and kept.boxes[1].tolist() == [0, 0, 10, 12]


def test_copies_of_a_detector_find_what_it_finds(model):
    """Each cluster has one detection of each, as NMS keeps boxes apart by less than the IoU of fusing."""
    detector, image = Detector(model, NAMES, device="cpu"), scene(60, 80, (0, 10, 10, 30, 40))
    alone, both = detector(image), Ensemble([detector, detector])(image)
    assert len(alone) == 5 and both.masks == alone.masks and both.pixels is not None
    np.testing.assert_allclose(both.boxes, alone.boxes, rtol=1e-5)
    np.testing.assert_allclose(both.scores, alone.scores, rtol=1e-5)
    other = Detector(model, ["x", "y"], device="cpu")
    with pytest.raises(DataError, match=r"detector 2 and detector 1 have other classes \(x, y; "):
        Ensemble([detector, other])


@torch.no_grad()
def test_views_are_fused(model):
    """One view is itself; of two that are the same picture twice the fused list is that of one."""
    batch = make_batch()
    (plain, again) = (
        TestTimeAugmentation(model.eval(), (1.0,) * n, hflip=False, fusion="wbf").run(batch, False, True)[1]
        for n in (1, 2)
    )
    for one, two in zip(plain, again, strict=True):
        assert len(one["scores"]) > 0
        torch.testing.assert_close(two, one)


def test_several_checkpoints_on_the_command_line(model, tmp_path, photos, capsys):
    assert join_ckpts(["--ckpt", "a b", "--split", "val", "--ckpt=c"]) == ["--split", "val", '--ckpt=["a b", "c"]']
    assert join_ckpts(["--ckpt", "a", "--split", "val"]) == ["--ckpt", "a", "--split", "val"]
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        save_detector(path, model, NAMES)
    with pytest.raises(DataError, match=r"2 checkpoints: say how to fuse what they find, --fuse wbf"):
        members(paths, None)
    with pytest.raises(DataError, match=r"--fuse nms fuses what several checkpoints find, but there is one"):
        members(paths[0], "nms")
    told = {"score_thresh": 0.0, "device": "cpu", "pictures": False}
    predict_in(paths[0], str(photos), tmp_path / "one", **told)
    predict_in(paths, str(photos), tmp_path / "both", fuse="wbf", **told)
    one, both = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("one", "both"))
    assert len(one["annotations"]) == len(both["annotations"]) == 10
    for a, b in zip(one["annotations"], both["annotations"], strict=True):
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-3) and a["score"] == pytest.approx(b["score"])
    capsys.readouterr()


def test_members_of_one_image_stay_as_they_are():
    one = found([0, 0, 10, 10, 1, 0.4])
    before = replace(one, boxes=one.boxes.copy())
    fuse([one, one], "wbf", 10)
    assert np.array_equal(one.boxes, before.boxes)
