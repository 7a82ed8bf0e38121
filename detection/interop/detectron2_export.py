"""The configuration that Detectron2 needs beside exported weights to compute what the detector computes.

Anchors there are every size with every ratio of a level, and none is rounded. Anchors in whole pixels are no such grid.
So they are exported as the diagonal of a larger one, and the anchors off the diagonal are switched off: their
objectness is next to 0, and their boxes lie outside of any image, where Detectron2 drops them.

Shape shorthand:
    k: anchors a cell of the detector, k * k of the exported one
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detection.boxes import BoxCoder
from detection.interop.builders import Layout, box_pool_of, style_of
from detection.losses import SmoothL1Loss
from detection.models.cascade import CascadeRoIHeads
from detection.models.pooling import RoIPool, RoIPooler
from detection.models.two_stage import FasterRCNN
from detection.weights import CheckpointError

NORMS: dict[str, str] = {"frozen": "FrozenBN", "batch": "BN", "group": "GN"}
NEVER, OUTSIDE = -1e4, 1e5  # objectness of an anchor that is switched off; how far it moves, in widths
OBJECTNESS, DELTAS = (f"proposal_generator.rpn_head.{name}." for name in ("objectness_logits", "anchor_deltas"))


def is_rounded(model: FasterRCNN) -> bool:
    """Whether the anchors are in whole pixels, and so no grid of sizes and ratios."""
    return bool(model.rpn.anchor_generator.recipe["init_args"]["round_anchors"])


def spread_anchors(state: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Outputs of the RPN for k anchors -> for k * k, those of the diagonal, see above; names are Detectron2's."""
    places = torch.arange(k) * (k + 1)
    spread = dict(state)
    for prefix, rows in ((OBJECTNESS, 1), (DELTAS, 4)):
        for part in ("weight", "bias"):
            value = state[prefix + part].unflatten(0, (k, rows))
            wide = value.new_zeros((k * k, *value.shape[1:]))
            if part == "bias":
                wide[:, 0] = NEVER if rows == 1 else OUTSIDE
            wide[places] = value
            spread[prefix + part] = wide.flatten(0, 1)
    return spread


def config_of(model: FasterRCNN, pixels: Mapping[str, Tensor], layout: Layout, weights: str) -> Any:
    """The configuration, as nested plain values.

    Args:
        model: what is exported.
        pixels: see `detectron2.pixel_statistics`.
        layout: of the exported tensors.
        weights: path of the exported weights.

    Raises:
        CheckpointError: Detectron2 can't compute this; it names what.
    """
    style, heads = style_of(model), model.roi_heads
    cascade = isinstance(heads, CascadeRoIHeads)
    first: Any = heads.stages[0] if isinstance(heads, CascadeRoIHeads) else heads
    if first.soft_nms_sigma is not None:
        raise CheckpointError("Detectron2 has no Soft-NMS: set soft_nms_sigma to None")
    features, grouped = layout.features, re.findall(r"\d+", layout.resnet)
    pyramid, names = features == "fpn", ["res2", "res3", "res4", "res5"]
    single = "res4" if features == "c4" else "res5"
    config: dict[str, Any] = {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "WEIGHTS": weights,
        "MASK_ON": model.has_masks,
        "PIXEL_MEAN": pixels["pixel_mean"].flatten().tolist(),
        "PIXEL_STD": pixels["pixel_std"].flatten().tolist(),
        "BACKBONE": {"NAME": f"build_resnet_{'fpn_' if pyramid else ''}backbone"},
        "RESNETS": {
            "DEPTH": int(grouped[0]),
            "NUM_GROUPS": int(grouped[1]) if len(grouped) > 1 else 1,
            "WIDTH_PER_GROUP": int(grouped[2]) if len(grouped) > 2 else 64,
            "NORM": NORMS[layout.norm],
            "OUT_FEATURES": names if pyramid else [single],
            "STRIDE_IN_1X1": style.stride_in_1x1,
            "RES5_DILATION": 2 if features == "dc5" else 1,
        },
        "FPN": {"IN_FEATURES": names if pyramid else [], "NORM": NORMS.get(layout.fpn_norm or "", "")},
        "ROI_HEADS": {
            "NAME": "CascadeROIHeads" if cascade else "Res5ROIHeads" if features == "c4" else "StandardROIHeads",
            "IN_FEATURES": ["p2", "p3", "p4", "p5"] if pyramid else [single],
            "NUM_CLASSES": model.num_classes - 1,
            "SCORE_THRESH_TEST": first.score_thresh,
            "NMS_THRESH_TEST": first.nms_thresh,
        },
        "ROI_BOX_HEAD": _pooler(box_pool_of(model)) | _beta(first.box_loss),
    } | _proposals(model, ["p2", "p3", "p4", "p5", "p6"] if pyramid else [single], layout.precomputed)
    if features != "c4":
        shape = {"NUM_CONV": layout.convs, "NUM_FC": layout.linears, "NORM": NORMS.get(layout.box_norm or "", "")}
        width = {"FC_DIM": first.box_head.out_channels} if layout.linears else {}
        config["ROI_BOX_HEAD"] |= {"NAME": "FastRCNNConvFCHead"} | shape | width
    if cascade:
        weights_of = [_weights(stage.box_coder) for stage in heads.stages]
        ious = [stage.matcher.fg_iou_thresh for stage in heads.stages]
        config["ROI_BOX_CASCADE_HEAD"] = {"BBOX_REG_WEIGHTS": weights_of, "IOUS": ious}
        config["ROI_BOX_HEAD"]["CLS_AGNOSTIC_BBOX_REG"] = True
    else:
        config["ROI_BOX_HEAD"]["CLS_AGNOSTIC_BBOX_REG"] = layout.agnostic
        config["ROI_BOX_HEAD"]["BBOX_REG_WEIGHTS"] = _weights(first.box_coder)
    if model.has_masks:
        layers = 0 if features == "c4" else len(heads.mask_head)
        config["ROI_MASK_HEAD"] = _pooler(heads.mask_roi_pool) | {
            "NUM_CONV": layers,
            "NORM": NORMS.get(layout.mask_norm or "", ""),
        }
    if model.has_keypoints:
        channels = [layer.out_channels for layer in heads.keypoint_head if hasattr(layer, "out_channels")]
        shape = {"NUM_KEYPOINTS": model.num_keypoints, "CONV_DIMS": channels}
        config |= {"KEYPOINT_ON": True, "ROI_KEYPOINT_HEAD": _pooler(heads.keypoint_roi_pool) | shape}
    size = model.transform
    return {
        "MODEL": config,
        "INPUT": {
            "FORMAT": "BGR" if style.bgr else "RGB",
            "MIN_SIZE_TEST": size.min_size[-1],
            "MAX_SIZE_TEST": size.max_size,
        },
        "TEST": {"DETECTIONS_PER_IMAGE": first.detections_per_img},
        "VERSION": 2,
    }


def _proposals(model: FasterRCNN, maps: list[str], precomputed: bool) -> dict[str, Any]:
    if precomputed:
        return {"LOAD_PROPOSALS": True, "PROPOSAL_GENERATOR": {"NAME": "PrecomputedProposals"}}
    rpn, (sizes, ratios) = model.rpn, _anchors(model)
    settings = {
        "IN_FEATURES": maps,
        "PRE_NMS_TOPK_TRAIN": rpn.pre_nms_top_n["training"],
        "PRE_NMS_TOPK_TEST": rpn.pre_nms_top_n["testing"],
        "POST_NMS_TOPK_TRAIN": rpn.post_nms_top_n["training"],
        "POST_NMS_TOPK_TEST": rpn.post_nms_top_n["testing"],
        "NMS_THRESH": rpn.nms_thresh,
        "BBOX_REG_WEIGHTS": _weights(rpn.box_coder),
    }
    anchors = {"SIZES": sizes, "ASPECT_RATIOS": ratios, "OFFSET": rpn.anchor_generator.offset}
    return {"ANCHOR_GENERATOR": anchors, "RPN": settings | _beta(rpn.box_loss)}


def _anchors(model: FasterRCNN) -> tuple[list[list[float]], list[list[float]]]:
    """Sizes and ratios (height/width) of each level; of whole-pixel anchors those of the diagonal."""
    generator = model.rpn.anchor_generator
    if generator.infer_strides:
        raise CheckpointError("anchors with infer_strides depend on the size of the batch, which Detectron2's do not")
    levels = []
    for cell in generator._cells:
        wide, high = (cell[:, 2:] - cell[:, :2]).double().unbind(1)
        levels.append(((wide * high).sqrt().tolist(), (high / wide).tolist()))
    if not is_rounded(model):
        ratios = [ratio[:: len(size)] for (_, ratio), size in zip(levels, generator.sizes, strict=True)]
        return [list(size) for size in generator.sizes], ratios
    return [size for size, _ in levels], [ratio for _, ratio in levels]


def _pooler(pool: Any) -> dict[str, Any]:
    if isinstance(pool, RoIPool):
        return {"POOLER_TYPE": "ROIPool", "POOLER_RESOLUTION": pool.output_size}
    if not isinstance(pool, RoIPooler):
        raise CheckpointError(f"Detectron2 has nothing that pools as {type(pool).__name__}")
    return {
        "POOLER_TYPE": "ROIAlignV2" if pool.aligned else "ROIAlign",
        "POOLER_RESOLUTION": pool.output_size,
        "POOLER_SAMPLING_RATIO": pool.sampling_ratio,
    }


def _weights(coder: Any) -> list[float]:
    if not isinstance(coder, BoxCoder):
        raise CheckpointError(f"Detectron2 has no box coder like {type(coder).__name__}")
    return [float(weight) for weight in coder.weights]


def _beta(loss: Any) -> dict[str, Any]:
    """The loss of boxes, where Detectron2 has it; it changes no detection."""
    return {"SMOOTH_L1_BETA": float(loss.beta)} if isinstance(loss, SmoothL1Loss) else {}
