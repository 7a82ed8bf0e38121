"""How weights move: the rate of each parameter, the optimiser that uses it, and the schedule over the steps.

Rates are `lr` times the factor of the parameter's part (`lr_mult`), the factor of its layer (`layer_decay`) and the
factor of the step (the schedule).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any, Protocol

import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from detection.recipes import recorded

Group = dict[str, Any]


class OptimizerFactory(Protocol):
    """Parameter groups -> optimiser: a class of `torch.optim`, your own, or `functools.partial` of one.

    The rate and the decay come from `DetectionModule`, everything else from the factory.
    """

    def __call__(self, params: Iterable[Any], *, lr: float, weight_decay: float) -> Optimizer:
        """Groups have `params`, `lr` and `weight_decay` of their own; the arguments are those of a group without."""
        ...


FactorOfStep = Callable[[int, int], float]  # (step, total_steps) -> factor of the rate
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Schedule = FactorOfStep | SchedulerFactory


@recorded
class CosineSchedule:
    """Half a cosine from 1 to 0 behind the warm-up (Loshchilov and Hutter 2017, without restarts).

    Args:
        warmup_steps: optimiser steps of linear rise from a thousandth; at most half of all steps.
    """

    def __init__(self, warmup_steps: int = 100) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int, total_steps: int) -> float:
        """The factor of the rate at a step, from 0."""
        warmup = min(self.warmup_steps, max(1, total_steps // 2))
        done = max(0, step - warmup) / max(1, total_steps - warmup)
        return _rise(step, warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@recorded
class MultiStepSchedule:
    """1 behind the warm-up, divided by 10 at each milestone.

    Args:
        milestones: as fractions of all steps (8 and 11 of 12 epochs: the 1x schedule).
        warmup_steps: optimiser steps of linear rise from a thousandth; at most half of all steps.
    """

    def __init__(self, milestones: Sequence[float] = (8 / 12, 11 / 12), warmup_steps: int = 100) -> None:
        self.milestones, self.warmup_steps = tuple(milestones), warmup_steps

    def __call__(self, step: int, total_steps: int) -> float:
        """The factor of the rate at a step, from 0."""
        rise = _rise(step, min(self.warmup_steps, max(1, total_steps // 2)))
        return rise * 0.1 ** sum(step >= milestone * total_steps for milestone in self.milestones)


def _rise(step: int, warmup: int) -> float:
    return min(1.0, 0.001 + 0.999 * step / warmup) if warmup > 0 else 1.0


def longest_prefix(name: str, prefixes: Iterable[str]) -> str | None:
    """The longest of the prefixes that names a parameter, or a module that holds it; None for none."""
    fitting = [prefix for prefix in prefixes if name == prefix or name.startswith(f"{prefix}.")]
    return max(fitting, key=len, default=None)


def check_prefixes(detector: nn.Module, prefixes: Iterable[str], setting: str) -> None:
    """Raise a ValueError at the first prefix that names nothing of a detector, with the names most like it."""
    names = [name for name, _ in detector.named_parameters()]
    parts = {".".join(name.split(".")[: i + 1]) for name in names for i in range(name.count(".") + 1)}
    for prefix in prefixes:
        if prefix not in parts:
            near = get_close_matches(prefix, sorted(parts), 3, 0.5) or sorted(p for p in parts if "." not in p)
            raise ValueError(
                f"{setting}: no parameter of the detector begins with {prefix}; near it: {', '.join(near)}"
            )


def parameter_groups(
    detector: nn.Module,
    lr: float,
    weight_decay: float,
    lr_mult: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    trainable: Iterable[str] | None = None,
) -> list[Group]:
    """Parameters by their rate and their weight decay; first those of no part, in each part those with decay.

    Biases and normalisation have no decay, nor has what a network of timm names in `no_weight_decay()`.

    Args:
        detector: whose parameters they are.
        lr: rate of what is in no part.
        weight_decay: of matrices and kernels.
        lr_mult: prefix of parameter names -> factor of the rate; the longest prefix counts.
        layer_decay: factor of the rate from each layer of the backbone to the one before; see `layer_scales`.
        trainable: names of the parameters; by default those that need a gradient.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `part`, which is empty where there is one rate for all.

    Raises:
        ValueError: a prefix names nothing, the backbone has no layers that timm knows, or nothing trains.
    """
    lr_mult = lr_mult or {}
    check_prefixes(detector, lr_mult, "model.lr_mult")
    scales = layer_scales(detector, layer_decay) if layer_decay is not None else {}
    named = dict(detector.named_parameters())
    names = set(trainable) if trainable is not None else {name for name, p in named.items() if p.requires_grad}
    plain = {name for name, p in named.items() if p.ndim <= 1} | _without_decay(detector)
    groups: dict[tuple[str, bool], Group] = {}
    for name in (name for name in named if name in names):
        prefix, (layer, scale) = longest_prefix(name, lr_mult), scales.get(name, ("", 1.0))
        part = ".".join(filter(None, (prefix, layer)))
        rate = lr * lr_mult.get(prefix or "", 1.0) * scale
        decay = 0.0 if name in plain else weight_decay
        group = {"params": [], "weight_decay": decay, "lr": rate, "part": part}
        groups.setdefault((part, name in plain), group)["params"].append(named[name])
    if not groups:
        raise ValueError("no parameter of the detector trains: see model.freeze, and trainable_backbone_layers")
    first = {part: i for i, part in enumerate(dict.fromkeys(part for part, _ in groups))}
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0] != "", first[key[0]], key[1]))]


def _without_decay(detector: nn.Module) -> set[str]:
    networks = [(name, m) for name, m in detector.named_modules() if callable(getattr(m, "no_weight_decay", None))]
    return {f"{name}.{own}" for name, network in networks for own in network.no_weight_decay()}  # type: ignore[operator]


def layer_scales(detector: nn.Module, layer_decay: float) -> dict[str, tuple[str, float]]:
    """Layer and factor of the rate of each parameter of the backbone's network, by timm's `param_groups_layer_decay`.

    The last layer has the factor `layer_decay`, each layer before it that many times less, as in ViTDet (Li et al.
    2022, section 4 and its code). Layers are those that the network's `group_matcher` names.

    Raises:
        ValueError: the backbone is no network of timm, which would name its layers.
    """
    network = getattr(getattr(getattr(detector, "backbone", None), "body", None), "network", None)
    if not hasattr(network, "group_matcher"):
        raise ValueError(
            "model.layer_decay needs a backbone of timm (detection.fasterrcnn_timm_fpn): leave it out, or give parts "
            "of this backbone their rates with model.lr_mult"
        )
    assert isinstance(network, nn.Module)
    own = {id(p): name for name, p in detector.named_parameters()}
    needs_gradient = [(p, p.requires_grad) for p in network.parameters()]
    network.requires_grad_(True)  # timm leaves out what does not train now, which may do so later
    groups = param_groups_layer_decay(network, layer_decay=layer_decay)
    for parameter, needs in needs_gradient:
        parameter.requires_grad_(needs)
    factors = sorted({group["lr_scale"] for group in groups})
    return {
        own[id(p)]: (f"layer{factors.index(group['lr_scale'])}", layer_decay * group["lr_scale"])
        for group in groups
        for p in group["params"]
    }


def build_optimizer(
    factory: OptimizerFactory, groups: Sequence[Group], lr: float, weight_decay: float, fused: bool = True
) -> Optimizer:
    """The optimiser over the groups, `fused` where it has that, it is wanted, and nothing else is said.

    Raises:
        ValueError: the factory sets what `DetectionModule` sets, or knows no weight decay and is to have some.
    """
    name = _name(factory)
    for setting, value in (("lr", lr), ("weight_decay", weight_decay)):
        if setting in getattr(factory, "keywords", {}):
            raise ValueError(f"model.optimizer: {name} has {setting} too; leave it out there, it is model.{setting}")
        if not takes(factory, setting) and value:
            raise ValueError(
                f"model.optimizer: {name} takes no {setting}, but model.{setting} is {value:g}; set it to 0"
            )
    options = {"lr": lr} | ({"weight_decay": weight_decay} if takes(factory, "weight_decay") else {})
    if fused and takes_fused(factory):
        options["fused"] = True
    return factory(groups, **options)  # type: ignore[arg-type]


def takes_fused(factory: Callable[..., Any]) -> bool:
    """Whether an optimiser can move all parameters at once, and nothing else is said."""
    chosen = {p.name: p.default for p in signature(factory).parameters.values()}
    return chosen.get("fused", False) is None and not chosen.get("foreach") and not chosen.get("differentiable")


def settings_of(optimizer: Optimizer, factory: OptimizerFactory) -> list[dict[str, Any]]:
    """What the settings say of each group: rate, decay and the factory's arguments, but nothing that is state.

    The rate is that which a schedule that was built begins with: some of torch's set it themselves.
    """
    names = {"lr", "weight_decay", *getattr(factory, "keywords", {})}
    found = [{name: group[name] for name in names & group.keys()} for group in optimizer.param_groups]
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return [options | {"lr": rate} for options, rate in zip(found, rates, strict=True)]


def takes(factory: Callable[..., Any], argument: str) -> bool:
    """Whether a function or class takes an argument of that name."""
    parameters = signature(factory).parameters
    return argument in parameters or any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())


def build_scheduler(
    schedule: Schedule, optimizer: Optimizer, total_steps: float, by_time: Callable[[int], int] | None = None
) -> LRScheduler:
    """What multiplies the rates at each step.

    Args:
        schedule: `(step, total_steps) -> factor`, or a factory of one of torch's schedulers.
        optimizer: whose rates they are.
        total_steps: optimiser steps of the run; infinite where it has no end.
        by_time: of a run that ends by the clock alone: a step -> all steps, as far as is known then.

    Raises:
        ValueError: the schedule is neither, or needs an end and there is none.
    """
    wanted = [p for p in signature(schedule).parameters.values() if p.default is Parameter.empty]
    if len([p for p in wanted if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]) == 2:
        if math.isinf(total_steps) and by_time is None:
            raise ValueError(
                "the schedule needs to know the end of the run: give trainer.max_epochs, max_steps or max_time"
            )
        length = by_time if math.isinf(total_steps) and by_time else lambda _: int(total_steps)
        return LambdaLR(optimizer, lambda step: schedule(step, length(step)))  # type: ignore[arg-type, call-arg, return-value]
    scheduler = schedule(optimizer)  # type: ignore[arg-type, call-arg]
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            f"model.schedule: {_name(schedule)} is neither a function of (step, total_steps) nor one of torch's "
            "schedulers that go by steps"
        )
    return scheduler


def rates(optimizer: Optimizer) -> dict[str, float]:
    """The rates of the next step: `lr` of the first group, and `lr/<part>` of each part."""
    groups = optimizer.param_groups
    parts = {f"lr/{group['part']}": float(group["lr"]) for group in groups if group.get("part")}
    return {"lr": float(groups[0]["lr"])} | parts


def state_per_parameter(factory: OptimizerFactory) -> int:
    """How many numbers an optimiser keeps for each parameter, 1 for SGD with momentum, 2 for Adam: looked at on one."""
    side = 16
    weight = nn.Parameter(torch.zeros(side, side))
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer(factory, [{"params": [weight]}], 0.1, 0.0)
    optimizer.step(lambda: 0.0)
    state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return round(sum(value.numel() for value in state) / side**2)


def _name(factory: Any) -> str:
    inner = getattr(factory, "func", factory)
    return str(getattr(inner, "__name__", type(inner).__name__))


# What the command line begins with, in the form of a configuration.
SGD_MOMENTUM = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
COSINE = {"class_path": "detection.CosineSchedule"}

# Settings of before optimiser and schedule were parts, and what to write now.
MOVED = {
    "momentum": "--model.optimizer.momentum of SGD, --model.optimizer.betas of AdamW",
    "warmup_steps": "--model.schedule.warmup_steps",
    "milestones": "--model.schedule.milestones of detection.MultiStepSchedule",
    "sgd": "torch.optim.SGD",
    "adamw": "torch.optim.AdamW",
    "cosine": "detection.CosineSchedule",
    "multistep": "detection.MultiStepSchedule",
}


def translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Optimiser and schedule of an older checkpoint's settings as recipes; nothing where they are ones."""
    if not isinstance(settings.get("optimizer"), str):
        return {}
    momentum, warmup = settings["momentum"], {"warmup_steps": settings["warmup_steps"]}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"momentum": momentum}}
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [momentum, 0.999]}}
    cosine = {"class_path": "detection.training.optimisation.CosineSchedule", "init_args": warmup}
    steps = {"milestones": settings["milestones"], **warmup}
    multistep = {"class_path": "detection.training.optimisation.MultiStepSchedule", "init_args": steps}
    return {
        "optimizer": adamw if settings["optimizer"] == "adamw" else sgd,
        "schedule": multistep if settings["schedule"] == "multistep" else cosine,
    }
