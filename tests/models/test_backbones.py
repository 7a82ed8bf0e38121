"""Backbones: declared strides, layers that train, normalisation, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from detection.models import zoo
from detection.models.backbones import (
    Backbone,
    efficientnet_lite0_fpn,
    mobilenet_v3_large_fpn,
    resnet_c4,
    resnet_dc5,
    resnet_fpn,
    timm_fpn,
)
from detection.models.c4 import res5_head
from detection.models.fast.folding import FoldedNorm, fold_frozen_norms
from detection.models.norms import group_norm
from detection.models.pooling import RoIPooler
from detection.recipes import rebuild


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
    return {kind for kind in kinds if any(isinstance(module, kind) for module in model.modules())}


def test_normalisation_follows_the_weights_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18().state_dict(), path)
    assert norms(resnet_fpn("resnet18")) == {nn.BatchNorm2d}
    assert norms(resnet_fpn("resnet18", path)) == {FrozenBatchNorm2d}
    assert norms(resnet_fpn("resnet18", path, norm="batch")) == {nn.BatchNorm2d}
    assert norms(resnet_fpn("resnet18", norm="group", fpn_norm="group")) == {nn.GroupNorm}
    assert norms(resnet_fpn("resnet18", norm="frozen", fpn_norm="batch")) == {FrozenBatchNorm2d, nn.BatchNorm2d}
    assert norms(mobilenet_v3_large_fpn(norm="group")) == {nn.GroupNorm}


@pytest.mark.parametrize("folded", [False, True])
def test_scale_and_shift_learn_as_of_batch_normalisation_in_evaluation(folded: bool) -> None:
    """Against PyTorch's own in evaluation mode, also where normalisation is folded into the convolutions."""
    torch.manual_seed(0)
    backbone, theirs = resnet_fpn("resnet18", norm="affine"), resnet18().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low in ((module.weight, 0.5), (module.bias, -0.2), (module.running_var, 0.5)):
                nn.init.uniform_(values, low, low + 1)  # type: ignore[arg-type]
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
    for parameter in (*theirs.conv1.parameters(), *theirs.bn1.parameters(), *theirs.layer1.parameters()):
        parameter.requires_grad_(False)  # as a backbone whose weights come from somewhere has it
    kept = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    backbone.body.load_state_dict({k: v for k, v in kept.items() if not k.endswith("num_batches_tracked")})
    names = list(backbone.state_dict())
    if folded:
        fold_frozen_norms(backbone, torch.zeros(1, 3, 64, 64))
        assert isinstance(backbone.body["bn1"], FoldedNorm) and set(backbone.state_dict()) == set(names)
    backbone.train()
    x = torch.rand(2, 3, 64, 96)
    ours, wanted = backbone.body(x), x
    for name, module in theirs.named_children():
        wanted = module(wanted) if name not in ("avgpool", "fc") else wanted
    torch.testing.assert_close(ours["3"], wanted, rtol=1e-4, atol=1e-4)
    for last in (ours["3"], wanted):
        last.square().mean().backward()
    named = dict(theirs.named_parameters())
    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad == named[name].requires_grad, name
        if parameter.requires_grad:
            scale = named[name].grad.abs().max()  # type: ignore[union-attr]
            assert scale > 0 and (parameter.grad - named[name].grad).abs().max() < 1e-4 * scale, name
    assert torch.equal(backbone.body.state_dict()["layer4.1.bn2.running_var"], kept["layer4.1.bn2.running_var"])
    learning = {name for name, parameter in backbone.body.named_parameters() if parameter.requires_grad}
    assert {"layer2.0.bn1.weight", "layer4.1.bn2.bias"} <= learning and "bn1.weight" not in learning


def test_scale_and_shift_of_timms_networks_learn_too() -> None:
    body = timm_fpn("resnet10t", norm="affine").body
    named = dict(body.named_parameters())
    assert nn.BatchNorm2d not in norms(body) and named["network.layer4.0.bn1.weight"].requires_grad
    assert not named["network.layer1.0.bn1.weight"].requires_grad


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


def random_resnet50(path: Path) -> nn.Module:
    """A ResNet-50 whose residual branches are damped, as training leaves them, and a file of its weights."""
    torch.manual_seed(0)
    network = resnet50().eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(parameter, 0.2)
    torch.save(network.state_dict(), path)
    return network


def stages(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    maps = [network.maxpool(network.relu(network.bn1(network.conv1(images))))]
    for k in range(1, 5):
        maps.append(getattr(network, f"layer{k}")(maps[-1]))
    return maps


@pytest.mark.slow
@torch.no_grad()
def test_c4_and_dc5_against_torchvisions_network(tmp_path: Path) -> None:
    network = random_resnet50(tmp_path / "r50.pth")
    images = torch.rand(2, 3, 64, 96) - 0.5
    maps = stages(network, images)
    c4 = resnet_c4(weights=tmp_path / "r50.pth").eval()
    assert (c4.strides, c4.out_channels) == ((16,), 1024)
    torch.testing.assert_close(c4(images), {"0": maps[3]})
    assert not any("layer4" in name or "fpn" in name for name in c4.state_dict())
    head = res5_head(weights=tmp_path / "r50.pth").eval()
    assert head.out_channels == 2048
    torch.testing.assert_close(head(maps[3]), F.adaptive_avg_pool2d(maps[4], 1).flatten(1))
    dc5 = resnet_dc5(weights=tmp_path / "r50.pth").eval()
    assert (dc5.strides, dc5.out_channels) == ((16,), 2048)
    dilated = dc5(images)["0"]
    assert dilated.shape == (2, 2048, 4, 6)
    # Every second cell is the undilated network's, whatever lies between.
    torch.testing.assert_close(dilated[..., ::2, ::2], maps[4], atol=1e-4, rtol=1e-4)
    for backbone in (c4, dc5):  # frozen by the weights, and so again without them
        again = rebuild(backbone.recipe)
        assert trainable(again) == trainable(backbone) and norms(again) == {FrozenBatchNorm2d}


@pytest.mark.slow
@torch.no_grad()
def test_the_stride_in_the_1x1_convolution(tmp_path: Path) -> None:
    network = random_resnet50(tmp_path / "r50.pth")
    images = torch.rand(1, 3, 64, 96) - 0.5
    inner = stages(network, images)[1]
    moved = resnet_fpn("resnet50", tmp_path / "r50.pth", stride_in_1x1=True).eval()
    block = network.layer2[0]
    # By hand: of the 1x1 convolution's map every second cell stays, and the 3x3 one steps by 1.
    hidden = F.relu(block.bn1(block.conv1(inner)))[..., ::2, ::2]
    hidden = F.relu(block.bn2(F.conv2d(hidden, block.conv2.weight, padding=1)))
    expected = F.relu(block.bn3(block.conv3(hidden)) + block.downsample(inner))
    torch.testing.assert_close(moved.body["layer2"][0](inner), expected, atol=1e-5, rtol=1e-5)
    assert (block(inner) - expected).abs().max() > 0.01  # a thousand times the tolerance
    assert_declared_strides_hold(moved, 64, 96)
    plain = resnet_fpn("resnet50", norm="frozen")
    assert {k: v.shape for k, v in moved.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    dilated = resnet_dc5(weights=tmp_path / "r50.pth", stride_in_1x1=True).eval()(images)["0"]
    last = moved.body(images)["3"]
    torch.testing.assert_close(dilated[..., ::2, ::2], last, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [resnet_fpn, resnet_c4, resnet_dc5])
def test_networks_without_bottlenecks_have_no_1x1_convolution(build: Any) -> None:
    with pytest.raises(ValueError, match="resnet18 has no"):
        build("resnet18", stride_in_1x1=True)


def test_resnet18_has_no_dilated_form() -> None:
    with pytest.raises(ValueError, match="resnet18 has no bottleneck blocks"):
        resnet_dc5("resnet18")


def test_a_detector_on_one_map_trains() -> None:
    """C4 in small: regions are pooled at 14x14 and go through the network's last stage."""
    model = zoo.faster_rcnn(
        resnet_c4("resnet18", norm="frozen", trainable_layers=5),
        3,
        64,
        96,
        box_roi_pool=RoIPooler(14, num_levels=1),
        box_head=res5_head("resnet18"),
    )
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([2])}]
    losses = model.train()([torch.rand(3, 64, 80)], targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert model.roi_heads.box_head.layer4[0].conv1.weight.grad.abs().sum() > 0
    assert model.backbone.body.conv1.weight.grad.abs().sum() > 0
    assert model.rpn.head.cls_logits.out_channels == 15


@pytest.mark.parametrize("build", [lambda: resnet_fpn("resnet18"), lambda: efficientnet_lite0_fpn(trainable_layers=4)])
def test_checkpointing_keeps_less_for_the_same_gradients(build: Any) -> None:
    torch.manual_seed(0)
    backbone = build()
    images = torch.rand(2, 3, 64, 64)

    def gradients(enable: bool) -> tuple[list[Tensor], int]:
        kept = []
        backbone.zero_grad()
        backbone.body.set_grad_checkpointing(enable)

        def note(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            total = torch.stack([m.square().mean() for m in backbone(images).values()]).sum()
        total.backward()
        return [p.grad.clone() for p in backbone.parameters() if p.grad is not None], sum(kept)

    (plain, all_kept), (again, fewer_kept) = gradients(False), gradients(True)
    assert fewer_kept < 0.6 * all_kept
    for mine, wanted in zip(again, plain, strict=True):
        torch.testing.assert_close(mine, wanted)
