"""3x3 convolutions by minimal filtering: those of PyTorch, with their gradients, to a millionth."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from detection import fasterrcnn_resnet50_fpn
from detection.models.fast import accelerate, winograd
from detection.models.fast.convolution import QuickConv2d, conv2d
from detection.models.fast.packing import PackedConv2d, pack
from detection.models.fast.winograd import AtPoints, filtered, is_filtered

GEOMETRY: Any = 1, 1, 1, 1  # stride, padding, dilation, groups
WIDE = torch.Size((128, 128, 3, 3))


@pytest.fixture(autouse=True)
def same_threshold_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "FEWEST_TILES_AVX512", winograd.FEWEST_TILES)


def with_gradients(convolve: Any, x: Tensor, weight: Tensor, bias: Tensor, share: Tensor) -> list[Tensor]:
    """The outputs of a convolution, and the gradients of its input, weight and bias."""
    given = [value.clone().requires_grad_() for value in (x, weight, bias)]
    y = convolve(*given, *GEOMETRY)
    return [y.detach(), *torch.autograd.grad(y, given, share.to(y.dtype))]


def spread_of(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize("size", [(1, 40, 40), (2, 37, 50), (3, 39, 26), (100, 14, 14), (1, 400, 4)])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_outputs_and_gradients_are_pytorchs_to_a_millionth_of_their_spread(
    size: tuple[int, int, int], order: torch.memory_format
) -> None:
    torch.manual_seed(0)
    count, *sides = size
    x = torch.randn(count, 96, *sides).relu().to(memory_format=order)
    weight, bias, share = torch.randn(128, 96, 3, 3) / 30, torch.randn(128), torch.randn(count, 128, *sides)
    assert is_filtered(x, weight.shape, *GEOMETRY)
    exact = with_gradients(F.conv2d, x.double(), weight.double(), bias.double(), share)
    found = with_gradients(conv2d, x, weight, bias, share)
    assert not torch.equal(found[0], F.conv2d(x, weight, bias, *GEOMETRY))  # another way
    for wanted, ours in zip(exact, found, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == wanted.shape
        assert spread_of(ours - wanted) < 2e-6 * spread_of(wanted)
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=3e-5 * spread_of(wanted))


def test_the_points_round_less_than_those_of_the_paper() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 40, 40).relu(), torch.randn(256, 256, 3, 3)
    exact, errors = F.conv2d(x.double(), weight.double(), padding=1), []
    for points in (winograd.POINTS, np.array([0, 1, -1, 2, -2])):
        with (
            patch.object(winograd, "POINTS", points),
            patch.object(winograd, "_transforms", winograd._transforms.__wrapped__),
        ):
            errors.append(spread_of(filtered(x, AtPoints(weight)) - exact))
    assert errors[0] < 0.7 * errors[1] < 1e-5 * spread_of(exact)


@pytest.mark.parametrize("by_convolution", [False, True])
@given(count=st.integers(1, 3), height=st.integers(1, 30), width=st.integers(1, 30), at_a_time=st.integers(1, 30))
def test_maps_of_any_size_in_any_number_of_parts(
    by_convolution: bool, count: int, height: int, width: int, at_a_time: int
) -> None:
    x, weight, bias = torch.randn(count, 3, height, width), torch.randn(5, 3, 3, 3), torch.randn(5)
    with (
        patch.object(winograd, "AT_A_TIME", at_a_time),
        patch.object(winograd, "has_avx512", lambda: by_convolution and torch.backends.mkldnn.is_available()),
    ):
        found = filtered(x, AtPoints(weight), bias)
        share = torch.randn_like(found)
        gradient = winograd.weight_gradient(x, share)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, F.conv2d(x, weight, bias, padding=1), rtol=1e-4, atol=1e-4)
    wanted = torch.nn.grad.conv2d_weight(x, weight.shape, share, padding=1)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-3)


def test_one_output_is_the_polynomial_product_of_the_paper() -> None:
    """F(4, 3) of Lavin and Gray's section 4.1 in one dimension: four outputs of a filter of three from six inputs."""
    read, spread_, write = (m.double() for m in winograd._transforms())
    signal, taps = torch.tensor([3.0, -1, 4, 1, -5, 9]).double(), torch.tensor([2.0, 7, -1]).double()
    wanted = [2 * a + 7 * b - c for a, b, c in zip(signal, signal[1:], signal[2:], strict=False)]
    found = write @ ((read @ signal) * (spread_ @ taps))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (128, 128, 1, 1)),
        ({}, (128, 48, 3, 3)),  # too thin to be quicker
        ({"stride": 2}, WIDE),
        ({"padding": 0}, WIDE),
        ({"padding": "same"}, WIDE),
        ({"dilation": (2, 1)}, WIDE),
        ({"groups": 2}, (128, 96, 3, 3)),
    ],
)
def test_other_convolutions_are_left_to_pytorch(changes: dict[str, Any], shape: tuple[int, ...]) -> None:
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    x = torch.randn(1, shape[1] * changes.get("groups", 1), 40, 40)
    assert is_filtered(torch.randn(1, 128, 40, 40), WIDE, *geometry.values())
    wanted = geometry | changes
    assert not is_filtered(x, torch.Size(shape), *wanted.values())
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    assert torch.equal(conv2d(x, weight, bias, *wanted.values()), F.conv2d(x, weight, bias, **wanted))


def test_other_precisions_devices_and_sizes_are_left_to_pytorch() -> None:
    x = torch.randn(1, 128, 40, 40)
    for other in (x.double(), x.bfloat16(), x.to("meta"), x[..., :20], x[:0]):
        assert not is_filtered(other, WIDE, *GEOMETRY)
    layer = QuickConv2d(128, 128, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_filtered(x, WIDE, *GEOMETRY) and layer(x).dtype == torch.bfloat16
    reflecting = QuickConv2d(128, 128, 3, padding=1, padding_mode="reflect")
    wanted = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), reflecting.weight, reflecting.bias)
    torch.testing.assert_close(reflecting(x), wanted)
    assert layer(x[:0]).shape == (0, 128, 40, 40) and layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("size", [(40, 40), (38, 40), (40, 37)])
def test_an_activation_behind_it_may_work_in_place(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = QuickConv2d(128, 128, 3, padding=1), torch.randn(1, 128, *size)
    usual = F.conv2d(x, layer.weight, layer.bias, padding=1)
    found, wanted = (torch.autograd.grad(F.relu_(y).square().mean(), layer.weight)[0] for y in (layer(x), usual))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_compiled_layers_take_the_usual_kernel() -> None:
    layer, x = QuickConv2d(128, 128, 3, padding=1), torch.randn(1, 128, 40, 38)
    ready = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    pack(ready)
    with torch.no_grad():
        for convolve in (layer, ready):
            torch.testing.assert_close(
                torch.compile(convolve, backend="aot_eager")(x), convolve(x), rtol=1e-4, atol=1e-4
            )
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    wanted = F.conv2d(x, layer.weight, layer.bias, padding=1)
    assert torch.equal(y, wanted)
    y.sum().backward()
    assert layer.weight.grad is not None


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer, x = QuickConv2d(128, 128, 3, padding=1), torch.randn(1, 128, 40, 40)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is None
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is None and x.grad is not None
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()
    assert layer.weight.grad is None


def test_a_detector_gets_it_with_the_same_parameters_and_a_subclass_stays() -> None:
    class Own(nn.Conv2d):
        pass

    detector = fasterrcnn_resnet50_fpn(num_classes=3, weights_backbone=None)
    detector.backbone.fpn.layer_blocks[0][0] = own = Own(256, 256, 3, padding=1)
    names = list(detector.state_dict())
    quick = accelerate(copy.deepcopy(detector), "cpu")
    assert list(quick.state_dict()) == names
    blocks = [block[0] for block in quick.backbone.fpn.layer_blocks]
    assert [type(block) for block in blocks] == [Own, *[QuickConv2d] * 3] and type(own) is Own
    assert type(quick.rpn.head.conv[0][0]) is QuickConv2d


def test_packed_layers_do_it_with_what_lies_behind_them_and_forget_the_copy() -> None:
    torch.manual_seed(0)
    x, other = torch.randn(2, 1, 128, 40, 40).unbind()
    conv = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU6())
    ready = copy.deepcopy(conv)
    pack(ready)
    layer = ready[0]
    assert isinstance(layer, PackedConv2d) and layer.at_points is None
    with torch.inference_mode():
        torch.testing.assert_close(ready(x), conv(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x, other), conv[1](conv[0](x) + other), rtol=1e-4, atol=1e-4)
    assert layer.at_points is not None and copy.deepcopy(layer).at_points is None
    with torch.no_grad():
        torch.testing.assert_close(ready(x), conv(x), rtol=1e-4, atol=1e-4)


def test_a_weight_is_packed_once_for_each_number_of_tiles_and_kept_once() -> None:
    weight = AtPoints(torch.randn(128, 128, 3, 3))
    with (
        patch.object(winograd, "has_avx512", torch.backends.mkldnn.is_available),
        patch.object(weight, "_pack", wraps=weight._pack) as pack_it,
    ):
        for _ in range(2):
            for side in (40, 80, 120):  # the last parts of a map are as large as the first
                x = torch.randn(1, 128, side, side + 1)
                torch.testing.assert_close(
                    filtered(x, weight), F.conv2d(x, weight.weight, padding=1), rtol=1e-4, atol=1e-3
                )
    assert pack_it.call_count == len(weight.packed) <= 3
    assert len({packed.data_ptr for packed in weight.orders.values()}) <= len(weight.packed)


def test_with_avx512_it_takes_more_tiles_before_a_fresh_weight_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "FEWEST_TILES_AVX512", 250)
    x = torch.randn(1, 128, 40, 40)
    for is_there in (False, True):
        monkeypatch.setattr(winograd, "has_avx512", lambda is_there=is_there: is_there)
        assert is_filtered(x, WIDE, *GEOMETRY) is not is_there
        assert is_filtered(x, WIDE, *GEOMETRY, is_spread=True) and is_filtered(x.expand(3, -1, -1, -1), WIDE, *GEOMETRY)


def test_whether_an_image_is_filtered_in_detection_does_not_depend_on_its_batch() -> None:
    """It would round differently in a batch than alone."""
    shape, rest = torch.Size((96, 96, 3, 3)), (1, 1, 1, 1)
    for side, alone in ((4 * winograd.SIDE, False), (8 * winograd.SIDE, True)):
        for images in (1, 2, 64):
            x = torch.zeros(images, 96, side, side)
            assert is_filtered(x, shape, *rest, is_spread=True) is alone
    many = torch.zeros(64, 96, 4 * winograd.SIDE, 4 * winograd.SIDE)
    assert is_filtered(many, shape, *rest)  # in training a batch's tiles count together
