"""What processes share: statistics of timm's networks too, and the state of an optimiser, with the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from detection import ShardedOptimizer, load_detector
from detection.data import scenes
from detection.errors import RunError
from detection.models.backbones import resnet_fpn
from detection.models.timm_backbones import timm_fpn
from detection.training.optimisation import build_optimizer, state_per_parameter
from detection.training.sharing import SyncNorms
from tests.runs import ROOT, differences, scene_flags, state

WATCH = """
import json
import os
import lightning as L
import torch

class Watch(L.Callback):
    def on_train_end(self, trainer, module):
        optimizer = trainer.optimizers[0]
        inner = getattr(optimizer, "optim", optimizer)
        kept = sum(v.numel() for s in inner.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        wanted = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        with open(os.path.join(trainer.default_root_dir, f"kept{trainer.global_rank}.json"), "w") as file:
            json.dump([type(optimizer).__name__, kept, wanted], file)
"""
VIT = """
model:
  lr: 0.003
  weight_decay: 0.05
  layer_decay: 0.8
  schedule: {class_path: detection.MultiStepSchedule, init_args: {milestones: [], warmup_steps: 0}}
  optimizer: OPTIMIZER
  detector:
    class_path: detection.fasterrcnn_timm_fpn
    init_args:
      backbone_name: vit_tiny_patch16_224
      window_size: 2
      fpn_channels: 16
      box_head: {class_path: detection.models.roi_heads.TwoFCHead, init_args: {in_channels: 16, out_channels: 32}}
"""
ADAMW = "{class_path: torch.optim.AdamW, init_args: {betas: [0.9, 0.95]}}"
SHARDED = f"{{class_path: detection.ShardedOptimizer, init_args: {{optimizer: {ADAMW}}}}}"


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_synchronised_norms_compute_the_same_and_keep_their_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With saved statistics, which is what a CPU can run. PyTorch's own conversion drops activations of timm's."""
    torch.manual_seed(0)
    make = resnet_fpn if name == "resnet18" else timm_fpn
    network = make(name, norm="batch", out_channels=16).eval()
    images, names = torch.rand(1, 3, 64, 64), list(network.state_dict())
    with torch.no_grad():
        expected = network(images)
        with pytest.raises(RunError, match="sync_batchnorm needs GPUs"):
            SyncNorms().apply(network)
        monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda"), raising=False)
        converted = SyncNorms().apply(network)
        monkeypatch.undo()
        found = converted(images)
    kinds = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds and all(isinstance(m, nn.SyncBatchNorm) for m in kinds)
    assert list(converted.state_dict()) == names
    assert differences(expected, found) == []


def test_one_process_has_the_optimiser_alone() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    group = {"params": [weight], "weight_decay": 0.1}
    optimizer = build_optimizer(ShardedOptimizer, [group], 0.5, 0.1)
    assert type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["weight_decay"] == 0.1
    assert state_per_parameter(ShardedOptimizer) == 2


def fit(folder: Path, root: Path, optimizer: str, epochs: int, *flags: str) -> Path:
    (folder / "watch.py").write_text(WATCH)
    (folder / "vit.yaml").write_text(VIT.replace("OPTIMIZER", optimizer))
    command = [sys.executable, str(ROOT / "scripts" / "fit.py"), "--config", "vit.yaml", *scene_flags(root), *flags]
    command += ["--data.min_size", "64", "--data.max_size", "96", "--data.batch_size", "2", "--data.num_workers", "0"]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command += ["--trainer.callbacks+", "watch.Watch", "--trainer.max_epochs", str(epochs), "--wandb", "off"]
    command += ["--output", "runs", "--trainer.log_every_n_steps", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (folder / "runs" / "quickstart").iterdir()
    return run


@pytest.mark.rehearsal
def test_a_vit_with_a_sharded_optimiser_trains_and_goes_on_as_with_a_whole_one(tmp_path: Path) -> None:
    """Two processes, two epochs at once with AdamW; and one epoch, then another, with its state divided."""
    root = scenes.draw(tmp_path / "scenes", train=8, val=2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "divided").mkdir()
    whole = fit(tmp_path / "whole", root, ADAMW, 2)
    divided = fit(tmp_path / "divided", root, SHARDED, 1)
    first = state(divided / "last.ckpt")
    again = fit(tmp_path / "divided", root, SHARDED, 2, "--resume", "auto")
    assert again == divided and first["global_step"] < state(divided / "last.ckpt")["global_step"]
    expected, found = state(whole / "last.ckpt"), state(divided / "last.ckpt")
    assert differences(expected["state_dict"], found["state_dict"]) == []
    kept = [json.loads((divided / f"kept{rank}.json").read_text()) for rank in range(2)]
    (_, alone, wanted) = json.loads((whole / "kept0.json").read_text())
    assert {name for name, _, _ in kept} == {"ShardedOptimizer"}
    assert alone > 2 * wanted and max(size for _, size, _ in kept) < 0.6 * alone
    assert sum(size for _, size, _ in kept) == alone
    detector = load_detector(divided / "last.ckpt")
    weights = {f"detector.{name}": value for name, value in detector.state_dict().items()}
    assert differences(weights, {name: found["state_dict"][name] for name in weights}) == []
