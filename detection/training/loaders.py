"""Batches of any loader: a `Batch`, or images and targets in torchvision's form, which become one here, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from detection.batch import Batch, Target, pad_objects
from detection.boxes import resize_boxes
from detection.data.spectral import RGB, PixelFormat
from detection.evaluation.results import encode_masks
from detection.models.transform import check_images, check_targets
from detection.models.two_stage import FasterRCNN

WANTED = "a Batch, or a list of images and a list of targets (collate_fn=lambda batch: tuple(zip(*batch)))"


def as_batch(given: Any, detector: FasterRCNN, image_ids: Sequence[int], trains: bool) -> Batch:
    """What a loader gives as a `Batch`, resized by the detector's own transform.

    Args:
        given: a `Batch`, which is returned; or a pair of `(3, h, w)` images, float in [0, 1] or uint8, and of targets
            with `boxes` `(N, 4)` xyxy, `labels` `(N,)` from 1 on, and, if they like, `masks` `(N, h, w)`, `keypoints`
            `(N, k, 3)`, `iscrowd` `(N,)`, `area` `(N,)` in square pixels (else that of masks or boxes),
            `image_id`, `file_name`, and `checked` `(C,)` bool, the classes that were looked for in the image; or the
            images alone.
        detector: what is to train or detect.
        image_ids: for images whose target has no `image_id`; one an image, or more.
        trains: whether the batch is to train: then nothing of a crowd is learned, not even that it is background,
            and evaluation needs nothing.

    Raises:
        ValueError: it is something else, or what `check_images` and `check_targets` refuse.
    """
    if isinstance(given, Batch):
        return given
    images, targets = _images_and_targets(given)
    check_images(images, detector.transform.channels, detector.transform.image_depth)
    if targets is None:
        return detector.transform(images, None, detector.num_classes)
    check_targets(images, targets, detector.num_classes)
    wanted = {"masks": detector.has_masks, "keypoints": getattr(detector, "has_keypoints", False)}
    for name in (name for name, learned in wanted.items() if learned):
        if lacking := [i for i, target in enumerate(targets) if name not in target]:
            raise ValueError(f"the detector predicts {name}, but the target of image {lacking[0]} has none")
    names = ("boxes", "labels", *(name for name, learned in wanted.items() if learned))
    learned = [{name: target[name][~_crowd(target)] for name in names} for target in targets]
    batch = detector.transform(images, learned, detector.num_classes)
    batch = replace(batch, gt_ignored=_ignored(targets, batch), labelled=_labelled(targets, detector.num_classes - 1))
    rows = zip(images, targets, image_ids, strict=False)
    return replace(batch, targets=tuple(_target(*row, with_masks=detector.has_masks and not trains) for row in rows))


def _images_and_targets(given: Any) -> tuple[list[Tensor], list[dict[str, Any]] | None]:
    if isinstance(given, Sequence) and given and all(isinstance(image, Tensor) and image.ndim == 3 for image in given):
        return list(given), None
    if not isinstance(given, Sequence) or len(given) != 2 or not isinstance(given[1], Sequence):
        raise ValueError(f"a loader has given {type(given).__name__}: a batch is {WANTED}")
    if not all(isinstance(target, dict) for target in given[1]):
        raise ValueError(f"a loader has given targets that are no dictionaries: a batch is {WANTED}")
    return list(given[0]), list(given[1])


def _crowd(target: Mapping[str, Any]) -> Tensor:
    labels = target["labels"]
    return torch.as_tensor(target.get("iscrowd", torch.zeros_like(labels)), device=labels.device).bool()


def _ignored(targets: Sequence[Mapping[str, Any]], batch: Batch) -> Tensor | None:
    """The crowds of each image in pixels of the batch, `(B, I, 4)`, or None without any."""
    crowds = [target["boxes"].float()[_crowd(target)] for target in targets]
    sizes = zip(crowds, batch.original_sizes, batch.image_sizes, strict=True)
    moved = [resize_boxes(*row) for row in sizes]
    return pad_objects(moved, [boxes.new_zeros(len(boxes)) for boxes in moved])[0] if any(map(len, crowds)) else None


def _labelled(targets: Sequence[Mapping[str, Any]], num_classes: int) -> Tensor | None:
    """`(B, C)` bool, see `Batch`, or None where no target says it."""
    given = [target.get("checked") for target in targets]
    if all(flags is None for flags in given):
        return None
    rows = [torch.ones(num_classes) if flags is None else torch.as_tensor(flags) for flags in given]
    for i, flags in enumerate(rows):
        if flags.shape != (num_classes,):
            raise ValueError(f"image {i}: checked is {tuple(flags.shape)}, not one of each class, ({num_classes},)")
    return torch.stack([flags.bool() for flags in rows]).to(targets[0]["boxes"].device)


def _target(image: Tensor, target: Mapping[str, Any], number: int, with_masks: bool) -> Target:
    """What evaluation compares with, on the CPU, in the pixels of the image given."""
    boxes, masks = target["boxes"].float().cpu(), target.get("masks")
    areas = target.get("area")
    if areas is None:
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) if masks is None else (masks != 0).flatten(1).sum(dim=1)
    given = target.get("image_id", number)
    image_id = given if isinstance(given, str) else int(given)
    return Target(
        image_id=image_id,
        file_name=str(target.get("file_name", f"image {image_id}")),
        size=(image.shape[-2], image.shape[-1]),
        boxes=boxes,
        labels=target["labels"].cpu(),
        areas=torch.as_tensor(areas).float().cpu(),
        iscrowd=_crowd(target).cpu(),
        difficult=torch.zeros(len(boxes), dtype=torch.bool),
        masks=encode_masks(masks) if with_masks else None,
        keypoints=target["keypoints"].float().cpu() if "keypoints" in target else None,
        checked=None if target.get("checked") is None else torch.as_tensor(target["checked"]).bool().cpu(),
    )


def images_per_step(trainer: L.Trainer, images_per_batch: int | None) -> int:
    """Images that one optimiser step sees, over all devices and accumulated batches.

    Args:
        trainer: whose training loader knows the size of its batches, if `images_per_batch` is None.
        images_per_batch: on each device.

    Raises:
        ValueError: the loader doesn't say.
    """
    trainer.fit_loop.setup_data()  # which does nothing where the loader is there
    loader = trainer.train_dataloader
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        images_per_batch = images_per_batch or getattr(holder, "batch_size", None)
    if not images_per_batch:
        raise ValueError(
            f"the training loader ({type(loader).__name__}) doesn't say how many images a batch has, by which model.lr "
            "is scaled: give DetectionModule(images_per_batch=...), those on each device"
        )
    return int(images_per_batch * trainer.world_size * trainer.accumulate_grad_batches)


def image_format(trainer: L.Trainer) -> PixelFormat:
    """Channels and depth of the files in `image_folder`."""
    form = getattr(getattr(trainer.val_dataloaders, "dataset", None), "form", None)
    return form if isinstance(form, PixelFormat) else RGB


def image_folder(trainer: L.Trainer) -> Path | None:
    """Folder of the validation images, to which `Target.file_name` is relative; None with loaders that have none."""
    root = getattr(getattr(trainer.val_dataloaders, "dataset", None), "root", None)
    return root if isinstance(root, Path) else None
