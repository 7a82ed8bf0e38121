"""Which detection is which: partners, ties that NMS breaks either way, and what is no tie."""

from __future__ import annotations

import torch
from torch import Tensor

from detection.interop.partners import pair_boxes, pair_detections


def found(count: int) -> dict[str, Tensor]:
    """Boxes of 20 pixels in a row, of two labels, no two of equal score."""
    left = 30.0 * torch.arange(count)
    boxes = torch.stack((left, left * 0, left + 20, left * 0 + 20), dim=1)
    return {"boxes": boxes, "labels": torch.arange(count) % 2 + 1, "scores": torch.linspace(0.9, 0.1, count)}


def with_rows(seen: dict[str, Tensor], rows: list[int], move: float, score: float = 0.0) -> dict[str, Tensor]:
    """Some of the boxes moved, and their scores."""
    moved = {name: values.clone() for name, values in seen.items()}
    moved["boxes"][rows] += move
    moved["scores"][rows] += score
    return moved


def test_detections_in_another_order_are_partners():
    a = found(10)
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    pairs = pair_detections(a, {name: values[order] for name, values in a.items()})
    assert (order[pairs.right] == pairs.left).all() and len(pairs.left) == 10
    assert pairs.gaps.max() == 0 and pairs.ties == 0 and pairs.alone == 0


def test_of_two_boxes_of_equal_score_either_may_be_kept():
    a = found(100)
    for move in (0.15, 3.0):  # near, and too far for a partner
        pairs = pair_detections(a, with_rows(a, [7], move))
        assert (len(pairs.left), pairs.ties, pairs.alone) == (99, 1, 0) and pairs.gaps.max() == 0
        assert 7 not in pairs.left and 7 not in pairs.right


def test_a_box_that_moved_with_its_score_is_no_tie():
    a = found(100)
    near = pair_detections(a, with_rows(a, [7], 0.15, score=1e-3))
    assert (near.ties, near.alone) == (0, 0) and float(near.gaps.max()) == float(torch.tensor(0.15, dtype=torch.float))
    far = pair_detections(a, with_rows(a, [7], 3.0, score=1e-3))
    assert (len(far.left), far.ties, far.alone) == (99, 0, 2)


def test_a_box_elsewhere_and_one_of_another_label_are_no_ties():
    a = found(100)
    assert pair_detections(a, with_rows(a, [7], 12.0)).alone == 2  # IoU 0.09
    b = with_rows(a, [], 0.0)
    b["labels"][7] += 1
    assert pair_detections(a, b).alone == 2


def test_many_boxes_that_moved_are_no_ties():
    """A detector that decodes its boxes a little off has equal scores, too."""
    a = found(100)
    two, three = (pair_detections(a, with_rows(a, list(range(n)), 0.15)) for n in (2, 3))
    assert two.ties == 2 and two.gaps.max() == 0
    assert three.ties == 0 and three.alone == 0 and three.gaps.max() > 0.1
    assert pair_detections(found(49), with_rows(found(49), [3], 3.0)).alone == 2  # fewer allow none


def test_none_are_partners_of_none():
    some, none = found(3), found(0)
    assert pair_detections(none, none)[3:] == (0, 0)
    assert pair_detections(some, none).alone == pair_detections(none, some).alone == 3
    assert pair_boxes(some["boxes"], none["boxes"]).alone == 3


def test_a_box_that_is_no_number_has_no_partner():
    a = found(3)
    b = with_rows(a, [1], float("nan"))
    assert pair_detections(a, b).alone == 2 and pair_boxes(a["boxes"], b["boxes"]).alone == 2
