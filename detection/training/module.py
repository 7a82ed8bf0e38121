"""The LightningModule around a detector: optimiser, schedule, steps and logging."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import lightning as L
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from detection.batch import Batch, check_batch
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.results import encode_masks
from detection.models.fast import accelerate
from detection.models.masks import paste_masks
from detection.models.two_stage import FasterRCNN
from detection.recipes import rebuild
from detection.weights import check_sums, readable

log = logging.getLogger(__name__)

REFERENCE_BATCH = 16  # images: the batch that published learning rates are for


class DetectionModule(L.LightningModule):
    """Trains and evaluates a detector.

    The learning rate is stated for 16 images and scaled in proportion to those of one optimiser step over all devices
    and accumulated batches (Goyal et al. 2017, section 2.1); it rises linearly over `warmup_steps` first.

    Args:
        detector: the model; its `num_classes` is one more than there are class names.
        class_names: of the foreground, label 1 first. On the command line they come from the data.
        optimizer: `sgd` or `adamw`.
        lr: learning rate for a batch of 16 images.
        momentum: of SGD; the first moment's decay of AdamW.
        weight_decay: on weights; biases and normalisation have none.
        schedule: `cosine` falls to 0 at the end; `multistep` divides by 10 at the milestones.
        milestones: of `multistep`, as fractions of all steps (8 and 11 of 12 epochs: the 1x schedule).
        warmup_steps: optimiser steps of linear rise from a thousandth.
        detections_per_img: most detections of an image that evaluation counts.
        grad_checkpointing: keep less of the backbone for the backward pass and compute the rest again there: fewer
            gigabytes for about a third more time.
        fast: run the quicker forms of parts, see `detection.models.fast`; false runs the plain ones, which the papers
            describe, with the same results.
        compile: train with `torch.compile` on the dense parts, see `compile_parts`; checkpoints stay the same.

    Raises:
        ValueError: the detector doesn't fit the classes, or its backbone can't compute its activations again.
    """

    def __init__(
        self,
        detector: FasterRCNN,
        class_names: Sequence[str],
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: Literal["cosine", "multistep"] = "cosine",
        milestones: Sequence[float] = (8 / 12, 11 / 12),
        warmup_steps: int = 100,
        detections_per_img: int = 100,
        grad_checkpointing: bool = False,
        compile: bool = False,
        fast: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(detector, Mapping):  # from a checkpoint, which keeps plain values only
            detector = rebuild(detector)
        if detector.num_classes != len(class_names) + 1:
            raise ValueError(
                f"the detector has {detector.num_classes} classes with background, but the data has "
                f"{len(class_names)} without: build it with num_classes={len(class_names) + 1}"
            )
        settings = {name: value for name, value in locals().items() if name not in ("self", "detector", "__class__")}
        settings |= {"class_names": list(class_names), "milestones": list(milestones)}
        self.save_hyperparameters({"detector": detector.recipe, **settings} if detector.recipe else settings)
        self.detector = detector
        self.class_names = list(class_names)
        self.optimizer_name, self.lr, self.momentum, self.weight_decay = optimizer, lr, momentum, weight_decay
        self.schedule, self.milestones, self.warmup_steps = schedule, tuple(milestones), warmup_steps
        self.metric = MeanAP(self.class_names, detections_per_img, ("bbox", "segm") if detector.has_masks else "bbox")
        self.compiled, self.fast = compile, fast
        if grad_checkpointing:
            checkpoint_activations(detector)
        self.step_losses: dict[str, Tensor] = {}  # of the newest training step, for those who look for what went wrong

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **options: Any) -> Self:  # type: ignore[override]
        """The module of a checkpoint, which says how to rebuild it; nothing but tensors and plain values is unpickled.

        Raises:
            CheckpointError: the file is damaged, foreign, or names anything but parts of this package.
            FileNotFoundError: there is none.
        """
        with readable(checkpoint_path):
            check_sums(checkpoint_path)
            return super().load_from_checkpoint(checkpoint_path, **{"weights_only": True} | options)

    def forward(self, images: Batch | Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of each image, in its own pixels."""
        return self.detector(images)  # type: ignore[return-value]

    def setup(self, stage: str) -> None:
        """Refuse to learn masks from data that is read without them; compile what is to be trained."""
        data = getattr(self.trainer, "datamodule", None)
        if stage != "predict" and self.detector.has_masks and data is not None and not data.hparams["masks"]:
            raise ValueError("the detector predicts masks but the data is read without: set data.masks to true")
        if self.fast:
            accelerate(self.detector, self.trainer.strategy.root_device)
        if self.compiled and stage == "fit":
            compile_parts(self.detector)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Check the ground truth while it is still on the CPU, where looking at values costs nothing."""
        check_batch(batch, self.detector.num_classes)
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, _ = self.detector.run(batch, with_losses=True, with_detections=False)
        total = torch.stack(list(losses.values())).sum()
        self.step_losses = {name: value.detach() for name, value in losses.items()}
        self.log_dict({f"train/{name}": value for name, value in self.step_losses.items()}, batch_size=len(batch))
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(batch))
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        """Detections of each image in original pixels; masks as COCO RLE, which is a thousandth of their size."""
        return encode_detections(self.detector.run(batch, with_losses=False, with_detections=True)[1], batch)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        losses, detections = self.detector.run(batch, with_losses=True, with_detections=True)
        losses["loss"] = torch.stack(list(losses.values())).sum()
        logged = {f"{stage}/{name}": value for name, value in losses.items()}
        self.log_dict(logged, batch_size=len(batch), on_epoch=True, sync_dist=True)
        self.metric.update(encode_detections(detections, batch), batch.targets)

    def on_validation_epoch_start(self) -> None:
        self.metric.reset()  # here and not at the end: callbacks show what it holds

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_start(self) -> None:
        self.metric.reset()

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, stage: str) -> None:
        """Log the figures of the epoch. The sanity check sees too few images for them to mean anything."""
        if self.trainer.sanity_checking:
            return
        figures = self.metric.compute()
        values = {f"{stage}/{name.removeprefix('bbox_')}": value for name, value in figures.items()}
        # COCO says -1 where there is no object of a size; in a chart that would be a figure.
        self.log_dict({name: value for name, value in values.items() if value >= 0 or name == f"{stage}/map"})
        self.log(f"{stage}_map", values[f"{stage}/map"], prog_bar=True, logger=False)
        for kind, prefix in zip(self.metric.iou_type, ("ap", "segm_ap"), strict=False):
            of_classes = self.metric.per_class(kind)  # type: ignore[arg-type]
            self.log_dict({f"{stage}/{prefix}/{name}": value for name, value in of_classes.items()})

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimiser with scaled learning rate and, each step, the warm-up and the schedule."""
        images = images_per_step(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]
        lr = self.lr * images / REFERENCE_BATCH
        steps = int(self.trainer.estimated_stepping_batches)
        log.info("learning rate %g: %g for 16 images, scaled to %d a step; %d steps", lr, self.lr, images, steps)
        optimizer = self._build_optimizer(lr)
        scheduler = LambdaLR(optimizer, lambda step: self._lr_factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _build_optimizer(self, lr: float) -> Optimizer:
        groups = parameter_groups(self.detector, self.weight_decay)
        if self.optimizer_name == "adamw":
            return AdamW(groups, lr=lr, betas=(self.momentum, 0.999), fused=True)
        return SGD(groups, lr=lr, momentum=self.momentum, fused=True)

    def _lr_factor(self, step: int, steps: int) -> float:
        warmup = min(self.warmup_steps, max(1, steps // 2))
        rise = min(1.0, 0.001 + 0.999 * step / warmup)
        if self.schedule == "multistep":
            return rise * 0.1 ** sum(step >= milestone * steps for milestone in self.milestones)
        done = max(0, step - warmup) / max(1, steps - warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def images_per_step(trainer: L.Trainer, data: L.LightningDataModule) -> int:
    """Images that one optimiser step sees, over all devices and accumulated batches."""
    return int(data.hparams["batch_size"] * trainer.world_size * trainer.accumulate_grad_batches)


def checkpoint_activations(detector: FasterRCNN) -> None:
    """Let the backbone's body compute its activations again in the backward pass; a ValueError if it can't."""
    try:
        detector.backbone.body.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:  # timm's networks that can't have an assertion
        kind = type(getattr(detector.backbone.body, "network", detector.backbone.body)).__name__
        raise ValueError(
            f"the backbone's {kind} can't compute its activations again: leave model.grad_checkpointing out, and lower "
            "data.batch_size if memory is short"
        ) from error


def compile_parts(detector: FasterRCNN, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile, in place and without new names in the `state_dict`, what does the same arithmetic on every image.

    Backbone with pyramid, the RPN's convolutions, and box and mask heads. What picks boxes (matching, sampling, NMS)
    stays as it is. One graph serves batches of all sizes, but for backbones with TensorFlow's padding (EfficientNet),
    which follows from the size: they have a graph for each size, and beyond eight run as they are.

    Args:
        detector: whose parts are compiled.
        backend: of `torch.compile`.
    """
    by_size = any(isinstance(m, Conv2dSame) or getattr(m, "pads_same", False) for m in detector.backbone.modules())
    detector.backbone.compile(backend=backend, dynamic=not by_size)
    for name, part in detector.named_modules():
        if name == "rpn.head":
            part.compile(backend=backend, dynamic=True)
        elif name.endswith(("box_head", "box_predictor", "mask_head", "mask_predictor")):
            part.compile(backend=backend)


def encode_detections(detections: list[dict[str, Any]], batch: Batch) -> list[dict[str, Any]]:
    """What `FasterRCNN.run` found, with its small masks laid on the images and packed as COCO RLE, a few at a time."""
    for detection, (height, width) in zip(detections, batch.original_sizes.tolist(), strict=True):
        if "masks" in detection:
            parts = zip(detection["masks"].split(16), detection["boxes"].split(16), strict=True)
            laid = (paste_masks(masks, boxes, (height, width)) for masks, boxes in parts)
            detection["masks"] = [mask for masks in laid for mask in encode_masks(masks)]
    return detections


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and kernels with weight decay; biases and normalisation without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
