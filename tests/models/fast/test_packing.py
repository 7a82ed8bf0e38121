"""Detectors made ready for inference find what they found before, in both precisions, and still copy and save."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from detection import (
    fasterrcnn_efficientnet_lite0_fpn,
    maskrcnn_efficientnet_lite0_fpn,
)
from detection.devices import has_kernels
from detection.models.fast import winograd
from detection.models.fast.fast_pooling import GatherPooler
from detection.models.fast.packing import PackedBlock, PackedConv2d, PackedHead, PackedLinear, pack
from detection.models.roi_heads import TwoFCHead
from detection.parts import FeatureMaps

SIZES = [(96, 128), (80, 72)]


def decided(builder, **arguments):
    """A detector with statistics and scores that are not all the same."""
    torch.manual_seed(0)
    options = {"num_classes": 4, "weights_backbone": None, "min_size": 96, "max_size": 160, "box_score_thresh": 0.26}
    model = builder(**(options | arguments)).eval()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images() -> list[Tensor]:
    return [torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) for size in SIZES]


# TensorFlow's padding, activations joined to norms, a live pyramid. test_parity has torchvision's twins.
@pytest.mark.parametrize("builder", [fasterrcnn_efficientnet_lite0_fpn, maskrcnn_efficientnet_lite0_fpn])
def test_the_detections_stay(builder) -> None:
    model = decided(builder)
    ready = model.for_inference()
    kinds = [type(m) for m in ready.modules()]
    assert PackedLinear in kinds and kinds.count(PackedConv2d) > 30 and nn.Conv2d not in kinds
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ready.backbone.modules())
    exact = copy.deepcopy(model).double()  # two of float32 differ by the rounding of both, and by the number of threads
    with torch.inference_mode():
        wanted, given = exact([image.double() for image in images()]), ready(images())
    assert sum(len(found["labels"]) for found in wanted) > 20
    for one, other in zip(wanted, given, strict=True):
        assert one["labels"].tolist() == other["labels"].tolist()
        torch.testing.assert_close(other["boxes"], one["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(other["scores"], one["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8, bias=False)])
@pytest.mark.parametrize("half", [False, True])
def test_a_packed_convolution_is_the_plain_one(layer: nn.Conv2d, half: bool) -> None:
    packed = nn.Sequential(copy.deepcopy(layer))
    pack(packed)
    for x in (torch.randn(2, 8, 9, 7), torch.randn(1, 8, 20, 31), torch.randn(0, 8, 9, 7)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            wanted, given = layer(x), packed(x)
        assert given.dtype == wanted.dtype == (torch.bfloat16 if half else torch.float32)
        torch.testing.assert_close(given, wanted)


def half_precision(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("size", [(9, 7), (1, 1)])
def test_a_packed_convolution_carries_out_sum_and_activation(
    size: tuple[int, int], activation: nn.Module, half: bool
) -> None:
    layer, x, other = nn.Conv2d(8, 16, 3, padding=1), 9 * torch.randn(2, 8, *size), torch.randn(2, 16, *size)
    packed = nn.Sequential(copy.deepcopy(layer), nn.Identity(), activation)
    pack(packed)
    assert type(packed[0].activation) is type(activation) and type(packed[2]) is nn.Identity
    for gradients in (True, False):  # without them, the kernel
        with torch.set_grad_enabled(gradients), half_precision(half):
            plain = layer(x)
            for wanted, given in (
                (activation(plain), packed(x)),
                (activation(plain + other.to(plain.dtype)), packed[0](x, other.to(plain.dtype))),
            ):
                # The kernel rounds to bfloat16 after the sum alone.
                torch.testing.assert_close(given, wanted, rtol=1e-2 if half else 1e-5, atol=0.04 if half else 1e-5)


def test_only_the_activation_of_a_convolution_moves_into_it() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.SiLU(), nn.ReLU())
    pack(layers)
    kinds = [type(layer) for layer in layers]
    assert kinds == [PackedConv2d, nn.BatchNorm2d, nn.ReLU, PackedConv2d, nn.SiLU, nn.ReLU]
    assert all(type(layers[i].activation) is nn.Identity for i in (0, 3))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_packed_block_is_torchvisions(kind: type[nn.Module], stride: int, half: bool) -> None:
    torch.manual_seed(0)
    inner, outer = 8, 8 * kind.expansion
    shortcut = nn.Conv2d(outer, outer, 1, stride) if stride > 1 else None
    block = kind(outer, inner, stride, shortcut, norm_layer=lambda _: nn.Identity()).eval()
    network = nn.Sequential(copy.deepcopy(block))
    pack(network)
    assert type(network[0]) is PackedBlock
    x = torch.randn(2, outer, 14, 10)
    with torch.no_grad(), half_precision(half):
        torch.testing.assert_close(network(x), block(x), rtol=1e-2 if half else 1e-5, atol=0.02 if half else 1e-5)


def test_a_block_that_still_normalises_stays() -> None:
    network = nn.Sequential(BasicBlock(8, 8)).eval()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        wanted = network(x)
        pack(network)
        assert type(network[0]) is BasicBlock
        torch.testing.assert_close(network(x), wanted)


def test_what_has_no_kernel_is_computed_as_ever() -> None:
    layer = nn.Linear(6, 5)
    packed = PackedLinear(layer)
    x = torch.randn(3, 6, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 6))
    assert not packed.packed
    with torch.inference_mode():
        torch.testing.assert_close(packed.double()(x.double()), layer.double()(x.double()))


@pytest.mark.parametrize("half", [False, True])
def test_a_packed_head_is_the_plain_one_and_moves_no_feature(half: bool) -> None:
    torch.manual_seed(0)
    head = TwoFCHead(12, 5, 20)
    network = nn.Sequential(copy.deepcopy(head))
    pack(network)
    assert type(network[0]) is PackedHead and network[0].out_channels == 20
    seen: list[Tensor] = []
    network[0].fc6.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for count in (7, 1, 0):
        x = torch.randn(count, 12, 5, 5)
        for features in (x, x.contiguous(memory_format=torch.channels_last)):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                wanted, given = head(features), network(features)
            assert given.dtype == wanted.dtype
            tolerance = 2e-2 if half else 1e-5
            torch.testing.assert_close(given, wanted, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(network(features), head(features), rtol=1e-5, atol=1e-5)  # with gradients
        assert seen[-1].data_ptr() == features.data_ptr()  # channels last


def test_a_head_with_a_layer_of_another_kind_stays() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    network = nn.Sequential(TwoFCHead(3, 2, 5))
    network[0].fc6 = Twice(12, 5)
    x = torch.randn(4, 3, 2, 2)
    with torch.inference_mode():
        wanted = network(x)
        pack(network)
        assert type(network[0]) is TwoFCHead and type(network[0].fc6) is Twice
        torch.testing.assert_close(network(x), wanted)


def test_our_pooler_leaves_channels_last() -> None:
    pooler = GatherPooler(3, 2)
    maps = FeatureMaps((torch.randn(1, 8, 16, 16).to(memory_format=torch.channels_last),), (4,))
    with torch.inference_mode():
        pooled = pooler(maps, torch.tensor([[[0.0, 0.0, 30.0, 40.0], [5.0, 5.0, 20.0, 60.0]]]))
    assert pooled.shape == (2, 8, 3, 3) and pooled.is_contiguous(memory_format=torch.channels_last)


def test_a_ready_detector_copies_saves_and_leaves_inference_mode() -> None:
    ready = decided(fasterrcnn_efficientnet_lite0_fpn).for_inference()
    with torch.inference_mode():
        (wanted, _) = ready(images())
    twin = copy.deepcopy(ready)
    state = {name: value.clone() for name, value in ready.state_dict().items()}
    assert state.keys() == twin.state_dict().keys()
    with torch.no_grad():
        (given, _) = twin(images())
        (again, _) = ready(images())
    assert torch.equal(given["boxes"], wanted["boxes"]) and torch.equal(again["boxes"], wanted["boxes"])


@pytest.mark.skipif(has_kernels(torch.device("cpu"), torch.bfloat16), reason="with AVX-512 the order is not by size")
def test_images_of_other_sizes_do_not_order_the_weights_anew(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 1000)
    torch.manual_seed(0)
    block = Bottleneck(512, 128, norm_layer=lambda _: nn.Identity()).eval()
    ready = nn.Sequential(copy.deepcopy(block))
    pack(ready)
    sizes = [
        torch.randn(1, 512, *size).to(memory_format=torch.channels_last) for size in ((40, 40), (20, 20), (15, 15))
    ]
    with torch.inference_mode():
        ready(sizes[0])
        for x in sizes[1:]:
            torch.testing.assert_close(ready(x), block(x), rtol=1e-4, atol=1e-4)
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            for x in sizes:
                ready(x)
    lines = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert sum(",convolution," in line for line in lines) >= 9
    assert not [line for line in lines if ",reorder,simple:any" in line]
