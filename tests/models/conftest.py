"""Real images of different sizes, and torchvision's detectors with random weights that detect something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as mask_api
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

from detection.data.dataset import to_rle
from detection.data.images import read_image

REAL_IMAGES = ("000000331352.jpg", "000000037777.jpg")  # portrait and landscape

Sample = tuple[list[Tensor], list[dict[str, Tensor]]]


@pytest.fixture(scope="session")
def real_samples(shared_data: Path) -> Sample:
    """Photographs of COCO in [0, 1], with their boxes, and categories folded to labels 1 to 10.

    Key points are drawn: in and about each box, one in three of each visibility, the first on the corner of its box.
    """
    folder = shared_data / "tiny_coco"
    content = json.loads((folder / "annotations/instances_val2017.json").read_text())
    ids = {image["file_name"]: image["id"] for image in content["images"]}
    images, targets = [], []
    for name in REAL_IMAGES:
        images.append(torch.from_numpy(read_image(folder / "val2017" / name)).permute(2, 0, 1) / 255)
        objects = [a for a in content["annotations"] if a["image_id"] == ids[name] and not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects])
        boxes[:, 2:] += boxes[:, :2]
        size = images[-1].shape[-2:]
        masks = [mask_api.decode(to_rle(a["segmentation"], np.zeros(4, np.float32), *size)) for a in objects]
        labels = torch.tensor([a["category_id"] % 10 + 1 for a in objects])
        share = torch.rand((len(boxes), 17, 2), generator=torch.Generator().manual_seed(len(targets))) * 1.1
        points = boxes[:, None, :2] + share.clamp(max=1.05) * (boxes[:, 2:] - boxes[:, :2])[:, None]
        points[:, 0] = boxes[:, 2:]
        visible = (torch.arange(17) % 3).float().expand(len(boxes), 17)[..., None].flip(1)
        targets.append({"boxes": boxes, "labels": labels, "masks": torch.from_numpy(np.stack(masks))})
        targets[-1]["keypoints"] = torch.cat((points, visible), dim=-1)
    return images, targets


def calibrate(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
    """Make torchvision's detector with random weights give sane features and a wide range of scores.

    Residual branches are damped, as training leaves them: at full strength a random network of 50 layers makes a
    rounding error 1000 times larger. Normalisation gets statistics measured on the images. Then each output of the four
    last layers gets zero mean and the spread of a trained network, so that scores fill their range and boxes move.
    """
    for module in model.modules():
        branch = (
            [module.bn3] if isinstance(module, Bottleneck) else [module.bn2] if isinstance(module, BasicBlock) else []
        )
        if isinstance(module, InvertedResidual) and module.use_res_connect:
            branch = [module.block[-1][1]]
        for norm in branch:
            nn.init.constant_(norm.weight, 0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(images, targets)
        model.eval()
        _spread(model, {model.rpn.head.cls_logits: 2.0, model.rpn.head.bbox_pred: 0.05}, images)
        predictor = model.roi_heads.box_predictor
        _spread(model, {predictor.cls_score: 0.7, predictor.bbox_pred: 0.3}, images)
        if model.roi_heads.has_mask():
            _spread(model, {model.roi_heads.mask_predictor.mask_fcn_logits: 1.5}, images)
        if model.roi_heads.has_keypoint():
            _spread(model, {model.roi_heads.keypoint_predictor.kps_score_lowres: 3.0}, images)
    for norm in norms:
        norm.momentum = 0.1


def _spread(model: nn.Module, layers: dict[nn.Module, float], images: list[Tensor]) -> None:
    """Give each output of these layers zero mean and the standard deviation wanted."""
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        seen[layer].append(output.transpose(0, 1).flatten(1))  # (outputs, everything else)

    handles = [layer.register_forward_hook(note) for layer in layers]
    model(images)
    for handle in handles:
        handle.remove()
    for layer, spread in layers.items():
        outputs = torch.cat(seen[layer], dim=1)
        scale = spread / outputs.std(dim=1)
        outputs_first = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        outputs_first.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.copy_((layer.bias - outputs.mean(dim=1)) * scale)


@pytest.fixture(scope="session")
def calibrated(real_samples: Sample) -> Callable[[Callable[[], nn.Module]], nn.Module]:
    """Build one of torchvision's detectors with seeded random weights and calibrate it."""

    def make(build: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        model = build()
        calibrate(model, *real_samples)
        return model

    return make
