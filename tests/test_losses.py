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
from detection.losses import (
    CIoULoss,
    GIoULoss,
    OverlapLoss,
    SmoothL1Loss,
    box_loss_of_foreground,
    classification_loss,
    mean_over,
    objectness_loss,
)

UNIT_BOX = torch.tensor([0.0, 0.0, 1.0, 1.0])


class Given:
    """A coder by which the deltas wanted are those of the "ground truth" itself, whatever the boxes."""

    def encode(self, gt_boxes: Tensor, boxes: Tensor) -> Tensor:
        return gt_boxes

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        return deltas


def smooth_l1(deltas: Tensor, wanted: Tensor, foreground: Tensor, valid: Tensor, beta: float = 1 / 9) -> Tensor:
    """The box loss of a batch as both stages compute it, of deltas and of those wanted."""
    boxes = UNIT_BOX.expand(len(deltas), 4)
    rows = box_loss_of_foreground(SmoothL1Loss(beta), deltas, boxes, wanted, foreground, Given())
    return mean_over(rows, foreground, valid)


def overlap(loss: OverlapLoss, boxes: Tensor, gt_boxes: Tensor, foreground: Tensor, valid: Tensor) -> Tensor:
    """The loss of a batch of refined boxes, likewise."""
    rows = box_loss_of_foreground(loss, boxes, UNIT_BOX.expand(len(boxes), 4), gt_boxes, foreground, Given())
    return mean_over(rows, foreground, valid)


def classify(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    return mean_over(classification_loss(logits, labels), valid, valid)


def score(logits: Tensor, foreground: Tensor, valid: Tensor) -> Tensor:
    return mean_over(objectness_loss(logits, foreground.float()), valid, valid)


def test_fast_rcnn_losses_of_a_seeded_predictor() -> None:
    """Values published with another implementation: L1, a delta row for each foreground class, both over 2 rows."""
    torch.manual_seed(132)
    scores, delta = nn.Linear(8, 6), nn.Linear(8, 20)
    for layer, std in ((scores, 0.01), (delta, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    features = torch.rand(2, 8)
    boxes = torch.tensor([[0.8, 1.1, 3.2, 2.8], [2.3, 2.5, 7, 8]])
    gt_boxes = torch.tensor([[1.0, 1, 3, 3], [2, 2, 6, 6]])
    classes, valid = torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool)
    own = delta(features).view(2, 5, 4)[torch.arange(2), classes]
    torch.testing.assert_close(
        classify(scores(features), classes, valid), torch.tensor(1.7951188087), atol=1e-6, rtol=0
    )
    rows = SmoothL1Loss(beta=0)(own, boxes, gt_boxes, BoxCoder((10, 10, 5, 5)))
    torch.testing.assert_close(mean_over(rows, valid, valid), torch.tensor(4.0357131958), atol=1e-6, rtol=0)


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
    torch.testing.assert_close(classify(logits, labels, valid), expected[0])
    torch.testing.assert_close(smooth_l1(own, wanted, labels > 0, valid), expected[1])


def test_rpn_losses_equal_their_formulas() -> None:
    logits, deltas, wanted, labels = rows(1)
    foreground, valid = labels > 3, torch.ones_like(labels, dtype=torch.bool)
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], foreground.float())
    torch.testing.assert_close(score(logits[:, 0], foreground, valid), expected)
    expected = F.smooth_l1_loss(deltas[foreground, 0], wanted[foreground], beta=1 / 9, reduction="sum") / len(labels)
    torch.testing.assert_close(smooth_l1(deltas[:, 0], wanted, foreground, valid), expected)


def test_rows_that_are_not_valid_change_nothing() -> None:
    logits, deltas, wanted, labels = rows(2)
    valid = torch.arange(len(labels)) < 25
    foreground = (labels > 0) & valid
    real = torch.ones(25, dtype=torch.bool)
    torch.testing.assert_close(classify(logits, labels, valid), classify(logits[:25], labels[:25], real))
    torch.testing.assert_close(score(logits[:, 0], foreground, valid), score(logits[:25, 0], foreground[:25], real))
    wanted[25:] = torch.nan
    torch.testing.assert_close(
        smooth_l1(deltas[:, 0], wanted, foreground, valid),
        smooth_l1(deltas[:25, 0], wanted[:25], foreground[:25], real),
    )


def test_without_foreground_the_box_loss_is_zero_and_has_a_gradient() -> None:
    _, deltas, wanted, _ = rows(3)
    deltas.requires_grad_()
    wanted[:] = -torch.inf  # what background rows may hold
    none, valid = torch.zeros(40, dtype=torch.bool), torch.ones(40, dtype=torch.bool)
    loss = smooth_l1(deltas[:, 0], wanted, none, valid)
    loss.backward()
    assert loss.item() == 0 and deltas.grad is not None and not deltas.grad.any()


def test_without_a_valid_row_all_losses_are_zero_and_have_gradients() -> None:
    logits, deltas, wanted, labels = rows(4)
    logits.requires_grad_(), deltas.requires_grad_()
    none = torch.zeros(40, dtype=torch.bool)
    losses = [
        score(logits[:, 0], none, none),
        classify(logits, labels, none),
        smooth_l1(deltas[:, 0], wanted, none, none),
    ]
    torch.stack(losses).sum().backward()
    assert [loss.item() for loss in losses] == [0, 0, 0]
    assert logits.grad is not None and not logits.grad.any() and deltas.grad is not None and not deltas.grad.any()


def test_box_losses_of_half_precision_are_float32() -> None:
    """Logits are cast by the heads; `test_two_stage` has all four losses."""
    _, deltas, wanted, labels = rows(5)
    valid = torch.ones_like(labels, dtype=torch.bool)
    half = deltas[:, 0].bfloat16()
    found = smooth_l1(half, wanted, labels > 0, valid)
    assert found.dtype == torch.float32
    assert torch.equal(found, smooth_l1(half.float(), wanted, labels > 0, valid))


# The values that Detectron2 publishes for its losses: boxes that share a half, and the same box.
UNIT, HALF = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]


def test_overlap_losses_of_published_values() -> None:
    one = torch.ones(1, dtype=torch.bool)
    unit, half = torch.tensor([UNIT]), torch.tensor([HALF])
    # GIoU of boxes inside each other is their IoU; centres 0.25 apart in a hull of diagonal sqrt(2): d^2 / c^2 = 1/32.
    torch.testing.assert_close(overlap(GIoULoss(), unit, half, one, one), torch.tensor(0.5))
    torch.testing.assert_close(overlap(CIoULoss(), unit, half, one, one), torch.tensor(0.5345), atol=1e-4, rtol=0)
    apart = torch.tensor([[1.0, 1.0, 2.0, 2.0]])  # hull of 4, union of 2: 1 + (4 - 2) / 4
    torch.testing.assert_close(overlap(GIoULoss(2.0), unit, apart, one, one), torch.tensor(3.0))


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
    found = overlap(loss, boxes, gt_boxes, foreground, valid)
    single = overlap(loss, torch.tensor([UNIT]), torch.tensor([HALF]), foreground[:1], valid[:1])
    torch.testing.assert_close(found, single / 3)
    none = overlap(loss, boxes, gt_boxes, foreground & False, valid)
    assert none == 0
    (found + none).backward()
    assert boxes.grad is not None and boxes.grad.isfinite().all() and boxes.grad[0].any() and not boxes.grad[2:].any()
