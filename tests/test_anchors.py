"""Anchors against values published with three other implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator as ReferenceGenerator
from torchvision.models.detection.image_list import ImageList

from detection.anchors import AnchorGenerator, cell_anchors, default_anchors

FPN_STRIDES = (4, 8, 16, 32, 64)


def lay(generator: AnchorGenerator, shape: tuple[int, int], stride: int) -> Tensor:
    return generator([shape], [stride], (shape[0] * stride, shape[1] * stride))[0]


def fpn_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Cells of the levels as convolutions with padding give them: halves rounded up."""
    shapes = [(-(-height // 4), -(-width // 4))]
    while len(shapes) < 5:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    return shapes


def as_set(boxes: list[list[float]]) -> set[tuple[float, ...]]:
    return {tuple(box) for box in boxes}


WIDE_AND_TALL = [
    [[-32, -8, 32, 8], [-16, -16, 16, 16], [-8, -32, 8, 32]],
    [[-64, -16, 64, 16], [-32, -32, 32, 32], [-16, -64, 16, 64]],
]
MOVED = [
    [[-30, -6, 34, 10], [-14, -14, 18, 18], [-6, -30, 10, 34]],
    [[-62, -14, 66, 18], [-30, -30, 34, 34], [-14, -62, 18, 66]],
]


@pytest.mark.parametrize(("offset", "sizes"), [(0.0, WIDE_AND_TALL), (0.5, MOVED)])
def test_cells_hold_the_published_anchors(offset: float, sizes: list[list[list[float]]]) -> None:
    """Detectron2's lists go size by size, ours (as torchvision's) ratio by ratio: the same anchors in each cell."""
    generator = AnchorGenerator([(32, 64)], (0.25, 1, 4), offset=offset)
    ours = lay(generator, (1, 2), 4).tolist()
    cell = [box for size in sizes for box in size]
    assert as_set(ours[:6]) == as_set(cell)
    assert as_set(ours[6:]) == as_set([[x1 + 4, y1, x2 + 4, y2] for x1, y1, x2, y2 in cell])
    by_ratio = [size[i] for i in range(3) for size in sizes]
    assert ours[:6] == by_ratio


def test_anchors_go_row_by_row() -> None:
    anchors = lay(AnchorGenerator([(10,)], (1.0,)), (3, 3), 5).tolist()
    assert anchors == [[x - 5, y - 5, x + 5, y + 5] for y in (0, 5, 10) for x in (0, 5, 10)]
    assert lay(AnchorGenerator([(10,)], (1.0,)), (2, 2), 10).tolist() == [
        [-5, -5, 5, 5],
        [5, -5, 15, 5],
        [-5, 5, 5, 15],
        [5, 5, 15, 15],
    ]


def test_exact_cell_anchors() -> None:
    exact = cell_anchors((32,), (0.5, 1, 2), round_anchors=False)
    expected = [[-22.6274, -11.3137, 22.6274, 11.3137], [-16, -16, 16, 16], [-11.3137, -22.6274, 11.3137, 22.6274]]
    torch.testing.assert_close(exact, torch.tensor(expected), atol=5e-5, rtol=0)
    largest = cell_anchors((512,), (0.5,), round_anchors=False)
    torch.testing.assert_close(largest[0, :2], torch.tensor([-362.0387, -181.0193]), atol=5e-5, rtol=0)


def test_rounded_cell_anchors() -> None:
    assert cell_anchors((32,), (0.5,)).tolist() == [[-23, -11, 23, 11]]


def test_ratio_read_as_width_over_height_swaps_the_sides() -> None:
    tall = AnchorGenerator([(32,)], (0.25,), ratio_is_width_over_height=True)
    assert lay(tall, (1, 1), 4).tolist() == [[-8, -32, 8, 32]]
    assert lay(AnchorGenerator([(32,)], (0.25,)), (1, 1), 4).tolist() == [[-32, -8, 32, 8]]


@pytest.mark.parametrize(("height", "width", "count"), [(800, 1344, 268569), (1024, 1024, 261888), (800, 1088, 217413)])
def test_number_of_anchors(height: int, width: int, count: int) -> None:
    levels = default_anchors(5)(fpn_shapes(height, width), FPN_STRIDES, (height, width))
    assert sum(map(len, levels)) == count


def test_number_of_anchors_with_nine_a_cell() -> None:
    generator = AnchorGenerator([(32, 40, 50)] * 5)
    levels = generator(fpn_shapes(320, 320), FPN_STRIDES, (320, 320))
    assert [len(level) for level in levels] == [57600, 14400, 3600, 900, 225]
    assert generator.num_anchors_per_location() == [9] * 5


def centres(level: Tensor) -> Tensor:
    return (level[::3, :2] + level[::3, 2:]) / 2


def test_the_last_level_keeps_its_declared_stride() -> None:
    """800 pixels are 13 cells of 64, and 800 // 13 = 61: the strides that torchvision infers are off by 36 pixels."""
    shapes = fpn_shapes(800, 1344)
    assert shapes[-1] == (13, 21)
    level = centres(default_anchors(5)(shapes, FPN_STRIDES, (800, 1344))[-1])
    assert level[-1].tolist() == [20 * 64, 768]
    assert level[21, 1] - level[0, 1] == 64
    inferred = centres(default_anchors(5, infer_strides=True)(shapes, FPN_STRIDES, (800, 1344))[-1])
    assert inferred[-1].tolist() == [20 * 64, 732]


@pytest.mark.parametrize("size", [(800, 1344), (320, 416), (224, 352)])
@pytest.mark.parametrize("levels", [5, 3])
def test_inferred_strides_equal_torchvision(size: tuple[int, int], levels: int) -> None:
    sizes = (32, 64, 128, 256, 512)
    reference = ReferenceGenerator(
        tuple((s,) for s in sizes) if levels == 5 else (sizes,) * 3, ((0.5, 1.0, 2.0),) * levels
    )
    shapes = fpn_shapes(*size)[-levels:]
    features = [torch.zeros(1, 1, *shape) for shape in shapes]
    expected = reference(ImageList(torch.zeros(1, 3, *size), [size]), features)[0]
    ours = default_anchors(levels, infer_strides=True)(shapes, FPN_STRIDES[-levels:], size)
    assert torch.equal(torch.cat(ours), expected)


def test_wrong_number_of_levels_raises() -> None:
    with pytest.raises(ValueError, match="5 levels, but the backbone gives 1 feature maps"):
        AnchorGenerator()([(3, 3)], [4], (12, 12))
    with pytest.raises(ValueError, match="sizes are given for 2 levels, aspect ratios for 3"):
        AnchorGenerator([(32,), (64,)], [(1.0,)] * 3)


def test_anchors_made_in_inference_mode_can_train_afterwards() -> None:
    generator = AnchorGenerator([(10,)], (1.0,))
    with torch.inference_mode():
        first = generator([(2, 2)], [5], (10, 10))[0]
    again = generator([(2, 2)], [5], (10, 10))[0]
    (again * torch.ones(1, requires_grad=True)).sum().backward()
    assert torch.equal(first, again) and not first.is_inference()


def test_cache_stays_small_and_right() -> None:
    generator = AnchorGenerator([(10,)], (1.0,))
    for side in range(1, 40):
        assert len(generator([(side, 2)], [5], (side * 5, 10))[0]) == 2 * side
    assert len(generator._laid.made) == 16
    assert len(generator([(1, 2)], [5], (5, 10))[0]) == 2
    assert generator([(1, 2)], [7], (7, 14))[0][1, 0] == 2  # another stride is another entry
