"""A detector as this project, torchvision or ONNX Runtime runs it: stage by stage, one image.

Each side does its own preprocessing, network and selection from the file's own tensors, so that a difference in any of
them shows in the first stage that it touches. Those of Detectron2 and MMDetection are in `other_sides`.

Shape shorthand:
    C: channels     h, w: cells of a map     k: anchors a cell     P: proposals     D: detections     m: side of a mask
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import detection as reference
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detection.batch import Batch
from detection.data.spectral import Pixels
from detection.interop.parity import locate_in_regions
from detection.interop.torchvision import HEATMAPS, MOBILE_320, find_builder
from detection.matching import BalancedSampler
from detection.models.two_stage import FasterRCNN
from detection.weights import upgrade_names

DIVISOR = 64  # pixels: at such sides torchvision's strides, which it infers from the padded size, are the true ones
EVERYTHING = 10**6  # anchors or proposals: all train, so that sampling plays no part
TRAINED_ON = 100  # proposals of an image, where losses are compared
SHORT = 192  # shorter side there, in pixels
Target = dict[str, Tensor]  # boxes (N, 4), labels (N,), masks (N, H, W)


class AbsentError(Exception):
    """What a file should be compared with is not there; the message says why, as a clause."""


@dataclass(frozen=True)
class Traced:
    """What a detector computes of one image on the way; empty where a side does not show it.

    Attributes:
        found: `boxes (D, 4)` in pixels of the image, `labels (D,)`, `scores (D,)`; of mask branches `masks (D, m, m)`;
            of key points `keypoints (D, k, 3)` and `keypoints_scores (D, k)`.
        features: `(C, h, w)` of each level.
        anchors: those of a cell of each level, `(k, 4)` around 0.
        objectness, deltas: logits `(k, h, w)` and deltas `(k, 4, h, w)` of each level.
        proposals: `(P, 4)` in pixels of the resized image.
    """

    found: Mapping[str, Tensor]
    features: list[Tensor] = field(default_factory=list)
    anchors: list[Tensor] = field(default_factory=list)
    objectness: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    proposals: Tensor | None = None


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: what runs, and its version.
        look: an image `(H, W, C)` -> what is computed of it.
        train: an image and its objects -> losses, and gradients by parameter; None for a side that does not train.
    """

    name: str
    look: Callable[[Pixels], Traced]
    train: Callable[[Pixels, Target], tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None


def as_tensor(image: Pixels) -> Tensor:
    """`(H, W, C)` -> `(C, H, W)` float in [0, 1]."""
    highest = 65535 if image.dtype == np.uint16 else 255
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)) / highest


def own_side(model: FasterRCNN, prepare: Callable[[Pixels], Batch] | None = None) -> Side:
    """Ours.

    Args:
        model: in evaluation mode.
        prepare: an image -> what the model sees; by default as `model(images)`, on sides that torchvision is right at.
    """
    model = deepcopy(model).eval()
    if prepare is None:
        model.transform.size_divisible = DIVISOR
        prepare = lambda image: model.transform([as_tensor(image)], None, model.num_classes)  # noqa: E731

    @torch.no_grad()
    def look(image: Pixels) -> Traced:
        batch = prepare(image)
        features = model.extract(batch)
        logits, deltas = model.rpn.head(list(features.maps))
        proposals = model.rpn(features, batch, False)[0]
        return Traced(
            model.run(batch, False, True)[1][0],
            [level[0] for level in features.maps],
            list(model.rpn.anchor_generator._cells),
            [level[0] for level in logits],
            [level[0].unflatten(0, (-1, 4)) for level in deltas],
            proposals.boxes[0][proposals.valid[0]],
        )

    return Side("this project", look, lambda image, target: _own_losses(model, image, target))


def _own_losses(model: FasterRCNN, image: Pixels, target: Target) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = _for_training(model)
    model.transform.min_size, model.transform.max_size = (SHORT,), 2 * SHORT
    model.rpn.sampler = BalancedSampler(EVERYTHING, 0.5)
    model.roi_heads.sampler = BalancedSampler(EVERYTHING, 0.25)
    model.rpn.post_nms_top_n["training"] = TRAINED_ON
    return _gradients(model, image, target)


def _for_training(model: Any) -> Any:
    """A copy that trains in full, but for the statistics of its normalisation, which stay as they are."""
    model = deepcopy(model).train().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def _gradients(model: Any, image: Pixels, target: Target) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    losses = model([as_tensor(image)], [target])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def torchvision_side(
    state: Mapping[str, Tensor], file_name: str, without_epsilon: bool, like: FasterRCNN | None = None
) -> Side:
    """The model of torchvision itself with a file's own tensors.

    Args:
        state: of the file, under torchvision's names of any version.
        file_name: of it, which tells the two MobileNet detectors apart.
        without_epsilon: its normalisation was trained with epsilon 0.
        like: whose sizes, thresholds and anchors the model is to have; torchvision's defaults by default.

    Raises:
        AbsentError: torchvision can't build it.
    """
    twin = _twin(state, file_name, like)
    try:
        twin.load_state_dict(dict(state))
    except RuntimeError as error:
        raise AbsentError(
            f"torchvision's model does not take these tensors ({str(error).splitlines()[-1].strip()})"
        ) from error
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d) and without_epsilon:
            module.eps = 0.0
    twin.eval().transform.size_divisible = DIVISOR

    @torch.no_grad()
    def look(image: Pixels) -> Traced:
        images, _ = twin.transform([as_tensor(image)])
        maps = twin.backbone(images.tensors)
        logits, deltas = twin.rpn.head(list(maps.values()))
        proposals, _ = twin.rpn(images, maps)
        found = twin.roi_heads(maps, proposals, images.image_sizes)[0][0]
        small = {"masks": found["masks"][:, 0]} if "masks" in found else {}
        size = [image.shape[:2]]
        whole = twin.transform.postprocess([{k: v for k, v in found.items() if k != "masks"}], images.image_sizes, size)
        return Traced(
            whole[0] | small,
            [level[0] for level in maps.values()],
            list(twin.rpn.anchor_generator.cell_anchors),
            [level[0] for level in logits],
            [level[0].unflatten(0, (-1, 4)) for level in deltas],
            proposals[0],
        )

    def train(image: Pixels, target: Target) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = _for_training(twin)
        model.transform.min_size, model.transform.max_size = (SHORT,), 2 * SHORT
        model.rpn.fg_bg_sampler.batch_size_per_image = model.roi_heads.fg_bg_sampler.batch_size_per_image = EVERYTHING
        model.rpn._post_nms_top_n["training"] = TRAINED_ON
        return _gradients(model, image, target)

    return Side(f"torchvision {version('torchvision')}", look, train)


def _twin(state: Mapping[str, Tensor], file_name: str, like: FasterRCNN | None) -> Any:
    """The model of torchvision of these tensors, without weights."""
    today = upgrade_names(state)
    small = like is not None and max(like.transform.min_size) <= 320
    name = find_builder(today, MOBILE_320 if small else file_name)
    options: dict[str, Any] = {"num_classes": len(today["roi_heads.box_predictor.cls_score.weight"])}
    if HEATMAPS in today:
        options["num_keypoints"] = len(today[HEATMAPS])
    if like is not None:
        known = inspect.signature(reference.FasterRCNN).parameters
        given = (like.recipe or {}).get("init_args", {})
        plain = (int, float, list, tuple)
        options |= {key: value for key, value in given.items() if key in known and isinstance(value, plain)}
        options |= {"min_size": like.transform.min_size[-1], "max_size": like.transform.max_size}
        sizes = like.rpn.anchor_generator
        options["rpn_anchor_generator"] = AnchorGenerator(sizes.sizes, _ratios(sizes))
    if hasattr(reference, name):
        return getattr(reference, name)(weights=None, weights_backbone=None, **options)
    backbone = resnet_fpn_backbone(
        backbone_name=name.split("_")[1], weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    kind = reference.MaskRCNN if name.startswith("mask") else reference.FasterRCNN
    return kind(backbone, **options)


def _ratios(generator: Any) -> tuple[tuple[float, ...], ...]:
    """Height / width of each level's anchors."""
    given = generator.recipe["init_args"].get("aspect_ratios", (0.5, 1.0, 2.0))
    by_level = given if isinstance(given[0], (list, tuple)) else [given] * len(generator.sizes)
    return tuple(tuple(float(ratio) for ratio in level) for level in by_level)


def onnx_side(path: Path) -> Side:
    """An exported file with what it computes on the way: the maps that its RPN's head takes and gives, by level.

    They are found by the names of the weights that they are multiplied with, and made outputs of a copy in memory.
    """
    import onnx
    import onnxruntime

    model = onnx.load(path)
    users: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            users.setdefault(node.input[1], []).append(node)
    head = "model.rpn.head."
    logits, deltas = (
        [n.output[0] for n in users.get(f"{head}{part}.weight", [])] for part in ("cls_logits", "bbox_pred")
    )
    maps = [node.input[0] for node in users.get(f"{head}conv.0.0.weight", [])]
    maps = maps if len(maps) == len(logits) == len(deltas) else []
    asked = [name for names in ((maps, logits, deltas) if maps else ()) for name in names]
    final = [output.name for output in model.graph.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def look(image: Pixels) -> Traced:
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))[None]
        values = dict(zip([*final, *asked], session.run([*final, *asked], {"images": planes}), strict=True))
        given = {name: torch.from_numpy(value[0]) for name, value in values.items() if name != "counts"}
        count = int(values["counts"][0])
        found = locate_in_regions({name: given[name][:count] for name in final if name != "counts"})
        if not asked:
            return Traced(found)
        return Traced(
            found,
            [given[name] for name in maps],
            objectness=[given[name] for name in logits],
            deltas=[given[name].unflatten(0, (-1, 4)) for name in deltas],
        )

    return Side(f"the file {path.name}", look)
