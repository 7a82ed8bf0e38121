"""torchvision's checkpoints, whose names and shapes are this project's own: finding the builder, and the epsilon."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torchvision.models import detection as reference

from detection import pretrained
from detection.interop import rows
from detection.interop.builders import box_pool_of, resnet_of, style_of
from detection.interop.kinds import TORCHVISION, refuse
from detection.interop.names import check_scores, count_blocks, load, state_of
from detection.models import zoo
from detection.models.family import keypoint_builders
from detection.models.pooling import RoIPooler
from detection.models.two_stage import FasterRCNN
from detection.weights import CheckpointError, fold_epsilon, unfold_epsilon, upgrade_names

log = logging.getLogger(__name__)

# The published files whose frozen normalisation goes without epsilon, by the names that torch.hub gives them.
WITHOUT_EPSILON = tuple(getattr(reference, name).COCO_V1.url.rpartition("/")[2] for name in pretrained.WITHOUT_EPSILON)
HEATMAPS = "roi_heads.keypoint_predictor.kps_score_lowres.bias"  # has a number for each key point
MOBILE = "fasterrcnn_mobilenet_v3_large_fpn"
MOBILE_320 = "fasterrcnn_mobilenet_v3_large_320_fpn"


def find_builder(state: Mapping[str, Tensor], file_name: str = "") -> str:
    """The builder, in `zoo` or `keypoint_builders`, of the detector that these tensors belong to.

    Args:
        state: under torchvision's names.
        file_name: tells the two MobileNet detectors apart, which have the same tensors.

    Raises:
        CheckpointError: there is none.
    """
    refuse(state, "torchvision", TORCHVISION)
    branches = {name: any(key.startswith(f"roi_heads.{name}_head.") for key in state) for name in ("keypoint", "mask")}
    kind = next((f"{name}rcnn" for name, there in branches.items() if there), "fasterrcnn")
    if "roi_heads.box_predictor.cls_score.weight" not in state or "backbone.fpn.inner_blocks.0.0.weight" not in state:
        raise CheckpointError("not a Faster, Mask or Keypoint R-CNN of torchvision with a pyramid")
    if all(branches.values()):
        raise CheckpointError("masks and key points in one detector: torchvision has no builder of it")
    if "backbone.body.0.0.weight" in state:
        return MOBILE_320 if file_name.startswith(MOBILE_320) else MOBILE
    first = "backbone.body.layer1.0."
    kernel, bottleneck = state.get(f"{first}conv2.weight"), f"{first}conv3.weight" in state
    resnet = resnet_of(count_blocks(state, "backbone.body.layer3."), kernel, bottleneck)
    version = "_v2" if "backbone.fpn.inner_blocks.0.1.weight" in state else ""
    name = f"{kind}_{resnet}_fpn{version}"
    _build(name)
    return name


def _build(name: str) -> Callable[..., FasterRCNN]:
    builder: Callable[..., FasterRCNN] | None = getattr(zoo, name, getattr(keypoint_builders, name, None))
    if builder is None:
        raise CheckpointError(f"there is no builder {name} for these tensors")
    return builder


def from_torchvision(
    state: Mapping[str, Tensor],
    file_name: str = "",
    builder: str | None = None,
    without_epsilon: bool | None = None,
    contiguous: bool = False,
) -> FasterRCNN:
    """The detector that these tensors make.

    Args:
        state: under torchvision's names, of any version.
        file_name: as published, which tells what the tensors don't.
        builder: name as of `find_builder`; found by default.
        without_epsilon: whether the frozen normalisation was trained with epsilon 0; by default only for those
            published files that were.
        contiguous: give COCO's 91 classes the labels 1 to 80.

    Raises:
        CheckpointError: tensors that are missing, left over or of the wrong shape.
    """
    state = upgrade_names(state)
    name = builder or find_builder(state, file_name)
    if builder is None and name == MOBILE and file_name and not file_name.startswith(MOBILE):
        log.warning(
            "%s: the two MobileNet detectors have the same tensors, and this is built as that of 800 pixels; let its "
            "name begin with %s where it is that of 320, or train on with --data.min_size 320 --data.max_size 640",
            *(file_name, MOBILE_320),
        )
    build = _build(name)
    live = any(name.startswith("backbone.body.") and name.endswith("num_batches_tracked") for name in state)
    if contiguous:
        state = rows.to_contiguous(state)
    classes = len(state["roi_heads.box_predictor.cls_score.weight"])
    options: dict[str, Any] = {"num_keypoints": len(state[HEATMAPS])} if HEATMAPS in state else {}
    model = build(num_classes=classes, norm="batch" if live else "frozen", trainable_backbone_layers=3, **options)
    if file_name in WITHOUT_EPSILON if without_epsilon is None else without_epsilon:
        state = fold_epsilon(state)
    load(model, state)
    return model


def to_torchvision(model: FasterRCNN, without_epsilon: bool = False, category_ids: bool = False) -> dict[str, Tensor]:
    """A detector's weights for torchvision's builder of the same name.

    Args:
        model: a detector that torchvision has, too.
        without_epsilon: write them for frozen normalisation with epsilon 0, as in its COCO_V1 detectors.
        category_ids: give COCO's 80 classes torchvision's 91 labels, which are category ids.

    Raises:
        CheckpointError: torchvision can't have such a detector.
    """
    check_scores(model, "torchvision")
    state = state_of(model)
    find_builder(state)
    if style_of(model).stride_in_1x1:
        raise CheckpointError(
            "the backbone has its stride in the 1x1 convolutions, where torchvision's can't: the weights would load "
            "and detect nothing"
        )
    if category_ids:
        state = rows.to_category_ids(state)
    return unfold_epsilon(state) if without_epsilon else state


def advice(model: FasterRCNN, state: Mapping[str, Tensor]) -> str:
    """How to load weights of `to_torchvision`, and what torchvision will compute otherwise."""
    builder = find_builder(state, MOBILE_320 if max(model.transform.min_size) <= 320 else "")
    classes = len(state["roi_heads.box_predictor.cls_score.weight"])
    counts = f"num_classes={classes}" + (f", num_keypoints={model.num_keypoints}" if model.has_keypoints else "")
    text = f"Load it into torchvision.models.detection.{builder}(weights=None, {counts})"
    if not hasattr(reference, builder):
        text = f"Load it into a detector of torchvision's on such a backbone, {counts}"
    pool = box_pool_of(model)
    if not isinstance(pool, RoIPooler):
        text += (
            f"; it pools by RoI Align where this detector has {type(pool).__name__}: expect other boxes, or train on"
        )
    elif pool.aligned:
        text += "; its RoI Align is not aligned as this detector's is, so expect boxes off by half a cell, or train on"
    return text
