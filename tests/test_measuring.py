"""Strides and channels read off a blank image, and what is refused as no backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

from detection.measuring import measure
from detection.models.backbones import mobilenet_v3_large_fpn, resnet_c4, resnet_dc5, resnet_fpn


class Given(nn.Module):
    """A backbone that gives whatever a function makes of the images."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        return self.function(images)


def maps(**sizes: tuple[int, int, int]) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Maps by name, of so many channels and strides down and across."""

    def make(images: Tensor) -> Mapping[str, Tensor]:
        h, w = images.shape[-2:]
        return {name: images.new_zeros(len(images), c, -(-h // y), -(-w // x)) for name, (c, y, x) in sizes.items()}

    return make


@pytest.mark.parametrize(
    ("build", "strides", "channels"),
    [
        (lambda: resnet_fpn_backbone(backbone_name="resnet18", weights=None), (4, 8, 16, 32, 64), 256),
        (lambda: mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True), (32, 32, 64), 256),
        (lambda: resnet_fpn("resnet18", out_channels=32), (4, 8, 16, 32, 64), 32),
        (lambda: resnet_c4("resnet18"), (16,), 256),
        (lambda: resnet_dc5("resnet50"), (16,), 2048),
        (mobilenet_v3_large_fpn, (32, 32, 64), 256),
    ],
)
def test_strides_and_channels_of_known_networks(
    build: Callable[[], nn.Module], strides: tuple[int, ...], channels: int
) -> None:
    assert measure(build()) == (strides, channels)
    with torch.device("meta"):
        assert measure(build()) == (strides, channels)


@pytest.mark.parametrize("stride", [1, 2, 3, 6, 7, 8, 12, 14, 16, 32, 64, 128])
def test_strides_that_divide_nothing(stride: int) -> None:
    """Patches of 14 pixels, rounded up or down; and borders that unpadded convolutions cut off."""
    assert measure(Given(maps(a=(5, stride, stride)))) == ((stride,), 5)
    down = Given(lambda x: {"a": x[..., : x.shape[2] // stride, : x.shape[3] // stride]})
    assert measure(down) == ((stride,), 3)
    assert measure(Given(maps(a=(5, 24, 24))), side=384) == ((24,), 5)
    if stride <= 32:
        cut = nn.Conv2d(3, 4, kernel_size=stride + 2, stride=stride)
        assert measure(Given(lambda x: {"a": cut(x)})) == ((stride,), 4)


def test_nothing_is_disturbed() -> None:
    torch.manual_seed(0)
    norm, drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
    backbone = nn.Sequential(norm, drop, Given(lambda x: {"0": x + torch.rand_like(x)}))
    drop.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    random = torch.get_rng_state()
    assert measure(backbone) == ((1,), 3)
    assert torch.equal(torch.get_rng_state(), random)
    assert backbone.training and norm.training and not drop.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in backbone.parameters())


def test_the_modes_are_restored_where_the_backbone_fails() -> None:
    backbone = Given(lambda images: images @ torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"can't take an image of 128 x 256 pixels: .*shapes cannot be multiplied"):
        measure(backbone)
    assert backbone.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_image_has_the_precision_of_the_weights(dtype: torch.dtype) -> None:
    assert measure(resnet_c4("resnet18").to(dtype)) == ((16,), 256)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda x: x, r'it gives Tensor, not a dictionary of maps; return {"0": map}'),
        (lambda x: [x], r"it gives list, not a dictionary"),
        (lambda x: {}, r"it gives dict, not a dictionary of maps"),
        (lambda x: {"logits": x.flatten(1)}, r"logits is a tensor of shape \(1, 98304\), not a map"),
        (lambda x: {"logits": None}, r"logits is NoneType, not a map"),
        (maps(fine=(8, 4, 4), coarse=(16, 8, 8)), r"same number of channels, not \[8, 16\]"),
        (maps(coarse=(8, 8, 8), fine=(8, 4, 4)), r"finest first, but their strides are {'coarse': 8, 'fine': 4}"),
        (lambda x: {"pooled": x.mean((2, 3), keepdim=True)}, r"pooled has 1 x 1 cells for 128 x 256 pixels"),
        (maps(squeezed=(8, 8, 4)), r"squeezed has 16 x 64 cells .* the same in both directions"),
        (maps(squeezed=(8, 4, 8)), r"squeezed has 32 x 32 cells .* the same in both directions"),
    ],
)
def test_what_is_no_backbone_is_refused(function: Callable[[Tensor], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^Given is no backbone: .*{sentence}"):
        measure(Given(function))
