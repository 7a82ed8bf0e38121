"""Plain ViTs: their simple feature pyramid by hand, position embeddings of other sizes, attention in windows."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from detection.models.backbones import timm_fpn
from detection.models.vit import SimpleFeaturePyramid, attend_in_windows
from detection.recipes import rebuild

TINY = "vit_tiny_patch16_224"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def vit(**arguments: object) -> VisionTransformer:
    """A small one whose weights are large enough for its attention to matter."""
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=32, depth=8, num_heads=4, dynamic_img_size=True, dynamic_img_pad=True,
        **arguments,
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


def last_map(network: nn.Module, images: Tensor) -> Tensor:
    return network.forward_intermediates(images, indices=1, intermediates_only=True)[0]


@torch.no_grad()
def test_the_simple_feature_pyramid_by_hand() -> None:
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid([5, 16], out_channels=12)
    for name, parameter in pyramid.named_parameters():
        nn.init.normal_(parameter, std=0.5)
        assert parameter.ndim == 4 or name.endswith(("weight", "bias"))
    features = random(2, 16, 6, 10)
    state = iter(pyramid.state_dict().values())

    def deconvolve(x: Tensor) -> Tensor:
        """Each cell becomes 2 x 2: no two overlap, so it is one product."""
        weight, bias = next(state), next(state)
        (n, _, h, w), c = x.shape, weight.shape[1]
        cells = torch.einsum("nihw,ioyx->nohywx", x, weight).reshape(n, c, 2 * h, 2 * w)
        return cells + bias[:, None, None]

    def normalise(x: Tensor) -> Tensor:
        """Over the channels of each cell."""
        weight, bias = next(state), next(state)
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]

    first = deconvolve(F.gelu(normalise(deconvolve(features))))
    second = deconvolve(features)
    halved = features.reshape(2, 16, 3, 2, 5, 2).amax((3, 5))
    expected = []
    for scaled in (first, second, features, halved):
        mixed = normalise(torch.einsum("nihw,oi->nohw", scaled, next(state)[..., 0, 0]))
        expected.append(normalise(F.conv2d(mixed, next(state), padding=1)))
    assert next(state, None) is None, "there is more in it than the paper's layers"
    found = pyramid({"fine": random(2, 5, 1, 1), "last": features})
    assert list(found) == ["0", "1", "2", "3", "pool"]
    for name, wanted in zip("0123", expected, strict=True):
        torch.testing.assert_close(found[name], wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(found["pool"], found["3"][..., ::2, ::2])
    assert [tuple(m.shape[2:]) for m in found.values()] == [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]


def test_vits_have_the_simple_feature_pyramid() -> None:
    backbone = timm_fpn(TINY, out_channels=24)
    assert isinstance(backbone.fpn, SimpleFeaturePyramid)
    assert (backbone.strides, backbone.out_channels) == ((4, 8, 16, 32, 64), 24)
    norms = [m for m in backbone.fpn.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 9 and {norm.eps for norm in norms} == {1e-6}
    with torch.no_grad():
        odd = backbone.eval()(random(1, 3, 200, 317))
    assert [tuple(m.shape) for m in odd.values()] == [
        (1, 24, 52, 80), (1, 24, 26, 40), (1, 24, 13, 20), (1, 24, 7, 10), (1, 24, 4, 5)
    ]  # fmt: skip
    again = rebuild(backbone.recipe)
    assert again.state_dict().keys() == backbone.state_dict().keys()


@torch.no_grad()
def test_at_the_size_of_training_a_vit_is_timms_own() -> None:
    backbone = timm_fpn(TINY, out_channels=8).eval()
    theirs = timm.create_model(TINY).eval()
    theirs.load_state_dict(theirs.state_dict() | backbone.body.network.state_dict())
    images = random(1, 3, 224, 224)
    assert torch.equal(backbone.body(images)["0"], last_map(theirs, images))


@torch.no_grad()
def test_position_embeddings_are_interpolated() -> None:
    """With nothing but positions in the tokens, a map of twice the size is the smaller one enlarged."""
    network = timm_fpn(TINY, out_channels=8).eval().body.network
    nn.init.zeros_(network.patch_embed.proj.weight)
    nn.init.zeros_(network.patch_embed.proj.bias)
    network.blocks = nn.Sequential(nn.Identity())
    rows = torch.linspace(-1, 1, 14)[:, None].expand(14, 14)
    columns = torch.linspace(-1, 1, 14).expand(14, 14)
    network.pos_embed[0, 1:, 0], network.pos_embed[0, 1:, 1] = rows.flatten(), columns.flatten()
    found = last_map(network, torch.zeros(1, 3, 448, 240))[0, :2]
    assert found.shape == (2, 28, 15)
    inner = (torch.arange(28) + 0.5) / 2 - 0.5  # where the 28 rows lie among the 14
    wanted = -1 + 2 * inner / 13
    torch.testing.assert_close(found[0, 4:-4], wanted[4:-4, None].expand(20, 15), atol=5e-3, rtol=0)
    torch.testing.assert_close(found[1, :, 7], torch.zeros(28), atol=5e-3, rtol=0)


@pytest.mark.parametrize("tokens", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("size", [(128, 128), (96, 80), (70, 128)])
@torch.no_grad()
def test_one_window_is_attention_to_the_whole_map(tokens: dict[str, object], size: tuple[int, int]) -> None:
    """Maps that fill a window of 8 x 8 cells, or leave some of it empty."""
    network = vit(**tokens)
    windowed = copy.deepcopy(network)
    attend_in_windows(windowed, 8)
    images = random(2, 3, *size)
    expected = last_map(network, images)
    torch.testing.assert_close(last_map(windowed, images), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@torch.no_grad()
def test_a_window_is_what_the_network_sees_of_it_alone() -> None:
    """Without class token, position embedding and global blocks, each window is an image of its own."""
    network = vit(class_token=False, global_pool="avg", pos_embed="none")
    windowed = copy.deepcopy(network)
    attend_in_windows(windowed, 3)
    for whole in (network, windowed):
        whole.blocks = whole.blocks[:1]  # the first is no global one
    images = random(2, 3, 112, 144)  # 7 x 9 cells: 3 + 3 + 1 by 3 + 3 + 3
    found = last_map(windowed, images)
    for y in range(0, 7, 3):
        for x in range(0, 9, 3):
            part = images[..., 16 * y : 16 * (y + 3), 16 * x : 16 * (x + 3)]
            expected = last_map(network, part)
            torch.testing.assert_close(found[..., y : y + 3, x : x + 3], expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_four_evenly_spaced_blocks_attend_to_the_whole_map() -> None:
    network = timm_fpn(TINY, out_channels=8, window_size=7).eval().body.network
    seen: dict[int, torch.Size] = {}
    for index, block in enumerate(network.blocks):
        block.attn.qkv.register_forward_hook(
            lambda _, args, __, index=index: seen.__setitem__(index, args[0].shape)  # type: ignore[misc]
        )
    last_map(network, random(2, 3, 224, 224))
    whole = [index for index, shape in seen.items() if shape[:2] == (2, 1 + 14 * 14)]
    assert whole == [2, 5, 8, 11]  # figure 3 and section 3 for 12 blocks
    assert {shape[:2] for index, shape in seen.items() if index not in whole} == {(2 * 4, 1 + 7 * 7)}
    expected = {name for name, _ in timm_fpn(TINY, out_channels=8).body.named_parameters()}
    assert {f"network.{name}" for name, _ in network.named_parameters()} == expected


def test_windows_can_be_copied_and_take_batches_of_other_sizes() -> None:
    network = vit()
    attend_in_windows(network, 3)
    copied = copy.deepcopy(network)
    small, large = random(1, 3, 64, 64), random(2, 3, 96, 144)
    with torch.no_grad():
        first = last_map(network, small)
        last_map(copied, large)  # must not change the grid that the other has noted
        assert torch.equal(last_map(network, small), first)
        assert torch.equal(last_map(copied, small), first)
