"""The teaching plots draw what the detector's own parts give, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from detection import teaching
from detection.models import relatives, zoo
from detection.models.two_stage import FasterRCNN

IMAGE = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TARGET = {"boxes": torch.tensor([[10.0, 12.0, 50.0, 60.0], [70.0, 20.0, 110.0, 80.0]]), "labels": torch.tensor([1, 2])}


@pytest.fixture(scope="module")
def detector() -> FasterRCNN:
    torch.manual_seed(0)
    return zoo.fasterrcnn_efficientnet_lite0_fpn(
        num_classes=3, weights_backbone=None, fpn_channels=16, min_size=96, max_size=160
    ).train()


def boxes_of(axes: Axes) -> np.ndarray[Any, Any]:
    """The corners of every outline in a panel, `(N, 4)`."""
    loops = [
        path.vertices for part in axes.collections if isinstance(part, LineCollection) for path in part.get_paths()
    ]
    return np.array([[*np.asarray(loop).min(0), *np.asarray(loop).max(0)] for loop in loops]).reshape(-1, 4)


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images]


def test_anchors_of_one_cell_of_each_level(detector: FasterRCNN) -> None:
    figure = teaching.plot_anchors(detector, IMAGE, point=(40.0, 40.0))
    generator, strides = detector.rpn.anchor_generator, detector.strides
    assert len(panels(figure)) == len(strides)
    for axes, cell, stride in zip(panels(figure), generator._cells, strides, strict=True):
        corner = round(40 / stride) * stride  # anchors are centred at the corners of cells
        found = boxes_of(axes) - corner
        best = np.abs(found - cell.numpy()).max()
        assert best < 1e-3 or stride > 40  # half way between two cells either one is right


def test_matching_draws_the_foreground_of_the_matcher(detector: FasterRCNN) -> None:
    figure = teaching.plot_matching(detector, IMAGE, TARGET)
    batch, features = teaching._features(detector, IMAGE, TARGET)
    anchors = torch.cat(teaching._anchors(detector, batch, features))
    matched = detector.rpn.matcher(batch.gt_boxes, batch.gt_valid, anchors)[0]
    drawn = boxes_of(panels(figure)[0])
    expected = torch.cat([anchors[matched == 0], anchors[matched == 1], batch.gt_boxes[0]])
    np.testing.assert_allclose(drawn, expected, atol=1e-3)
    assert f"{int((matched >= 0).sum())} of" in panels(figure)[0].get_title()


def test_samples_are_those_of_the_heads(detector: FasterRCNN) -> None:
    left, right = panels(teaching.plot_samples(detector, IMAGE, TARGET, ["cat", "dog"]))
    assert 2 <= len(boxes_of(left)) <= detector.roi_heads.sampler.max_positive  # ground truth itself at least
    assert len(boxes_of(left)) + len(boxes_of(right)) <= detector.roi_heads.sampler.batch_size_per_image
    assert {text.get_text().split()[0] for text in left.texts} == {"cat", "dog"}
    assert "cat 1.00" in {text.get_text() for text in left.texts}


@pytest.mark.parametrize(
    "draw",
    [
        lambda d: teaching.plot_anchors(d, IMAGE),
        lambda d: teaching.plot_matching(d, IMAGE, TARGET),
        lambda d: teaching.plot_proposals(d, IMAGE, TARGET, counts=(5, 20)),
        lambda d: teaching.plot_samples(d, IMAGE, TARGET, ["cat", "dog"]),
        lambda d: teaching.plot_pyramid(d, IMAGE),
    ],
)
def test_a_plot_is_drawn_and_leaves_the_detector_as_it_was(
    draw: Callable[[FasterRCNN], Figure], detector: FasterRCNN
) -> None:
    before, state = {k: v.clone() for k, v in detector.state_dict().items()}, torch.get_rng_state()
    figure = draw(detector)
    figure.canvas.draw()
    assert panels(figure)
    assert detector.training and detector.backbone.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_an_image_without_objects_has_plots_too(detector: FasterRCNN) -> None:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert boxes_of(panels(teaching.plot_matching(detector, IMAGE, nothing))[0]).shape == (0, 4)
    assert panels(teaching.plot_samples(detector, IMAGE, nothing, ["cat", "dog"]))
    assert panels(teaching.plot_proposals(detector, IMAGE, nothing))


def test_a_detector_without_anchors_says_so() -> None:
    fast = relatives.fastrcnn_efficientnet_lite0_fpn(num_classes=3, weights_backbone=None, fpn_channels=16)
    with pytest.raises(ValueError, match="no anchors"):
        teaching.plot_anchors(fast, IMAGE)


def test_principal_colours_tell_regions_apart() -> None:
    feature = torch.zeros(8, 6, 10)
    feature[0, :, 5:] = 1.0
    picture = teaching.principal_colours(feature)
    assert picture.shape == (6, 10, 3) and np.abs(picture[0, 0] - picture[0, 9]).max() == 1
    assert (picture[:, 5:] == picture[0, 9]).all()
