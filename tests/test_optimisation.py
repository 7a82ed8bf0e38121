"""Optimiser, schedule and rates by part: the default is the rule of old, and any other class fits in."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer, RMSprop, Rprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from detection.batch import Batch
from detection.models.timm_backbones import timm_fpn
from detection.training.callbacks import Throughput
from detection.training.module import DetectionModule
from detection.training.optimisation import (
    CosineSchedule,
    MultiStepSchedule,
    build_optimizer,
    build_scheduler,
    layer_scales,
    parameter_groups,
    rates,
    state_per_parameter,
    translated,
)
from tests.test_module import make_batch, make_module

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"accelerator": "cpu", "enable_model_summary": False}


def loader(steps: int) -> DataLoader[Batch]:
    return DataLoader([make_batch(2, 128, 96 + 32 * (i % 2)) for i in range(steps)], batch_size=None)


def fit(module: DetectionModule, steps: int = 10, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    trainer = L.Trainer(max_epochs=1, **QUIET | options)
    trainer.fit(module, loader(steps))
    return {name: value.clone() for name, value in module.state_dict().items()}


def old_rule(kind: str, schedule: str, steps: int) -> dict[str, Tensor]:
    """The weights after training by the rule that the switches of old had, written out with PyTorch alone."""
    module = make_module()
    trainable = [p for p in module.detector.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = 0.02 * 2 / 16
    optimizer: Optimizer = SGD(groups, lr=lr, momentum=0.9, fused=True)
    if kind == "adamw":
        optimizer = AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)

    def factor(step: int) -> float:
        warmup = min(100, max(1, steps // 2))
        rise = min(1.0, 0.001 + 0.999 * step / warmup)
        if schedule == "multistep":
            return rise * 0.1 ** sum(step >= milestone * steps for milestone in (8 / 12, 11 / 12))
        done = max(0, step - warmup) / max(1, steps - warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    torch.manual_seed(3)
    for batch in loader(steps):
        losses, _ = module.detector.run(batch, with_losses=True, with_detections=False)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        scheduler.step()
    return module.state_dict()


@pytest.mark.parametrize(("kind", "schedule"), [("sgd", "cosine"), ("adamw", "multistep")])
def test_ten_steps_are_those_of_the_old_rule_bit_for_bit(kind: str, schedule: str) -> None:
    options: dict[str, Any] = {"images_per_batch": 2}
    if kind == "adamw":
        options |= {"optimizer": AdamW, "schedule": MultiStepSchedule()}
    before, wanted = make_module().state_dict(), old_rule(kind, schedule, 10)
    found = fit(make_module(fast=False, **options))
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(found["detector.backbone.body.conv1.weight"], before["detector.backbone.body.conv1.weight"])


class Half:
    """A user's schedule."""

    def __call__(self, step: int, total_steps: int) -> float:
        return 1.0 if step < total_steps / 2 else 0.5


class Watch(L.Callback):
    """Keeps the rates that the optimiser steps with."""

    def __init__(self) -> None:
        self.used: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        self.used.append([group["lr"] for group in optimizer.param_groups])


def no_cosine(optimizer: Optimizer) -> Any:
    return CosineAnnealingLR(optimizer, T_max=4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Half(), [1, 1, 0.5, 0.5]),
        (lambda step, total_steps: (step + 1) / total_steps, [0.25, 0.5, 0.75, 1]),
        (partial(CosineAnnealingLR, T_max=4), [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        (no_cosine, [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
    ],
)
def test_a_users_schedule_moves_the_scaled_rate_each_step(schedule: Any, expected: list[float]) -> None:
    watch = Watch()
    fit(make_module(schedule=schedule, images_per_batch=4, lr=0.04), steps=4, callbacks=[watch])
    assert [used[0] for used in watch.used] == pytest.approx([0.04 * 4 / 16 * factor for factor in expected])


def test_the_rate_that_is_logged_is_the_rate_that_steps() -> None:
    logged: list[dict[str, float]] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("lr")})

    watch = Watch()
    module = make_module(schedule=Half(), images_per_batch=16, lr=0.01, lr_mult={"backbone": 0.1, "backbone.fpn": 0.5})
    fit(module, steps=4, callbacks=[watch, Throughput(), Keep()])
    assert [row["lr"] for row in logged] == pytest.approx([0.01, 0.01, 0.005, 0.005])
    assert [row["lr"] for row in logged] == pytest.approx([used[0] for used in watch.used])
    assert logged[0] == pytest.approx({"lr": 0.01, "lr/backbone": 0.001, "lr/backbone.fpn": 0.005})


@pytest.mark.parametrize(
    "factory", [Adafactor, RMSprop, partial(SGD, momentum=0.5, nesterov=True), partial(AdamW, foreach=True, fused=None)]
)
def test_any_optimiser_steps(factory: Any) -> None:
    module = make_module(optimizer=factory, images_per_batch=2)
    before = make_module().state_dict()
    after = fit(module, steps=2)
    assert all(value.isfinite().all() for value in after.values())
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert "detector.rpn.head.cls_logits.weight" in moved


def test_fused_where_it_is_there_and_not_chosen_otherwise() -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": [nn.Parameter(torch.ones(2))]}]

    for factory, fused in ((SGD, True), (partial(SGD, foreach=True), None), (partial(SGD, fused=False), False)):
        assert build_optimizer(factory, groups(), 0.1, 0.0).defaults["fused"] is fused
    assert "fused" not in build_optimizer(RMSprop, groups(), 0.1, 0.0).defaults


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (partial(SGD, lr=0.1), r"SGD has lr too; leave it out there, it is model.lr"),
        (partial(AdamW, weight_decay=0.1), r"AdamW has weight_decay too; leave it out there"),
        (Rprop, r"Rprop takes no weight_decay, but model.weight_decay is 0.01; set it to 0"),
    ],
)
def test_what_has_two_homes_or_none_is_refused(factory: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(factory, [{"params": [nn.Parameter(torch.ones(2))]}], 0.1, 0.01)


@pytest.mark.parametrize("schedule", [partial(ReduceLROnPlateau, patience=3), lambda step, total_steps, more: 1.0])
def test_what_is_no_schedule_is_refused(schedule: Any) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises((ValueError, TypeError), match=r"neither a function of \(step, total_steps\)|argument"):
        build_scheduler(schedule, optimizer, 10)
    with pytest.raises(ValueError, match=r"give trainer\.max_epochs, max_steps or max_time"):
        build_scheduler(CosineSchedule(), optimizer, math.inf)


@pytest.mark.parametrize(
    ("factory", "count"),
    [(SGD, 0), (partial(SGD, momentum=0.9), 1), (AdamW, 2), (partial(AdamW, amsgrad=True), 3), (Adafactor, 0)],
)
def test_numbers_that_an_optimiser_keeps(factory: Any, count: int) -> None:
    assert state_per_parameter(factory) == count


def test_no_warm_up_begins_at_once() -> None:
    assert CosineSchedule(0)(0, 10) == 1.0 and MultiStepSchedule(warmup_steps=0)(0, 10) == 1.0
    assert [MultiStepSchedule([0.5], 2)(step, 8) for step in (0, 1, 2, 3, 4)] == pytest.approx(
        [0.001, 0.5005, 1.0, 1.0, 0.1]
    )


def rate_of(groups: list[dict[str, Any]], parameter: Tensor) -> tuple[float, float]:
    (found,) = [(g["lr"], g["weight_decay"]) for g in groups if any(p is parameter for p in g["params"])]
    return found


def test_the_longest_prefix_gives_the_rate() -> None:
    detector = make_module().detector
    groups = parameter_groups(detector, 0.1, 0.01, {"backbone": 0.1, "backbone.body.layer1": 0.5})
    body = detector.backbone.body
    assert rate_of(groups, body["layer1"][0].conv1.weight) == pytest.approx((0.05, 0.01))  # type: ignore[index]
    assert rate_of(groups, body["layer2"][0].conv1.weight) == pytest.approx((0.01, 0.01))  # type: ignore[index]
    assert rate_of(groups, detector.get_parameter("rpn.head.cls_logits.bias")) == (0.1, 0.0)
    assert groups[0]["part"] == "" and sum(len(g["params"]) for g in groups) == len(list(detector.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr_mult": {"backbone.bdy": 0.1}},
            r"model.lr_mult: no parameter .* with backbone.bdy; near it: .*body",
        ),
        ({"lr_mult": {"layer": 0.1}}, "begins with layer; near it"),
        ({"freeze": ["head"]}, "model.freeze: no parameter of the detector begins with head; near it"),
        ({"layer_decay": 0.75}, r"needs a backbone of timm .* with model.lr_mult"),
    ],
)
def test_a_part_that_is_not_there_is_named_with_those_near_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(**options)


def with_timm(name: str, **options: Any) -> nn.Module:
    holder = nn.Module()
    holder.backbone = timm_fpn(name, out_channels=8, **options)
    holder.head = nn.Linear(2, 2)
    return holder


def test_layers_of_a_transformer_have_the_rates_of_vitdet() -> None:
    """Detectron2's `get_vit_lr_decay_rate`: factor ** (blocks + 1 - layer), position embeddings in layer 0."""
    detector = with_timm("vit_tiny_patch16_224")
    groups = parameter_groups(detector, 1.0, 0.05, {"backbone": 0.5}, 0.75)
    prefix = "backbone.body.network."
    for name, layer in {"pos_embed": 0, "patch_embed.proj.weight": 0, "blocks.0.attn.qkv.weight": 1}.items():
        rate, decay = rate_of(groups, detector.get_parameter(prefix + name))
        assert rate == pytest.approx(0.5 * 0.75 ** (13 - layer)), name
        assert decay == (0.0 if name == "pos_embed" else 0.05)
    assert rate_of(groups, detector.get_parameter(prefix + "blocks.11.mlp.fc1.weight"))[0] == pytest.approx(0.5 * 0.75)
    fpn = next(p for name, p in detector.named_parameters() if name.startswith("backbone.fpn."))
    assert rate_of(groups, fpn)[0] == 0.5
    assert rate_of(groups, detector.get_parameter("head.weight")) == (1.0, 0.05)
    names = [group["part"] for group in groups]
    assert names[0] == "" and "backbone.layer12" in names and "backbone" in names


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "efficientnet_lite0", "regnetx_002"])
def test_layers_of_any_network_rise_from_the_image(name: str) -> None:
    detector = with_timm(name)
    flags = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(detector.parameters())]
    scales = layer_scales(detector, 0.5)
    assert flags == [p.requires_grad for p in detector.parameters()]
    assert set(scales) == {n for n, _ in detector.named_parameters() if n.startswith("backbone.body.")}
    factors = sorted(set(scales.values()), key=lambda pair: pair[1])
    assert factors == [(f"layer{i}", 0.5 ** (len(factors) - i)) for i in range(len(factors))] and len(factors) > 4
    order = [int(layer.removeprefix("layer")) for layer, _ in scales.values()]
    assert order == sorted(order)


def test_checkpoint_keeps_optimiser_and_schedule(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": partial(AdamW, betas=(0.8, 0.99)), "schedule": MultiStepSchedule([0.5], 7)}
    module = make_module(**options, images_per_batch=2, lr_mult={"rpn": 0.5}, freeze={"backbone.body": 1})
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, loader(1))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = DetectionModule.load_from_checkpoint(tmp_path / "run.ckpt", detector=make_module().detector)
    assert again.optimizer.func is AdamW and again.optimizer.keywords == {"betas": [0.8, 0.99]}  # type: ignore[attr-defined]
    assert vars(again.schedule) | {"recipe": 0} == vars(module.schedule) | {"recipe": 0}
    assert (again.lr_mult, again.freezing.epochs) == ({"rpn": 0.5}, {"backbone.body": 1})


@pytest.mark.parametrize(("kind", "schedule"), [("sgd", "cosine"), ("adamw", "multistep")])
def test_older_checkpoint_is_translated(kind: str, schedule: str, tmp_path: Path) -> None:
    module = make_module()
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(make_module(images_per_batch=2), loader(1))
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    content = torch.load(tmp_path / "old.ckpt", weights_only=True)
    old = {"optimizer": kind, "momentum": 0.8, "schedule": schedule, "milestones": [0.3], "warmup_steps": 7}
    content["hyper_parameters"] = {"class_names": ["a", "b"], "lr": 0.3, **old}
    torch.save(content, tmp_path / "old.ckpt")
    again = DetectionModule.load_from_checkpoint(tmp_path / "old.ckpt", detector=module.detector)
    assert again.lr == 0.3
    assert again.optimizer.func is (SGD if kind == "sgd" else AdamW)  # type: ignore[attr-defined]
    wanted = {"momentum": 0.8} if kind == "sgd" else {"betas": [0.8, 0.999]}
    assert again.optimizer.keywords == wanted  # type: ignore[attr-defined]
    assert type(again.schedule) is (CosineSchedule if schedule == "cosine" else MultiStepSchedule)
    assert again.schedule.warmup_steps == 7  # type: ignore[union-attr]
    assert translated(module.hparams) == {}


def test_rates_without_parts_are_one() -> None:
    optimizer = SGD(parameter_groups(make_module().detector, 0.1, 0.01), lr=0.1)
    assert rates(optimizer) == {"lr": 0.1} and len(optimizer.param_groups) == 2
