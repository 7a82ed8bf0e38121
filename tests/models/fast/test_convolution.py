"""The choice among ways of a convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from detection.models.fast import linear, winograd
from detection.models.fast.convolution import QuickConv2d, conv2d

ORDERS = torch.channels_last, torch.contiguous_format


class Watch(TorchDispatchMode):
    """Notes the strides of convolutions in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.strides.append(args[4])
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("channels", [1, 3, 4, 15])
@pytest.mark.parametrize("stride", [2, (2, 3)])
@pytest.mark.parametrize("bf16", [False, True])
def test_single_cells_with_a_stride_and_few_channels_have_the_right_gradient(
    channels: int, stride: Any, bf16: bool
) -> None:
    """oneDNN has a wrong one, or ends the process, with the channels last (its issue 6035)."""
    torch.manual_seed(0)
    layer = QuickConv2d(channels, 48, 1, stride).to(memory_format=torch.channels_last)
    x = torch.randn(4, channels, 63, 64).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x)
    share = torch.randn(y.shape).to(memory_format=torch.channels_last)
    with Watch() as watch:
        found = [y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), share.to(y.dtype))]
    assert all(moves in ([1, 1], (1, 1)) for moves in watch.strides)  # others may be right by chance
    given = [value.detach().double().requires_grad_() for value in (x, layer.weight, layer.bias)]
    exact = F.conv2d(*given, stride)
    rough = {"rtol": 0.02, "atol": 0.5} if bf16 else {"rtol": 1e-5, "atol": 1e-3}
    for ours, wanted in zip(found, (exact, *torch.autograd.grad(exact, given, share.double())), strict=True):
        torch.testing.assert_close(ours.double(), wanted, **rough)


@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (5, 128)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("order_of_weight", ORDERS)
def test_the_outputs_lie_in_memory_as_pytorchs(
    kernel: int, groups: int, order: Any, order_of_weight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With channels first they may be viewed as rows."""
    monkeypatch.setattr(linear, "has_avx512", lambda: True)
    monkeypatch.setattr(winograd, "has_avx512", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = torch.randn(2, 128, 40, 39).to(memory_format=order)
    weight = torch.randn(128, 128 // groups, kernel, kernel).to(memory_format=order_of_weight).requires_grad_()
    geometry: Any = 1, kernel // 2, 1, groups
    y, usual = conv2d(x, weight, None, *geometry), F.conv2d(x, weight, None, *geometry)
    assert y.stride() == usual.stride()
    torch.testing.assert_close(y, usual, rtol=1e-4, atol=1e-3)
