"""From images as users have them to a normalised, padded batch; and the checks of what they hand over.

Shape shorthand:
    B: images     H, W: padded height and width     h, w: one image's own     N: objects of one image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.batch import Batch, pad_images, pad_masks, pad_objects
from detection.boxes import resize_boxes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageTransform(nn.Module):
    """Resizes, normalises and pads.

    Args:
        min_size: the shorter side that images are resized to; of several, one is drawn for each image in training and
            the last is taken in evaluation.
        max_size: the longer side's limit, which wins over `min_size`.
        image_mean, image_std: of RGB in [0, 1].
        size_divisible: padded sides are multiples of this.
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
    ) -> None:
        super().__init__()
        self.min_size = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        self.max_size = max_size
        self.size_divisible = size_divisible
        # Not in the state_dict, whose keys are torchvision's.
        self.register_buffer("mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None, num_classes: int) -> Batch:
        """Check, resize and pad `(3, h, w)` images and their targets; the images are not normalised yet.

        Raises:
            ValueError: see `check_images` and `check_targets`.
        """
        check_images(images)
        if targets is not None:
            check_targets(images, targets, num_classes)
        device = images[0].device
        resized = [self._resize(as_float(image)) for image in images]
        padded, image_sizes = pad_images(resized, self.size_divisible)
        original_sizes = torch.tensor([image.shape[-2:] for image in images])
        boxes = [image.new_zeros((0, 4)) for image in resized]
        labels = [torch.zeros(0, dtype=torch.int64, device=device) for _ in images]
        if targets is not None:
            boxes = [
                resize_boxes(target["boxes"].float(), old.to(device), new.to(device))
                for target, old, new in zip(targets, original_sizes, image_sizes, strict=True)
            ]
            labels = [target["labels"] for target in targets]
        sizes = (image_sizes.to(device), original_sizes.to(device))
        batch = Batch(padded, sizes[0], *pad_objects(boxes, labels), original_sizes=sizes[1])
        if targets is None or "masks" not in targets[0]:
            return batch
        masks = [_resize_masks(t["masks"], image) for t, image in zip(targets, resized, strict=True)]
        windows = [
            F.pad(size.flip(0).float(), (2, 0)).expand(len(m), 4) for m, size in zip(masks, sizes[0], strict=True)
        ]
        gt_masks, gt_windows = pad_masks(masks, windows, batch.gt_valid.shape[1])
        return replace(batch, gt_masks=gt_masks, gt_mask_windows=gt_windows)

    def normalise(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """`(B, 3, H, W)` uint8, or float in [0, 1] -> zero mean and unit variance, 0 in the padding."""
        normalised = (as_float(images) - self.mean) / self.std
        row = torch.arange(images.shape[-2], device=images.device)[None, :, None] < image_sizes[:, 0, None, None]
        column = torch.arange(images.shape[-1], device=images.device)[None, None, :] < image_sizes[:, 1, None, None]
        normalised = normalised * (row & column)[:, None]
        return normalised.contiguous(memory_format=torch.channels_last)

    def _resize(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        pick = int(torch.randint(len(self.min_size), ())) if self.training and len(self.min_size) > 1 else -1
        scale = min(self.min_size[pick] / min(height, width), self.max_size / max(height, width))
        return F.interpolate(
            image[None], scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=True
        )[0]


def _resize_masks(masks: Tensor, image: Tensor) -> Tensor:
    """Masks `(N, h, w)` to the size of the resized image, each pixel the nearest: uint8, 255 where the object is."""
    resized = F.interpolate(masks[:, None].float(), size=image.shape[-2:])[:, 0]
    return (resized != 0).to(torch.uint8) * 255


def as_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [0, 1]; floating point as float32."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def check_images(images: Sequence[Tensor]) -> None:
    """Raise a ValueError that names the first image which can't be one: wrong type, shape, range, or not finite."""
    if isinstance(images, Tensor) or not isinstance(images, Sequence):
        raise ValueError(f"images must be a list of (3, h, w) tensors, not {type(images).__name__}: use list(images)")
    if not images:
        raise ValueError("the list of images is empty: give at least one (3, h, w) tensor")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or min(image.shape) < 1:
            found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {i} must be a (3, h, w) tensor in RGB order, not {found}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"image {i} is {image.dtype}: give uint8 in [0, 255] or float in [0, 1]")
        if image.is_floating_point():
            peak = float(image.abs().amax())
            # Images that were normalised already stay within a few units; only 0 to 255 is far outside.
            if not peak <= 16:
                wrong = "holds NaN or infinity" if peak != peak or peak == float("inf") else f"reaches {peak:g}"
                raise ValueError(f"image {i} {wrong}: float images must be in [0, 1] (divide by 255, or give uint8)")


def check_targets(images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], num_classes: int) -> None:
    """Raise a ValueError that names the first image and box that can't be trained on.

    Boxes may pass the image's edge by up to a pixel, as rounded annotations do.
    """
    if len(targets) != len(images):
        raise ValueError(f"there are {len(images)} images but {len(targets)} targets")
    needed = {"boxes", "labels"} | ({"masks"} if any("masks" in target for target in targets) else set())
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        missing = needed - set(target)
        if missing:
            raise ValueError(f"the target of image {i} has no {' and no '.join(sorted(missing))}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[-1] != 4:
            raise ValueError(f"image {i}: boxes must be (N, 4) as x1, y1, x2, y2, not {tuple(boxes.shape)}")
        if labels.shape != boxes.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"image {i}: labels must be ({len(boxes)},) integers, not {tuple(labels.shape)} {labels.dtype}"
            )
        height, width = image.shape[-2:]
        masks = target.get("masks")
        if masks is not None and masks.shape != (len(boxes), height, width):
            raise ValueError(
                f"image {i}: masks must be one of the image's size for each box, {(len(boxes), height, width)}, "
                f"not {tuple(masks.shape)}"
            )
        problems = {
            "is not finite": ~boxes.isfinite().all(dim=1),
            "has no positive width and height (boxes are x1, y1, x2, y2)": (boxes[:, 2:] <= boxes[:, :2]).any(dim=1),
            f"lies outside the image of {width} x {height} pixels": (boxes[:, :2] < -1).any(dim=1)
            | (boxes[:, 2] > width + 1)
            | (boxes[:, 3] > height + 1),
            f"has a label outside 1 to {num_classes - 1} (0 is background)": (labels < 1) | (labels >= num_classes),
        }
        wrong = torch.stack(list(problems.values())).cpu()
        if wrong.any():
            kind, box = next((k, int(row.nonzero()[0])) for k, row in zip(problems, wrong, strict=True) if row.any())
            raise ValueError(f"image {i}, box {box} {kind}: box {boxes[box].tolist()}, label {int(labels[box])}")
