"""Key points through albumentations: how they go in and out, and whether they came out mirrored.

Key points are pixel numbers to albumentations, and not places between pixels: they go in half a pixel less, and come
out so. Its flips do not know left from right. So marks, points whose places are known, go through with them, and tell
a mirror from a turn. Its distortions lose points that lie close together, and are off by a pixel: here a point goes
where the pixels went.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from detection.data.records import DataError

Floats: TypeAlias = NDArray[np.float32]
MARKS = np.stack(np.meshgrid(*[np.linspace(0.2, 0.8, 4)] * 2), axis=-1).reshape(-1, 2)  # in shares of the sides
COARSE = 8  # pixels between the places where the search for a point begins
STEPS = 12  # of Newton's method, which needs two or three where the picture bends gently
FOUND = 0.5  # pixels from a point, within which it was found


def marked(keypoints: Floats, height: int, width: int) -> Floats:
    """Rows x, y, number of the points `(N, k, 3)` as albumentations counts pixels, and of the marks behind them."""
    places = np.concatenate([keypoints[..., :2].reshape(-1, 2), MARKS * (width, height)]) - 0.5
    return np.column_stack((places, np.arange(len(places)))).astype(np.float32)


def unmarked(before: Floats, size: Sequence[int], rows: Floats, swap: NDArray[np.int64] | None) -> Floats:
    """Key points `(N, k, 3)` in their new places, left and right as they are seen there.

    Args:
        before: as they were.
        size: (height, width) of the picture then.
        rows: what `marked` gave, moved, in any order; those that are missing are not annotated any more.
        swap: `Skeleton.flip`.

    Raises:
        DataError: the picture was mirrored, and `swap` is None.
    """
    places = np.full((before.shape[0] * before.shape[1] + len(MARKS), 2), np.nan, np.float32)
    places[rows[:, 2].round().astype(np.int64)] = rows[:, :2] + 0.5
    points, marks = places[: -len(MARKS)].reshape(*before.shape[:2], 2), places[-len(MARKS) :]
    moved = np.concatenate([points, before[..., 2:]], axis=2)
    moved[np.isnan(points).any(axis=2)] = 0
    left = ~np.isnan(marks).any(axis=1)
    old = np.column_stack((MARKS * (size[1], size[0]), np.ones(len(MARKS))))[left]
    matrix, _, rank, _ = np.linalg.lstsq(old, marks[left].astype(np.float64), rcond=None)
    if rank < 3 or np.linalg.det(matrix[:2]) > 0:
        return moved
    if swap is None:
        raise DataError(
            "the augmentations mirror the picture, but which key points are left and right partners is not known: "
            "name them with data.keypoint_pairs ([] where there are none)"
        )
    return np.asarray(moved[:, swap])


def bent(keypoints: NDArray[Any], map_x: NDArray[Any], map_y: NDArray[Any], **_: Any) -> NDArray[Any]:
    """Rows of points `(P, ...)`, x and y first, where the pixels go; those that go nowhere in the picture are left out.

    Args:
        keypoints: in pixel numbers of the picture given.
        map_x, map_y: `(H, W)` the place in it of each pixel of the result.
    """
    maps = np.stack((map_x, map_y), axis=-1).astype(np.float32)
    wanted = keypoints[:, :2].astype(np.float32)
    rough = maps[::COARSE, ::COARSE]
    nearest = np.square(rough[None] - wanted[:, None, None]).sum(axis=-1).reshape(len(wanted), -1).argmin(axis=1)
    places = np.stack(np.unravel_index(nearest, rough.shape[:2])[::-1], axis=-1).astype(np.float32) * COARSE
    for _step in range(STEPS):
        over, down = (_at(maps, places + step) - _at(maps, places - step) for step in ((0.5, 0), (0, 0.5)))
        missing = wanted - _at(maps, places)
        determinant = over[:, 0] * down[:, 1] - over[:, 1] * down[:, 0]
        determinant = np.where(np.abs(determinant) < 1e-3, 1.0, determinant)
        step_x = (missing[:, 0] * down[:, 1] - missing[:, 1] * down[:, 0]) / determinant
        step_y = (missing[:, 1] * over[:, 0] - missing[:, 0] * over[:, 1]) / determinant
        places = (places + np.stack((step_x, step_y), axis=-1).clip(-COARSE, COARSE)).astype(np.float32)
        places = places.clip(-1, np.array(map_x.shape[::-1], np.float32))
    found = np.abs(_at(maps, places) - wanted).max(axis=1) < FOUND
    return np.column_stack((places, keypoints[:, 2:]))[found]


def _at(maps: Floats, places: Floats) -> Floats:
    """The maps `(H, W, 2)` between pixels, and in the same slope a pixel beyond the edge: `(P, 2)`."""
    height, width = maps.shape[:2]
    corner = np.floor(places).clip(0, (width - 2, height - 2)).astype(np.int64)
    x, y = corner.T
    right, below = (places - corner).T[..., None]
    top = maps[y, x] * (1 - right) + maps[y, x + 1] * right
    bottom = maps[y + 1, x] * (1 - right) + maps[y + 1, x + 1] * right
    return np.asarray(top * (1 - below) + bottom * below, np.float32)
