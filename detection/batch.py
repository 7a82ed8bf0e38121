"""What crosses from data to model: `Target` (one image's ground truth) and `Batch` (a padded stack of images).

Shape shorthand:
    B: images in the batch     H, W: padded height and width     N: objects of one image
    G: objects an image, padded to the largest count of the batch     P: proposals an image, likewise
    m, n: height and width of a stored mask     k: key points of an object     C: classes without background
    I: ignore regions, likewise
Boxes are `(x1, y1, x2, y2)` float32 pixels; label 0 is background and never appears in ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

Id: TypeAlias = int | str  # of an image or a category, as the annotation file spells it


@dataclass(frozen=True, slots=True)
class Target:
    """Ground truth of one image, in the *original* pixels of its file: what evaluation compares with.

    Attributes:
        image_id: the id of the image, as the annotation file spells it.
        file_name: path of the image relative to the data root, for messages and exports.
        size: `(height, width)` of the original image in pixels.
        boxes: `(N, 4)` float32 xyxy.
        labels: `(N,)` int64 in `[1, C]`.
        areas: `(N,)` float32, the annotation's area in original pixels (mask area where there is one, as COCO has it).
        iscrowd: `(N,)` bool, COCO crowd regions and ignore regions: matched as "ignore", never trained on.
        difficult: `(N,)` bool, VOC difficult objects: ignored by VOC evaluation, by default not trained on.
        masks: one COCO RLE dictionary (`{"size": [h, w], "counts": bytes}`) an object, or None without masks.
        checked: `(C,)` bool, the classes that were looked for in the image, or None for all. Detections of the others
            are not counted.
        partial: `(C,)` bool, the classes of which some objects may not be annotated, or None for none. Detections of
            these that match no object are not counted.
        keypoints: `(N, k, 3)` float32 x, y and visibility as COCO has it (0: not annotated, 1: hidden, 2: visible), or
            None without key points.
    """

    image_id: Id
    file_name: str
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    areas: Tensor
    iscrowd: Tensor
    difficult: Tensor
    masks: list[dict[str, Any]] | None = None
    checked: Tensor | None = None
    partial: Tensor | None = None
    keypoints: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Images padded to one size, with the ground truth to train on in the pixels of those images.

    Attributes:
        images: `(B, 3, H, W)` uint8 RGB, each image in the top left corner, zeros to its right and below. Of data with
            other channels `(B, C, H, W)`, of 16-bit data uint16.
        image_sizes: `(B, 2)` int64, `(height, width)` of each image without padding.
        gt_boxes: `(B, G, 4)` float32 xyxy in the pixels of `images`; rows that are not valid hold zeros.
        gt_labels: `(B, G)` int64 in `[1, C]`; 0 where not valid.
        gt_valid: `(B, G)` bool, which rows are objects. Crowds and (by default) difficult objects are left out.
        original_sizes: `(B, 2)` int64, `(height, width)` of the image files, to which detections are scaled back.
        targets: the un-augmented ground truth of each image, for evaluation; stays on the CPU.
        gt_masks: `(B, G, m, n)` uint8, how much of each pixel the object covers (255: all), or None without masks.
            Each mask shows a window of the image around its object, so that all masks can have one small size.
        gt_mask_windows: `(B, G, 4)` float32 xyxy in the pixels of `images`: the window of each mask. Outside of its
            window an object covers nothing.
        gt_keypoints: `(B, G, k, 3)` float32 x, y in the pixels of `images`, and visibility (see `Target`), or None
            without key points; rows that are not valid hold zeros.
        proposals: `(B, P, 4)` float32 xyxy in the pixels of `images`, best first, or None, for detectors that learn
            none themselves; rows that are not valid hold zeros.
        proposals_valid: `(B, P)` bool.
        gt_ignored: `(B, I, 4)` float32 xyxy in the pixels of `images`, or None: ignore regions and crowds, in which
            background is not taught; padding holds zeros.
        labelled: `(B, C)` bool, or None for all: the classes that were looked for in each image and of which all
            objects are annotated. Background may be an object of the others.
        objects_given, objects_dropped: how many objects went into the augmentation, and how many did not come out.
        unreadable: the error of each image that could not be read; another image has taken its place.
        tile_corners: `(B, 2)` int64 x, y, or None. Where they are given, `images` are the tiles of a single image, for
            evaluation: each begins at this pixel of it, `original_sizes` are those of the tiles, `targets` is its own.
    """

    images: Tensor
    image_sizes: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor
    gt_valid: Tensor
    original_sizes: Tensor
    targets: tuple[Target, ...] = ()
    gt_masks: Tensor | None = None
    gt_mask_windows: Tensor | None = None
    gt_keypoints: Tensor | None = None
    proposals: Tensor | None = None
    proposals_valid: Tensor | None = None
    gt_ignored: Tensor | None = None
    labelled: Tensor | None = None
    objects_given: int = 0
    objects_dropped: int = 0
    unreadable: tuple[str, ...] = ()
    tile_corners: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def _map(self, convert: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: convert(v) for name, v in values.items() if isinstance(v, Tensor)})

    def split(self, count: int = 1) -> list[Batch]:
        """Each image, or so many, as a batch of its own, on the same memory and with the same padding."""
        rows = [slice(i, i + count) for i in range(0, len(self), count)]
        return [replace(self._map(lambda t, row=row: t[row]), targets=self.targets[row]) for row in rows]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with its tensors on `device`; Lightning calls this to move a batch."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the DataLoader calls this when `pin_memory=True`."""
        return self._map(lambda tensor: tensor.pin_memory())


def pad_images(images: Sequence[Tensor], divisor: int = 32) -> tuple[Tensor, Tensor]:
    """Stack images of different sizes: zeros on the right and below, sides rounded up to a multiple of `divisor`.

    Args:
        images: `(C, h, w)` tensors of one dtype.
        divisor: the coarsest stride of the backbone, so that every level divides evenly.

    Returns:
        images `(B, C, H, W)` of the same dtype and image sizes `(B, 2)` int64 as (height, width).
    """
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    padded = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    for i, image in enumerate(images):  # by index: the views of an iteration would refuse images that need gradients
        padded[i, :, : image.shape[-2], : image.shape[-1]].copy_(image)
    return padded, torch.tensor(sizes, dtype=torch.int64)


def pad_objects(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Stack ragged ground truth to the largest count of the batch (at least 1, so that no dimension is empty).

    Args:
        boxes: `(N_i, 4)` xyxy for each image.
        labels: `(N_i,)` for each image.

    Returns:
        gt_boxes `(B, G, 4)` float32, gt_labels `(B, G)` int64 and gt_valid `(B, G)` bool.
    """
    count = max(1, *(len(b) for b in boxes)) if boxes else 1
    device = boxes[0].device if boxes else None
    gt_boxes = torch.zeros((len(boxes), count, 4), device=device)
    gt_labels = torch.zeros((len(boxes), count), dtype=torch.int64, device=device)
    gt_valid = torch.zeros((len(boxes), count), dtype=torch.bool, device=device)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        gt_boxes[i, : len(box)], gt_labels[i, : len(box)] = box, label
        gt_valid[i, : len(box)].fill_(True)
    return gt_boxes, gt_labels, gt_valid


def pad_masks(masks: Sequence[Tensor], windows: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Stack ragged masks to `count` objects an image and, where images differ, to the largest height and width.

    Args:
        masks: `(N_i, m_i, n_i)` uint8 for each image.
        windows: `(N_i, 4)` for each image; those of full-size masks are the whole of their image.
        count: G of `pad_objects`.

    Returns:
        gt_masks `(B, G, m, n)` uint8, and gt_mask_windows `(B, G, 4)` float32, each larger by as much as its mask.
    """
    height, width = (max(mask.shape[d] for mask in masks) for d in (1, 2))
    gt_masks = masks[0].new_zeros((len(masks), count, height, width))
    gt_windows = windows[0].new_zeros((len(masks), count, 4))
    for i, (mask, window) in enumerate(zip(masks, windows, strict=True)):
        n, h, w = mask.shape
        # In the padding the last row and column are repeated once, where there is room: a bilinear sample at the edge
        # of a mask then mixes the mask with itself, and not with the zeros beside it.
        rows, columns = (
            torch.arange(min(h + 1, height)).clamp(max=h - 1),
            torch.arange(min(w + 1, width)).clamp(max=w - 1),
        )
        gt_masks[i, :n, : len(rows), : len(columns)] = mask[:, rows][:, :, columns]
        pixel = (window[:, 2:] - window[:, :2]) / window.new_tensor([w, h])
        gt_windows[i, :n] = torch.cat((window[:, :2], window[:, :2] + pixel * pixel.new_tensor([width, height])), dim=1)
    return gt_masks, gt_windows


def pad_keypoints(keypoints: Sequence[Tensor], count: int) -> Tensor:
    """Stack ragged key points to `count` objects an image: `(N_i, k, 3)` for each -> `(B, count, k, 3)` float32."""
    padded = keypoints[0].new_zeros((len(keypoints), count, *keypoints[0].shape[1:]), dtype=torch.float32)
    for slot, points in zip(padded, keypoints, strict=True):
        slot[: len(points)] = points
    return padded


def check_batch(batch: Batch, num_classes: int) -> None:
    """Raise a ValueError that names the first image and object of a batch on the CPU that can't be trained on.

    Args:
        batch: as `collate` makes it.
        num_classes: classes with background.
    """
    boxes, labels = batch.gt_boxes, batch.gt_labels
    limit = batch.image_sizes[:, None, [1, 0]] + 1
    problems = {
        "is not finite": ~boxes.isfinite().all(dim=-1),
        "has no positive width and height": (boxes[..., 2:] <= boxes[..., :2]).any(dim=-1),
        "lies outside its image": (boxes[..., :2] < -1).any(dim=-1) | (boxes[..., 2:] > limit).any(dim=-1),
        f"has a label outside 1 to {num_classes - 1}": (labels < 1) | (labels >= num_classes),
    }
    for problem, wrong in problems.items():
        found = (wrong & batch.gt_valid).nonzero().tolist()
        if found:
            image, box = found[0]
            named = batch.targets if batch.tile_corners is None else batch.targets * len(batch)
            name = named[image].file_name if named else f"image {image}"
            values = [round(value, 2) for value in boxes[image, box].tolist()]
            raise ValueError(f"{name}: object {box} {problem}: box {values}, label {int(labels[image, box])}")


def check_images(images: Sequence[Tensor], channels: int = 3, depth: int = 8) -> None:
    """Raise a ValueError that names the first image which can't be one: wrong type, shape, range, or not finite.

    Args:
        images: `(channels, h, w)` tensors, float in [0, 1], or integers of `depth` bits.
        channels, depth: of the detector.
    """
    shape, order = f"({channels}, h, w)", " in RGB order" if channels == 3 else ""
    integers, highest = (torch.uint16, 65535) if depth == 16 else (torch.uint8, 255)
    name = str(integers).removeprefix("torch.")
    if isinstance(images, Tensor) or not isinstance(images, Sequence):
        raise ValueError(f"images must be a list of {shape} tensors, not {type(images).__name__}: use list(images)")
    if not images:
        raise ValueError(f"the list of images is empty: give at least one {shape} tensor")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != channels or min(image.shape) < 1:
            found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {i} must be a {shape} tensor{order}, not {found}")
        if image.dtype != integers and not image.is_floating_point():
            raise ValueError(f"image {i} is {image.dtype}: give {name} in [0, {highest}] or float in [0, 1]")
        if image.is_floating_point():
            peak = float(image.detach().abs().amax())
            # Images that were normalised already stay within a few units; only 0 to 255 is far outside.
            if not peak <= 16:
                wrong = "holds NaN or infinity" if peak != peak or peak == float("inf") else f"reaches {peak:g}"
                raise ValueError(
                    f"image {i} {wrong}: float images must be in [0, 1] (divide by {highest}, or give {name})"
                )


def check_targets(images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], num_classes: int) -> None:
    """Raise a ValueError that names the first image and box that can't be trained on.

    Boxes may pass the image's edge by up to a pixel, as rounded annotations do.
    """
    if len(targets) != len(images):
        raise ValueError(f"there are {len(images)} images but {len(targets)} targets")
    given = {name for name in ("masks", "keypoints") if any(name in target for target in targets)}
    needed = {"boxes", "labels"} | given
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        missing = needed - set(target)
        if missing:
            raise ValueError(f"the target of image {i} has no {' and no '.join(sorted(missing))}")
        for name in sorted(needed):
            if not isinstance(target[name], Tensor):
                raise ValueError(f"image {i}: {name} must be a tensor, not {type(target[name]).__name__}")
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
        if "keypoints" in target:
            _check_keypoints(i, target["keypoints"], len(boxes), targets[0]["keypoints"].shape[1:])
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


def _check_keypoints(image: int, keypoints: Tensor, count: int, first: Sequence[int]) -> None:
    """Raise a ValueError where the key points of an image are not `(count, k, 3)`, of `first` `(k, 3)`, and finite."""
    if keypoints.ndim != 3 or len(keypoints) != count or keypoints.shape[2] != 3:
        raise ValueError(
            f"image {image}: keypoints must be ({count}, k, 3) as x, y and visibility, one row for each box, not "
            f"{tuple(keypoints.shape)}"
        )
    if keypoints.shape[1:] != first:
        raise ValueError(
            f"image {image} has {keypoints.shape[1]} key points an object, image 0 has {first[0]}: give all objects "
            "the same, those that an object lacks with visibility 0"
        )
    points, visible = keypoints[..., :2], keypoints[..., 2]
    wrong = ~keypoints.isfinite().all(dim=-1) | (visible < 0) | (visible > 2)
    if wrong.any():
        row, point = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"image {image}, box {row}, key point {point} is not finite, or its visibility is not 0, 1 or 2: "
            f"{points[row, point].tolist()}, visibility {float(visible[row, point])}"
        )
