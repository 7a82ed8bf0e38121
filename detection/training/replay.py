"""A step of a run drawn again: its batch, what each anchor and region trained on, its losses and gradients.

A batch is a function of seed, epoch and place; everything else that is drawn follows from the state of the random
numbers, which checkpoints have. So the steps from a checkpoint up to the one that is asked for are trained once more,
with nothing written, and the figures on the way are compared with those that were logged.

Shape shorthand:
    B: images     A: anchors     S: sampled anchors, or regions, of an image
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from detection.batch import Batch
from detection.commit import code_version
from detection.models.roi_heads import RoISample
from detection.training.callbacks import rates
from detection.training.logged import Comparison
from detection.training.resume import KeepLast
from detection.training.safety import bad_gradients, plain_number

log = logging.getLogger(__name__)


class Replayed(Exception):  # noqa: N818
    """The step is recorded, and training ends."""


class Restore(KeepLast):
    """Brings back what `KeepLast` has saved, and saves nothing."""

    def __init__(self) -> None:
        super().__init__(Path(), math.inf)

    def _save(self, trainer: L.Trainer) -> None:
        pass


@dataclass(slots=True)
class Anchors:
    """What the region proposal network trained on.

    Attributes:
        boxes: `(A, 4)`.
        matched: `(B, A)`, what the matcher gave.
        labels: `(B, A)`: 1 foreground, 0 background, -1 for what can't be drawn.
        drawn, valid: `(B, S)`, what the sampler gave.
    """

    boxes: Tensor | None = None
    matched: Tensor | None = None
    labels: Tensor | None = None
    drawn: Tensor | None = None
    valid: Tensor | None = None


@dataclass(slots=True)
class Part:
    """A batch of the step, of which there are several where gradients are accumulated, and what came of it."""

    batch: Batch
    losses: dict[str, Tensor] = field(default_factory=dict)
    anchors: Anchors = field(default_factory=Anchors)
    regions: RoISample | None = None


class Recorder(L.Callback):
    """Records a step before it is taken, then ends training with `Replayed`.

    Args:
        step: as `metrics.csv` counts, from 0.

    Attributes:
        parts: of the step.
        figures: of each step on the way, and of the step itself.
        gradients: norm of the gradient before it is clipped, of all that trains and of each part of the detector.
        facts: what else is known of the step.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.parts: list[Part] = []
        self.figures: dict[int, dict[str, Tensor]] = {}
        self.gradients: dict[str, float | str] = {}
        self.facts: dict[str, Any] = {}
        self._rates: Mapping[str, float] = {}
        self._silent: list[Callable[[], None]] = []
        self._said = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._rates = rates(trainer.optimizers[0])
        if trainer.global_step == self.step:
            if not self._silent:
                self._listen(pl_module.detector)
            self.parts.append(Part(batch))
        elif time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            log.info("step %d of %d", trainer.global_step, self.step)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.parts:
            self.parts[-1].losses = _losses(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        figures = {f"train/{name}": value for name, value in _losses(pl_module).items()}
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            figures["train/grad_norm"] = norm
        self.figures[trainer.global_step] = figures | {n: torch.tensor(value) for n, value in self._rates.items()}
        if trainer.global_step < self.step:
            return
        for silence in self._silent:
            silence()
        by_part: dict[str, list[Tensor]] = {}
        for name, p in pl_module.detector.named_parameters():  # type: ignore[operator, union-attr]
            if p.grad is not None:
                by_part.setdefault(".".join(name.split(".")[:2]), []).append(p.grad)
        norms = {name: torch.nn.utils.get_total_norm(gradients) for name, gradients in by_part.items()}
        self.gradients = {name: plain_number(value) for name, value in {"all": norm, **norms}.items()}
        self.facts = {"epoch": trainer.current_epoch, "rank": trainer.global_rank, "world": trainer.world_size}
        self.facts |= {"code": code_version(), "torch": torch.__version__, "device": _device(trainer)}
        self.facts["bad_gradients"] = bad_gradients(pl_module)
        raise Replayed

    def _listen(self, detector: Any) -> None:
        """Hear what matcher and samplers give, of those proposers and heads that have them."""
        heads = detector.roi_heads
        stages: Any = getattr(heads, "stages", None)
        for owner, name, hear in (
            (detector.rpn, "matcher", self._hear_matcher),
            (detector.rpn, "sampler", self._hear_sampler),
            (heads if stages is None else stages[0], "sample", self._hear_regions),
        ):
            if hasattr(owner, name):
                self._silent.append(_overhear(owner, name, hear))

    def _hear_matcher(self, args: tuple[Any, ...], given: Any) -> None:
        self.parts[-1].anchors.boxes, self.parts[-1].anchors.matched = args[2], given

    def _hear_sampler(self, args: tuple[Any, ...], given: Any) -> None:
        anchors = self.parts[-1].anchors
        anchors.labels, (anchors.drawn, anchors.valid) = args[0], given

    def _hear_regions(self, args: tuple[Any, ...], given: Any) -> None:
        self.parts[-1].regions = given


def _losses(module: Any) -> dict[str, Tensor]:
    """Those of the newest batch, and their sum as it was logged, which `on_before_backward` gets as a share."""
    losses: dict[str, Tensor] = module.step_losses
    return {**losses, "loss": torch.stack(list(losses.values())).sum()}


def _device(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _overhear(owner: Any, name: str, hear: Callable[[tuple[Any, ...], Any], None]) -> Callable[[], None]:
    """Call `hear` with the arguments and the result of each call of a part; gives what ends that."""
    part = getattr(owner, name)
    if isinstance(part, nn.Module):
        return part.register_forward_hook(lambda _, args, given: hear(args, given)).remove

    def heard(*args: Any) -> Any:
        given = part(*args)
        hear(args, given)
        return given

    asked = {"wants_overlaps": getattr(part, "wants_overlaps", False)}
    vars(heard).update(asked | getattr(part, "__dict__", {}))  # what else is asked of it
    own = name in vars(owner)
    setattr(owner, name, heard)
    return lambda: setattr(owner, name, part) if own else delattr(owner, name)


def as_json(recorder: Recorder, found: Comparison) -> dict[str, Any]:
    """All of the step as plain values; figures are those of its last batch, as they are in `metrics.csv`."""
    figures = {name: plain_number(value) for name, value in recorder.figures[recorder.step].items()}
    return {
        "step": recorder.step,
        **recorder.facts,
        "figures": figures,
        "gradient_norms": recorder.gradients,
        "logged": {name: plain_number(value) for name, (_, value, _) in found.at.items()},
        "equal": found.first is None if found.steps else None,
        "steps_compared": found.steps,
        "first_difference": found.first,
        "batches": [_describe(part) for part in recorder.parts],
    }


def _describe(part: Part) -> dict[str, Any]:
    losses = {name: plain_number(value) for name, value in part.losses.items()}
    pixels = part.batch.images.detach().cpu().contiguous()
    digest = hashlib.sha256(pixels.view(torch.uint8).numpy().tobytes()).hexdigest()
    images = [_describe_image(part, i) for i in range(len(part.batch))]
    return {"shape": list(pixels.shape), "sha256": digest, "losses": losses, "images": images}


def _describe_image(part: Part, i: int) -> dict[str, Any]:
    batch, anchors, regions = part.batch, part.anchors, part.regions
    there = batch.gt_valid[i]
    target = batch.targets[i] if batch.targets else None
    described: dict[str, Any] = {"file": target.file_name, "image_id": target.image_id} if target else {}
    described |= {"size": batch.image_sizes[i].tolist(), "boxes": batch.gt_boxes[i][there].tolist()}
    described["labels"] = batch.gt_labels[i][there].tolist()
    if anchors.boxes is not None and anchors.matched is not None:
        places = (anchors.matched[i] >= 0).nonzero().flatten()
        rows = zip(places.tolist(), anchors.matched[i][places].tolist(), anchors.boxes[places].tolist(), strict=True)
        described["anchors"] = [{"anchor": place, "object": own, "box": box} for place, own, box in rows]
    if anchors.drawn is not None and anchors.labels is not None and anchors.valid is not None:
        drawn = anchors.drawn[i][anchors.valid[i]]
        described["anchors_sampled"] = drawn.tolist()
        described["anchors_counted"] = {
            name: int((anchors.labels[i] == label).sum())
            for name, label in {"foreground": 1, "background": 0, "ignored": -1}.items()
        } | {"sampled_foreground": int((anchors.labels[i][drawn] > 0).sum()), "sampled": len(drawn)}
    if regions is not None:
        kept = regions.valid[i]
        columns = (regions.labels[i][kept], regions.matched_idxs[i][kept], regions.boxes[i][kept])
        described["regions"] = [
            {"label": label, "object": own if label else None, "box": box}
            for label, own, box in zip(*(column.tolist() for column in columns), strict=True)
        ]
    return described
