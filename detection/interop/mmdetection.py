"""MMDetection's checkpoints (2 and 3): Faster, Mask and Cascade R-CNN on ResNets with a pyramid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from detection.interop import rows
from detection.interop.builders import Layout, build, norm_of, resnet_of
from detection.interop.kinds import MMDETECTION, refuse
from detection.interop.names import Rules, collect, count_blocks, drop, load, rename
from detection.interop.rows import Style
from detection.interop.told import Told
from detection.losses import SmoothL1Loss
from detection.models.two_stage import FasterRCNN
from detection.weights import CheckpointError

PREFIXES = ("rpn_head.", "ema_rpn_head.", "bbox_head.", "roi_head.", "neck.")  # of its files alone
_BOX = (
    (r"box_head\.convs\.(\d)\.0\.", r"shared_convs.{n}.conv."),
    (r"box_head\.convs\.(\d)\.1\.", r"shared_convs.{n}.bn."),
    (r"box_head\.linears\.(\d)\.", r"shared_fcs.{n}."),
    (r"box_head\.fc6\.", "shared_fcs.0."),
    (r"box_head\.fc7\.", "shared_fcs.1."),
    (r"box_predictor\.cls_score\.", "fc_cls."),
    (r"box_predictor\.bbox_pred\.", "fc_reg."),
)
RULES: Rules = (
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.1\.", r"neck.lateral_convs.\1.bn."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.1\.", r"neck.fpn_convs.\1.bn."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    *(
        (rf"^roi_heads\.stages\.(\d)\.{ours}", "roi_head.bbox_head.\\1." + theirs.format(n="\\2"))
        for ours, theirs in _BOX
    ),
    *((rf"^roi_heads\.{ours}", "roi_head.bbox_head." + theirs.format(n="\\1")) for ours, theirs in _BOX),
    (r"^roi_heads\.stages\.(\d\.)mask_(head\.|predictor\.)", r"roi_heads.mask_\2\1"),
    (r"^roi_heads\.mask_head\.(\d\.)?(\d)\.0\.(?=[a-z])", r"roi_head.mask_head.\1convs.\2.conv."),
    (r"^roi_heads\.mask_head\.(\d\.)?(\d)\.1\.(?=[a-z])", r"roi_head.mask_head.\1convs.\2.bn."),
    (r"^roi_heads\.mask_predictor\.(\d\.)?conv5_mask\.", r"roi_head.mask_head.\1upsample."),
    (r"^roi_heads\.mask_predictor\.(\d\.)?mask_fcn_logits\.", r"roi_head.mask_head.\1conv_logits."),
)
# Its cascade's deltas have standard deviations that aren't quite 1/30 and 1/15, and its losses are smoothed.
CASCADE = {
    "cascade_bbox_reg_weights": [(10, 10, 5, 5), (20, 20, 10, 10), (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067)],
    "mean_of_logits": True,
    "rpn_box_loss": SmoothL1Loss(1 / 9),
    "box_loss": SmoothL1Loss(1.0),
}
# A run with a moving average has that under the plain names and the raw weights under `ema_`.
DROPPED = (r"num_batches_tracked$", r"^data_preprocessor\.", r"^ema_")


def read_layout(state: Mapping[str, Tensor]) -> Layout:
    """What detector these tensors belong to, with `bn` for the name of all normalisation.

    Raises:
        CheckpointError: none that can be converted.
    """
    refuse(state, "MMDetection", MMDETECTION)
    if any(name.startswith("bbox_head.") for name in state):
        raise CheckpointError("written by MMDetection 1: run its tools/model_converters/upgrade_model_version.py first")
    stages = count_blocks(state, "roi_head.bbox_head.")
    classifier = f"roi_head.bbox_head.{'0.' if stages else ''}fc_cls.weight"
    if classifier not in state or "neck.lateral_convs.0.conv.weight" not in state:
        raise CheckpointError(
            f"not a Faster, Mask or Cascade R-CNN of MMDetection with a pyramid: there is no {classifier} beside a neck"
        )
    branches = count_blocks(state, "roi_head.mask_head.")
    head = classifier.removesuffix("fc_cls.weight")
    count = len(state[classifier])
    return Layout(
        resnet_of(
            count_blocks(state, "backbone.layer3."),
            state.get("backbone.layer1.0.conv2.weight"),
            "backbone.layer1.0.conv3.weight" in state,
        ),
        "fpn",
        count,
        stages or 1,
        any(name.startswith("roi_head.mask_head.") for name in state),
        "group" if norm_of(state, "backbone.bn1.") == "group" else "frozen",  # MMDetection holds live statistics, too
        norm_of(state, "neck.lateral_convs.0.bn."),
        norm_of(state, f"roi_head.mask_head.{'0.' if branches else ''}convs.0.bn."),
        count_blocks(state, f"{head}shared_convs."),
        count_blocks(state, f"{head}shared_fcs."),
        norm_of(state, f"{head}shared_convs.0.bn."),
        not stages and count > 2 and len(state[f"{head}fc_reg.weight"]) == 4,
        stage_masks=branches > 0,
    )


def from_mmdetection(state: Mapping[str, Tensor], style: Style, told: Told = Told()) -> FasterRCNN:  # noqa: B008
    """The detector that these tensors make.

    Args:
        state: under MMDetection's names.
        style: of the backbone, as in the detector's configuration.
        told: by a configuration, or nothing.

    Raises:
        CheckpointError: tensors that are missing, left over or of the wrong shape.
    """
    if all(name.startswith("ema_") for name in state):
        state = {name.removeprefix("ema_"): value for name, value in state.items()}
    state = {re.sub(r"\.gn(\d?)\.", r".bn\1.", name): value for name, value in drop(state, DROPPED).items()}
    layout = read_layout(state)
    if layout.norm == "frozen" and not style.stride_in_1x1:  # Caffe's alone are not trained in the library's zoo
        layout = replace(layout, norm="affine")
    cascade = CASCADE if layout.stages > 1 else {}
    model = build(layout, style, told, resizing="mmdetection", semantics="mmdetection", **cascade)
    table = rename(rows.without_counters(model.state_dict()), RULES)
    state = collect({name: value.float() for name, value in state.items()}, table)
    state = rows.background_to_front(rows.masks_of_each_class(state, layout.num_classes - 1))
    load(model, rows.counters_of(model) | rows.fold_pixels(state, style.bgr, style.scale))
    return model


def config_of(meta: Mapping[str, Any]) -> str:
    """The text of the configuration in what a file tells of itself; empty where there is none."""
    return str(meta.get("config", meta.get("cfg", "")))


def read_meta(meta: Mapping[str, Any]) -> tuple[str | None, list[str] | None]:
    """Name of the style and the classes that a file tells of itself, where it does.

    Args:
        meta: what stands under this name in the file: the configuration as text, and classes.
    """
    text = config_of(meta)
    styles = re.findall(r"style\s*=\s*['\"](pytorch|caffe)['\"]", text)
    described = meta.get("dataset_meta")
    classes = (described.get("classes") if isinstance(described, Mapping) else None) or meta.get("CLASSES")
    names = [str(name) for name in classes] if isinstance(classes, (list, tuple)) else None
    return (styles[-1] if styles else None), names
