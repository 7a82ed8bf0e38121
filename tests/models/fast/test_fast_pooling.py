"""Quicker pooling is the plain pooling: values and gradients, wherever boxes lie and whatever size they have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from detection.models.fast.fast_pooling import CanvasPooler, GatherPool, GatherPooler, build_canvas
from detection.models.pooling import RoIPool, RoIPooler
from tests.models.test_pooling import HEIGHT, STRIDES, WIDTH, make_features, pool, random_boxes, special_boxes

KINDS = [CanvasPooler, GatherPooler]


def boxes_beyond() -> Tensor:
    """Boxes that reach over each edge, lie wholly outside, or are far too large; `(2, P, 4)`."""
    w, h = float(WIDTH), float(HEIGHT)
    boxes = [
        [-20, -20, 30, 30],
        [w - 30, h - 30, w + 20, h + 20],
        [-3, 40, 2, 200],
        [w - 2, 40, w + 60, 90],
        [40, h - 1, 200, h + 1],
        [-50, -50, -10, -10],
        [w + 5, h + 5, w + 90, h + 90],
        [-100, -100, w + 100, h + 100],
        [-2000, -2000, 2000, 2000],
        [-0.3, -0.3, 0.3, 0.3],
    ]
    return torch.stack((torch.tensor(boxes), torch.tensor(boxes) + 1.7))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "boxes"),
    [
        *((kind, boxes) for kind in KINDS for boxes in (special_boxes(), random_boxes(11, 40))),
        (GatherPooler, boxes_beyond()),  # on the canvas lies another level there
    ],
)
def test_values_and_gradients_are_the_plain_ones(
    kind: type[RoIPooler], boxes: Tensor, sampling: int, aligned: bool
) -> None:
    found: list[list[Tensor]] = []
    for each in (RoIPooler, kind):
        features = [f.requires_grad_() for f in make_features(channels=4, seed=3)]
        pooled = pool(each(7, sampling, aligned, 4), features, boxes, STRIDES)
        share = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))
        found.append([pooled, *torch.autograd.grad(pooled, features, share)])
    assert found[0][0].abs().max() > 1
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-4, rtol=1e-4)
    for given, wanted in zip(found[1][1:], found[0][1:], strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-3, rtol=1e-4)


def test_the_canvas_holds_every_level_with_its_edges_repeated() -> None:
    features = make_features()
    canvas, origins = build_canvas(features)
    for feature, (x, y) in zip(features, origins, strict=True):
        h, w = feature.shape[-2:]
        y, x = int(y), int(x)
        padded = F.pad(feature, (1, 1, 1, 1), mode="replicate")
        assert torch.equal(canvas[:, :, y - 1 : y + h + 1, x - 1 : x + w + 1], padded)


@pytest.mark.parametrize("boxes", [special_boxes(), random_boxes(11, 40), boxes_beyond()])
def test_max_pooling_by_an_index_gives_the_bits_of_the_kernel(boxes: Tensor) -> None:
    found: list[list[Tensor]] = []
    for each in (RoIPool, GatherPool):
        features = [f.requires_grad_() for f in make_features(channels=4, seed=3)]
        pooled = pool(each(7, 4), features, boxes, STRIDES)
        share = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))
        found.append([pooled, *torch.autograd.grad(pooled, features, share)])
    assert found[0][0].abs().max() > 1 and torch.equal(found[0][0], found[1][0])
    for given, wanted in zip(found[1][1:], found[0][1:], strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", [GatherPooler, GatherPool])
def test_gradients_in_a_fixed_order_are_sums_of_float64(
    kind: type[GatherPooler] | type[GatherPool], request: pytest.FixtureRequest
) -> None:
    """Of torchvision's kernel, or of its choice. 3000 regions that overlap: a cell adds up some hundred numbers."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn((1, 4, 24, 32), generator=generator)
    boxes = torch.rand((1, 3000, 2, 2), generator=generator).sort(dim=2).values.flatten(2) * torch.tensor([128, 96] * 2)
    share = torch.randn((3000, 4, 7, 7), generator=generator)
    rois = F.pad(boxes[0], (1, 0))
    if kind is GatherPooler:
        exact = feature.double().requires_grad_()
        pooled = roi_align(exact, rois.double(), 7, 0.25, 2)
        wanted = torch.autograd.grad(pooled, exact, share.double())[0].numpy()
    else:  # in float64 the kernel would round some bins to other cells, so its choice of the largest is taken
        cell = torch.ops.torchvision.roi_pool(feature, rois, 0.25, 7, 7)[1]
        channel = torch.arange(4)[:, None, None].expand_as(cell)
        wanted = np.zeros((4, 24 * 32))
        np.add.at(wanted, (channel[cell >= 0].numpy(), cell[cell >= 0].numpy()), share[cell >= 0].double().numpy())
    given = []
    torch.use_deterministic_algorithms(True)  # where these forms are chosen: by themselves threads add as they come
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    for _ in range(2):
        single = feature.clone().requires_grad_()
        given.append(torch.autograd.grad(pool(kind(7), [single], boxes, [4]), single, share)[0])
    assert torch.equal(*given) and abs(wanted).max() > 20
    np.testing.assert_allclose(given[0].numpy(), wanted.reshape(feature.shape), atol=2e-4, rtol=1e-5)
