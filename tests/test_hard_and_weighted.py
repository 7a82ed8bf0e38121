"""What may take the place of the default losses and sampler: focal loss, class weights, hard examples, GIoU RPN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detection.anchors import AnchorGenerator
from detection.batch import Batch, pad_objects
from detection.boxes import BoxCoder
from detection.losses import ClassWeights, FocalLoss, GIoULoss
from detection.matching import HardExampleSampler
from detection.models.compose import faster_rcnn
from detection.models.rpn import RegionProposalNetwork
from detection.parts import FeatureMaps


def logits_and_labels(classes: int = 5, count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((count, classes), generator=generator) * 3
    return logits, torch.randint(classes, (count,), generator=generator)


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    logits, labels = logits_and_labels()
    torch.testing.assert_close(FocalLoss(gamma=0)(logits, labels), F.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_loss_of_two_classes_is_that_of_their_difference(gamma: float) -> None:
    """A softmax over two classes is the sigmoid of the difference of their logits, as torchvision has it."""
    logits, labels = logits_and_labels(2)
    expected = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], labels.float(), alpha=-1, gamma=gamma)
    torch.testing.assert_close(FocalLoss(gamma)(logits, labels), expected)
    torch.testing.assert_close(FocalLoss(gamma, weight=4.0)(logits, labels), 4 * expected)


def test_focal_loss_by_hand() -> None:
    """The true class has probability 0.9 and then 0.2, of three: (1 - p)^2 * -log p."""
    logits = torch.tensor([[0.9, 0.05, 0.05], [0.3, 0.5, 0.2]]).log()
    expected = torch.tensor([0.01 * -math.log(0.9), 0.64 * -math.log(0.2)])
    torch.testing.assert_close(FocalLoss()(logits, torch.tensor([0, 2])), expected)


def test_gradient_of_the_focal_loss_is_finite_where_all_is_certain() -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    FocalLoss(gamma=0.5)(logits, torch.tensor([0, 0])).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_class_weights_equal_torchs() -> None:
    logits, labels = logits_and_labels(4)
    weights = [0.2, 1.0, 3.0, 7.0]
    expected = nn.CrossEntropyLoss(torch.tensor(weights), reduction="none")(logits, labels)
    torch.testing.assert_close(ClassWeights(weights)(logits, labels), expected)
    with pytest.raises(ValueError, match="4 class weights for 5 classes, background included"):
        ClassWeights(weights)(*logits_and_labels(5))


def test_class_weights_follow_the_detector_and_are_no_part_of_its_state() -> None:
    model = faster_rcnn(Maps(), 3, class_loss=ClassWeights([1.0, 2.0, 3.0]))
    assert model.double().roi_heads.class_loss.weights.dtype == torch.float64
    assert not [name for name in model.state_dict() if "class_loss" in name]


def sample(labels: list[int], losses: list[float], size: int) -> tuple[list[int], list[bool]]:
    indices, valid = HardExampleSampler(size)(torch.tensor([labels]), lambda: torch.tensor([losses]))
    return indices[0].tolist(), valid[0].tolist()


def test_hardest_are_drawn_foreground_first() -> None:
    labels, losses = [0, 2, 0, 1, 0, 0], [0.9, 0.8, 0.1, 0.2, 0.7, 0.3]
    assert sample(labels, losses, 3) == ([1, 0, 4], [True, True, True])
    assert sample(labels, losses, 5) == ([1, 3, 0, 4, 5], [True] * 5)


def test_what_is_ignored_is_not_drawn_however_hard() -> None:
    indices, valid = sample([-1, 0, -1, 1, -2], [9.0, 0.5, 8.0, 0.0, 7.0], 4)
    assert indices[:2] == [3, 1] and valid == [True, True, False, False]


def test_hard_examples_of_images_of_different_counts() -> None:
    """Padding, whose label is -1, changes nothing for the image that has it, and images don't compete."""
    losses = torch.tensor([[0.5, 0.1, 0.9, 0.3], [5.0, 7.0, 6.0, 4.0]])
    labels = torch.tensor([[0, 1, 0, -1], [0, 0, 0, 0]])
    indices, valid = HardExampleSampler(2)(labels, lambda: losses)
    assert indices.tolist() == [[2, 0], [1, 2]] and valid.all()
    indices, valid = HardExampleSampler(4)(labels, lambda: losses)
    alone = HardExampleSampler(4)(labels[:1, :3], lambda: losses[:1, :3])
    assert indices[0, :3].tolist() == alone[0][0].tolist() == [1, 2, 0]
    assert valid.tolist() == [[True, True, True, False], [True] * 4]


class Maps(nn.Module):
    """One map of stride 16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 16, 16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"0": self.layer(images)}


def batch() -> Batch:
    boxes = [torch.tensor([[4.0, 6, 40, 50], [30, 2, 62, 30]]), torch.tensor([[10.0, 10, 60, 60]])]
    objects = pad_objects(boxes, [torch.tensor([1, 2]), torch.tensor([1])])
    sizes = torch.tensor([[64, 64], [64, 64]])
    return Batch(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), sizes, *objects, original_sizes=sizes)


def test_giou_in_the_rpn_is_torchvisions_of_the_same_anchors() -> None:
    """With every anchor in the sample, the loss is the sum over foreground by the number of anchors that count."""
    torch.manual_seed(0)
    given, features = batch(), FeatureMaps((torch.randn(2, 8, 4, 4),), (16,))
    generator = AnchorGenerator([[16, 32]])
    rpn = RegionProposalNetwork(8, (16,), generator, box_loss=GIoULoss(), batch_size_per_image=10_000)
    nn.init.normal_(rpn.head.bbox_pred.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    rpn.sampler.max_positive = 10_000
    _, losses = rpn(features, given, with_losses=True)
    anchors = torch.cat(rpn.lay_anchors(features, given))
    matched = rpn.matcher(given.gt_boxes, given.gt_valid, anchors)
    deltas = torch.cat(rpn.predict(features, True)[1], 1)
    total, count = torch.zeros(()), 0
    for i in range(2):
        foreground = matched[i] >= 0
        moved = BoxCoder().decode(deltas[i][foreground], anchors[foreground])
        total += generalized_box_iou_loss(moved, given.gt_boxes[i][matched[i][foreground]], reduction="sum")
        count += int((matched[i] != -2).sum())
    assert int((matched >= 0).sum()) > 2
    torch.testing.assert_close(losses["loss_rpn_box_reg"], total / count)
    losses["loss_rpn_box_reg"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rpn.head.bbox_pred.parameters())  # type: ignore[union-attr]
