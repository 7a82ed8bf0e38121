"""Builders of Keypoint R-CNN, with torchvision's names, arguments and `state_dict` keys; see `detection.models.zoo`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from detection.models.backbones import Norm, efficientnet_lite0_fpn, resnet_fpn
from detection.models.compose import channels_last, faster_rcnn
from detection.models.family.keypoints import KeypointHead, KeypointRoIHeads
from detection.models.roi_heads import RoIHeads
from detection.models.trunks import AnyPyramid
from detection.models.two_stage import TwoStageDetector, layout_of
from detection.models.zoo import HALF
from detection.parts import Factory, Factory2
from detection.pretrained import load_weights
from detection.recipes import recorded
from detection.weights import Weights, is_given

MIN_SIZES = (640, 672, 704, 736, 768, 800)  # of which training draws one for each image, as torchvision's
KEPT = (  # what the heads of `faster_rcnn` have, and those with a key point branch take over
    *("box_roi_pool", "box_head", "box_predictor", "matcher", "sampler", "box_coder", "class_loss", "box_loss"),
    *("score_thresh", "nms_thresh", "detections_per_img", "soft_nms_sigma"),
    *("mask_roi_pool", "mask_head", "mask_predictor", "mask_loss", "mask_grid"),
)


@recorded
def keypoint_rcnn(
    backbone: nn.Module,
    num_classes: int = 2,
    num_keypoints: int = 17,
    min_size: int | Sequence[int] = MIN_SIZES,
    keypoint_roi_pool: nn.Module | None = None,
    keypoint_head: nn.Module | Factory | None = None,
    keypoint_predictor: nn.Module | Factory2 | None = None,
    keypoint_loss: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> TwoStageDetector:
    """Keypoint R-CNN (He et al. 2017, section 5): Faster R-CNN with a heatmap for each key point of an object.

    Names and defaults are those of torchvision's `KeypointRCNN`. With `mask_roi_pool`, `mask_head` and
    `mask_predictor` it finds masks, too.

    Args:
        backbone: images -> feature maps.
        num_classes: classes with background; as a rule, background and person.
        num_keypoints: of each object; 17 are COCO's of a person.
        min_size: see `ImageTransform`.
        keypoint_roi_pool, keypoint_head, keypoint_predictor, keypoint_loss: see `KeypointRoIHeads`.
        **kwargs: see `faster_rcnn`.
    """
    model = faster_rcnn(backbone, num_classes, min_size=min_size, **kwargs)
    first: RoIHeads = model.roi_heads
    branch = num_keypoints, keypoint_roi_pool, keypoint_head, keypoint_predictor, keypoint_loss
    kept: dict[str, Any] = {name: getattr(first, name) for name in KEPT}
    model.roi_heads = KeypointRoIHeads(layout_of(backbone)[1], num_classes, *branch, **kept)
    model.check()
    return channels_last(model)


@recorded
def keypointrcnn_resnet50_fpn(
    *,
    weights: Weights = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    num_keypoints: int | None = None,
    weights_backbone: Weights = None,
    trainable_backbone_layers: int | None = None,
    norm: Norm | None = None,
    pyramid: AnyPyramid | None = None,
    min_size: int | Sequence[int] = MIN_SIZES,
    **kwargs: Any,
) -> TwoStageDetector:
    """Keypoint R-CNN with ResNet-50-FPN: torchvision's, COCO person box AP 54.6, key point AP 65.0.

    Args:
        weights: of the whole detector: a file, `"COCO_V1"` or `"COCO_LEGACY"`, whose file lies in torchvision's cache.
            Of another number of key points, the last layer of the branch starts afresh.
        class_names: see `fasterrcnn_resnet_fpn`.
        num_classes: classes with background; default 2, background and person.
        num_keypoints: of each object; default 17.
        weights_backbone, trainable_backbone_layers, norm, pyramid: see `fasterrcnn_resnet_fpn`.
        min_size: see `keypoint_rcnn`.
        **kwargs: see `keypoint_rcnn` and `faster_rcnn`.
    """
    norm = "frozen" if norm is None and is_given(weights) else norm
    backbone = resnet_fpn("resnet50", weights_backbone, trainable_backbone_layers, norm, pyramid=pyramid)
    classes, points = _counts(num_classes, class_names, num_keypoints)
    model = keypoint_rcnn(backbone, classes, points, min_size, **kwargs)
    return load_weights(model, weights_backbone, weights, "KeypointRCNN_ResNet50_FPN_Weights", class_names)


@recorded
def keypointrcnn_efficientnet_lite0_fpn(
    *,
    num_classes: int | None = None,
    num_keypoints: int | None = None,
    weights_backbone: Weights = "IMAGENET1K",
    norm: Norm | None = None,
    fpn_norm: Norm | None = "batch",
    fpn_channels: int = 128,
    trainable_backbone_layers: int | None = None,
    pyramid: AnyPyramid | None = None,
    keypoint_head: nn.Module | Factory | None = None,
    min_size: int | Sequence[int] = MIN_SIZES,
    image_mean: Sequence[float] = HALF,
    image_std: Sequence[float] = HALF,
    **kwargs: Any,
) -> TwoStageDetector:
    """Keypoint R-CNN on EfficientNet-Lite0, its branch half as deep and as narrow as its pyramid.

    Args:
        num_classes: classes with background; default 2, background and person.
        num_keypoints: of each object; default 17.
        weights_backbone, norm, fpn_norm, fpn_channels, trainable_backbone_layers, pyramid, image_mean, image_std: see
            `fasterrcnn_efficientnet_lite0_fpn`.
        keypoint_head: default: four convolutions of `fpn_channels`.
        min_size: see `keypoint_rcnn`.
        **kwargs: see `keypoint_rcnn` and `faster_rcnn`.
    """
    layers = trainable_backbone_layers, pyramid
    backbone = efficientnet_lite0_fpn(weights_backbone, norm, fpn_norm, fpn_channels, *layers)
    head = keypoint_head or partial(KeypointHead, layers=[fpn_channels] * 4)
    normal: Any = {"image_mean": image_mean, "image_std": image_std}
    classes, points = _counts(num_classes, None, num_keypoints)
    model = keypoint_rcnn(backbone, classes, points, min_size, keypoint_head=head, **normal, **kwargs)
    return load_weights(model, weights_backbone)


def _counts(num_classes: int | None, class_names: Sequence[str] | None, num_keypoints: int | None) -> tuple[int, int]:
    return num_classes or (len(class_names) + 1 if class_names else 2), num_keypoints or 17
