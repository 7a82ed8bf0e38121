"""Frozen parts hold still until their epoch, in one process and in two; `test_resume` resumes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader

from detection.batch import Batch
from detection.models.backbones import resnet_fpn
from detection.models.compose import faster_rcnn
from detection.models.roi_heads import TwoFCHead
from detection.training.module import DetectionModule
from tests.runs import differences
from tests.test_module import make_batch
from tests.test_optimisation import QUIET

STEM, LAYER, HEAD = "backbone.body.conv1.weight", "backbone.body.layer4.0.conv1.weight", "rpn.head.cls_logits.weight"
FREEZE = {"backbone.body": 2, "backbone.body.layer4": 1}


def make(freeze: Any = FREEZE, **options: Any) -> DetectionModule:
    torch.manual_seed(0)
    backbone = resnet_fpn("resnet18", norm="batch", trainable_layers=5, out_channels=16)
    counts = {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
    # Every anchor and proposal trains, so that chance, which a resumed run would have to restore, has no part.
    every = {"rpn_batch_size_per_image": 10**6, "rpn_positive_fraction": 1.0, "box_batch_size_per_image": 1000}
    detector = faster_rcnn(backbone, 3, box_head=TwoFCHead(16, 7, 32), box_positive_fraction=1.0, **every, **counts)
    settings: dict[str, Any] = {"optimizer": AdamW, "lr": 0.01, "images_per_batch": 2, "freeze": freeze}
    return DetectionModule(detector, ["a", "b"], **settings | options).train()


def batches(rank: int = 0) -> DataLoader[Batch]:
    return DataLoader([make_batch(2, 128, 96 + 32 * ((i + rank) % 3)) for i in range(2)], batch_size=None)


class Watch(L.Callback):
    """Weights and statistics at the beginning and the end of each epoch."""

    def __init__(self) -> None:
        self.moved: list[dict[str, bool]] = []
        self._before: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._before = {name: value.clone() for name, value in pl_module.detector.state_dict().items()}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        after = pl_module.detector.state_dict()
        self.moved.append({name: not torch.equal(value, after[name]) for name, value in self._before.items()})


def moving(watch: Watch, name: str) -> list[bool]:
    return [epoch[name] for epoch in watch.moved]


def test_each_part_begins_to_train_in_its_epoch() -> None:
    watch = Watch()
    L.Trainer(max_epochs=3, callbacks=[watch], **QUIET).fit(make(), batches())
    assert moving(watch, STEM) == [False, False, True]
    assert moving(watch, LAYER) == [False, True, True]
    assert moving(watch, HEAD) == [True, True, True]
    assert moving(watch, "backbone.body.bn1.running_mean") == [False, False, True]
    assert moving(watch, "backbone.body.layer4.0.bn1.running_var") == [False, True, True]


def test_what_is_frozen_for_good_is_in_no_group_and_never_moves() -> None:
    watch, module = Watch(), make(["backbone.body", "roi_heads"])
    trainer = L.Trainer(max_epochs=2, callbacks=[watch], **QUIET)
    trainer.fit(module, batches())
    held = [name for name in watch.moved[0] if name.startswith(("backbone.body", "roi_heads"))]
    assert not any(epoch[name] for epoch in watch.moved for name in held) and len(held) > 100
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    wanted = {id(p) for n, p in module.detector.named_parameters() if n.startswith(("backbone.fpn", "rpn"))}
    assert trained == wanted


def test_frozen_statistics_stay_whatever_the_mode() -> None:
    module = make()
    assert not module.detector.backbone.body["bn1"].training and module.detector.rpn.training  # type: ignore[index]
    module.eval().train()
    assert not module.detector.backbone.body["layer4"][0].bn1.training  # type: ignore[index]
    module.freezing.begin(module.detector, 1)
    assert module.detector.backbone.body["layer4"][0].bn1.training  # type: ignore[index]
    assert not module.detector.backbone.body["bn1"].training  # type: ignore[index]


def test_what_the_builder_froze_stays_frozen() -> None:
    torch.manual_seed(0)
    backbone = resnet_fpn("resnet18", norm="frozen", trainable_layers=2, out_channels=16)
    detector = faster_rcnn(backbone, 3, box_head=TwoFCHead(16, 7, 32))
    module = DetectionModule(detector, ["a", "b"], freeze={"backbone": 1})
    module.freezing.begin(detector, 5)
    assert not detector.get_parameter(STEM).requires_grad and detector.get_parameter(LAYER).requires_grad


def main(rank: int, folder: Path) -> None:
    """One of two processes, each with batches of its own."""
    strategy = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
    watch, module = Watch(), make()
    parallel: dict[str, Any] = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    L.Trainer(max_epochs=3, callbacks=[watch], **parallel, **QUIET).fit(module, batches(rank))
    moved = {name: moving(watch, name) for name in (STEM, LAYER, HEAD)}
    weights = {name: value.detach() for name, value in module.detector.named_parameters()}
    torch.save({"weights": weights, "moved": moved}, folder / f"{rank}.pt")


@pytest.mark.rehearsal
def test_two_processes_unfreeze_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment | {"LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["moved"] == second["moved"]
    wanted = {STEM: [False, False, True], LAYER: [False, True, True], HEAD: [True, True, True]}
    assert first["moved"] == wanted
    # A parameter that DDP did not know to train would have moved by the gradient of its own process alone.
    assert differences(first["weights"], second["weights"]) == []


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
