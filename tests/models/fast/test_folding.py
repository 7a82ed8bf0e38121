"""Frozen normalisation inside the convolution before it: the same numbers, gradients and names."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

from detection.models.fast import NORMS, exchange
from detection.models.fast.folding import (
    FoldedConv2d,
    FoldedNorm,
    OnePassNorm,
    OnePassNormAct,
    fold_for_good,
    fold_frozen_norms,
)
from detection.models.norms import group_norm
from detection.training.precision import WeightPrecision

IMAGES = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))


def stir(network: nn.Module) -> nn.Module:
    """Statistics and weights of which none is 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if hasattr(module, "running_var"):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return network


def frozen(name: str) -> nn.Module:
    if name == "torchvision":
        return stir(resnet50(norm_layer=FrozenBatchNorm2d)).eval()
    return freeze_batch_norm_2d(stir(timm.create_model(name, features_only=True))).eval()


def outputs(network: nn.Module) -> list[Tensor]:
    found = network(IMAGES)
    return [found] if isinstance(found, Tensor) else list(found)


# ghostnet gives out a convolution's own output, and densenet normalises one output in several places.
@pytest.mark.parametrize("name", ["torchvision", "tf_efficientnet_lite0", "regnety_002", "ghostnet_100", "densenet121"])
def test_folding_changes_neither_numbers_nor_names(name: str) -> None:
    network = frozen(name)
    with torch.no_grad():
        expected = outputs(network)
        state = copy.deepcopy(network.state_dict())
        fold_frozen_norms(network, IMAGES)
        folded = [m for m in network.modules() if isinstance(m, FoldedConv2d)]
        assert len(folded) > 30
        assert list(network.state_dict()) == list(state)
        for wanted, given in zip(expected, outputs(network), strict=True):
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        for wanted, given in zip(expected, outputs(copy.deepcopy(network)), strict=True):
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        fold_for_good(network)
        assert not any(isinstance(m, FoldedConv2d) for m in network.modules())
        for wanted, given in zip(expected, outputs(network), strict=True):
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["torchvision", "tf_efficientnet_lite0"])
def test_folding_again_changes_nothing(name: str) -> None:
    """Each `setup` of a run folds, and timm's activations and TensorFlow's padding have to outlast the second."""
    network = frozen(name)
    fold_frozen_norms(network, IMAGES)
    modules = dict(network.named_modules())
    with torch.no_grad():
        expected = outputs(network)
        fold_frozen_norms(network, IMAGES)
        assert dict(network.named_modules()) == modules
        assert all(map(torch.equal, outputs(network), expected))


def test_a_copy_has_statistics_of_its_own() -> None:
    network = frozen("torchvision")
    fold_frozen_norms(network, IMAGES)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.bn1.running_mean.add_(5)
        assert torch.equal(network(IMAGES), network(IMAGES))
        assert (twin(IMAGES) - network(IMAGES)).abs().max() > 1e-3
        assert twin.conv1.norm[0] is twin.bn1


def test_the_gradients_are_those_of_the_two_modules() -> None:
    norm = stir(FrozenBatchNorm2d(5))
    plain = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), norm).double()
    folded = copy.deepcopy(plain)
    folded[1] = FoldedNorm(folded[1])
    folded[0] = FoldedConv2d(folded[0], folded[1])
    images = [IMAGES.double().clone().requires_grad_() for _ in range(2)]
    for network, image in zip((plain, folded), images, strict=True):
        network(image).square().sum().backward()
    torch.testing.assert_close(images[1].grad, images[0].grad)
    torch.testing.assert_close(folded[0].weight.grad, plain[0].weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["torchvision", "tf_efficientnet_lite0", "densenet121"])
def test_weights_of_another_type_give_the_same(name: str, dtype: torch.dtype) -> None:
    """`bf16-true` and `64-true` convert what has parameters, so that statistics stay in float32."""
    network = frozen(name)
    with torch.no_grad():
        expected = outputs(network)
    fold_frozen_norms(network, IMAGES)
    exchange(network, NORMS)
    WeightPrecision("of a test", dtype).convert_module(network)
    limit = 0.05 if dtype == torch.bfloat16 else 1e-5
    found = outputs(network)
    for wanted, given in zip(expected, found, strict=True):
        assert given.dtype == dtype and (given.detach() - wanted).norm() <= limit * wanted.norm()
    found[-1].sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(gradients) > 30 and all(g.dtype == dtype and g.isfinite().all() for g in gradients)


def test_under_autocast_the_output_stays_in_half_precision() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), FrozenBatchNorm2d(5))
    fold_frozen_norms(network, IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(IMAGES).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_a_norm_that_no_convolution_can_carry_out_takes_one_pass(
    kind: type[nn.Module], affine: bool, order: torch.memory_format
) -> None:
    norm = stir(kind(6))
    if affine:
        norm.weight, norm.bias = nn.Parameter(norm.weight), nn.Parameter(norm.bias)
    network = nn.Sequential(norm, nn.Conv2d(6, 4, 3))
    quick = copy.deepcopy(network)
    fold_frozen_norms(quick, torch.rand(1, 6, 8, 8))
    exchange(quick, NORMS)
    assert type(quick[0]) in (OnePassNorm, OnePassNormAct) and list(quick.state_dict()) == list(network.state_dict())
    x = torch.randn(2, 6, 9, 7).to(memory_format=order)
    found = []
    for each in (network, quick):
        given = x.clone().requires_grad_()
        y = each(given)
        leaves = [given, *(p for p in each.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert len(found[0]) == (6 if affine else 4)
    for wanted, given in zip(*found, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert network[0](x.bfloat16()).dtype == torch.float32  # which the convolution behind it would cast again
        assert quick[0](x.bfloat16()).dtype == torch.bfloat16


def test_statistics_of_a_live_network_can_be_loaded() -> None:
    live = stir(resnet50())
    network = frozen("torchvision")
    fold_frozen_norms(network, IMAGES)
    network.load_state_dict(live.state_dict())  # its counters of batches are left aside, as torchvision does
    with torch.no_grad():
        torch.testing.assert_close(network(IMAGES), live.eval()(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_network_without_frozen_norms_is_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    fold_frozen_norms(network, IMAGES)
    assert [type(m) for m in network] == [nn.Conv2d, nn.BatchNorm2d]
    assert group_norm(48).num_groups == 16


def test_the_gradients_of_depthwise_convolutions_are_exact_under_autocast() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, 2, 2, groups=8, bias=False), FrozenBatchNorm2d(8))
    fold_frozen_norms(network, IMAGES)
    folded = network[1]
    assert isinstance(folded, FoldedConv2d)
    x = torch.randn(2, 8, 15, 17).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        given = folded(x)
    assert given.dtype == torch.bfloat16
    twin = x.detach().float().requires_grad_()
    wanted = nn.functional.conv2d(twin, *folded.folded(), 2, 2, 1, 8)
    slope = torch.randn_like(given)
    pairs = ((given, x), (wanted, twin))
    grads = [torch.autograd.grad(y, (i, folded.weight), slope.to(y.dtype)) for y, i in pairs]
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-5, atol=1e-5)  # 1e-2 apart where bfloat16 sums
    torch.testing.assert_close(grads[0][0], grads[1][0].bfloat16())
