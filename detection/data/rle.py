"""COCO run-length masks: the counts, their compressed string, and bitmaps.

A mask of H rows and W columns is read column by column; `counts` are the lengths of its alternating runs, starting with
background. The compressed string writes each count (from the third on as the difference to the last but one) in groups
of 5 bits, low group first, bit 6 set while more follow, plus 48 to be printable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


class Packed(Sequence[dict[str, Any]]):
    """The masks of one image, with their compressed strings in one: apart, they take three times the memory.

    Args:
        masks: RLEs in any form.
        size: `(H, W)` of the image, and of each.

    Raises:
        ValueError: a clause that says which mask has another size.
    """

    __slots__ = ("_counts", "_ends", "size")

    def __init__(self, masks: Iterable[dict[str, Any]], size: tuple[int, int]) -> None:
        strings = list[bytes]()
        for i, mask in enumerate(masks):
            if tuple(mask["size"]) != size:
                height, width = mask["size"]
                raise ValueError(f"mask {i} has {height} rows of {width} pixels, but its image {size[0]} of {size[1]}")
            strings.append(_string(mask["counts"]))
        self.size = size
        self._counts = b"".join(strings)
        self._ends = np.fromiter(accumulate(map(len, strings), initial=0), np.int64, len(strings) + 1)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self._ends[:-1][index], self._ends[1:][index]
        return {"size": list(self.size), "counts": self._counts[start:end]}


def _string(counts: str | bytes | Sequence[int]) -> bytes:
    if isinstance(counts, str | bytes):
        return counts if isinstance(counts, bytes) else counts.encode("ascii")
    return compress(counts)


def encode(mask: NDArray[Any]) -> dict[str, Any]:
    """The RLE `{"size": [H, W], "counts": bytes}` of an `(H, W)` mask, true where not zero."""
    height, width = mask.shape
    flat = np.concatenate([[0], (mask != 0).ravel(order="F").astype(np.int8), [-1]])
    edges = np.flatnonzero(np.diff(flat))
    return {"size": [height, width], "counts": compress(np.diff(edges, prepend=0).tolist())}


def encode_window(window: NDArray[Any], corner: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """The RLE of an image's mask that is all in one window, without laying it out.

    Args:
        window: `(h, w)`, true where not zero; it may be empty.
        corner: (x, y) of its first pixel in the image.
        size: (height, width) of the image.
    """
    columns = np.pad((window != 0).T.astype(np.int8), ((0, 0), (1, 1)))  # (w, h + 2): a run is in one column
    x, y = np.nonzero(np.diff(columns, axis=1))  # starts and ends of runs in turn, down each column
    return _of_edges((x + corner[0]) * size[0] + y + corner[1], size)


def crop(rle: dict[str, Any], window: tuple[int, int, int, int]) -> dict[str, Any]:
    """What a window `(x1, y1, x2, y2)` in whole pixels shows of a mask, without laying it out; errors as `check`."""
    rows = int(rle["size"][0])
    x1, y1, x2, y2 = window
    ends = np.cumsum(check(rle, tuple(rle["size"])), dtype=np.int64)
    count = len(ends) // 2
    first, last = ends[0::2][:count].clip(x1 * rows, x2 * rows), ends[1::2].clip(x1 * rows, x2 * rows) - 1
    first, last = first[first <= last], last[first <= last]  # pixels of each run in the window's columns
    spans = last // rows - first // rows + 1
    run = np.repeat(np.arange(len(first)), spans)
    column = first[run] // rows + np.arange(len(run)) - np.repeat(np.cumsum(spans) - spans, spans)
    top = np.maximum(first[run] - column * rows, y1)  # of the run in this column
    bottom = np.minimum(last[run] - column * rows + 1, y2)
    shown = top < bottom
    edges = (np.stack([top, bottom]) - y1 + (column - x1) * (y2 - y1))[:, shown]
    return _of_edges(edges.ravel(order="F"), (y2 - y1, x2 - x1))


def _of_edges(edges: NDArray[np.int64], size: tuple[int, int]) -> dict[str, Any]:
    """The RLE of runs that start and end at these pixels in turn; one may begin where the one before it ends."""
    joint = np.flatnonzero(np.diff(edges) == 0)
    edges = np.delete(edges, np.concatenate([joint, joint + 1]))
    counts = np.diff(edges, prepend=0, append=size[0] * size[1]).tolist()
    return {"size": list(size), "counts": compress(counts if counts[-1] else counts[:-1])}


def decode(rle: dict[str, Any]) -> NDArray[np.bool_]:
    """The `(H, W)` bool mask of an RLE; raises ValueError like `check`."""
    height, width = rle["size"]
    counts = check(rle, (height, width))
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((width, height)).T


def check(rle: dict[str, Any], size: tuple[int, int]) -> list[int]:
    """The counts of an RLE in either form.

    Args:
        rle: `{"size": [H, W], "counts": list | str | bytes}`.
        size: `(H, W)` that it must have.

    Raises:
        ValueError: a clause that says what is wrong.
    """
    if list(rle.get("size") or ()) != list(size):
        raise ValueError(f"RLE size {str(rle.get('size'))[:40]} is not the image's {list(size)} (height, width)")
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        counts = decompress(counts if isinstance(counts, bytes) else counts.encode("ascii", "replace"))
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise ValueError("RLE counts are neither a string nor a list of whole numbers")
    if any(count < 0 for count in counts) or sum(counts) != size[0] * size[1]:
        raise ValueError("RLE counts do not add up to the image's pixels")
    return counts


def box(counts: Sequence[int], height: int) -> tuple[float, float, float, float]:
    """`(x1, y1, x2, y2)` of the foreground of a mask with `height` rows; zeros where there is none."""
    ends = np.cumsum(counts)
    first, last = ends[:-1:2], ends[1::2] - 1
    filled = last >= first
    first, last = first[filled], last[filled]
    if not len(first):
        return 0.0, 0.0, 0.0, 0.0
    spans = bool(np.any(first // height != last // height))  # a run over a column's end touches bottom and top
    top = 0 if spans else int(np.min(first % height))
    bottom = height if spans else int(np.max(last % height)) + 1
    return float(first[0] // height), float(top), float(last[-1] // height + 1), float(bottom)


def compress(counts: Sequence[int]) -> bytes:
    """The compressed string of counts."""
    out = bytearray()
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            group, value = value & 0x1F, value >> 5
            more = value != (-1 if group & 0x10 else 0)
            out.append((group | 0x20 if more else group) + 48)
            if not more:
                break
    return bytes(out)


def decompress(text: bytes) -> list[int]:
    """The counts of a compressed string; raises ValueError where it is cut off or holds foreign characters."""
    counts: list[int] = []
    value = shift = 0
    for byte in text:
        code = byte - 48
        if not 0 <= code < 64 or shift > 40:
            raise ValueError("RLE string is damaged")
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("RLE string is cut off")
    return counts
