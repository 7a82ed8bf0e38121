"""Selective Search against values worked out by hand, other libraries' colours, and objects that it should find."""

from __future__ import annotations

import builtins
import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from detection.boxes import pairwise_iou
from detection.data.scenes import draw_scene
from detection.recipes import rebuild
from detection.selective_search import (
    Regions,
    SelectiveSearch,
    colour_bins,
    convert,
    describe,
    group,
    neighbours,
    similarity,
    texture_bins,
)

SEGMENTS = np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]])
REGIONS = Regions(
    boxes=np.array([[0, 0, 2, 2], [2, 0, 3, 2], [0, 2, 3, 3]]),
    sizes=np.array([4, 2, 3]),
    colour=np.array([[0.75, 0.25], [0.25, 0.75], [0, 1]], np.float32),
    texture=np.array([[0.5, 0.5], [0, 1], [0.5, 0.5]], np.float32),
    image_size=9,
)


@pytest.mark.parametrize(
    ("measures", "expected"),
    [
        ("S", [1 - 6 / 9, 1 - 7 / 9, 1 - 5 / 9]),
        ("F", [1 - (6 - 6) / 9, 1 - (9 - 7) / 9, 1 - (9 - 5) / 9]),
        ("TSF", [0.5 + 3 / 9 + 1, 1 + 2 / 9 + 7 / 9, 0.5 + 4 / 9 + 5 / 9]),
        ("CTSF", [0.5 + 0.5 + 3 / 9 + 1, 0.25 + 1 + 2 / 9 + 7 / 9, 0.75 + 0.5 + 4 / 9 + 5 / 9]),
    ],
)
def test_similarity_by_hand(measures: Any, expected: list[float]) -> None:
    first, second = np.array([0, 0, 1]), np.array([1, 2, 2])
    np.testing.assert_allclose(similarity(REGIONS, first, second, measures), expected, rtol=1e-6)
    np.testing.assert_allclose(similarity(REGIONS, np.array([2, 1]), 0, measures), expected[1::-1], rtol=1e-6)


def test_regions_of_a_tiny_segmentation() -> None:
    colours = np.stack((SEGMENTS, np.array([[0, 1, 1], [1, 1, 1], [0, 0, 24]])))
    found = describe(SEGMENTS, colours, np.zeros((8, 3, 3), np.int64))
    np.testing.assert_array_equal(found.boxes, REGIONS.boxes)
    np.testing.assert_array_equal(found.sizes, REGIONS.sizes)
    assert found.image_size == 9 and found.colour.shape == (3, 50) and found.texture.shape == (3, 80)
    expected = np.zeros((3, 50))
    expected[0, 0], expected[0, 25], expected[0, 26] = 4 / 8, 1 / 8, 3 / 8
    expected[1, 1], expected[1, 26] = 1 / 2, 1 / 2
    expected[2, 2], expected[2, 25], expected[2, 49] = 3 / 6, 2 / 6, 1 / 6
    np.testing.assert_allclose(found.colour, expected, rtol=1e-6)
    np.testing.assert_allclose(found.texture, np.tile(np.eye(10)[0] / 8, (3, 8)))


def test_neighbours_share_an_edge() -> None:
    assert neighbours(SEGMENTS).tolist() == [[0, 1], [0, 2], [1, 2]]
    # A corner in common is not enough.
    assert neighbours(np.array([[3, 0], [2, 1], [2, 1]])).tolist() == [[0, 1], [0, 3], [1, 2], [2, 3]]
    assert neighbours(np.zeros((2, 2), np.int64)).shape == (0, 2)


@pytest.mark.parametrize(
    ("measures", "first_two", "box"),
    [("CTSF", (0, 1), (0, 0, 3, 2)), ("TSF", (0, 2), (0, 0, 3, 3)), ("S", (1, 2), (0, 0, 3, 3))],
)
def test_most_similar_neighbours_are_grouped_first(measures: Any, first_two: tuple[int, int], box: Any) -> None:
    grown = group(REGIONS, neighbours(SEGMENTS), measures)
    a, b = first_two
    np.testing.assert_array_equal(grown.boxes, [*REGIONS.boxes, box, (0, 0, 3, 3)])
    assert grown.sizes.tolist() == [4, 2, 3, REGIONS.sizes[a] + REGIONS.sizes[b], 9]
    for got, old in ((grown.colour, REGIONS.colour), (grown.texture, REGIONS.texture)):
        weights = REGIONS.sizes[[a, b]] / REGIONS.sizes[[a, b]].sum()
        np.testing.assert_allclose(got[3], weights @ old[[a, b]], rtol=1e-6)
        np.testing.assert_allclose(got[4], REGIONS.sizes / 9 @ old, rtol=1e-6)


def test_only_neighbours_are_grouped() -> None:
    """Four segments in a row, of which the first and the last look the same."""
    boxes = np.array([[x, 0, x + 1, 1] for x in range(4)])
    colour = np.array([[1, 0], [0.5, 0.5], [0.4, 0.6], [1, 0]], np.float32)
    regions = Regions(boxes, np.ones(4, np.int64), colour, colour, 4)
    grown = group(regions, np.array([[0, 1], [1, 2], [2, 3]]), "CTSF")
    assert grown.boxes[4:].tolist() == [[1, 0, 3, 1], [0, 0, 3, 1], [0, 0, 4, 1]]


def test_one_segment_is_no_group() -> None:
    one = Regions(*(rows[:1] for rows in REGIONS[:4]), image_size=9)
    assert len(group(one, np.zeros((0, 2), np.int64), "CTSF").boxes) == 1


def test_colours_are_those_of_other_libraries() -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    hsv = np.array([[colorsys.rgb_to_hsv(*pixel) for pixel in row] for row in image / 255])
    np.testing.assert_allclose(convert(image, "hsv"), hsv, atol=1e-4)
    np.testing.assert_allclose(convert(image, "hue"), hsv[..., :1], atol=1e-4)
    lab = (rgb2lab(image) + np.array([0, 128, 128])) / [100, 255, 255]
    np.testing.assert_allclose(convert(image, "lab"), lab, atol=2e-3)  # OpenCV rounds the white point
    np.testing.assert_allclose(convert(image, "intensity")[..., 0], image.mean(axis=2) / 255, atol=1e-6)
    rgi = convert(np.array([[[30, 60, 10], [0, 0, 0]]], np.uint8), "rgi")
    np.testing.assert_allclose(rgi, [[[0.3, 0.6, 100 / 765], [0, 0, 0]]], atol=1e-6)


def test_bins_of_values_and_slopes() -> None:
    values = np.array([[0, 0.039, 0.041, 0.5, 1]], np.float32)[..., None]
    assert colour_bins(values).tolist() == [[[0, 0, 1, 12, 24]]]
    step = np.zeros((9, 20, 1), np.float32)
    step[:, 10:] = 0.3
    bins = texture_bins(step)
    assert bins.shape == (8, 9, 20)
    assert (bins[0, :, 9:11] == 9).all() and (bins[[1, 7], :, 9:11] == 7).all()  # cos 45 degrees of ten bins
    assert (bins[0, :, :6] == 0).all() and (bins[2:7] == 0).all()  # brighter to the right, in no other direction
    assert (texture_bins(step.transpose(1, 0, 2))[2, 9:11] == 9).all()  # the third direction is downwards
    assert (texture_bins(np.ones((4, 4, 3), np.float32)) == 0).all()


def scenes_with_boxes(count: int) -> list[tuple[Any, torch.Tensor]]:
    scenes = []
    for i in range(count):
        image, objects = draw_scene(np.random.default_rng([5, i]))
        spans = [(np.flatnonzero(m.any(axis=0)), np.flatnonzero(m.any(axis=1))) for _, m, crowd in objects if not crowd]
        boxes = [(x[0], y[0], x[-1] + 1, y[-1] + 1) for x, y in spans]
        scenes.append((image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    return scenes


def test_objects_of_drawn_scenes_are_among_the_proposals() -> None:
    search, rng = SelectiveSearch(width=320), np.random.default_rng(0)
    found, by_chance, total = 0, 0, 0
    for image, objects in scenes_with_boxes(6):
        height, width = image.shape[:2]
        proposals = search(image)
        assert proposals.dtype == np.float32 and 300 < len(proposals) <= 2000
        assert (proposals >= 0).all() and (proposals <= [width, height, width, height]).all()
        assert (proposals[:, 2:] - proposals[:, :2] >= 0.99 * 10 * width / 320).all()  # heights are rounded
        assert len(np.unique(proposals, axis=0)) == len(proposals)
        assert [0, 0, width, height] in proposals[:10].round(3).tolist()  # the last group of each hierarchy ranks high
        corners = np.sort(rng.uniform(0, 1, (len(proposals), 2, 2)), axis=1).reshape(-1, 4) * [
            width,
            height,
            width,
            height,
        ]
        total += len(objects)
        found += int((pairwise_iou(objects, torch.from_numpy(proposals)).amax(dim=1) >= 0.5).sum())
        by_chance += int((pairwise_iou(objects, torch.from_numpy(corners)).amax(dim=1) >= 0.5).sum())
    assert total > 25
    assert found >= 0.88 * total
    assert by_chance < 0.6 * found


def test_the_same_image_gets_the_same_and_the_best_are_a_beginning() -> None:
    image, _ = scenes_with_boxes(1)[0]
    arguments: dict[str, Any] = {"colour_spaces": ("hsv", "hue"), "measures": ("TSF", "F"), "width": None}
    search = SelectiveSearch(**arguments)
    first, again = search(image), rebuild(search.recipe)(image)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(SelectiveSearch(**arguments, max_proposals=50)(image), first[:50])
    assert not np.array_equal(SelectiveSearch(**arguments | {"measures": ("TSF",)})(image), first)


def test_an_image_of_one_colour_has_one_proposal() -> None:
    assert SelectiveSearch()(np.full((30, 40, 3), 77, np.uint8)).tolist() == [[0, 0, 40, 30]]
    assert SelectiveSearch(min_side=600)(np.full((30, 40, 3), 77, np.uint8)).shape == (0, 4)


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("skimage"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'detection\[proposals\]'"):
        SelectiveSearch()(np.zeros((10, 10, 3), np.uint8))
