"""Pipelines of albumentations, and every call of that library: whatever moves pixels moves boxes and masks with them.

Albumentations 2.0.8 (the last MIT release) keeps a random generator inside the pipeline, which a fork copies to every
worker and every epoch. Here the pipeline is given a fresh generator for every sample instead. It is *one* generator
for all transforms: `Compose.set_random_seed` would give each transform the same seed, so that images which become
brighter would always become redder too.

It drops what its transforms cut away one transform at a time, and tells boxes but not masks. So each box carries two
numbers here: which object it is, by which masks and labels are picked, and the share of it that is left by now.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple, TypeAlias

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import, which otherwise asks the network for a new version

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.geometric.distortion import BaseDistortion
from numpy.typing import NDArray

from detection.data.point_moves import bent, marked, unmarked
from detection.data.records import DataError
from detection.data.skeletons import inside
from detection.data.spectral import RGB, PixelFormat, Pixels
from detection.recipes import describe

Step: TypeAlias = A.BasicTransform | A.BaseCompose

INDEX, SHARE = 4, 5  # columns of a box behind its corners
ROUNDING = 1e-4  # of shares, whose boxes are float32
HAIR = 1e-8  # of a side, see `_inside`
REFLECTING = (cv2.BORDER_REFLECT, cv2.BORDER_REFLECT_101, cv2.BORDER_WRAP)
NORMALISERS = (A.Normalize, A.ToFloat, A.FromFloat, A.ToTensorV2, A.ToTensor3D)
THRESHOLDS = ("min_visibility", "min_area", "min_width", "min_height", "max_accept_ratio")  # of BboxParams
GIVEN = {"image", "bboxes", "masks"}  # what a transform may ask for


def colour_steps(chance: float, form: PixelFormat = RGB) -> list[Step]:
    """Changes of brightness and contrast, of hue and saturation, and of gamma, each with this probability.

    Hue and saturation are left out where the images aren't 8-bit RGB.
    """
    light = A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.3, p=chance)
    if form != RGB:
        return [light, Gamma(p=chance)]
    return [
        light,
        A.HueSaturationValue(hue_shift_limit=10, sat_shift_limit=40, val_shift_limit=0, p=chance),
        A.RandomGamma(gamma_limit=(70, 140), p=chance),
    ]


class Gamma(A.ImageOnlyTransform):  # type: ignore[misc]
    """As `albumentations.RandomGamma`, which can't do 16 bits: all channels to a power between 0.7 and 1.4."""

    def get_params(self) -> dict[str, Any]:
        """The power."""
        return {"power": self.py_random.uniform(0.7, 1.4)}

    def apply(self, img: Pixels, power: float, **_: Any) -> Pixels:
        """The image with its values in [0, 1] to this power."""
        highest = np.iinfo(img.dtype).max
        table = (np.arange(highest + 1) / highest) ** power * highest
        return table.round().astype(img.dtype)[img]


def moving(steps: Iterable[Step]) -> list[str]:
    """The names of the transforms that move pixels, those inside of compositions included."""
    return [type(leaf).__name__ for leaf in _leaves(steps) if not isinstance(leaf, A.ImageOnlyTransform)]


def _leaves(steps: Iterable[Step]) -> Iterator[A.BasicTransform]:
    """The transforms, those inside of compositions included."""
    for step in steps:
        if isinstance(step, A.BaseCompose):
            yield from _leaves(step.transforms)
        else:
            yield step


def check_steps(steps: Sequence[Step]) -> None:
    """Raise a ValueError that names the first transform under which images, boxes or masks would come out wrong."""
    for leaf in _leaves(steps):
        name = type(leaf).__name__
        if not isinstance(leaf, A.BasicTransform):
            raise ValueError(f"augmentations are transforms of albumentations with all their arguments, not {leaf!r}")
        if isinstance(leaf, NORMALISERS):
            raise ValueError(f"augmentations: leave {name} out, for images are normalised once, on the device")
        if isinstance(leaf, A.RandomGridShuffle | A.Lambda):
            why = "its functions may move boxes or not" if isinstance(leaf, A.Lambda) else "it tears objects apart"
            raise ValueError(f"augmentations: {name} can't be used, as {why}; write a transform of your own")
        if wanted := sorted(set(leaf.targets_as_params) - GIVEN):
            raise ValueError(f"augmentations: {name} asks for {wanted[0]}, which samples do not have; leave it out")
        if moving([leaf]) and (
            GIVEN - leaf.available_keys
            or getattr(type(leaf), "apply_to_bboxes", None) is A.DualTransform.apply_to_bboxes
        ):
            raise ValueError(
                f"augmentations: {name} moves pixels but no boxes or masks: write its apply_to_bboxes, or derive it "
                "from ImageOnlyTransform if it changes colours alone"
            )
    for step in _compositions(steps):
        boxes = getattr(step, "processors", {}).get("bboxes")
        if boxes is not None and (unused := [name for name in THRESHOLDS if getattr(boxes.params, name, None)]):
            raise ValueError(
                f"augmentations: {unused[0]} in the bbox_params of {type(step).__name__} would not be used: leave it "
                "out, and set data.min_visibility or data.min_box_side, for boxes are dropped once, behind all of them"
            )
        if isinstance(step, A.SelectiveChannelTransform) and (names := moving([step])):
            raise ValueError(f"augmentations: {names[0]} would move some channels and not the others; use it directly")


def check_key_points(steps: Iterable[Step]) -> None:
    """Raise a ValueError that names the first transform under which key points would come out wrong."""
    for transform in (leaf for leaf in _leaves(steps) if moving([leaf])):
        name = type(transform).__name__
        if "keypoints" not in transform.available_keys or (
            getattr(type(transform), "apply_to_keypoints", None) is A.DualTransform.apply_to_keypoints
        ):
            raise ValueError(f"augmentations: {name} moves pixels but no key points: write its apply_to_keypoints")
        if getattr(transform, "border_mode", cv2.BORDER_CONSTANT) in REFLECTING:
            raise ValueError(f"augmentations: {name} repeats key points at the border: set its border_mode to 0")


def _compositions(steps: Iterable[Step]) -> Iterator[A.BaseCompose]:
    for step in steps:
        if isinstance(step, A.BaseCompose):
            yield step
            yield from _compositions(step.transforms)


def try_steps(steps: Sequence[Step], form: PixelFormat) -> None:
    """Run each transform once on an image of this format, if it takes one of 8-bit RGB of that size.

    Raises:
        ValueError: it fails, or gives another format; the message names the first such.
    """
    noise = np.random.default_rng(0).integers(0, 256, (256, 320, max(3, form.channels)), np.uint8)
    wanted = (noise[..., : form.channels].astype(np.uint32) * (form.highest // 255)).astype(form.dtype)
    for leaf in _leaves(steps):
        always = copy.deepcopy(leaf)
        always.p = 1.0
        name, pipeline = type(leaf).__name__, Pipeline([always])
        nothing = np.zeros((0, 4), np.float32)
        try:
            pipeline(np.ascontiguousarray(noise[..., :3]), nothing, None, 0, random.Random(0))
        except Exception:  # it wants other sizes, or objects, which training will show
            continue
        try:
            pipeline(np.ascontiguousarray(wanted), nothing, None, 0, random.Random(0))
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"augmentations: {name} can't take images of {form}; leave it out ({said})") from error


def recipe_of(step: Step) -> dict[str, Any]:
    """How a transform was made: what was noted, or else its arguments as its attributes have them.

    Raises:
        ValueError: they are not all kept, so that it could not be made again.
    """
    if recipe := getattr(step, "recipe", None):
        return dict(recipe)
    arguments = _attributes(step)
    maker = type(step)
    plain = {name: describe(value) for name, value in arguments.items() if name != "transforms"}
    if "transforms" in arguments:
        plain["transforms"] = [recipe_of(inner) for inner in step.transforms]
    complete = "transforms" in plain or (len(plain) == len(signature(maker).parameters) and _again(step) == plain)
    if NotImplemented in plain.values() or not complete:
        raise ValueError(
            f"augmentations: {maker.__name__} does not keep all its arguments as attributes of their names, so that a "
            "checkpoint could not: give it as {'class_path': ..., 'init_args': {...}}"
        )
    module = "albumentations" if getattr(A, maker.__name__, None) is maker else maker.__module__
    return {"class_path": f"{module}.{maker.__qualname__}", "init_args": plain}


def _attributes(step: Step) -> dict[str, Any]:
    return {name: getattr(step, name) for name in signature(type(step)).parameters if hasattr(step, name)}


def _again(step: A.BasicTransform) -> dict[str, Any] | None:
    """What one made of this transform's attributes has as attributes, in plain form; None if none can be made."""
    try:
        return {name: describe(value) for name, value in _attributes(type(step)(**_attributes(step))).items()}
    except (TypeError, ValueError):
        return None


class Moved(NamedTuple):
    """What a `Pipeline` gives.

    Attributes:
        image: `(h, w, C)` of the type given.
        boxes: `(M, 4)` float32 xyxy in pixels of the result, inside it.
        masks: `(M, h, w)` uint8 0/1, or None when none were given.
        kept: `(M,)` int64, which of the objects given each of them is, ascending.
        shares: `(M,)` float32, how much of each box the geometry has left, 1 for all.
        keypoints: `(M, k, 3)` float32 in pixels of the result, those outside of it not annotated; None without any.
    """

    image: Pixels
    boxes: NDArray[np.float32]
    masks: NDArray[np.uint8] | None
    kept: NDArray[np.int64]
    shares: NDArray[np.float32]
    keypoints: NDArray[np.float32] | None = None


class Pipeline:
    """Albumentations transforms in order, on an image with its boxes, masks and key points.

    A box that is turned becomes the box around the turned box. An object that has a mask gets the box around what has
    become of its mask instead, as far from it as it was before, where that is smaller.

    Args:
        steps: transforms and compositions of them. They are copied.
        min_visibility: objects of which less than this share of their box is left are dropped.
        swap: `Skeleton.flip` of the key points; None where there are none, or it is not known.
    """

    def __init__(
        self, steps: Sequence[Step], min_visibility: float = 0.0, swap: NDArray[np.int64] | None = None
    ) -> None:
        check_steps(steps)
        self.min_visibility, self.swap = min_visibility, swap
        self.moves = bool(moving(steps))
        # Boxes go in and out in shares of the sides: from pixels albumentations would make float32 of them.
        boxes = {"format": "albumentations", "clip": True, "filter_invalid_bboxes": True}
        params = boxes | {"min_visibility": min_visibility}
        # Interpolated, the 0 and 1 of a mask are rounded: covered is what is covered by half. The nearest pixel, which
        # is the default, is up to two pixels off when masks are enlarged.
        options = {"bbox_params": params, "mask_interpolation": cv2.INTER_LINEAR} if self.moves else {}
        options |= {"keypoint_params": {"format": "xy", "remove_invisible": False}} if self.moves else {}
        own = copy.deepcopy(list(steps))
        _bend_points(_leaves(own))
        self._compose = A.Compose(own, **options)
        if self.moves:
            self._compose.processors["bboxes"].filter = self._cut

    def __call__(
        self,
        image: Pixels,
        boxes: NDArray[np.float32],
        masks: NDArray[np.uint8] | None,
        seed: int,
        rng: random.Random,
        keypoints: NDArray[np.float32] | None = None,
    ) -> Moved:
        """Transform one image; every random choice follows from `seed` and `rng`.

        Raises:
            DataError: a transform does not take this image, or gives one of another type or other channels, or mirrors
                key points of which left and right are not known.
        """
        self._compose.set_random_state(np.random.default_rng(seed), rng)
        count = len(boxes)
        if not self.moves:
            image = self._apply(count, image=image)["image"]
            return Moved(image, boxes, masks, np.arange(count), np.ones(count, np.float32), keypoints)
        sides = np.array(image.shape[1::-1] * 2)
        rows = np.column_stack((_inside(boxes / sides, sides), np.arange(count), np.ones(count)))
        given: dict[str, Any] = {} if masks is None else {"masks": masks}
        if masks is not None and not count:  # most transforms fail on no mask at all
            given = {"masks": np.zeros((1, *image.shape[:2]), np.uint8)}
        if keypoints is not None:
            given["keypoints"] = marked(keypoints, *image.shape[:2])
        out = self._apply(count, image=image, bboxes=rows, **given)
        rows = np.asarray(out["bboxes"], np.float64).reshape(-1, 6)
        kept, sides = rows[:, INDEX].astype(np.int64), np.array(out["image"].shape[1::-1] * 2)
        corners = ((rows[:, :4] - HAIR) * sides).clip(0, sides).astype(np.float32)
        moved = Moved(out["image"], corners, None, kept, rows[:, SHARE].astype(np.float32))
        if masks is not None:
            moved = _fit_to_masks(moved, boxes[kept], masks[kept], np.asarray(out["masks"])[kept])
        if keypoints is None:
            return moved
        places = np.asarray(out["keypoints"], np.float32).reshape(-1, 3)
        points = unmarked(keypoints, image.shape[:2], places, self.swap)
        return moved._replace(keypoints=inside(points[moved.kept], *moved.image.shape[:2]))

    def _apply(self, count: int, **data: Any) -> dict[str, Any]:
        height, width, channels = data["image"].shape
        try:
            out: dict[str, Any] = self._compose(**data)
        except DataError:
            raise
        except Exception as error:
            culprit = _culprit(error)
            if not culprit.__module__.startswith("albumentations."):
                raise  # a transform of the user's own, who wants to see where
            said = " ".join(str(error).split())
            raise DataError(
                f"{culprit.__name__} among the augmentations fails on this image of {width} x {height} pixels with "
                f"{count} objects: {said}"
            ) from error
        image = out["image"]
        dtype = data["image"].dtype
        if not (isinstance(image, np.ndarray) and image.dtype == dtype and image.shape[2:] == (channels,)):
            raise DataError(
                f"the augmentations make an image of {image.dtype} and shape {tuple(image.shape)}, not {dtype} "
                f"(H, W, {channels}); leave out what changes the type or the number of channels"
            )
        return out

    def _cut(self, rows: NDArray[np.float64], shape: Mapping[str, int]) -> NDArray[np.float64]:
        """What albumentations asks after each transform: `(N, 6)` boxes in shares of the sides -> those left, cut."""
        if not len(rows):
            return np.zeros((0, 6))
        if rows.shape[1] != 6:
            own = [name for leaf in _leaves(self._compose.transforms) if (name := _name_of_own(leaf))]
            raise DataError(
                f"apply_to_bboxes of {' or '.join(own)} gives rows {rows.shape}: change the first four columns of the "
                "rows (N, 6) that it is given, and keep the other two"
            )
        cut = rows.astype(np.float64)
        cut[:, :4] = _inside(cut[:, :4], np.array([shape["width"], shape["height"]] * 2))
        whole, left = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (rows, cut))
        cut[:, SHARE] *= left / np.maximum(whole, 1e-12)
        return cut[(left > 0) & (cut[:, SHARE] >= self.min_visibility - ROUNDING)]


def _bend_points(transforms: Iterable[Any]) -> None:
    """Let distortions move key points by their own maps; those of a user's own class that knows better stay."""
    for transform in transforms:
        if getattr(type(transform), "apply_to_keypoints", None) is BaseDistortion.apply_to_keypoints:
            transform.apply_to_keypoints = bent
            transform.add_targets({"keypoints": "keypoints"})  # so that it looks its method up again


def _inside(boxes: NDArray[np.float64], sides: NDArray[np.int64]) -> NDArray[np.float64]:
    """Boxes `(N, 4)` in shares of the sides, cut to the image, those at whole pixels a hair above them.

    Dropouts round boxes down to pixels, and would take a box that lies a hair below one for a pixel smaller.
    """
    pixels = boxes * sides
    whole = pixels.round()
    return np.asarray((np.where(np.abs(pixels - whole) < 1e-6, whole, pixels) / sides + HAIR).clip(0, 1))


def _fit_to_masks(
    moved: Moved, old_boxes: NDArray[np.float32], old_masks: NDArray[np.uint8], masks: NDArray[np.uint8]
) -> Moved:
    """The moved objects with masks; boxes shrunk to their masks, and objects of whose mask nothing is left dropped."""
    before, after = boxes_around(old_masks), boxes_around(masks)
    beyond = np.concatenate([before[:, :2] - old_boxes[:, :2], old_boxes[:, 2:] - before[:, 2:]], axis=1)
    slack = beyond.clip(0).max(axis=1, initial=0)[:, None]
    tight = np.concatenate(
        [
            np.maximum(moved.boxes[:, :2], after[:, :2] - slack),
            np.minimum(moved.boxes[:, 2:], after[:, 2:] + slack),
        ],
        axis=1,
    )
    had, has = before[:, 2] > 0, after[:, 2] > 0
    shrinks = had & has & (tight[:, 2:] > tight[:, :2]).all(axis=1)
    boxes = np.where(shrinks[:, None], tight, moved.boxes)
    left = has | ~had
    covered = (masks[left] > 0).astype(np.uint8)
    return Moved(moved.image, boxes[left], covered, moved.kept[left], moved.shares[left])


def boxes_around(masks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Boxes `(N, 4)` of masks `(N, H, W)`; of an empty mask `(0, 0, 0, 0)`."""
    corners = [(x, y, x + w, y + h) for x, y, w, h in map(cv2.boundingRect, masks)]
    return np.array(corners, np.float32).reshape(-1, 4)


def _name_of_own(leaf: A.BasicTransform) -> str | None:
    """The name of a user's own transform."""
    return None if type(leaf).__module__.startswith("albumentations.") else type(leaf).__name__


def _culprit(error: BaseException) -> type[Step]:
    """The class of the transform in which an error was raised, the innermost."""
    found, trace = A.Compose, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        found = type(owner) if isinstance(owner, A.BasicTransform) else found
        trace = trace.tb_next
    return found
