"""Pasted masks and mask targets against their definition, pixel by pixel; and the grid that a file has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from faster_coco_eval import mask as mask_api
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import Namespace
from numpy.typing import NDArray
from torch import Tensor

from detection import MaskGrid, TorchvisionMaskGrid, cascade_rcnn, load_detector, mask_rcnn, recorded, save_detector
from detection.batch import Batch, pad_masks
from detection.cli.configuration import keep_mask_grid
from detection.data import rle
from detection.data.augment import View, crop_masks
from detection.evaluation.results import encode_masks
from detection.inference.tta import TestTimeAugmentation
from detection.interop.builders import aligned_cascade_rcnn, aligned_rcnn
from detection.mask_grid import paste_masks
from detection.models import zoo
from detection.models.backbones import resnet_fpn
from detection.models.masks import MaskHead, MaskPredictor
from detection.models.pooling import RoIPooler
from detection.recipes import rebuild
from detection.training.encoding import encode_detections, grid_of
from detection.trust import EVERYTHING

SIZE = (24, 31)
TORCHVISION = {"class_path": "detection.mask_grid.TorchvisionMaskGrid", "init_args": {}}


def sampled(image: NDArray[np.float64], x: float, y: float, beyond: float | None) -> float:
    """The bilinear value at (x, y), where the centre of the first pixel is (0.5, 0.5); `beyond` the image, or its edge.

    Args:
        image: `(h, w)`.
        x, y: in pixels.
        beyond: of pixels outside; None repeats those of the edge.
    """
    height, width = image.shape

    def pixel(row: int, column: int) -> float:
        if beyond is None:
            return float(image[min(max(row, 0), height - 1), min(max(column, 0), width - 1)])
        return float(image[row, column]) if 0 <= row < height and 0 <= column < width else beyond

    left, top = math.floor(x - 0.5), math.floor(y - 0.5)
    a, b = x - 0.5 - left, y - 0.5 - top
    upper = (1 - a) * pixel(top, left) + a * pixel(top, left + 1)
    return (1 - b) * upper + b * ((1 - a) * pixel(top + 1, left) + a * pixel(top + 1, left + 1))


def pasted(mask: NDArray[np.float64], box: list[float], size: tuple[int, int]) -> NDArray[np.float64]:
    """A mask on an image by the definition: each pixel whose centre lies in the box samples the mask there."""
    (x1, y1, x2, y2), side, laid = box, len(mask), np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = column + 0.5, row + 0.5
            if x1 <= x <= x2 and y1 <= y <= y2:
                laid[row, column] = sampled(mask, (x - x1) / (x2 - x1) * side, (y - y1) / (y2 - y1) * side, 0.0)
    return laid


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 4))
def test_each_pixel_samples_the_mask_at_its_centre(seed: int, count: int) -> None:
    """For boxes that are large, reach over the edge, or have no pixel's centre inside."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-6, 24, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 1, (count, 2)) ** 3 * 40 + 0.01], axis=1).astype(np.float32)
    masks = rng.random((count, 7, 7)).astype(np.float32)
    laid = paste_masks(torch.from_numpy(masks), torch.from_numpy(boxes), SIZE, MaskGrid())
    assert laid.shape == (count, 1, *SIZE) and laid.dtype == torch.float32
    for found, mask, box in zip(laid[:, 0].numpy(), masks, boxes, strict=True):
        np.testing.assert_allclose(found, pasted(mask.astype(np.float64), box.tolist(), SIZE), atol=2e-5)


def test_pixels_on_the_very_edge_have_half_and_half_counts() -> None:
    """The box begins and ends at pixels' centres; one half is inside for Detectron2, and not for torchvision."""
    laid = paste_masks(torch.ones(1, 4, 4), torch.tensor([[2.5, 3.5, 10.5, 11.5]]), SIZE, MaskGrid())[0, 0]
    assert (laid[3:12, 2:11] >= 0.5).nonzero().shape == (81 - 4, 2)  # in the corners it is a quarter
    assert laid[7, 2] == laid[7, 10] == 0.5 and laid[7, 1] == laid[7, 11] == 0
    half = torch.tensor([0.5, math.nextafter(0.5, 1), 0.4999])
    assert MaskGrid().inside(half).tolist() == [True, True, False]
    assert TorchvisionMaskGrid().inside(torch.tensor([0.5, 0.51])).tolist() == [False, True]


def test_the_program_beside_an_onnx_file_lays_masks_alike() -> None:
    """Which has no PyTorch: the same pixels, but where a probability is one half to within rounding."""
    source = (Path(__file__).parents[1] / "examples" / "run_exported.py").read_text().partition("\nparser = ")[0]
    script: dict[str, Any] = {}
    exec(compile(source, "run_exported.py", "exec"), script)
    rng = np.random.default_rng(0)
    for _ in range(20):
        (x, y), (w, h) = rng.uniform(-5, 20, 2), rng.uniform(1, 30, 2)
        box = np.array([x, y, x + w, y + h], np.float32)
        mask = rng.random((28, 28)).astype(np.float32)
        laid = paste_masks(torch.from_numpy(mask[None]), torch.from_numpy(box[None]), SIZE, MaskGrid())[0, 0]
        found = np.asarray(script["lay_mask"](mask, box, SIZE[::-1])) > 0
        sure = ((laid - 0.5).abs() > 1e-4).numpy()
        np.testing.assert_array_equal(found[sure], (laid >= 0.5).numpy()[sure])


def soft_ellipses(side: int, count: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions `(N, 28, 28)` of ellipses whose edges fade, their boxes `side` pixels wide, and their true pixels."""
    rng, centres = np.random.default_rng(side), (np.arange(28) + 0.5) / 14 - 1
    soft = 1 / (1 + np.exp(-50 * (1 - np.hypot(centres, centres[:, None]))))
    ys, xs = np.mgrid[:128, :128] + 0.5
    boxes, shapes = np.zeros((count, 4), np.float32), np.zeros((count, 128, 128), bool)
    for i in range(count):
        x, y, half = *rng.uniform(60, 68, 2), np.array([1, rng.uniform(0.6, 1)]) * side / 2
        boxes[i] = x - half[0], y - half[1], x + half[0], y + half[1]
        shapes[i] = ((xs - x) / half[0]) ** 2 + ((ys - y) / half[1]) ** 2 <= 1
    return (
        torch.tensor(soft, dtype=torch.float32).expand(count, 28, 28),
        torch.from_numpy(boxes),
        torch.from_numpy(shapes),
    )


@pytest.mark.parametrize(("side", "theirs"), [(12, 0.86), (24, 0.93), (48, 0.97), (96, 0.985)])
def test_ellipses_come_out_as_they_are(side: int, theirs: float) -> None:
    """IoU with the true shape and its area, at the sizes at which torchvision's paste is too large by 2 to 19 %."""
    probabilities, boxes, shapes = soft_ellipses(side)

    def overlap(grid: MaskGrid | TorchvisionMaskGrid) -> tuple[float, float]:
        found = grid.inside(paste_masks(probabilities, boxes, (128, 128), grid))[:, 0]
        iou = (found & shapes).sum((1, 2)) / (found | shapes).sum((1, 2))
        return float(iou.mean()), float(found.sum() / shapes.sum())

    iou, area = overlap(MaskGrid())
    assert iou > 0.985 and abs(area - 1) < 0.01
    iou, area = overlap(TorchvisionMaskGrid())
    assert iou < theirs and area > 1 + 1.5 / side


def cell_targets(mask: NDArray[np.float64], box: list[float], side: int) -> NDArray[np.float64]:
    """Targets by the definition, before the threshold: the mean of each cell's samples, one or more a pixel."""
    (x1, y1, x2, y2), means = box, np.zeros((side, side))
    width, height = (x2 - x1) / side, (y2 - y1) / side
    across, down = math.ceil(width), math.ceil(height)
    for row in range(side):
        for column in range(side):
            xs = [x1 + (column + (i + 0.5) / across) * width for i in range(across)]
            ys = [y1 + (row + (i + 0.5) / down) * height for i in range(down)]
            means[row, column] = np.mean([sampled(mask, x, y, None) for y in ys for x in xs])
    return means


def objects(seed: int, count: int = 4, size: tuple[int, int] = (60, 80)) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Masks `(N, H, W)` 0/1 of turned ellipses, and regions `(N, 4)` near them, inside the image."""
    rng, masks = np.random.default_rng(seed), np.zeros((count, *size), np.uint8)
    for mask in masks:
        centre, axes = rng.integers((15, 15), (65, 45)), rng.integers(4, 30, 2)
        cv2.ellipse(mask, centre.tolist(), axes.tolist(), float(rng.uniform(0, 180)), 0, 300, 1, -1)
    rects = np.array([cv2.boundingRect(mask) for mask in masks], np.float32)
    boxes = np.concatenate([rects[:, :2], rects[:, :2] + rects[:, 2:]], axis=1)
    moved = boxes + rng.uniform(-1, 1, boxes.shape) * np.tile(rects[:, 2:], 2) / 6
    return masks, np.stack([boxes, moved.clip(0, [size[1], size[0]] * 2).astype(np.float32)])


@pytest.mark.parametrize("seed", range(3))
def test_targets_are_what_covers_half_of_a_cell(seed: int) -> None:
    masks, (_, regions) = objects(seed)
    whole = torch.tensor([0.0, 0, 80, 60]).expand(len(masks), 4)
    stored = pad_masks([torch.from_numpy(masks) * 255], [whole], len(masks))
    index = torch.tensor([[0, 1, 2, 3, -1]])
    rois = torch.from_numpy(np.concatenate([regions, regions[:1]]))[None]
    found = MaskGrid().targets(*stored, index, rois, 14)
    assert found.dtype == torch.float32 and set(found.unique().tolist()) == {0.0, 1.0}
    assert not found[0, 4].any()  # no object
    for target, mask, box in zip(found[0].numpy(), masks, regions, strict=False):
        means = cell_targets(mask.astype(np.float64), box.tolist(), 14)
        sure = np.abs(means - 0.5) > 1e-5
        assert sure.mean() > 0.95
        np.testing.assert_array_equal(target[sure], (means >= 0.5)[sure])
    soft = TorchvisionMaskGrid().targets(*stored, index, rois, 14)
    assert ((soft > 0) & (soft < 1)).float().mean() > 0.1


def test_targets_of_a_box_with_a_pixel_a_cell_are_these_pixels() -> None:
    """And so a mask that is learned exactly is pasted exactly."""
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, 10:25, 8:30] = (torch.rand((15, 22), generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8)
    box = torch.tensor([[[5.0, 6.0, 33.0, 34.0]]])
    stored = pad_masks([mask * 255], [torch.tensor([[0.0, 0, 40, 40]])], 1)
    target = MaskGrid().targets(*stored, torch.tensor([[0]]), box, 28)
    assert torch.equal(target[0, 0], mask[0, 6:34, 5:33].float())
    laid = paste_masks(target[0], box[0], (40, 40), MaskGrid())[0, 0]
    torch.testing.assert_close(laid, mask[0].float(), atol=1e-5, rtol=0)
    assert not torch.equal(TorchvisionMaskGrid().targets(*stored, torch.tensor([[0]]), box, 28)[0, 0], target[0, 0])


@pytest.mark.parametrize("seed", range(3))
def test_targets_of_stored_squares_are_those_of_whole_masks(seed: int) -> None:
    """The squares that the loader brings have another resolution than the image; only edges can differ."""
    masks, (boxes, regions) = objects(seed)
    whole = torch.tensor([0.0, 0, 80, 60]).expand(len(masks), 4)
    index, rois = torch.arange(len(masks))[None], torch.from_numpy(regions)[None]
    wanted = MaskGrid().targets(*pad_masks([torch.from_numpy(masks) * 255], [whole], 4), index, rois, 28)
    crops, windows = crop_masks(masks, boxes, View((0, 0, 80, 60), (60, 80)))
    stored = pad_masks([torch.from_numpy(crops)], [torch.from_numpy(windows)], 6)
    assert float((MaskGrid().targets(*stored, index, rois, 28) != wanted).float().mean()) < 0.01


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_masks_of_detections_are_packed_as_pasted(seed: int) -> None:
    """Byte by byte as pycocotools would, for masks at all edges and for none at all."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand((5, 2), generator=generator) * 30 - 4
    boxes = torch.cat((corner, corner + torch.rand((5, 2), generator=generator) * 34 + 1), dim=1)
    masks = torch.rand((5, 6, 6), generator=generator) ** 0.2  # mostly inside
    one = torch.ones(1, dtype=torch.int64)
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.tensor([SIZE]), boxes[None], one, one, torch.tensor([SIZE]))
    for grid in (MaskGrid(), TorchvisionMaskGrid()):
        (found,) = encode_detections([{"boxes": boxes, "masks": masks}], batch, grid)
        wanted = encode_masks(grid.inside(paste_masks(masks, boxes, SIZE, grid)))
        assert found["masks"] == wanted
    window = np.ones((SIZE[0], 4), bool)
    full = np.zeros(SIZE, np.uint8, order="F")
    full[:, -4:] = 1
    assert rle.encode_window(window, (SIZE[1] - 4, 0), SIZE) == mask_api.encode(full)
    assert rle.encode_window(window[:0], (3, 3), SIZE) == mask_api.encode(full * 0)


def tiny(build: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_classes": 4, "min_size": 64, "max_size": 96}
    if build is None:
        return zoo.maskrcnn_efficientnet_lite0_fpn(weights_backbone=None, fpn_channels=8, **sizes, **options)
    return build(resnet_fpn("resnet18"), **sizes, **options)


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_twins_of_torchvision_keep_its_masks_by_name(name: str) -> None:
    with torch.device("meta"):
        model = getattr(zoo, name)(num_classes=3)
        assert type(grid_of(model)) is TorchvisionMaskGrid
        assert model.recipe["init_args"]["mask_grid"] == TORCHVISION
        better = getattr(zoo, name)(num_classes=3, mask_grid=MaskGrid())
    assert type(grid_of(better)) is MaskGrid and better.recipe["init_args"]["mask_grid"] != TORCHVISION


BRANCH = {"mask_roi_pool": RoIPooler(14), "mask_head": MaskHead, "mask_predictor": MaskPredictor}
BUILT = {
    "lite0": tiny,
    "mask_rcnn": lambda **options: tiny(mask_rcnn, **options),
    "cascade": lambda **options: tiny(cascade_rcnn, masks=True, **options),
    "aligned": lambda **options: tiny(aligned_rcnn, masks=True, **options),
    "aligned cascade": lambda **options: tiny(aligned_cascade_rcnn, masks=True, **options),
    "cascade by name": lambda **options: zoo.cascadercnn_resnet_fpn(
        backbone_name="resnet18", num_classes=4, masks=True, **options
    ),
}


@pytest.mark.parametrize("name", BUILT)
def test_other_detectors_have_the_better_grid_and_old_files_have_theirs(name: str) -> None:
    with torch.device("meta"):
        model = BUILT[name]()
        assert type(grid_of(model)) is type(grid_of(rebuild(model.recipe))) is MaskGrid
        chosen = rebuild(BUILT[name](mask_grid=TorchvisionMaskGrid()).recipe)
        assert type(chosen.roi_heads.mask_grid) is TorchvisionMaskGrid
        arguments = {key: value for key, value in model.recipe["init_args"].items() if key != "mask_grid"}
        before = {**model.recipe, "init_args": arguments}  # as versions without a choice wrote it
        old = rebuild(before)
        assert type(grid_of(old)) is TorchvisionMaskGrid and old.recipe["init_args"]["mask_grid"] == TORCHVISION
        assert type(grid_of(rebuild(before, trust=(EVERYTHING,)))) is MaskGrid  # which a user wrote


def test_an_old_run_that_goes_on_keeps_its_grid() -> None:
    recipe = tiny().recipe
    before = {**recipe, "init_args": {k: v for k, v in recipe["init_args"].items() if k != "mask_grid"}}
    settings = Namespace(class_path="detection.maskrcnn_efficientnet_lite0_fpn", init_args=Namespace(mask_grid=None))
    keep_mask_grid(settings, {})
    assert settings.init_args.mask_grid is None  # a new run
    keep_mask_grid(settings, recipe)
    assert settings.init_args.mask_grid["class_path"] == "detection.mask_grid.MaskGrid"
    settings.init_args.mask_grid = None
    keep_mask_grid(settings, before)
    assert settings.init_args.mask_grid == TORCHVISION
    boxes_alone = Namespace(class_path="detection.faster_rcnn", init_args=Namespace())
    keep_mask_grid(boxes_alone, before)
    assert vars(boxes_alone.init_args) == {}


@recorded
class Shrunk(MaskGrid):
    """A user's: surer of what it finds."""

    def __init__(self, thresh: float = 0.9) -> None:
        self.thresh = thresh

    def inside(self, probabilities: Tensor) -> Tensor:
        return probabilities > self.thresh


def test_a_grid_is_exchanged_and_kept(tmp_path: Path) -> None:
    """As a setting of a part, whether given to the builder or afterwards; ours sees yours everywhere."""
    model = tiny()
    model.roi_heads.mask_grid = TorchvisionMaskGrid()
    save_detector(tmp_path / "changed.safetensors", model)
    assert type(grid_of(load_detector(tmp_path / "changed.safetensors"))) is TorchvisionMaskGrid
    own = tiny(mask_grid=Shrunk(0.95))
    save_detector(tmp_path / "own.safetensors", own)
    assert grid_of(load_detector(tmp_path / "own.safetensors", trust=["tests"])).thresh == 0.95
    assert grid_of(TestTimeAugmentation(own)) is own.mask_grid
    assert type(grid_of(own.for_inference())) is Shrunk


def test_a_hand_made_branch_keeps_its_grid(tmp_path: Path) -> None:
    """Where a builder hands its parts on, the file says which grid they had."""
    model = zoo.fasterrcnn_resnet_fpn(backbone_name="resnet18", num_classes=3, **BRANCH)
    assert type(grid_of(model)) is MaskGrid and "mask_grid" not in model.recipe["init_args"]
    save_detector(tmp_path / "made.safetensors", model)
    assert type(grid_of(load_detector(tmp_path / "made.safetensors"))) is MaskGrid


def test_a_detector_lays_its_masks_by_its_own_grid() -> None:
    model = tiny(box_score_thresh=0.0).eval()
    image = [torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(1))]
    found = {}
    for grid in (MaskGrid(), TorchvisionMaskGrid()):
        model.roi_heads.mask_grid = grid
        (small,) = model.run(model.transform(image, None, 4), False, True)[1]
        (found[grid],) = model.predict(image)
        assert len(small["boxes"]) and torch.equal(
            found[grid]["masks"], paste_masks(small["masks"], small["boxes"], (50, 70), grid)
        )
    first, second = found.values()
    assert not torch.equal(first["masks"], second["masks"])
