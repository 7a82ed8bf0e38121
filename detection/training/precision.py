"""`precision` bf16-true, 16-true and 64-true: weights, and the layers they are in, in that type; boxes stay float32.

And `bf16-mixed`, with clipping.

Lightning converts a whole batch and module, anchors and boxes too: in bfloat16 a coordinate of 300 is right to a pixel.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn

from detection.devices import HALVES, emulation

log = logging.getLogger(__name__)


class WeightPrecision(Precision):
    """Layers with weights have them in a type, and get what comes in as such; everything between is as it was.

    Args:
        precision: Lightning's name of it.
        dtype: of the weights.
    """

    def __init__(self, precision: Any, dtype: torch.dtype) -> None:
        self.precision = precision
        self.dtype = dtype

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert, in place, the layers that have weights of their own, with their statistics."""
        for layer in module.modules():
            weights = [p for p in layer.parameters(recurse=False) if p.is_floating_point()]
            if weights and not getattr(layer, "_in_precision", False):
                for name, value in layer.named_buffers(recurse=False):
                    if value.is_floating_point():
                        layer._buffers[name] = value.to(self.dtype)
                for weight in weights:
                    weight.data = weight.data.to(self.dtype)
                layer.register_forward_pre_hook(self._cast)
                layer._in_precision = True  # type: ignore[assignment]
        return module

    def _cast(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.to(self.dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


class UnscaledPrecision(MixedPrecision):
    """`bf16-mixed`, whose gradients have no scale, so that those of a fused optimiser can be clipped as any.

    Lightning refuses it as for float16, where the fused optimiser takes the scale off too late.
    """

    def clip_gradients(self, *args: Any, **options: Any) -> None:
        """As in float32."""
        Precision.clip_gradients(self, *args, **options)


def choose_precision(trainer: L.Trainer) -> None:
    """Put ours in the place of Lightning's plugins that convert all of a batch, or refuse to clip what has no scale.

    A type that the device emulates is said aloud.
    """
    plugin = trainer.strategy.precision_plugin
    if half := HALVES.get(str(plugin.precision).partition("-")[0]):
        said = emulation(trainer.strategy.root_device, half, "--trainer.precision")
        if said:
            log.warning("%s", said)
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        trainer.strategy.precision_plugin = UnscaledPrecision("bf16-mixed", plugin.device)
    elif type(plugin) is DoublePrecision:
        trainer.strategy.precision_plugin = WeightPrecision("64-true", torch.float64)
    elif type(plugin) is HalfPrecision:
        dtype = torch.bfloat16 if plugin.precision == "bf16-true" else torch.float16
        trainer.strategy.precision_plugin = WeightPrecision(plugin.precision, dtype)
