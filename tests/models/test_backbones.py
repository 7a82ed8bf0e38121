"""Backbones: declared strides, layers that train, normalisation, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from detection.models.backbones import (
    Backbone,
    efficientnet_lite0_fpn,
    group_norm,
    mobilenet_v3_large_fpn,
    resnet_fpn,
    timm_fpn,
)


def trainable(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layers", range(6))
def test_resnet_layers_train_as_torchvisions(layers: int) -> None:
    theirs = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=layers
    )
    assert trainable(resnet_fpn("resnet18", trainable_layers=layers)) == trainable(theirs)


@pytest.mark.parametrize("layers", range(7))
def test_mobilenet_layers_train_as_torchvisions(layers: int) -> None:
    theirs = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=nn.BatchNorm2d, trainable_layers=layers
    )
    ours = mobilenet_v3_large_fpn(trainable_layers=layers)
    assert trainable(ours) == trainable(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(("build", "limit"), [(resnet_fpn, 5), (mobilenet_v3_large_fpn, 6)])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_number_of_layers_that_there_are_not_raises(build: Any, limit: int, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"must be from 0 to {limit}"):
        build(trainable_layers=limit + 1 if wrong > 0 else wrong)


def norms(model: nn.Module) -> set[type]:
    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d, nn.GroupNorm)
    return {type(module) for module in model.modules() if isinstance(module, kinds)}


def test_normalisation_follows_the_weights_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18().state_dict(), path)
    assert norms(resnet_fpn("resnet18")) == {nn.BatchNorm2d}
    assert norms(resnet_fpn("resnet18", path)) == {FrozenBatchNorm2d}
    assert norms(resnet_fpn("resnet18", path, norm="batch")) == {nn.BatchNorm2d}
    assert norms(resnet_fpn("resnet18", norm="group", fpn_norm="group")) == {nn.GroupNorm}
    assert norms(resnet_fpn("resnet18", norm="frozen", fpn_norm="batch")) == {FrozenBatchNorm2d, nn.BatchNorm2d}
    assert norms(mobilenet_v3_large_fpn(norm="group")) == {nn.GroupNorm}


def test_with_weights_three_groups_train_and_the_weights_are_there(tmp_path: Path) -> None:
    source = resnet18()
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    backbone = resnet_fpn("resnet18", tmp_path / "resnet18.pth")
    assert torch.equal(backbone.body.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
    flags = trainable(backbone.body)
    assert not any(flag for name, flag in flags.items() if name.startswith(("conv1", "layer1")))
    assert all(flag for name, flag in flags.items() if name.startswith(("layer2", "layer3", "layer4")))


def assert_declared_strides_hold(backbone: Backbone, height: int = 128, width: int = 192) -> None:
    with torch.no_grad():
        maps = list(backbone.eval()(torch.rand(1, 3, height, width)).values())
    shapes = [tuple(m.shape[1:]) for m in maps]
    assert shapes == [(backbone.out_channels, -(-height // s), -(-width // s)) for s in backbone.strides]


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("resnet10t", (4, 8, 16, 32, 64)),
        ("convnext_atto", (4, 8, 16, 32, 64)),
        ("regnetx_002", (4, 8, 16, 32, 64)),
        ("mobilenetv3_small_050", (4, 8, 16, 32, 64)),
    ],
)
def test_timm_networks(name: str, strides: tuple[int, ...]) -> None:
    backbone = timm_fpn(name, out_channels=32)
    assert backbone.strides == strides
    assert_declared_strides_hold(backbone)
    assert all(trainable(backbone).values())


def test_strides_of_the_others() -> None:
    assert_declared_strides_hold(resnet_fpn("resnet18", out_channels=32))
    assert_declared_strides_hold(mobilenet_v3_large_fpn())
    assert_declared_strides_hold(efficientnet_lite0_fpn(None, out_channels=32))
    assert_declared_strides_hold(timm_fpn("resnet10t", out_indices=(3, 4), out_channels=32))


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "regnetx_002", "tf_efficientnet_lite0"])
def test_timm_networks_with_group_normalisation(name: str) -> None:
    backbone = timm_fpn(name, norm="group", fpn_norm="group", out_channels=32)
    assert norms(backbone) == {nn.GroupNorm}  # and layer normalisation where the network has that
    assert_declared_strides_hold(backbone)
    plain = timm_fpn(name, out_channels=32)
    activations = [
        sum(type(m).__name__ in ("ReLU", "ReLU6", "SiLU", "GELU") for m in b.modules()) for b in (backbone, plain)
    ]
    assert activations[0] == activations[1], "the activations that came with the normalisation are gone"


def test_timm_networks_with_frozen_normalisation() -> None:
    assert nn.BatchNorm2d not in norms(timm_fpn("resnet10t", norm="frozen"))


@pytest.mark.parametrize("layers", range(5))
def test_timm_layers_train_from_the_coarsest(layers: int) -> None:
    backbone = timm_fpn("resnet10t", trainable_layers=layers, out_channels=32)
    flags = trainable(backbone.body)
    expected = tuple(f"layer{i}" for i in range(5 - layers, 5))
    for name, flag in flags.items():
        assert flag == (layers == 4 or (layers > 0 and name.partition("network.")[2].startswith(expected))), name
    assert all(trainable(backbone.fpn).values())


def test_a_network_without_maps_of_use_raises() -> None:
    with pytest.raises(ValueError, match="resnet10t"):
        timm_fpn("resnet10t", out_indices=())


def test_weights_of_another_network_raise(tmp_path: Path) -> None:
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises((ValueError, RuntimeError), match=r"lack|size mismatch"):
        timm_fpn("resnet10t", tmp_path / "resnet18.pth")


def test_packaged_weights_of_lite0_give_its_features() -> None:
    """ImageNet weights separate an image from noise of the same colours; what they are shows in their statistics."""
    backbone = efficientnet_lite0_fpn(out_channels=32)
    assert norms(backbone.body) <= {FrozenBatchNorm2d} or nn.BatchNorm2d not in norms(backbone.body)
    stem = backbone.body.network.conv_stem.weight
    assert 0.05 < float(stem.std()) < 1 and not stem.requires_grad
    with torch.no_grad():
        maps = backbone.body(torch.rand(1, 3, 64, 64) * 2 - 1)
    assert all(m.isfinite().all() and 1e-3 < m.std() < 1e3 for m in maps.values())


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 32), (48, 16), (24, 8), (20, 4), (6, 2), (7, 1)])
def test_group_norm_takes_the_most_groups_that_fit(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups
