"""What has to happen to tensors between libraries, in both directions; names are already this project's.

Shape shorthand:
    K: classes without background     A: anchors a cell     S, Q: sizes and ratios of anchors, A = S * Q
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection as reference

from detection.models.transform import IMAGENET_MEAN, IMAGENET_STD
from detection.weights import CheckpointError, class_rows, pick_classes

State = dict[str, Tensor]
STEM = "backbone.body.conv1.weight"
CATEGORIES: list[str] = reference.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by COCO's category id
COCO_IDS = [i for i, name in enumerate(CATEGORIES) if name not in ("__background__", "N/A")]
COCO_NAMES = [CATEGORIES[i] for i in COCO_IDS]
NEVER = -100.0  # logit of a class that there is not


@dataclass(frozen=True, slots=True)
class Style:
    """How a ResNet was trained, which its tensors' names and shapes do not tell.

    Attributes:
        stride_in_1x1: see `backbones.resnet_network`.
        bgr: it sees blue, green and red.
        mean: of red, green and blue from 0 to 255, which it sees less that; None for ImageNet's.
        std: what it sees them divided by, likewise; None for 1 where they are BGR, and else ImageNet's.
    """

    stride_in_1x1: bool
    bgr: bool
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def scale(self) -> list[float]:
        """What a kernel of red, green and blue is multiplied by, for pixels in [0, 1] divided by ImageNet's std."""
        std = self.std or ((1.0, 1.0, 1.0) if self.bgr else tuple(255 * value for value in IMAGENET_STD))
        return [255 * own / theirs for own, theirs in zip(IMAGENET_STD, std, strict=True)]

    @property
    def image_mean(self) -> dict[str, Any]:
        """The argument of a builder, where the mean is not ImageNet's."""
        pairs = zip(self.mean or (), IMAGENET_MEAN, strict=False)
        return (
            {"image_mean": [own / 255 for own in self.mean or ()]}
            if any(abs(a - 255 * b) > 0.01 for a, b in pairs)
            else {}
        )


STYLES = {"pytorch": Style(False, False), "caffe": Style(True, True)}  # MMDetection's words


def background_to_front(state: Mapping[str, Tensor]) -> State:
    """Classes ending with the background (K + 1 logits, K boxes, K masks) -> beginning with it (K + 1 of each).

    The background's boxes and masks, which nothing looks at, are zeros.
    """
    agnostic = _agnostic(state)
    return {name: value if name in agnostic else _move(name, value, _to_front) for name, value in state.items()}


def background_to_back(state: Mapping[str, Tensor]) -> State:
    """The way back: boxes and masks of the background go."""
    agnostic = _agnostic(state)
    return {name: value if name in agnostic else _move(name, value, _to_back) for name, value in state.items()}


def _to_front(value: Tensor, rows: int, is_logit: bool) -> Tensor:
    return torch.cat((value[-1:], value[:-1]) if is_logit else (torch.zeros_like(value[:rows]), value))


def _to_back(value: Tensor, rows: int, is_logit: bool) -> Tensor:
    return torch.cat((value[1:], value[:1])) if is_logit else value[rows:]


def _move(name: str, value: Tensor, change: Callable[[Tensor, int, bool], Tensor]) -> Tensor:
    rows = class_rows(name)
    return change(value, rows, ".cls_score." in name) if rows else value


def _agnostic(state: Mapping[str, Tensor]) -> set[str]:
    """The layers of boxes that have no class: those of a cascade, and others with one box for several classes."""
    several = any(name.endswith(".cls_score.bias") and len(value) > 2 for name, value in state.items())
    boxes = [name for name in state if name.startswith("roi_heads.") and ".bbox_pred." in name]
    return {name for name in boxes if name.startswith("roi_heads.stages.") or (several and len(state[name]) == 4)}


def masks_of_each_class(state: Mapping[str, Tensor], num_classes: int) -> State:
    """One mask for all classes -> the same mask for each of them, background not counted."""
    found = {name: value for name, value in state.items() if ".mask_fcn_logits." in name and len(value) == 1}
    return dict(state) | {name: value.repeat_interleave(num_classes, dim=0) for name, value in found.items()}


def fold_pixels(state: Mapping[str, Tensor], bgr: bool, scale: Sequence[float]) -> State:
    """A first convolution for other pixels -> for normalised RGB; exact, zero padding included.

    Args:
        state: weights with `STEM` `(C, 3, 7, 7)`.
        bgr: it sees blue, green, red.
        scale: of red, green and blue, see `Style.scale`.
    """
    stem = state[STEM][:, [2, 1, 0]] if bgr else state[STEM]
    exact = all(abs(factor - 1) < 1e-6 for factor in scale)
    return dict(state) | {STEM: stem if exact else stem * torch.tensor(scale).view(1, 3, 1, 1)}


def unfold_bytes(state: Mapping[str, Tensor], std: Sequence[float] = IMAGENET_STD) -> State:
    """A first convolution for normalised RGB -> for BGR from 0 to 255 less the mean."""
    return dict(state) | {STEM: (state[STEM] / (255 * torch.tensor(std).view(1, 3, 1, 1)))[:, [2, 1, 0]]}


def anchors_to_ratio_major(state: Mapping[str, Tensor], sizes: int, ratios: int) -> State:
    """RPN outputs of a cell's anchors ordered by size, then ratio (Detectron2) -> by ratio, then size."""
    return _reorder_anchors(state, (sizes, ratios))


def anchors_to_size_major(state: Mapping[str, Tensor], sizes: int, ratios: int) -> State:
    """The way back."""
    return _reorder_anchors(state, (ratios, sizes))


def _reorder_anchors(state: Mapping[str, Tensor], grid: tuple[int, int]) -> State:
    changed = dict(state)
    for name, value in state.items():
        if name.startswith(("rpn.head.cls_logits.", "rpn.head.bbox_pred.")):
            if len(value) % (grid[0] * grid[1]):
                raise CheckpointError(f"{name} has {len(value)} rows, which {grid[0] * grid[1]} anchors can't share")
            rows = value.unflatten(0, (*grid, -1))  # (A,) or (4A,) rows -> (grid, rows of an anchor)
            changed[name] = rows.transpose(0, 1).flatten(0, 2).contiguous()
    return changed


def without_counters(state: Mapping[str, Tensor]) -> State:
    """Leave out how many batches normalisation has seen, which frozen layers do not count."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def counters_of(model: nn.Module) -> State:
    """How many batches a model's normalisation has seen, by name, which other files need not say."""
    return {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}


def to_contiguous(state: Mapping[str, Tensor]) -> State:
    """A COCO detector with category ids for labels (91 classes) -> with labels 1 to 80 in their order."""
    return pick_classes(state, _blank(state, 81), [0, *COCO_IDS], 91)


def to_category_ids(state: Mapping[str, Tensor]) -> State:
    """The way back; the ids that COCO left out get logits so low that they never come up."""
    labels = [0, *(COCO_IDS.index(i) + 1 if i in COCO_IDS else None for i in range(1, 91))]
    return pick_classes(state, _blank(state, 91), labels, 81)


def _blank(state: Mapping[str, Tensor], classes: int) -> State:
    """Rows of zeros for that many classes, of which none comes up."""
    blank = {
        name: value.new_zeros((class_rows(name) * classes, *value.shape[1:]))
        for name, value in state.items()
        if class_rows(name)
    }
    for name in blank:
        if name.endswith("cls_score.bias"):
            blank[name].fill_(NEVER)
    return blank
