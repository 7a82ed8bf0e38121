"""The augmentations that a user lists, own ones among them: refused or read back whole, the same in every worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from detection.data.augment import train_transform
from detection.data.datamodule import DetectionDataModule
from detection.data.dataset import DetectionDataset, collate
from detection.data.pipeline import Step, recipe_of
from detection.data.records import DataError, Index, Record
from detection.recipes import rebuild
from detection.trust import RecipeError, trusting
from tests.data.test_pipeline import EVERY, HEIGHT, SHAPES, WIDTH, assert_where_the_pixels_are, run, scene


class Shifted(A.DualTransform):
    """A user's own: everything some pixels to the right."""

    def __init__(self, step: int = 10, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.step = step

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        out = np.zeros_like(img)
        out[:, self.step :] = img[:, : -self.step]
        return out

    def apply_to_bboxes(self, bboxes: np.ndarray, **params: Any) -> np.ndarray:
        return bboxes + np.array([self.step / params["shape"][1], 0] * 2 + [0] * (bboxes.shape[1] - 4))


class Bare(A.DualTransform):
    """Moves pixels and says nothing of boxes."""


class Forgetful(Shifted):
    """Does not keep its argument."""

    def __init__(self, width: int = 3, p: float = 1.0) -> None:
        super().__init__(step=width, p=p)


class Cornered(A.DualTransform):
    """Gives corners alone."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return img

    def apply_to_bboxes(self, bboxes: np.ndarray, **params: Any) -> np.ndarray:
        return bboxes[:, :4]


class Floats(A.ImageOnlyTransform):
    """Gives another type."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return img.astype(np.float32)


def same(image: np.ndarray, **_: Any) -> np.ndarray:
    return image


def test_own_transforms_move_objects() -> None:
    image, boxes, masks = scene(2)
    assert assert_where_the_pixels_are(run([Shifted(30)], 0, image, boxes, masks), 0) >= 2


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (A.Normalize(), "leave Normalize out"),
        (A.ToTensorV2(), "leave ToTensorV2 out"),
        (A.OneOf([A.Blur(), A.ToFloat()]), "leave ToFloat out"),
        (A.RandomGridShuffle(), "RandomGridShuffle .* tears objects apart"),
        (A.Lambda(image=same), "Lambda"),
        (A.Mosaic(), "Mosaic asks for mosaic_metadata"),
        (A.SelectiveChannelTransform([A.Rotate()]), "Rotate would move some channels"),
        (Bare(), "Bare moves pixels but no boxes or masks: write its apply_to_bboxes"),
        (A.RandomCrop, "with all their arguments"),
        (
            A.Compose([A.Blur()], bbox_params=A.BboxParams("pascal_voc", min_visibility=0.9)),
            "min_visibility in the bbox_params of Compose would not be used.* and set data.min_visibility",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_would_come_out_wrong_is_refused(step: Any, message: str) -> None:
    for make in (lambda: train_transform(augmentations=[step]), lambda: DetectionDataModule(augmentations=[step])):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (A.RandomCrop(500, 500), "RandomCrop among the augmentations fails on this image of 160 x 120 .* 3 objects"),
        (A.ToGray(num_output_channels=1, p=1), "uint8 and shape .120, 160.*, not uint8"),
        (Floats(p=1), "float32"),
        (Cornered(p=1), "apply_to_bboxes of Cornered gives rows .3, 4.: change the first four columns"),
    ],
)
def test_what_an_image_can_not_take_names_the_image(step: Step, message: str, tmp_path: Path) -> None:
    image, boxes, _ = scene(0)
    with pytest.raises(DataError, match=message):
        run([step], 0, image, boxes)
    data = DetectionDataset(drawn(tmp_path, 1), train_transform(60, 90, augmentations=[step]))
    with pytest.raises(DataError, match=f"{tmp_path}/0.png: .*{message}") as error:
        data[0, 1]
    assert "\n" not in str(error.value)


def drawn(folder: Path, count: int) -> Index:
    """Scenes on disk, with masks."""
    records = []
    for i in range(count):
        image, boxes, masks = scene(i)
        cv2.imwrite(str(folder / f"{i}.png"), image[..., ::-1])
        record = Record.of(i, f"{i}.png", (HEIGHT, WIDTH), boxes, [1, 2, 3])
        contours = [cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0] for mask in masks]
        record.segments = [[c.reshape(-1).astype(float).tolist() for c in found] for found in contours]
        records.append(record)
    return Index(folder, SHAPES, (1, 2, 3), records)


STEPS: list[Step] = [
    A.Rotate(limit=40, p=0.7),
    A.OneOf([A.RandomCrop(70, 70), A.RandomSizedBBoxSafeCrop(90, 90)], p=0.8),
]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.rehearsal)])
def test_workers_and_main_process_agree(method: str, tmp_path: Path) -> None:
    data = DetectionDataset(drawn(tmp_path, 4), train_transform(60, 90, augmentations=STEPS, min_visibility=0.3))
    keys = [[(i, 100 * epoch + i) for i in range(4)] for epoch in range(3)]
    loader: Any = DataLoader(
        data, batch_sampler=keys, num_workers=2, collate_fn=collate, multiprocessing_context=method
    )
    for batch, own in zip(loader, keys, strict=True):
        here = collate([data[key] for key in own])
        for name in ("images", "gt_boxes", "gt_labels", "gt_valid", "gt_masks", "gt_mask_windows", "image_sizes"):
            assert torch.equal(getattr(batch, name), getattr(here, name)), name
        assert batch.objects_dropped == here.objects_dropped


def test_dropped_objects_are_counted(tmp_path: Path) -> None:
    index = drawn(tmp_path, 12)
    counts = {}
    for share in (0.0, 0.8):
        data = DetectionDataset(index, train_transform(60, 90, augmentations=STEPS, min_visibility=share))
        samples = [data[i, 7 * i + n] for i in range(12) for n in range(5)]
        assert all(len(sample.boxes) + sample.dropped == 3 for sample in samples)
        assert all(set(sample.labels.tolist()) <= {1, 2, 3} for sample in samples)
        batch = collate(samples)
        assert batch.objects_given == 180
        counts[share] = batch.objects_dropped
    assert 0 < counts[0.0] < counts[0.8] < 180


def test_mosaic_and_copy_paste_go_with_augmentations(tmp_path: Path) -> None:
    index = drawn(tmp_path, 6)
    data = DetectionDataset(index, train_transform(60, 90, augmentations=STEPS), mosaic=0.5, copy_paste=0.5)
    for i in range(6):
        sample = data[i, i]
        assert sample.masks is not None and len(sample.boxes) == len(sample.labels) == len(sample.masks)
        assert (sample.boxes >= 0).all() and (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()


@pytest.mark.parametrize(
    "step",
    [
        *EVERY.values(),
        A.OneOf([A.Rotate(), A.Sequential([A.RandomCrop(30, 40), A.HueSaturationValue()])], p=0.7),
        A.SomeOf([A.Blur(), A.Transpose(), A.CoarseDropout()], n=2),
        A.Compose([A.Transpose(), A.CLAHE()], p=0.9),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_rebuilt_pipeline_is_the_same(step: Step) -> None:
    recipe = json.loads(json.dumps(recipe_of(step)))
    again = rebuild(recipe)  # which needs no trust
    assert recipe_of(again) == recipe
    for seed in range(5):
        a, b = (run([s], seed, *scene(seed)) for s in (step, again))
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.boxes, b.boxes)


def test_own_transforms_are_rebuilt_with_trust_and_kept_whole() -> None:
    recipe = recipe_of(A.OneOf([Shifted(7, p=0.5)]))
    assert recipe["init_args"]["transforms"][0]["init_args"] == {"step": 7, "p": 0.5}
    with pytest.raises(RecipeError, match="--trust"):
        rebuild(recipe)
    with trusting((__name__.partition(".")[0],)):
        assert repr(rebuild(recipe)) == repr(A.OneOf([Shifted(7, p=0.5)]))
    for step in (Forgetful(3), A.ShiftScaleRotate()):
        with pytest.raises(ValueError, match=f"{type(step).__name__} does not keep all its arguments"):
            DetectionDataModule(augmentations=[step])


def test_the_data_module_keeps_plain_values() -> None:
    data = DetectionDataModule(augmentations=STEPS, min_visibility=0.2)
    kept = json.loads(json.dumps(dict(data.hparams)))
    again = DetectionDataModule(**kept)
    assert repr(again.augmentations) == repr(STEPS) and again.hparams["min_visibility"] == 0.2
    assert again.hparams == data.hparams
    with pytest.raises(ValueError, match="from 0 to 1"):
        DetectionDataModule(min_visibility=30)
    source = {"class_path": "detection.data.proposals.ProposalFiles", "init_args": {"train": "a", "val": "b"}}
    with pytest.raises(ValueError, match="proposals would no longer fit after Rotate"):
        DetectionDataModule(augmentations=STEPS, proposals=source)  # type: ignore[arg-type]
    assert DetectionDataModule(augmentations=[A.Blur()], proposals=source).augmentations  # type: ignore[arg-type]
