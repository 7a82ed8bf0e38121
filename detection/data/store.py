"""The records of a split in flat buffers, which loaders' processes share.

Shape shorthand:
    R: records (images)     M: objects of all records
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.data.records import Record


class _Strings:
    """Byte strings laid end to end in one tensor."""

    def __init__(self, items: Iterable[bytes]) -> None:
        items = list(items)
        self.ends = torch.tensor([0, *accumulate(map(len, items))], dtype=torch.int64)
        self.data = torch.frombuffer(bytearray(b"".join(items) or b"\0"), dtype=torch.uint8)

    def __getitem__(self, i: int) -> bytes:
        start, end = self.ends[i : i + 2].tolist()
        return self.data[start:end].numpy().tobytes()


class RecordStore:
    """A list of `Record` that holds no Python object per record or object: a dozen tensors do.

    Reading a Python object writes its reference count, and the first write to a page after a fork copies it, so that a
    list of records ends up once in every worker. Tensors are shared with forked workers for good, and with spawned
    ones through shared memory.

    Args:
        records: what a reader returned; may be freed afterwards.

    Attributes:
        sizes: `(R, 2)` int64 `(height, width)`.
        object_ends: `(R + 1,)` int64; the objects of record i are rows `object_ends[i]` to `object_ends[i + 1]`.
        boxes, labels, areas, iscrowd, difficult, annotation_ids: `(M, ...)`, as in `Record`.
        keypoints: `(M, k, 3)`, or None where they are not read.
        checked, partial: `(R, bytes)` uint8, the classes of each image as bits, or None where no record says any.
        windows: `(R, 4)` int64 as in `Record`, or None where no record is a tile.
        files: `(R,)` int64, which file each record is of, counted through, or None likewise.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        def joined(name: str, empty: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.concatenate([empty, *(getattr(r, name) for r in records)], dtype=empty.dtype))

        self.sizes = torch.tensor([(r.height, r.width) for r in records], dtype=torch.int64).reshape(-1, 2)
        self.object_ends = torch.tensor([0, *accumulate(len(r.labels) for r in records)], dtype=torch.int64)
        self.boxes = joined("boxes", np.zeros((0, 4), np.float32))
        self.labels = joined("labels", np.zeros(0, np.int64))
        self.areas = joined("areas", np.zeros(0, np.float32))
        self.iscrowd = joined("iscrowd", np.zeros(0, np.bool_))
        self.difficult = joined("difficult", np.zeros(0, np.bool_))
        self.annotation_ids = joined("annotation_ids", np.zeros(0, np.int64))
        points = [r.keypoints for r in records if r.keypoints is not None]
        self.keypoints = torch.from_numpy(np.concatenate(points)) if points else None
        self._classes = max(
            (len(flags) for r in records for flags in (r.checked, r.partial) if flags is not None), default=0
        )
        self.checked = self._packed([r.checked for r in records], True)
        self.partial = self._packed([r.partial for r in records], False)
        self.windows = self.files = None
        if any(r.window is not None for r in records):
            self.windows = torch.tensor([r.window or (0, 0, r.height, r.width) for r in records], dtype=torch.int64)
            numbers: dict[str, int] = {}
            self.files = torch.tensor([numbers.setdefault(r.file_name, len(numbers)) for r in records])
        self._names = _Strings(r.file_name.encode() for r in records)
        self._image_ids = _Strings(json.dumps(r.image_id).encode() for r in records)  # of any size, or text
        self._segments = None
        if any(r.segments is not None for r in records):
            self._segments = _Strings(json.dumps(s, default=_jsonable).encode() for r in records for s in _padded(r))

    def _packed(self, flags: Sequence[NDArray[np.bool_] | None], default: bool) -> Tensor | None:
        if all(own is None for own in flags):
            return None
        rows = [np.full(self._classes, default) if own is None else own for own in flags]
        return torch.from_numpy(np.stack([np.packbits(row) for row in rows]))

    def _flags(self, packed: Tensor | None, i: int) -> NDArray[np.bool_] | None:
        return None if packed is None else np.unpackbits(packed[i].numpy(), count=self._classes).astype(bool)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Record:
        """Record i; its arrays are views of the buffers, to be read only."""
        start, end = self.object_ends[i : i + 2].tolist()
        height, width = self.sizes[i].tolist()
        segments = None
        if self._segments is not None:
            segments = [json.loads(self._segments[j]) for j in range(start, end)]
        return Record(
            image_id=json.loads(self._image_ids[i]),
            file_name=self._names[i].decode(),
            width=width,
            height=height,
            boxes=self.boxes[start:end].numpy(),
            labels=self.labels[start:end].numpy(),
            areas=self.areas[start:end].numpy(),
            iscrowd=self.iscrowd[start:end].numpy(),
            difficult=self.difficult[start:end].numpy(),
            annotation_ids=self.annotation_ids[start:end].numpy(),
            segments=segments,
            checked=self._flags(self.checked, i),
            partial=self._flags(self.partial, i),
            window=None if self.windows is None else tuple(self.windows[i].tolist()),
            keypoints=None if self.keypoints is None else self.keypoints[start:end].numpy(),
        )


def _padded(record: Record) -> list[Any]:
    return record.segments if record.segments is not None else [None] * len(record.labels)


def _jsonable(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value.tolist()
