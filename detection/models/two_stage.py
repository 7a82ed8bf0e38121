"""The two-stage detector itself: images -> features -> proposals -> losses or detections."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from detection.batch import Batch
from detection.boxes import resize_boxes
from detection.models.backbones import Backbone
from detection.models.cascade import CascadeRoIHeads
from detection.models.masks import paste_masks
from detection.models.norms import fold_for_good, freeze_norms
from detection.models.packing import pack
from detection.models.roi_heads import RoIHeads
from detection.models.rpn import RegionProposalNetwork
from detection.models.transform import ImageTransform

Losses = dict[str, Tensor]
Detections = list[dict[str, Tensor]]


class FasterRCNN(nn.Module):
    """Faster R-CNN (Ren et al. 2015) from its parts; `detection.models.zoo` has builders for the usual ones.

    It is called as torchvision's detectors are: `model(images, targets)` gives a dictionary of losses in training,
    `model(images)` a list of detections in evaluation, in the pixels of the images given. A `Batch` in place of the
    list of images is taken as it is, without resizing.

    Args:
        backbone: images -> feature maps, with their `strides`.
        rpn: feature maps -> proposals.
        roi_heads: feature maps and proposals -> classes and boxes.
        transform: a list of images -> normalised, padded `Batch`.
    """

    def __init__(
        self,
        backbone: Backbone,
        rpn: RegionProposalNetwork,
        roi_heads: RoIHeads | CascadeRoIHeads,
        transform: ImageTransform,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads: RoIHeads | CascadeRoIHeads = roi_heads
        self.recipe: dict[str, Any] | None = None  # how a builder made this model; see `detection.recipes`
        self.resolved: dict[str, Any] = {}

    @property
    def num_classes(self) -> int:
        """Classes with background."""
        return self.roi_heads.num_classes

    @property
    def has_masks(self) -> bool:
        """Whether it predicts masks too."""
        return self.roi_heads.has_masks

    def forward(
        self, images: Batch | Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> Losses | Detections:
        """Losses in training, detections in evaluation.

        Args:
            images: a `Batch`, or `(3, h, w)` tensors, float in [0, 1] or uint8, of any sizes.
            targets: in training with a list of images, for each one `boxes` `(N, 4)` xyxy in its pixels and `labels`
                `(N,)` int64 from 1 on; a `Batch` brings its own.

        Raises:
            ValueError: images or targets that can't be right; the message names the image and the box.
        """
        if not isinstance(images, Batch):
            if self.training and targets is None:
                raise ValueError("targets are needed in training: model(images, targets)")
            images = self.transform(images, targets, self.num_classes)
        losses, detections = self.run(images, self.training, not self.training)  # type: ignore[arg-type]
        return losses if self.training else _lay_masks(detections, images)  # type: ignore[arg-type]

    def run(self, batch: Batch, with_losses: bool, with_detections: bool) -> tuple[Losses, Detections]:
        """One pass over the features for losses, detections in original pixels, or both (validation wants both).

        Masks are still small here: `(D, m, m)` probabilities inside each box, which `paste_masks` lays on the image.
        """
        detects = with_detections and not with_losses and not self.training
        compiled = self.backbone._compiled_call_impl is not None  # its graphs are made for batches
        if detects and not compiled and len(batch) > 1 and batch.images.device.type == "cpu":
            # There images share nothing but the memory, and maps that outgrow the cache cost more than they spare.
            return {}, [self.run(single, with_losses, with_detections)[1][0] for single in batch.singles()]
        features = list(self.backbone(self.transform.normalise(batch.images, batch.image_sizes)).values())
        proposals, losses = self.rpn(features, batch, with_losses)
        if with_losses:
            losses |= self.roi_heads.losses(features, proposals, batch)
        if not with_detections:
            return losses, []
        detections = self.roi_heads.detect(features, proposals.trimmed(), batch.image_sizes)
        for i, detection in enumerate(detections):
            detection["boxes"] = resize_boxes(detection["boxes"], batch.image_sizes[i], batch.original_sizes[i])
        return losses, detections

    def for_inference(self) -> FasterRCNN:
        """A copy in evaluation mode that can no longer be trained: faster, with the same detections.

        The backbone's normalisation is folded into its convolutions for good, and on a CPU weights are cast and laid
        out once, on the first call in each precision.
        """
        copied = deepcopy(self).eval().requires_grad_(False)
        fold_for_good(copied)
        freeze_norms(copied.backbone)  # statistics that were live are frozen now, and so can be folded too
        fold_for_good(copied)
        pack(copied)
        return copied

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> Detections:
        """Detections in the pixels of each image, whatever mode the model is in; the mode is left as it was."""
        was_training = self.training
        self.eval()
        try:
            batch = self.transform(images, None, self.num_classes)
            return _lay_masks(self.run(batch, with_losses=False, with_detections=True)[1], batch)
        finally:
            self.train(was_training)


def _lay_masks(detections: Detections, batch: Batch) -> Detections:
    """Detections with their masks as torchvision gives them, `(D, 1, H, W)` probabilities in original pixels."""
    for detection, (height, width) in zip(detections, batch.original_sizes.tolist(), strict=True):
        if "masks" in detection:
            detection["masks"] = paste_masks(detection["masks"], detection["boxes"], (height, width))
    return detections
