"""Our evaluator against pycocotools: the same bits in every array, under everything that may perturb them."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as mask_api

from detection.evaluation import coco_eval
from detection.evaluation.coco_eval import box_iou, evaluate
from detection.evaluation.results import image_result

CASES = {
    "plain": {},
    "tied scores": {"levels": 3},
    "one score": {"levels": 1},
    "crowds": {"crowd": 0.4},
    "only crowds": {"crowd": 1.0},
    "areas at the limits": {"areas": (0.0, 1023.99, 1024.0, 1024.01, 9216.0, 9216.1)},
    "no detections": {"detections": 0},
    "no objects": {"objects": 0},
    "nothing": {"objects": 0, "detections": 0},
    "one class": {"classes": 1},
    "many of a class": {"classes": 1, "detections": 40, "objects": 25, "images": 5},
    "limit 300": {"limit": 300, "detections": 150, "images": 4, "classes": 2},
    "limit 5": {"limit": 5},
    "limit 1": {"limit": 1},
}


def world(seed, images=25, classes=4, objects=6, detections=12, levels=1000, crowd=0.1, areas=None, limit=100):
    """A COCO data set and results on small integer boxes, so that IoUs tie and hit thresholds exactly."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        return np.concatenate([rng.integers(0, 40, (count, 2)), rng.integers(1, 60, (count, 2))], 1)

    gt, dt = [], []
    ids = rng.permutation(1000)[:images].tolist()
    for image in ids:
        mine = boxes(rng.integers(0, objects + 1))
        for box in mine.tolist():
            area = float(rng.choice(areas)) if areas else float(box[2] * box[3])
            entry = {"id": len(gt) + 1, "image_id": image, "category_id": int(rng.integers(classes)) * 3 + 2}
            gt.append(entry | {"bbox": box, "area": area, "iscrowd": int(rng.random() < crowd)})
        theirs = boxes(rng.integers(0, detections + 1))
        copies = rng.random(len(theirs)) < 0.6
        if len(mine):
            theirs = np.where(copies[:, None], mine[rng.integers(0, len(mine), len(theirs))], theirs)
        theirs[:, 2:] = np.maximum(theirs[:, 2:] + rng.integers(-4, 5, (len(theirs), 2)), 1)
        for box in theirs.tolist():
            score = float(np.float32(rng.integers(levels) / levels))
            entry = {"image_id": image, "category_id": int(rng.integers(classes)) * 3 + 2}
            dt.append(entry | {"bbox": box, "score": score})
    # pycocotools has nothing to say about results that are an empty list, so there is always one detection.
    dt = dt or [{"image_id": ids[0], "category_id": 2, "bbox": [500, 500, 3, 3], "score": 0.5}]
    names = [{"id": k * 3 + 2, "name": str(k)} for k in range(classes)]
    pictures = [{"id": image, "width": 120, "height": 120} for image in ids]
    return {"info": {}, "images": pictures, "annotations": gt, "categories": names}, dt, limit


def with_masks(gt, dt, seed):
    """Each box becomes the mask of an ellipse or of the box, some cut in half."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:120, :120]
    for entry in gt["annotations"] + dt:
        x, y, w, h = entry["bbox"]
        inside = (columns >= x) & (columns < x + w) & (rows >= y) & (rows < y + h)
        if rng.random() < 0.5:
            inside &= ((columns - x - w / 2) / w) ** 2 + ((rows - y - h / 2) / h) ** 2 <= 0.25
        if rng.random() < 0.2:
            inside &= columns < x + w / 2
        rle = mask_api.encode(np.asfortranarray(inside.astype(np.uint8)))
        entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    for entry in dt:
        del entry["bbox"]
    return gt, dt


def ours(names, targets, detections, limit, use_masks=False):
    results = [image_result(d, t, len(names), use_masks) for d, t in zip(detections, targets, strict=True)]
    results.sort(key=lambda result: result.image_id)
    return evaluate(results, len(names), (1, min(10, limit), limit), use_masks)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_equals_pycocotools_bit_for_bit(pycoco, coco_inputs, case, seed):
    gt, dt, limit = world(seed, **CASES[case])
    expected = pycoco(gt, dt, "bbox", [1, min(10, limit), limit])
    curves = ours(*coco_inputs(gt, dt), limit)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(getattr(curves, name), expected[name], err_msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_masks_equal_pycocotools_bit_for_bit(pycoco, coco_inputs, seed):
    gt, dt, limit = world(seed, images=12, levels=20, crowd=0.2)
    gt, dt = with_masks(gt, dt, seed)
    expected = pycoco(gt, dt, "segm", [1, 10, 100])
    curves = ours(*coco_inputs(gt, dt), limit, use_masks=True)
    assert expected["precision"].max() > 0
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(getattr(curves, name), expected[name], err_msg=name)


def test_pairs_in_pieces_are_the_same(coco_inputs, monkeypatch):
    gt, dt, limit = world(5)
    inputs = coco_inputs(gt, dt)
    whole = ours(*inputs, limit)
    monkeypatch.setattr(coco_eval, "PAIRS_AT_ONCE", 7)
    np.testing.assert_array_equal(ours(*inputs, limit).precision, whole.precision)


def test_box_iou_equals_pycocotools():
    rng = np.random.default_rng(0)
    dt, gt = (np.concatenate([rng.uniform(0, 50, (500, 2)), rng.uniform(0, 60, (500, 2))], 1) for _ in range(2))
    crowd = rng.random(500) < 0.3
    expected = [mask_api.iou(d[None], g[None], [int(c)])[0, 0] for d, g, c in zip(dt, gt, crowd, strict=True)]
    np.testing.assert_array_equal(box_iou(dt, gt, crowd), expected)
