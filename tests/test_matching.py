"""The matcher and the sampler against published values and torchvision's per-image classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torchvision.models.detection._utils import Matcher as ReferenceMatcher
from torchvision.ops import box_iou

from detection import matching
from detection.anchors import default_anchors
from detection.boxes import pairwise_iou
from detection.matching import BalancedSampler, IoUBalancedSampler, Matcher, best_overlaps
from detection.models.compose import faster_rcnn
from detection.training.proposal_figures import CountingSampler
from tests.test_hard_and_weighted import Maps, batch

QUALITY = torch.tensor([[0.15, 0.45, 0.2, 0.6], [0.3, 0.65, 0.05, 0.1], [0.05, 0.4, 0.25, 0.4]])


def test_published_matches() -> None:
    """Detectron2's example: with low-quality matches labels [-1, 1, 0, 1]; without, nothing reaches 0.7."""
    assert Matcher(0.7, 0.3, True).assign(QUALITY).tolist() == [-2, 1, -1, 0]
    assert Matcher(0.7, 0.3, False).assign(QUALITY).tolist() == [-2, -2, -1, -2]


def test_thresholds_are_inclusive_from_below() -> None:
    assert Matcher(0.5, 0.25).assign(torch.tensor([[0.5, 0.4999, 0.25, 0.2499]])).tolist() == [0, -2, -2, -1]


@pytest.mark.parametrize(("low_quality", "expected"), [(True, [0, -1, 1, -1]), (False, [0, -1, -1, -1])])
def test_published_matches_of_boxes(low_quality: bool, expected: list[int]) -> None:
    """MMDetection's example, whose assigner counts from 1: [1, 0, 2, 0]."""
    priors = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [5, 5, 15, 15], [32, 32, 38, 42]])
    gt = torch.tensor([[[0.0, 0, 10, 9], [0, 10, 10, 19]]])
    iou = pairwise_iou(gt[0], priors)
    torch.testing.assert_close(iou, torch.tensor([[0.9, 0, 0.1176, 0], [0, 0, 0.1515, 0]]), atol=5e-5, rtol=0)
    matcher = Matcher(0.5, 0.5, low_quality)
    assert matcher(gt, torch.ones(1, 2, dtype=torch.bool), priors).tolist() == [expected]


def test_an_anchor_forced_to_foreground_keeps_its_own_best() -> None:
    """Both ground truths are best at anchor 0, which stays with the first (as torchvision and Detectron2)."""
    assert Matcher(0.7, 0.3, True).assign(torch.tensor([[0.9, 0.2], [0.8, 0.1]])).tolist() == [0, -1]


def test_a_ground_truth_that_nothing_overlaps_takes_no_anchor() -> None:
    iou = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert Matcher(0.7, 0.3, True).assign(iou).tolist() == [0, -1, -1, -1]
    assert ReferenceMatcher(0.7, 0.3, True)(iou).tolist() == [0, 0, 0, 0]  # what this guards against
    degenerate = torch.tensor([[[0.0, 0, 10, 10], [5, 5, 5, 5], [900, 900, 910, 910]]])
    anchors = torch.tensor([[0.0, 0, 10, 9], [20, 20, 30, 30], [40, 40, 50, 50]])
    assert Matcher(0.7, 0.3, True)(degenerate, torch.ones(1, 3).bool(), anchors).tolist() == [[0, -1, -1]]


def test_nothing_to_match() -> None:
    assert Matcher(0.5, 0.5, True).assign(torch.zeros(0, 5)).tolist() == [-1] * 5
    assert Matcher(0.5, 0.5, True).assign(torch.zeros(3, 0)).shape == (0,)
    assert Matcher(0.5, 0.5, True).assign(torch.zeros(2, 0, 5)).tolist() == [[-1] * 5] * 2
    none = Matcher(0.5, 0.5, True)(torch.zeros(2, 0, 4), torch.zeros(2, 0).bool(), torch.rand(5, 4))
    assert none.tolist() == [[-1] * 5] * 2
    padding = Matcher(0.5, 0.5, True)(torch.zeros(2, 3, 4), torch.zeros(2, 3).bool(), torch.rand(5, 4))
    assert padding.tolist() == [[-1] * 5] * 2


def test_thresholds_in_the_wrong_order_raise() -> None:
    with pytest.raises(ValueError, match=r"0\.7 is above fg_iou_thresh 0\.3"):
        Matcher(0.3, 0.7)


def scene(seed: int, images: int = 3, gts: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truth padded to `gts`, and anchors on a grid of whole pixels, so that many IoU are equal."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 12, (images, gts, 2), generator=generator).float() * 4
    size = torch.randint(1, 6, (images, gts, 2), generator=generator).float() * 4
    valid = torch.arange(gts) < torch.randint(0, gts + 1, (images, 1), generator=generator)
    boxes = torch.cat((corner, corner + size), dim=-1) * valid[..., None]
    anchors = default_anchors(5, round_anchors=True)
    anchors._cells = [cell / 4 for cell in anchors._cells]
    levels = anchors([(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)], (4, 8, 16, 32, 64), (64, 64))
    return boxes, valid, torch.cat(levels)


def match_each_image(gt: Tensor, valid: Tensor, boxes: Tensor, matcher: ReferenceMatcher) -> Tensor:
    """torchvision's matcher, one image at a time; an image without objects is all background."""
    rows = []
    for i in range(len(gt)):
        own, anchors = gt[i][valid[i]], boxes if boxes.ndim == 2 else boxes[i]
        rows.append(matcher(pairwise_iou(own, anchors)) if len(own) else torch.full((len(anchors),), -1))
    return torch.stack(rows)


@pytest.mark.parametrize("low_quality", [True, False])
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_a_batch_matches_as_torchvision_matches_each_image(low_quality: bool, seed: int) -> None:
    gt, valid, anchors = scene(seed)
    expected = match_each_image(gt, valid, anchors, ReferenceMatcher(0.7, 0.3, low_quality))
    assert torch.equal(Matcher(0.7, 0.3, low_quality)(gt, valid, anchors), expected)
    own = torch.stack([anchors + i for i in range(len(gt))])
    expected = match_each_image(gt, valid, own, ReferenceMatcher(0.5, 0.5, low_quality))
    assert torch.equal(Matcher(0.5, 0.5, low_quality)(gt, valid, own), expected)


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("limit", [1, 18 * 7, 18 * 500, 18 * 1023])
def test_blocks_match_as_the_whole(monkeypatch: pytest.MonkeyPatch, low_quality: bool, limit: int) -> None:
    gt, valid, anchors = scene(5)
    assert len(anchors) == 1023
    matcher = Matcher(0.7, 0.3, low_quality)
    whole = matcher(gt, valid, anchors), matcher(gt, valid, anchors.expand(3, -1, -1))
    assert not low_quality or any(peaks_are_shared(gt[i][valid[i]], anchors) for i in range(3))
    monkeypatch.setattr(matching, "MAX_IOU_ELEMENTS", limit)
    assert torch.equal(matcher(gt, valid, anchors), whole[0])
    assert torch.equal(matcher(gt, valid, anchors.expand(3, -1, -1)), whole[1])


def peaks_are_shared(gt: Tensor, anchors: Tensor) -> bool:
    """Whether some ground truth has its highest IoU with several anchors."""
    iou = pairwise_iou(gt, anchors)
    return len(gt) > 0 and bool(((iou == iou.amax(dim=1, keepdim=True)).sum(dim=1) > 1).any())


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and 0 not in leaf.stride():  # an expanded tensor takes no memory
                self.elements = max(self.elements, leaf.numel())
        return result


def test_a_crowded_image_stays_within_the_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MAX_IOU_ELEMENTS", 2**21)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((1, 2000, 2), generator=generator) * 600
    gt = torch.cat((corner, corner + 5 + torch.rand((1, 2000, 2), generator=generator) * 40), dim=-1)
    anchors = torch.cat(default_anchors(5)([(40, 40), (20, 20), (10, 10), (5, 5), (3, 3)], (4, 8, 16, 32, 64), (0, 0)))
    with LargestTensor() as bounded:
        matched = Matcher(0.7, 0.3, True)(gt, torch.ones(1, 2000).bool(), anchors)
    assert 2**20 < bounded.elements <= 2**21
    with LargestTensor() as whole:
        expected = Matcher(0.7, 0.3, True).assign(pairwise_iou(gt, anchors))
    assert whole.elements == 2000 * len(anchors) > 2**23
    assert torch.equal(matched, expected)


def test_the_default_bound_covers_a_crowded_image_of_full_size() -> None:
    assert matching.MAX_IOU_ELEMENTS * 4 <= 2**27 < 2000 * 268_569 * 4


LABELS = torch.tensor([[0] * 6 + [1] * 3 + [-1] * 2])


def draw(labels: Tensor, size: int, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    return BalancedSampler(size, fraction)(labels, generator=torch.Generator().manual_seed(seed))


def test_sampler_takes_the_given_share_of_foreground() -> None:
    for seed in range(20):
        indices, valid = draw(LABELS, 4, 0.25, seed)
        assert valid.all() and 6 <= indices[0, 0] < 9 and (indices[0, 1:] < 6).all()
        assert len(set(indices[0].tolist())) == 4


@pytest.mark.parametrize(
    ("size", "fraction", "foreground", "background"),
    [
        (8, 0.5, 3, 5),  # too little foreground: filled up with background
        (8, 0.25, 2, 6),
        (10, 0.25, 2, 6),  # int(2.5) foreground, and all the background there is
        (11, 1.0, 3, 6),  # too little of both
        (1000, 0.5, 3, 6),
        (3, 0.25, 0, 3),  # int(0.75) = 0
    ],
)
def test_sampler_counts(size: int, fraction: float, foreground: int, background: int) -> None:
    indices, valid = draw(LABELS, size, fraction)
    chosen = LABELS[0, indices[0, valid[0]]]
    assert indices.shape == valid.shape == (1, min(size, 11))
    assert (int((chosen == 1).sum()), int((chosen == 0).sum())) == (foreground, background)
    assert chosen.tolist() == sorted(chosen.tolist(), reverse=True)  # foreground first
    assert len(set(indices[0].tolist())) == indices.shape[1]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_sampler_serves_each_image_of_a_batch(seed: int, size: int, fraction: float) -> None:
    labels = torch.randint(-2, 4, (4, 40), generator=torch.Generator().manual_seed(seed))
    labels[3] = -1
    indices, valid = draw(labels, size, fraction, seed)
    for i in range(4):
        foreground, background = int((labels[i] > 0).sum()), int((labels[i] == 0).sum())
        chosen = labels[i, indices[i, valid[i]]]
        assert (chosen >= 0).all()
        positives = min(foreground, int(size * fraction))
        assert int((chosen > 0).sum()) == positives
        assert len(chosen) == min(positives + background, size)


def test_sampler_is_deterministic_under_a_generator() -> None:
    labels = torch.randint(-1, 2, (3, 500), generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(labels, 64, 0.5, seed=3)[0], draw(labels, 64, 0.5, seed=3)[0])
    assert not torch.equal(draw(labels, 64, 0.5, seed=3)[0], draw(labels, 64, 0.5, seed=4)[0])


def test_sampler_draws_each_with_the_same_chance() -> None:
    labels = torch.tensor([1] * 20 + [0] * 60).expand(4000, -1)
    indices, valid = draw(labels, 20, 0.25)
    drawn = torch.bincount(indices[valid], minlength=80).float()
    for part, expected in ((drawn[:20], 4000 * 5 / 20), (drawn[20:], 4000 * 15 / 60)):
        # Chi-square over the bins, scaled for drawing without replacement, has mean n - 1 and deviation sqrt(2n).
        chi = ((part - expected) ** 2 / (expected * 0.75)).sum()
        assert abs(chi - (len(part) - 1)) < 5 * (2 * len(part)) ** 0.5


def test_best_overlaps_are_torchvisions_in_one_block_and_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    gt, valid, anchors = scene(3)
    wanted = torch.zeros(3, len(anchors))
    for i in range(3):
        if valid[i].any():
            wanted[i] = box_iou(gt[i][valid[i]], anchors).amax(dim=0)
    assert (wanted > 0.3).any() and not valid.all()
    torch.testing.assert_close(best_overlaps(gt, valid, anchors), wanted)
    monkeypatch.setattr(matching, "MAX_IOU_ELEMENTS", 18 * 100)
    torch.testing.assert_close(best_overlaps(gt, valid, anchors.expand(3, -1, -1)), wanted)
    assert best_overlaps(gt[:, :0], valid[:, :0], anchors).eq(0).all()


THIRDS = np.array([0, 1 / 6, 1 / 3, 0.5])


def test_background_comes_evenly_from_all_overlaps() -> None:
    """Thirds where there is enough; else what there is of two bins, and the rest of the third; then all of one bin."""
    torch.manual_seed(0)
    iou = torch.rand(3, 1000) * 0.15
    iou[0, :200], iou[0, 200:300] = 0.17 + torch.rand(200) * 0.15, 0.34 + torch.rand(100) * 0.15
    iou[1, :2], iou[1, 2:6] = 0.2, 0.4
    labels = torch.zeros((3, 1000), dtype=torch.int64)
    labels[0, 990:], labels[1, 990:994], labels[:, 900:950] = 1, 2, -1
    iou[labels > 0] = 0.8
    indices, valid = IoUBalancedSampler(68, 0.25)(labels, lambda: pytest.fail("it asks for no loss"), lambda: iou)
    assert valid.all() and indices.shape == (3, 68)
    drawn, kinds = iou.gather(1, indices), labels.gather(1, indices)
    for row, objects, bins in ((0, 10, [19, 19, 20]), (1, 4, [2, 4, 58]), (2, 0, [0, 0, 68])):
        assert len(indices[row].unique()) == 68
        assert (kinds[row, :objects] > 0).all() and (kinds[row, objects:] == 0).all()
        assert sorted(np.histogram(drawn[row, objects:], THIRDS)[0].tolist()) == bins


def test_each_row_of_background_is_drawn_as_often_as_the_paper_says() -> None:
    """Section 3.1: N / K * 1 / M_k for a row of a bin that has M_k of them; with N = 30, K = 3 that is 10 / M_k."""
    torch.manual_seed(0)
    sizes, tries = (60, 30, 12), 400
    iou = torch.tensor([0.05] * sizes[0] + [0.25] * sizes[1] + [0.45] * sizes[2]).expand(tries, -1)
    indices, _ = IoUBalancedSampler(30)(torch.zeros_like(iou).long(), lambda: iou, lambda: iou)
    times = torch.zeros_like(iou).scatter_(1, indices, 1.0).mean(dim=0)
    wanted = torch.cat([torch.full((n,), 10 / n) for n in sizes])
    assert (times - wanted).abs().max() < 4.5 * 0.5 / tries**0.5


def test_too_few_rows_are_marked_and_what_overlaps_more_is_background_too() -> None:
    labels = torch.tensor([[-1, 0, 1, 0, -1]])
    iou = torch.tensor([[0.9, 0.7, 0.8, 0.0, 0.0]])
    indices, valid = IoUBalancedSampler(4, 0.5)(labels, lambda: iou, lambda: iou)
    assert (
        indices[0, 0] == 2 and sorted(indices[0, 1:3].tolist()) == [1, 3] and valid.tolist() == [[True] * 3 + [False]]
    )


def test_both_stages_tell_a_sampler_what_it_asks_for() -> None:
    """Overlaps of anchors, and of proposals and the ground truth behind them; also where what is drawn is counted."""
    seen = []

    class Sampler(IoUBalancedSampler):
        def __call__(self, labels: Tensor, hardness: Any, overlaps: Any) -> tuple[Tensor, Tensor]:
            seen.append((labels, overlaps()))
            return super().__call__(labels, hardness, overlaps)

    torch.manual_seed(0)
    model = faster_rcnn(Maps(), 3, rpn_sampler=Sampler(), box_sampler=Sampler(64)).train()
    for part in (model.rpn, model.roi_heads):
        part.sampler = CountingSampler(part.sampler)
    seen.clear()
    model.run(batch(), with_losses=True, with_detections=False)
    for (labels, overlaps), limit in zip(seen, (0.7, 0.5), strict=True):
        assert overlaps.shape == labels.shape and (labels > 0).any()
        assert (overlaps[labels == 0] < limit).all() and overlaps.max() <= 1
    assert (seen[1][1][:, -2:][batch().gt_valid] > 0.999).all()
