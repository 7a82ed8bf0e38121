"""What several processes share beside gradients: statistics of batches, and the memory of an optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from timm.layers import convert_sync_batchnorm
from torch import distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer

from detection.errors import RunError
from detection.recipes import recorded
from detection.training.optimisation import OptimizerFactory, takes_fused


class SyncNorms(TorchSyncBatchNorm):
    """`--trainer.sync_batchnorm`: batch normalisation over the batches of all processes, that of timm's networks too.

    PyTorch's own conversion, which Lightning calls, would leave out the activations that timm joins to it.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with its live batch normalisation converted, in place and under the same names.

        Raises:
            RunError: it is on a CPU, for which PyTorch has no synchronised form.
        """
        if next(model.parameters()).device.type == "cpu":
            raise RunError(
                "trainer.sync_batchnorm needs GPUs, as PyTorch has no synchronised batch normalisation for CPUs: leave "
                "it out, or take a detector whose normalisation is frozen or group",
                on_all_ranks=True,
            )
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted


@recorded
class ShardedOptimizer(ZeroRedundancyOptimizer):
    """An optimiser whose state is divided among the processes of DDP (ZeRO, Rajbhandari et al. 2020, stage 1).

    Each process keeps the state of its share of the parameters, moves them, and sends them to the others: the weights
    are those of the optimiser alone. Checkpoints have the whole state and go on with any number of processes. With one
    process it is the optimiser alone.

    Args:
        params: groups of parameters.
        lr, weight_decay: of a group without its own, see `OptimizerFactory`.
        optimizer: whose state is divided, as `model.optimizer` takes it.
        fused: let it move all its parameters at once, where it can.
    """

    def __new__(  # type: ignore[misc]
        cls,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        optimizer: OptimizerFactory = AdamW,
        fused: bool | None = None,
    ) -> Optimizer:
        """The optimiser alone where there is nobody to share with."""
        if not (dist.is_available() and dist.is_initialized()):
            return optimizer(params, lr=lr, weight_decay=weight_decay, **_fused(optimizer, fused))
        return super().__new__(cls)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        optimizer: OptimizerFactory = AdamW,
        fused: bool | None = None,
    ) -> None:
        rates = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, optimizer, **rates, **_fused(optimizer, fused))  # type: ignore[arg-type]


def _fused(optimizer: OptimizerFactory, wanted: bool | None) -> dict[str, bool]:
    return {"fused": True} if wanted and takes_fused(optimizer) else {}
