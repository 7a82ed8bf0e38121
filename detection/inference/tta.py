"""Test-time augmentation: the detections of several views of an image, merged.

Shape shorthand:
    B: images     H, W: padded height and width     D: detections of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.batch import Batch
from detection.boxes import grouped_nms
from detection.inference.fusing import Fusion, weighted_boxes
from detection.models.transform import ImageTransform
from detection.models.two_stage import Detections, FasterRCNN, Losses
from detection.parts import MaskGridPart


class TestTimeAugmentation(nn.Module):
    """A detector that looks at each batch at several scales, mirrored and not, and fuses what it finds.

    It stands in for the detector wherever `run` is called: `module.detector = TestTimeAugmentation(module.detector)`.

    Args:
        detector: gives the detections; its NMS threshold and number of detections are those of the merging, too.
        scales: factors on the images of the batch.
        hflip: look at the mirror image as well.
        fusion: `nms` keeps the best of what overlaps; `wbf` is weighted box fusion, see `fusing.weighted_boxes`, where
            a box has the mask of the best detection in it.
    """

    __test__ = False  # pytest would take it for a test

    def __init__(
        self,
        detector: FasterRCNN,
        scales: Sequence[float] = (1.0,),
        hflip: bool = True,
        fusion: Fusion = "nms",
    ) -> None:
        super().__init__()
        if hflip and getattr(detector, "has_keypoints", False):
            raise ValueError("a mirrored view has left key points for right ones: look without it, hflip=False")
        self.detector, self.scales, self.hflip, self.fusion = detector, tuple(scales), hflip, fusion

    @property
    def num_classes(self) -> int:
        return self.detector.num_classes

    @property
    def transform(self) -> ImageTransform:
        return self.detector.transform

    @property
    def has_masks(self) -> bool:
        return self.detector.has_masks

    @property
    def has_keypoints(self) -> bool:
        return bool(getattr(self.detector, "has_keypoints", False))

    @property
    def num_keypoints(self) -> int:
        return int(getattr(self.detector, "num_keypoints", 0))

    @property
    def mask_grid(self) -> MaskGridPart:
        return self.detector.mask_grid

    def run(self, batch: Batch, with_losses: bool, with_detections: bool) -> tuple[Losses, Detections]:
        """As `FasterRCNN.run`; the losses are those of the batch as it is."""
        losses = self.detector.run(batch, True, False)[0] if with_losses else {}
        if not with_detections:
            return losses, []
        views: list[Detections] = []
        for scale in self.scales:
            scaled = rescale(batch, scale, self.transform.size_divisible)
            views.append(self.detector.run(scaled, False, True)[1])
            if self.hflip:
                mirrored = self.detector.run(mirror(scaled), False, True)[1]
                widths = batch.original_sizes[:, 1]
                views.append([_mirror_back(d, width) for d, width in zip(mirrored, widths, strict=True)])
        return losses, [self._merge(found) for found in zip(*views, strict=True)]

    def _merge(self, views: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        heads = last_heads(self.detector)
        joined = {name: torch.cat([view[name] for view in views]) for name in views[0]}
        if self.fusion == "wbf":
            boxes, scores, labels = (joined[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
            fused = weighted_boxes(boxes, scores, labels, len(views))
            keep = torch.from_numpy(fused.best).to(joined["labels"].device)
            joined = {name: values[keep] for name, values in joined.items()}
            joined |= {n: torch.from_numpy(getattr(fused, n)).to(joined[n]) for n in ("boxes", "scores")}
            return {name: values[: int(heads.detections_per_img)] for name, values in joined.items()}
        nms: Any = getattr(heads, "nms", grouped_nms)
        keep = nms(joined["boxes"], joined["scores"], joined["labels"], float(heads.nms_thresh))
        return {name: values[keep[: int(heads.detections_per_img)]] for name, values in joined.items()}


def last_heads(model: nn.Module) -> Any:
    """The RoI heads of a detector that have `nms_thresh` and `detections_per_img`."""
    return next(m for m in model.modules() if hasattr(m, "nms_thresh") and hasattr(m, "detections_per_img"))


def rescale(batch: Batch, scale: float, divisor: int = 32) -> Batch:
    """The images of a batch at `scale` times their size, without ground truth; detections find their way back."""
    if scale == 1.0:
        return batch
    sizes = (batch.image_sizes * scale).long().clamp(min=1)
    height, width = (-(-int(side) // divisor) * divisor for side in sizes.amax(dim=0))
    images = batch.images.new_zeros((len(batch), batch.images.shape[1], height, width))
    for image, slot, (h, w), (new_h, new_w) in zip(
        batch.images, images, batch.image_sizes.tolist(), sizes.tolist(), strict=True
    ):
        resized = F.interpolate(image[None, :, :h, :w].float(), (new_h, new_w), mode="bilinear", antialias=scale < 1)[0]
        slot[:, :new_h, :new_w] = resized if images.is_floating_point() else resized.round()
    return replace(batch, images=images, image_sizes=sizes)


def mirror(batch: Batch) -> Batch:
    """The mirror image of each image of a batch, whose padding stays at the right; without ground truth."""
    column, width = torch.arange(batch.images.shape[-1], device=batch.images.device), batch.image_sizes[:, 1, None]
    source = torch.where(column < width, width - 1 - column, column)
    deep = batch.images.dtype == torch.uint16  # which PyTorch 2.11 does not gather, but the same bits as int16
    pixels = batch.images.view(torch.int16) if deep else batch.images
    mirrored = pixels.gather(3, source[:, None, None].expand_as(pixels))
    return replace(batch, images=mirrored.view(torch.uint16) if deep else mirrored)


def _mirror_back(detection: dict[str, Tensor], width: Tensor) -> dict[str, Tensor]:
    x1, y1, x2, y2 = detection["boxes"].unbind(-1)
    found = detection | {"boxes": torch.stack((width - x2, y1, width - x1, y2), dim=-1)}
    if "masks" in detection:
        found["masks"] = detection["masks"].flip(-1)
    return found
