"""Linear layers and 1x1 convolutions by oneDNN: those of PyTorch, with their gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection import fasterrcnn_resnet50_fpn
from detection.models.fast import accelerate, linear
from detection.models.fast.convolution import QuickConv2d, conv2d
from detection.models.fast.linear import OneDNNLinear, is_pointwise
from detection.models.fast.packing import PackedHead, PackedLinear
from tests.models.fast.calls import Calls

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has these products without AVX-512, too; there they are no quicker."""
    monkeypatch.setattr(linear, "has_avx512", lambda: True)
    monkeypatch.setattr(linear, "FEWEST_PRODUCTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def with_gradients(multiply: Any, given: list[Tensor | None], share: Tensor) -> list[Tensor]:
    leaves = [None if value is None else value.detach().requires_grad_() for value in given]
    y = multiply(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], share.to(y.dtype))]


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_and_gradients_are_those_of_float64(rows: int, has_bias: bool, transposed: bool) -> None:
    torch.manual_seed(0)
    x, weight, share = torch.randn(rows, 200), torch.randn(91, 200) / 14, torch.randn(rows, 91)
    if transposed:  # in memory
        x, weight, share = (value.t().contiguous().t() for value in (x, weight, share))
    given = [x, weight, torch.randn(91) if has_bias else None]
    found = with_gradients(linear.linear, given, share)
    exact = with_gradients(F.linear, [None if value is None else value.double() for value in given], share)
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("has_bias", [False, True])
def test_single_cells_and_gradients_are_those_of_float64(order: torch.memory_format, has_bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 60, 9, 11).to(memory_format=torch.channels_last)
    share = torch.randn(2, 91, 9, 11).to(memory_format=order)
    given = [x, torch.randn(91, 60, 1, 1) / 8, torch.randn(91) if has_bias else None]
    assert is_pointwise(x, given[1], (1, 1), (0, 0), (1, 1), 1)
    found = with_gradients(lambda *values: conv2d(*values, 1, 0, 1, 1), given, share)
    exact = with_gradients(F.conv2d, [None if value is None else value.double() for value in given], share)
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == wanted.shape
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=3e-5)
    layer = QuickConv2d(60, 91, 1)
    y = layer(x)
    assert y.grad_fn.name() == "_PointwiseBackward" and y.is_contiguous(memory_format=torch.channels_last)
    F.relu_(y).sum().backward()  # in place
    usual = torch.autograd.grad(F.relu(F.conv2d(x, layer.weight, layer.bias)).sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, usual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [60, 200])  # of outputs: fewer, and more, than inputs
@pytest.mark.parametrize("kind", ["one of three tokens", "half of the channels", "every other weight"])
def test_of_parts_of_larger_tensors_the_kernel_gets_dense_copies(count: int, kind: str) -> None:
    """With the strides of a part it would be hundreds of times as slow."""
    torch.manual_seed(0)
    x, weight, share = torch.randn(70, 91), torch.randn(count, 91) / 9, torch.randn(70, count)
    ours: Any = linear.linear
    usual: Any = F.linear
    if kind == "one of three tokens":
        x, share = (torch.stack((value, value, value), 1)[:, 1] for value in (x, share))
    elif kind == "every other weight":
        weight = torch.stack((weight, weight), 2)[..., 0]
    else:
        maps = (torch.randn(2, 2 * size, 9, 11).to(memory_format=torch.channels_last)[:, :size] for size in (91, count))
        (x, share), weight = maps, weight[..., None, None]
        ours, usual = lambda *values: conv2d(*values, 1, 0, 1, 1), F.conv2d
    with Calls(torch.ops.mkldnn._linear_pointwise.default) as calls:
        found = with_gradients(ours, [x, weight, None], share)
    factors = [given[1] for given in calls.arguments]
    assert factors and all(factor.is_contiguous() or factor.t().is_contiguous() for factor in factors)
    exact = with_gradients(usual, [x.double(), weight.double(), None], share)
    for value, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=3e-5)


def test_other_convolutions_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, weight = torch.randn(2, 60, 9, 11), torch.randn(91, 60, 1, 1)
    x, usual = plain.to(memory_format=torch.channels_last), {"stride": 1, "padding": 0, "dilation": 1}
    assert is_pointwise(x, weight, *usual.values(), 1)
    for changed in ({"stride": 2}, {"stride": (1, 2)}, {"padding": 1}, {"dilation": 2}):
        assert not is_pointwise(x, weight, *(usual | changed).values(), 1)
    assert not is_pointwise(torch.randn(2, 120, 9, 11), weight, *usual.values(), 2)
    assert not is_pointwise(x, torch.randn(91, 60, 3, 3), *usual.values(), 1)
    for other in (x[:0], x.double(), x.repeat(8, 1, 1, 1), x[0], plain):
        assert not is_pointwise(other, weight, *usual.values(), 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # PyTorch takes oneDNN
    assert not is_pointwise(x, weight, *usual.values(), 1)


def test_other_inputs_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = OneDNNLinear(100, 91), torch.randn(5, 100)
    assert layer(x).grad_fn.name() == "_LinearBackward"
    for other in (x[:0], x[None], x[0]):
        assert layer(other).grad_fn.name() != "_LinearBackward"
        assert torch.equal(layer(other), F.linear(other, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    monkeypatch.setattr(linear, "FEWEST_PRODUCTS", 5 * 100 * 91)
    assert layer(x).grad_fn.name() == "_LinearBackward"
    assert layer(x[1:]).grad_fn.name() != "_LinearBackward"  # too little work to be quicker
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), F.linear(x, layer.weight, layer.bias))
    assert layer.double()(x.double()).dtype == torch.float64
    monkeypatch.setattr(linear, "has_avx512", lambda: False)
    layer.float()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer, x = OneDNNLinear(100, 91), torch.randn(5, 100)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is None and layer.bias.grad is not None
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


def test_a_detector_gets_it_with_the_same_parameters_and_can_be_packed_after_it() -> None:
    class Own(nn.Linear):
        pass

    detector = fasterrcnn_resnet50_fpn(num_classes=3, weights_backbone=None)
    detector.roi_heads.box_predictor.bbox_pred = Own(1024, 12)
    quick = accelerate(copy.deepcopy(detector), "cpu")
    assert list(quick.state_dict()) == list(detector.state_dict())
    heads = quick.roi_heads
    assert type(heads.box_head.fc6) is type(heads.box_predictor.cls_score) is OneDNNLinear
    assert type(heads.box_predictor.bbox_pred) is Own
    ready = quick.for_inference().roi_heads
    assert type(ready.box_head) is PackedHead and type(ready.box_predictor.cls_score) is PackedLinear
