"""OKS AP against pycocotools, on the key points of COCO and on drawn ones; other sigmas and sizes included."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.batch import Target
from detection.data.skeletons import COCO_SIGMAS, Skeleton, numbered
from detection.evaluation.coco_files import compare_files
from detection.evaluation.coco_results import coco_results
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.oks import similarity

KEYS = ("map", "map_50", "map_75", "map_medium", "map_large", "mar", "mar_50", "mar_75", "mar_medium", "mar_large")


def official(gt: dict[str, Any], dt: list[dict[str, Any]], sigmas: Any = None) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = gt
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(dt))), "keypoints")
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(KEYS, evaluation.stats.tolist(), strict=True))


def drawn(seed: int, points: int, classes: int = 2, images: int = 12) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects of all sizes, some without points, some crowds; up to 30 detections of a class and image near them."""
    rng = np.random.default_rng(seed)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 5 + c, "name": f"c{c}"} for c in range(classes)]
    found: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        content["images"].append({"id": image, "file_name": f"{image}.png", "width": 400, "height": 300})
        for _ in range(int(rng.integers(0, 6))):
            w, h = np.exp(rng.uniform(np.log(10), np.log(180), 2)).round(1)
            x, y = (rng.uniform(0, (400 - w, 300 - h))).round(1)
            category = 5 + int(rng.integers(classes))
            kp = np.column_stack(
                (rng.uniform((x, y), (x + w, y + h), (points, 2)).round(1), rng.integers(0, 3, points))
            )
            kp[kp[:, 2] == 0] = 0
            if rng.random() < 0.2:
                kp[:] = 0
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": image, "category_id": category,
                "bbox": [x, y, w, h], "area": float(round(w * h * 0.6, 1)), "iscrowd": int(rng.random() < 0.1),
                "keypoints": kp.ravel().tolist(), "num_keypoints": int((kp[:, 2] > 0).sum()),
            })  # fmt: skip
            for _ in range(int(rng.integers(0, 9))):
                near = kp[:, :2] + rng.normal(0, rng.choice([1, 4, 15]), (points, 2))
                near = np.where(kp[:, 2:] > 0, near, rng.uniform((x, y), (x + w, y + h), (points, 2)))
                flat = np.column_stack((near.round(2), np.ones(points))).ravel().tolist()
                score = float(rng.choice([0.3, 0.5, round(rng.random(), 3)]))
                found.append({"image_id": image, "category_id": category, "keypoints": flat, "score": score})
    return content, found


def test_similarity_of_one_point_by_hand() -> None:
    """3 and 4 pixels away at sigma .1 on an object of 100: exp(-25 / (2 * 100 * .04))."""
    found, point = np.array([[[3.0, 4.0, 1.0]]]), np.array([[[0.0, 0.0, 2.0]]])
    value = similarity(found, point, np.array([[0.0, 0, 10, 10]]), np.array([100.0]), [0.1])
    assert value == pytest.approx([math.exp(-25 / 8)], rel=1e-12)


@pytest.mark.parametrize(("points", "sigmas"), [(17, None), (3, (0.05,) * 3), (5, (0.02, 0.1, 0.05, 0.2, 0.04))])
def test_figures_are_those_of_pycocotools(points: int, sigmas: Any, tmp_path: Path) -> None:
    for seed in range(4):
        gt, dt = drawn(seed, points)
        (tmp_path / "gt.json").write_text(json.dumps(gt))
        (tmp_path / "dt.json").write_text(json.dumps(dt))
        metric = compare_files(tmp_path / "gt.json", tmp_path / "dt.json").metric
        if sigmas:
            metric.skeleton = Skeleton(numbered(points), sigmas=sigmas)
        ours, theirs = metric.compute(), official(gt, dt, sigmas)
        assert ours == pytest.approx(theirs, abs=1e-6)
        assert 0.05 < ours["map"] < 0.95 and metric.iou_type == ("keypoints",)


def test_the_default_sigmas() -> None:
    assert Skeleton(numbered(17)).oks_sigmas == COCO_SIGMAS
    assert Skeleton(tuple("abcdefghijklmnopq")).oks_sigmas == (0.05,) * 17  # not COCO's points, though as many
    assert Skeleton(("nose",)).oks_sigmas == (0.05,)


def test_key_points_of_coco(shared_data: Path) -> None:
    """Real annotations, moved a little, and evaluated through our reader, metric and results file."""
    from detection.data.coco import read_coco
    from detection.data.dataset import make_target

    file = "annotations/person_keypoints_val2017.json"
    index = read_coco(shared_data / "tiny_coco", file, "val2017", keypoints=True)
    assert index.skeleton is not None and len(index.skeleton) == 17 and index.skeleton.edges[0] == (15, 13)
    metric = MeanAP(index.classes, iou_type=("bbox", "keypoints"), skeleton=index.skeleton)
    rng = np.random.default_rng(0)
    for record in index.records:
        target = make_target(record)
        assert target.keypoints is not None
        noise = torch.from_numpy(rng.normal(0, 3, target.keypoints[..., :2].shape)).float()
        points = torch.cat([target.keypoints[..., :2] + noise, torch.ones_like(noise[..., :1])], dim=-1)
        scores = torch.from_numpy(rng.random(len(points))).float()
        metric.update(
            [{"boxes": target.boxes, "labels": target.labels, "scores": scores, "keypoints": points}], [target]
        )
    figures = metric.compute()
    gt = json.loads((shared_data / "tiny_coco" / file).read_text())
    theirs = official(gt, coco_results(metric.results, index.category_ids, "keypoints"))
    ours = {key: figures[f"keypoints_{key}"] for key in KEYS}
    assert ours == pytest.approx(theirs, abs=1e-6) and 0.2 < ours["map"] < 0.99
    assert set(metric.per_class("keypoints")) == {"person"} and figures["bbox_map"] > 0.5


def target(points: Any, number: int = 1) -> Target:
    count = len(points)
    zeros = torch.zeros(count, dtype=torch.bool)
    boxes = torch.tensor([[0.0, 0, 50, 50]]).repeat(count, 1)
    labels = torch.ones(count, dtype=torch.int64)
    areas = torch.full((count,), 2500.0)
    return Target(number, f"{number}.png", (60, 60), boxes, labels, areas, zeros, zeros, keypoints=torch.tensor(points))


def test_what_does_not_fit_is_refused() -> None:
    metric = MeanAP(["a"], iou_type=("bbox", "keypoints"))
    found = {"boxes": torch.tensor([[0.0, 0, 50, 50]]), "labels": torch.ones(1, dtype=torch.int64)}
    found["scores"] = torch.ones(1)
    truth = target([[[1.0, 2, 2], [3, 4, 1]]])
    with pytest.raises(ValueError, match="key points are needed in the detections and in the ground truth"):
        metric.update([found], [truth])
    with pytest.raises(ValueError, match="1 key points are detected, but 2 annotated"):
        metric.update([found | {"keypoints": torch.zeros(1, 1, 3)}], [truth])
    with pytest.raises(ValueError, match="a key point is not finite"):
        metric.update([found | {"keypoints": torch.full((1, 2, 3), torch.nan)}], [truth])


def test_without_annotated_points_there_is_no_figure() -> None:
    metric = MeanAP(["a"], iou_type=("bbox", "keypoints"))
    found = {"boxes": torch.tensor([[0.0, 0, 50, 50]]), "labels": torch.ones(1, dtype=torch.int64)}
    found |= {"scores": torch.ones(1), "keypoints": torch.ones(1, 2, 3)}
    metric.update([found], [target([[[0.0, 0, 0], [0, 0, 0]]])])
    figures = metric.compute()
    assert figures["keypoints_map"] == -1 and figures["bbox_map"] == pytest.approx(1)


def test_files_with_other_numbers_of_points_are_refused(tmp_path: Path) -> None:
    from detection.data.records import DataError

    gt, dt = drawn(0, 3)
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    dt[1]["keypoints"] = [1.0, 2, 1]
    (tmp_path / "dt.json").write_text(json.dumps(dt))
    with pytest.raises(DataError, match="detections have 1 and 3 key points; give all as many"):
        compare_files(tmp_path / "gt.json", tmp_path / "dt.json")
