"""Losses against published values and torchvision's formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import complete_box_iou_loss, generalized_box_iou_loss

from detection.boxes import BoxCoder
from detection.losses import CIoULoss, GIoULoss, OverlapLoss, box_loss, classification_loss, objectness_loss


def test_fast_rcnn_losses_of_a_seeded_predictor() -> None:
    """Values published with another implementation: L1, a delta row for each foreground class, both over 2 rows."""
    torch.manual_seed(132)
    score, delta = nn.Linear(8, 6), nn.Linear(8, 20)
    for layer, std in ((score, 0.01), (delta, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    features = torch.rand(2, 8)
    boxes = torch.tensor([[0.8, 1.1, 3.2, 2.8], [2.3, 2.5, 7, 8]])
    gt_boxes = torch.tensor([[1.0, 1, 3, 3], [2, 2, 6, 6]])
    classes, valid = torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool)
    own = delta(features).view(2, 5, 4)[torch.arange(2), classes]
    gt_deltas = BoxCoder((10, 10, 5, 5)).encode(gt_boxes, boxes)
    torch.testing.assert_close(
        classification_loss(score(features), classes, valid), torch.tensor(1.7951188087), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        box_loss(own, gt_deltas, valid, valid, beta=0), torch.tensor(4.0357131958), atol=1e-6, rtol=0
    )


def rows(seed: int = 0, count: int = 40, classes: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((count, classes), generator=generator) * 3
    deltas = torch.randn((count, classes, 4), generator=generator)
    wanted = torch.randn((count, 4), generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return logits, deltas, wanted, labels


def test_roi_losses_equal_torchvision() -> None:
    logits, deltas, wanted, labels = rows()
    valid = torch.ones_like(labels, dtype=torch.bool)
    expected = fastrcnn_loss(logits, deltas.flatten(1), [labels], [wanted])
    own = deltas[torch.arange(len(labels)), labels]
    torch.testing.assert_close(classification_loss(logits, labels, valid), expected[0])
    torch.testing.assert_close(box_loss(own, wanted, labels > 0, valid), expected[1])


def test_rpn_losses_equal_their_formulas() -> None:
    logits, deltas, wanted, labels = rows(1)
    foreground, valid = labels > 3, torch.ones_like(labels, dtype=torch.bool)
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], foreground.float())
    torch.testing.assert_close(objectness_loss(logits[:, 0], foreground, valid), expected)
    expected = F.smooth_l1_loss(deltas[foreground, 0], wanted[foreground], beta=1 / 9, reduction="sum") / len(labels)
    torch.testing.assert_close(box_loss(deltas[:, 0], wanted, foreground, valid), expected)


def test_rows_that_are_not_valid_change_nothing() -> None:
    logits, deltas, wanted, labels = rows(2)
    valid = torch.arange(len(labels)) < 25
    foreground = (labels > 0) & valid
    real = torch.ones(25, dtype=torch.bool)
    torch.testing.assert_close(
        classification_loss(logits, labels, valid), classification_loss(logits[:25], labels[:25], real)
    )
    torch.testing.assert_close(
        objectness_loss(logits[:, 0], foreground, valid), objectness_loss(logits[:25, 0], foreground[:25], real)
    )
    wanted[25:] = torch.nan
    torch.testing.assert_close(
        box_loss(deltas[:, 0], wanted, foreground, valid), box_loss(deltas[:25, 0], wanted[:25], foreground[:25], real)
    )


def test_without_foreground_the_box_loss_is_zero_and_has_a_gradient() -> None:
    _, deltas, wanted, _ = rows(3)
    deltas.requires_grad_()
    wanted[:] = -torch.inf  # what background rows may hold
    none, valid = torch.zeros(40, dtype=torch.bool), torch.ones(40, dtype=torch.bool)
    loss = box_loss(deltas[:, 0], wanted, none, valid)
    loss.backward()
    assert loss.item() == 0 and deltas.grad is not None and not deltas.grad.any()


def test_without_a_valid_row_all_losses_are_zero_and_have_gradients() -> None:
    logits, deltas, wanted, labels = rows(4)
    logits.requires_grad_(), deltas.requires_grad_()
    none = torch.zeros(40, dtype=torch.bool)
    losses = [
        objectness_loss(logits[:, 0], none, none),
        classification_loss(logits, labels, none),
        box_loss(deltas[:, 0], wanted, none, none),
    ]
    torch.stack(losses).sum().backward()
    assert [loss.item() for loss in losses] == [0, 0, 0]
    assert logits.grad is not None and not logits.grad.any() and deltas.grad is not None and not deltas.grad.any()


def test_losses_of_half_precision_are_float32() -> None:
    logits, deltas, wanted, labels = rows(5)
    valid = torch.ones_like(labels, dtype=torch.bool)
    half = logits.bfloat16(), deltas[:, 0].bfloat16()
    assert classification_loss(half[0], labels, valid).dtype == torch.float32
    assert objectness_loss(half[0][:, 0], labels > 0, valid).dtype == torch.float32
    assert box_loss(half[1], wanted, labels > 0, valid).dtype == torch.float32


# The values that Detectron2 publishes for its losses: boxes that share a half, and the same box.
UNIT, HALF = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]


def test_overlap_losses_of_published_values() -> None:
    one = torch.ones(1, dtype=torch.bool)
    unit, half = torch.tensor([UNIT]), torch.tensor([HALF])
    # GIoU of boxes inside each other is their IoU; centres 0.25 apart in a hull of diagonal sqrt(2): d^2 / c^2 = 1/32.
    torch.testing.assert_close(GIoULoss()(unit, half, one, one), torch.tensor(0.5))
    torch.testing.assert_close(CIoULoss()(unit, half, one, one), torch.tensor(0.5345), atol=1e-4, rtol=0)
    apart = torch.tensor([[1.0, 1.0, 2.0, 2.0]])  # hull of 4, union of 2: 1 + (4 - 2) / 4
    torch.testing.assert_close(GIoULoss(2.0)(unit, apart, one, one), torch.tensor(3.0))


@pytest.mark.parametrize(
    ("loss", "reference"), [(GIoULoss(), generalized_box_iou_loss), (CIoULoss(), complete_box_iou_loss)]
)
def test_overlap_losses_and_their_gradients_equal_torchvision(loss: OverlapLoss, reference: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((2, 200, 2), generator=generator) * 60
    pairs = torch.cat((corner, corner + 0.5 + torch.rand((2, 200, 2), generator=generator) * 50), dim=2)
    found: list[Tensor] = []
    for of_pairs in (loss.of_pairs, reference):
        boxes = pairs[0].clone().requires_grad_()
        values = of_pairs(boxes, pairs[1])
        values.sum().backward()
        assert boxes.grad is not None
        found += [values.detach(), boxes.grad]
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [GIoULoss(), CIoULoss()])
def test_overlap_losses_count_foreground_over_all_valid_rows(loss: OverlapLoss) -> None:
    boxes = torch.tensor([UNIT, UNIT, [0.0, 0, -5, float("nan")], [float("inf")] * 4], requires_grad=True)
    gt_boxes = torch.tensor([HALF, UNIT, [float("nan")] * 4, HALF])
    foreground, valid = torch.tensor([True, True, False, False]), torch.tensor([True, True, True, False])
    found = loss(boxes, gt_boxes, foreground, valid)
    single = loss(torch.tensor([UNIT]), torch.tensor([HALF]), foreground[:1], valid[:1])
    torch.testing.assert_close(found, single / 3)
    none = loss(boxes, gt_boxes, foreground & False, valid)
    assert none == 0
    (found + none).backward()
    assert boxes.grad is not None and boxes.grad.isfinite().all() and boxes.grad[0].any() and not boxes.grad[2:].any()
