"""The feature pyramid against torchvision's, and its arithmetic by hand."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork as ReferencePyramid
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detection.models.pyramid import FeaturePyramidNetwork


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
@pytest.mark.parametrize("shapes", [[(16, 24), (8, 12), (4, 6), (2, 3)], [(15, 23), (8, 12), (4, 6)], [(7, 5), (7, 5)]])
def test_equals_torchvision(shapes: list[tuple[int, int]], norm: type[nn.Module] | None) -> None:
    channels = [4, 8, 16, 32][: len(shapes)]
    theirs = ReferencePyramid(channels, 6, LastLevelMaxPool(), norm).eval()
    ours = FeaturePyramidNetwork(channels, 6, norm).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(0)
    maps = OrderedDict(
        (str(i), torch.randn((2, c, *shape), generator=generator))
        for i, (c, shape) in enumerate(zip(channels, shapes, strict=True))
    )
    expected = theirs(maps)
    found = ours(maps)
    assert list(found) == list(expected) == [*maps, "pool"]
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


def test_top_down_sums_by_hand() -> None:
    pyramid = FeaturePyramidNetwork([1, 1], 1)
    for block in pyramid.inner_blocks:
        nn.init.ones_(block[0].weight)
    for block in pyramid.layer_blocks:
        nn.init.zeros_(block[0].weight)
        block[0].weight.data[..., 1, 1] = 1  # the 3x3 convolution does nothing
    fine, coarse = torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[[[100.0, 200], [300, 400]]]])
    found = pyramid({"0": fine, "1": coarse})
    assert torch.equal(found["1"], coarse)
    assert torch.equal(found["0"], fine + coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert found["pool"].tolist() == [[[[100.0]]]]
