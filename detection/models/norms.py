"""Normalisation: batch statistics that are live or frozen, and groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

Norm = Literal["frozen", "affine", "batch", "group"]


def freeze_norms(network: nn.Module, affine: bool = False) -> nn.Module:
    """The network with its batch normalisation frozen; `affine` lets its scale and shift learn.

    Those learn as of batch normalisation in evaluation mode. MMDetection trains so (`norm_eval`).
    """
    frozen = freeze_batch_norm_2d(network)
    for norm in (m for m in frozen.modules() if affine and isinstance(m, FrozenBatchNorm2d | FrozenBatchNormAct2d)):
        norm.weight, norm.bias = nn.Parameter(norm.weight), nn.Parameter(norm.bias)
    return frozen


def affine_norm(channels: int) -> nn.Module:
    """Frozen statistics with a scale and a shift that learn, see `freeze_norms`."""
    return freeze_norms(nn.BatchNorm2d(channels), affine=True)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation (Wu and He 2018) with 32 groups, or the most that divide the channels."""
    return nn.GroupNorm(next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0), channels)


NORM_LAYERS: Mapping[Norm, Callable[[int], nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "affine": affine_norm,
    "batch": nn.BatchNorm2d,
    "group": group_norm,
}


def replace_batch_norm(network: nn.Module) -> None:
    """Put group normalisation in the place of batch normalisation, and keep the activations that timm joins to it."""
    for name, module in list(network.named_modules()):
        if isinstance(module, BatchNormAct2d):
            parts = (group_norm(module.num_features), module.drop, module.act)
            network.set_submodule(name, nn.Sequential(*parts))
        elif isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, group_norm(module.num_features))
