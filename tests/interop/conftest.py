"""Checkpoints of Detectron2's and MMDetection's shapes with random values, and what those libraries compute with them.

Everything is written down here by itself: names as the libraries have them, and the arithmetic with nothing but
convolutions, `roi_align` and `nms`. Values are kept under neutral keys, `raw`, in the libraries' own order (background
last, anchors by size and then ratio), so that one reference serves both names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, roi_align

Raw = dict[str, Tensor]
BLOCKS = (3, 4, 6, 3)  # ResNet-50
CLASSES = 5
HEIGHT, WIDTH = 128, 160
BGR_MEAN = (103.530, 116.280, 123.675)
RGB_MEAN, RGB_STD = (123.675, 116.280, 103.530), (58.395, 57.120, 57.375)
NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Kind:
    """What to draw weights for."""

    bgr: bool = True
    in_1x1: bool = True
    features: str = "fpn"
    mask: bool = False
    stages: int = 1

    @property
    def sizes(self) -> list[list[float]]:
        every: list[float] = [32, 64, 128, 256, 512]
        return [[s] for s in every] if self.features == "fpn" else [every]

    @property
    def strides(self) -> list[int]:
        return [4, 8, 16, 32, 64] if self.features == "fpn" else [16]


@lru_cache(maxsize=1)
def draw(kind: Kind) -> Raw:
    """Random weights that give features of ordinary size, scores of all sizes and boxes that move."""
    generator = torch.Generator().manual_seed(0)
    raw: Raw = {}

    def normal(name: str, shape: tuple[int, ...], spread: float, bias: float | None = 0.1) -> None:
        raw[f"{name}.weight"] = torch.randn(shape, generator=generator) * spread
        if bias is not None:
            raw[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * bias

    def conv(name: str, inside: int, outside: int, side: int, gain: float = 1.0) -> None:
        normal(name, (outside, inside, side, side), math.sqrt(2 / (inside * side**2)), None)
        uniform = torch.rand((2, outside), generator=generator) + 0.5
        raw[f"{name}.norm.weight"], raw[f"{name}.norm.running_var"] = gain * uniform[0], uniform[1]
        shift = 0.1 * torch.randn((2, outside), generator=generator)
        raw[f"{name}.norm.bias"], raw[f"{name}.norm.running_mean"] = shift

    conv("stem", 3, 64, 7)
    if kind.bgr:
        raw["stem.weight"] /= 58
    inside = 64
    for stage, blocks in enumerate(BLOCKS, start=1):
        width = 64 * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"s{stage}.{block}"
            conv(f"{name}.conv1", inside, width, 1)
            conv(f"{name}.conv2", width, width, 3)
            conv(f"{name}.conv3", width, 4 * width, 1, gain=0.3)
            if block == 0:
                conv(f"{name}.shortcut", inside, 4 * width, 1, gain=0.7)
            inside = 4 * width
    channels = {"fpn": 256, "c4": 1024, "dc5": 2048}[kind.features]
    if kind.features == "fpn":
        for level in range(4):
            normal(f"lateral{level}", (256, 256 * 2**level, 1, 1), math.sqrt(0.3 / (256 * 2**level)))
            normal(f"output{level}", (256, 256, 3, 3), math.sqrt(1 / 2304))
    anchors = 3 * len(kind.sizes[0])
    normal("rpn.conv", (channels, channels, 3, 3), math.sqrt(1 / (9 * channels)))
    normal("rpn.logits", (anchors, channels, 1, 1), 2 / math.sqrt(channels))
    normal("rpn.deltas", (4 * anchors, channels, 1, 1), 0.2 / math.sqrt(channels))
    for stage in range(kind.stages):
        name = f"box{stage}"
        if kind.features != "c4":
            normal(f"{name}.fc1", (1024, 49 * channels), math.sqrt(2 / (49 * channels)))
            normal(f"{name}.fc2", (1024, 1024), math.sqrt(2 / 1024))
        width = 2048 if kind.features == "c4" else 1024
        boxes = CLASSES if kind.stages == 1 else 1
        normal(f"{name}.cls", (CLASSES + 1, width), 3 / math.sqrt(width))
        normal(f"{name}.reg", (4 * boxes, width), 2 / math.sqrt(width))
    if kind.mask:
        inside = 2048 if kind.features == "c4" else 256
        for layer in range(0 if kind.features == "c4" else 4):
            normal(f"mask.conv{layer}", (256, 256, 3, 3), math.sqrt(2 / 2304))
        raw["mask.up.weight"] = torch.randn((inside, 256, 2, 2), generator=generator) * math.sqrt(2 / inside)
        raw["mask.up.bias"] = 0.1 * torch.randn(256, generator=generator)
        normal("mask.logits", (CLASSES, 256, 1, 1), 2 / 16)
    return raw


def norm_keys(name: str) -> list[str]:
    return [f"{name}.norm.{part}" for part in NORM]


def detectron2_names(raw: Raw, kind: Kind) -> Raw:
    """The same tensors as Detectron2 calls them."""
    body = "backbone.bottom_up." if kind.features == "fpn" else "backbone."
    names: Raw = {}
    for key, value in raw.items():
        first, _, rest = key.partition(".")
        if first == "stem":
            name = f"{body}stem.conv1.{rest}"
        elif first[0] == "s" and first[1].isdigit():
            in_head = kind.features == "c4" and first == "s4"
            name = f"{'roi_heads.' if in_head else body}res{int(first[1]) + 1}.{rest}"
        elif first.startswith("lateral"):
            name = f"backbone.fpn_lateral{int(first[-1]) + 2}.{rest}"
        elif first.startswith("output"):
            name = f"backbone.fpn_output{int(first[-1]) + 2}.{rest}"
        elif first == "rpn":
            part, _, end = rest.partition(".")
            part = {"conv": "conv", "logits": "objectness_logits", "deltas": "anchor_deltas"}[part]
            name = f"proposal_generator.rpn_head.{part}.{end}"
        elif first.startswith("box"):
            part, _, end = rest.partition(".")
            number = f"{first[3:]}." if kind.stages > 1 else ""
            owner = "box_head" if part.startswith("fc") else "box_predictor"
            part = {"cls": "cls_score", "reg": "bbox_pred"}.get(part, part)
            name = f"roi_heads.{owner}.{number}{part}.{end}"
        else:
            part, _, end = rest.partition(".")
            part = {"up": "deconv", "logits": "predictor"}.get(part) or f"mask_fcn{int(part[-1]) + 1}"
            name = f"roi_heads.mask_head.{part}.{end}"
        names[name] = value
    return names


def mmdetection_names(raw: Raw, kind: Kind) -> Raw:
    """The same tensors as MMDetection calls them."""
    names: Raw = {}
    for key, value in raw.items():
        first, _, rest = key.partition(".")
        if first == "stem":
            name = f"backbone.bn1.{rest[5:]}" if rest.startswith("norm.") else f"backbone.conv1.{rest}"
        elif first[0] == "s" and first[1].isdigit():
            block, layer, end = rest.split(".", 2)
            normed = end.startswith("norm.")
            if layer == "shortcut":
                layer = "downsample.1" if normed else "downsample.0"
            elif normed:
                layer = layer.replace("conv", "bn")
            name = f"backbone.layer{first[1]}.{block}.{layer}.{end.removeprefix('norm.')}"
        elif first.startswith(("lateral", "output")):
            part = "lateral_convs" if first.startswith("lateral") else "fpn_convs"
            name = f"neck.{part}.{first[-1]}.conv.{rest}"
        elif first == "rpn":
            part, _, end = rest.partition(".")
            name = f"rpn_head.{({'conv': 'rpn_conv', 'logits': 'rpn_cls', 'deltas': 'rpn_reg'})[part]}.{end}"
        elif first.startswith("box"):
            part, _, end = rest.partition(".")
            number = f"{first[3:]}." if kind.stages > 1 else ""
            part = {"fc1": "shared_fcs.0", "fc2": "shared_fcs.1", "cls": "fc_cls", "reg": "fc_reg"}[part]
            name = f"roi_head.bbox_head.{number}{part}.{end}"
        else:
            part, _, end = rest.partition(".")
            part = {"up": "upsample", "logits": "conv_logits"}.get(part) or f"convs.{part[-1]}.conv"
            name = f"roi_head.mask_head.{part}.{end}"
        names[name] = value
    return names


class Reference:
    """What Detectron2 and MMDetection compute, from `raw`."""

    def __init__(self, raw: Raw, kind: Kind) -> None:
        self.raw, self.kind = raw, kind

    def prepare(self, image: Tensor) -> Tensor:
        """`(3, H, W)` uint8 RGB -> `(1, 3, H, W)` as the network was trained on it."""
        if self.kind.bgr:
            return (image.flip(0).float() - torch.tensor(BGR_MEAN)[:, None, None])[None]
        return ((image.float() - torch.tensor(RGB_MEAN)[:, None, None]) / torch.tensor(RGB_STD)[:, None, None])[None]

    def conv(self, x: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = self.raw[f"{name}.weight"]
        x = F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)
        scale, bias, mean, variance = (self.raw[key][:, None, None] for key in norm_keys(name))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + bias

    def plain(self, x: Tensor, name: str) -> Tensor:
        weight = self.raw[f"{name}.weight"]
        return F.conv2d(x, weight, self.raw[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.raw[f"{name}.weight"], self.raw[f"{name}.bias"])

    def stage(self, x: Tensor, stage: int) -> Tensor:
        dilation = 2 if stage == 4 and self.kind.features == "dc5" else 1
        for block in range(BLOCKS[stage - 1]):
            name = f"s{stage}.{block}"
            stride = 2 if block == 0 and stage > 1 and dilation == 1 else 1
            first, second = (stride, 1) if self.kind.in_1x1 else (1, stride)
            y = self.conv(x, f"{name}.conv1", first).relu()
            y = self.conv(y, f"{name}.conv2", second, dilation).relu()
            y = self.conv(y, f"{name}.conv3")
            shortcut = self.conv(x, f"{name}.shortcut", stride) if block == 0 else x
            x = (y + shortcut).relu()
        return x

    def features(self, image: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.conv(self.prepare(image), "stem", 2).relu(), 3, 2, 1)
        maps = []
        for stage in range(1, 4 if self.kind.features == "c4" else 5):
            x = self.stage(x, stage)
            maps.append(x)
        if self.kind.features != "fpn":
            return [x]
        inner = self.plain(maps[3], "lateral3")
        outputs = [self.plain(inner, "output3")]
        for level in (2, 1, 0):
            inner = self.plain(maps[level], f"lateral{level}") + F.interpolate(inner, scale_factor=2, mode="nearest")
            outputs.insert(0, self.plain(inner, f"output{level}"))
        return [*outputs, F.max_pool2d(outputs[-1], 1, 2)]

    def anchors(self, shape: tuple[int, int], level: int) -> Tensor:
        """`(h * w * A, 4)`: cells row by row; in a cell size by size, and of a size ratio by ratio; not rounded."""
        cell = []
        for size in self.kind.sizes[level]:
            for ratio in (0.5, 1.0, 2.0):
                width = math.sqrt(size * size / ratio)
                height = ratio * width
                cell.append([-width / 2, -height / 2, width / 2, height / 2])
        stride = self.kind.strides[level]
        rows = [
            [x * stride + a, y * stride + b, x * stride + c, y * stride + d]
            for y in range(shape[0])
            for x in range(shape[1])
            for a, b, c, d in cell
        ]
        return torch.tensor(rows)

    @staticmethod
    def decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
        """`(N, 4 * C)` deltas on `(N, 4)` boxes -> `(N, C, 4)`."""
        dx, dy, dw, dh = (deltas.view(len(boxes), -1, 4) / torch.tensor(weights)).unbind(-1)
        width, height = (boxes[:, 2] - boxes[:, 0])[:, None], (boxes[:, 3] - boxes[:, 1])[:, None]
        x, y = boxes[:, 0, None] + width / 2 + dx * width, boxes[:, 1, None] + height / 2 + dy * height
        limit = math.log(1000 / 16)
        w, h = width * dw.clamp(max=limit).exp(), height * dh.clamp(max=limit).exp()
        return torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), dim=-1)

    @staticmethod
    def clip(boxes: Tensor) -> Tensor:
        limit = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float32)
        return torch.minimum(boxes.clamp(min=0), limit)

    def rpn(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Logits `(h * w * A,)` and boxes `(h * w * A, 4)`, not clipped, of each level."""
        outputs = []
        for level, feature in enumerate(features):
            hidden = self.plain(feature, "rpn.conv").relu()
            logits = self.plain(hidden, "rpn.logits")[0].permute(1, 2, 0).flatten()
            deltas = self.plain(hidden, "rpn.deltas")[0].permute(1, 2, 0).reshape(-1, 4)
            anchors = self.anchors((feature.shape[-2], feature.shape[-1]), level)
            outputs.append((logits, self.decode(deltas, anchors)[:, 0]))
        return outputs

    def proposals(self, features: list[Tensor], pre_nms: int = 1000) -> Tensor:
        boxes, scores, levels = [], [], []
        for level, (logits, moved) in enumerate(self.rpn(features)):
            top = logits.topk(min(pre_nms, len(logits)))
            boxes.append(self.clip(moved[top.indices]))
            scores.append(top.values)
            levels.append(torch.full_like(top.indices, level))
        box, score, level_of = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        real = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
        box, score, level_of = box[real], score[real], level_of[real]
        return box[batched_nms(box, score, level_of, 0.7)[:1000]]

    def pool(self, features: list[Tensor], boxes: Tensor, side: int) -> Tensor:
        """RoI Align, aligned, with as many samples as a bin has cells."""
        if self.kind.features != "fpn":
            return roi_align(features[0], [boxes], side, 1 / 16, 0, aligned=True)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.floor(4 + torch.log2(area.sqrt() / 224 + 1e-8)).clamp(2, 5).long() - 2
        pooled = torch.zeros(len(boxes), 256, side, side)
        for i in range(4):
            chosen = level == i
            pooled[chosen] = roi_align(features[i], [boxes[chosen]], side, 1 / 2 ** (i + 2), 0, aligned=True)
        return pooled

    def head(self, features: list[Tensor], boxes: Tensor, stage: int = 0) -> tuple[Tensor, Tensor]:
        """Logits `(N, K + 1)` and deltas of regions."""
        if self.kind.features == "c4":
            x = self.stage(self.pool(features, boxes, 14), 4).mean(dim=(2, 3))
        else:
            x = self.pool(features, boxes, 7).flatten(1)
            x = self.linear(self.linear(x, f"box{stage}.fc1").relu(), f"box{stage}.fc2").relu()
        return self.linear(x, f"box{stage}.cls"), self.linear(x, f"box{stage}.reg")

    def cascade(self, features: list[Tensor], boxes: Tensor, weights: list[tuple[float, ...]]) -> list[Any]:
        """Logits and boxes after each stage, which each start from the clipped boxes of the one before."""
        outputs = []
        for stage, scale in enumerate(weights):
            logits, deltas = self.head(features, boxes, stage)
            boxes = self.clip(self.decode(deltas, boxes, scale)[:, 0])
            outputs.append((logits, boxes))
        return outputs

    def masks(self, features: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Probabilities `(N, m, m)` of each box's own class, from 0."""
        x = self.pool(features, boxes, 14)
        if self.kind.features == "c4":
            x = self.stage(x, 4)
        else:
            for layer in range(4):
                x = self.plain(x, f"mask.conv{layer}").relu()
        x = F.conv_transpose2d(x, self.raw["mask.up.weight"], self.raw["mask.up.bias"], stride=2).relu()
        return self.plain(x, "mask.logits")[torch.arange(len(boxes)), labels].sigmoid()

    def detect(self, features: list[Tensor], proposals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and classes from 0, best first."""
        logits, deltas = self.head(features, proposals)
        boxes = self.clip(self.decode(deltas, proposals, (10, 10, 5, 5)))  # (N, K, 4)
        return self.select(boxes, logits.softmax(dim=1)[:, :-1])

    @staticmethod
    def select(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index, label = (scores > 0.05).nonzero(as_tuple=True)
        boxes, scores = boxes[index, label], scores[index, label]
        keep = batched_nms(boxes, scores, label, 0.5)[:100]
        return boxes[keep], scores[keep], label[keep]


@pytest.fixture(scope="session")
def photograph() -> Tensor:
    """A smooth colourful picture `(3, 128, 160)` uint8 RGB, more red than blue, so that colours matter."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand((1, 3, 16, 20), generator=generator) * torch.tensor([1.0, 0.7, 0.4])[:, None, None]
    return (255 * F.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")[0]).round().to(torch.uint8)


@pytest.fixture(scope="session")
def theirs() -> SimpleNamespace:
    """The functions and classes above, which test modules can't import."""
    parts = (Kind, draw, detectron2_names, mmdetection_names, Reference)
    return SimpleNamespace(**{part.__name__: part for part in parts})
