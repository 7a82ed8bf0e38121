"""Configurations of Detectron2 and MMDetection: what they say is followed or refused by name, and nothing is run."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from detection.cli.convert import bring
from detection.cli.convert import main as convert
from detection.interop import detectron2_config, load_detector, mmdetection_config
from detection.interop.builders import Layout, build
from detection.interop.detectron2 import from_detectron2
from detection.interop.detectron2_export import NEVER, spread_anchors
from detection.interop.foreign import read_foreign
from detection.interop.rows import STYLES, Style
from detection.interop.semantics import AskedRows
from detection.interop.told import CONFIG, DEFAULT, LVIS, TENSORS, Told, origins_of, report, usual
from detection.losses import SmoothL1Loss, sampled_rows
from detection.models.pooling import RoIPooler
from detection.weights import CheckpointError

BASE = """
MODEL:
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  RESNETS: {OUT_FEATURES: [res2, res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], PRE_NMS_TOPK_TEST: 1000}
  ROI_HEADS: {NAME: StandardROIHeads}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 2, POOLER_RESOLUTION: 7}
SOLVER: {BASE_LR: 0.02, STEPS: "(60000, 80000)"}
VERSION: 2
"""
OWN = """
_BASE_: ../base.yaml
MODEL:
  PIXEL_STD: [57.375, 57.12, 58.395]
  RESNETS: {STRIDE_IN_1X1: False, DEPTH: 101}
  ANCHOR_GENERATOR: {SIZES: [[16], [32], [64], [128], [256]]}
  ROI_HEADS: {NUM_CLASSES: 3, SCORE_THRESH_TEST: 0.01}
  ROI_BOX_HEAD: {POOLER_TYPE: ROIAlign, POOLER_SAMPLING_RATIO: 2, BBOX_REG_WEIGHTS: "(8.0, 8.0, 4.0, 4.0)",
                 SMOOTH_L1_BETA: 0.5}
INPUT: {MIN_SIZE_TEST: 640}
TEST: {DETECTIONS_PER_IMAGE: 50}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "model.yaml"
    path.write_text(OWN)
    return path


def test_detectron2s_config_is_read_with_its_base(own: Path) -> None:
    told = detectron2_config.read_told(own)
    assert told.arguments["rpn_anchor_generator"].sizes == ((16,), (32,), (64,), (128,), (256,))  # its own
    assert told.arguments["rpn_pre_nms_top_n_test"] == 1000  # the base's
    assert told.arguments["rpn_pre_nms_top_n_train"] == 12000  # Detectron2's default
    assert told.arguments["bbox_reg_weights"] == [8.0, 8.0, 4.0, 4.0]  # which YAML has as text
    assert told.arguments["box_score_thresh"] == 0.01 and told.arguments["box_detections_per_img"] == 50
    assert (told.arguments["min_size"], told.arguments["max_size"]) == (640, 1333)
    pool = told.arguments["box_roi_pool"]
    assert (pool.output_size, pool.sampling_ratio, pool.aligned) == (7, 2, False)
    assert told.arguments["box_loss"].beta == 0.5 and told.arguments["rpn_box_loss"].beta == 0
    assert told.style == Style(False, True, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert told.shape == {"num_classes": 4, "mask": False, "keypoints": 0, "stages": 1, "depth": 101}
    assert told.norm == "frozen"  # Detectron2's default
    for written, norm in {"GN": "group", "SyncBN": "batch", "BN": "batch"}.items():
        own.write_text(OWN.replace("DEPTH: 101", f"DEPTH: 101, NORM: {written}"))
        assert detectron2_config.read_told(own).norm == norm


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "MODEL: {RESNETS: {NORM: LN}}",
            r"MODEL\.RESNETS\.NORM LN can't be built: FrozenBN, BN, SyncBN, nnSyncBN, naiveSyncBN, GN can",
        ),
        (
            "MODEL: {META_ARCHITECTURE: RetinaNet}",
            r"MODEL\.META_ARCHITECTURE RetinaNet can't be built: GeneralizedRCNN",
        ),
        ("MODEL: {ROI_BOX_HEAD: {USE_SIGMOID_CE: true}}", r"ROI_BOX_HEAD\.USE_SIGMOID_CE True can't be built: False"),
        ("MODEL: {ROI_BOX_HEAD: {POOLER_TYPE: X}}", r"POOLER_TYPE X can't be built: ROIAlignV2, ROIAlign and ROIPool"),
        ("MODEL: {RPN: {BBOX_REG_LOSS_TYPE: diou}}", r"RPN\.BBOX_REG_LOSS_TYPE diou can't be built: smooth_l1"),
        (
            "MODEL: {RPN: {NMS_THRESH: high}}",
            r"MODEL\.RPN\.NMS_THRESH is 'high', where Detectron2 has a value like 0\.7",
        ),
        (
            "MODEL: {ROI_HEADS: {SHARPNESS: 3}}",
            r"MODEL\.ROI_HEADS\.SHARPNESS is no setting of Detectron2 that is known",
        ),
        ("MODEL: {ROI_HEADS: {NAME: StandardROIHeads}}", r"RES5_DILATION 1 can't be built without a pyramid"),
        ("_BASE_: /etc/base.yaml", r"_BASE_ /etc/base\.yaml is not read: name a file from this one's folder on"),
        ("_BASE_: https://host/base.yaml", r"_BASE_ https://host/base\.yaml is not read"),
        ("_BASE_: absent.yaml", r"no config at .*absent\.yaml"),
        ("_BASE_: model.yaml", r"more than 8 files name each other"),
        ("a: !!python/object/apply:os.system ['touch ran']", r"not a plain YAML file, and nothing in it is run"),
        ("[1, 2]", r"holds list, not the settings of Detectron2"),
    ],
)
def test_what_detectron2s_config_says_and_can_not_be_built_is_refused(
    change: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.yaml").write_text(change)
    with pytest.raises(CheckpointError, match=said):
        detectron2_config.read_told(tmp_path / "model.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_config_that_grows_without_end_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}" for i in range(1, 9)]
    (tmp_path / "model.yaml").write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match="too many keys for a configuration"):
        detectron2_config.read_told(tmp_path / "model.yaml")


MM = """
norm = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
stds = [0.1, 0.1, 0.2, 0.2]
model = dict(
    type='FasterRCNN', data_preprocessor=norm,
    backbone=dict(type='ResNet', depth=50, frozen_stages=1, style='pytorch', norm_cfg=dict(type='BN')),
    neck=dict(type='FPN', num_outs=5),
    rpn_head=dict(
        type='RPNHead', loss_bbox=dict(type='SmoothL1Loss', beta=1.0 / 9.0, loss_weight=1.0),
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 2.0], strides=[4, 8, 16, 32, 64])),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(type='SingleRoIExtractor',
                                roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=2)),
        bbox_head=dict(type='Shared2FCBBoxHead', num_classes=3,
                       bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=stds),
                       loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False), loss_bbox=dict(type='L1Loss'))),
    train_cfg=dict(rpn=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.6, neg_iou_thr=0.3)),
                   rpn_proposal=dict(nms_pre=3000, max_per_img=700)),
    test_cfg=dict(rpn=dict(nms_pre=500), rcnn=dict(score_thr=0.02, nms=dict(type='nms', iou_threshold=0.6))))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(1000, 600), keep_ratio=True)]
hook = make_hook('touch ran')
"""


def test_mmdetections_config_is_read_as_text() -> None:
    assert mmdetection_config.is_config(MM) and not mmdetection_config.is_config("style='caffe'")
    told = mmdetection_config.read_told(MM)
    assert told.arguments["rpn_anchor_generator"].sizes == ((16,), (32,), (64,), (128,), (256,))  # scale times stride
    assert told.arguments["rpn_anchor_generator"].num_anchors_per_location() == [2] * 5
    assert told.arguments["rpn_box_loss"].beta == 1 / 9 and told.arguments["box_loss"].beta == 0
    assert told.arguments["bbox_reg_weights"] == [10, 10, 5, 5]  # one over the standard deviations
    assert told.arguments["box_score_thresh"] == 0.02 and told.arguments["box_nms_thresh"] == 0.6
    assert told.arguments["rpn_fg_iou_thresh"] == 0.6 and told.arguments["rpn_pre_nms_top_n_train"] == 3000
    assert told.arguments["rpn_post_nms_top_n_train"] == 700 and told.arguments["rpn_pre_nms_top_n_test"] == 500
    assert (told.arguments["min_size"], told.arguments["max_size"]) == (600, 1000)
    assert told.arguments["box_roi_pool"].aligned and told.arguments["box_roi_pool"].sampling_ratio == 2
    assert told.style == Style(False, False, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert told.shape == {"depth": 50, "num_classes": 4, "mask": False, "stages": 1, "agnostic": False}
    assert told.trainable_layers == 3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("'FasterRCNN'", "'RetinaNet'", r"model\.type RetinaNet can't be built: FasterRCNN, MaskRCNN, CascadeRCNN can"),
        ("use_sigmoid=False", "use_sigmoid=True", r"bbox_head\.loss_cls\.use_sigmoid True can't be built: False can"),
        ("num_outs=5", "num_outs=6", r"model\.neck\.num_outs 6 can't be built: 5 can"),
        ("type='L1Loss'", "type='GIoULoss'", r"loss_bbox\.type GIoULoss can't be built: L1Loss, SmoothL1Loss can"),
        ("depth=50", "depth=50, dcn=dict(type='DCN')", r"model\.backbone\.dcn can't be built"),
        ("type='nms'", "type='soft_nms'", r"test_cfg\.rcnn\.nms\.type soft_nms can't be built: nms can"),
        ("scale=(1000, 600)", "scale=[(1000, 600), (9, 9)]", r"scale .* can't be built: one pair of sides can"),
        ("pos_iou_thr=0.6", "pos_iou_thr=make()", r"pos_iou_thr \(line \d+\) is not written as a plain value"),
        ("score_thr=0.02", "score_thr='low'", r"score_thr is 'low', where MMDetection has a value like 0\.05"),
        ("norm = ", "_base_ = 'a.py'\nnorm = ", r"_base_ names other files: give the config that MMDetection writes"),
        ("norm = ", "norm = = ", r"its config is no Python text"),
        ("model = ", "models = ", r"its config says nothing of a model"),
    ],
)
def test_what_mmdetections_config_says_and_can_not_be_built_is_refused(old: str, new: str, said: str) -> None:
    assert old in MM
    with pytest.raises(CheckpointError, match=said):
        mmdetection_config.read_told(MM.replace(old, new))


def test_tensors_and_config_must_agree() -> None:
    told = Told(shape={"num_classes": 81})
    with pytest.raises(
        CheckpointError, match="the config says num_classes 81, but the tensors are of 4: give the config"
    ):
        build(Layout("resnet50", "fpn", 4, 1, False), STYLES["caffe"], told)


def test_so_many_classes_as_lvis_has_get_its_settings() -> None:
    for classes in (1203, 1230):
        assert usual(classes + 1) == LVIS == {"box_score_thresh": 1e-4, "box_detections_per_img": 300}
    assert usual(81) == {}
    with torch.device("meta"):
        model = build(Layout("resnet50", "fpn", 1204, 1, False), STYLES["caffe"])
        told = Told({"box_detections_per_img": 7})
        other = build(Layout("resnet50", "fpn", 1204, 1, False), STYLES["caffe"], told)
    assert (model.roi_heads.score_thresh, model.roi_heads.detections_per_img) == (1e-4, 300)
    assert (other.roi_heads.score_thresh, other.roi_heads.detections_per_img) == (1e-4, 7)


def test_where_each_fact_is_from_is_said() -> None:
    recipe = {"init_args": {"rpn_anchor_generator": None, "box_nms_thresh": 0.5, "rpn_head": None}}
    origins = origins_of(recipe, Told({"box_nms_thresh": 0.6}), DEFAULT)
    assert origins["num_classes"] == TENSORS and origins["colours"] == DEFAULT
    assert origins["box_nms_thresh"] == CONFIG and origins["rpn_anchor_generator"] == DEFAULT
    assert "rpn_head" not in origins
    assert report(origins).splitlines() == [
        "from its tensors: backbone, masks, num_classes, stages",
        "from the config: box_nms_thresh",
        "the library's default, not in the file: colours, rpn_anchor_generator, stride",
    ]


@pytest.mark.slow
def test_a_converted_file_follows_the_config(
    theirs: Any, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = theirs.Kind(bgr=True, in_1x1=False)
    state = theirs.detectron2_names(theirs.draw(kind), kind)
    own.write_text(OWN.replace("DEPTH: 101", "DEPTH: 50").replace("NUM_CLASSES: 3", "NUM_CLASSES: 5"))
    torch.save({"model": state}, tmp_path / "model.pth")
    flags = ["--source", str(tmp_path / "model.pth"), "--output", str(tmp_path / "ours.safetensors")]
    assert not convert(["import", *flags, "--config", str(own), "--certificate", "false"])
    assert "from the config: bbox_reg_weights" in capsys.readouterr().out
    model = load_detector(tmp_path / "ours.safetensors")
    assert model.rpn.anchor_generator.sizes[0] == (16,) and model.transform.min_size == (640,)
    assert model.roi_heads.box_coder.weights == (8, 8, 4, 4)
    assert isinstance(model.roi_heads.box_roi_pool, RoIPooler) and not model.roi_heads.box_roi_pool.aligned
    assert isinstance(model.roi_heads.box_loss, SmoothL1Loss) and model.roi_heads.box_loss.beta == 0.5
    assert isinstance(model.rpn.counted_rows, AskedRows)  # it trains on as there
    asked = tmp_path / "asked.safetensors"
    bring(tmp_path / "model.pth", asked, config=own, semantics="torchvision", certificate=False)
    assert "as asked: semantics" in capsys.readouterr().out
    assert load_detector(asked).rpn.counted_rows is sampled_rows
    # Blue, green and red less the mean, divided by their deviations, is what the kernel saw.
    pixel = torch.tensor([10.0, 100.0, 250.0])  # red, green, blue
    kernel = state["backbone.bottom_up.stem.conv1.weight"][0, :, 3, 3]
    seen = (pixel.flip(0) - torch.tensor([103.53, 116.28, 123.675])) / torch.tensor([57.375, 57.12, 58.395])
    ours = (pixel / 255 - model.transform.mean.flatten()) / model.transform.std.flatten()
    weight = model.backbone.body["conv1"].weight[0, :, 3, 3].detach()
    assert (weight @ ours).item() == pytest.approx((kernel @ seen).item(), rel=1e-4)
    own.write_text(OWN.replace("DEPTH: 101", "DEPTH: 50"))
    with pytest.raises(CheckpointError, match="the config says num_classes 4, but the tensors are of 6"):
        bring(tmp_path / "model.pth", tmp_path / "again.safetensors", config=own)
    with pytest.raises(CheckpointError, match="the config says BGR True and stride in the 1x1 convolutions False"):
        bring(tmp_path / "model.pth", tmp_path / "again.safetensors", "caffe", config=own)


def test_anchors_off_the_diagonal_of_an_export_are_switched_off() -> None:
    state: dict[str, torch.Tensor] = {}
    for prefix, rows in (("objectness_logits", 1), ("anchor_deltas", 4)):
        name = f"proposal_generator.rpn_head.{prefix}."
        state |= {f"{name}weight": torch.rand(3 * rows, 8, 1, 1), f"{name}bias": torch.rand(3 * rows)}
    spread = spread_anchors(state, 3)
    logits = spread["proposal_generator.rpn_head.objectness_logits.bias"]
    assert torch.equal(logits[::4], state["proposal_generator.rpn_head.objectness_logits.bias"])
    assert (logits == NEVER).sum() == 6
    deltas = spread["proposal_generator.rpn_head.anchor_deltas.bias"].view(9, 4)
    assert torch.equal(deltas[::4].flatten(), state["proposal_generator.rpn_head.anchor_deltas.bias"])
    assert deltas[1].tolist() == [1e5, 0, 0, 0]  # moved out of every image, where Detectron2 drops it
    weight = spread["proposal_generator.rpn_head.anchor_deltas.weight"].view(9, 4, 8)
    assert torch.equal(weight[::4].flatten(), state["proposal_generator.rpn_head.anchor_deltas.weight"].flatten())
    assert not weight[1].any()


class _Buffer:
    """Stands for what MMEngine puts into its log: an object of a class that is not here."""

    def __reduce__(self) -> Any:
        return os.getenv, ("HOME",)


def test_what_mmengine_logs_is_read_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    module = ModuleType("mmengine")
    buffer = type("HistoryBuffer", (list,), {"__module__": "mmengine"})
    module.HistoryBuffer = buffer  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmengine", module)
        log = {"loss": buffer([0.5, 0.25]), "steps": yaml.safe_load("[1, 2]")}
        content = {"state_dict": {"w": torch.ones(3)}, "meta": {"CLASSES": ("car", "boat")}, "message_hub": log}
        torch.save(content, tmp_path / "epoch.pth")
    state, meta = read_foreign(tmp_path / "epoch.pth")
    assert torch.equal(state["w"], torch.ones(3)) and meta == {"CLASSES": ("car", "boat")}
    torch.save({"state_dict": {"w": torch.ones(3)}, "message_hub": _Buffer()}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"not opened, as it needs os\.getenv"):
        read_foreign(tmp_path / "other.pth")
    assert pickle.loads(pickle.dumps(_Buffer())) is not None


@pytest.mark.slow
@pytest.mark.parametrize("features", ["fpn", "c4"])
def test_an_exported_config_says_what_the_detector_is(features: str, theirs: Any, tmp_path: Path) -> None:
    """Read back by the reader of Detectron2's own files, it describes the same detector."""
    from detection.interop.detectron2 import settings_of, to_detectron2

    kind = theirs.Kind(features=features, mask=True)
    model = from_detectron2(theirs.detectron2_names(theirs.draw(kind), kind), STYLES["caffe"])
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(settings_of(model, tmp_path / "model.pth")))
    told = detectron2_config.read_told(path)
    assert told.style and (told.style.bgr, told.style.stride_in_1x1) == (True, True)
    again = from_detectron2(to_detectron2(model), told.style, told)
    for name, value in model.recipe["init_args"].items():  # type: ignore[index]
        if name in told.arguments and value is not None and name != "rpn_anchor_generator":
            assert again.recipe["init_args"][name] == value, name  # type: ignore[index]
    for ours, read in zip(model.rpn.anchor_generator._cells, again.rpn.anchor_generator._cells, strict=True):
        torch.testing.assert_close(read, ours)


def test_a_config_of_key_points_is_followed_and_held_against_the_tensors(tmp_path: Path) -> None:
    head: dict[str, Any] = {"NUM_KEYPOINTS": 5, "POOLER_TYPE": "ROIAlign", "POOLER_SAMPLING_RATIO": 2}
    model = {"KEYPOINT_ON": True, "ROI_HEADS": {"NAME": "StandardROIHeads", "NUM_CLASSES": 1}}
    model |= {"BACKBONE": {"NAME": "build_resnet_fpn_backbone"}, "ROI_KEYPOINT_HEAD": head}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"MODEL": model}))
    told = detectron2_config.read_told(path)
    pool = told.arguments["keypoint_roi_pool"]
    assert (pool.output_size, pool.sampling_ratio, pool.aligned) == (14, 2, False)
    layout = Layout("resnet50", "fpn", 2, 1, False, keypoints=5)
    with torch.device("meta"):
        built = build(layout, STYLES["caffe"], told)
        assert built.num_keypoints == 5 and not built.roi_heads.keypoint_roi_pool.aligned
        with pytest.raises(CheckpointError, match="the config says keypoints 5, but the tensors are of 17"):
            build(replace(layout, keypoints=17), STYLES["caffe"], told)
        with pytest.raises(CheckpointError, match="Keypoint R-CNN can be converted with one stage and a pyramid only"):
            build(replace(layout, features="c4"), STYLES["caffe"])
    head["NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS"] = False
    path.write_text(yaml.safe_dump({"MODEL": model}))
    with pytest.raises(CheckpointError, match="NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS False can't be built: True can"):
        detectron2_config.read_told(path)
