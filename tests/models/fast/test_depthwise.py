"""Depthwise convolutions with a weight gradient of three columns at a time: the outputs and gradients of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame, FrozenBatchNormAct2d
from torch import nn
from torch.nn import functional as F

from detection.models.fast import depthwise as module
from detection.models.fast.convolution import QuickConv2d, conv2d
from detection.models.fast.depthwise import is_wide_depthwise
from detection.models.fast.folding import FoldedConv2d, FoldedNorm

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")


@pytest.fixture(autouse=True, scope="module")
def any_size() -> Iterator[None]:
    """However little work it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEWEST_PRODUCTS", 0)
        yield


@settings(max_examples=60)
@given(
    count=st.integers(1, 3),
    channels=st.sampled_from([2, 5, 16, 32]),
    sides=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    kernel=st.tuples(st.integers(1, 7), st.integers(4, 8)),
    stride=st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3))),
    padding=st.one_of(st.integers(0, 5), st.tuples(st.integers(0, 5), st.integers(0, 5))),
    has_bias=st.booleans(),
    order=st.sampled_from([torch.channels_last, torch.contiguous_format]),
)
def test_outputs_and_gradients_are_those_of_float64(
    count: int, channels: int, sides: Any, kernel: Any, stride: Any, padding: Any, has_bias: bool, order: Any
) -> None:
    frame = (padding, padding) if isinstance(padding, int) else padding
    assume(all(side + 2 * pad >= n for side, pad, n in zip(sides, frame, kernel, strict=True)))
    torch.manual_seed(0)
    x = torch.randn(count, channels, *sides).to(memory_format=order).requires_grad_()
    weight = torch.randn(channels, 1, *kernel, requires_grad=True)
    bias = torch.randn(channels, requires_grad=True) if has_bias else None
    geometry: Any = stride, padding, 1, channels
    assert is_wide_depthwise(x, weight, *geometry)
    y = conv2d(x, weight, bias, *geometry)
    assert y.grad_fn.name() == "_DepthwiseBackward"
    share, leaves = torch.randn_like(y), [x, weight, *([bias] if has_bias else [])]
    found = [y, *torch.autograd.grad(y, leaves, share)]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = F.conv2d(*exact_leaves, None, *geometry) if not has_bias else F.conv2d(*exact_leaves, *geometry)
    wanted = [exact, *torch.autograd.grad(exact, exact_leaves, share.double())]
    for ours, right in zip(found, wanted, strict=True):
        assert ours.shape == right.shape
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=3e-5)


def test_little_work_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST_PRODUCTS", 1000)
    for columns, parts in ((4, 2), (6, 2), (7, 3)):
        weight = torch.randn(10, 1, 5, columns, requires_grad=True)
        fewest = -(-1000 * parts // (10 * 5 * columns))
        geometry: Any = 1, (2, columns // 2), 1, 10
        assert not is_wide_depthwise(torch.randn(1, 10, 1, fewest - 1), weight, *geometry)
        assert is_wide_depthwise(torch.randn(1, 10, 1, fewest), weight, *geometry)
        assert not is_wide_depthwise(torch.randn(1, 10, 1, fewest), weight, 2, *geometry[1:])
        assert is_wide_depthwise(torch.randn(1, 10, 6, fewest), weight, (2, 3), *geometry[1:])


def test_others_are_left_to_pytorch() -> None:
    x, weight = torch.randn(2, 16, 9, 9), torch.randn(16, 1, 5, 5, requires_grad=True)
    usual: dict[str, Any] = {"stride": 1, "padding": 2, "dilation": 1, "groups": 16}
    assert is_wide_depthwise(x, weight, **usual)
    assert not is_wide_depthwise(x, weight, **usual | {"dilation": 2})
    assert not is_wide_depthwise(x, weight, **usual | {"padding": "same"})
    assert not is_wide_depthwise(x, torch.randn(16, 1, 5, 3, requires_grad=True), **usual)
    assert not is_wide_depthwise(x, torch.randn(32, 1, 5, 5, requires_grad=True), **usual)
    assert not is_wide_depthwise(x, torch.randn(16, 2, 5, 5, requires_grad=True), **usual | {"groups": 8})
    assert not is_wide_depthwise(x, weight.detach(), **usual)
    assert not is_wide_depthwise(x.double(), weight.double(), **usual) and not is_wide_depthwise(x[:0], weight, **usual)
    with torch.no_grad():
        assert not is_wide_depthwise(x, weight, **usual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_wide_depthwise(x, weight, **usual)


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_train_so(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = module.weight_gradient
    monkeypatch.setattr(module, "weight_gradient", lambda *args: calls.append(1) or plain(*args))
    x = torch.randn(2, 16, 20, 22).to(memory_format=torch.channels_last)
    folded = FoldedConv2d(Conv2dSame(16, 16, 5, stride=2, groups=16, bias=False), FoldedNorm(FrozenBatchNormAct2d(16)))
    layers: list[nn.Module] = [folded] if autocast else [folded, QuickConv2d(16, 16, 7, padding=3, groups=16)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for layer in layers:
            layer(x.bfloat16() if autocast else x).float().square().sum().backward()
    assert len(calls) == len(layers)
