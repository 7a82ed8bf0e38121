"""Linear layers on a CPU by oneDNN, forward and backward, where PyTorch takes the BLAS.

MKL, the BLAS of PyTorch's builds, leaves AVX-512 out on AMD's processors: there oneDNN takes half the time.

Shape shorthand:
    R: rows     C, C': features of input and output
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detection.devices import has_avx512

FEWEST_WEIGHTS = 3000  # with fewer the BLAS is quicker


class OneDNNLinear(nn.Linear):
    """`nn.Linear`, by oneDNN where that is quicker."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)` -> `(..., C')`."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by oneDNN where that is quicker: in float32 on a CPU with AVX-512.

    Args:
        x: `(R, C)`; others are left to PyTorch.
        weight: `(C', C)`.
        bias: `(C',)`.
    """
    if _is_quicker(x, weight):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, weight, bias)


def _is_quicker(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    return x.ndim == 2 and x.numel() > 0 and weight.numel() >= FEWEST_WEIGHTS and has_avx512()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call, untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        back = _product(grad, weight.t()) if for_x else None
        return back, _product(grad.t(), x.t()) if for_weight else None, grad.sum(0) if for_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(R, C)` by the transpose of `(C', C)`."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
