"""Hierarchical and plain transformers of timm as backbones, the pyramid as a part, and what can't be a backbone."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork as ReferencePyramid
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detection.measuring import measure
from detection.models import zoo
from detection.models.backbones import (
    Backbone,
    efficientnet_lite0_fpn,
    mobilenet_v3_large_fpn,
    resnet_fpn,
    timm_fpn,
)
from detection.models.pyramid import FeaturePyramidNetwork
from detection.recipes import rebuild
from detection.trust import RecipeError

SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_small_patch16_224"


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [[(224, 224)], [(200, 317)]])
@pytest.mark.parametrize(("name", "window_size"), [(SWIN, None), (VIT, None), (VIT, 6)])
def test_transformers_train_and_detect(name: str, window_size: int | None, sizes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    model = zoo.fasterrcnn_timm_fpn(
        backbone_name=name, window_size=window_size, num_classes=3, fpn_channels=32, min_size=200, max_size=320
    )
    images = [random(3, *size) for size in sizes]
    targets = [{"boxes": torch.tensor([[5.0, 5, 60, 70]]), "labels": torch.tensor([2])} for _ in images]
    losses = model.train()(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    first = model.backbone.body.network.patch_embed.proj.weight.grad
    assert first.isfinite().all() and first.abs().sum() > 0
    for (height, width), found in zip(sizes, model.eval()(images), strict=True):
        limit = torch.tensor([width, height, width, height])
        assert found["boxes"].isfinite().all() and (found["boxes"] <= limit).all()


@torch.no_grad()
def test_swin_gives_timms_own_maps_with_channels_first() -> None:
    """timm's `features_only` gives `(B, h, w, C)`, under names of its own."""
    backbone = timm_fpn(SWIN, out_channels=8).eval()
    options = {"strict_img_size": False, "always_partition": True}
    theirs = timm.create_model(SWIN, features_only=True, **options).eval()
    theirs.load_state_dict({k.replace("layers.", "layers_"): v for k, v in backbone.body.network.state_dict().items()})
    images = random(2, 3, 224, 288)
    expected = theirs(images)
    assert [m.shape[3] for m in expected] == [96, 192, 384, 768]
    for found, wanted in zip(backbone.body(images).values(), expected, strict=True):
        by_hand = torch.stack([wanted[..., c] for c in range(wanted.shape[3])], 1)
        torch.testing.assert_close(found, by_hand)


@torch.no_grad()
def test_swin_shifts_its_windows_in_every_stage() -> None:
    """At 448 pixels the last stage has 2 x 2 windows; what is in one must reach the others (Liu et al. 2021)."""
    network = timm_fpn("swin_tiny_patch4_window7_224").eval().body.network
    cells = random(1, 14, 14, 768)
    changed = cells.clone()
    changed[:, 3, 3] += 1
    difference = (network.layers[3].blocks(changed) - network.layers[3].blocks(cells)).abs().amax(3)[0]
    assert difference[:7, :7].min() > 0 and difference[8:10, 8:10].max() > 0


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768)),
        ("swinv2_tiny_window8_256", (96, 192, 384, 768)),
        ("swinv2_cr_tiny_ns_224", (96, 192, 384, 768)),
        ("pvt_v2_b0", (32, 64, 160, 256)),
        ("maxvit_nano_rw_256", (64, 128, 256, 512)),
        ("convnext_atto", (40, 80, 160, 320)),
        ("davit_tiny", (96, 192, 384, 768)),
    ],
)
@torch.no_grad()
def test_hierarchical_networks_take_any_image_size(name: str, channels: tuple[int, ...]) -> None:
    backbone = timm_fpn(name, out_channels=8).eval()
    assert (backbone.in_channels, backbone.strides) == (channels, (4, 8, 16, 32, 64))
    for height, width in [(96, 160), (200, 317)]:
        for stride, found in zip(
            backbone.strides[:4], backbone.body(random(1, 3, height, width)).values(), strict=True
        ):
            # convolutions without padding leave out what fills no cell
            assert found.shape[2] in (height // stride, math.ceil(height / stride))
            assert found.shape[3] in (width // stride, math.ceil(width / stride))
        assert all(m.isfinite().all() for m in backbone(random(1, 3, height, width)).values())


@torch.no_grad()
def test_a_head_that_gives_maps_stays() -> None:
    backbone = timm_fpn("selecsls42", out_channels=8).eval()
    assert (backbone.in_channels, backbone.strides) == ((128, 288, 480, 1024, 1280), (4, 8, 16, 32, 64, 128))
    assert [m.shape[-1] for m in backbone(random(1, 3, 96, 160)).values()] == [40, 20, 10, 5, 3, 2]


@torch.no_grad()
def test_padding_to_what_a_network_needs_is_padding_by_hand() -> None:
    body = timm_fpn("maxvit_nano_rw_256", out_channels=8).eval().body
    images = random(1, 3, 200, 317)
    padded = torch.zeros(1, 3, 256, 512)
    padded[..., :200, :317] = images
    expected = body.network.forward_intermediates(padded, indices=[1, 2, 3, 4], intermediates_only=True)
    for stride, found, wanted in zip((4, 8, 16, 32), body(images).values(), expected, strict=True):
        assert torch.equal(found, wanted[..., : math.ceil(200 / stride), : math.ceil(317 / stride)])


@pytest.mark.parametrize("name", [SWIN, "swinv2_tiny_window8_256", "vit_tiny_patch16_224", "convnext_atto"])
def test_bfloat16_stays_finite_and_close(name: str) -> None:
    torch.manual_seed(0)
    backbone = timm_fpn(name, out_channels=16)
    images = random(2, 3, 128, 160)
    with torch.no_grad():
        exact = backbone.eval()(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(images)
        sum(m.float().square().mean() for m in found.values()).backward()
    for key, wanted in exact.items():
        assert (found[key].float() - wanted).norm() < 0.05 * wanted.norm()
    # each has one, as training on several devices wants it
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_a_swin_detector_trains_under_bfloat16() -> None:
    torch.manual_seed(0)
    model = zoo.fasterrcnn_timm_fpn(backbone_name=SWIN, num_classes=3, fpn_channels=32, min_size=96, max_size=160)
    targets = [{"boxes": torch.tensor([[5.0, 5, 60, 70]]), "labels": torch.tensor([2])}]
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()([random(3, 100, 141)], targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [SWIN, "pvt_v2_b0", "vit_tiny_patch16_224", "convnext_atto", "windowed"])
def test_checkpointing_keeps_less_for_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    window = 3 if name == "windowed" else None
    backbone = timm_fpn("vit_tiny_patch16_224" if window else name, out_channels=8, window_size=window).eval()
    images = random(1, 3, 96, 128)

    def gradients(enable: bool) -> tuple[dict[str, Tensor], int]:
        kept = []
        backbone.zero_grad()
        backbone.body.set_grad_checkpointing(enable)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            total = sum(m.square().mean() for m in backbone(images).values())
        total.backward()
        return {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}, sum(kept)

    (plain, all_kept), (again, fewer_kept) = gradients(False), gradients(True)
    assert fewer_kept < 0.7 * all_kept and set(plain) == set(again)
    for key, wanted in plain.items():
        torch.testing.assert_close(again[key], wanted)


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("layers", range(5))
def test_swins_layers_train_from_the_coarsest(layers: int) -> None:
    network = timm_fpn(SWIN, trainable_layers=layers, out_channels=8).body.network
    expected = tuple(f"layers.{i}." for i in range(4 - layers, 4)) + (("patch_embed.",) if layers == 4 else ())
    assert trainable(network) == {n for n, _ in network.named_parameters() if n.startswith(expected) and expected}


@pytest.mark.parametrize("layers", [0, 1, 5, 11, 12])
def test_a_vits_blocks_train_from_the_last(layers: int) -> None:
    network = timm_fpn("vit_tiny_patch16_224", trainable_layers=layers, out_channels=8).body.network
    everything = {name for name, _ in network.named_parameters()}
    expected = tuple(f"blocks.{i}." for i in range(12 - layers, 12))
    assert trainable(network) == (
        everything if layers == 12 else {n for n in everything if n.startswith(expected) and expected}
    )
    with pytest.raises(ValueError, match="must be from 0 to 12, not 13"):
        timm_fpn("vit_tiny_patch16_224", trainable_layers=13)


@pytest.mark.parametrize(
    ("name", "fixed"), [(SWIN, ("patch_embed.", "layers.0.")), ("vit_tiny_patch16_224", ()), ("resnet10t", ())]
)
def test_weights_of_timm_fit_and_are_in_the_recipe(name: str, fixed: tuple[str, ...], tmp_path: Path) -> None:
    source = timm.create_model(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone = timm_fpn(name, tmp_path / "weights.pth", out_channels=8)
    network = backbone.body.network
    for key, value in network.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    if name != "resnet10t":
        assert {n for n, _ in network.named_parameters()} - trainable(network) == {
            n for n, _ in network.named_parameters() if fixed and n.startswith(fixed)
        }
    again = rebuild(backbone.recipe)
    assert trainable(again) == trainable(backbone)
    assert [type(m) for m in again.modules()] == [type(m) for m in backbone.modules()]
    model = zoo.fasterrcnn_timm_fpn(backbone_name=name, weights_backbone=tmp_path / "weights.pth", fpn_channels=8)
    assert trainable(rebuild(model.recipe).backbone) == trainable(backbone) == trainable(model.backbone)


@pytest.mark.parametrize("name", [SWIN, "vit_tiny_patch16_224", "convnext_atto"])
def test_timms_layer_decay_finds_the_layers(name: str) -> None:
    network = timm_fpn(name, out_channels=8).body.network
    groups = param_groups_layer_decay(network, 0.05, getattr(network, "no_weight_decay", set)(), layer_decay=0.5)
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    blocks = [p for n, p in network.named_parameters() if ".mlp.fc1.weight" in n]
    assert [rates[id(p)] for p in blocks] == sorted(rates[id(p)] for p in blocks)
    assert rates[id(blocks[0])] < 0.2 * rates[id(blocks[-1])]
    assert len(rates) == len(list(network.parameters()))


def test_tensors_of_older_checkpoints_load() -> None:
    """They were made from timm's `features_only`, which wrote `stages_0` for `stages.0`."""
    backbone = timm_fpn("convnext_atto", out_channels=8)
    older = timm.create_model("convnext_atto", features_only=True).state_dict()
    state = {f"body.network.{name}": torch.full_like(value, 0.25) for name, value in older.items()}
    assert "body.network.stages_0.blocks.0.conv_dw.weight" in state
    state |= {name: value for name, value in backbone.state_dict().items() if name.startswith("fpn.")}
    backbone.load_state_dict(state)
    assert all((p == 0.25).all() for p in backbone.body.parameters())
    model = zoo.faster_rcnn(timm_fpn("convnext_atto", out_channels=8), 3)
    model.load_state_dict(
        model.state_dict() | {f"backbone.{name}": value for name, value in state.items()}, strict=False
    )
    assert all((p == 0.25).all() for p in model.backbone.body.parameters())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("coatnet_0_rw_224", r"coatnet_0_rw_224 can't be a backbone: it can't take an image of 75 x 300 pixels"),
        ("mixer_s16_224", r"mixer_s16_224 can't be a backbone: .*doesn't match model.*choose a network that takes"),
        ("vit_small_patch14_dinov2", r"vit_small_patch14_dinov2 has patches of 14 pixels.*pyramid of your own"),
        ("vit_tiny_r_s16_p8_224", r"has patches of 32 pixels"),
        ("inception_v3", r"inception_v3 can't be a backbone: .*choose a network that takes images of any size"),
    ],
)
def test_networks_that_cant_be_backbones_say_why(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        timm_fpn(name)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("vit_tiny_patch16_224", {"fpn_norm": "group"}, "the simple feature pyramid of vit_tiny_patch16_224 has layer"),
        ("resnet10t", {"window_size": 14}, "window_size is for plain ViTs, which ResNet isn't"),
        (SWIN, {"window_size": 14}, "window_size is for plain ViTs, which SwinTransformer isn't"),
        ("resnet10t", {"out_indices": ()}, "resnet10t has no feature maps of stride 4 or more"),
    ],
)
def test_arguments_that_a_network_has_no_place_for_raise(name: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        timm_fpn(name, **arguments)


class Halved(nn.Module):
    """A user's pyramid of three levels: the two finest maps, and one more of half the last one's size."""

    def __init__(self, in_channels: list[int], width: int = 24) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 1) for c in in_channels[:2])

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        given = list(maps.values())
        fine, coarse = (conv(m) for conv, m in zip(self.convs, given[:2], strict=True))
        return {"fine": fine, "coarse": coarse, "last": coarse[..., ::2, ::2]}


def reference_recipe() -> dict[str, Any]:
    home = "torchvision.ops.feature_pyramid_network"
    extra = {"class_path": f"{home}.LastLevelMaxPool", "init_args": {}}
    return {"class_path": f"{home}.FeaturePyramidNetwork", "init_args": {"out_channels": 16, "extra_blocks": extra}}


@pytest.mark.parametrize(
    "build",
    [
        partial(resnet_fpn, "resnet18"),
        partial(timm_fpn, "resnet10t"),
        partial(efficientnet_lite0_fpn, None),
        mobilenet_v3_large_fpn,
        partial(timm_fpn, SWIN),
    ],
)
def test_a_users_pyramid_is_measured(build: Any) -> None:
    plain = build()
    backbone = build(pyramid=Halved)
    first = plain.strides[:2]
    assert (backbone.strides, backbone.out_channels) == ((*first, 2 * first[1]), 24)
    given = Halved(list(plain.in_channels), 8)
    assert build(pyramid=given).fpn is given and build(pyramid=given).out_channels == 8
    assert {n for n in backbone.state_dict() if not n.startswith("body.")} == {
        f"fpn.convs.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")
    }
    reference = build(pyramid=rebuild(reference_recipe()))
    assert isinstance(reference.fpn, ReferencePyramid)
    assert (reference.strides, reference.out_channels) == (plain.strides, 16)


def test_a_users_pyramid_on_a_vit_gets_the_last_map_or_those_asked_for() -> None:
    class One(nn.Module):
        def __init__(self, in_channels: list[int]) -> None:
            super().__init__()
            self.in_channels = in_channels

        def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"0": sum(maps.values())}

    backbone = timm_fpn("vit_tiny_patch16_224", pyramid=One)
    assert (backbone.fpn.in_channels, backbone.strides, backbone.out_channels) == ([192], (16,), 192)
    assert timm_fpn("vit_tiny_patch16_224", pyramid=One, out_indices=(2, 5, 8)).fpn.in_channels == [192] * 3
    assert timm_fpn("vit_small_patch14_dinov2", pyramid=One).strides == (14,)


def test_our_pyramid_given_as_a_part_is_the_default() -> None:
    torch.manual_seed(0)
    default = resnet_fpn("resnet18", out_channels=16)
    given = resnet_fpn("resnet18", pyramid=partial(FeaturePyramidNetwork, out_channels=16))
    assert (given.strides, given.out_channels) == (default.strides, default.out_channels)
    given.load_state_dict(default.state_dict())
    images = random(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(given.eval()(images), default.eval()(images))


def test_the_pyramid_is_in_the_recipe() -> None:
    pyramid = partial(ReferencePyramid, out_channels=16, extra_blocks=None)
    again = rebuild(resnet_fpn("resnet18", pyramid=pyramid).recipe)
    assert isinstance(again.fpn, ReferencePyramid) and again.strides == (4, 8, 16, 32)
    foreign = resnet_fpn("resnet18", pyramid=Halved)
    assert foreign.recipe["init_args"]["pyramid"]["class_path"] == f"{__name__}.Halved"
    with pytest.raises(RecipeError, match=f"if you trust the code of {__name__.partition('.')[0]}"):
        rebuild(foreign.recipe)
    trusted = rebuild(foreign.recipe, trust=(__name__.partition(".")[0],))
    assert isinstance(trusted.fpn, Halved) and trusted.strides == foreign.strides


def test_pyramids_that_dont_fit_say_why() -> None:
    with pytest.raises(ValueError, match="same number of channels, not"):
        resnet_fpn("resnet18", pyramid=nn.Identity())
    with pytest.raises(ValueError, match="can't take an image of 128 x 256 pixels"):
        resnet_fpn("resnet18", pyramid=Halved([1, 2]))


def test_a_detector_on_a_users_pyramid_trains() -> None:
    model = zoo.fasterrcnn_timm_fpn(
        backbone_name="resnet10t", pyramid=partial(ReferencePyramid, out_channels=16, extra_blocks=LastLevelMaxPool()),
        num_classes=3, min_size=64, max_size=96,
    )  # fmt: skip
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([2])}]
    losses = model.train()([random(3, 64, 80)], targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert model.backbone.fpn.inner_blocks[0][0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "builder",
    [
        "fasterrcnn_resnet50_fpn",
        "cascadercnn_resnet50_fpn",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_efficientnet_lite0_fpn",
        "cascadercnn_efficientnet_lite0_fpn",
    ],
)
def test_builders_take_a_pyramid_in_plain_values(builder: str) -> None:
    arguments = {"pyramid": reference_recipe(), "num_classes": 3, "weights_backbone": None}
    with torch.device("meta"):
        model = rebuild({"class_path": f"detection.models.zoo.{builder}", "init_args": arguments}, trust=("detection",))
        again = rebuild(model.recipe)
    for made in (model, again):
        assert isinstance(made.backbone.fpn, ReferencePyramid) and made.rpn.head.cls_logits.in_channels == 16


CONFIGURATION = """
class_path: detection.fasterrcnn_timm_fpn
init_args:
  backbone_name: swin_tiny_patch4_window7_224
  num_classes: 3
  min_size: 64
  max_size: 96
  pyramid:
    class_path: torchvision.ops.FeaturePyramidNetwork
    init_args: {out_channels: 16}
"""


def test_a_configuration_alone_makes_a_detector_that_trains() -> None:
    model = rebuild(yaml.safe_load(CONFIGURATION), trust=("detection", "torchvision"))
    assert model.backbone.strides == (4, 8, 16, 32)
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([2])}]
    losses = model.train()([random(3, 64, 80)], targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert model.backbone.body.network.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (SWIN, {}),
        ("vit_tiny_patch16_224", {"window_size": 3}),
        ("resnet10t", {"norm": "frozen"}),
        ("convnext_atto", {}),
        ("tf_efficientnet_lite0", {}),
    ],
)
def test_the_quick_forms_detect_the_same(name: str, options: dict[str, Any]) -> None:
    """Folded and packed, as `Detector` and training use them."""
    torch.manual_seed(0)
    sizes = {"min_size": 96, "max_size": 128, "fpn_channels": 16, "box_score_thresh": 0.0}
    model = zoo.fasterrcnn_timm_fpn(backbone_name=name, num_classes=3, **sizes, **options).eval()
    images = [random(3, 90, 70), random(3, 64, 100)]
    expected, quick = model(images), model.for_inference()
    for found, wanted in zip(quick(images), expected, strict=True):
        assert len(wanted["boxes"]) > 10
        torch.testing.assert_close(found["scores"], wanted["scores"], atol=1e-4, rtol=1e-4)
    maps, wanted_maps = quick.backbone(images[0][None]), model.backbone(images[0][None])
    for key, wanted_map in wanted_maps.items():
        torch.testing.assert_close(maps[key], wanted_map, atol=1e-4, rtol=1e-3)


def test_backbones_are_built_without_memory() -> None:
    with torch.device("meta"):
        swin, vit = timm_fpn(SWIN, out_channels=8), timm_fpn("vit_tiny_patch16_224", out_channels=8)
    for backbone in (swin, vit):
        assert isinstance(backbone, Backbone) and all(p.is_meta for p in backbone.parameters())
        assert measure(backbone) == (backbone.strides, 8) == ((4, 8, 16, 32, 64), 8)
