"""The packaged recipes of transformers: each builds, takes a step, and has the rates that its paper says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath

from detection.cli.fit import FitCLI
from detection.data import scenes
from detection.devices import has_kernels
from tests.runs import rehearsed, scene_flags

FLAGS: dict[str, list[str]] = {
    "coco_fasterrcnn_vitdet_b": ["--model.detector.weights_backbone", "null", "--data.scale_jitter_size", "64"],
    "coco_maskrcnn_swin_t": ["--model.detector.backbone.weights", "null"],
}
SMALLER = {
    "coco_fasterrcnn_vitdet_b": ["--model.detector.backbone_name", "vit_tiny_patch16_224"],
    "coco_maskrcnn_swin_t": ["--model.detector.backbone.out_channels", "32"],
}


def first_step(name: str, folder: Path, *flags: str) -> FitCLI:
    data = scenes.draw(folder / "scenes", train=2, val=1)
    small = ["--data.min_size", "64", "--data.max_size", "64", "--data.num_workers", "0", "--data.batch_size", "2"]
    run = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu"]
    run += ["--output", str(folder / "runs"), "--wandb", "off", "--trainer.log_every_n_steps", "1"]
    if not has_kernels(torch.device("cpu"), torch.bfloat16):  # it is emulated then, and takes minutes
        run += ["--trainer.precision", "32-true"]
    cli = FitCLI(["--config", name, *scene_flags(data), *small, *run, *FLAGS[name], *flags])
    cli.fit()
    return cli


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", pytest.param("published", marks=pytest.mark.rehearsal)])
@pytest.mark.parametrize("name", rehearsed(FLAGS, "coco_fasterrcnn_vitdet_b"))
def test_it_builds_and_takes_a_step(name: str, size: str, tmp_path: Path) -> None:
    cli = first_step(name, tmp_path, *(SMALLER[name] if size == "small" else []))
    losses = cli.model.step_losses
    assert ("loss_mask" in losses) == ("maskrcnn" in name) and len(losses) >= 4
    assert all(math.isfinite(float(loss)) for loss in losses.values())
    network: Any = cli.model.detector.backbone.body.network
    drops = [module.drop_prob for module in network.modules() if isinstance(module, DropPath)]
    assert max(drops) == pytest.approx(0.1 if "vitdet" in name else 0.2) and drops == sorted(drops)
    assert all(parameter.requires_grad for parameter in network.parameters())
    groups = cli.trainer.optimizers[0].param_groups
    decayed = {group["weight_decay"] for group in groups}
    assert decayed == {0.0, 0.1 if "vitdet" in name else 0.05}
    rates = {group.get("part", ""): group["initial_lr"] for group in groups}
    base = (2.5e-5 if "vitdet" in name else 1e-4) * 2 / 16
    assert rates[""] == pytest.approx(base)
    if "vitdet" in name:  # 12 blocks, the last at 0.7 of the rate, the patches below the first
        parts = sorted((rate for part, rate in rates.items() if part), reverse=True)
        assert parts == pytest.approx([base * 0.7**i for i in range(1, 14)])
        plain = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        assert id(network.pos_embed) in plain and id(network.blocks[0].mlp.fc1.weight) not in plain
    else:
        tables = [p for n, p in network.named_parameters() if "relative_position_bias_table" in n]
        plain = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        assert tables and all(id(table) in plain for table in tables)
