"""Linear layers and 1x1 convolutions on a CPU by oneDNN, forward and backward, where PyTorch takes the BLAS.

MKL, the BLAS of PyTorch's builds, leaves AVX-512 out on AMD's processors: there oneDNN takes half the time. PyTorch
takes it for linear layers, and on one thread for 1x1 convolutions of fewer than 16 images.

Shape shorthand:
    R: rows     C, C': features of input and output     B: images     h, w: cells of a map
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.devices import has_avx512, may_be_quick
from detection.models.fast.twice import convolution_backward

FEWEST_PRODUCTS = 5_000_000  # with fewer Python takes longer than the kernel gains


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
    if x.ndim == 2 and _is_quicker(x, weight):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return F.linear(x, weight, bias)


def is_pointwise(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution is one that `pointwise` does in less time.

    Args:
        x: `(B, C, h, w)`.
        weight: `(C', C, n, n)`.
        stride, padding, dilation, groups: of the convolution.
    """
    if not _is_quicker(x, weight) or torch.get_num_threads() > 1:  # what is compiled knows no number of threads
        return False
    plain = stride in (1, (1, 1)) and padding in (0, (0, 0), "valid", "same") and dilation in (1, (1, 1))
    return plain and groups == 1 and weight.shape[2:].numel() == 1 and x.ndim == 4 and len(x) < 16 and x.stride(1) == 1


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution `(B, C', h, w)` of a map `(B, C, h, w)` with a weight `(C', C, 1, 1)`."""
    y: Tensor = _Pointwise.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def _is_quicker(x: Tensor, weight: Tensor) -> bool:
    if not may_be_quick(x) or weight.dtype != torch.float32 or not has_avx512():
        return False
    return x.numel() * len(weight) >= FEWEST_PRODUCTS


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a gradient of the gradient
            return grad @ weight, grad.t() @ x, grad.sum(0) if for_bias else None
        back = _product(grad, weight.t()) if for_x else None
        return back, _outer(x, grad) if for_weight else None, grad.sum(0) if for_bias else None


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return convolution_backward(ctx, grad, (0, 0))
        grad = grad.contiguous(memory_format=torch.channels_last)
        back = _convolve(grad, weight.transpose(0, 1)) if for_x else None
        rows, errors = (values.permute(0, 2, 3, 1).flatten(0, 2) for values in (x, grad))
        of_weight = _outer(rows, errors).view(weight.shape) if for_weight else None
        return back, of_weight, grad.sum((0, 2, 3)) if for_bias else None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(B, C, h, w)` by `(C', C, 1, 1)`."""
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
    return y


def _outer(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient `(C', C)` of a weight from the inputs `(R, C)` and the gradients `(R, C')`."""
    if x.shape[1] < grad.shape[1]:  # the left factor is copied into another order, so it should be the smaller one
        return _product(x.t(), grad.t()).t()
    return _product(grad.t(), x.t())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(R, C)` by the transpose of `(C', C)`."""
    if not weight.is_contiguous() and not (columns := weight.t()).is_contiguous():
        # Half of a map's channels, or one token of each image: oneDNN would take a kernel hundreds of times as slow.
        weight = columns.contiguous().t()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
