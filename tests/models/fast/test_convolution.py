"""The choice among ways of a convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detection.models.fast import depthwise, linear, winograd
from detection.models.fast.convolution import QuickConv2d, conv2d
from tests.models.fast.calls import Calls

ORDERS = torch.channels_last, torch.contiguous_format


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
    with Calls(torch.ops.aten.convolution_backward.default) as calls:
        found = [y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), share.to(y.dtype))]
    assert all(tuple(given[4]) == (1, 1) for given in calls.arguments)  # strides; others may be right by chance
    given = [value.detach().double().requires_grad_() for value in (x, layer.weight, layer.bias)]
    exact = F.conv2d(*given, stride)
    rough = {"rtol": 0.02, "atol": 0.5} if bf16 else {"rtol": 1e-5, "atol": 1e-3}
    for ours, wanted in zip(found, (exact, *torch.autograd.grad(exact, given, share.double())), strict=True):
        torch.testing.assert_close(ours.double(), wanted, **rough)


WAYS = pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (5, 128)])  # pointwise, filtered, depthwise


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick ways on every processor, however little there is to do."""
    monkeypatch.setattr(linear, "has_avx512", lambda: True)
    monkeypatch.setattr(winograd, "has_avx512", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for module in (linear, depthwise):
        monkeypatch.setattr(module, "FEWEST_PRODUCTS", 1)


@WAYS
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("order_of_weight", ORDERS)
@pytest.mark.usefixtures("everywhere")
def test_the_outputs_lie_in_memory_as_pytorchs(kernel: int, groups: int, order: Any, order_of_weight: Any) -> None:
    """With channels first they may be viewed as rows."""
    x = torch.randn(2, 128, 40, 39).to(memory_format=order)
    weight = torch.randn(128, 128 // groups, kernel, kernel).to(memory_format=order_of_weight).requires_grad_()
    geometry: Any = 1, kernel // 2, 1, groups
    y, usual = conv2d(x, weight, None, *geometry), F.conv2d(x, weight, None, *geometry)
    assert y.stride() == usual.stride()
    torch.testing.assert_close(y, usual, rtol=1e-4, atol=1e-3)


@WAYS
@pytest.mark.usefixtures("everywhere")
def test_gradients_can_be_differentiated_and_transformed_as_pytorchs(kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = QuickConv2d(128, 128, kernel, padding=kernel // 2, groups=groups)
    x = torch.randn(2, 128, 33, 34).to(memory_format=torch.channels_last).requires_grad_()

    def penalty(convolve: Any) -> list[Tensor]:
        y = convolve(x)
        slopes = torch.autograd.grad(y.square().mean(), (x, layer.weight), create_graph=True)
        return list(torch.autograd.grad(sum(s.square().sum() for s in slopes), (x, layer.weight, layer.bias)))

    def usual(x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, 1, kernel // 2, 1, groups)

    assert "Convolution" not in layer(x).grad_fn.name()
    for ours, wanted in zip(penalty(layer), penalty(usual), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    many = torch.randn(3, 2, 128, 33, 34)
    torch.testing.assert_close(torch.func.vmap(layer)(many), torch.func.vmap(usual)(many), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(many[0, 0]), usual(many[0, 0]), rtol=1e-4, atol=1e-4)  # one map alone


@pytest.mark.usefixtures("everywhere")
def test_gradients_of_linear_layers_can_be_differentiated_and_transformed() -> None:
    torch.manual_seed(0)
    layer, x = linear.OneDNNLinear(60, 50), torch.randn(40, 60, requires_grad=True)
    assert layer(x).grad_fn.name() == "_LinearBackward"
    found = []
    for multiply in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        slope = torch.autograd.grad(multiply(x).pow(3).mean(), x, create_graph=True)[0]
        found.append(torch.autograd.grad(slope.square().sum(), (x, layer.weight, layer.bias)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    many = torch.randn(3, 40, 60)
    torch.testing.assert_close(torch.func.vmap(layer)(many), F.linear(many, layer.weight, layer.bias))
