"""Detectron2's checkpoints: Faster, Mask, Keypoint and Cascade R-CNN on ResNets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.interop import rows
from detection.interop.builders import Layout, build, norm_of, resnet_of, style_of
from detection.interop.detectron2_export import config_of, is_rounded, spread_anchors
from detection.interop.kinds import DETECTRON2, refuse
from detection.interop.names import Rules, check_scores, collect, count_blocks, drop, load, rename, state_of
from detection.interop.rows import Style
from detection.interop.told import Told
from detection.models.precomputed import PrecomputedProposals
from detection.models.transform import IMAGENET_STD
from detection.models.two_stage import FasterRCNN
from detection.weights import CheckpointError

PREFIXES = ("proposal_generator.", "backbone.bottom_up.", "backbone.stem.conv", "backbone.net.")  # of its files alone
RULES: Rules = (
    # Backbone: the stages are called after their figure in the paper, and a convolution owns its normalisation.
    (r"^backbone\.body\.", "backbone.bottom_up."),
    (r"^backbone\.bottom_up\.(?=conv1|bn1)", "backbone.bottom_up.stem."),
    *((rf"\.layer{k}\.", f".res{k + 1}.") for k in range(1, 5)),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"^(backbone\.fpn\.\w+\.\d|roi_heads\.(?:.*\.)?(?:mask_head|convs)\.\d)\.1\.", r"\1.0.norm."),
    *((rf"^backbone\.fpn\.inner_blocks\.{i}\.0\.", f"backbone.fpn_lateral{i + 2}.") for i in range(4)),
    *((rf"^backbone\.fpn\.layer_blocks\.{i}\.0\.", f"backbone.fpn_output{i + 2}.") for i in range(4)),
    (r"^rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
    # Heads: those of a cascade are numbered behind their own name.
    (r"^roi_heads\.stages\.(\d)\.(box_head|box_predictor)\.", r"roi_heads.\2.\1."),
    (r"^(roi_heads\.box_head\.(?:\d\.)?)fc6\.", r"\1fc1."),
    (r"^(roi_heads\.box_head\.(?:\d\.)?)fc7\.", r"\1fc2."),
    *((rf"^(roi_heads\.box_head\.(?:\d\.)?)convs\.{i}\.0\.", rf"\g<1>conv{i + 1}.") for i in range(8)),
    *((rf"^(roi_heads\.box_head\.(?:\d\.)?)linears\.{i}\.", rf"\g<1>fc{i + 1}.") for i in range(4)),
    (r"^roi_heads\.box_head\.res5\.", "roi_heads.res5."),
    *((rf"^roi_heads\.mask_head\.{i}\.0\.", f"roi_heads.mask_head.mask_fcn{i + 1}.") for i in range(4)),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_heads.mask_head.deconv."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_heads.mask_head.predictor."),
    *((rf"^roi_heads\.keypoint_head\.{2 * i}\.", f"roi_heads.keypoint_head.conv_fcn{i + 1}.") for i in range(8)),
    (r"^roi_heads\.keypoint_predictor\.kps_score_lowres\.", "roi_heads.keypoint_head.score_lowres."),
)
WITHOUT_FPN: Rules = (*RULES, (r"^backbone\.bottom_up\.", "backbone."))
DROPPED = (r"^pixel_(mean|std)$", r"anchor_generator\.cell_anchors", r"num_batches_tracked$")


def read_layout(state: Mapping[str, Tensor]) -> Layout:
    """What detector these tensors belong to.

    Raises:
        CheckpointError: none that can be converted; it names the kind.
    """
    refuse(state, "Detectron2", DETECTRON2)
    stages = count_blocks(state, "roi_heads.box_predictor.")
    first = "0." if stages else ""
    classifier = f"roi_heads.box_predictor.{first}cls_score.weight"
    if classifier not in state:
        alone = any(name.startswith("proposal_generator.") for name in state)
        kind = (
            "an RPN alone, which finds no classes"
            if alone
            else f"no Fast, Faster, Mask or Cascade R-CNN: there is no {classifier}"
        )
        raise CheckpointError(f"this is {kind} (a file of Detectron2)")
    objectness, deltas = (
        state.get(f"proposal_generator.rpn_head.{name}.weight") for name in ("objectness_logits", "anchor_deltas")
    )
    if objectness is not None and deltas is not None and len(deltas) == 5 * len(objectness):
        raise CheckpointError(
            "this is a detector of rotated boxes, which have no counterpart here (a file of Detectron2)"
        )
    pyramid = "backbone.fpn_lateral2.weight" in state
    c4 = any(name.startswith("roi_heads.res5.") for name in state)
    body, box = "backbone.bottom_up." if pyramid else "backbone.", f"roi_heads.box_head.{first}"
    fpn_norm = norm_of(state, "backbone.fpn_lateral2.norm.")
    live = fpn_norm == "batch" or any(name.startswith(body) and name.endswith("num_batches_tracked") for name in state)
    norm = norm_of(state, f"{body}stem.conv1.norm.")
    if norm is None:
        raise CheckpointError(
            "this is a detector whose backbone is no ResNet with normalisation: there is no "
            f"{body}stem.conv1.norm.weight (a file of Detectron2)"
        )
    convs, linears = count_layers(state, f"{box}conv"), count_layers(state, f"{box}fc")
    count, boxes = len(state[classifier]), len(state[f"roi_heads.box_predictor.{first}bbox_pred.weight"])
    return Layout(
        resnet_of(
            count_blocks(state, f"{body}res4."),
            state.get(f"{body}res2.0.conv2.weight"),
            f"{body}res2.0.conv3.weight" in state,
        ),
        "fpn" if pyramid else "c4" if c4 else "dc5",
        count,
        stages or 1,
        any(name.startswith("roi_heads.mask_head.") for name in state),
        "group" if norm == "group" else "batch" if live else "frozen",
        fpn_norm,
        norm_of(state, "roi_heads.mask_head.mask_fcn1.norm."),
        convs,
        2 if c4 else linears,
        norm_of(state, f"{box}conv1.norm."),
        not stages and boxes == 4 and count > 2,
        not any(name.startswith("proposal_generator.") for name in state),
        keypoints=len(state.get("roi_heads.keypoint_head.score_lowres.bias", ())),
    )


def from_detectron2(state: Mapping[str, Tensor], style: Style, told: Told = Told()) -> FasterRCNN:  # noqa: B008
    """The detector that these tensors make.

    Args:
        state: under Detectron2's names.
        style: of the backbone, see `choose_style`.
        told: by a configuration, or nothing.

    Raises:
        CheckpointError: tensors that are missing, left over or of the wrong shape.
    """
    layout = read_layout(state)
    state = drop(state, DROPPED)
    if layout.norm == "group" and told.norm != "group":
        layout, state = _with_statistics(layout, state, told)
    model = build(layout, style, told, resizing="detectron2", semantics="detectron2")
    table = names_of(model, layout)
    state = {name: value.float() for name, value in state.items()}
    state = collect(state, table)
    state = rows.background_to_front(rows.masks_of_each_class(state, layout.num_classes - 1))
    if not layout.precomputed:
        state = rows.anchors_to_ratio_major(state, *anchor_grid(model))
    load(model, rows.counters_of(model) | rows.fold_pixels(state, style.bgr, style.scale))
    return model


def _with_statistics(layout: Layout, state: dict[str, Tensor], told: Told) -> tuple[Layout, dict[str, Tensor]]:
    """What normalisation without statistics is: of groups, or frozen with statistics of 0 and 1, as in old files.

    Raises:
        CheckpointError: neither a configuration nor normalisation elsewhere in the detector says which.
    """
    if told.norm is None and any((layout.fpn_norm, layout.mask_norm, layout.box_norm)):
        return layout, state
    if told.norm is None:
        raise CheckpointError(
            "the backbone's normalisation has no statistics, so it is group normalisation, or frozen with its "
            "statistics folded in, as in old files: give --config with MODEL.RESNETS.NORM, GN or FrozenBN"
        )
    if told.norm != "frozen":
        raise CheckpointError(f"the config says {told.norm} normalisation, but the tensors have no statistics")
    scales = [name for name in state if name.startswith(("backbone.", "roi_heads.res5.")) and ".norm.weight" in name]
    for name in scales:
        state[name.replace("weight", "running_mean")] = torch.zeros_like(state[name])
        state[name.replace("weight", "running_var")] = torch.ones_like(state[name])
    return replace(layout, norm="frozen"), state


def choose_style(
    state: Mapping[str, Tensor],
    name: str | None = None,
    bgr: bool | None = None,
    stride_in_1x1: bool | None = None,
) -> Style:
    """The style of a file: what is told, what its `pixel_mean` and `pixel_std` say, or that of such models in the zoo.

    In the zoo all are BGR. MSRA's weights have the stride in the 1x1 convolutions and see 0 to 255; ResNeXt and models
    with group normalisation have it in the 3x3 ones, and ResNeXt's pixels are divided by their standard deviation.

    Args:
        state: under Detectron2's names.
        name: `caffe` or `pytorch`, None where nothing is told.
        bgr, stride_in_1x1: see `Style`; they count before `name`.

    Raises:
        CheckpointError: the file's pixels are others than is told.
    """
    pixels, told = read_style(state), rows.STYLES[name] if name else None
    wanted = told.bgr if bgr is None and told else bgr
    if wanted is not None and pixels and wanted != pixels.bgr:
        orders = {True: "BGR", False: "RGB"}
        raise CheckpointError(f"its pixel_mean is that of {orders[pixels.bgr]}, not {orders[wanted]}")
    layout = read_layout(state)
    grouped = layout.resnet.startswith("resnext")
    std = tuple(255 * value for value in IMAGENET_STD)
    style = told or pixels or Style(not grouped and layout.norm != "group", True, None, std if grouped else None)
    if pixels:
        plain = pixels.bgr and all(value == 1 for value in pixels.std or ())
        stride = told.stride_in_1x1 if told else plain and not grouped and layout.norm != "group"
        style = replace(pixels, stride_in_1x1=stride)
    return replace(
        style,
        bgr=style.bgr if wanted is None else wanted,
        stride_in_1x1=style.stride_in_1x1 if stride_in_1x1 is None else stride_in_1x1,
    )


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers `prefix1`, `prefix2` and so on there are."""
    return sum(f"{prefix}{i}.weight" in state for i in range(1, 10))


def to_detectron2(model: FasterRCNN) -> dict[str, Tensor]:
    """A detector's weights under Detectron2's names, in the style that `style_of` says.

    Raises:
        CheckpointError: Detectron2 has no such detector.
    """
    if model.transform.channels != 3:
        raise CheckpointError(f"the detector takes {model.transform.channels} channels, but Detectron2 reads RGB")
    check_scores(model, "Detectron2")
    if any(".mask_predictor." in name and ".stages." in name for name in model.state_dict()):
        raise CheckpointError("each stage has a mask branch, but Detectron2's cascades have one for all stages")
    state = rows.without_counters(state_of(model))
    names = list(state)
    pyramid = any(name.startswith("backbone.fpn.") for name in names)
    if style_of(model).bgr:
        state = rows.unfold_bytes(state, model.transform.std.flatten().tolist())
    state = rows.background_to_back(state)
    learned = not isinstance(model.rpn, PrecomputedProposals)
    rounded = learned and is_rounded(model)
    if learned and not rounded:
        state = rows.anchors_to_size_major(state, *anchor_grid(model))
    table = rename(names, RULES if pyramid else WITHOUT_FPN)
    theirs = {table[name]: value for name, value in state.items()}
    layout = read_layout(theirs)
    with torch.device("meta"):
        expected = names_of(build(layout, style_of(model)), layout)
    collect(theirs, {name: name for name in expected.values()})
    return spread_anchors(theirs, model.rpn.anchor_generator.num_anchors_per_location()[0]) if rounded else theirs


def read_style(state: Mapping[str, Tensor]) -> Style | None:
    """The pixels that a file with `pixel_mean` in it tells; blue, first in BGR, has the smallest mean."""
    mean, std = (state.get(name) for name in ("pixel_mean", "pixel_std"))
    if mean is None or mean.numel() != 3 or mean.flatten()[0] == mean.flatten()[2]:
        return None
    means, stds = mean.flatten().tolist(), [1.0] * 3 if std is None else std.flatten().tolist()
    bgr = means[0] < means[2]
    step = -1 if bgr else 1
    return Style(bgr, bgr, tuple(means[::step]), tuple(stds[::step]))


def pixel_statistics(model: FasterRCNN) -> dict[str, Tensor]:
    """What the pixels are, and so the style: `pixel_mean` and `pixel_std`, `(3, 1, 1)`.

    Files of older versions of Detectron2 have them among their tensors. Today's refuse them there.
    """
    mean, std = 255 * model.transform.mean.flatten(), 255 * model.transform.std.flatten()
    if style_of(model).bgr:
        mean, std = mean.flip(0), torch.ones(3)
    return {"pixel_mean": mean.view(3, 1, 1), "pixel_std": std.view(3, 1, 1)}


def settings_of(model: FasterRCNN, weights: Path) -> dict[str, Any]:
    """Detectron2's configuration with which `to_detectron2`'s weights at this path give the same detections."""
    return config_of(model, pixel_statistics(model), read_layout(to_detectron2(model)), str(weights))


def names_of(model: FasterRCNN, layout: Layout) -> dict[str, str]:
    """Detectron2's name of each of a detector's tensors."""
    return rename(rows.without_counters(model.state_dict()), RULES if layout.features == "fpn" else WITHOUT_FPN)


def anchor_grid(model: FasterRCNN) -> tuple[int, int]:
    """Sizes and ratios of the anchors of a cell."""
    generator = model.rpn.anchor_generator
    sizes = len(generator.sizes[0])
    return sizes, generator.num_anchors_per_location()[0] // sizes
