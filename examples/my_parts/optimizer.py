"""An optimiser, see `OptimizerFactory` in `detection.training.optimisation`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class SignMomentum(Optimizer):
    """Moves each weight by the rate, in the direction of the momentum's sign (Lion, Chen et al. 2023, with one beta).

    Args:
        params, lr, weight_decay: from the training.
        beta: share of the momentum that is kept.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["beta"])
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * momentum.sign())
        return loss
