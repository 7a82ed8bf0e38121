"""The second stage: sampling, losses and post-processing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor as ReferencePredictor

from detection.batch import Batch, pad_objects
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import ConvFCHead, FastRCNNPredictor, RoIHeads, TwoFCHead
from detection.parts import FeatureMaps, Proposals

SIZE = (64, 96)
STRIDES = (4, 8)


def make_heads(classes: int = 4, **options: object) -> RoIHeads:
    torch.manual_seed(0)
    return RoIHeads(
        8,
        classes,
        RoIPooler(3, num_levels=2),
        TwoFCHead(8, 3, 16),
        FastRCNNPredictor(16, classes),
        **options,  # type: ignore[arg-type]
    )


def make_features() -> FeatureMaps:
    generator = torch.Generator().manual_seed(1)
    maps = (torch.randn((2, 8, SIZE[0] // s, SIZE[1] // s), generator=generator) for s in STRIDES)
    return FeatureMaps(tuple(maps), STRIDES)


def make_batch(boxes: list[list[list[float]]], labels: list[list[int]]) -> Batch:
    gt = [torch.tensor(b).reshape(-1, 4) for b in boxes]
    sizes = torch.tensor([SIZE, SIZE])
    return Batch(
        torch.zeros(2, 3, *SIZE),
        sizes,
        *pad_objects(gt, [torch.tensor(x).long() for x in labels]),
        original_sizes=sizes,
    )


def make_proposals(count: int = 20, valid: int = 15) -> Proposals:
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand((2, count, 2), generator=generator) * 40
    boxes = torch.cat((corner, corner + 4 + torch.rand((2, count, 2), generator=generator) * 20), dim=-1)
    exists = (torch.arange(count) < valid).expand(2, -1)
    return Proposals(boxes * exists[..., None], torch.rand((2, count), generator=generator) * exists, exists)


def test_heads_equal_torchvision() -> None:
    pooled = torch.randn((5, 8, 3, 3), generator=torch.Generator().manual_seed(0))
    ours, theirs = TwoFCHead(8, 3, 16), TwoMLPHead(8 * 9, 16)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(pooled), theirs(pooled))
    ours, theirs = ConvFCHead(8, 3, 6, 16), FastRCNNConvFCHead((8, 3, 3), [6] * 4, [16], torch.nn.BatchNorm2d)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(pooled), theirs(pooled))
    ours, theirs = FastRCNNPredictor(16, 4), ReferencePredictor(16, 4)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features = torch.randn(5, 16)
    for a, b in zip(ours(features), theirs(features), strict=True):
        torch.testing.assert_close(a, b)


def test_ground_truth_joins_the_proposals_at_their_end() -> None:
    batch = make_batch([[[5.0, 5, 25, 30], [30, 30, 60, 60]], []], [[2, 3], []])
    sample = make_heads(batch_size_per_image=100).sample(make_features(), make_proposals(), batch)
    assert sample.boxes.shape == (2, 22, 4)
    assert sample.valid.sum(dim=1).tolist() == [17, 15]  # 15 proposals, and the ground truth that exists
    own = sample.labels[0] > 0
    for k, label in enumerate((2, 3)):
        exact = (sample.boxes[0] == batch.gt_boxes[0, k]).all(dim=1) & own
        assert exact.any() and (sample.labels[0][exact] == label).all() and (sample.matched_idxs[0][exact] == k).all()
    assert not (sample.labels[1] > 0).any() and not sample.labels[~sample.valid].any()


def test_slots_without_a_proposal_are_never_drawn() -> None:
    batch = make_batch([[], []], [[], []])
    for size in (5, 15, 100):
        sample = make_heads(batch_size_per_image=size).sample(make_features(), make_proposals(20, 7), batch)
        assert sample.valid.sum(dim=1).tolist() == [min(size, 7)] * 2
        assert sample.boxes[sample.valid].any(dim=1).all()


def losses_of(heads: RoIHeads, batch: Batch) -> dict[str, Tensor]:
    return heads.losses(make_features(), make_proposals(), batch)


def test_losses_without_objects() -> None:
    heads = make_heads()
    losses = losses_of(heads, make_batch([[], []], [[], []]))
    assert losses["loss_classifier"] > 0 and losses["loss_box_reg"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in heads.parameters())
    assert not heads.box_predictor.bbox_pred.weight.grad.any()


def test_only_the_true_class_refines_its_box() -> None:
    heads = make_heads(batch_size_per_image=100)
    losses_of(heads, make_batch([[[5.0, 5, 25, 30]], []], [[2], []]))["loss_box_reg"].backward()
    rows = heads.box_predictor.bbox_pred.weight.grad.view(4, 4, -1).abs().sum(dim=(1, 2))
    assert rows[2] > 0 and not rows[[0, 1, 3]].any()


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_deltas_of_other_classes_get_no_gradient_and_change_no_loss(class_agnostic: bool) -> None:
    batch = make_batch([[[5.0, 5, 25, 30], [10, 12, 40, 44]], [[30.0, 30, 60, 60]]], [[2, 1], [3]])
    heads = make_heads(batch_size_per_image=16)
    heads.box_predictor = FastRCNNPredictor(16, 4, class_agnostic)
    sample = heads.sample(make_features(), make_proposals(), batch)
    logits, deltas = heads.predict(make_features(), sample.boxes)
    deltas = deltas.detach().requires_grad_()  # (B, S, K or 1, 4)
    loss = heads.box_losses(logits, deltas, sample, batch)["loss_box_reg"]
    (gradient,) = torch.autograd.grad(loss, deltas)
    column = torch.zeros_like(sample.labels) if class_agnostic else sample.labels
    own = torch.nn.functional.one_hot(column, deltas.shape[2]).bool() & ((sample.labels > 0) & sample.valid)[..., None]
    assert own.any() and loss > 0
    assert gradient[own].any(dim=1).all() and not gradient[~own].any()
    others = torch.where(own[..., None], deltas, torch.nan)
    assert torch.equal(heads.box_losses(logits, others, sample, batch)["loss_box_reg"], loss)


def test_a_predictor_of_torchvision_trains_in_place_of_ours() -> None:
    heads = make_heads()
    batch = make_batch([[[5.0, 5, 25, 30]], []], [[2], []])
    theirs = ReferencePredictor(16, 4)
    theirs.load_state_dict(heads.box_predictor.state_dict())
    torch.manual_seed(0)
    expected = losses_of(heads, batch)
    heads.box_predictor = theirs
    torch.manual_seed(0)
    torch.testing.assert_close(losses_of(heads, batch), expected)


BOXES = torch.tensor([[10.0, 10, 30, 30], [11, 10, 31, 30], [60, 20, 90, 60]])


def select(heads: RoIHeads, scores: list[list[float]], usable: Tensor | None = None) -> dict[str, Tensor]:
    """Post-processing of three boxes, the same for each class, of one image."""
    values = torch.tensor([scores])
    boxes = BOXES[None, :, None].expand(1, 3, values.shape[2], 4)
    return heads.nms_per_class(boxes, values, torch.ones_like(values, dtype=torch.bool) if usable is None else usable)[
        0
    ]


def test_classes_do_not_suppress_each_other() -> None:
    found = select(make_heads(), [[0.9, 0.1], [0.8, 0.7], [0.2, 0.3]])
    assert found["labels"].tolist() == [1, 2, 2, 1]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7, 0.3, 0.2])
    assert torch.equal(found["boxes"], BOXES[[0, 1, 2, 2]])
    assert found["labels"].dtype == torch.int64 and found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_the_best_detections_stay() -> None:
    found = select(make_heads(detections_per_img=2), [[0.9, 0.1], [0.8, 0.7], [0.2, 0.3]])
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7])


def test_no_detections() -> None:
    usable = torch.zeros(1, 3, 2, dtype=torch.bool)
    found = select(make_heads(), [[0.9, 0.1]] * 3, usable)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
    }
    assert found["labels"].dtype == torch.int64


def test_images_keep_their_own_detections() -> None:
    heads = make_heads(score_thresh=0.0).eval()
    sizes = torch.tensor([SIZE, SIZE])
    proposals = make_proposals()
    both = heads.detect(make_features(), proposals, sizes)
    for i in range(2):
        maps = FeatureMaps(tuple(f[i : i + 1] for f in make_features().maps), STRIDES)
        alone = Proposals(proposals.boxes[i : i + 1], proposals.scores[i : i + 1], proposals.valid[i : i + 1])
        own = heads.detect(maps, alone, sizes[:1])[0]
        assert len(own["scores"]) > 10
        for name, value in own.items():
            torch.testing.assert_close(both[i][name], value)


def test_a_score_at_the_threshold_is_not_a_detection() -> None:
    heads = make_heads(classes=2, score_thresh=0.5).eval()
    with torch.no_grad():
        for parameter in heads.box_predictor.parameters():
            parameter.zero_()  # all scores are exactly 0.5
    assert all(len(d["scores"]) == 0 for d in heads.detect(make_features(), make_proposals(), torch.tensor([SIZE] * 2)))
    heads.score_thresh = 0.49
    assert all(len(d["scores"]) > 0 for d in heads.detect(make_features(), make_proposals(), torch.tensor([SIZE] * 2)))


def test_empty_slots_give_no_detections() -> None:
    heads = make_heads(score_thresh=0.0).eval()
    found = heads.detect(make_features(), make_proposals(20, 0), torch.tensor([SIZE] * 2))
    assert all(len(detections["scores"]) == 0 for detections in found)


def test_soft_nms_keeps_what_plain_nms_drops_at_a_lower_score() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20], [1, 0, 21, 20], [40, 40, 50, 50]])[None, :, None].expand(1, 3, 2, 4)
    scores = torch.tensor([[[0.9, 0.0], [0.8, 0.3], [0.5, 0.0]]])
    usable = scores > 0.05
    plain = make_heads(3).nms_per_class(boxes, scores, usable)[0]
    assert plain["scores"].tolist() == pytest.approx([0.9, 0.5, 0.3]) and plain["labels"].tolist() == [1, 1, 2]
    soft = make_heads(3, soft_nms_sigma=0.5).nms_per_class(boxes, scores, usable)[0]
    lowered = 0.8 * math.exp(-((19 / 21) ** 2) / 0.5)
    assert soft["scores"].tolist() == pytest.approx([0.9, 0.5, 0.3, lowered]) and soft["labels"].tolist() == [
        1,
        1,
        2,
        1,
    ]
    assert make_heads(3, soft_nms_sigma=0.5).nms_per_class(boxes, scores, usable & False)[0]["boxes"].shape == (0, 4)
