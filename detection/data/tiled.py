"""Large images as tiles to train on, without a file written.

A tile is a record like any other, whose image is a window of a file's: samplers, ranks, augmentation and replays count
tiles. Which objects of a tile are taught follows from what prediction keeps of them (`detection.tiling`):

- An object that no border cuts is an object.
- Of one that a border cuts, while another tile shows it whole, prediction drops what this tile finds. It is neither
  object nor background here: an ignore region.
- Of one that no tile shows whole, prediction unites the parts. They are objects, each with the box of what is seen; but
  a part with less than `min_visibility` of what the best tile shows is an ignore region.

So every object is taught in at least one tile.

Shape shorthand:
    N: objects of an image     W: its tiles
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.data import rle
from detection.data.dataset import to_rle
from detection.data.records import DataError, Index, Record
from detection.tiling import NEAR, Tiling, Window, is_cut


@dataclass(frozen=True)
class TileView(Tiling):
    """Images as the tiles to train on.

    Args:
        size, overlap: see `Tiling`.
        min_visibility: of an object that no tile shows whole, the share of what the best tile shows that another must
            show to teach it; in [0, 1].
    """

    min_visibility: float = 0.3

    def index(self, index: Index) -> Index:
        """The same data with a record a tile, image by image; raises `DataError` for key points."""
        return replace(index, records=[tile for record in index.records for tile in self.record(record)])

    def record(self, record: Record) -> list[Record]:
        """The tiles of an image, row by row; of one that fits a tile the record itself.

        Raises:
            DataError: it has key points, of which no rule says what a border leaves.
        """
        if record.keypoints is not None:
            raise DataError(f"{record.file_name}: key points can't be cut into tiles: leave data.tile out")
        size = (record.height, record.width)
        windows = self.windows(*size)
        if len(windows) == 1:
            return [record]
        seen = np.array(windows, np.float32)
        boxes = clip(record.boxes, seen)
        masks = None if record.segments is None else _cut_masks(record, windows, boxes)
        taught = self.taught(record.boxes, boxes, seen, size)
        pairs = zip(windows, boxes, taught, strict=True)
        return [_tile(record, *pair, None if masks is None else masks[i]) for i, pair in enumerate(pairs)]

    def taught(
        self, boxes: NDArray[np.float32], parts: NDArray[np.float32], seen: NDArray[np.float32], size: tuple[int, int]
    ) -> NDArray[np.bool_]:
        """Whether each tile teaches each object; where it does not, what it shows of it is an ignore region.

        Args:
            boxes: `(N, 4)` of the objects, in pixels of the image.
            parts: `(W, N, 4)`, what each tile shows of them, likewise; of no area where it shows nothing.
            seen: `(W, 4)`, the tiles.
            size: (height, width) of the image.

        Returns:
            `(W, N)`.
        """
        area = areas(parts)
        shown, cut = area > 0, is_cut(parts, seen[:, None], size)
        whole = shown & ~cut & (np.abs(parts - boxes) <= NEAR).all(axis=2)
        enough = area >= self.min_visibility * area.max(axis=0, initial=0)
        return shown & np.where(whole.any(axis=0), whole, enough)


def clip(boxes: NDArray[np.float32], seen: NDArray[np.float32]) -> NDArray[np.float32]:
    """What windows `(W, 4)` show of boxes `(N, 4)`: `(W, N, 4)`, of no area where that is nothing."""
    low, high = np.maximum(boxes[:, :2], seen[:, None, :2]), np.minimum(boxes[:, 2:], seen[:, None, 2:])
    return np.concatenate([low, np.maximum(high, low)], axis=2)


def areas(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """`(...)` of boxes `(..., 4)`."""
    return np.asarray((boxes[..., 2:] - boxes[..., :2]).prod(axis=-1))


def _tile(
    record: Record,
    window: Window,
    boxes: NDArray[np.float32],
    taught: NDArray[np.bool_],
    masks: list[Any] | None,
) -> Record:
    """A tile of a record: what it shows of each object `(N, 4)`, `(N,)`, in pixels of the image, and N masks of it."""
    x, y, *end = window
    kept = np.flatnonzero(areas(boxes) > 0)
    shares = areas(boxes[kept]) / areas(record.boxes[kept])
    return replace(
        record,
        image_id=f"{record.image_id}@{x},{y}",
        width=end[0] - x,
        height=end[1] - y,
        boxes=boxes[kept] - np.array([x, y, x, y], np.float32),
        labels=record.labels[kept],
        areas=(record.areas[kept] * shares).astype(np.float32),
        iscrowd=record.iscrowd[kept] | ~taught[kept],
        difficult=record.difficult[kept],
        annotation_ids=record.annotation_ids[kept],
        segments=None if masks is None else [masks[i] for i in kept],
        written=None,
        window=(x, y, record.height, record.width),
    )


def _cut_masks(record: Record, windows: Sequence[Window], parts: NDArray[np.float32]) -> list[list[Any]]:
    """The masks of each tile, of N objects or None; `parts`, see `taught`, shrink to what is left of a mask.

    They stay as far from it as the object's box was from its mask.
    """
    masks: list[list[Any]] = [[None] * len(record.labels) for _ in windows]
    shown = areas(parts) > 0
    for i, segment in enumerate(record.segments or ()):
        if segment is None:
            continue
        whole = to_rle(segment, record.boxes[i], record.height, record.width)
        around = _box(whole)
        slack = max(0.0, *(around[:2] - record.boxes[i, :2]), *(record.boxes[i, 2:] - around[2:]))
        for tile in np.flatnonzero(shown[:, i]).tolist():
            x1, y1, *_ = windows[tile]
            masks[tile][i] = own = rle.crop(whole, windows[tile])
            if (parts[tile, i] != record.boxes[i]).any() and around.any():
                left = _box(own)
                corner = np.array([x1, y1] * 2, np.float32)
                tight = left + corner + np.array([-slack, -slack, slack, slack], np.float32) if left.any() else 0 * left
                parts[tile, i] = clip(parts[None, tile, i], tight[None])[0, 0]
    return masks


def _box(mask: dict[str, Any]) -> NDArray[np.float32]:
    """`(4,)` xyxy around a mask; zeros where it is empty."""
    size = mask["size"]
    return np.array(rle.box(rle.check(mask, (size[0], size[1])), size[0]), np.float32)


def describe_tiles(view: TileView, whole: Index, tiles: Index, empty: float, min_size: int) -> str:
    """For the log and for `detection check`: how many tiles there are, and what they show of the objects.

    Args:
        view: that made `tiles` of `whole`.
        whole, tiles: the data before and after.
        empty: the share of the tiles without objects that an epoch shows.
        min_size: the largest short side that training resizes to.
    """
    given = sum(int((~record.iscrowd).sum()) for record in whole.records)
    shown = sum(int((~record.iscrowd).sum()) for record in tiles.records)
    ignored = sum(int(record.iscrowd.sum()) for record in tiles.records)
    without = sum(bool(record.iscrowd.all()) for record in tiles.records)  # of no object, too
    text = (
        f"{len(whole.records)} images are {len(tiles.records)} {view}: {len(tiles.records) - without} with objects and "
        f"{without} without, of which an epoch shows {empty:.0%}; {given} objects are seen {shown} times, "
        f"{sum(map(_parts, tiles.records))} of them in part; {ignored} ignore regions"
    )
    if min_size != view.size:
        text += f"; tiles are resized to {min_size} pixels (data.min_size {view.size} keeps the scale)"
    return text


def _parts(tile: Record) -> int:
    """How many objects a tile teaches in part."""
    if tile.window is None:
        return 0
    x, y, height, width = tile.window
    corner = np.array([x, y, x, y], np.float32)
    seen = corner + np.array([0, 0, tile.width, tile.height], np.float32)
    return int(is_cut(tile.boxes[~tile.iscrowd] + corner, seen, (height, width)).sum())
