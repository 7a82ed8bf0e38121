"""Pooling, plain and in its quicker forms, against torchvision's, in values and gradients."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool
from torchvision.ops.poolers import LevelMapper

from detection.models.fast.fast_pooling import CanvasPooler, GatherPooler
from detection.models.pooling import RoIPool, RoIPooler, assign_levels
from detection.parts import FeatureMaps

STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 256, 320


KINDS = [RoIPooler, CanvasPooler, GatherPooler]
Kind = type[RoIPooler]


def pool(pooler: RoIPooler | RoIPool, features: list[Tensor], boxes: Tensor, strides: tuple[int, ...]) -> Tensor:
    return pooler(FeatureMaps(tuple(features), strides), boxes)


def make_features(channels: int = 3, seed: int = 0, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((images, channels, HEIGHT // s, WIDTH // s), generator=generator) for s in STRIDES]


def special_boxes() -> Tensor:
    """Boxes at the borders, narrower than a cell, and without size, on every level; `(2, P, 4)`."""
    w, h = float(WIDTH), float(HEIGHT)
    boxes = [
        [0, 0, w, h],
        [0, 0, 40, 40],
        [w - 40, h - 40, w, h],
        [w - 1, 0, w, h],
        [0, h - 1, w, h],
        [w - 0.5, h - 0.5, w, h],
        [0, 0, 0.5, 0.5],
        [w - 2, 10, w, 200],
        [10, h - 2, 300, h],
        [100, 100, 100, 100],
        [w, h, w, h],
        [0, 0, 0, 0],
        [30, 10, 30, 200],
        [3.3, 7.7, 119.1, 83.2],
        [100, 20, 300, 250],
        [5, 5, 230, 235],
    ]
    shifted = torch.tensor(boxes) * 0.97
    return torch.stack((torch.tensor(boxes), shifted))


def random_boxes(seed: int, count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([WIDTH, HEIGHT], dtype=torch.float32)
    a, b = (torch.rand((2, count, 2), generator=generator) * limit for _ in range(2))
    scale = torch.rand((2, count, 1), generator=generator) ** 3  # as many small as large ones
    b = a + (b - a) * scale
    return torch.cat((torch.minimum(a, b), torch.maximum(a, b)), dim=-1)


def reference(features: list[Tensor], boxes: Tensor, sampling: int, aligned: bool, output_size: int = 7) -> Tensor:
    """torchvision's `roi_align`, level by level, as its MultiScaleRoIAlign does but with a choice of `aligned`."""
    levels = assign_levels(boxes, 2, 5).flatten() - 2
    image = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    rois = torch.cat((image[:, None].float(), boxes.flatten(0, 1)), dim=1)
    pooled = features[0].new_zeros((len(rois), features[0].shape[1], output_size, output_size))
    for i, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        own = levels == i
        pooled[own] = roi_align(feature, rois[own], output_size, 1 / stride, sampling, aligned)
    return pooled


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_torchvision(kind: Kind, sampling: int, aligned: bool) -> None:
    boxes = torch.cat((special_boxes(), random_boxes(0)), dim=1)
    ours, theirs = make_features(), make_features()
    for feature in (*ours, *theirs):
        feature.requires_grad_()
    pooled = pool(kind(7, sampling, aligned, 4), ours, boxes, STRIDES)
    expected = reference(theirs, boxes, sampling, aligned)
    torch.testing.assert_close(pooled, expected, atol=2e-4, rtol=1e-4)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (pooled * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "sampling"), [(GatherPooler, 2), (CanvasPooler, 2), (CanvasPooler, 0), (RoIPooler, 2), (RoIPooler, 0)]
)
@pytest.mark.parametrize("aligned", [False, True])
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_random_boxes_equal_torchvision(kind: Kind, sampling: int, aligned: bool, seed: int) -> None:
    features, boxes = make_features(seed=1), random_boxes(seed)
    pooled = pool(kind(3, sampling, aligned, 4), features, boxes, STRIDES)
    torch.testing.assert_close(pooled, reference(features, boxes, sampling, aligned, 3), atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_multi_scale_roi_align(kind: Kind) -> None:
    features, boxes = make_features(), torch.cat((special_boxes(), random_boxes(3)), dim=1)
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    maps = OrderedDict((str(i), feature) for i, feature in enumerate(features))
    expected = theirs(maps, list(boxes), [(HEIGHT, WIDTH)] * 2)
    ours = pool(kind(), [*features, torch.zeros(2, 3, 4, 5)], boxes, (*STRIDES, 64))
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_maps_of_one_stride_pool_from_the_first(kind: Kind) -> None:
    """As MobileNet's: torchvision maps all regions to the first of them."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn((2, 3, 8, 10), generator=generator) for _ in range(2)]
    boxes = random_boxes(4)
    theirs = MultiScaleRoIAlign(["0", "1"], 7, 2)
    expected = theirs({str(i): f for i, f in enumerate(features)}, list(boxes), [(HEIGHT, WIDTH)] * 2)
    ours = pool(kind(num_levels=2), features, boxes, (32, 32))
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_level(kind: Kind) -> None:
    features, boxes = make_features()[2:3], random_boxes(5)
    rois = torch.cat((torch.arange(2.0).repeat_interleave(12)[:, None], boxes.flatten(0, 1)), dim=1)
    ours = pool(kind(5, num_levels=1), features, boxes, (16,))
    torch.testing.assert_close(ours, roi_align(features[0], rois, 5, 1 / 16, 2), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_features_keep_the_places_of_boxes(kind: Kind) -> None:
    """Rounded to bfloat16, the corners of boxes would be off by cells; only features may lose digits."""
    boxes = torch.cat((special_boxes(), random_boxes(6, 40)), dim=1)
    exact = make_features(seed=2)
    halved = [feature.bfloat16() for feature in exact]
    ours = pool(kind(num_levels=4), halved, boxes, STRIDES)
    assert ours.dtype == torch.bfloat16
    expected = reference([feature.float() for feature in halved], boxes, 2, False)
    torch.testing.assert_close(ours.float(), expected, atol=0.05, rtol=0.02)


KNOWN_ROWS = {
    False: [[7.5, 8, 8.5, 9], [10, 10.5, 11, 11.5], [12.5, 13, 13.5, 14], [15, 15.5, 16, 16.5]],
    True: [[4.5, 5, 5.5, 6], [7, 7.5, 8, 8.5], [9.5, 10, 10.5, 11], [12, 12.5, 13, 13.5]],
}


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_published_values(kind: Kind, sampling: int, aligned: bool) -> None:
    feature = torch.arange(25.0).view(1, 1, 5, 5)
    pooled = pool(kind(4, sampling, aligned, 1), [feature], torch.tensor([[[1.0, 1, 3, 3]]]), (1,))
    assert pooled[0, 0].tolist() == KNOWN_ROWS[aligned]


@pytest.mark.parametrize("sampling", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_grid_sample(kind: Kind, sampling: int) -> None:
    """Aligned pooling inside the map is bilinear sampling at the bins' sub-centres, averaged."""
    feature = torch.randn((1, 2, 20, 24), generator=torch.Generator().manual_seed(0))
    x1, y1, x2, y2 = 2.3, 3.1, 17.7, 15.2
    steps = (torch.arange(5 * sampling) + 0.5) / (5 * sampling)
    x, y = x1 + (x2 - x1) * steps, y1 + (y2 - y1) * steps
    grid = torch.stack(torch.meshgrid(x / 12 - 1, y / 10 - 1, indexing="xy"), dim=-1)[None]
    expected = F.avg_pool2d(F.grid_sample(feature, grid, align_corners=False), sampling)
    boxes = torch.tensor([[[x1, y1, x2, y2]]])
    pooled = pool(kind(5, sampling, aligned=True, num_levels=1), [feature], boxes, (1,))
    torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_resolution_gives_the_same_values(kind: Kind) -> None:
    """On a linear map, aligned pooling of the halved map at half the scale changes nothing."""
    y, x = torch.meshgrid(torch.arange(40.0) + 0.5, torch.arange(60.0) + 0.5, indexing="ij")
    feature = (0.01 * x + 0.02 * y)[None, None]
    boxes = torch.tensor([[[10.2, 8.4, 44.4, 30.6]]])
    pooler = kind(7, 2, aligned=True, num_levels=1)
    full = pool(pooler, [feature], boxes, (1,))
    half = pool(pooler, [F.interpolate(feature, scale_factor=0.5, mode="bilinear")], boxes, (2,))
    torch.testing.assert_close(full, half, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_without_size_reads_nothing_when_aligned_between_pixels(kind: Kind) -> None:
    """An aligned box of no size is a single point; one outside the map gives zeros and passes no gradient."""
    feature = torch.ones((1, 1, 5, 5), requires_grad=True)
    boxes = torch.tensor([[[50.0, 50, 50, 50]]])
    pooled = pool(kind(2, 2, aligned=True, num_levels=1), [feature], boxes, (1,))
    pooled.sum().backward()
    assert not pooled.any() and feature.grad is not None and not feature.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_boxes(kind: Kind) -> None:
    pooled = pool(kind(num_levels=4), make_features(), torch.zeros(2, 0, 4), STRIDES)
    assert pooled.shape == (0, 3, 7, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_that_are_not_finite_do_no_harm(kind: Kind) -> None:
    """What a diverged network proposes is marked as not valid further on, but it is pooled like the rest."""
    boxes = random_boxes(7)
    expected = pool(kind(num_levels=4), make_features(), boxes, STRIDES).unflatten(0, (2, -1))
    boxes = torch.cat((boxes, torch.full((2, 1, 4), torch.nan), torch.full((2, 1, 4), torch.inf)), dim=1)
    pooled = pool(kind(num_levels=4), make_features(), boxes, STRIDES).unflatten(0, (2, -1))
    assert torch.equal(pooled[:, :-2], expected)


@pytest.mark.parametrize(("side", "level"), [(111.9, 2), (112, 3), (223.9, 3), (224, 4), (448, 5), (900, 5), (1, 2)])
def test_known_levels(side: float, level: int) -> None:
    assert assign_levels(torch.tensor([[10.0, 20, 10 + side, 20 + side]]), 2, 5).item() == level


def test_levels_equal_torchvision() -> None:
    boxes = random_boxes(8, 400) * 4
    expected = LevelMapper(2, 5)([boxes[0], boxes[1]]).view(2, -1) + 2
    assert torch.equal(assign_levels(boxes, 2, 5), expected)


def test_levels_of_boxes_without_size_or_sense() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 50], [torch.nan] * 4, [9, 9, 1, 20]])
    assert assign_levels(boxes, 2, 5).tolist() == [2, 2, 2, 2]


def max_pooled(features: list[Tensor], boxes: Tensor, output_size: int) -> Tensor:
    """torchvision's `roi_pool`, each region on its level alone."""
    levels = assign_levels(boxes, 2, 5).flatten() - 2
    image = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    rois = torch.cat((image[:, None].float(), boxes.flatten(0, 1)), dim=1)
    pooled = features[0].new_zeros((len(rois), features[0].shape[1], output_size, output_size))
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        pooled[levels == level] = roi_pool(feature, rois[levels == level], output_size, 1 / stride)
    return pooled


@pytest.mark.parametrize("output_size", [3, 7])
def test_max_pooling_equals_torchvision(output_size: int) -> None:
    boxes = torch.cat((special_boxes(), random_boxes(0, 40)), dim=1)
    assert assign_levels(boxes, 2, 5).unique().tolist() == [2, 3, 4]
    ours, theirs = make_features(), make_features()
    for feature in (*ours, *theirs):
        feature.requires_grad_()
    unused = torch.zeros(2, 3, 4, 5)
    pooled = pool(RoIPool(output_size), [*ours, unused], boxes, (*STRIDES, 64))
    expected = max_pooled(theirs, boxes, output_size)
    assert torch.equal(pooled, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (pooled * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 16])
@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 3, 3), [[5, 7], [13, 15]]),
        ((1, 1, 2, 2), [[5, 6], [9, 10]]),
        ((0.6, 0, 3.4, 3), [[6, 7], [14, 15]]),  # columns 1 to 3: the middle one lies in both bins
        ((0, 0, 4, 4), [[10, 11], [14, 15]]),  # a fifth row and column, which the map does not have
        ((2, 3, 2, 3), [[14, 14], [14, 14]]),
        ((4, 4, 4, 4), [[0, 0], [0, 0]]),
    ],
)
def test_max_pooling_by_hand(box: tuple[float, ...], expected: list[list[float]], stride: int) -> None:
    feature = torch.arange(16.0).view(1, 1, 4, 4)
    pooled = pool(RoIPool(2, num_levels=1), [feature], torch.tensor([[box]]) * stride, (stride,))
    assert pooled[0, 0].tolist() == expected


def test_max_pooling_of_nothing_and_of_what_is_not_finite() -> None:
    assert pool(RoIPool(), make_features(), torch.zeros(2, 0, 4), STRIDES).shape == (0, 3, 7, 7)
    boxes = torch.cat((random_boxes(7), torch.full((2, 1, 4), torch.nan), torch.full((2, 1, 4), torch.inf)), dim=1)
    pooled = pool(RoIPool(), make_features(), boxes, STRIDES).unflatten(0, (2, -1))
    assert torch.equal(pooled[:, :-2].flatten(0, 1), max_pooled(make_features(), random_boxes(7), 7))
    halved = pool(RoIPool(), [feature.bfloat16() for feature in make_features()], random_boxes(7), STRIDES)
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), pooled[:, :-2].flatten(0, 1), atol=0.02, rtol=0.01)
