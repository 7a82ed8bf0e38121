"""Detectron2's checkpoints: Faster, Mask and Cascade R-CNN on ResNets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.interop import rows
from detection.interop.builders import Layout, build, resnet_of, style_of
from detection.interop.detectron2_export import config_of, is_rounded, spread_anchors
from detection.interop.names import Rules, collect, count_blocks, drop, load, rename, state_of
from detection.interop.rows import Style
from detection.interop.told import Told, scale_of
from detection.models.two_stage import FasterRCNN
from detection.weights import CheckpointError

RULES: Rules = (
    # Backbone: the stages are called after their figure in the paper, and a convolution owns its normalisation.
    (r"^backbone\.body\.", "backbone.bottom_up."),
    (r"^backbone\.bottom_up\.(?=conv1|bn1)", "backbone.bottom_up.stem."),
    *((rf"\.layer{k}\.", f".res{k + 1}.") for k in range(1, 5)),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    *((rf"^backbone\.fpn\.inner_blocks\.{i}\.0\.", f"backbone.fpn_lateral{i + 2}.") for i in range(4)),
    *((rf"^backbone\.fpn\.layer_blocks\.{i}\.0\.", f"backbone.fpn_output{i + 2}.") for i in range(4)),
    (r"^rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
    # Heads: those of a cascade are numbered behind their own name.
    (r"^roi_heads\.stages\.(\d)\.(box_head|box_predictor)\.", r"roi_heads.\2.\1."),
    (r"^(roi_heads\.box_head\.(?:\d\.)?)fc6\.", r"\1fc1."),
    (r"^(roi_heads\.box_head\.(?:\d\.)?)fc7\.", r"\1fc2."),
    (r"^roi_heads\.box_head\.res5\.", "roi_heads.res5."),
    *((rf"^roi_heads\.mask_head\.{i}\.0\.", f"roi_heads.mask_head.mask_fcn{i + 1}.") for i in range(4)),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_heads.mask_head.deconv."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_heads.mask_head.predictor."),
)
WITHOUT_FPN: Rules = (*RULES, (r"^backbone\.bottom_up\.", "backbone."))
DROPPED = (r"^pixel_(mean|std)$", r"anchor_generator\.cell_anchors", r"num_batches_tracked$")


def read_layout(state: Mapping[str, Tensor]) -> Layout:
    """What detector these tensors belong to.

    Raises:
        CheckpointError: none that can be converted.
    """
    stages = count_blocks(state, "roi_heads.box_predictor.")
    classifier = f"roi_heads.box_predictor.{'0.' if stages else ''}cls_score.weight"
    if classifier not in state:
        raise CheckpointError(f"not a Faster, Mask or Cascade R-CNN of Detectron2: there is no {classifier}")
    pyramid = "backbone.fpn_lateral2.weight" in state
    c4 = any(name.startswith("roi_heads.res5.") for name in state)
    return Layout(
        resnet_of(count_blocks(state, "backbone.bottom_up.res4." if pyramid else "backbone.res4.")),
        "fpn" if pyramid else "c4" if c4 else "dc5",
        len(state[classifier]),
        stages or 1,
        any(name.startswith("roi_heads.mask_head.") for name in state),
    )


def from_detectron2(state: Mapping[str, Tensor], style: Style, told: Told = Told()) -> FasterRCNN:  # noqa: B008
    """The detector that these tensors make.

    Args:
        state: under Detectron2's names.
        style: of the backbone; `caffe` for all R-50 and R-101 of its model zoo, which start from MSRA's weights.
        told: by a configuration, or nothing.

    Raises:
        CheckpointError: tensors that are missing, left over or of the wrong shape.
    """
    state = drop(state, DROPPED)
    layout = read_layout(state)
    model = build(layout, style, told)
    table = names_of(model, layout)
    state = rows.frozen_statistics({name: value.float() for name, value in state.items()}, list(table.values()))
    state = collect(state, table)
    state = rows.background_to_front(state)
    state = rows.anchors_to_ratio_major(state, *anchor_grid(model))
    load(model, fold(state, style, told))
    return model


def fold(state: Mapping[str, Tensor], style: Style, told: Told) -> dict[str, Tensor]:
    """Weights for the pixels of a configuration, or else of a style -> for normalised RGB."""
    if told.std is not None:
        return rows.fold_pixels(state, bool(told.bgr), scale_of(told.std))
    return rows.fold_bytes(state) if style.bgr_bytes else dict(state)


def to_detectron2(model: FasterRCNN) -> dict[str, Tensor]:
    """A detector's weights under Detectron2's names, in the style that `style_of` says.

    Raises:
        CheckpointError: Detectron2 has no such detector.
    """
    if model.transform.channels != 3:
        raise CheckpointError(f"the detector takes {model.transform.channels} channels, but Detectron2 reads RGB")
    state = rows.without_counters(state_of(model))
    names = list(state)
    pyramid = any(name.startswith("backbone.fpn.") for name in names)
    if style_of(model).bgr_bytes:
        state = rows.unfold_bytes(state, model.transform.std.flatten().tolist())
    state = rows.background_to_back(state)
    rounded = is_rounded(model)
    if not rounded:
        state = rows.anchors_to_size_major(state, *anchor_grid(model))
    table = rename(names, RULES if pyramid else WITHOUT_FPN)
    theirs = {table[name]: value for name, value in state.items()}
    layout = read_layout(theirs)
    with torch.device("meta"):
        expected = names_of(build(layout, style_of(model)), layout)
    collect(theirs, {name: name for name in expected.values()})
    return spread_anchors(theirs, model.rpn.anchor_generator.num_anchors_per_location()[0]) if rounded else theirs


def read_style(state: Mapping[str, Tensor]) -> str | None:
    """Name of the style that a file with its pixels' mean in it tells; blue, first in BGR, has the smallest mean."""
    mean = state.get("pixel_mean")
    return None if mean is None else "caffe" if mean.flatten()[0] < mean.flatten()[2] else "pytorch"


def pixel_statistics(model: FasterRCNN) -> dict[str, Tensor]:
    """What the pixels are, and so the style: `pixel_mean` and `pixel_std`, `(3, 1, 1)`.

    Files of older versions of Detectron2 have them among their tensors. Today's refuse them there.
    """
    mean, std = 255 * model.transform.mean.flatten(), 255 * model.transform.std.flatten()
    if style_of(model).bgr_bytes:
        mean, std = mean.flip(0), torch.ones(3)
    return {"pixel_mean": mean.view(3, 1, 1), "pixel_std": std.view(3, 1, 1)}


def settings_of(model: FasterRCNN, weights: Path) -> dict[str, Any]:
    """Detectron2's configuration with which `to_detectron2`'s weights at this path give the same detections."""
    layout = read_layout(to_detectron2(model))
    depth = int(layout.resnet.removeprefix("resnet"))
    return config_of(model, pixel_statistics(model), layout.features, depth, str(weights))


def names_of(model: FasterRCNN, layout: Layout) -> dict[str, str]:
    """Detectron2's name of each of a detector's tensors."""
    return rename(rows.without_counters(model.state_dict()), RULES if layout.features == "fpn" else WITHOUT_FPN)


def anchor_grid(model: FasterRCNN) -> tuple[int, int]:
    """Sizes and ratios of the anchors of a cell."""
    generator = model.rpn.anchor_generator
    sizes = len(generator.sizes[0])
    return sizes, generator.num_anchors_per_location()[0] // sizes
