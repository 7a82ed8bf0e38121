"""Gradients that are differentiated themselves, as a penalty on a gradient needs it: those of PyTorch.

Quick forms compute their gradients by kernels that have none. So where a graph of the backward pass is asked for
(`create_graph`), which PyTorch tells by the gradient mode in it, they give PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def convolution_backward(
    ctx: Any, grad: Tensor, padding: Sequence[int], stride: Sequence[int] = (1, 1), groups: int = 1
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a convolution's input, weight and bias, with a graph.

    Args:
        ctx: of the backward pass, with the input and the weight as its saved tensors.
        grad: `(B, C', h', w')`, of the output.
        padding, stride, groups: of the convolution.
    """
    x, weight = ctx.saved_tensors
    rest: Any = stride, padding, (1, 1), False, (0, 0), groups, ctx.needs_input_grad[:3]
    found: Any = torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *rest)
    return found
