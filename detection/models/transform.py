"""From images as users have them to a normalised, padded batch.

Shape shorthand:
    B: images     H, W: padded height and width     h, w: one image's own     N: objects of one image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.batch import Batch, check_images, check_targets, pad_images, pad_keypoints, pad_masks, pad_objects
from detection.boxes import resize_boxes, resize_keypoints
from detection.recipes import recorded
from detection.resizing import Resizing, resize_tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@recorded
class ImageTransform(nn.Module):
    """Resizes, normalises and pads.

    Args:
        min_size: pixels of the shorter side after resizing. Of several, training draws one for each image and
            evaluation takes the last.
        max_size: most pixels of the longer side; where both can't be had, the shorter side is smaller than `min_size`.
        image_mean, image_std: of each channel, as a rule RGB, in [0, 1].
        size_divisible: padded sides are multiples of this.
        image_depth: bits of a channel of the images that it was trained on, 8 or 16: of integers others are refused.
        resizing: which library's rounding of the sides, and filter; see `detection.resizing`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        size_divisible: int = 32,
        image_depth: int = 8,
        resizing: Resizing = "torchvision",
    ) -> None:
        super().__init__()
        self.min_size = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        self.max_size = max_size
        self.size_divisible = size_divisible
        self.channels, self.image_depth, self.resizing = len(image_mean), image_depth, resizing
        # Not in the state_dict, whose keys are torchvision's.
        self.register_buffer("mean", torch.tensor(image_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None, num_classes: int) -> Batch:
        """Check, resize and pad `(C, h, w)` images and their targets; the images are not normalised yet.

        Raises:
            ValueError: see `check_images` and `check_targets`.
        """
        check_images(images, self.channels, self.image_depth)
        if targets is not None:
            check_targets(images, targets, num_classes)
        device = images[0].device
        resized = [self._resize(as_float(image)) for image in images]
        padded, image_sizes = pad_images(resized, self.size_divisible)
        original_sizes = torch.tensor([image.shape[-2:] for image in images])
        sizes = (image_sizes.to(device), original_sizes.to(device))
        boxes = [image.new_zeros((0, 4)) for image in resized]
        labels = [torch.zeros(0, dtype=torch.int64, device=device) for _ in images]
        if targets is not None:
            boxes = [resize_boxes(t["boxes"].float(), o, n) for t, n, o in zip(targets, *sizes, strict=True)]
            labels = [target["labels"] for target in targets]
        batch = Batch(padded, sizes[0], *pad_objects(boxes, labels), original_sizes=sizes[1])
        if targets is not None and "keypoints" in targets[0]:
            moved = [resize_keypoints(t["keypoints"], o, n) for t, n, o in zip(targets, *sizes, strict=True)]
            batch = replace(batch, gt_keypoints=pad_keypoints(moved, batch.gt_valid.shape[1]))
        if targets is None or "masks" not in targets[0]:
            return batch
        masks = [_resize_masks(t["masks"], image) for t, image in zip(targets, resized, strict=True)]
        windows = [
            F.pad(size.flip(0).float(), (2, 0)).expand(len(m), 4) for m, size in zip(masks, sizes[0], strict=True)
        ]
        gt_masks, gt_windows = pad_masks(masks, windows, batch.gt_valid.shape[1])
        return replace(batch, gt_masks=gt_masks, gt_mask_windows=gt_windows)

    def normalise(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """`(B, C, H, W)` uint8 or uint16, or float in [0, 1] -> zero mean and unit variance, 0 in the padding."""
        normalised = (as_float(images) - self.mean) / self.std
        row = torch.arange(images.shape[-2], device=images.device)[None, :, None] < image_sizes[:, 0, None, None]
        column = torch.arange(images.shape[-1], device=images.device)[None, None, :] < image_sizes[:, 1, None, None]
        return (normalised * (row & column)[:, None]).contiguous(memory_format=torch.channels_last)

    def _resize(self, image: Tensor) -> Tensor:
        pick = int(torch.randint(len(self.min_size), ())) if self.training and len(self.min_size) > 1 else -1
        return resize_tensor(image, self.min_size[pick], self.max_size, self.resizing)


def _resize_masks(masks: Tensor, image: Tensor) -> Tensor:
    """Masks `(N, h, w)` in the size of the resized image, by nearest neighbour: uint8, 255 where the object is."""
    resized = F.interpolate(masks[:, None].float(), size=image.shape[-2:])[:, 0]
    return (resized != 0).to(torch.uint8) * 255


def as_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] or uint16 in [0, 65535] -> float32 in [0, 1]; floating point as float32."""
    return images.float() / {torch.uint8: 255, torch.uint16: 65535}.get(images.dtype, 1)
