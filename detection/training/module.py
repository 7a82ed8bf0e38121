"""The LightningModule around a detector: steps, metrics and logging; what moves the weights is in `optimisation`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor
from torch.optim import SGD
from torchmetrics import Metric

from detection.batch import Batch, check_batch
from detection.commit import code_version
from detection.drift import present_recipe
from detection.evaluation.mean_ap import MeanAP
from detection.imbalance import sums_of, take_sums
from detection.interop.files import take_sizes
from detection.models.fast import REPEATABLE, accelerate, exchange
from detection.models.transform import ImageTransform
from detection.models.two_stage import FasterRCNN
from detection.recipes import describe, rebuild
from detection.training.agreement import check_form, check_targets
from detection.training.changes import check_changes, check_groups, steps_by_time, take_rates, total_steps
from detection.training.checkpoints import WholeFiles, announce_parts
from detection.training.compiling import checkpoint_activations, compile_parts
from detection.training.encoding import encode_detections, grid_of, kinds_of
from detection.training.freezing import Freeze, Freezing, share_anew
from detection.training.loaders import as_batch, images_per_step
from detection.training.monitors import check_monitors, known_figures
from detection.training.optimisation import (
    CosineSchedule,
    OptimizerFactory,
    Schedule,
    build_optimizer,
    build_scheduler,
    check_prefixes,
    layer_scales,
    parameter_groups,
    settings_of,
    translated,
)
from detection.training.own_metrics import OwnMetrics
from detection.training.precision import choose_precision
from detection.training.storable import check_states
from detection.training.tile_batches import run_in_parts
from detection.trust import RecipeError, trusting
from detection.weights import NO_RECIPE, CheckpointError, check_sums, readable

log = logging.getLogger(__name__)

WITHOUT_RECIPE = f"{NO_RECIPE} (DetectionModule.load_from_checkpoint(path, detector=detector))"
REFERENCE_BATCH = 16  # images: the batch that published learning rates are for


class DetectionModule(L.LightningModule):
    """Trains and evaluates a detector, with the loaders of any LightningDataModule or plain ones.

    The learning rate is stated for 16 images and scaled in proportion to those of one optimiser step over all devices
    and accumulated batches (Goyal et al. 2017, section 2.1); the schedule multiplies it at each step.

    Loaders give `Batch`, or images and targets in torchvision's form; see `loaders.as_batch`.

    Args:
        detector: the model; its `num_classes` is one more than there are class names.
        class_names: of the foreground, label 1 first. On the command line they come from the data.
        optimizer: a class of `torch.optim`, or any other factory; rate and weight decay are added to its arguments, see
            `OptimizerFactory`. Default: SGD with momentum 0.9.
        lr: learning rate for a batch of 16 images.
        weight_decay: on weights; biases and normalisation have none.
        schedule: `CosineSchedule`, `MultiStepSchedule`, any `(step, total_steps) -> factor of the rate`, or a factory
            of one of torch's schedulers, which goes on with each optimiser step.
        lr_mult: prefix of parameter names of the detector -> factor of the rate, as in `{backbone: 0.1}`; the longest
            prefix counts.
        layer_decay: factor of the rate from each layer of the backbone to the one before, as in ViTDet; for networks of
            timm. `lr_mult` multiplies it.
        freeze: prefix of parameter names -> for how many epochs it does not train, or None for good; see `Freezing`.
        metrics: any metrics of torchmetrics, which are logged beside ours as `val/<class>/<key>`; see `OwnMetrics`.
        images_per_batch: on each device, for loaders that don't tell.
        detections_per_img: most detections of an image that evaluation counts.
        grad_checkpointing: keep less of the backbone for the backward pass and compute the rest again there: fewer
            gigabytes for about a third more time.
        fast: run the quicker forms of parts, see `detection.models.fast`; false runs the plain ones, which the papers
            describe, with the same results.
        compile: train with `torch.compile` on the dense parts, see `compile_parts`; checkpoints stay the same.

    Raises:
        ValueError: the detector doesn't fit the classes, its backbone can't compute its activations again or has no
            layers for `layer_decay`, or a prefix names nothing.
    """

    def __init__(
        self,
        detector: FasterRCNN,
        class_names: Sequence[str],
        optimizer: OptimizerFactory = partial(SGD, momentum=0.9),  # noqa: B008
        lr: float = 0.02,
        weight_decay: float = 1e-4,
        schedule: Schedule = CosineSchedule(),  # noqa: B008
        lr_mult: Mapping[str, float] | None = None,
        layer_decay: float | None = None,
        freeze: Freeze = (),
        metrics: Sequence[Metric] = (),
        images_per_batch: int | None = None,
        detections_per_img: int = 100,
        grad_checkpointing: bool = False,
        compile: bool = False,
        fast: bool = True,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if detector is None:
            raise CheckpointError(WITHOUT_RECIPE)
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"model.{name} is {value}: give a number from 0 on")
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ValueError(f"model.layer_decay is {layer_decay}: it must be above 0 and at most 1")
        if detections_per_img < 1:
            raise ValueError(f"model.detections_per_img is {detections_per_img}: give at least 1")
        # From a checkpoint, which keeps plain values only, come recipes.
        detector, optimizer, schedule, metrics = (rebuild(part) for part in (detector, optimizer, schedule, metrics))
        if detector.num_classes != len(class_names) + 1:
            raise ValueError(
                f"the detector has {detector.num_classes} classes with background, but the data has "
                f"{len(class_names)} without: build it with num_classes={len(class_names) + 1}"
            )
        settings |= {"detector": detector.recipe, "optimizer": optimizer, "schedule": schedule, "metrics": metrics}
        self.save_hyperparameters(_plain(settings))
        self.detector = detector
        self.class_names = list(class_names)
        self.optimizer, self.lr, self.weight_decay, self.schedule = optimizer, lr, weight_decay, schedule
        self.lr_mult, self.layer_decay, self.images_per_batch = dict(lr_mult or {}), layer_decay, images_per_batch
        check_prefixes(detector, self.lr_mult, "model.lr_mult")
        for prefix, factor in self.lr_mult.items():
            if not 0 <= factor < math.inf:
                raise ValueError(f"model.lr_mult of {prefix} is {factor}: give a number from 0 on")
        if layer_decay is not None:
            layer_scales(detector, layer_decay)
        self.freezing = Freezing(detector, freeze or ())
        self.metric = MeanAP(self.class_names, detections_per_img, kinds_of(detector))
        self.own_metrics = OwnMetrics(metrics or ())
        self.compiled, self.fast = compile, fast
        if grad_checkpointing:
            checkpoint_activations(detector)
        self.step_losses: dict[str, Tensor] = {}  # of the newest training step, for those who look for what went wrong
        self._images_seen = 0  # in evaluation, of those that bring no id of their own
        self._resumed: dict[str, Any] | None = None  # the checkpoint, until its run goes on
        self._code, self._code_before = "unknown", ""
        self._given: list[dict[str, Any]] = []  # of each group of the optimiser, what it was built with

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, trust: Iterable[str] = (), **options: Any
    ) -> Self:
        """The module of a checkpoint, which says how to rebuild it; nothing but tensors and plain values is unpickled.

        Args:
            checkpoint_path: of the file.
            trust: packages whose parts it may use besides this one's.
            **options: Lightning's, and arguments of this class that take the place of those in the file.

        Raises:
            CheckpointError: the file is damaged, foreign, or names parts of a package that is not trusted.
            FileNotFoundError: there is none.
        """
        with readable(checkpoint_path), trusting(trust):
            check_sums(checkpoint_path)
            saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
            older = translated(saved.get("hyper_parameters", {}))
            try:
                return super().load_from_checkpoint(checkpoint_path, **{"weights_only": True} | older | options)
            except TypeError as error:
                if "'detector'" not in str(error):  # what older checkpoints lack where there was no recipe
                    raise
                raise CheckpointError(WITHOUT_RECIPE) from error

    def forward(self, images: Batch | Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of each image, in its own pixels."""
        return self.detector(images)  # type: ignore[return-value]

    def setup(self, stage: str) -> None:
        """Refuse data that the detector doesn't fit, take the quick forms of its parts, and compile what is trained."""
        data = getattr(self.trainer, "datamodule", None)
        settings, self.metric.frequencies = getattr(data, "hparams", {}), getattr(data, "frequencies", None)
        self.metric.skeleton = getattr(data, "skeleton", None)
        choose_precision(self.trainer)
        if stage == "fit":
            self._describe_detector(settings)
            self.own_metrics.check(self.detector.has_masks)
            check_monitors(self.trainer, known_figures(self.class_names, self.metric.iou_type, self.detector.has_masks))
        if stage != "predict":
            check_targets(self.detector, settings, self.metric.skeleton)
        check_form(self.detector, getattr(data, "form", None))
        for part in list(self.detector.modules()):  # itself, or one inside it, as in test-time augmentation
            if self.fast and isinstance(part, FasterRCNN):
                accelerate(part, self.trainer.strategy.root_device)
        if torch.are_deterministic_algorithms_enabled() and self.trainer.strategy.root_device.type != "cpu":
            exchange(self.detector, REPEATABLE)  # also in place of plain parts, which torchvision refuses to run
        if self.compiled and stage == "fit":
            compile_parts(self.detector)

    def _describe_detector(self, data: Mapping[str, Any]) -> None:
        """Let checkpoints have the detector as it is: with its data's sizes, and with changes since it was built."""
        transform = getattr(self.detector, "transform", None)
        if isinstance(transform, ImageTransform) and {"min_size", "max_size"} <= data.keys():
            before = f"{transform.min_size} and {transform.max_size}"
            if take_sizes(self.detector, data["min_size"], data["max_size"]):
                now = f"{transform.min_size} and {transform.max_size}"
                log.warning("images are resized as the data says, to %s; the detector had %s", now, before)
        if isinstance(self.detector, FasterRCNN):
            try:
                recipe = present_recipe(self.detector)
            except RecipeError as error:
                log.warning("the checkpoints of this run can't be opened by themselves: %s", error)
                recipe = None
            self.hparams["detector"] = recipe

    def train(self, mode: bool = True) -> Self:
        """As of any module, but frozen parts keep their statistics."""
        super().train(mode)
        if hasattr(self, "freezing"):
            self.freezing.hold()
        return self

    def on_fit_start(self) -> None:
        """Say what will be needed to open the checkpoints, or that they can't rebuild the detector."""
        self._code = code_version()  # now, as the files may change while it trains
        if self.trainer.is_global_zero:
            parts = {"optimizer": self.optimizer, "schedule": self.schedule, "metrics": list(self.own_metrics)}
            settings = {f"model.{name}": part for name, part in parts.items()}
            data = getattr(getattr(self.trainer, "datamodule", None), "hparams", {})
            announce_parts(self.detector, settings | {f"data.{name}": value for name, value in data.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Of a run that goes on: refuse settings that it can't take, say the others; see `detection.training.changes`.

        Losses of long tails go on with their sums of each class.

        Raises:
            SettingsError: with the way to start afresh.
        """
        take_sums(self.detector, checkpoint.get("class_sums", {}))
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        data = getattr(getattr(self.trainer, "datamodule", None), "hparams", {})
        check_changes(checkpoint, self.hparams, data, self, self._run_name())
        self._resumed, self._code_before = checkpoint, str(checkpoint.get("code", ""))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which code has trained it, of a run that went on with other code, each; what key points mean; and sums.

        These are what a loss counts of each class, see `detection.imbalance`.
        """
        if "keypoints" in self.metric.iou_type and (skeleton := self.metric.skeleton) is not None:
            checkpoint["skeleton"] = {"names": list(skeleton.names), "edges": [list(edge) for edge in skeleton.edges]}
        known = self._code_before.split(", then ") if self._code_before else []
        checkpoint["code"] = ", then ".join(known if known[-1:] == [self._code] else [*known, self._code])
        if sums := sums_of(self.detector):
            checkpoint["class_sums"] = sums

    def _run_name(self) -> str:
        return str(Path(self.trainer.ckpt_path or "").parent)

    def on_train_start(self) -> None:
        if isinstance(self.trainer.strategy.checkpoint_io, WholeFiles):
            check_states(self.trainer)
        self._freeze()  # in a resumed epoch, which has begun already
        if self._resumed is not None:
            take_rates(self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler, self._given)
            self._resumed = None

    def on_train_epoch_start(self) -> None:
        self._freeze()

    def _freeze(self) -> None:
        if self.freezing.begin(self.detector, self.current_epoch):
            share_anew(self.trainer)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Make a `Batch`, and check its ground truth while it is still on the CPU, where to look at values is cheap.

        Images without an id are numbered, on each rank other numbers.
        """
        world, trains = self.trainer.world_size, bool(self.trainer.training)
        first = self.trainer.global_rank + world * self._images_seen
        batch = as_batch(batch, self.detector, range(first, first + world * 1_000_000, world), trains)
        self._images_seen += len(batch)
        check_batch(batch, self.detector.num_classes)
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, _ = self.detector.run(batch, with_losses=True, with_detections=False)
        total = torch.stack(list(losses.values())).sum()
        self.step_losses = {name: value.detach() for name, value in losses.items()}
        self.log_dict({f"train/{name}": value for name, value in self.step_losses.items()}, batch_size=len(batch))
        # Not with prog_bar: Lightning would read it in every step, and the host wait for the device
        self.log("train/loss", total.detach(), batch_size=len(batch))
        return total

    def validation_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int
    ) -> list[dict[str, Any]]:
        """Detections, as of `predict_step`, for callbacks."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """Detections, as of `predict_step`, for callbacks."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Detections of each image in its original pixels, in torchvision's form: `boxes` `(D, 4)`, `labels`, `scores`.

        Masks are COCO RLE, which is a thousandth of the size of torchvision's.
        """
        return run_in_parts(self._run, batch, with_losses=False)[1]

    def _run(self, batch: Batch, with_losses: bool) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        losses, found = self.detector.run(batch, with_losses=with_losses, with_detections=True)
        return losses, encode_detections(found, batch, grid_of(self.detector))

    def _evaluate(self, batch: Batch, stage: str) -> list[dict[str, Any]]:
        losses, detections = run_in_parts(self._run, batch, with_losses=True)
        losses["loss"] = torch.stack(list(losses.values())).sum()
        logged = {f"{stage}/{name}": value for name, value in losses.items()}
        self.log_dict(logged, batch_size=len(batch), on_epoch=True, sync_dist=True)
        self.metric.update(detections, batch.targets)
        return detections

    def on_validation_epoch_start(self) -> None:
        self._forget()

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_start(self) -> None:
        self._forget()

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _forget(self) -> None:
        self.metric.reset()  # here and not at the end: callbacks show what it holds
        self._images_seen = 0

    def _report(self, stage: str) -> None:
        """Log the figures of the epoch. The sanity check sees too few images for them to mean anything."""
        if self.trainer.sanity_checking:
            return
        figures = self.metric.compute()
        values = {f"{stage}/{name.removeprefix('bbox_')}": value for name, value in figures.items()}
        # COCO says -1 where there is no object of a size; in a chart that would be a figure.
        self.log_dict({name: value for name, value in values.items() if value >= 0 or name == f"{stage}/map"})
        for kind, prefix in zip(("bbox", "segm", "keypoints"), ("ap", "segm_ap", "keypoints_ap"), strict=True):
            of_classes = self.metric.per_class(kind)  # type: ignore[arg-type]
            self.log_dict({f"{stage}/{prefix}/{name}": value for name, value in of_classes.items()})
        own = self.own_metrics.compute(self.metric.results)
        self.log_dict({f"{stage}/{name}": value for name, value in own.items()})

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimiser with scaled learning rates and, each step, the schedule."""
        images = images_per_step(self.trainer, self.images_per_batch)
        steps = total_steps(self.trainer, self._resumed)
        lr = self.lr * images / REFERENCE_BATCH
        by_time = steps_by_time(self.trainer)
        length = f"{steps:g} steps" if by_time is None or not math.isinf(steps) else "as many steps as the time allows"
        log.info("learning rate %g: %g for 16 images, scaled to %d a step; %s", lr, self.lr, images, length)
        shares = self.lr_mult, self.layer_decay
        groups = parameter_groups(self.detector, lr, self.weight_decay, *shares, self.freezing.trainable)
        # A fused optimiser takes the scale off float16 gradients itself, so late that they can't be clipped before.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        fused = not (scaled and self.trainer.gradient_clip_val)
        optimizer = build_optimizer(self.optimizer, groups, lr, self.weight_decay, fused)
        if self._resumed is not None:
            check_groups(self._resumed, optimizer, self._run_name())
        scheduler = build_scheduler(self.schedule, optimizer, steps, by_time)
        self._given = settings_of(optimizer, self.optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a checkpoint keeps them; what has no plain form is named in the log and left out."""
    plain = {name: describe(value) for name, value in settings.items()}
    for name in [name for name, value in plain.items() if value is NotImplemented]:
        del plain[name]
        log.info("checkpoints can't keep model.%s, so give it to load_from_checkpoint again", name)
    return plain
