"""Pictures of judged images show each mistake in its own colour."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from detection.evaluation.analysis import analyse
from detection.evaluation.plots import COLOURS, MISSED, judged_images
from detection.evaluation.results import ImageResult


def test_judged_images_outline_each_detection_in_the_colour_of_its_kind() -> None:
    boxes = np.array([[10, 10, 30, 30], [60, 60, 80, 80], [10, 60, 20, 70]], np.float32)  # right, nothing, too faint
    result = ImageResult(
        image_id=1,
        file_name="a.jpg",
        size=(100, 100),
        boxes=boxes,
        labels=np.array([1, 1, 1]),
        scores=np.array([0.9, 0.8, 0.1], np.float32),
        masks=None,
        gt_boxes=np.array([[10, 10, 30, 30], [70, 10, 90, 30]], np.float32),
        gt_labels=np.array([1, 2]),
        gt_areas=np.array([400, 400], np.float32),
        gt_iscrowd=np.zeros(2, bool),
        gt_difficult=np.zeros(2, bool),
        gt_masks=None,
    )
    judged = analyse([result], num_classes=2)
    figure = judged_images(judged, {0: np.zeros((100, 100, 3), np.uint8)}, ["cat", "dog"])
    figure.canvas.draw()
    drawn = {
        (to_hex(patch.get_edgecolor()), patch.get_x(), patch.get_y())
        for patch in figure.axes[0].patches
        if isinstance(patch, Rectangle)
    }
    kinds = judged.kind[np.argsort(-judged.dt.scores)]
    assert drawn == {
        (COLOURS[int(kinds[0])], 10, 10),
        (COLOURS[int(kinds[1])], 60, 60),
        (MISSED, 70, 10),
    }
    assert {text.get_text() for text in figure.axes[0].texts} == {"cat 0.90", "cat 0.80", "dog"}
