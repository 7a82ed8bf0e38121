"""Two processes with half of the batch each learn what one learns with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from detection.batch import Batch, pad_objects
from detection.models.backbones import resnet_fpn
from detection.models.compose import mask_rcnn
from detection.training.module import DetectionModule

STEPS = 20


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
        rpn_post_nms_top_n_train=20,
        rpn_batch_size_per_image=1_000_000,
        rpn_positive_fraction=1.0,
        box_batch_size_per_image=1_000,
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


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
