"""The key point branch: against torchvision's functions and detectors, and what a batch may hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection as reference
from torchvision.models.detection import roi_heads
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from detection.anchors import default_anchors
from detection.batch import Batch
from detection.cli.configuration import defaults
from detection.fitting import PartError
from detection.interop import CheckpointError, detector_for_classes, load_detector, save_detector
from detection.mask_grid import TorchvisionMaskGrid
from detection.models.backbones import resnet_fpn
from detection.models.compose import mask_branch
from detection.models.family.keypoint_builders import (
    MIN_SIZES,
    keypoint_rcnn,
    keypointrcnn_efficientnet_lite0_fpn,
    keypointrcnn_resnet50_fpn,
)
from detection.models.family.keypoints import (
    KeypointHead,
    KeypointPredictor,
    KeypointRoIHeads,
    enlarge_twice,
    keypoint_cells,
    locate_keypoints,
)
from detection.models.masks import MaskHead
from detection.models.two_stage import TwoStageDetector
from detection.models.zoo import fasterrcnn_efficientnet_lite0_fpn
from detection.parts import FeatureMaps
from detection.pretrained import load_weights
from detection.recipes import rebuild
from tests.models.fast.test_accelerated import COMMON, RPN, make, make_batch
from tests.models.test_dispatch import watching
from tests.models.test_parity import FORMS, OPTIONS, SMALL, assert_same, trace

Sample = tuple[list[Tensor], list[dict[str, Tensor]]]
Calibrated = Callable[[Callable[[], nn.Module]], nn.Module]
LAYERS = (32, 32)
LITTLE: dict[str, Any] = {"weights_backbone": None, "fpn_channels": 16, "min_size": 64, "max_size": 96}


def random_boxes(generator: torch.Generator, count: int) -> Tensor:
    """Of a tenth of a pixel to 150; one in three with whole pixels, whose edges key points can lie on."""
    corner = torch.rand((count, 2), generator=generator) * 100
    boxes = torch.cat((corner, corner + 0.1 + torch.rand((count, 2), generator=generator) ** 3 * 150), dim=1)
    whole = torch.cat((boxes[:, :2].floor(), boxes[:, 2:].floor() + 1), dim=1)
    return torch.where((torch.arange(count) % 3 == 0)[:, None], whole, boxes)


def test_layers_equal_torchvision() -> None:
    pooled = torch.randn((3, 8, 14, 14), generator=torch.Generator().manual_seed(0))
    ours, theirs = KeypointHead(8, (6, 6)), KeypointRCNNHeads(8, (6, 6))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(pooled), theirs(pooled))
    ours, theirs = KeypointPredictor(8, 5), KeypointRCNNPredictor(8, 5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours(pooled).shape == (3, 5, 56, 56)
    torch.testing.assert_close(ours(pooled), theirs(pooled))
    for ours, theirs in (
        (KeypointHead(256), KeypointRCNNHeads(256, (512,) * 8)),
        (KeypointPredictor(512, 17), KeypointRCNNPredictor(512, 17)),
    ):
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert (a == b).all() if a.ndim == 1 else abs(float(a.std() / b.std()) - 1) < 0.05


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 2, 5, 7), (4, 28, 28)])
def test_heatmaps_are_enlarged_as_by_interpolation(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ours, theirs = enlarge_twice(maps), F.interpolate(maps.reshape(1, -1, *shape[-2:]), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(ours, theirs.view_as(ours))
    weight = torch.randn(ours.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((o.view_as(weight) * weight).sum(), maps)[0] for o in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([7, 56]))
def test_key_points_fall_into_the_cells_of_torchvision(seed: int, side: int) -> None:
    """Also on each edge of the box, outside of it, and where they are hidden or not annotated."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, 12)
    share = torch.rand((12, 9, 2), generator=generator) * 1.4 - 0.2
    share[:, :4] = share[:, :4].round().clamp(0, 1)  # on the corners
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    places = torch.where(share == 1, high, low + share * (high - low))
    visible = torch.randint(0, 3, (12, 9, 1), generator=generator)
    keypoints = torch.cat((places, visible), dim=-1)
    cells, counted = keypoint_cells(keypoints, boxes, side)
    wanted, valid = roi_heads.keypoints_to_heatmap(keypoints, boxes, side)
    assert torch.equal(cells, wanted) and torch.equal(counted, valid.bool())
    assert counted.any() and not counted.all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 6))
def test_key_points_are_found_where_torchvision_finds_them(seed: int, count: int) -> None:
    """To the bit: boxes of less than a pixel, of whole pixels, and none at all among them."""
    generator = torch.Generator().manual_seed(seed)
    heatmaps, boxes = torch.randn((count, 5, 12, 12), generator=generator), random_boxes(generator, count)
    points, scores = locate_keypoints(heatmaps, boxes)
    wanted, heights = roi_heads.heatmaps_to_keypoints(heatmaps, boxes)
    assert points.shape == (count, 5, 3) and torch.equal(points, wanted) and torch.equal(scores, heights)


def test_the_host_reads_the_sizes_of_all_boxes_at_once() -> None:
    heatmaps, boxes = torch.randn(6, 3, 8, 8), random_boxes(torch.Generator().manual_seed(0), 6)
    with watching(nn.Identity()) as watch:
        locate_keypoints(heatmaps, boxes)
    assert watch.dependent == {"tolist": 1}


def heads_and_features() -> tuple[KeypointRoIHeads, FeatureMaps]:
    torch.manual_seed(0)
    heads = KeypointRoIHeads(8, 3, 5, keypoint_head=partial(KeypointHead, layers=(8,)))
    return heads, FeatureMaps(tuple(torch.randn(2, 8, 96 // s, 128 // s) for s in (4, 8)), (4, 8))


def regions(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of each image six regions about its objects, foreground first: two of the first image are background."""
    index = torch.tensor([[0, 1, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    labels = torch.tensor([[1, 2, 2, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    boxes = batch.gt_boxes.gather(1, index[..., None].expand(-1, -1, 4))
    shift = torch.randn((2, 6, 4), generator=torch.Generator().manual_seed(1)) * 3
    return boxes + shift * (torch.arange(6) > 1)[:, None], labels, index


def test_the_loss_and_its_gradient_equal_torchvision() -> None:
    """Crowded or not, images have other numbers of foreground regions; a region on its object's box among them."""
    heads, features = heads_and_features()
    batch = make_batch(0)
    boxes, labels, index = regions(batch)
    loss = heads.keypoint_losses(features, boxes, labels, index, batch)["loss_keypoint"]
    wanted_gradients = torch.autograd.grad(loss, list(heads.keypoint_head.parameters()))
    part = labels > 0
    logits = heads.heatmaps(features, boxes)[part]
    rows = [[t[i][part[i]] for i in range(2)] for t in (boxes, index)]
    assert batch.gt_keypoints is not None
    wanted = roi_heads.keypointrcnn_loss(logits, rows[0], list(batch.gt_keypoints), rows[1])
    assert loss.item() > 1
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(wanted, list(heads.keypoint_head.parameters()))
    for a, b in zip(wanted_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", ["none visible", "none inside", "no objects"])
def test_without_key_points_that_count_the_loss_is_0_and_every_head_gets_a_gradient(case: str) -> None:
    model, batch = make("Keypoint R-CNN").train(), make_batch(0)
    points = batch.gt_keypoints
    assert points is not None
    if case == "none visible":
        batch = replace(batch, gt_keypoints=points * torch.tensor([1.0, 1, 0]))
    elif case == "none inside":
        batch = replace(batch, gt_keypoints=points + torch.tensor([500.0, 0, 0]))
    else:
        batch = replace(batch, gt_valid=batch.gt_valid & False, gt_boxes=batch.gt_boxes * 0)
    losses, _ = model.run(batch, with_losses=True, with_detections=False)
    assert losses["loss_keypoint"].item() == 0 and all(bool(loss.isfinite()) for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert ".keypoint_" not in name or not parameter.grad.any(), name


@pytest.fixture(scope="module")
def twins(calibrated: Calibrated) -> tuple[TwoStageDetector, nn.Module]:
    """A small Keypoint R-CNN, ours and torchvision's, with the same weights."""
    # Of these random weights the proposals 60 and 61 score the same, and which is kept is the processor's choice
    limits = {"rpn_post_nms_top_n_train": 65, "rpn_post_nms_top_n_test": 65}
    options = {**OPTIONS, **SMALL, **limits, "box_detections_per_img": 60}

    def build(norm: type[nn.Module], layers: int) -> nn.Module:
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=layers)
        parts = {"keypoint_head": KeypointRCNNHeads(256, LAYERS), "keypoint_predictor": KeypointRCNNPredictor(32, 17)}
        return reference.KeypointRCNN(backbone, **parts, **options)

    theirs = build(FrozenBatchNorm2d, 3)
    theirs.load_state_dict(calibrated(partial(build, nn.BatchNorm2d, 5)).state_dict())
    anchors = default_anchors(5, infer_strides=True)
    backbone = resnet_fpn("resnet18", trainable_layers=3, norm="frozen")
    head = partial(KeypointHead, layers=LAYERS)
    ours = keypoint_rcnn(backbone, keypoint_head=head, rpn_anchor_generator=anchors, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_twins_agree(twins: tuple[TwoStageDetector, nn.Module], real_samples: Sample) -> None:
    """Boxes, key points, their scores and all losses, in every form. `test_parity` has ResNet-50, in the rehearsal."""
    ours, theirs = twins
    expected = trace(theirs, real_samples)
    assert all(len(d["keypoints"]) >= 50 for d in expected.detections) and float(expected.losses["loss_keypoint"]) > 1
    for form in FORMS.values():
        assert_same(trace(form(ours), real_samples), expected)


@pytest.mark.rehearsal
def test_twins_have_the_same_gradients(twins: tuple[TwoStageDetector, nn.Module], real_samples: Sample) -> None:
    found = []
    for model in twins:
        copied = deepcopy(model).train()
        sum(copied(*real_samples).values()).backward()
        found.append({name: p.grad for name, p in copied.named_parameters() if p.grad is not None})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and any(".keypoint_head." in name for name in ours)
    for name, wanted in theirs.items():
        if not name.endswith("kps_score_lowres.bias"):  # whose gradient is 0: softmax does not see it
            difference = float((ours[name] - wanted).norm() / wanted.norm())
            assert difference < 1e-3, f"{name}: {difference:.1e}"


def test_builders_have_the_keys_and_the_arguments_of_torchvision() -> None:
    with torch.device("meta"):
        theirs = reference.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    ours = keypointrcnn_resnet50_fpn()
    shapes = [{name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.transform.min_size == theirs.transform.min_size and ours.num_classes == 2
    assert (ours.has_keypoints, ours.num_keypoints, ours.has_masks) == (True, 17, False)


@pytest.mark.parametrize("name", ["keypointrcnn_resnet50_fpn", "keypointrcnn_efficientnet_lite0_fpn"])
def test_the_command_line_finds_the_arguments_of_a_builder(name: str) -> None:
    known = defaults(f"detection.{name}")
    assert tuple(known["min_size"]) == MIN_SIZES
    wanted = {"keypoint_roi_pool", "keypoint_head", "keypoint_predictor", "keypoint_loss", "num_keypoints"}
    assert wanted | {"box_score_thresh", "rpn_nms_thresh", "mask_head", "resizing"} <= set(known.keys())


def test_another_number_of_key_points_starts_its_last_layer_afresh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = partial(keypoint_rcnn, keypoint_head=partial(KeypointHead, layers=(8,)), min_size=64, max_size=96)
    old, file = small(resnet_fpn("resnet18", out_channels=16), 2, 17), tmp_path / "weights.pth"
    torch.save(old.state_dict(), file)
    new = small(resnet_fpn("resnet18", out_channels=16), 2, 5)
    fresh = deepcopy(new.state_dict())
    load_weights(new, None, file)
    for name, value in new.state_dict().items():
        kept = "kps_score_lowres" not in name
        assert torch.equal(value, (old.state_dict() if kept else fresh)[name]), name


def test_a_detector_is_built_again_from_its_recipe() -> None:
    model = keypointrcnn_efficientnet_lite0_fpn(num_keypoints=5, num_classes=3, box_score_thresh=0.0, **LITTLE)
    again = rebuild(json.loads(json.dumps(model.recipe)))
    again.load_state_dict(model.state_dict(), strict=True)
    image = [torch.rand(3, 70, 90)]
    with torch.no_grad():
        a, b = model.eval()(image)[0], again.eval()(image)[0]
    assert a["keypoints"].shape == (len(a["boxes"]), 5, 3) and len(a["boxes"]) > 10
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_predictor_exchanged_as_for_torchvision_is_kept_in_files(tmp_path: Path) -> None:
    model = keypointrcnn_efficientnet_lite0_fpn(**LITTLE)
    model.roi_heads.keypoint_predictor = KeypointRCNNPredictor(16, 7)
    assert model.num_keypoints == 7
    save_detector(tmp_path / "detector.safetensors", model, ["person"])
    again = load_detector(tmp_path / "detector.safetensors")
    assert again.num_keypoints == 7 and type(again.roi_heads.keypoint_predictor) is KeypointPredictor
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_file_trains_on_with_other_classes_and_key_points(tmp_path: Path) -> None:
    old = keypointrcnn_efficientnet_lite0_fpn(**LITTLE)  # of 17, which its recipe calls None
    save_detector(tmp_path / "detector.safetensors", old, ["person"])
    new = detector_for_classes(tmp_path / "detector.safetensors", ["horse", "person"], num_keypoints=7)
    assert (new.num_classes, new.num_keypoints) == (3, 7)
    for name, value in old.state_dict().items():
        if "kps_score_lowres" not in name and "box_predictor" not in name:
            assert torch.equal(new.state_dict()[name], value), name
    rows = [model.roi_heads.box_predictor.cls_score.weight for model in (old, new)]
    assert torch.equal(rows[0][1], rows[1][2])
    save_detector(
        tmp_path / "boxes.safetensors", fasterrcnn_efficientnet_lite0_fpn(num_classes=2, **LITTLE), ["person"]
    )
    with pytest.raises(CheckpointError, match="finds no key points"):
        detector_for_classes(tmp_path / "boxes.safetensors", num_keypoints=7)


def test_masks_and_key_points_go_together() -> None:
    """Each branch learns and finds what it does alone."""
    kept: dict[str, Any] = {**COMMON, **RPN, "rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
    masked = mask_branch(None, partial(MaskHead, layers=(8,)), None, TorchvisionMaskGrid())
    torch.manual_seed(0)
    head = partial(KeypointHead, layers=(8,))
    both = keypoint_rcnn(resnet_fpn("resnet18", out_channels=16), 4, 5, 96, keypoint_head=head, **masked, **kept)
    alone = keypoint_rcnn(resnet_fpn("resnet18", out_channels=16), 4, 5, 96, keypoint_head=head, **kept)
    own = {name: value for name, value in both.state_dict().items() if ".mask_" not in name}
    alone.load_state_dict(own, strict=True)
    batch = make_batch(0)
    with torch.no_grad():
        losses, found = both.eval().run(batch, True, True)
        wanted, _ = alone.eval().run(batch, True, True)
    assert losses.keys() == wanted.keys() | {"loss_mask"} and float(losses["loss_mask"]) > 0
    torch.testing.assert_close({n: losses[n] for n in wanted}, wanted)
    assert both.has_masks and {"masks", "keypoints"} <= found[0].keys()


def test_losses_are_float32_under_autocast_and_near_those_of_float32() -> None:
    model, batch = make("Keypoint R-CNN").train(), make_batch(0)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            found.append(model.run(batch, with_losses=True, with_detections=False)[0]["loss_keypoint"])
    assert found[1].dtype == torch.float32
    assert 0 < abs(float(found[1] / found[0]) - 1) < 0.05


WRONG: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "missing": (lambda _: None, "the target of image 1 has no keypoints"),
    "flat": (lambda k: k.flatten(1), r"image 1: keypoints must be \(1, k, 3\)"),
    "another number of objects": (lambda k: k.repeat(2, 1, 1), r"image 1: keypoints must be \(1, k, 3\)"),
    "another number": (lambda k: k[:, :4], "image 1 has 4 key points an object, image 0 has 5"),
    "visibility": (lambda k: k + 1.5, "image 1, box 0, key point 0 is not finite, or its visibility is not 0, 1 or 2"),
    "NaN": (lambda k: k / 0, "image 1, box 0, key point 0 is not finite"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_key_points_that_cannot_be_right_are_refused(wrong: str) -> None:
    spoil, message = WRONG[wrong]
    model = make("Keypoint R-CNN").train()
    box, points = torch.tensor([[10.0, 10, 60, 50]]), torch.tensor([[[20.0, 20, 2]] * 5])
    targets = [{"boxes": box, "labels": torch.tensor([1]), "keypoints": points} for _ in range(2)]
    spoilt = spoil(points)
    if spoilt is None:
        del targets[1]["keypoints"]
    else:
        targets[1]["keypoints"] = spoilt
    with pytest.raises(ValueError, match=message):
        model([torch.rand(3, 96, 128)] * 2, targets)


def test_data_without_its_key_points_is_refused_with_what_to_set() -> None:
    model, batch = make("Keypoint R-CNN").train(), make_batch(0)
    assert batch.gt_keypoints is not None
    for points, message in ((None, "there are none"), (batch.gt_keypoints[:, :, :3], "the data has 3")):
        with pytest.raises(ValueError, match=f"learns 5 key points but {message}.*data.keypoints"):
            model.run(replace(batch, gt_keypoints=points), with_losses=True, with_detections=False)


class TwiceTheCells(nn.Module):
    """A predictor whose heatmaps are of the wrong number of key points."""

    def __init__(self, in_channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 2 * num_keypoints, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(features)


def test_parts_that_do_not_fit_are_refused_when_the_detector_is_built() -> None:
    build = partial(keypoint_rcnn, keypoint_head=partial(KeypointHead, layers=(8,)), num_keypoints=5)
    with pytest.raises(PartError, match=r"keypoint_predictor: TwiceTheCells gave logits \(1, 10, 14, 14\)"):
        build(resnet_fpn("resnet18", out_channels=16), keypoint_predictor=TwiceTheCells)
    with pytest.raises(PartError, match=r"keypoint_loss: .* gave losses \(\) in the place of \(5,\)"):
        build(resnet_fpn("resnet18", out_channels=16), keypoint_loss=F.cross_entropy)


def test_a_loss_of_ones_own_is_the_mean_over_the_key_points_that_count() -> None:
    heads, features = heads_and_features()
    heads.keypoint_loss = lambda logits, cells: torch.where(cells > 0, 3.0, torch.nan) + 0 * logits[:, 0]
    batch = make_batch(0)
    boxes, labels, index = regions(batch)
    assert float(heads.keypoint_losses(features, boxes, labels, index, batch)["loss_keypoint"]) == 3.0
