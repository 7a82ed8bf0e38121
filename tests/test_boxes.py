"""Box arithmetic against torchvision.ops and against values worked out elsewhere."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import ops
from torchvision.models.detection._utils import BoxCoder as ReferenceCoder

from detection import boxes as box_arithmetic
from detection.boxes import (
    BoxCoder,
    box_area,
    clip_boxes,
    grouped_nms,
    is_large_enough,
    nms_apart,
    nms_in_blocks,
    pairwise_iou,
    resize_boxes,
    soft_nms,
)
from detection.recipes import describe, rebuild

seeds = st.integers(0, 2**31)
counts = st.integers(0, 30)


def random_boxes(seed: int, count: int, extent: float = 100.0, quantum: float = 0.0) -> Tensor:
    """Boxes `(count, 4)`, some of them without width or height; multiples of `quantum` (so that ties occur)."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand((count, 2), generator=generator) * extent
    size = torch.rand((count, 2), generator=generator) * extent / 2
    size = size * (torch.rand((count, 2), generator=generator) > 0.1)
    boxes = torch.cat((start, start + size), dim=1)
    return (boxes / quantum).round() * quantum if quantum else boxes


@settings(deadline=None, max_examples=50)
@given(seeds, counts, counts, st.sampled_from([0.0, 10.0]))
def test_iou_and_area_equal_torchvision(seed: int, n: int, m: int, quantum: float) -> None:
    a, b = random_boxes(seed, n, quantum=quantum), random_boxes(seed + 1, m, quantum=quantum)
    torch.testing.assert_close(box_area(a), ops.box_area(a))
    # torchvision's quotient is 0 / 0 for two boxes without area.
    torch.testing.assert_close(pairwise_iou(a, b), ops.box_iou(a, b).nan_to_num(0.0))


def test_iou_of_a_unit_box_with_its_parts() -> None:
    parts = [[0, 0, 1, 1], [0, 0, 0.5, 1], [0, 0, 1, 0.5], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.5, 0.5, 1.5, 1.5]]
    expected = torch.tensor([[1, 0.5, 0.5, 0.25, 0.25, 0.25 / 1.75]])
    torch.testing.assert_close(pairwise_iou(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor(parts)), expected)


def test_iou_broadcasts_over_images() -> None:
    gt = torch.stack([random_boxes(i, 5) for i in range(3)])
    anchors = random_boxes(9, 11)
    expected = torch.stack([pairwise_iou(g, anchors) for g in gt])
    assert torch.equal(pairwise_iou(gt, anchors), expected)


def test_iou_of_half_precision_boxes_is_computed_in_float32() -> None:
    a, b = random_boxes(0, 20, 1000).bfloat16(), random_boxes(1, 20, 1000).bfloat16()
    assert pairwise_iou(a, b).dtype == torch.float32
    assert torch.equal(pairwise_iou(a, b), pairwise_iou(a.float(), b.float()))


@settings(deadline=None, max_examples=30)
@given(seeds, counts, st.integers(1, 90), st.integers(1, 90), st.sampled_from([1e-3, 1.0, 20.0]))
def test_clip_and_size_filter_equal_torchvision(seed: int, n: int, height: int, width: int, least: float) -> None:
    boxes = random_boxes(seed, n) - 10
    clipped = clip_boxes(boxes, torch.tensor([height, width]))
    assert torch.equal(clipped, ops.clip_boxes_to_image(boxes, (height, width)))
    assert torch.equal(is_large_enough(clipped, least).nonzero()[:, 0], ops.remove_small_boxes(clipped, least))


def test_clip_takes_each_image_its_own_size() -> None:
    boxes = torch.tensor([[-5.0, -5, 50, 50]]).expand(2, 1, 4)
    clipped = clip_boxes(boxes, torch.tensor([[10, 20], [30, 40]]))
    assert clipped.tolist() == [[[0, 0, 20, 10]], [[0, 0, 40, 30]]]


def test_a_side_of_exactly_the_minimum_is_large_enough() -> None:
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.25], [0, 0, -1, 1], [0, 0, math.nan, 1]])
    assert is_large_enough(boxes, 0.5).tolist() == [True, False, False, False]


def test_resize_scales_x_by_width_and_y_by_height() -> None:
    boxes = torch.tensor([[10.0, 20, 30, 40]])
    assert resize_boxes(boxes, torch.tensor([100, 200]), torch.tensor([50, 400])).tolist() == [[20, 10, 60, 20]]


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5), (5, 5, 10, 10)])
@settings(deadline=None, max_examples=25)
@given(seeds)
def test_coder_round_trip_and_torchvision(weights: tuple[float, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand((2, 20, 2), generator=generator) * 500
    boxes, gt = (  # sides of 8 to 308: no ratio comes near the coder's bound
        torch.cat((start + shift, start + shift + 8 + torch.rand((2, 20, 2), generator=generator) * 300), dim=-1)
        for shift in (0, 5)
    )
    coder, reference = BoxCoder(weights), ReferenceCoder(weights)
    deltas = coder.encode(gt, boxes)
    torch.testing.assert_close(deltas.flatten(0, 1), reference.encode_single(gt.flatten(0, 1), boxes.flatten(0, 1)))
    torch.testing.assert_close(coder.decode(deltas, boxes), gt, atol=1e-3, rtol=1e-5)
    wild = torch.randn((2, 20, 4), generator=generator) * 10
    torch.testing.assert_close(
        coder.decode(wild, boxes).flatten(0, 1), reference.decode_single(wild.flatten(0, 1), boxes.flatten(0, 1))
    )


def test_coder_encodes_known_deltas() -> None:
    gt = torch.tensor([[1.0, 1, 3, 3], [2, 2, 6, 6]])
    boxes = torch.tensor([[0.8, 1.1, 3.2, 2.8], [2.3, 2.5, 7, 8]])
    expected = torch.tensor([[0, 0.2941, -0.9116, 0.8126], [-1.3830, -2.2727, -0.8063, -1.5923]])
    torch.testing.assert_close(BoxCoder((10, 10, 5, 5)).encode(gt, boxes), expected, atol=5e-5, rtol=0)


def test_coder_decodes_known_boxes() -> None:
    rois = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [5, 5, 5, 5]])
    deltas = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 2, -1], [0.7, -1.9, -0.5, 0.3]])
    decoded = BoxCoder().decode(deltas, rois)
    assert decoded[2, 0].item() == pytest.approx(-3.1945, abs=5e-5)
    expected = [[0, 0, 1, 1], [0.1409, 0.1409, 2.8591, 2.8591], [0, 0.3161, 4.1945, 0.6839], [5, 5, 5, 5]]
    clipped = clip_boxes(decoded, torch.tensor([32, 32]))
    torch.testing.assert_close(clipped, torch.tensor(expected), atol=5e-5, rtol=0)


def test_coder_bounds_growth() -> None:
    decoded = BoxCoder().decode(torch.tensor([[0.0, 0, 0, 10]]), torch.tensor([[0.0, 0, 16, 16]]))
    torch.testing.assert_close(decoded, torch.tensor([[0.0, -492, 16, 508]]), atol=1e-3, rtol=0)


def test_coder_gives_minus_infinity_for_a_box_without_size() -> None:
    deltas = BoxCoder().encode(torch.tensor([[5.0, 5, 5, 9]]), torch.tensor([[0.0, 0, 10, 10]]))
    assert deltas[0, 2] == -math.inf and deltas[0, 3].isfinite()


def test_coder_decodes_half_precision_in_float32() -> None:
    boxes = torch.tensor([[513.3, 700.7, 530.1, 733.9]])
    decoded = BoxCoder().decode(torch.zeros(1, 4, dtype=torch.bfloat16), boxes)
    torch.testing.assert_close(decoded, boxes)


def nms_in_python(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    """The definition, one pair at a time."""
    iou = ops.box_iou(boxes, boxes).nan_to_num(0.0)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(groups[i] != groups[k] or iou[i, k] <= threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("way", ["at once", "one by one", "in blocks"])
@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(0, 40), st.integers(1, 6), st.sampled_from([0.25, 0.5, 0.75]))
def test_grouped_nms_equals_its_definition_and_torchvision(
    way: str, seed: int, n: int, groups: int, threshold: float
) -> None:
    boxes = random_boxes(seed, n, quantum=5.0)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, generator=generator)
    group = torch.randint(groups, (n,), generator=generator)
    limits = {"PAIRS_OF_A_CALL": math.inf if way == "at once" else 0}
    limits |= {"BLOCK": 3, "FEWEST_IN_BLOCKS": 4} if way == "in blocks" else {}
    with patch.multiple(box_arithmetic, **limits):
        keep = grouped_nms(boxes, scores, group, threshold)
    assert keep.tolist() == nms_in_python(boxes, scores, group, threshold)
    assert keep.tolist() == ops.batched_nms(boxes, scores, group, threshold).tolist()


@pytest.mark.parametrize("count", [200, 999, 3000])
@pytest.mark.parametrize("spread", [30, 300])
def test_nms_in_blocks_keeps_what_the_kernel_keeps(count: int, spread: int) -> None:
    torch.manual_seed(count + spread)
    corner = torch.rand(count, 2) * spread
    boxes = torch.cat((corner, corner + 8 + torch.rand(count, 2) * 30), 1)
    scores = torch.randint(count // 2, (count,)) / count  # some are equal
    for threshold in (0.0, 0.5, 0.7, 1.0):
        found = nms_in_blocks(boxes, scores, threshold)
        assert found.tolist() == ops.nms(boxes, scores, threshold).tolist()
    assert found.tolist() == scores.argsort(descending=True, stable=True).tolist()


def test_nms_keeps_a_box_at_exactly_the_threshold() -> None:
    boxes, scores, group = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]]), torch.tensor([0.9, 0.8]), torch.zeros(2).long()
    assert grouped_nms(boxes, scores, group, 0.5).tolist() == [0, 1]
    assert grouped_nms(boxes, scores, group, 0.49).tolist() == [0]


def test_one_launch_of_nms_equals_one_for_each_group() -> None:
    """As on an accelerator: 64 images of 90 classes, where float32 would decide some pairs otherwise."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((3000, 2), generator=generator) * 800
    boxes = torch.cat((corner, corner + 10 + torch.rand((3000, 2), generator=generator) * 100), dim=1)
    boxes = torch.cat((boxes, boxes + torch.randn((3000, 4), generator=generator) * 4))
    groups = torch.randint(64 * 90, (3000,), generator=generator).repeat(2)
    scores = torch.randperm(6000, generator=generator) / 6000
    expected = grouped_nms(boxes, scores, groups, 0.5)
    assert torch.equal(nms_apart(boxes, scores, groups, 0.5), expected)
    assert 1500 < len(expected) < 4500
    shift = (groups * (boxes.amax() - boxes.amin() + 1))[:, None]
    assert not torch.equal(ops.nms(boxes + shift, scores, 0.5), expected)  # what is guarded against
    assert len(nms_apart(boxes[:0], scores[:0], groups[:0], 0.5)) == 0


def test_soft_nms_by_hand() -> None:
    """Two unit squares that share half (IoU 1/3), one of another group on top of the first, and one far away."""
    boxes = torch.tensor([[0.0, 0, 2, 1], [1, 0, 3, 1], [0, 0, 2, 1], [9, 9, 10, 10]])[None]
    scores, groups = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[0, 0, 1, 0]])
    taken, faded = soft_nms(boxes, scores, groups, 0.5, 3)
    assert taken.tolist() == [[0, 2, 1]]  # 0.8 exp(-(1/3)^2 / 0.5) = 0.6406 comes after 0.7 and before 0.6
    torch.testing.assert_close(faded, torch.tensor([[0.9, 0.7, 0.8 * math.exp(-2 / 9)]]))
    taken, faded = soft_nms(boxes, scores, groups, 0.5, 9)
    assert taken.tolist() == [[0, 2, 1, 3]] and faded[0, 3] == scores[0, 3]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 30), st.floats(0.05, 2))
def test_soft_nms_equals_its_definition(seed: int, count: int, sigma: float) -> None:
    """A plain loop over lists, one image and group at a time."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand((2, count, 2), generator=generator) * 8
    boxes = torch.cat((corner, corner + torch.rand((2, count, 2), generator=generator) * 8), dim=-1)
    scores, groups = torch.rand((2, count), generator=generator), torch.arange(count).expand(2, -1) % 3
    taken, faded = soft_nms(boxes, scores, groups, sigma, 100)
    for image in range(2):
        left = {i: float(scores[image, i]) for i in range(count)}
        for index, value in zip(taken[image].tolist(), faded[image].tolist(), strict=True):
            best = max(left, key=lambda i: left[i])
            assert abs(value - left[best]) < 1e-5 and abs(left[index] - left[best]) < 1e-5
            del left[index]
            for i in left:
                if groups[image, i] == groups[image, index]:
                    iou = float(ops.box_iou(boxes[image, i][None], boxes[image, index][None]).nan_to_num())
                    left[i] *= math.exp(-(iou**2) / sigma)
        assert not left


def test_a_checkpoint_keeps_a_box_coder() -> None:
    again = rebuild(describe(BoxCoder((2.0, 2.0, 1.0, 0.5), max_log_ratio=1.5)))
    assert (again.weights, again.max_log_ratio) == ((2.0, 2.0, 1.0, 0.5), 1.5)
