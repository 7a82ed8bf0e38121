"""PointRend's masks: points, their features and labels against shapes known in closed form, and whole detectors."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detection.mask_grid import MaskGrid
from detection.models.backbones import resnet_fpn
from detection.models.compose import faster_rcnn
from detection.models.family.pointrend import (
    CoarseMaskPredictor,
    PointHead,
    PointRendRoIHeads,
    grid_points,
    masks_at,
    uncertain_points,
)
from detection.models.fast import accelerate
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import TwoFCHead
from detection.models.two_stage import TwoStageDetector
from detection.parts import FeatureMaps
from detection.recipes import rebuild
from tests.models.fast.test_accelerated import RPN, assert_same_detections, learn, make_batch
from tests.models.test_on_fake_cuda import FORMS, observe
from tests.runs import rehearsed

CENTRE, RADIUS = (62.0, 50.0), 21.0  # pixels
BOX = torch.tensor([[[36.0, 26.0, 92.0, 76.0]]])


def disc(where: Tensor) -> Tensor:
    """Signed distance in pixels of points `(..., 2)` to the edge of the disc, above 0 inside."""
    return RADIUS - (where - torch.tensor(CENTRE)).norm(dim=-1)


def on_image(points: Tensor, box: Tensor) -> Tensor:
    return box[:2] + points * (box[2:] - box[:2])


class Coordinates(nn.Module):
    """Reads where a point is from features that are the coordinates themselves; its logit is the distance."""

    seen = 0

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        self.seen += fine.shape[2]
        return disc(fine[:, :2].transpose(1, 2))[:, None].expand(-1, coarse.shape[1], -1)


def coordinates(stride: int = 4) -> FeatureMaps:
    """A map whose two channels are x and y of the centres of its cells, in pixels."""
    x, y = (torch.arange(count) * stride + stride / 2 for count in (40, 30))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1])
    return FeatureMaps((grid[None], torch.zeros(1, 2, 15, 20)), (stride, 2 * stride))


def heads(**options: Any) -> PointRendRoIHeads:
    torch.manual_seed(0)
    small = {
        "box_head": partial(TwoFCHead, out_channels=16),
        "mask_predictor": partial(CoarseMaskPredictor, hidden_channels=16),
    }
    return PointRendRoIHeads(2, 3, **small, **options)


def test_features_of_points_are_those_of_aligned_roi_align_with_one_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    features = FeatureMaps((torch.randn((2, 2, 30, 40), generator=generator), torch.zeros(2, 2, 15, 20)), (4, 8))
    boxes = torch.tensor([[[10.0, 8, 70, 60], [33.3, 21.7, 90.1, 99.9]], [[5.5, 5.5, 20, 30], [60, 70, 140, 110]]])
    seen: list[Tensor] = []

    class Note(nn.Module):
        def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
            seen.append(fine)
            return coarse

    ours = heads(point_head=Note())
    points = grid_points(torch.arange(14**2).expand(4, -1), 14)
    coarse = torch.randn((4, 3, 7, 7), generator=generator)
    logits = ours.point_logits(features, boxes, torch.tensor([[1, 2], [2, 1]]), coarse, points)
    pooled = RoIPooler(14, sampling_ratio=1, aligned=True, num_levels=1)(features, boxes)
    torch.testing.assert_close(seen[0].unflatten(2, (14, 14)), pooled, atol=1e-5, rtol=1e-5)
    middle = logits.unflatten(1, (14, 14))[:, ::2, ::2]  # twice the coarse grid: a quarter of a cell from its centres
    assert middle.shape == (4, 7, 7) and (logits[0].amax() <= coarse[0, 1].amax())


def test_points_are_drawn_where_the_mask_is_in_doubt() -> None:
    """The logit is 0 along x = 0.4, where most points lie, a quarter of 600 within 0.125; the rest are anywhere."""
    torch.manual_seed(0)
    x = (torch.arange(28) + 0.5) / 28
    logits = ((x - 0.4) * 50).expand(3, 1, 28, 28)
    points = uncertain_points(logits, 200, 3, 0.75)
    assert points.shape == (3, 200, 2) and (points >= 0).all() and (points <= 1).all()
    distance = (points[..., 0] - 0.4).abs()
    assert (distance[:, :150] < 0.2).all() and distance[:, :150].mean() < 0.08
    assert distance[:, 150:].mean() > 0.2 and points[..., 1].std() > 0.25


def test_labels_of_points_are_those_of_the_shape() -> None:
    """A disc that is stored with 112 cells a side: right wherever the edge is more than a stored cell away."""
    window = torch.tensor([40.0, 28, 84, 72])
    cells = grid_points(torch.arange(112**2)[None], 112)[0]
    stored = (disc(on_image(cells, window)) > 0).view(1, 1, 112, 112).to(torch.uint8) * 255
    stored = torch.cat((torch.zeros_like(stored), stored), 1)  # the second object of the image
    windows = torch.stack((torch.zeros(4), window))[None]
    torch.manual_seed(0)
    points = torch.rand(1, 5000, 2)
    found = masks_at(stored, windows, torch.tensor([[1]]), BOX, points)[0]
    distance = disc(on_image(points[0], BOX[0, 0]))
    clear = distance.abs() > 44 / 112 * 1.5
    assert clear.float().mean() > 0.94
    torch.testing.assert_close(found[clear], (distance[clear] > 0).float(), rtol=0, atol=1e-5)
    of_padding = masks_at(stored, windows, torch.tensor([[-1]]), BOX, points)
    assert of_padding.isfinite().all()


def test_subdivision_finds_the_edge_with_few_points() -> None:
    """An oracle in the place of the point head: the mask of 224 is right to its edge, from a ninth of its places."""
    ours = heads(point_head=Coordinates()).eval()
    found = ours.mask_probabilities(coordinates(), BOX, torch.tensor([[1]]))[0, 0]
    assert found.shape == (224, 224)
    wanted = disc(on_image(grid_points(torch.arange(224**2)[None], 224)[0], BOX[0, 0])).view(224, 224)
    assert torch.equal(found >= 0.5, wanted >= 0)
    assert ours.point_head.seen == 4 * 784
    coarse = heads(point_head=Coordinates(), steps=0).eval().mask_probabilities(coordinates(), BOX, torch.tensor([[1]]))
    rough = nn.functional.interpolate(coarse, size=(224, 224), mode="nearest")[0, 0]
    assert ((rough >= 0.5) != (wanted >= 0)).sum() > 1000


def test_losses_are_the_means_over_the_foreground() -> None:
    """One object, one region that matches it and one of background: both losses by hand from their parts."""
    ours, features = heads(train_points=50), coordinates()
    batch = make_batch(0)
    boxes, labels = batch.gt_boxes[:1, :2], torch.tensor([[2, 0]])
    one = type(
        batch
    )(
        **{name: getattr(batch, name)[:1] for name in ("images", "image_sizes", "gt_boxes", "gt_labels", "gt_valid")},
        original_sizes=batch.original_sizes[:1],
        gt_masks=batch.gt_masks[:1],  # type: ignore[index]
        gt_mask_windows=batch.gt_mask_windows[:1],  # type: ignore[index]
    )
    torch.manual_seed(3)
    found = ours.mask_losses(features, boxes, labels, torch.zeros_like(labels), one)
    assert list(found) == ["loss_mask", "loss_mask_point"]
    torch.manual_seed(3)
    coarse = ours.coarse_logits(features, boxes)
    points = uncertain_points(coarse[[0, 1], [2, 0]][:, None], 50, 3, 0.75)
    stored, windows = one.gt_masks, one.gt_mask_windows
    assert stored is not None and windows is not None
    inside = masks_at(stored, windows, torch.tensor([[0, -1]]), boxes, points)
    logits = ours.point_logits(features, boxes, labels, coarse, points)
    p = logits[0].sigmoid()
    by_hand = -(inside[0] * p.log() + (1 - inside[0]) * (1 - p).log()).mean()
    torch.testing.assert_close(found["loss_mask_point"], by_hand)
    target = MaskGrid().targets(stored, windows, torch.tensor([[0, -1]]), boxes, 7)[0, 0]
    q = coarse[0, 2].sigmoid()
    torch.testing.assert_close(found["loss_mask"], -(target * q.log() + (1 - target) * (1 - q).log()).mean())
    with pytest.raises(ValueError, match=r"set data\.masks"):
        ours.mask_losses(features, boxes, labels, torch.zeros_like(labels), replace(one, gt_masks=None))


def make() -> TwoStageDetector:
    """Every place of its masks is predicted, so that a rounding error can't choose another."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "box_head": partial(TwoFCHead, out_channels=32),
        "mask_predictor": partial(CoarseMaskPredictor, hidden_channels=32),
        "point_head": partial(PointHead, layers=(16, 16)),
        "first_side": 7,
        "steps": 1,
        "step_points": 196,
    }
    limits = {"score_thresh": 0.0, "detections_per_img": 20, "batch_size_per_image": 32}
    body = resnet_fpn("resnet18", norm="frozen", out_channels=16)
    return faster_rcnn(body, 4, roi_heads=partial(PointRendRoIHeads, **parts, **limits), **RPN)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("form", rehearsed(FORMS[:2], "quick"))
def test_an_accelerator_waits_for_nothing(form: str, training: bool) -> None:
    first, second = observe(make() if form == "plain" else accelerate(make(), "cuda"), training)
    assert second.waits == {} and not first.reads and not first.mixed and set(first.uploads) <= {"_to_copy"}


def test_quick_forms_detect_as_the_plain_one_and_a_recipe_makes_it_again() -> None:
    model, batch = make().eval(), make_batch(0)
    with torch.no_grad():
        wanted = model(batch)
        assert wanted[0]["masks"].shape[1:] == (1, 96, 128)
        for form in (accelerate(copy.deepcopy(model), "cpu"), model.for_inference()):
            assert_same_detections(wanted, form(batch))
        again = rebuild(model.recipe)
        again.load_state_dict(model.state_dict())
        assert_same_detections(wanted, again.eval()(batch))


def test_it_learns_in_bfloat16() -> None:
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train().run(make_batch(0), with_losses=True, with_detections=False)[0]
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.rehearsal
def test_its_losses_fall() -> None:
    rows = learn(make(), 40)
    assert (rows[-6:, -2:].mean(0) < rows[:6, -2:].mean(0)).all()


@pytest.mark.rehearsal
def test_exported_it_finds_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason='needs pip install "detection[export]"')
    pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')
    from detection.inference.exported import kept_facts
    from detection.interop.exported_files import onnx_runner, to_onnx
    from detection.interop.parity import compare
    from tests.test_export import as_predicted, assert_same, noise

    torch.manual_seed(0)
    parts: dict[str, Any] = {"mask_predictor": partial(CoarseMaskPredictor, hidden_channels=32)}
    parts |= {"first_side": 14, "steps": 2, "step_points": 196, "box_head": partial(TwoFCHead, out_channels=32)}
    roi_heads = partial(PointRendRoIHeads, score_thresh=0.3, detections_per_img=50, **parts)
    body = resnet_fpn("resnet18", norm="frozen", out_channels=16)
    model = faster_rcnn(body, 4, 96, 160, rpn_post_nms_top_n_test=100, roi_heads=roi_heads).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
        for layer in (model.roi_heads.mask_predictor.mask_logits, model.roi_heads.point_head.point_logits):
            layer.weight.mul_(300)
    to_onnx(model, tmp_path / "detector.onnx", kept_facts(model, ["a", "b", "c"], [7, 8, 9]))
    parity = compare(as_predicted(model), onnx_runner(tmp_path / "detector.onnx"), list(noise([(80, 120), (150, 70)])))
    assert_same(parity)
    assert parity.mask < 1e-2
