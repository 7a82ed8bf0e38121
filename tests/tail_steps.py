"""Steps of losses of long tails, on all rows or as one of two processes; a file of its own, as those start quicker."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from detection.imbalance import EqualizationLoss, FederatedLoss, SeesawLoss, SigmoidFocalLoss
from detection.losses import class_loss_of_rows, mean_over

K, ROWS = 6, 48  # classes with background, regions of a step
OFTEN = torch.tensor([24.0, 12, 6, 3, 2, 1])
LOSSES: dict[str, Callable[[], Any]] = {
    "seesaw": SeesawLoss,
    "equalization": EqualizationLoss,
    "federated": lambda: FederatedLoss(3, [100, 64, 36, 16, 4]),
    "focal": SigmoidFocalLoss,
}


def step(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `(ROWS, K)`, labels of a long tail `(ROWS,)`, and which rows are valid; the others have label 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(OFTEN, ROWS, True, generator=generator)
    valid = torch.rand(ROWS, generator=generator) < 0.8
    return 2 * torch.randn((ROWS, K), generator=generator), torch.where(valid, labels, 0), valid


def run(name: str, rank: int | None) -> dict[str, Tensor]:
    """Losses, gradients and sums of some steps, of all rows or of every second one."""
    torch.manual_seed(7 + (rank or 0))  # the classes of the federated loss are the first process's
    loss, kept = LOSSES[name](), []
    part = slice(None) if rank is None else slice(rank, None, 2)
    for seed in range(3):
        logits, labels, valid = step(seed)
        own = logits[part].requires_grad_()
        rows = class_loss_of_rows(loss, own[None], labels[None, part], valid[None, part], None)
        mean = mean_over(rows, valid[part], valid[part])
        (gradient,) = torch.autograd.grad(mean, own)
        kept += [mean.detach(), gradient]
    sums = getattr(loss, "sums", torch.zeros(0))
    return {"losses": torch.stack(kept[::2]), "gradients": torch.stack(kept[1::2]), "sums": sums}


def as_one_of_two(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """What `run` gives of each loss, beside another process that does the same with the other rank."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        return {name: run(name, rank) for name in LOSSES}
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(as_one_of_two(1, Path(sys.argv[1])), Path(sys.argv[1]) / "1.pt")
