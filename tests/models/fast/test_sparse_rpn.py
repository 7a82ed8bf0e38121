"""The RPN that learns from the sampled anchors alone: the same proposals, losses and gradients as over all cells."""

from __future__ import annotations

import copy

import pytest
import torch

from detection.anchors import AnchorGenerator
from detection.models.fast.sparse_rpn import SparseRPN, head_at
from detection.models.rpn import RegionProposalNetwork, RPNHead
from detection.parts import FeatureMaps
from tests.models.test_rpn import STRIDES, make_batch, make_features, make_maps


def make_head(depth: int, softmax: bool) -> RPNHead:
    torch.manual_seed(0)
    head = RPNHead(8, 3, depth, softmax)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    return head


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("softmax", [False, True])
def test_head_at_some_anchors_equals_the_head_on_all(depth: int, softmax: bool) -> None:
    head = make_head(depth, softmax).double()
    maps = tuple(f.double().requires_grad_() for f in make_maps())
    rpn = RegionProposalNetwork(8, STRIDES, AnchorGenerator([[16], [32]]), head)
    objectness, deltas = (torch.cat(levels, dim=1) for levels in rpn.predict(FeatureMaps(maps, STRIDES), True))
    # All anchors of the first image, corners and edges among them, and some of the second in any order, some twice.
    count = objectness.shape[1]
    anchors = torch.stack((torch.arange(count), torch.randint(count, (count,))))
    expected = objectness.gather(1, anchors), deltas.gather(1, anchors[..., None].expand(-1, -1, 4))
    found = head_at(head, maps, anchors)
    shares = [torch.randn_like(values) for values in expected]
    inputs = [*maps, *head.parameters()]
    gradients = [torch.autograd.grad(values, inputs, shares) for values in (expected, found)]
    for wanted, given in zip((*expected, *gradients[0]), (*found, *gradients[1]), strict=True):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("softmax", [False, True])
def test_a_step_is_that_of_the_plain_network(depth: int, softmax: bool, objects: bool) -> None:
    batch = make_batch([[[10, 10, 40, 40], [50, 0, 96, 30]], [[0, 30, 20, 64]]] if objects else [[], []])
    head, results = make_head(depth, softmax), []
    for kind in (RegionProposalNetwork, SparseRPN):
        rpn = kind(8, STRIDES, AnchorGenerator([[16], [32]]), copy.deepcopy(head), batch_size_per_image=40)
        maps = tuple(f.requires_grad_() for f in make_maps())
        torch.manual_seed(1)
        proposals, losses = rpn(FeatureMaps(maps, STRIDES), batch, with_losses=True)
        assert not proposals.boxes.requires_grad
        inputs = [*maps, *rpn.parameters()]
        gradients = torch.autograd.grad(torch.stack(list(losses.values())).sum(), inputs)
        results.append([proposals.boxes, proposals.scores, proposals.valid, *losses.values(), *gradients])
    assert (results[0][4] > 0.01) == objects and results[0][3] > 0.1
    for wanted, given in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted)


def test_training_learns_from_the_sampled_anchors_alone() -> None:
    rpn = SparseRPN(8, STRIDES, AnchorGenerator([[16], [32]]), RPNHead(8, 3), batch_size_per_image=4)
    seen: list[int] = []
    rpn.head.cls_logits.register_forward_hook(lambda _, inputs, output: seen.append(int(output.requires_grad)))
    maps = tuple(f.requires_grad_() for f in make_maps())
    _, losses = rpn(FeatureMaps(maps, STRIDES), make_batch([[[10, 10, 40, 40]], []]), with_losses=True)
    assert seen == [0, 0, 1]  # both levels in full without gradients, the sample with
    torch.stack(list(losses.values())).sum().backward()
    touched = [int((f.grad != 0).any(dim=1).sum()) for f in maps]
    assert 0 < sum(touched) <= 2 * 4 * 9


def test_where_nothing_trains_it_is_the_plain_network() -> None:
    head = make_head(1, False)
    for gradients in (True, False):
        found = []
        for kind in (RegionProposalNetwork, SparseRPN):
            rpn = kind(8, STRIDES, AnchorGenerator([[16], [32]]), head).eval()
            with torch.set_grad_enabled(gradients):
                found.append(rpn(make_features(), make_batch([[], []]), with_losses=False)[0])
        assert torch.equal(found[0].boxes, found[1].boxes) and torch.equal(found[0].scores, found[1].scores)
        assert found[0].valid.any()
