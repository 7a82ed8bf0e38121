"""Necks, heads and losses of `detection.models.family`: against torchvision, their papers' equations, and by hand."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FeaturePyramidNetwork as ReferencePyramid
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detection.boxes import BoxCoder
from detection.imbalance import SigmoidFocalLoss
from detection.losses import BalancedL1Loss
from detection.mask_grid import MaskGrid
from detection.models.backbones import resnet_fpn
from detection.models.compose import faster_rcnn
from detection.models.family.double_head import DoubleHead, DoublePredictor
from detection.models.family.iou_branch import IoURoIHeads
from detection.models.family.pyramids import ChosenLevelsPyramid, PathAggregationPyramid
from detection.models.fast import accelerate
from detection.models.masks import MaskHead, MaskPredictor
from detection.models.norms import NORM_LAYERS, Norm
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import FastRCNNPredictor, TwoFCHead
from detection.models.two_stage import TwoStageDetector
from detection.recipes import rebuild
from detection.weights import adapt_classes
from tests.models.fast.test_accelerated import RPN, assert_same_detections, learn, make_batch
from tests.models.test_on_fake_cuda import FORMS, observe
from tests.models.test_roi_heads import make_batch as boxes_of
from tests.models.test_roi_heads import make_features, make_proposals
from tests.runs import rehearsed

SHAPES = [(15, 23), (8, 12), (4, 6), (2, 3)]  # halves, rounded up, as networks have them
CHANNELS = [4, 8, 16, 32]


def maps_of(shapes: list[tuple[int, int]] = SHAPES) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = zip(CHANNELS, shapes, strict=False)
    return OrderedDict((str(i), torch.randn((2, c, *shape), generator=generator)) for i, (c, shape) in enumerate(rows))


@pytest.mark.parametrize("norm", [None, "batch", "group"])
def test_path_aggregation_is_the_papers(norm: Norm | None) -> None:
    """N_2 = P_2 and N_{i+1} = ReLU(conv(P_{i+1} + ReLU(conv of stride 2 (N_i)))), written out on torchvision's P_i."""
    torch.manual_seed(0)
    ours = PathAggregationPyramid(CHANNELS, 16, norm).eval()
    theirs = ReferencePyramid(CHANNELS, 16, None, NORM_LAYERS[norm] if norm else None).eval()
    theirs.load_state_dict({n: v for n, v in ours.state_dict().items() if n.startswith(("inner", "layer"))})
    p = list(theirs(maps_of()).values())

    def convolve(x: Tensor, block: Any, stride: int) -> Tensor:
        y = F.conv2d(x, block[0].weight, block[0].bias, stride=stride, padding=1)
        if norm == "group":
            y = F.group_norm(y, 16, block[1].weight, block[1].bias)
        elif norm == "batch":
            y = y / math.sqrt(1 + 1e-5)  # of a layer that has seen nothing
        return y.clamp(min=0)

    n = [p[0]]
    for i in range(3):
        halved = convolve(n[i], ours.down_blocks[i], 2)
        assert halved.shape == p[i + 1].shape
        n.append(convolve(p[i + 1] + halved, ours.fuse_blocks[i], 1))
    found = ours(maps_of())
    assert list(found) == ["0", "1", "2", "3", "pool"]
    for level, expected in zip(found.values(), [*n, n[-1][..., ::2, ::2]], strict=True):
        torch.testing.assert_close(level, expected, atol=1e-5, rtol=1e-5)
    assert all((level >= 0).all() for level in list(found.values())[1:]) and (found["0"] < 0).any()


def test_what_is_fine_reaches_the_coarsest_map_by_the_new_path_alone() -> None:
    """With the top-down path cut, a change of the finest map alone is seen in all others."""
    torch.manual_seed(0)
    pyramid, maps = PathAggregationPyramid(CHANNELS, 16), maps_of()
    before = pyramid(maps)
    after = pyramid(maps | {"0": maps["0"] + 1})
    assert all(not torch.equal(before[name], after[name]) for name in before)
    plain = ReferencePyramid(CHANNELS, 16)
    unchanged = plain(maps), plain(maps | {"0": maps["0"] + 1})
    assert torch.equal(unchanged[0]["3"], unchanged[1]["3"])


def test_maps_that_are_not_halves_are_refused_when_the_backbone_is_built() -> None:
    from detection.models.backbones import mobilenet_v3_large_fpn  # both of its maps have stride 32

    with pytest.raises(ValueError, match=r"no backbone: .* must match the size of tensor"):
        mobilenet_v3_large_fpn(pyramid=PathAggregationPyramid)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_chosen_levels_equal_torchvision(levels: int) -> None:
    torch.manual_seed(0)
    ours = ChosenLevelsPyramid(CHANNELS, 6, conv_levels=levels)
    theirs = ReferencePyramid(CHANNELS, 6, LastLevelP6P7(6, 6) if levels else None)
    theirs.load_state_dict(ours.state_dict(), strict=levels != 1)  # P7 is all that is missing
    found, expected = ours(maps_of()), theirs(maps_of())
    assert list(found) == ["0", "1", "2", "3", "p6", "p7"][: 4 + levels]
    for name, level in found.items():
        torch.testing.assert_close(level, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("levels", "strides"), [(0, (4, 8, 16, 32)), (2, (4, 8, 16, 32, 64, 128))])
def test_strides_and_anchors_follow_the_levels(levels: int, strides: tuple[int, ...]) -> None:
    pyramid = partial(ChosenLevelsPyramid, out_channels=16, conv_levels=levels)
    small: dict[str, Any] = {"box_head": partial(TwoFCHead, out_channels=32), **RPN}
    model = faster_rcnn(resnet_fpn("resnet18", pyramid=pyramid), 4, box_roi_pool=RoIPooler(num_levels=4), **small)
    assert model.strides == strides
    assert len(model.rpn.anchor_generator.sizes) == len(strides)
    assert model.rpn.head.cls_logits.out_channels == 15  # five sizes and three ratios on each level
    losses = model.run(make_batch(0), with_losses=True, with_detections=False)[0]
    assert all(loss.isfinite() for loss in losses.values())


def test_double_head_is_two_heads_and_their_predictor_splits_them() -> None:
    torch.manual_seed(0)
    head, predictor = DoubleHead(8, 3, blocks=3, out_channels=16).eval(), DoublePredictor(32, 4).eval()
    pooled = torch.randn(5, 8, 3, 3)
    conv3, norm1, _, conv1, norm2 = head.widen
    y = F.conv2d(norm1(F.conv2d(pooled, conv3.weight, padding=1)).relu(), conv1.weight)  # type: ignore[arg-type]
    y = (norm2(y) + head.shortcut[1](F.conv2d(pooled, head.shortcut[0].weight))).relu()  # type: ignore[arg-type]
    for block in head.bottlenecks:
        assert isinstance(block, Bottleneck)
        z = block.bn1(F.conv2d(y, block.conv1.weight)).relu()
        z = block.bn2(F.conv2d(z, block.conv2.weight, padding=1)).relu()
        y = (y + block.bn3(F.conv2d(z, block.conv3.weight))).relu()
    places = y.flatten(2).mean(2)
    layers = head.fc_head(pooled)
    found = head(pooled)
    torch.testing.assert_close(found, torch.cat((layers, places), 1))
    logits, deltas = predictor(found)
    torch.testing.assert_close(logits, layers @ predictor.cls_score.weight.T + predictor.cls_score.bias)
    torch.testing.assert_close(deltas, places @ predictor.bbox_pred.weight.T + predictor.bbox_pred.bias)


def test_each_of_the_two_heads_learns_its_task_alone() -> None:
    torch.manual_seed(0)
    head, predictor = DoubleHead(8, 3, out_channels=16), DoublePredictor(32, 4)
    assert len(head.bottlenecks) == 4  # with the widening block the five of the paper
    for index, (own, other) in enumerate(((head.fc_head, head.bottlenecks), (head.bottlenecks, head.fc_head))):
        head.zero_grad()
        predictor(head(torch.randn(5, 8, 3, 3)))[index].square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for n, p in own.named_parameters() if "weight" in n)
        assert not any(p.grad is not None and p.grad.any() for p in other.parameters())


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 1.5), (0.2, 1.0), (1.0, 1.5)])
def test_balanced_l1_is_the_integral_of_its_slope(alpha: float, gamma: float) -> None:
    """Equation 9, summed up in NumPy from 0: alpha ln(b x + 1) below 1, gamma from there on, with equation 11's b."""
    b = math.exp(gamma / alpha) - 1
    x = np.linspace(0, 3, 300_001)
    slope = np.where(x < 1, alpha * np.log(b * x + 1), gamma)
    integral = np.concatenate([[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * (x[1] - x[0]))])
    errors = torch.tensor([0.0, 0.02, 0.3, 0.999, 1.0, 1.001, 2.5, -0.3, -2.5], dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64).expand(len(errors), 4)
    deltas = torch.stack([errors, *[torch.zeros_like(errors)] * 3], 1).requires_grad_()
    found = BalancedL1Loss(alpha, gamma)(deltas, boxes, boxes, BoxCoder())
    size, sign = errors.abs().numpy(), errors.sign().numpy()
    np.testing.assert_allclose(found.detach(), np.interp(size, x, integral), atol=1e-4)
    found.sum().backward()
    assert deltas.grad is not None
    expected = sign * np.where(size < 1, alpha * np.log(b * size + 1), gamma)
    np.testing.assert_allclose(deltas.grad[:, 0], expected, atol=1e-9)


def test_balanced_l1_sums_the_four_and_is_finite_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 45, 25]])
    deltas = torch.randn((2, 4), generator=generator)
    loss, coder = BalancedL1Loss(), BoxCoder()
    columns = [loss(torch.where(torch.arange(4) == i, deltas, 0.0), boxes, boxes, coder) for i in range(4)]
    torch.testing.assert_close(loss(deltas, boxes, boxes, coder), torch.stack(columns).sum(0))
    far = torch.full((2, 4), 1e30, requires_grad=True)
    loss(far, boxes, boxes, coder).sum().backward()
    assert far.grad is not None and (far.grad == 1.5).all()
    with pytest.raises(ValueError, match="alpha is 0"):
        BalancedL1Loss(alpha=0)


def iou_heads(**options: Any) -> IoURoIHeads:
    torch.manual_seed(0)
    parts: dict[str, Any] = {"box_roi_pool": RoIPooler(3, num_levels=2), "box_head": TwoFCHead(8, 3, 16)}
    parts["box_predictor"] = FastRCNNPredictor(16, 4, options.pop("class_agnostic", False))
    return IoURoIHeads(8, 4, **parts, **options)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_the_iou_loss_is_that_of_each_refined_box(class_agnostic: bool) -> None:
    """Region by region in a loop, with torchvision's IoU: cross-entropy against it, by the number of foreground."""
    heads = iou_heads(class_agnostic=class_agnostic, batch_size_per_image=100)
    batch = boxes_of([[[5.0, 5, 25, 30], [10, 12, 40, 44]], [[30.0, 30, 60, 60]]], [[2, 1], [3]])
    sample = heads.sample(make_features(), make_proposals(), batch)
    logits, deltas, ious = heads.predict_with_iou(make_features(), sample.boxes)
    for found, expected in zip((logits, deltas), heads.predict(make_features(), sample.boxes), strict=True):
        torch.testing.assert_close(found, expected)
    total, count = 0.0, 0
    for image in range(2):
        for s in range(sample.boxes.shape[1]):
            label = int(sample.labels[image, s])
            if not label or not sample.valid[image, s]:
                continue
            box = heads.box_coder.decode(deltas[image, s, 0 if class_agnostic else label], sample.boxes[image, s])
            box = box.clamp(min=0).minimum(torch.tensor([96.0, 64, 96, 64]))
            gt = batch.gt_boxes[image, sample.matched_idxs[image, s]]
            wanted, p = box_iou(box[None], gt[None]).item(), ious[image, s, label].sigmoid().item()
            total -= wanted * math.log(p) + (1 - wanted) * math.log(1 - p)
            count += 1
    losses = heads.iou_losses(ious, deltas, sample, batch)
    assert count >= 3 and losses["loss_iou"].item() == pytest.approx(total / count, rel=1e-5)
    (gradient,) = torch.autograd.grad(losses["loss_iou"], [deltas], allow_unused=True, retain_graph=True)
    assert gradient is None
    every = heads.losses(make_features(), make_proposals(), batch)
    assert list(every) == ["loss_classifier", "loss_box_reg", "loss_iou"]


def test_without_objects_the_iou_loss_is_0_and_every_parameter_has_a_gradient() -> None:
    heads = iou_heads()
    losses = heads.losses(make_features(), make_proposals(), boxes_of([[], []], [[], []]))
    torch.stack(list(losses.values())).sum().backward()
    assert losses["loss_iou"] == 0 and all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


@pytest.mark.parametrize(("share", "class_loss"), [(0.0, None), (0.5, None), (0.5, SigmoidFocalLoss()), (0.8, None)])
def test_scores_are_the_product_of_both(share: float, class_loss: Any) -> None:
    heads = iou_heads(
        iou_share=share, class_loss=class_loss, score_thresh=0.0, nms_thresh=1.0, detections_per_img=10_000
    ).eval()
    nn.init.normal_(heads.iou_score.weight)
    sizes, proposals = torch.tensor([[64, 96]] * 2), make_proposals()
    logits, _, ious = heads.predict_with_iou(make_features(), proposals.boxes)
    classes = logits.sigmoid() if class_loss else logits.softmax(-1)
    wanted = classes[..., 1:] ** (1 - share) * ious.sigmoid()[..., 1:] ** share
    for image, found in enumerate(heads.detect(make_features(), proposals, sizes)):
        expected = wanted[image][proposals.valid[image]].flatten().sort(descending=True).values
        torch.testing.assert_close(found["scores"], expected)
    if share:
        with pytest.raises(ValueError, match="iou_share is 1"):
            iou_heads(iou_share=1)


def body(pyramid: Any = None) -> nn.Module:
    return resnet_fpn("resnet18", norm="frozen", out_channels=16, pyramid=pyramid)


SMALL: dict[str, Any] = {"box_score_thresh": 0.0, "box_detections_per_img": 20, "box_batch_size_per_image": 32}
HEADS = {name.removeprefix("box_"): value for name, value in SMALL.items()}
DETECTORS: dict[str, Callable[[], TwoStageDetector]] = {
    "PAFPN": lambda: faster_rcnn(
        body(partial(PathAggregationPyramid, out_channels=16)),
        4,
        box_head=partial(TwoFCHead, out_channels=32),
        **SMALL,
        **RPN,
    ),
    "P6 and P7": lambda: faster_rcnn(
        body(partial(ChosenLevelsPyramid, out_channels=16, conv_levels=2)),
        4,
        box_head=partial(TwoFCHead, out_channels=32),
        box_roi_pool=RoIPooler(num_levels=4),
        **SMALL,
        **RPN,
    ),
    "double head": lambda: faster_rcnn(
        body(),
        4,
        box_head=partial(DoubleHead, out_channels=32, norm="frozen"),
        box_predictor=DoublePredictor,
        box_loss=BalancedL1Loss(),
        **SMALL,
        **RPN,
    ),
    "IoU branch": lambda: faster_rcnn(
        body(),
        4,
        roi_heads=partial(IoURoIHeads, box_head=partial(TwoFCHead, out_channels=32), **HEADS),
        **RPN,
    ),
}


def make(name: str) -> TwoStageDetector:
    torch.manual_seed(0)
    return DETECTORS[name]()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("form", rehearsed(FORMS[:2], "quick"))
@pytest.mark.parametrize("name", rehearsed(DETECTORS, "PAFPN", "double head", "IoU branch"))
def test_an_accelerator_waits_for_nothing(name: str, form: str, training: bool) -> None:
    model = make(name) if form == "plain" else accelerate(make(name), "cuda")
    first, second = observe(model, training)
    assert second.waits == {} and not first.reads and not first.mixed and set(first.uploads) <= {"_to_copy"}


@pytest.mark.parametrize("name", rehearsed(DETECTORS, "IoU branch"))
def test_quick_forms_detect_and_learn_as_the_plain_ones(name: str) -> None:
    model, batch = make(name).eval(), make_batch(0)
    with torch.no_grad():
        wanted = model(batch)
        for form in (*(accelerate(copy.deepcopy(model), device) for device in ("cpu", "cuda")), model.for_inference()):
            assert_same_detections(wanted, form(batch))
    found = learn(accelerate(make(name).double(), "cpu"), 2)
    torch.testing.assert_close(found, learn(make(name).double(), 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", rehearsed(DETECTORS, "P6 and P7", "double head", "IoU branch"))
def test_it_learns_in_bfloat16_and_its_recipe_makes_it_again(name: str) -> None:
    model = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train().run(make_batch(0), with_losses=True, with_detections=False)[0]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    again = rebuild(model.recipe)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a, b in zip(model.eval()(make_batch(0)), again.eval()(make_batch(0)), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_masks_of_the_iou_branch_keep_their_grid_in_a_recipe() -> None:
    parts: dict[str, Any] = {"mask_roi_pool": RoIPooler(7), "mask_head": partial(MaskHead, layers=[16])}
    parts["mask_predictor"] = partial(MaskPredictor, hidden_channels=16)
    small = partial(TwoFCHead, out_channels=32)
    model = faster_rcnn(body(), 4, roi_heads=partial(IoURoIHeads, box_head=small, **parts, **HEADS), **RPN)
    losses = model.run(make_batch(0), with_losses=True, with_detections=False)[0]
    assert {"loss_iou", "loss_mask"} <= losses.keys()
    assert type(model.mask_grid) is type(rebuild(model.recipe).mask_grid) is MaskGrid


def test_weights_of_other_classes_bring_the_rows_of_those_of_the_same_name() -> None:
    model = make("IoU branch")
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items() if value.is_floating_point()}
    adapted = adapt_classes(state, model.state_dict(), ["a", "b", "c"], ["c", "x", "b"])
    for end in ("iou_score.weight", "box_predictor.cls_score.weight"):
        rows, old = adapted[f"roi_heads.{end}"], state[f"roi_heads.{end}"]
        assert torch.equal(rows[1], old[3]) and torch.equal(rows[3], old[2]) and torch.equal(rows[0], old[0])
        assert torch.equal(rows[2], model.state_dict()[f"roi_heads.{end}"][2])


@pytest.mark.rehearsal
def test_exported_it_finds_the_same(tmp_path: Path) -> None:
    """The IoU branch on a path-aggregation pyramid with a double head, in one file."""
    pytest.importorskip("onnxscript", reason='needs pip install "detection[export]"')
    pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')
    from detection.inference.exported import kept_facts
    from detection.interop.exported_files import onnx_runner, to_onnx
    from detection.interop.parity import compare
    from tests.test_export import as_predicted, assert_same, noise

    torch.manual_seed(0)
    parts = {"box_head": partial(DoubleHead, out_channels=32), "box_predictor": DoublePredictor}
    model = faster_rcnn(
        body(partial(PathAggregationPyramid, out_channels=16)),
        4,
        96,
        160,
        roi_heads=partial(IoURoIHeads, score_thresh=0.3, detections_per_img=300, **parts),
        rpn_post_nms_top_n_test=100,
    ).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(3)
        model.roi_heads.iou_score.weight.mul_(30)
    to_onnx(model, tmp_path / "detector.onnx", kept_facts(model, ["a", "b", "c"], [7, 8, 9]))
    parity = compare(as_predicted(model), onnx_runner(tmp_path / "detector.onnx"), list(noise([(80, 120), (150, 70)])))
    assert_same(parity)


def test_no_proposal_that_exists_is_no_detection() -> None:
    found = iou_heads().eval().detect(make_features(), make_proposals(4, 0), torch.tensor([[64, 96]] * 2))
    assert [len(d["scores"]) for d in found] == [0, 0]
