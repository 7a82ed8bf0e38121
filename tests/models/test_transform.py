"""Images as users have them: resizing as torchvision, normalisation, and errors that name the image and the box."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detection.batch import check_images, check_targets
from detection.models.transform import IMAGENET_MEAN, IMAGENET_STD, ImageTransform

sides = st.integers(20, 700)


@settings(deadline=None, max_examples=40)
@given(sides, sides, st.integers(20, 120), st.integers(60, 200))
def test_sizes_and_boxes_equal_torchvision(height: int, width: int, min_size: int, max_size: int) -> None:
    image = torch.zeros(3, height, width)
    box = torch.tensor([[1.5, 2.5, width - 3.25, height - 1.0]])
    theirs = GeneralizedRCNNTransform(min_size, max_size, IMAGENET_MEAN, IMAGENET_STD).eval()
    images, targets = theirs([image], [{"boxes": box, "labels": torch.tensor([1])}])
    ours = ImageTransform(min_size, max_size).eval()([image], [{"boxes": box, "labels": torch.tensor([1])}], 2)
    assert ours.images.shape == images.tensors.shape
    assert [tuple(size) for size in ours.image_sizes.tolist()] == images.image_sizes
    assert torch.equal(ours.gt_boxes[0], targets[0]["boxes"])
    assert ours.original_sizes.tolist() == [[height, width]]


def test_pixels_equal_torchvision(real_samples: tuple[list[Tensor], list[dict[str, Tensor]]]) -> None:
    images, targets = real_samples
    expected, _ = GeneralizedRCNNTransform(200, 260, IMAGENET_MEAN, IMAGENET_STD).eval()(images)
    transform = ImageTransform(200, 260).eval()
    batch = transform(images, targets, 91)
    normalised = transform.normalise(batch.images, batch.image_sizes)
    torch.testing.assert_close(normalised, expected.tensors, atol=2e-5, rtol=0)


def test_bytes_and_floats_give_the_same() -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = ImageTransform(32, 64).eval()
    a, b = (transform([given], None, 2) for given in (image, image / 255))
    torch.testing.assert_close(a.images, b.images)


def test_padding_is_zero_after_normalisation() -> None:
    transform = ImageTransform(32, 64).eval()
    batch = transform([torch.ones(3, 32, 40), torch.ones(3, 50, 32)], None, 2)
    assert batch.images.shape == (2, 3, 64, 64)
    normalised = transform.normalise(batch.images, batch.image_sizes)
    assert not normalised[0, :, 32:].any() and not normalised[0, :, :, 40:].any()
    expected = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(normalised[0, :, 31, 39], expected)


@pytest.mark.filterwarnings("error")
def test_the_padding_keeps_gradients_apart() -> None:
    images = [torch.rand(3, *size, requires_grad=True) for size in ((32, 40), (50, 32))]
    batch = ImageTransform(32, 64).eval()(images, None, 2)
    batch.images[:, :, :, :32].sum().backward()
    covered = [image.grad.amax(dim=0) > 0 for image in images]  # type: ignore[union-attr]
    assert covered[0][:, :32].all() and not covered[0][:, 32:].any() and covered[1].all()


def test_several_sizes_are_drawn_in_training_only() -> None:
    transform = ImageTransform((32, 48, 64), 1000)
    image = [torch.zeros(3, 100, 100)]
    torch.manual_seed(0)
    drawn = {int(transform.train()(image, None, 2).image_sizes[0, 0]) for _ in range(30)}
    assert drawn == {32, 48, 64}
    assert {int(transform.eval()(image, None, 2).image_sizes[0, 0]) for _ in range(5)} == {64}


def test_images_without_objects() -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    some = {"boxes": torch.tensor([[1.0, 1, 20, 20]]), "labels": torch.tensor([1])}
    batch = ImageTransform(32, 64).eval()([torch.zeros(3, 32, 32)] * 2, [empty, some], 2)
    assert batch.gt_valid.tolist() == [[False], [True]]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "the list of images is empty"),
        (torch.zeros(2, 3, 8, 8), "images must be a list of .* not Tensor"),
        ([torch.zeros(3, 8, 8), torch.zeros(8, 8)], r"image 1 must be a \(3, h, w\) tensor.*\(8, 8\)"),
        ([torch.zeros(1, 8, 8)], r"image 0 must be a \(3, h, w\) tensor.*\(1, 8, 8\)"),
        ([torch.zeros(8, 8, 3)], r"image 0 must be a \(3, h, w\) tensor.*\(8, 8, 3\)"),
        ([torch.zeros(3, 0, 8)], r"image 0 must be a \(3, h, w\) tensor.*\(3, 0, 8\)"),
        (["cat.jpg"], r"image 0 must be a \(3, h, w\) tensor.*str"),
        ([torch.zeros(3, 8, 8, dtype=torch.int64)], r"image 0 is torch\.int64: give uint8"),
        (
            [torch.zeros(3, 8, 8), torch.full((3, 8, 8), 255.0)],
            r"image 1 reaches 255: float images must be in \[0, 1\]",
        ),
        ([torch.full((3, 8, 8), torch.nan)], "image 0 holds NaN or infinity"),
        ([torch.full((3, 8, 8), -torch.inf)], "image 0 holds NaN or infinity"),
    ],
)
def test_wrong_images(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_images(images)


GOOD = [1.0, 2.0, 10.0, 12.0]
INTS = torch.int64


def target(boxes: Any, labels: Any, dtype: torch.dtype = INTS) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels, dtype=dtype)}


WRONG_TARGETS: list[tuple[Any, str]] = [
    (target([GOOD, GOOD], [1, 0]), r"image 1, box 1 has a label outside 1 to 3 \(0 is background\).*label 0"),
    (target([GOOD], [4]), "image 1, box 0 has a label outside 1 to 3.*label 4"),
    (target([GOOD], [-1]), "image 1, box 0 has a label outside 1 to 3"),
    (
        target([GOOD, [5, 5, 5, 9]], [1, 1]),
        r"image 1, box 1 has no positive width and height.*\[5\.0, 5\.0, 5\.0, 9\.0\]",
    ),
    (target([[10, 2, 1, 12]], [1]), "image 1, box 0 has no positive width and height"),
    (target([[1, 2, torch.nan, 12]], [1]), "image 1, box 0 is not finite"),
    (target([[1, 2, torch.inf, 12]], [1]), "image 1, box 0 is not finite"),
    (target([[1, 2, 33, 12]], [1]), "image 1, box 0 lies outside the image of 30 x 20 pixels"),
    (target([[1, 2, 10, 22]], [1]), "image 1, box 0 lies outside the image of 30 x 20 pixels"),
    (target([[-3, 2, 10, 12]], [1]), "image 1, box 0 lies outside"),
    (target([], []), r"image 1: boxes must be \(N, 4\).*\(0,\)"),
    (target([[1, 2, 3]], [1]), r"image 1: boxes must be \(N, 4\).*\(1, 3\)"),
    (target([GOOD], [1, 1]), r"image 1: labels must be \(1,\) integers, not \(2,\)"),
    (target([GOOD], [1.0], torch.float32), r"image 1: labels must be \(1,\) integers.*float32"),
    (target([GOOD], [True], torch.bool), r"image 1: labels must be \(1,\) integers.*bool"),
    (target([GOOD], [[1]]), r"image 1: labels must be \(1,\) integers, not \(1, 1\)"),
    ({"boxes": [GOOD], "labels": torch.ones(1, dtype=INTS)}, "image 1: boxes must be a tensor, not list"),
    ({"boxes": torch.zeros(0, 4)}, "target of image 1 has no labels"),
    ({}, "target of image 1 has no boxes and no labels"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_TARGETS)
def test_wrong_targets(wrong: Any, message: str) -> None:
    images = [torch.zeros(3, 20, 30)] * 2
    with pytest.raises(ValueError, match=message):
        check_targets(images, [target([GOOD], [3]), wrong], 4)


def test_another_number_of_targets() -> None:
    with pytest.raises(ValueError, match="2 images but 1 targets"):
        check_targets([torch.zeros(3, 20, 30)] * 2, [target([GOOD], [1])], 4)


def test_boxes_may_pass_the_edge_by_a_pixel() -> None:
    check_targets([torch.zeros(3, 20, 30)], [target([[-1, -1, 31, 21]], [3])], 4)
