"""The two-stage detector itself: images -> features -> proposals -> losses or detections.

Shape shorthand:
    B: images     H, W: padded height and width     h, w: one image's own     C: channels     P: proposals an image
    N: objects of one image     D: detections of one image     m: side of a predicted mask
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detection.batch import Batch
from detection.boxes import resize_detection
from detection.fitting import attribute_of, check_detections, check_proposals, run, trial
from detection.mask_grid import MaskGrid, paste_masks
from detection.measuring import SIDE, check_maps, measure
from detection.models.transform import ImageTransform
from detection.parts import Detections, FeatureMaps, Losses, MaskGridPart, Proposals
from detection.recipes import recorded


@recorded
class TwoStageDetector(nn.Module):
    """Faster R-CNN (Ren et al. 2015) and its family from their parts; `detection.models.zoo` builds the usual ones.

    It is called as torchvision's detectors are: `model(images, targets)` gives a dictionary of losses in training,
    `model(images)` a list of detections in evaluation, in the pixels of the images given. A `Batch` in place of the
    list of images is taken as it is, without resizing.

    Args:
        backbone, rpn, roi_heads: see `BackbonePart`, `Proposer` and `RoIHeadsPart` in `detection.parts`.
        transform: a list of images -> padded `Batch`; it normalises, too.

    Raises:
        PartError: a part does not keep its contract.
    """

    def __init__(
        self, backbone: nn.Module, rpn: nn.Module, roi_heads: nn.Module, transform: ImageTransform | None = None
    ) -> None:
        super().__init__()
        self.transform = transform or ImageTransform()
        self.backbone: Any = backbone
        self.rpn: Any = rpn
        self.roi_heads: Any = roi_heads
        self.strides = layout_of(backbone)[0]
        self.recipe: dict[str, Any] | None = None  # how a builder made this model; see `detection.recipes`
        self.resolved: dict[str, Any] = {}
        self.check()

    @property
    def num_classes(self) -> int:
        """Classes with background."""
        return int(self.roi_heads.num_classes)

    @property
    def has_masks(self) -> bool:
        """Whether it predicts masks too."""
        return bool(self.roi_heads.has_masks)

    @property
    def has_keypoints(self) -> bool:
        """Whether it predicts key points too."""
        return bool(getattr(self.roi_heads, "has_keypoints", False))

    @property
    def num_keypoints(self) -> int:
        """Key points of an object; 0 where it predicts none."""
        return int(self.roi_heads.num_keypoints) if self.has_keypoints else 0

    @property
    def mask_grid(self) -> MaskGridPart:
        """What lays its masks on images."""
        return getattr(self.roi_heads, "mask_grid", None) or MaskGrid()

    def forward(
        self, images: Batch | Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> Losses | Detections:
        """Losses in training, detections in evaluation.

        Args:
            images: a `Batch`, or `(3, h, w)` tensors, float in [0, 1] or uint8, of any sizes. With other images than
                8-bit RGB `(C, h, w)`, and uint16 in the place of uint8, as the transform says.
            targets: in training with a list of images, for each one `boxes` `(N, 4)` xyxy in its pixels and `labels`
                `(N,)` int64 from 1 on, and what the detector learns besides: `masks` `(N, h, w)`, `keypoints`
                `(N, k, 3)` as x, y and visibility; a `Batch` brings its own.

        Raises:
            ValueError: images or targets that can't be right; the message names the image and the box.
        """
        if not isinstance(images, Batch):
            if self.training and targets is None:
                raise ValueError("targets are needed in training: model(images, targets)")
            images = self.transform(images, targets, self.num_classes)
        losses, detections = self.run(images, self.training, not self.training)  # type: ignore[arg-type]
        return losses if self.training else self._lay_masks(detections, images)  # type: ignore[arg-type]

    def run(self, batch: Batch, with_losses: bool, with_detections: bool) -> tuple[Losses, Detections]:
        """Losses, detections in original pixels, or both (validation wants both), from one pass over the features.

        Args:
            batch: images not normalised yet, with ground truth where losses are wanted.
            with_losses, with_detections: what is wanted; what is not comes back empty.

        Returns:
            Losses by name, scalars; and of each image `boxes` `(D, 4)`, `labels` and `scores` `(D,)`. Masks are still
            small: `(D, m, m)` probabilities inside each box, which `mask_grid` lays on the image. Key points are
            `keypoints` `(D, k, 3)`, x, y and 1.0, and `keypoints_scores` `(D, k)`.
        """
        features = self.extract(batch)
        proposals, losses = self.rpn(features, batch, with_losses)
        if with_losses:
            losses |= self.roi_heads.losses(features, proposals, batch)
        if not with_detections:
            return losses, []
        detections: Detections = self.roi_heads.detect(features, proposals, batch.image_sizes)
        for i, detection in enumerate(detections):
            resize_detection(detection, batch.image_sizes[i], batch.original_sizes[i])
        return losses, detections

    def extract(self, batch: Batch) -> FeatureMaps:
        """The backbone's maps of a batch, `(B, C, h, w)` each, with their strides."""
        maps = self.backbone(self.transform.normalise(batch.images, batch.image_sizes))
        return FeatureMaps(tuple(maps.values()), self.strides)

    def check(self) -> None:
        """Run each part once on a blank image. Builders call this; call it again when you have exchanged a part.

        Raises:
            PartError: one does not keep its contract.
        """
        batch = _blank_batch(next(self.parameters(), torch.empty(())).device, self.transform.channels)
        if batch.images.is_meta:  # tensors without values, by which no box could be chosen
            return
        with trial(self):
            maps = run("backbone", self.backbone, "__call__", self.transform.normalise(batch.images, batch.image_sizes))
            check_maps(self.backbone, maps, *layout_of(self.backbone))
            features = FeatureMaps(tuple(maps.values()), self.strides)
            for part in (self.rpn, self.roi_heads):
                if hasattr(part, "check"):
                    part.check(features)
            given = run("rpn", self.rpn, "__call__", features, batch, False)
            check_proposals(self.rpn, given)
            for name in ("num_classes", "has_masks", "losses", "detect"):
                attribute_of("roi_heads", self.roi_heads, name)
            some = Proposals(given[0].boxes[:, :2], given[0].scores[:, :2], given[0].valid[:, :2])
            check_detections(
                self.roi_heads, run("roi_heads", self.roi_heads, "detect", features, some, batch.image_sizes)
            )

    def for_inference(self, device: torch.device | str | None = None) -> TwoStageDetector:
        """A faster copy for detection alone, see `detection.models.fast.for_inference`.

        Args:
            device: where the copy lies and runs; None for where this detector is.
        """
        from detection.models.fast import for_inference

        return for_inference(self, device)

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> Detections:
        """Detections in the pixels of each image, whatever mode the model is in; the mode is left as it was."""
        was_training = self.training
        self.eval()
        try:
            batch = self.transform(images, None, self.num_classes)
            return self._lay_masks(self.run(batch, with_losses=False, with_detections=True)[1], batch)
        finally:
            self.train(was_training)

    def _lay_masks(self, detections: Detections, batch: Batch) -> Detections:
        """Detections with their masks as torchvision's have them, `(D, 1, H, W)` probabilities in original pixels."""
        for detection, (height, width) in zip(detections, batch.original_sizes.tolist(), strict=True):
            if "masks" in detection:
                small = detection["masks"], detection["boxes"]
                detection["masks"] = paste_masks(*small, (height, width), self.mask_grid)
        return detections


FasterRCNN = TwoStageDetector  # as torchvision's users know it


def layout_of(backbone: nn.Module) -> tuple[tuple[int, ...], int]:
    """Pixels between neighbouring cells of each of a backbone's maps, and their channels.

    Both as the backbone declares them, or measured on a blank image.
    """
    strides, channels = (getattr(backbone, name, None) for name in ("strides", "out_channels"))
    measured: Any = measure(backbone) if strides is None or channels is None else (strides, channels)
    return tuple(measured[0] if strides is None else strides), int(measured[1] if channels is None else channels)


def _blank_batch(device: torch.device, channels: int) -> Batch:
    """One black square image without objects, and one proposal."""
    size, nothing = torch.tensor([[SIDE, SIDE]], device=device), torch.zeros((1, 1, 4), device=device)
    some = torch.ones((1, 1), dtype=torch.bool, device=device)
    images = torch.zeros((1, channels, SIDE, SIDE), dtype=torch.uint8, device=device)
    return Batch(images, size, nothing, size[:, :1], ~some, size, proposals=nothing + 32, proposals_valid=some)
