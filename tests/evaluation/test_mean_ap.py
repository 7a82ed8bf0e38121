"""`MeanAP` against the figures published with the official evaluator, and against that evaluator."""

from __future__ import annotations

import pytest

from detection.evaluation.mean_ap import MeanAP

KEYS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
KEYS += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
BACKENDS = ("arrays", "faster_coco_eval", "pycocotools")
FAKE_BOXES = "0.505 0.697 0.573 0.586 0.519 0.501 0.387 0.594 0.595 0.640 0.566 0.564"
FAKE_MASKS = "0.320 0.562 0.299 0.387 0.310 0.327 0.268 0.415 0.417 0.469 0.377 0.381"
BOXES = "0.503647 0.696973 0.571667 0.593252 0.557991 0.489363 0.386813 0.593680 0.595353 0.654764 0.603130 0.553744"
PUBLISHED = {
    "fake boxes": (
        "coco_fake/instances_val2014_100.json",
        "coco_fake/instances_val2014_fakebbox100_results.json",
        "bbox",
        FAKE_BOXES,
    ),
    "fake masks": (
        "coco_fake/instances_val2014_100.json",
        "coco_fake/instances_val2014_fakesegm100_results.json",
        "segm",
        FAKE_MASKS,
    ),
    "boxes": ("coco_boxes/sampled_gts_bbox_area.json", "coco_boxes/cocoapi_results.json", "bbox", BOXES),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PUBLISHED)
def test_published_figures(shared_data, read_coco_files, case, backend):
    gt, dt, iou_type, published = PUBLISHED[case]
    folder = shared_data / "eval_refs"
    names, targets, detections = read_coco_files(folder / gt, folder / dt)
    metric = MeanAP(names, iou_type=iou_type, backend=backend)
    for start in range(0, len(targets), 7):
        metric.update(detections[start : start + 7], targets[start : start + 7])
    figures = metric.compute()
    digits = len(published.split()[0]) - 2
    assert [f"{figures[key]:.{digits}f}" for key in KEYS] == published.split()
