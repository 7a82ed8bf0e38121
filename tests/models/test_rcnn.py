"""R-CNN's warp against crops made by other means, and its head, whole or in parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detection.models.backbones import efficientnet_lite0_fpn
from detection.models.rcnn import (
    CONTEXT,
    RegionWarp,
    efficientnet_lite0_head,
    resnet_head,
    whole_image,
)
from detection.parts import FeatureMaps


def warp_all(pool: RegionWarp, images: Tensor, boxes: Tensor) -> Tensor:
    return pool(FeatureMaps((images,), (1,)), boxes)


def warp(image: Tensor, box: tuple[float, ...], size: int, context: int) -> Tensor:
    return warp_all(RegionWarp(size, context), image[None], torch.tensor([[box]]))[0]


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn((3, height, width), generator=torch.Generator().manual_seed(seed))


def test_enlarged_as_interpolation_enlarges_the_widened_crop() -> None:
    """A box of 4 x 4 pixels fills the middle 8 of 16, so with its context it shows 8 x 8 pixels."""
    image = noise(20, 24)
    expected = F.interpolate(image[None, :, 3:13, 5:15], scale_factor=2, mode="bilinear")[0, :, 2:-2, 2:-2]
    torch.testing.assert_close(warp(image, (8, 6, 12, 10), 16, 4), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("box", "context"), [((14, 8, 46, 24), 0), ((22, 12, 38, 20), 2)])
def test_shrunk_as_the_average_of_its_pixels(box: tuple[float, ...], context: int) -> None:
    """With 2 of 8 pixels of context on each side, the second box shows as much as the first does without."""
    image = noise(40, 60)
    expected = F.avg_pool2d(image[:, 8:24, 14:46], (2, 4))
    torch.testing.assert_close(warp(image, box, 8, context), expected, atol=1e-5, rtol=1e-5)


def test_without_context_the_region_fills_the_square() -> None:
    image = noise(10, 10)
    torch.testing.assert_close(warp(image, (2, 3, 7, 8), 5, 0), image[:, 3:8, 2:7], atol=1e-6, rtol=0)


def test_outside_the_image_is_its_mean() -> None:
    """The top left corner of an image of ones: a quarter of the square lies on it."""
    warped = warp(torch.ones(3, 40, 40), (0, 0, 20, 20), 40, 10)
    expected = torch.zeros(3, 40, 40)
    expected[:, 10:, 10:] = 1
    # The two pixels beside the edge repeat it, as bilinear sampling does up to half a pixel beyond the centres.
    far = torch.ones(40, dtype=torch.bool)
    far[9] = False
    assert torch.equal(warped[:, far][:, :, far], expected[:, far][:, :, far])


def test_context_of_the_paper_is_sixteen_pixels_of_its_input() -> None:
    """A ramp gives the place that every output pixel shows: the box has the middle 195 of 227 pixels."""
    assert round(CONTEXT * 227) == 16
    ramp = torch.arange(400.0).expand(3, 400, 400)
    row = warp(ramp, (100, 50, 197.5, 250), 227, round(CONTEXT * 227))[0, 0]
    assert row[16].item() == pytest.approx(100 + 0.25 - 0.5, abs=1e-3)  # half an output pixel inside the box
    assert row[-17].item() == pytest.approx(197.5 - 0.25 - 0.5, abs=1e-3)


def test_images_of_a_batch_and_gradients() -> None:
    images = torch.stack((noise(30, 30, 1), noise(30, 30, 2))).requires_grad_()
    boxes = torch.tensor([[[2.0, 3, 20, 25], [5, 5, 12, 9]], [[1, 1, 4, 4], [0, 0, 0, 0]]])
    both = warp_all(RegionWarp(12, 2), images, boxes)
    assert both.shape == (4, 3, 12, 12)
    for i, (image, own) in enumerate(zip(images, boxes, strict=True)):
        for j, box in enumerate(own.tolist()):
            torch.testing.assert_close(both[2 * i + j], warp(image, tuple(box), 12, 2))
    both[0].sum().backward()
    assert images.grad is not None and images.grad[0].any() and not images.grad[1].any()
    assert warp_all(RegionWarp(12, 2), images.bfloat16(), boxes).dtype == torch.bfloat16
    assert warp_all(RegionWarp(12, 2), images, torch.full((2, 1, 4), torch.nan)).isfinite().all()


def test_context_must_leave_room() -> None:
    with pytest.raises(ValueError, match="context 8 on both sides leaves nothing of 16 pixels"):
        RegionWarp(16, 8)


def test_the_image_is_the_only_map() -> None:
    backbone, images = whole_image(), torch.rand(2, 3, 64, 96)
    assert backbone.strides == (1,) and backbone.out_channels == 3
    assert torch.equal(backbone(images)["0"], images) and list(backbone(images)) == ["0"]
    assert list(backbone.parameters()) == []


@pytest.mark.parametrize("size", [64, 80])
def test_the_head_is_the_network_that_the_backbone_has(size: int) -> None:
    head = efficientnet_lite0_head(size, out_channels=16).eval()
    regions = torch.randn((5, 3, size, size), generator=torch.Generator().manual_seed(0))
    features = head(regions)
    assert features.shape == (5, 16) and features.requires_grad
    same = efficientnet_lite0_fpn().eval().body(regions)
    torch.testing.assert_close(head.body(regions)["3"], same["3"])
    head.chunk = 2
    with torch.no_grad():
        torch.testing.assert_close(head(regions), features, atol=1e-5, rtol=1e-5)


def test_what_trains_of_the_head() -> None:
    trained = {name for name, p in efficientnet_lite0_head(64).named_parameters() if p.requires_grad}
    assert not any("blocks.0" in name or "blocks.1" in name or "conv_stem" in name for name in trained)
    assert any("blocks.2" in name for name in trained) and "head.fc7.weight" in trained
    fixed = resnet_head(64, "resnet18", trainable_layers=1)
    assert {n.split(".")[1] for n, p in fixed.named_parameters() if p.requires_grad} == {"layer4", "fc6", "fc7"}
    assert fixed.head.fc6.in_features == 512 * 2 * 2
