"""What a resumed run takes of changed settings, aloud, and what it refuses, with the way to start afresh.

A checkpoint brings the state of a run: weights, momentum, counters, place in the data. Its settings are those that the
run goes on with now. Lightning would restore the old rate into the optimiser while the log shows the new one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from detection.errors import SettingsError
from detection.training.optimisation import translated
from detection.upgrades import upgrade

log = logging.getLogger(__name__)

AFRESH = "start afresh from its weights with --weights {run} in the place of --resume"
Settings = Mapping[str, Any]
FAR = 10**9  # steps: an end that no schedule nears


def differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each setting that both have and that differs, parts by their arguments.

    Args:
        old, new: plain values, as checkpoints and configurations keep them.
        name: of the whole, e.g. `model`.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if "class_path" in old and "class_path" in new:
            (was, a), (now, b) = (upgrade(str(v["class_path"]), dict(v.get("init_args") or {})) for v in (old, new))
            if was.rpartition(".")[2] != now.rpartition(".")[2]:  # a class has a long and a short path
                yield name, was, now
                return
            old, new = a, b
        for key in old.keys() & new.keys():
            yield from differences(old[key], new[key], f"{name}.{key}")
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{name}.{i}")
    elif old != new:
        yield name, old, new


def shown(changes: Sequence[tuple[str, Any, Any]]) -> str:
    """Changes as a log or a message has them."""
    return ", ".join(f"{name} {_short(new)} (it was {_short(old)})" for name, old, new in sorted(changes, key=str))


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_changes(checkpoint: Mapping[str, Any], model: Settings, data: Settings, module: nn.Module, run: str) -> None:
    """Say which settings of model and data are new to a run that goes on.

    Args:
        checkpoint: of the run.
        model, data: today's settings, as checkpoints keep them.
        module: has today's tensors.
        run: how to name the run in a message.

    Raises:
        SettingsError: the state of the run does not fit: other tensors, classes, optimiser, order of images.
    """
    before = dict(checkpoint.get("hyper_parameters", {}))
    before |= translated(before)
    changes = list(differences(before, dict(model), "model"))
    changes += differences(checkpoint.get("datamodule_hyper_parameters", {}), dict(data), "data")
    changes = [change for change in changes if change[0] != "data.classes"]  # as model.class_names
    schedules = [dict(settings.get("schedule") or {}) for settings in (before, model)]
    by_torch = any(str(schedule.get("class_path", "")).startswith("torch.") for schedule in schedules)
    refused = [change for change in changes if _why(change[0], by_torch)]
    if not refused and (odd := _other_tensor(checkpoint.get("state_dict", {}), module)):
        refused = [change for change in changes if change[0].startswith("model.detector")] or [odd]
    if refused:
        why = _why(refused[0][0], by_torch) or "the weights no longer fit the detector"
        raise SettingsError(f"this run can't go on with {shown(refused)}: {why}; {AFRESH.format(run=run)}")
    if changes:
        log.info("settings changed from here on: %s", shown(changes))


def _why(name: str, schedule_of_torch: bool) -> str | None:
    """Why a resumed run can't take a changed setting; None where it can, or where only the tensors tell."""
    if name.startswith("model.class_names"):
        return "its labels mean other classes"
    if name == "model.optimizer":
        return "the optimiser's state is that of another"
    if name.startswith("model.schedule") and schedule_of_torch:
        return "torch's schedulers keep their own settings"
    if name == "data.seed":
        return "the order of its images is drawn from it"
    return None


def _other_tensor(state: Mapping[str, Tensor], module: nn.Module) -> tuple[str, Any, Any] | None:
    """The first tensor that is not there or has another shape."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in state.items()}
    for name in [*own, *saved]:
        if own.get(name) != saved.get(name):
            return name, saved.get(name, "not there"), own.get(name, "not there")
    return None


def check_groups(checkpoint: Mapping[str, Any], optimizer: Optimizer, run: str) -> None:
    """Refuse what would put the optimiser's state into other groups: parts with rates of their own, frozen ones.

    Raises:
        SettingsError: see above.
    """
    saved = checkpoint["optimizer_states"][0]["param_groups"]
    layouts = [
        [(group.get("part", ""), len(group["params"])) for group in groups]
        for groups in (saved, optimizer.param_groups)
    ]
    if layouts[0] != layouts[1]:
        parts = [", ".join(dict.fromkeys(part or "the rest" for part, _ in layout)) for layout in layouts]
        raise SettingsError(
            f"this run can't go on with these rates by part, or with other parameters that train ({parts[1]}; it was "
            f"{parts[0]}): the optimiser's state is that of other groups; {AFRESH.format(run=run)}"
        )


def take_rates(optimizer: Optimizer, scheduler: LRScheduler, given: Sequence[Settings]) -> None:
    """Put today's rates, and what else is set of the optimiser, in the place of those that a checkpoint brought.

    Where nothing has changed nothing is touched, so that the run goes on to the bit.

    Args:
        optimizer: restored, with the rates of then.
        scheduler: restored; one of `LambdaLR` has today's function.
        given: of each group, what it was built with: the rate that the schedule began with, decay, other options.
    """
    before = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    for group, options in zip(optimizer.param_groups, given, strict=True):
        cycled = ("lr", "momentum", "betas") if "max_momentum" in group else ("lr",)  # by a schedule, as its state
        group.update({name: value for name, value in options.items() if name not in cycled})
    wanted = [float(options["lr"]) for options in given]
    for group, was, now in zip(optimizer.param_groups, before, wanted, strict=True):
        group["initial_lr"] = now
        if was != now:
            group["lr"] = float(group["lr"]) * now / was if was else now
    scheduler.base_lrs = list(wanted)
    if isinstance(scheduler, LambdaLR):  # also of another length
        step = scheduler.last_epoch
        for group, rate, factor in zip(optimizer.param_groups, wanted, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * factor(step)
    scheduler._last_lr = [float(group["lr"]) for group in optimizer.param_groups]


def total_steps(trainer: L.Trainer, checkpoint: Mapping[str, Any] | None) -> float:
    """Optimiser steps of the whole run, infinite without an end.

    Lightning's estimate counts as if the run had always had today's batches: with larger ones half way, the schedule
    would end at once. Here the steps that are done count as they were, and the rest of the epochs by today's.
    """
    estimate: float = trainer.estimated_stepping_batches
    then = ((checkpoint or {}).get("resume") or {}).get("batches")
    if then is None or checkpoint is None or trainer.max_epochs in (-1, None):
        return estimate
    now = {"batches": trainer.num_training_batches, "accumulated": trainer.accumulate_grad_batches}
    if then == now or math.isinf(trainer.num_training_batches):
        return estimate
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
    epochs = max(0.0, trainer.max_epochs - checkpoint["epoch"] - progress / then["batches"])  # type: ignore[operator]
    steps = checkpoint["global_step"] + math.ceil(epochs * math.ceil(now["batches"] / now["accumulated"]))
    return min(steps, trainer.max_steps) if trainer.max_steps != -1 else steps


def steps_by_time(trainer: L.Trainer) -> Callable[[int], int] | None:
    """A step -> all steps of a run of `max_time`, if they take as long as those before did; None without `max_time`.

    So the share of the steps that are done is the share of the time that has passed, validations included, and a
    schedule ends with the time. All ranks go by the first one's clock. Before the first step the end is far away.
    """
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    timer = next((timer for timer in timers if timer.time_remaining() is not None), None)
    if timer is None:
        return None
    known = {0: FAR}

    def length(step: int) -> int:
        if step not in known:
            passed, left = timer.time_elapsed(), timer.time_remaining() or 0.0
            steps = round(step * (1 + max(0.0, left) / passed)) if passed > 0 else FAR
            known.clear()  # each group of parameters asks for the step that is done
            known[step] = int(trainer.strategy.broadcast(steps))
        return known[step]

    return length
