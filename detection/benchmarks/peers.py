"""Other detectors behind the interface of ours, so that a benchmark changes the detector and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as ReferenceFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator as ReferenceAnchors
from torchvision.ops import FeaturePyramidNetwork as ReferenceFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detection.batch import Batch
from detection.boxes import resize_boxes
from detection.models.backbones import Backbone
from detection.models.transform import as_float


class _ReferenceBackbone(nn.Module):
    """Our trunk under torchvision's own pyramid."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.body = backbone.body
        self.out_channels = backbone.out_channels
        inner: Any = backbone.fpn.inner_blocks
        channels = [block[0].in_channels for block in inner]
        norm = nn.BatchNorm2d if len(inner[0]) > 1 else None
        self.fpn = ReferenceFPN(channels, self.out_channels, LastLevelMaxPool(), norm)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(images))


class TorchvisionDetector(nn.Module):
    """torchvision's Faster R-CNN as a detector that `DetectionModule` can train.

    Args:
        backbone: its trunk is used, with a pyramid of torchvision's.
        num_classes: with background.
        options: of torchvision's `FasterRCNN`; anchors are its default unless `anchor_sizes` is among them. Its
            `min_size` and `max_size` must be those of the batches: torchvision resizes by them again.
    """

    has_masks = False

    def __init__(self, backbone: Backbone, num_classes: int, **options: Any) -> None:
        super().__init__()
        sizes = options.pop("anchor_sizes", [[32], [64], [128], [256], [512]])
        anchors = ReferenceAnchors(tuple(map(tuple, sizes)), ((0.5, 1.0, 2.0),) * len(sizes))
        self.num_classes = num_classes
        self.recipe = None
        self.model = ReferenceFasterRCNN(
            _ReferenceBackbone(backbone), num_classes, rpn_anchor_generator=anchors, **options
        )

    def run(
        self, batch: Batch, with_losses: bool, with_detections: bool
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """As `FasterRCNN.run`; torchvision gives either losses or detections, so both cost two passes."""
        sizes = batch.image_sizes.tolist()
        images = [as_float(image[:, :h, :w]) for image, (h, w) in zip(batch.images, sizes, strict=True)]
        targets = [
            {"boxes": boxes[valid], "labels": labels[valid]}
            for boxes, labels, valid in zip(batch.gt_boxes, batch.gt_labels, batch.gt_valid, strict=True)
        ]
        if not with_detections:
            return self.model(images, targets), []
        losses = {"loss_not_measured": torch.full((), torch.nan, device=batch.images.device)} if with_losses else {}
        detections = self.model(images)
        for detection, old, new in zip(detections, batch.image_sizes, batch.original_sizes, strict=True):
            detection["boxes"] = resize_boxes(detection["boxes"], old, new)
        return losses, detections
