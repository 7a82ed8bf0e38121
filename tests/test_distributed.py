"""Two processes with half of the batch each learn what one learns with all of it."""

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
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from detection.batch import Batch, pad_objects
from detection.models.backbones import resnet_fpn
from detection.models.compose import mask_rcnn
from detection.training.module import DetectionModule
from detection.training.optimisation import MultiStepSchedule

STEPS = 10


class Losses(torch.nn.Module):
    """What DDP needs: a `forward` that gives the loss."""

    def __init__(self, module: DetectionModule) -> None:
        super().__init__()
        self.detector = module.detector

    def forward(self, batch: Batch) -> Tensor:
        losses, _ = self.detector.run(batch, with_losses=True, with_detections=False)
        return torch.stack(list(losses.values())).sum()


def make_module() -> DetectionModule:
    torch.manual_seed(0)
    # Every anchor and every proposal is in the sample, so that chance, which each process draws by itself, has no part.
    detector = mask_rcnn(
        resnet_fpn("resnet18", norm="group", out_channels=32),
        num_classes=3,
        rpn_post_nms_top_n_train=8,
        rpn_batch_size_per_image=1_000_000,
        rpn_positive_fraction=1.0,
        box_batch_size_per_image=11,  # 8 proposals and up to 3 objects
        box_positive_fraction=1.0,
    )
    with torch.no_grad():  # scores that lie apart, or the last bit of a sum decides which proposals there are
        detector.rpn.head.cls_logits.weight.mul_(10)  # type: ignore[operator, union-attr]
    return DetectionModule(detector, ["a", "b"]).train()


def make_batch(step: int) -> Batch:
    """Four images of 64 pixels with 3, 0, 1 and 2 objects: the two halves differ in objects and in foreground."""
    generator = torch.Generator().manual_seed(step)
    boxes, labels = [], []
    for count in (3, 0, 1, 2):
        corner = torch.rand((count, 2), generator=generator) * 30
        boxes.append(torch.cat((corner, corner + 8 + torch.rand((count, 2), generator=generator) * 24), dim=1))
        labels.append(torch.randint(1, 3, (count,), generator=generator))
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[64, 64]] * 4)
    gt_boxes, gt_labels, gt_valid = pad_objects(boxes, labels)
    masks = torch.randint(0, 256, (4, 3, 14, 14), generator=generator, dtype=torch.uint8)
    return Batch(images, sizes, gt_boxes, gt_labels, gt_valid, sizes, gt_masks=masks, gt_mask_windows=gt_boxes)


def part_of(batch: Batch, rank: int) -> Batch:
    return batch._map(lambda tensor: tensor[2 * rank : 2 * rank + 2])


def train(rank: int | None) -> tuple[Tensor, list[float]]:
    """All weights and the losses after some steps, alone or as one of two."""
    torch.set_num_threads(1)
    losses: torch.nn.Module = Losses(make_module())
    parameters = [p for p in losses.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.00003, momentum=0.9)
    if rank is not None:
        losses = DistributedDataParallel(losses)
    history = []
    for step in range(STEPS):
        batch = make_batch(step)
        loss = losses(batch if rank is None else part_of(batch, rank))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.detach().clone()
        if rank is not None:
            distributed.all_reduce(value)
            value /= 2
        history.append(float(value))
    return torch.cat([p.detach().flatten() for p in parameters]), history


def main(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    weights, history = train(rank)
    torch.save({"weights": weights, "losses": torch.tensor(history)}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    start = torch.cat([p.detach().flatten() for p in make_module().parameters() if p.requires_grad])
    weights, losses = train(None)
    assert [process.wait(300) for process in processes] == [0, 0]
    assert (weights - start).abs().max() > 1e-3 and losses[-1] < losses[0]  # it learned, so there is something to equal
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["weights"], weights, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["losses"], torch.tensor(losses), rtol=1e-5, atol=1e-5)


CLIP = 1.0  # less than the norm of any step's gradients


class Watch(L.Callback):
    """Gradients' norms before they are clipped, and the weights after each batch."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []
        self.weights: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.weights.append(flat(pl_module))


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


def fit(rank: int | None, clip: float | None = CLIP) -> dict[str, Tensor]:
    """Two steps of two accumulated batches each, clipped and averaged, by Lightning's trainer."""
    torch.set_num_threads(1)
    module, watch = make_module(), Watch()
    module.images_per_batch, module.lr = (4 if rank is None else 2), 0.05
    module.schedule = MultiStepSchedule(warmup_steps=0)
    batches = [make_batch(step) if rank is None else part_of(make_batch(step), rank) for step in range(4)]
    processes: dict[str, Any] = {"devices": 1}
    if rank is not None:
        processes = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    trainer = L.Trainer(
        max_steps=2,
        accumulate_grad_batches=2,
        gradient_clip_val=clip,
        callbacks=[watch, EMAWeightAveraging(decay=0.5)],
        accelerator="cpu",
        use_distributed_sampler=False,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        **processes,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    # At the end of training the average is in the place of the weights.
    return {"norms": torch.stack(watch.norms), "weights": torch.stack(watch.weights), "average": flat(module)}


@pytest.mark.slow
def test_accumulation_clipping_and_average_of_two_processes_equal_those_of_one(tmp_path: Path) -> None:
    """Two steps: gradients' norms, weights after each batch and their average, to a thousandth of what they moved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "NODE_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path), "fit"], env=environment | {"LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    start, one, unclipped = flat(make_module()), fit(None), fit(None, clip=None)
    assert [process.wait(300) for process in processes] == [0, 0]
    weights = one["weights"]
    assert torch.equal(weights[0], start) and torch.equal(weights[1], weights[2])  # a step is two batches
    assert one["norms"].min() > 2 * CLIP and (unclipped["weights"][-1] - weights[-1]).abs().max() > 1e-3
    torch.testing.assert_close(one["average"], (weights[1] + weights[3]) / 2)
    moved = float((weights[3] - start).abs().max())
    assert moved > 1e-3
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["norms"], one["norms"], rtol=1e-4, atol=0)
        for name in ("weights", "average"):
            torch.testing.assert_close(found[name], one[name], rtol=0, atol=moved / 1000)


if __name__ == "__main__":
    if sys.argv[3:] == ["fit"]:
        torch.save(fit(int(sys.argv[1])), Path(sys.argv[2]) / f"{sys.argv[1]}.pt")
    else:
        main(int(sys.argv[1]), Path(sys.argv[2]))
