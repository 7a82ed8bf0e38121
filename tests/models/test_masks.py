"""The mask branch: against torchvision's functions, and what a batch carries against full-size masks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection import roi_heads as reference
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from detection.batch import pad_masks
from detection.data.augment import View, crop_masks
from detection.mask_grid import TorchvisionMaskGrid, paste_masks
from detection.models import zoo
from detection.models.masks import MaskHead, MaskPredictor
from detection.models.two_stage import FasterRCNN

Sample = tuple[list[Tensor], list[dict[str, Tensor]]]
SIZE = (90, 120)


@pytest.mark.parametrize("norm", [None, torch.nn.BatchNorm2d])
def test_layers_equal_torchvision(norm: type[torch.nn.Module] | None) -> None:
    pooled = torch.randn((3, 8, 14, 14), generator=torch.Generator().manual_seed(0))
    ours, theirs = MaskHead(8, (6, 6), norm="batch" if norm else None), MaskRCNNHeads(8, [6, 6], 1, norm)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(pooled), theirs(pooled))
    ours, theirs = MaskPredictor(8, 5, 7), MaskRCNNPredictor(8, 7, 5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours(pooled).shape == (3, 5, 28, 28)
    torch.testing.assert_close(ours(pooled), theirs(pooled))


def test_initial_weights_are_spread_as_torchvisions() -> None:
    pairs = [
        (MaskHead(256), MaskRCNNHeads(256, [256] * 4, 1)),
        (MaskPredictor(256, 91), MaskRCNNPredictor(256, 256, 91)),
    ]
    for ours, theirs in pairs:
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            if a.ndim > 1:
                assert abs(float(a.std() / b.std()) - 1) < 0.05 and abs(float(a.mean())) < 0.1 * float(a.std())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 5))
def test_masks_are_laid_out_as_torchvision_does(seed: int, count: int) -> None:
    """Pixel for pixel, for boxes that are small, large, or reach over the edge."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand((count, 28, 28), generator=generator)
    corner = torch.rand((count, 2), generator=generator) * 100 - 20
    boxes = torch.cat((corner, corner + torch.rand((count, 2), generator=generator) ** 3 * 150), dim=1)
    boxes[:, 2:].clamp_(min=1)  # torchvision fails on a box that is nowhere in the image
    wanted = reference.paste_masks_in_image(masks[:, None], boxes, SIZE)
    assert torch.equal(paste_masks(masks, boxes, SIZE, TorchvisionMaskGrid()), wanted)


def ellipses(seed: int, count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Masks `(N, *SIZE)` of parts of ellipses and their tight boxes `(N, 4)`."""
    rng, masks = np.random.default_rng(seed), np.zeros((count, *SIZE), np.uint8)
    for mask in masks:
        centre, axes = rng.integers((20, 20), (100, 70)), rng.integers(3, 60, 2)
        cv2.ellipse(mask, centre.tolist(), axes.tolist(), float(rng.uniform(0, 180)), 0, 280, 1, -1)
    rects = np.array([cv2.boundingRect(mask) for mask in masks], np.float32)
    return masks, np.concatenate([rects[:, :2], rects[:, :2] + rects[:, 2:]], axis=1)


def near(boxes: np.ndarray, seed: int) -> Tensor:
    """Regions around boxes, off by up to a sixth of their sides, inside the image."""
    rng, sides = np.random.default_rng(seed), np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    moved = boxes + rng.uniform(-1, 1, boxes.shape) * sides / 6
    return torch.tensor(moved.clip(0, [SIZE[1], SIZE[0]] * 2), dtype=torch.float32)


@pytest.mark.parametrize("padding", [(0, 0), (1, 7), (38, 0)])
def test_targets_from_full_size_masks_equal_torchvision(padding: tuple[int, int]) -> None:
    """Whatever larger image shares the batch, and at the very edge of the image."""
    masks, boxes = ellipses(0)
    rois = near(boxes, 1)
    rois[0] = torch.tensor([20.0, 30, SIZE[1], SIZE[0]])
    masks[0, 40:, 50:] = 1
    index = torch.tensor([0, 1, 2, 3, 4, 5])
    wanted = reference.project_masks_on_boxes(torch.from_numpy(masks), rois, index, 28)
    whole = torch.tensor([0.0, 0, SIZE[1], SIZE[0]]).expand(len(masks), 4)
    larger = torch.zeros((1, SIZE[0] + padding[0], SIZE[1] + padding[1]), dtype=torch.uint8)
    far = torch.tensor([[0.0, 0, larger.shape[2], larger.shape[1]]])
    stack, windows = pad_masks([torch.from_numpy(masks) * 255, larger], [whole, far], 8)
    found = TorchvisionMaskGrid().targets(stack, windows, index[None], rois[None], 28)
    assert torch.equal(found[0], wanted) and wanted.std() > 0.2


@pytest.mark.parametrize("seed", range(4))
def test_targets_from_small_squares_are_nearly_those_from_full_size_masks(seed: int) -> None:
    masks, boxes = ellipses(seed)
    rois, index = near(boxes, seed), torch.arange(len(masks))
    wanted = reference.project_masks_on_boxes(torch.from_numpy(masks), rois, index, 28)
    crops, windows = crop_masks(masks, boxes, View((0, 0, SIZE[1], SIZE[0]), SIZE))
    stack, placed = pad_masks([torch.from_numpy(crops)], [torch.from_numpy(windows)], 9)
    found = TorchvisionMaskGrid().targets(stack, placed, index[None], rois[None], 28)[0]
    # Only the edge can differ, and by little: less than two in a hundred pixels lie on another side of one half.
    assert float((found - wanted).abs().mean()) < 0.01
    assert float(((found > 0.5) != (wanted > 0.5)).float().mean()) < 0.02


@pytest.fixture(scope="module")
def model() -> FasterRCNN:
    torch.manual_seed(0)
    return zoo.maskrcnn_efficientnet_lite0_fpn(num_classes=11, weights_backbone=None, min_size=96, max_size=128)


def sized(count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    masks, boxes = ellipses(3, max(1, count))
    target = {"boxes": torch.from_numpy(boxes), "labels": torch.arange(1, len(boxes) + 1)}
    target |= {"masks": torch.from_numpy(masks)}
    image = torch.rand((3, *SIZE), generator=torch.Generator().manual_seed(4))
    return [image, image.flip(2)], [{k: v[:count] for k, v in target.items()}, {k: v[:0] for k, v in target.items()}]


def test_without_objects_the_mask_loss_is_zero_and_has_a_gradient(model: FasterRCNN) -> None:
    losses = model.train()(*sized(0))
    assert losses["loss_mask"] == 0
    model.zero_grad()
    losses["loss_mask"].backward()
    assert all(p.grad is not None for p in model.roi_heads.mask_predictor.parameters())  # type: ignore[union-attr]
    assert sized(1)[1][0]["masks"].any() and model(*sized(1))["loss_mask"] > 0


def test_masks_come_in_the_size_of_the_image_given(model: FasterRCNN) -> None:
    images = [torch.rand(3, 50, 70), torch.rand(3, 80, 61)]
    model.roi_heads.score_thresh, before = 0.0, model.roi_heads.score_thresh  # type: ignore[assignment, union-attr]
    try:
        for image, found in zip(images, model.predict(images), strict=True):
            assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[1:]) and len(found["boxes"])
            assert found["masks"].min() >= 0 and found["masks"].max() <= 1 and found["masks"].max() > 0
    finally:
        model.roi_heads.score_thresh = before  # type: ignore[assignment]


def test_bad_masks_are_named(model: FasterRCNN) -> None:
    images, targets = sized(2)
    model.train()
    with pytest.raises(ValueError, match="target of image 1 has no masks"):
        model(images, [targets[0], {k: v for k, v in targets[1].items() if k != "masks"}])
    with pytest.raises(ValueError, match=r"image 0: masks must be .* \(2, 90, 120\), not \(2, 90, 119\)"):
        model(images, [targets[0] | {"masks": targets[0]["masks"][..., 1:]}, targets[1]])
    with pytest.raises(ValueError, match=r"give targets `masks`, or set data\.masks"):
        model(images, [{k: v for k, v in target.items() if k != "masks"} for target in targets])
