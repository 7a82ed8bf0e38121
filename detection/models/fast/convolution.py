"""Convolutions on a CPU, each by the way that takes the least time for its shape.

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
    if is_filtered(x, weight.shape, *geometry) and weight.dtype == torch.float32:
        return winograd.convolve(x, weight, bias)
    if is_pointwise(x, weight, *geometry):
        return pointwise(x, weight, bias)
    if is_wide_depthwise(x, weight, *geometry):
        return depthwise(x, weight, bias, *geometry)
    return F.conv2d(x, weight, bias, *geometry)
