"""Zeros around a map on a CPU, without a pass over what lies within.

PyTorch fills the whole of the padded map with zeros, and then copies the other one into it.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import pad_same as pad_same_by_pytorch
from timm.layers.padding import get_same_padding
from torch import Tensor


def pad_same(x: Tensor, kernel_size: Any, stride: Any, dilation: Any) -> Tensor:
    """TensorFlow's padding for a convolution: half of the zeros on each side, the odd one below and at the right.

    Args:
        x: `(B, C, h, w)`.
        kernel_size, stride, dilation: of the convolution, a pair each.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return pad_same_by_pytorch(x, kernel_size, stride, dilation)
    height, width = map(get_same_padding, x.shape[2:], kernel_size, stride, dilation)
    frame = (width // 2, width - width // 2, height // 2, height - height // 2)
    if not any(frame):
        return x
    y: Tensor = _Framed.apply(x, frame)  # type: ignore[no-untyped-call]
    return y


def framed(x: Tensor, frame: tuple[int, int, int, int]) -> Tensor:
    """A copy of a map with zeros around it, `(B, C, top + h + bottom, left + w + right)`.

    Args:
        x: `(B, C, h, w)`.
        frame: how many columns at the left and right, and rows at the top and bottom.
    """
    left, right, top, bottom = frame
    height, width = x.shape[2:]
    order = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    shape = (*x.shape[:2], top + height + bottom, left + width + right)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
    for edge in (out[:, :, :top], out[:, :, top + height :], out[..., :left], out[..., left + width :]):
        if edge.numel():
            edge.zero_()
    _within(out, frame).copy_(x)
    return out


def _within(x: Tensor, frame: tuple[int, int, int, int]) -> Tensor:
    left, right, top, bottom = frame
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


class _Framed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frame: tuple[int, int, int, int]) -> Tensor:
        ctx.frame = frame
        return framed(x, frame)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _within(grad, ctx.frame), None
