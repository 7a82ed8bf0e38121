"""Cascade R-CNN against its stages computed one by one with torchvision's functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as ReferenceCoder
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image

from detection.batch import Batch, pad_objects
from detection.models import zoo
from detection.models.cascade import CascadeRoIHeads
from detection.models.compose import cascade_rcnn
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import FastRCNNPredictor, RoIHeads, TwoFCHead
from detection.parts import FeatureMaps, Proposals

SIZE, STRIDES, CLASSES = (64, 96), (4, 8), 4
IOUS, WEIGHTS = (0.5, 0.6, 0.7), ((10.0, 10, 5, 5), (20.0, 20, 10, 10), (30.0, 30, 15, 15))


def make_stage(iou: float, weights: tuple[float, ...], pool: RoIPooler) -> RoIHeads:
    predictor = FastRCNNPredictor(16, CLASSES, class_agnostic=True)
    predictor.bbox_pred.weight.data.mul_(20)  # so that boxes move
    predictor.cls_score.weight.data.mul_(5)
    return RoIHeads(8, CLASSES, pool, TwoFCHead(8, 3, 16), predictor, iou, iou, 100, 0.25, weights)


def make_heads(stages: int = 3) -> CascadeRoIHeads:
    torch.manual_seed(0)
    pool = RoIPooler(3, num_levels=2)
    return CascadeRoIHeads([make_stage(i, w, pool) for i, w in zip(IOUS[:stages], WEIGHTS[:stages], strict=True)])


def make_features() -> FeatureMaps:
    generator = torch.Generator().manual_seed(1)
    maps = (torch.randn((1, 8, SIZE[0] // s, SIZE[1] // s), generator=generator) for s in STRIDES)
    return FeatureMaps(tuple(maps), STRIDES)


def make_proposals(count: int = 40) -> Proposals:
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand((1, count, 2), generator=generator) * 40
    boxes = torch.cat((corner, corner + 4 + torch.rand((1, count, 2), generator=generator) * 20), dim=-1)
    return Proposals(boxes, torch.ones(1, count), torch.ones((1, count), dtype=torch.bool))


def make_batch() -> Batch:
    proposals = make_proposals().boxes[0]
    gt = [proposals[:6] + torch.tensor([0.5, -0.5, 1.5, 1.0])]
    size = torch.tensor([SIZE])
    return Batch(
        torch.zeros(1, 3, *SIZE), size, *pad_objects(gt, [torch.tensor([1, 2, 3, 1, 2, 3])]), original_sizes=size
    )


def by_hand(heads: CascadeRoIHeads, boxes: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each stage the boxes `(P, 4)` that it sees, its logits and its deltas, with torchvision's parts."""
    pool, features = MultiScaleRoIAlign(["0", "1"], 3, 2), dict(zip("01", make_features().maps, strict=True))
    seen = []
    for stage, weights in zip(heads.stages, WEIGHTS, strict=False):
        logits, deltas = stage.box_predictor(stage.box_head(pool(features, [boxes], [SIZE])))  # type: ignore[operator]
        seen.append((boxes, logits, deltas))
        moved = ReferenceCoder(weights).decode(deltas.detach(), [boxes])[:, 0]
        boxes = clip_boxes_to_image(moved, SIZE)
    return [*seen, (boxes, logits, deltas)]


def test_scores_are_averaged_and_boxes_are_the_last_stages() -> None:
    heads = make_heads().eval()
    with torch.no_grad():
        found = heads.detect(make_features(), make_proposals(), torch.tensor([SIZE]))[0]
        *stages, last = by_hand(heads, make_proposals().boxes[0])
    scores = torch.stack([logits.softmax(dim=1) for _, logits, _ in stages]).mean(dim=0)[:, 1:]
    rows, classes = (scores > 0.05).nonzero(as_tuple=True)
    keep = batched_nms(last[0][rows], scores[rows, classes], classes, 0.5)[:100]
    torch.testing.assert_close(found["boxes"], last[0][rows][keep], atol=1e-3, rtol=0)
    torch.testing.assert_close(found["scores"], scores[rows, classes][keep])
    assert torch.equal(found["labels"], classes[keep] + 1)
    assert len(keep) > 20 and (last[0] - make_proposals().boxes[0]).abs().max() > 1


def test_each_stage_learns_from_the_boxes_of_the_one_before_at_its_own_iou() -> None:
    heads, batch = make_heads(), make_batch()
    losses = heads.losses(make_features(), make_proposals(), batch)
    # All 46 regions are sampled (at most a quarter as foreground), in the sampler's order, which the losses don't see.
    sample = heads.stages[0].sample(make_features(), make_proposals(), batch)  # type: ignore[operator]
    chosen = sample.boxes[0][sample.valid[0]]
    for i, (boxes, logits, deltas) in enumerate(by_hand(heads, chosen)[:3]):
        iou, matched = box_iou(batch.gt_boxes[0], boxes).max(dim=0)
        labels = torch.where(iou >= IOUS[i], batch.gt_labels[0][matched], 0)
        expected = torch.nn.functional.cross_entropy(logits, labels)
        torch.testing.assert_close(losses[f"loss_classifier_stage{i}"], expected, rtol=1e-4, atol=1e-5)
        wanted = ReferenceCoder(WEIGHTS[i]).encode_single(batch.gt_boxes[0][matched], boxes)
        own = torch.nn.functional.smooth_l1_loss(deltas, wanted, beta=1 / 9, reduction="none").sum(dim=1)
        expected = own[labels > 0].sum() / len(labels)
        torch.testing.assert_close(losses[f"loss_box_reg_stage{i}"], expected, rtol=1e-4, atol=1e-5)
        assert (labels > 0).any()


def test_the_stages_share_one_gradient_to_the_features() -> None:
    """Of each a third, as if there were one head; with one stage all of it."""

    def gradient(heads: CascadeRoIHeads, name: str) -> Tensor:
        features = make_features()
        features.maps[0].requires_grad_()
        losses = heads.losses(features, make_proposals(), make_batch())
        return torch.autograd.grad(losses[name], features.maps[0])[0]

    whole = gradient(make_heads(1), "loss_classifier_stage0")
    torch.testing.assert_close(gradient(make_heads(3), "loss_classifier_stage0"), whole / 3)
    assert whole.any()


def test_one_stage_is_the_plain_head() -> None:
    heads, batch, image_size = make_heads(1).eval(), make_batch(), torch.tensor([SIZE])
    plain: RoIHeads = heads.stages[0]  # type: ignore[assignment]
    with torch.no_grad():
        ours = heads.detect(make_features(), make_proposals(), image_size)[0]
        theirs = plain.detect(make_features(), make_proposals(), image_size)[0]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        for name, loss in plain.losses(make_features(), make_proposals(), batch).items():
            torch.testing.assert_close(heads.losses(make_features(), make_proposals(), batch)[f"{name}_stage0"], loss)


@pytest.mark.parametrize("masks", [False, True])
def test_the_builder(masks: bool) -> None:
    model = zoo.cascadercnn_efficientnet_lite0_fpn(num_classes=4, weights_backbone=None, masks=masks)
    heads = model.roi_heads
    assert isinstance(heads, CascadeRoIHeads) and model.has_masks == masks and model.num_classes == 4
    assert tuple(stage.matcher.fg_iou_thresh for stage in heads.stages) == IOUS
    assert tuple(stage.box_coder.weights for stage in heads.stages) == WEIGHTS
    assert {tuple(stage.box_predictor.bbox_pred.weight.shape) for stage in heads.stages} == {(4, 1024)}
    with pytest.raises(ValueError, match="2 IoU thresholds but 3 coder weights"):
        cascade_rcnn(model.backbone, 4, cascade_iou_thresh=(0.5, 0.6))
