"""Convolutions on a CPU, each by the way that takes the least time for its shape.

One way is there for safety. Of a 1x1 convolution with a stride and few channels that lie last, as in the stem of RepVGG
and MobileOne, oneDNN writes the weight's gradient beyond its memory: it is wrong, or the process ends (oneDNN issue
6035, open in September 2026). There the cells that it reads are taken out first.

Shape shorthand:
    B: images     C, C': channels of input and output     h, w: cells of a map
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.models.fast import winograd
from detection.models.fast.depthwise import depthwise, is_wide_depthwise
from detection.models.fast.linear import is_pointwise, pointwise
from detection.models.fast.winograd import is_filtered

CHANNELS_OF_A_BLOCK = 16  # in oneDNN with AVX-512, 8 without


class QuickConv2d(nn.Conv2d):
    """`nn.Conv2d`, see `conv2d`."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            return super()._conv_forward(x, weight, bias)
        return conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """`F.conv2d`, `(B, C', h', w')`, by a quicker way where there is one: `winograd`, `pointwise` or `depthwise`.

    Args:
        x: `(B, C, h, w)`.
        weight: `(C', C, n, n)`.
        bias: `(C',)`.
        *geometry: stride, padding, dilation and groups.
    """
    if _overflows(x, weight, *geometry):
        x, geometry = _thinned(x, *geometry)
    if is_filtered(x, weight.shape, *geometry) and weight.dtype == torch.float32:
        return winograd.convolve(x, weight, bias)
    if is_pointwise(x, weight, *geometry):
        return pointwise(x, weight, bias)
    if is_wide_depthwise(x, weight, *geometry):
        return depthwise(x, weight, bias, *geometry)
    return F.conv2d(x, weight, bias, *geometry)


def _overflows(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether oneDNN's weight gradient writes beyond its memory."""
    if x.device.type != "cpu" or x.ndim != 4 or torch.compiler.is_compiling() or stride in (1, (1, 1)):
        return False
    is_single = weight.shape[2:].numel() == 1 and padding in (0, (0, 0), "valid")
    return is_single and groups == 1 and x.shape[1] < CHANNELS_OF_A_BLOCK


def _thinned(x: Tensor, stride: Any, *geometry: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """The cells that a 1x1 convolution with a stride reads, and its geometry without the stride."""
    rows, columns = (stride, stride) if isinstance(stride, int) else stride
    return x[:, :, ::rows, ::columns], (1, *geometry)
