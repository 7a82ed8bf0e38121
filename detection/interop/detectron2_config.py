"""Detectron2's configuration files: YAML that names its base, on top of the library's defaults.

Nothing in a file is run: tags that make objects are refused, and a value such as `(10, 10, 5, 5)`, which YAML has as
text, is read as a literal. Every key below `MODEL`, and those of `INPUT` and `TEST` that detections depend on, is known
here: it is followed, or has to have the only value that can be built, or is refused by name.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from detection.anchors import AnchorGenerator
from detection.boxes import BoxCoder
from detection.interop.rows import Style
from detection.interop.told import Told
from detection.losses import CIoULoss, GIoULoss, SmoothL1Loss
from detection.models.norms import Norm
from detection.models.pooling import RoIPool, RoIPooler
from detection.weights import CheckpointError

LARGEST = 1 << 20  # bytes of a file
MOST_KEYS, DEEPEST = 2000, 12  # aliases of YAML can make a tree of any size from a few lines
CHAIN = 8  # files that name each other as base
BASE = "_BASE_"

# Detectron2's defaults of what detections and losses depend on.
DEFAULTS: dict[str, Any] = {
    "INPUT.FORMAT": "BGR",
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "MODEL.PIXEL_MEAN": [103.530, 116.280, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.MASK_ON": False,
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64, 128, 256, 512]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256,
    "MODEL.RPN.POSITIVE_FRACTION": 0.5,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.RPN.BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0],
    "MODEL.RPN.SMOOTH_L1_BETA": 0.0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 12000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.NMS_THRESH": 0.7,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.0,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [[10, 10, 5, 5], [20, 20, 10, 10], [30, 30, 15, 15]],
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": [0.5, 0.6, 0.7],
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 0,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.KEYPOINT_ON": False,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 17,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": 0,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": "ROIAlignV2",
    "TEST.DETECTIONS_PER_IMAGE": 100,
}
# Keys with the values that can be built; another one is refused.
BUILT: dict[str, tuple[Any, ...]] = {
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.BACKBONE.NAME": ("build_resnet_backbone", "build_resnet_fpn_backbone"),
    "MODEL.LOAD_PROPOSALS": (False, True),
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN", "PrecomputedProposals"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": (0,),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.BOUNDARY_THRESH": (-1,),
    "MODEL.RPN.IOU_LABELS": ([0, -1, 1],),
    "MODEL.RPN.LOSS_WEIGHT": (1,),
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": (1,),
    "MODEL.RPN.CONV_DIMS": ([-1],),
    "MODEL.ROI_HEADS.NAME": ("Res5ROIHeads", "StandardROIHeads", "CascadeROIHeads"),
    "MODEL.ROI_HEADS.IOU_LABELS": ([0, 1],),
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": (True,),
    "MODEL.ROI_BOX_HEAD.NAME": ("", "FastRCNNConvFCHead"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": (1,),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ("KRCNNConvDeconvUpsampleHead",),
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": (1,),
    "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": (True,),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False, False, False, False],),
    "MODEL.RESNETS.NORM": ("FrozenBN", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "GN"),
    "INPUT.FORMAT": ("BGR", "RGB"),
}
NORMS: dict[str, Norm] = {"FrozenBN": "frozen", "GN": "group"}  # the others are live
# What the tensors show, or what is of no consequence without something that is refused.
SHOWN = (
    *(
        "MODEL.DEVICE",
        "MODEL.WEIGHTS",
        "MODEL.FPN",
        "MODEL.RESNETS",
        "MODEL.ANCHOR_GENERATOR.ANGLES",
        "MODEL.RETINANET",
    ),
    *("MODEL.SEM_SEG_HEAD", "MODEL.PANOPTIC_FPN", "MODEL.ROI_HEADS.IN_FEATURES"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE"),
    *("MODEL.ROI_BOX_HEAD.NUM_FC", "MODEL.ROI_BOX_HEAD.FC_DIM", "MODEL.ROI_BOX_HEAD.NUM_CONV"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"),
    *("MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER", "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "MODEL.ROI_MASK_HEAD.CONV_DIM", "MODEL.ROI_MASK_HEAD.NORM"),
    *("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK",),
)
# How a run was made, which changes no detector.
OF_A_RUN = ("SOLVER", "DATASETS", "DATALOADER", "OUTPUT_DIR", "SEED", "CUDNN_BENCHMARK", "FLOAT32_PRECISION", "GLOBAL",
            "VERSION", "VIS_PERIOD", "INPUT", "TEST")  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """The values of a file and of its bases, by dotted key.

    Args:
        path: of the YAML file. `_BASE_` names another one from the file's own folder on.

    Raises:
        CheckpointError: a file that is missing, too large, no YAML, or asks for anything to be run.
    """
    values: dict[str, Any] = {}
    for file in _chain(path):
        for key, value in file.items():
            values.setdefault(key, value)
    return values


def read_told(path: Path) -> Told:
    """What a file says of its detector.

    Raises:
        CheckpointError: see `read_config`; or something that can't be built, by name.
    """
    given = read_config(path)
    for key, value in given.items():
        _check(key, value)
    get = (DEFAULTS | given).__getitem__
    kind = get("MODEL.ROI_HEADS.NAME")
    pyramid = given.get("MODEL.BACKBONE.NAME") == "build_resnet_fpn_backbone"
    if kind != "Res5ROIHeads" and not pyramid and get("MODEL.RESNETS.RES5_DILATION") != 2:
        raise CheckpointError("MODEL.RESNETS.RES5_DILATION 1 can't be built without a pyramid: 2 can, which is DC5")
    sizes, ratios = get("MODEL.ANCHOR_GENERATOR.SIZES"), get("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS")
    levels = len(get("MODEL.RPN.IN_FEATURES"))
    rpn_iou, box_iou = get("MODEL.RPN.IOU_THRESHOLDS"), get("MODEL.ROI_HEADS.IOU_THRESHOLDS")
    arguments: dict[str, Any] = {
        "min_size": get("INPUT.MIN_SIZE_TEST"),
        "max_size": get("INPUT.MAX_SIZE_TEST"),
        "rpn_anchor_generator": AnchorGenerator(
            sizes * levels if len(sizes) == 1 else sizes,
            ratios * levels if len(ratios) == 1 else ratios,
            offset=get("MODEL.ANCHOR_GENERATOR.OFFSET"),
            round_anchors=False,
        ),
        "rpn_bg_iou_thresh": rpn_iou[0],
        "rpn_fg_iou_thresh": rpn_iou[1],
        "rpn_batch_size_per_image": get("MODEL.RPN.BATCH_SIZE_PER_IMAGE"),
        "rpn_positive_fraction": get("MODEL.RPN.POSITIVE_FRACTION"),
        "rpn_pre_nms_top_n_train": get("MODEL.RPN.PRE_NMS_TOPK_TRAIN"),
        "rpn_pre_nms_top_n_test": get("MODEL.RPN.PRE_NMS_TOPK_TEST"),
        "rpn_post_nms_top_n_train": get("MODEL.RPN.POST_NMS_TOPK_TRAIN"),
        "rpn_post_nms_top_n_test": get("MODEL.RPN.POST_NMS_TOPK_TEST"),
        "rpn_nms_thresh": get("MODEL.RPN.NMS_THRESH"),
        "rpn_box_coder": BoxCoder(get("MODEL.RPN.BBOX_REG_WEIGHTS")),
        "rpn_box_loss": _box_loss("MODEL.RPN", get),
        "box_roi_pool": _pooler("MODEL.ROI_BOX_HEAD", get),
        "box_batch_size_per_image": get("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"),
        "box_positive_fraction": get("MODEL.ROI_HEADS.POSITIVE_FRACTION"),
        "box_score_thresh": get("MODEL.ROI_HEADS.SCORE_THRESH_TEST"),
        "box_nms_thresh": get("MODEL.ROI_HEADS.NMS_THRESH_TEST"),
        "box_detections_per_img": get("TEST.DETECTIONS_PER_IMAGE"),
        "box_loss": _box_loss("MODEL.ROI_BOX_HEAD", get),
    }
    if kind == "CascadeROIHeads":
        arguments["cascade_iou_thresh"] = get("MODEL.ROI_BOX_CASCADE_HEAD.IOUS")
        arguments["cascade_bbox_reg_weights"] = get("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS")
    else:
        arguments["box_fg_iou_thresh"], arguments["box_bg_iou_thresh"] = box_iou[0], box_iou[0]
        arguments["bbox_reg_weights"] = get("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS")
    if get("MODEL.MASK_ON") and kind != "Res5ROIHeads":  # which has its masks of what is pooled for the boxes
        arguments["mask_roi_pool"] = _pooler("MODEL.ROI_MASK_HEAD", get)
    elif get("MODEL.MASK_ON"):
        arguments["mask_roi_pool"] = _pooler("MODEL.ROI_BOX_HEAD", get)
    if get("MODEL.KEYPOINT_ON"):
        arguments["keypoint_roi_pool"] = _pooler("MODEL.ROI_KEYPOINT_HEAD", get)
    bgr = get("INPUT.FORMAT") == "BGR"
    mean, std = (list(get(f"MODEL.PIXEL_{part}"))[:: -1 if bgr else 1] for part in ("MEAN", "STD"))
    return Told(
        arguments,
        {
            "num_classes": get("MODEL.ROI_HEADS.NUM_CLASSES") + 1,
            "mask": bool(get("MODEL.MASK_ON")),
            "keypoints": get("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS") if get("MODEL.KEYPOINT_ON") else 0,
            "stages": len(get("MODEL.ROI_BOX_CASCADE_HEAD.IOUS")) if kind == "CascadeROIHeads" else 1,
            "depth": get("MODEL.RESNETS.DEPTH"),
        },
        Style(get("MODEL.RESNETS.STRIDE_IN_1X1"), bgr, tuple(mean), tuple(std)),
        min(5, max(0, 5 - get("MODEL.BACKBONE.FREEZE_AT"))),
        norm=NORMS.get(get("MODEL.RESNETS.NORM"), "batch"),
    )


def _box_loss(where: str, get: Callable[[str], Any]) -> Any:
    kind = get(f"{where}.BBOX_REG_LOSS_TYPE")
    if kind == "smooth_l1":
        return SmoothL1Loss(get(f"{where}.SMOOTH_L1_BETA"))
    if kind not in ("giou", "ciou"):
        raise CheckpointError(f"{where}.BBOX_REG_LOSS_TYPE {kind} can't be built: smooth_l1, giou and ciou can")
    return GIoULoss() if kind == "giou" else CIoULoss()


def _pooler(where: str, get: Callable[[str], Any]) -> Any:
    kind, side = get(f"{where}.POOLER_TYPE"), get(f"{where}.POOLER_RESOLUTION")
    if kind == "ROIPool":
        return RoIPool(side)
    if kind not in ("ROIAlign", "ROIAlignV2"):
        raise CheckpointError(f"{where}.POOLER_TYPE {kind} can't be built: ROIAlignV2, ROIAlign and ROIPool can")
    return RoIPooler(side, get(f"{where}.POOLER_SAMPLING_RATIO"), aligned=kind == "ROIAlignV2")


def _check(key: str, value: Any) -> None:
    if key in BUILT:
        if value not in BUILT[key]:
            raise CheckpointError(f"{key} {value} can't be built: {_named(BUILT[key])} can")
    elif key in DEFAULTS:
        _check_form(key, value)
    elif not key.startswith(tuple(f"{name}." for name in (*SHOWN, *OF_A_RUN))) and key not in (*SHOWN, *OF_A_RUN):
        raise CheckpointError(f"{key} is no setting of Detectron2 that is known here, so the detector may not be what "
                              "it says: take it out if it changes nothing")  # fmt: skip


def _check_form(key: str, value: Any) -> None:
    """A value of the kind that the default has."""
    default = DEFAULTS[key]
    if isinstance(default, list):
        nested = isinstance(default[0], list)
        right = isinstance(value, list) and value and all(isinstance(item, list) == nested for item in value)
    elif isinstance(default, bool | str):
        right = isinstance(value, type(default))
    else:
        right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right:
        raise CheckpointError(f"{key} is {value!r}, where Detectron2 has a value like {default!r}")


def _named(values: tuple[Any, ...]) -> str:
    return ", ".join(repr(value) if value == "" else str(value) for value in values)


def _chain(path: Path) -> Iterator[dict[str, Any]]:
    """The keys of a file, of its base, of that one's base, and so on."""
    for _ in range(CHAIN):
        content = _read(path)
        base = content.pop(BASE, None)
        yield dict(_flat(content, path))
        if base is None:
            return
        if not isinstance(base, str) or "://" in base or base.startswith(("/", "~")):
            raise CheckpointError(f"{path}: {BASE} {base} is not read: name a file from this one's folder on")
        path = path.parent / base
    raise CheckpointError(f"{path}: more than {CHAIN} files name each other as {BASE}")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.suffix not in (".yaml", ".yml"):
        raise CheckpointError(f"no config at {path}: give a .yaml file of Detectron2 with its bases, or the "
                              "config.yaml that a run writes, which has all in it")  # fmt: skip
    if path.stat().st_size > LARGEST:
        raise CheckpointError(f"{path}: too large for a configuration")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not a plain YAML file, and nothing in it is run ({said})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not the settings of Detectron2")
    return content


def _flat(content: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    todo: list[tuple[str, Any, int]] = [(str(name), value, 1) for name, value in content.items()]
    seen = 0
    while todo:
        key, value, depth = todo.pop()
        seen += 1
        if seen > MOST_KEYS or depth > DEEPEST:
            raise CheckpointError(f"{path}: too many keys for a configuration")
        if isinstance(value, Mapping):
            todo.extend((f"{key}.{name}", inner, depth + 1) for name, inner in value.items())
        elif key.startswith(("MODEL", "INPUT", "TEST")):
            yield key, _literal(value)
        else:
            yield key, None


def _literal(value: Any) -> Any:
    """Texts such as `(1, 2)` are tuples to Detectron2; tuples are lists here."""
    if isinstance(value, str) and len(value) < 1000:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    if isinstance(value, list | tuple) and len(value) <= MOST_KEYS:
        return [list(item) if isinstance(item, tuple) else item for item in value]
    return value
