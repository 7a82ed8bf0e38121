"""The region proposal network: head, proposals, losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.rpn import RPNHead as ReferenceHead

from detection.anchors import AnchorGenerator
from detection.batch import Batch, pad_objects
from detection.fitting import PartError
from detection.models.rpn import RegionProposalNetwork, RPNHead
from detection.parts import FeatureMaps, Proposals

SIZE, STRIDES = (64, 96), (8, 16)


def make_batch(boxes: list[list[list[float]]], size: tuple[int, int] = SIZE) -> Batch:
    gt = [torch.tensor(b).reshape(-1, 4) for b in boxes]
    sizes = torch.tensor([size] * len(gt))
    labels = [torch.ones(len(b), dtype=torch.int64) for b in gt]
    return Batch(torch.zeros(len(gt), 3, *size), sizes, *pad_objects(gt, labels), original_sizes=sizes)


def make_rpn(**options: object) -> RegionProposalNetwork:
    torch.manual_seed(0)
    head = RPNHead(8, 3)
    with torch.no_grad():
        head.cls_logits.weight.mul_(100), head.bbox_pred.weight.mul_(100)
    anchors = AnchorGenerator([[16], [32]])
    return RegionProposalNetwork(8, STRIDES, anchors, head, **options)  # type: ignore[arg-type]


def make_maps(images: int = 2, size: tuple[int, int] = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((images, 8, size[0] // s, size[1] // s), generator=generator) for s in STRIDES]


def make_features(images: int = 2, size: tuple[int, int] = SIZE) -> FeatureMaps:
    return FeatureMaps(tuple(make_maps(images, size)), STRIDES)


@pytest.mark.parametrize("depth", [1, 2])
def test_head_equals_torchvision(depth: int) -> None:
    ours, theirs = RPNHead(8, 3, depth), ReferenceHead(8, 3, depth)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    found, expected = ours(make_maps()), theirs(make_maps())
    for level in range(2):
        torch.testing.assert_close(found[0][level], expected[0][level])
        torch.testing.assert_close(found[1][level], expected[1][level])


def test_outputs_are_read_in_the_order_of_the_anchors() -> None:
    """Cell by cell, and in each cell anchor by anchor, as torchvision's RPN reads its head."""
    rpn = make_rpn()
    logits, moves = rpn.head(make_maps())
    objectness, deltas = rpn.predict(make_features(), with_losses=True)
    for level in range(2):
        torch.testing.assert_close(objectness[level], logits[level].permute(0, 2, 3, 1).flatten(1))
        expected = moves[level].unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        torch.testing.assert_close(deltas[level], expected)


def test_two_logits_are_a_softmax_over_background_and_object() -> None:
    torch.manual_seed(0)
    head = RPNHead(8, 3, softmax_objectness=True)
    with torch.no_grad():
        head.cls_logits.weight.mul_(100)
    maps = make_maps()
    objectness = [level.permute(0, 2, 3, 1).flatten(1) for level in head(maps)[0]]
    for level, feature in enumerate(maps):
        pairs = head.cls_logits(head.conv(feature)).permute(0, 2, 3, 1).reshape(2, -1, 2)  # (background, object)
        expected = pairs.softmax(dim=-1)[..., 1]
        assert expected.std() > 0.02
        torch.testing.assert_close(objectness[level].sigmoid(), expected)
        target = (torch.arange(expected.shape[1]) % 2).expand(2, -1)
        two = torch.nn.functional.cross_entropy(pairs.flatten(0, 1), target.flatten())
        one = torch.nn.functional.binary_cross_entropy_with_logits(objectness[level], target.float())
        torch.testing.assert_close(one, two)


def propose(rpn: RegionProposalNetwork, features: FeatureMaps | None = None) -> Proposals:
    return rpn(features or make_features(), make_batch([[], []]), with_losses=False)[0]


@pytest.mark.parametrize("training", [True, False])
def test_proposals_are_clipped_sorted_thinned_and_of_fixed_number(training: bool) -> None:
    rpn = make_rpn(pre_nms_top_n={"training": 60, "testing": 30}, post_nms_top_n={"training": 40, "testing": 20}).train(
        training
    )
    found = propose(rpn)
    assert found.boxes.shape == (2, 40 if training else 20, 4)
    assert (found.scores[:, 1:] <= found.scores[:, :-1]).all()
    for boxes, valid in zip(found.boxes, found.valid, strict=True):
        own = boxes[valid]
        assert len(own) > 5 and (own >= 0).all() and (own[:, 2] <= 96).all() and (own[:, 3] <= 64).all()
        assert (own[:, 2:] > own[:, :2]).all()
        assert not boxes[~valid].any()
    assert not found.boxes.requires_grad


def test_levels_do_not_suppress_each_other() -> None:
    """Two levels with the same anchors: every box comes twice."""
    torch.manual_seed(0)
    rpn = RegionProposalNetwork(8, (8, 8), AnchorGenerator([[16], [16]]), RPNHead(8, 3)).eval()
    feature = make_maps()[0]
    found = propose(rpn, FeatureMaps((feature, feature), (8, 8)))
    for boxes, valid in zip(found.boxes, found.valid, strict=True):
        distinct, counts = boxes[valid].unique(dim=0, return_counts=True)
        assert len(distinct) > 5 and (counts == 2).all()


def test_a_proposal_needs_the_least_score() -> None:
    everything, some = propose(make_rpn().eval()), propose(make_rpn(score_thresh=0.6).eval())
    assert everything.valid.sum() > some.valid.sum() > 0
    assert (some.scores[some.valid] >= 0.6).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("everywhere", [True, False])
def test_features_that_are_not_finite_give_no_proposals_from_there(bad: float, everywhere: bool) -> None:
    maps = make_maps()
    if everywhere:
        maps = [torch.full_like(feature, bad) for feature in maps]
    else:
        maps[0][0, :, 2, 3] = bad
    for mode in (True, False):
        found = propose(make_rpn().train(mode), FeatureMaps(tuple(maps), STRIDES))
        assert found.boxes.isfinite().all()
        assert not (everywhere and found.valid.any())
        assert everywhere or (found.valid[1].any() and found.scores[found.valid].isfinite().all())


def losses_of(rpn: RegionProposalNetwork, boxes: list[list[list[float]]]) -> dict[str, Tensor]:
    return rpn(make_features(len(boxes)), make_batch(boxes), with_losses=True)[1]


def test_losses_without_objects() -> None:
    rpn = make_rpn()
    losses = losses_of(rpn, [[], []])
    assert losses["loss_objectness"] > 0 and losses["loss_rpn_box_reg"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in rpn.parameters())
    assert not rpn.head.bbox_pred.weight.grad.any()


def test_losses_with_one_object() -> None:
    """The box that another project's test has, on 256 x 256 pixels."""
    rpn = make_rpn()
    size = (256, 256)
    batch = make_batch([[[23.6667, 23.8757, 238.6326, 151.8874]]], size)
    _, losses = rpn(make_features(1, size), batch, with_losses=True)
    assert losses["loss_objectness"] > 0 and losses["loss_rpn_box_reg"] > 0


def test_degenerate_ground_truth_makes_nothing_positive() -> None:
    """A box that no anchor overlaps would, without care, make every anchor an object."""
    losses = [losses_of(make_rpn(batch_size_per_image=10**6), boxes) for boxes in ([[]], [[[500.0, 500, 510, 510]]])]
    assert losses[0]["loss_objectness"] == losses[1]["loss_objectness"]
    assert losses[1]["loss_rpn_box_reg"] == 0


def test_padding_of_ground_truth_changes_nothing() -> None:
    one = [[10.0, 10, 40, 40]]
    rpn = make_rpn(batch_size_per_image=10**6)
    single = losses_of(rpn, [one, []])
    batch = make_batch([one, []])
    wide = Batch(
        batch.images,
        batch.image_sizes,
        torch.cat((batch.gt_boxes, torch.zeros(2, 5, 4)), dim=1),
        torch.cat((batch.gt_labels, torch.zeros(2, 5, dtype=torch.int64)), dim=1),
        torch.cat((batch.gt_valid, torch.zeros(2, 5, dtype=torch.bool)), dim=1),
        batch.original_sizes,
    )
    _, padded = rpn(make_features(), wide, with_losses=True)
    assert single == padded


def test_levels_and_anchors_must_agree() -> None:
    one = FeatureMaps(make_features().maps[:1], STRIDES[:1])
    with pytest.raises(ValueError, match="anchors are defined for 2 levels, but the backbone gives 1"):
        propose(make_rpn(), one)
    with pytest.raises(PartError, match=r"lays \[3, 3\] anchors a cell on 2 levels, but the backbone gives 1 feature"):
        make_rpn().check(one)
