"""How other libraries train, against values computed by hand from their definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from detection import matching
from detection.anchors import AnchorGenerator
from detection.batch import Batch, pad_masks
from detection.boxes import BoxCoder
from detection.drift import present_recipe
from detection.interop import import_detector, mmdetection, mmdetection_config, rows
from detection.interop.builders import Layout, aligned_cascade_rcnn, aligned_rcnn, build
from detection.interop.export import ExportableDetector
from detection.interop.names import rename
from detection.interop.rows import STYLES, Style
from detection.interop.semantics import InsideImage, Library, MaxIoUMatcher, Resampling, Semantics
from detection.interop.told import ASKED, CONFIG, DEFAULT, Told, origins_of
from detection.matching import Matcher
from detection.models.fast import accelerate
from detection.models.fast.on_cpu import TrimmedCascade
from detection.models.masks import MaskHead
from detection.models.norms import Norm
from detection.models.rpn import RegionProposalNetwork
from detection.parts import Proposals
from detection.recipes import rebuild
from detection.weights import CheckpointError
from tests.interop.test_configs import MM

CASCADE = """
model = dict(
    type='CascadeRCNN', rpn_head=dict(type='RPNHead'),
    roi_head=dict(type='CascadeRoIHead', stage_loss_weights=[1, 0.6, 0.2], bbox_head=[
        dict(type='Shared2FCBBoxHead', num_classes=3, reg_class_agnostic=True),
        dict(type='Shared2FCBBoxHead', num_classes=3, reg_class_agnostic=True),
        dict(type='Shared2FCBBoxHead', num_classes=3, reg_class_agnostic=True)]),
    train_cfg=dict(
        rpn=dict(assigner=dict(type='MaxIoUAssigner', min_pos_iou=0.2), allowed_border=8),
        rcnn=[dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, match_low_quality=False)),
              dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.6, neg_iou_thr=0.6, match_low_quality=False)),
              dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.7, match_low_quality=False))]))
"""


class OneMap(nn.Module):
    """One map of stride 16, from a single convolution."""

    strides, out_channels = (16,), 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, stride=16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"0": self.conv(images)}


def batch_of(boxes: list[list[float]], size: int = 64, images: int = 1) -> Batch:
    """Black images with the boxes in each, of label 1; a place of padding where there are none."""
    found = torch.tensor(boxes or [[0.0] * 4]).expand(images, -1, 4)
    sizes = torch.tensor([[size, size]] * images)
    some = torch.full(found.shape[:2], bool(boxes))
    return Batch(torch.zeros((images, 3, size, size), dtype=torch.uint8), sizes, found, some.long(), some, sizes)


def test_a_delta_that_shrinks_has_a_bound() -> None:
    deltas, box = torch.tensor([[0.0, 0.0, -10.0, 10.0]]), torch.tensor([[0.0, 0.0, 100.0, 100.0]])
    bound = math.log(1000 / 16)
    sides = {}
    for lower in (None, -bound):
        x1, y1, x2, y2 = BoxCoder(min_log_ratio=lower).decode(deltas, box)[0].tolist()
        sides[lower] = x2 - x1, y2 - y1
    assert sides[-bound] == pytest.approx((1.6, 6250), rel=1e-4)  # 100 px times 16 / 1000, and over it
    assert sides[None] == pytest.approx((100 * math.exp(-10), 6250), rel=1e-2)


def test_a_best_anchor_counts_from_an_iou_on_and_for_the_last_object() -> None:
    iou = torch.tensor([[0.9, 0.2, 0.1, 0.0], [0.8, 0.35, 0.0, 0.35], [0.0, 0.0, 0.25, 0.0]])
    # Object 1 takes anchor 0 from object 0, object 2 has no anchor of IoU 0.3.
    assert MaxIoUMatcher(0.7, 0.3, 0.3).assign(iou).tolist() == [1, -2, -1, -2]
    assert MaxIoUMatcher(0.7, 0.3, 0.25).assign(iou).tolist() == [1, -2, 2, -2]
    assert Matcher(0.7, 0.3, True).assign(iou).tolist() == [0, -2, 2, -2]


def test_blocks_of_anchors_are_matched_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    corner = torch.rand((2, 60, 2), generator=torch.Generator().manual_seed(1)) * 50
    boxes = torch.cat((corner, corner + 20), dim=2)
    truth, valid = boxes[:, ::20] + 4, torch.tensor([[True, True, True], [True, False, False]])
    matcher = MaxIoUMatcher(0.9, 0.3, 0.2)
    whole = matcher(truth, valid, boxes)
    monkeypatch.setattr(matching, "MAX_IOU_ELEMENTS", 6 * 7)
    assert torch.equal(matcher(truth, valid, boxes), whole)
    assert set(whole[0].tolist()) == {-2, -1, 0, 1, 2} and whole[1].max() == 0


def test_anchors_that_stand_out_do_not_train() -> None:
    anchors = torch.tensor([[0, 0, 63, 31], [0, 0, 64, 31], [-1, 0, 9, 9], [0, 0, 9, 32], [-9, 0, 9, 9]]).float()
    sizes = torch.tensor([[32, 64], [64, 64]])
    assert InsideImage(0)(anchors, sizes).tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 1, 0]]
    assert InsideImage(8)(anchors, sizes).tolist() == [[1, 1, 1, 1, 0]] * 2


def silent_rpn(semantics: Semantics) -> Any:
    """A detector of whose anchors each has the loss log 2: 4 x 4 of 32 px, of which the inner 2 x 2 are inside."""
    anchors = AnchorGenerator([[32]], [1.0], offset=0.5, round_anchors=False)
    model = aligned_rcnn(OneMap(), 3, rpn_anchor_generator=anchors, semantics=semantics, min_size=64, max_size=64)  # type: ignore[arg-type]
    for parameter in model.rpn.head.parameters():
        nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize(
    ("semantics", "boxes", "objectness", "box"),
    [
        # Each of the 16 anchors is 8 px beside a multiple of 16: with an object there, IoU 24 / 40, target 8 / 32.
        (Semantics("torchvision"), [], 1, 0),
        (Semantics("detectron2"), [], 2 * 16 / 512, 0),
        (Semantics(allowed_border=-1), [], 32 / (32 + 2), 0),  # no foreground counts as one in each image
        (Semantics(allowed_border=0), [], 2 * 4 / (2 * 4 + 2), 0),
        (Semantics("torchvision"), [[0.0, 8, 32, 40]], 1, 0.25 / 16),
        (Semantics("detectron2"), [[0.0, 8, 32, 40]], 32 / 512, 2 * 0.25 / 512),
    ],
)
def test_the_rpns_losses_have_each_librarys_divisor(
    semantics: Semantics, boxes: list[list[float]], objectness: float, box: float
) -> None:
    model, batch = silent_rpn(semantics), batch_of(boxes, images=2)
    features = model.extract(batch)
    anchors = model.rpn.lay_anchors(features, batch)[0]
    assert InsideImage(0)(anchors, batch.image_sizes)[0].sum() == 4 and len(anchors) == 16
    losses = model.rpn(features, batch, True)[1]
    if boxes:  # two anchors reach the object's highest IoU, the others below 0.7 and above 0.3 train nothing
        iou = matching.pairwise_iou(batch.gt_boxes[0], anchors)[0]
        foreground, sampled = int((iou == iou.max()).sum()), int(((iou < 0.3) | (iou == iou.max())).sum())
        whole = 2 * sampled if semantics.rules == "torchvision" else 512
        objectness, box = 2 * sampled / whole, 2 * foreground * 0.25 / whole
        assert foreground == 2
    assert losses["loss_objectness"].item() == pytest.approx(objectness * math.log(2), rel=1e-6)
    assert losses["loss_rpn_box_reg"].item() == pytest.approx(box, rel=1e-6)


def test_stages_sample_anew_and_have_their_weights() -> None:
    """A region 30 px beside an object of 100 is moved by 10 in the first stage and in the second."""
    model = aligned_cascade_rcnn(
        OneMap(),  # type: ignore[arg-type]
        4,
        box_positive_fraction=1.0,
        semantics="mmdetection",
        rpn_anchor_generator=AnchorGenerator([[32]], [1.0]),
    )
    heads = model.roi_heads
    assert isinstance(heads.training_rule, Resampling) and len(heads.stages) == 3
    for stage, bias in zip(heads._heads, (-1.0, -2.0, 0.0), strict=True):
        for parameter in stage.box_predictor.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(stage.box_predictor.bbox_pred.bias[:1], bias)  # type: ignore[union-attr,index]
    batch = batch_of([[100.0, 100, 200, 200]], 512)
    regions = torch.tensor([[[130.0, 100, 230, 200], [300, 300, 400, 400]]])
    proposals = Proposals(regions, torch.ones((1, 2)), torch.ones((1, 2), dtype=torch.bool))
    losses = heads.losses(model.extract(batch), proposals, batch)
    # IoU .54, .67 and .82: foreground at .5, .6 and .7. Three rows each: the region, the background, and the object
    # itself, which is given anew and moved anew. Targets are -.3, -.2 and -.1 times 10, 20 and 30.
    expected = {0: (3 - 1) + 1, 1: 0.5 * ((4 - 2) + 2), 2: 0.25 * (3 + 0)}
    for i, weight in enumerate((1, 0.5, 0.25)):
        assert losses[f"loss_box_reg_stage{i}"].item() == pytest.approx(expected[i] / 3, rel=1e-5)
        assert losses[f"loss_classifier_stage{i}"].item() == pytest.approx(weight * math.log(4), rel=1e-6)
    for stage in heads._heads:
        assert stage.box_coder.min_log_ratio == -stage.box_coder.max_log_ratio
    with pytest.raises(ValueError, match="2 stage_loss_weights for 3 stages: give one for each"):
        Semantics(stage_loss_weights=(1, 1)).apply(model)


ROI = "rcnn=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, {}))"
MASKED = MM.replace("'FasterRCNN'", "'MaskRCNN'").replace(
    "loss_bbox=dict(type='L1Loss'))),", "loss_bbox=dict(type='L1Loss')), mask_head=dict(type='FCNMaskHead')),"
)


@pytest.mark.parametrize(
    ("given", "lowest"),
    [
        ("", 0.0),  # absent: the assigner's own defaults
        ("min_pos_iou=0.5, match_low_quality=True", 0.5),  # as in the zoo
        ("match_low_quality=False", None),
        (None, 0.5),  # a configuration without training: as in the zoo
    ],
)
def test_proposals_of_a_mask_rcnn_are_matched_as_the_config_says(given: str | None, lowest: float | None) -> None:
    text = MASKED if given is None else MASKED.replace("rpn_proposal=", f"{ROI.format(given)}, rpn_proposal=", 1)
    told = mmdetection_config.read_told(text)
    assert told.shape["mask"] and told.arguments["mask_roi_pool"].output_size == 14
    with torch.device("meta"):
        model = build(Layout("resnet50", "fpn", 4, 1, True), STYLES["pytorch"], told)
        plain = build(Layout("resnet50", "fpn", 4, 1, True), STYLES["pytorch"], told.ask("torchvision"))
        again = rebuild(model.recipe or {})
    iou = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.4, 0.0], [0.0, 0.0, 0.3]])
    # Object 1 takes proposal 0 from object 0, which it has its highest IoU with; object 2 has proposal 2 from 0 on.
    wanted = {None: [0, -1, -1], 0.5: [1, -1, -1], 0.0: [1, -1, 2]}[lowest]
    assert model.roi_heads.matcher.assign(iou).tolist() == wanted
    assert type(plain.roi_heads.matcher) is Matcher
    assert type(again.roi_heads.matcher) is type(model.roi_heads.matcher)


def tiny_cascade_with_masks() -> Any:
    torch.manual_seed(0)
    return aligned_cascade_rcnn(
        OneMap(),  # type: ignore[arg-type]
        4,
        stage_masks=True,
        semantics="mmdetection",
        rpn_anchor_generator=AnchorGenerator([[32]], [1.0]),
        mask_head=partial(MaskHead, layers=[8]),
        box_score_thresh=0.0,
        min_size=64,
        max_size=64,
    )


@torch.no_grad()
def test_each_stage_has_a_mask_and_detections_their_mean() -> None:
    model = tiny_cascade_with_masks().eval()
    heads = model.roi_heads
    features = model.extract(batch_of([]))
    boxes, labels = torch.tensor([[[0.0, 0, 30, 40], [8, 8, 50, 60]]]), torch.tensor([[1, 3]])
    wanted = torch.zeros(2, 28, 28)
    for stage in heads.stages:
        nn.init.normal_(stage.mask_predictor.mask_fcn_logits.weight)
        pooled = roi_align(features.maps[0], [boxes[0]], 14, 1 / 16, 0, aligned=True)
        x = stage.mask_predictor.conv5_mask(stage.mask_head[0][0](pooled).relu()).relu()
        wanted += stage.mask_predictor.mask_fcn_logits(x)[[0, 1], labels[0]].sigmoid() / 3
    torch.testing.assert_close(heads.mask_probabilities(features, boxes, labels)[0], wanted, rtol=1e-5, atol=1e-6)
    assert model.has_masks and wanted.std() > 0.01
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    quick = model.for_inference("cpu")
    assert type(quick.roi_heads) is TrimmedCascade  # MMDetection's cascades, too, leave out padding
    (plain,), (fast,) = model.predict([image]), quick.predict([image])
    assert plain["masks"].shape[1:] == (1, 64, 64) and len(plain["masks"]) > 1
    torch.testing.assert_close(fast["masks"], plain["masks"], rtol=1e-4, atol=1e-5)
    small = model.run(model.transform([image], None, 4), False, True)[1][0]["masks"]
    exported = ExportableDetector(model)
    given = dict(zip(exported.outputs, exported(image[None]), strict=True))
    torch.testing.assert_close(given["masks"][0, : len(small)], small, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quick", [False, True])
def test_each_stages_mask_learns_on_its_own_sample_with_its_weight(quick: bool) -> None:
    """All logits 0, so the loss of a mask is log 2, whatever it should be; the third stage has no weight."""
    model = tiny_cascade_with_masks()
    if quick:
        accelerate(model, "cpu")
    model.roi_heads.training_rule = Resampling([1.0, 0.5, 0.0])
    for stage in model.roi_heads.stages:
        for parameter in stage.mask_predictor.mask_fcn_logits.parameters():
            nn.init.zeros_(parameter)
    batch = batch_of([[8.0, 8, 40, 50]])
    windows = torch.tensor([[[0.0, 0, 64, 64]]])
    masks, windows = pad_masks([torch.full((1, 64, 64), 255, dtype=torch.uint8)], list(windows), 1)
    batch = replace(batch, gt_masks=masks, gt_mask_windows=windows)
    regions = torch.tensor([[[8.0, 8, 40, 50], [0, 0, 20, 20]]])
    proposals = Proposals(regions, torch.ones((1, 2)), torch.ones((1, 2), dtype=torch.bool))
    losses = model.roi_heads.losses(model.extract(batch), proposals, batch)
    assert sorted(name for name in losses if "mask" in name) == [f"loss_mask_stage{i}" for i in range(3)]
    for i, weight in enumerate((1, 0.5, 0)):
        assert losses[f"loss_mask_stage{i}"].item() == pytest.approx(weight * math.log(2), rel=1e-5)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    moved = [float(s.mask_predictor.mask_fcn_logits.bias.grad.abs().max()) for s in model.roi_heads.stages]
    assert moved[0] > 0 and moved[1] == pytest.approx(moved[0] / 2, rel=1e-4) and moved[2] == 0


def test_masks_of_each_stage_need_mmdetections_rules() -> None:
    layout = Layout("resnet18", "fpn", 4, 3, True, stage_masks=True)
    with torch.device("meta"):
        with pytest.raises(CheckpointError, match="a mask branch, which only MMDetection's rules train, not torchvis"):
            build(layout, STYLES["pytorch"], Told().ask("torchvision"), semantics="mmdetection")
        with pytest.raises(ValueError, match="semantics 'torchvision' do not say how a mask branch in each stage"):
            aligned_cascade_rcnn(OneMap(), 4, stage_masks=True)  # type: ignore[arg-type]
        model = build(layout, STYLES["pytorch"], semantics="mmdetection")
        again = rebuild(model.recipe or {})
    assert list(again.state_dict()) == list(model.state_dict()) and again.has_masks
    assert "roi_heads.stages.2.mask_head.3.0.weight" in model.state_dict() and model.roi_heads.mask_head is None


@pytest.mark.parametrize(
    ("told", "rules", "in_1x1", "learns"),
    [
        (None, "mmdetection", False, True),  # as the zoo's
        (None, "mmdetection", True, False),  # as the zoo's for Caffe
        ("frozen", "mmdetection", False, False),
        ("affine", "mmdetection", True, True),
        ("affine", "torchvision", False, False),
    ],
)
def test_normalisation_learns_as_mmdetection_trains_it(
    told: Norm | None, rules: Library, in_1x1: bool, learns: bool
) -> None:
    with torch.device("meta"):
        model = build(Layout("resnet50", "fpn", 4, 1, False), STYLES["pytorch"])
        named = rename(rows.background_to_back(model.state_dict()), mmdetection.RULES)
        theirs = {named[k]: v for k, v in rows.background_to_back(model.state_dict()).items()}
        facts = Told(norm=told).ask(rules)
        ours = mmdetection.from_mmdetection(theirs, Style(in_1x1, False), facts)
        again = rebuild(ours.recipe or {})
    for one in (ours, again):
        learning = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
        assert ("backbone.body.layer3.0.bn1.weight" in learning) == learns
        assert "backbone.body.layer1.0.bn1.weight" not in learning
    assert list(ours.state_dict()) == list(model.state_dict())
    where = origins_of(ours.recipe or {}, facts, ASKED).get("norm")
    assert where == (CONFIG if told else DEFAULT if learns else None)


@pytest.mark.parametrize(
    ("given", "norm"),
    [
        ("norm_cfg=dict(type='BN')", "affine"),
        ("norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=True", "affine"),
        ("norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True", "frozen"),
        ("norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=False", "batch"),
        ("norm_cfg=dict(type='GN', num_groups=32)", "group"),
    ],
)
def test_a_config_says_how_normalisation_trains(given: str, norm: Norm) -> None:
    assert mmdetection_config.read_told(MM.replace("norm_cfg=dict(type='BN')", given)).norm == norm


def test_a_config_of_other_normalisation_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the config says group normalisation, but the tensors are of frozen"):
        build(Layout("resnet50", "fpn", 4, 1, False), STYLES["pytorch"], Told(norm="group"))
    given = "norm_cfg=dict(type='BN', requires_grad=False), norm_eval=False"
    with pytest.raises(CheckpointError, match=r"norm_cfg\.requires_grad False can't be built: True can"):
        mmdetection_config.read_told(MM.replace("norm_cfg=dict(type='BN')", given))


@pytest.mark.parametrize("stages", [1, 3])
def test_a_file_keeps_whose_rules_it_trains_by(stages: int) -> None:
    layout, style = Layout("resnet18", "fpn", 4, stages, False), STYLES["pytorch"]
    model = build(layout, style, Told(), semantics="mmdetection")
    recipe = present_recipe(model)  # which finds nothing changed since
    with torch.device("meta"):
        again = rebuild(recipe or {})
        asked = build(layout, style, Told().ask("torchvision"), semantics="mmdetection")
    for one in (model, again):
        assert isinstance(one.rpn, RegionProposalNetwork) and isinstance(one.rpn.matcher, MaxIoUMatcher)
        assert (one.rpn.candidates is None) == (stages == 1)  # the library samples outside of the image but in cascades
        assert one.rpn.box_coder.min_log_ratio == -math.log(1000 / 16)
        assert isinstance(getattr(one.roi_heads, "training_rule", None), Resampling) == (stages == 3)
    assert type(asked.rpn.matcher) is Matcher and asked.rpn.box_coder.min_log_ratio is None
    assert origins_of(asked.recipe or {}, Told().ask("torchvision"), ASKED)["semantics"] == ASKED
    with pytest.raises(
        ValueError, match="semantics of 'mmdet' are not known: torchvision, detectron2, mmdetection are"
    ):
        Semantics("mmdet")  # type: ignore[arg-type]


def test_a_config_says_how_its_detector_trains() -> None:
    told = mmdetection_config.read_told(CASCADE)
    rules = told.arguments["semantics"]
    assert (rules.min_pos_iou, rules.allowed_border, rules.stage_loss_weights) == (0.2, 8, [1, 0.6, 0.2])
    assert told.ask("mmdetection").asked == {} and told.ask("torchvision").asked == {"semantics": "torchvision"}
    plain = mmdetection_config.read_told(MM).arguments["semantics"]
    assert plain.min_pos_iou == 0 and plain.allowed_border is None  # the assigner's own default


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("0.6, 0.2]", "0.6]", r"stage_loss_weights \[1, 0\.6\] can't be built: one for each of 3 stages can"),
        ("agnostic=True", "agnostic=False", r"bbox_head\[0\]\.reg_class_agnostic False can't be built in a cascade"),
        ("=False))]", "=True))]", r"rcnn\[2\]\.assigner\.match_low_quality True can't be built here: False can"),
        (
            "neg_iou_thr=0.6",
            "neg_iou_thr=0.1",
            r"neg_iou_thr 0\.1 can't be built beside .*\[1\]\.assigner\.pos_iou_thr",
        ),
        ("=8)", "=8, pos_weight=2)", r"model\.train_cfg\.rpn\.pos_weight 2 can't be built: -1 can"),
        ("allowed_border=8", "allowed_border='8'", r"allowed_border is '8', where MMDetection has a value like -1"),
        ("min_pos_iou=0.2", "match_low_quality=False", r"rpn\.assigner\.match_low_quality False can't be built here"),
    ],
)
def test_rules_that_can_not_be_followed_are_refused(old: str, new: str, said: str) -> None:
    assert old in CASCADE
    with pytest.raises(CheckpointError, match=said):
        mmdetection_config.read_told(CASCADE.replace(old, new))


def test_weights_of_torchvision_have_no_other_rules(tmp_path: Path) -> None:
    torch.save({"backbone.body.conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "model.pth")
    said = "--semantics mmdetection: only checkpoints of Detectron2 and MMDetection have one"
    with pytest.raises(CheckpointError, match=said):
        import_detector(tmp_path / "model.pth", semantics="mmdetection")
