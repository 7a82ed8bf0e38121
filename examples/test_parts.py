"""The parts against the plain ones: `python -m pytest test_parts.py` in this folder."""

from __future__ import annotations

import torch
from my_parts.class_loss import SmoothedCrossEntropy
from my_parts.rpn_head import DepthwiseHead

from detection import fasterrcnn_efficientnet_lite0_fpn
from detection.losses import classification_loss


def test_without_smoothing_the_loss_is_the_plain_one() -> None:
    """Set to the same, it must give the same."""
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    torch.testing.assert_close(SmoothedCrossEntropy(0.0)(logits, labels), classification_loss(logits, labels))


def test_a_gradient_reaches_all_of_the_head() -> None:
    """In a whole detector, and from one image with one object."""
    model = fasterrcnn_efficientnet_lite0_fpn(num_classes=3, min_size=64, rpn_head=DepthwiseHead)
    target = {"boxes": torch.tensor([[10.0, 10, 50, 40]]), "labels": torch.tensor([1])}
    torch.stack(list(model([torch.rand(3, 64, 64)], [target]).values())).sum().backward()
    for name, parameter in model.rpn.head.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
