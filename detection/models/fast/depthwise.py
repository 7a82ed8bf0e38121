"""Depthwise convolutions in training on a CPU: the gradient of a wide weight, three columns at a time.

oneDNN's kernel for that gradient knows filters of up to three columns, and any number of rows. A wider one goes to a
kernel made for many channels, at ten times the time: with 5x5 filters more than the layer's other two passes together.

Shape shorthand:
    B: images     C: channels     h, w: cells of a map
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detection.devices import may_be_quick
from detection.models.fast.padding import framed
from detection.models.fast.twice import convolution_backward

COLUMNS = 3  # that the kernel knows
FEWEST_PRODUCTS = 700_000  # of each part of the weight; with fewer Python takes longer than the kernel gains


def is_wide_depthwise(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution is one that `depthwise` trains in less time.

    Args:
        x: `(B, C, h, w)`.
        weight: `(C, 1, n, m)`.
        stride, padding, dilation, groups: of the convolution.
    """
    if not may_be_quick(x) or not weight.requires_grad or not torch.is_grad_enabled():
        return False
    if weight.dtype != torch.float32 or x.ndim != 4 or not x.numel() or not torch.backends.mkldnn.is_available():
        return False
    if not groups == len(weight) == x.shape[1] > 1 or weight.shape[-1] <= COLUMNS:
        return False
    moves = stride**2 if isinstance(stride, int) else math.prod(stride)
    products = x.numel() // moves * weight[0].numel()
    is_worth_it = products >= FEWEST_PRODUCTS * -(-weight.shape[-1] // COLUMNS)
    return is_worth_it and dilation in (1, (1, 1)) and not isinstance(padding, str)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """The convolution `(B, C, h', w')` of a map `(B, C, h, w)` with a weight `(C, 1, n, m)`.

    Args:
        x, weight, bias: of the convolution.
        *geometry: stride, padding, dilation and groups.
    """
    y: Tensor = _Depthwise.apply(x, weight, bias, *geometry)  # type: ignore[no-untyped-call]
    return y


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """The gradient `(C, 1, n, m)` of the weight from the input and the gradient `(B, C, h', w')` of the output."""
    total, width = torch.empty_like(weight), x.shape[3]
    reach = stride[1] * (grad.shape[3] - 1) + COLUMNS  # columns of the input that three of the weight meet
    for first in range(0, weight.shape[3], COLUMNS):
        first = min(first, weight.shape[3] - COLUMNS)
        start = first - padding[1]
        part = x[..., max(start, 0) : max(start + reach, 0)]
        if start < 0 or start + reach > width:
            part = framed(part, (max(-start, 0), reach - max(-start, 0) - part.shape[3], 0, 0))
        columns = slice(first, first + COLUMNS)
        rest: Any = stride, [padding[0], 0], [1, 1], False, [0, 0], len(weight), [False, True, False]
        total[..., columns] = torch.ops.aten.convolution_backward(grad, part, weight[..., columns], None, *rest)[1]
    return total


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        *moves, groups = ctx.geometry
        stride, padding, dilation = ([move] * 2 if isinstance(move, int) else list(move) for move in moves)
        if torch.is_grad_enabled():
            return *convolution_backward(ctx, grad, padding, stride, groups), None, None, None, None
        rest: Any = stride, padding, dilation, False, [0, 0], groups, [for_x, False, False]
        back = torch.ops.aten.convolution_backward(grad, x, weight, None, *rest)[0] if for_x else None
        of_weight = weight_gradient(x, grad, weight, stride, padding) if for_weight else None
        return back, of_weight, grad.sum((0, 2, 3)) if for_bias else None, None, None, None, None
