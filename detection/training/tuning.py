"""`detection fit --find` looks for a learning rate or a batch with Lightning's tuner, and trains nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.tuner import Tuner
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.optim import Optimizer

from detection.data.datamodule import DetectionDataModule
from detection.devices import smaller_precision
from detection.errors import LOWER, RunError
from detection.training.module import REFERENCE_BATCH, DetectionModule

log = logging.getLogger(__name__)

Find = Literal["lr", "batch_size"]
LOWEST, HIGHEST, STEPS = 1e-5, 1.0, 100  # rates for 16 images, and how many of them are tried
STEPS_A_TRIAL = 5  # of one batch size: batches of high and of wide images take different memory
MARGIN = 3.0  # between the rate of the lowest loss and the one suggested
DECAY = 0.98  # of the moving average that Lightning's finder keeps of the loss
# Validation would take most of the time and is not what is looked for.
SETTINGS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "max_epochs": -1,
    "max_steps": STEPS,
    "check_val_every_n_epoch": 1_000_000,
    "num_sanity_val_steps": 0,
}


def find_lr(trainer: L.Trainer, module: DetectionModule, data: DetectionDataModule, folder: Path) -> float:
    """A third of the rate at which the loss is lowest while the rate rises step by step (Smith 2017, section 3.3).

    Weights and optimiser are afterwards as before. The rule was chosen on two searches with AdamW, of which it gives
    0.0026 (blood cells) and 0.0021 (drawn scenes) where whole runs have settled on 0.003. Where the loss falls fastest,
    the other usual rule, gave 0.0045 and 0.00014: a detector's loss falls first where its heads learn that most of an
    image is background. With SGD the loss stays low up to rates that a whole run would not bear.

    Args:
        trainer: made with `SETTINGS`.
        module, data: what is to be trained.
        folder: gets `plots/lr_finder.png`.

    Returns:
        The rate for 16 images, as `--model.lr` takes it.

    Raises:
        RunError: no step had a finite loss.
    """
    images = data.hparams["batch_size"] * trainer.world_size * trainer.accumulate_grad_batches
    scale = images / REFERENCE_BATCH
    with _own_rates(module):
        found = Tuner(trainer).lr_find(
            module,
            datamodule=data,
            min_lr=LOWEST * scale,
            max_lr=HIGHEST * scale,
            num_training=STEPS,
            update_attr=False,
        )
    assert found is not None  # only fast_dev_run has no result
    rates, losses = curve(found.results)
    rates /= scale
    if len(rates) < 3:
        raise RunError("the loss was not finite from the first steps on, so no learning rate can be suggested")
    smooth = smoothed(losses)
    lr = float(f"{rates[smooth.argmin()] / MARGIN:.2g}")
    if trainer.is_global_zero:
        path = folder / "plots" / "lr_finder.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(rates, losses, smooth, lr).savefig(path, dpi=120)
        log.info("suggestion: --model.lr %g (for 16 images, as the flag takes it); the curve is in %s", lr, path)
    return lr


@contextmanager
def _own_rates(module: DetectionModule) -> Iterator[None]:
    """Let each group keep its share of the rate, where Lightning's finder gives all groups the same."""
    configure = module.configure_optimizers

    def configured() -> dict[str, Any]:
        made = configure()
        optimizer: Optimizer = made["optimizer"]
        rates = [group["initial_lr"] for group in optimizer.param_groups]
        shares = [rate / max(rates[0], 1e-30) for rate in rates]

        def scale(optimizer: Optimizer, *_: Any) -> None:
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] *= share

        optimizer.register_step_pre_hook(scale)
        return made

    module.configure_optimizers = configured  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.configure_optimizers


def curve(results: Mapping[str, Sequence[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rates and the loss of each step, up to the first that is not finite, from what Lightning's finder returns.

    Lightning returns a moving average over 50 steps, which lags by half of the search and, divided as if it had seen
    a step more than it has, begins at half of the loss; its own suggestion inherits both.
    """
    rates, losses = np.array(results["lr"], np.float64), np.array(results["loss"], np.float64)
    rates = rates[: len(losses)]
    average = losses * (1 - DECAY ** (np.arange(len(losses)) + 2))
    raw = (average - DECAY * np.concatenate(([0.0], average[:-1]))) / (1 - DECAY)
    count = int(np.isfinite(raw).cumprod().sum())
    return rates[:count], raw[:count]


def smoothed(losses: NDArray[np.float64], width: float = 3.0) -> NDArray[np.float64]:
    """Each loss with its neighbours on both sides, weighted by a normal distribution `width` steps wide."""
    place = np.arange(len(losses))
    weights = np.exp(-0.5 * ((place[:, None] - place) / width) ** 2)
    return weights @ losses / weights.sum(axis=1)


def _draw(rates: NDArray[Any], losses: NDArray[Any], smooth: NDArray[Any], lr: float) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, ".", color="0.7", label="each step")
    axes.plot(rates, smooth, label="smoothed")
    axes.axvline(lr, color="tab:red", label=f"suggestion: --model.lr {lr:g}")
    axes.set(xscale="log", xlabel="learning rate for 16 images", ylabel="loss")
    axes.set_ylim(0, 1.2 * float(smooth[: smooth.argmin() + 1].max()))  # what diverges would flatten the rest
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    return figure


def find_batch_size(trainer: L.Trainer, module: DetectionModule, data: DetectionDataModule) -> int:
    """The largest batch whose training steps fit into the accelerator's memory, with 5 % to spare.

    Weights and optimiser are afterwards as before.

    Args:
        trainer: made with `SETTINGS`, of one device.
        module, data: what is to be trained.

    Raises:
        RunError: several devices; a processor, whose memory ends with the end of the process; or not two images fit.
    """
    if trainer.world_size > 1:
        raise RunError("--find batch_size looks on one device: give --trainer.devices 1, the batch is that of each")
    if trainer.strategy.root_device.type == "cpu":
        raise RunError(
            "--find batch_size needs an accelerator: a process that takes all of a CPU's memory is ended by the system "
            "and learns nothing, and on a CPU larger batches are hardly faster; choose data.batch_size from 2 to 8"
        )
    return largest_batch(trainer, module, data)


def largest_batch(trainer: L.Trainer, module: DetectionModule, data: DetectionDataModule) -> int:
    """`find_batch_size` wherever memory ends with an exception."""
    before = data.hparams["batch_size"]
    size = Tuner(trainer).scale_batch_size(module, datamodule=data, mode="binsearch", steps_per_trial=STEPS_A_TRIAL)
    data.hparams["batch_size"] = before
    if size is None or size < 2:
        raise RunError(f"a batch of two images does not fit: give --data.batch_size 1, or {LOWER}{smaller_precision()}")
    log.info("a batch of %d fits, with 5 %% of it to spare: --data.batch_size %d on each device", size, size)
    return size
