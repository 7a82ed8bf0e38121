"""How batches come from the loader's processes: their images in shared memory that is used again, the rest by value.

Fresh shared pages are dear: the kernel clears and maps them 4 KiB at a time. For images of 800 x 1066 that cost 2.1 ms
each, as much as decoding and resizing together; memory touched before takes 0.06 ms. So a worker keeps its buffers.
Their last byte says whether a batch lies in them: the worker sets it, and the process that receives the batch clears
it when the last tensor on that memory is freed, however long someone holds on to it.
"""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import fields
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from detection.batch import Batch, Target

# A worker is two batches ahead, one is in use and one is being written; batches that are kept for longer get memory of
# their own.
MOST = 6
_buffers: list[Tensor] = []  # of this worker, uint8, each with a byte more than the batch for which it was made


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    """A tensor of any contents; in a worker in shared memory that is free or new."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    free = [buffer for buffer in _buffers if not buffer[-1]]
    fitting = [buffer for buffer in free if len(buffer) > size]
    buffer = min(fitting, key=len) if fitting else _new(size + 1)
    if not fitting:
        if free:  # too small, and so it would stay
            _buffers[:] = [other for other in _buffers if other is not free[0]]
        if len(_buffers) < MOST:
            _buffers.append(buffer)
    buffer[-1] = 1
    return buffer[:size].view(dtype).view(shape)


def _new(size: int) -> Tensor:
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def buffer_of(images: Tensor) -> Tensor | None:
    """The buffer of this worker in which `images` lies, to be sent in its place; None for any other tensor."""
    return next((buffer for buffer in _buffers if buffer.data_ptr() == images.data_ptr()), None)


def receive(buffer: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    """The images in a buffer that another process sent, which may use it again when they are freed here."""
    whole: NDArray[np.uint8] = buffer.numpy()
    images = whole[: math.prod(shape) * dtype.itemsize].view(f"u{dtype.itemsize}").reshape(shape)
    # The tensor's storage owns this array, so that it lives as long as any view of the images does.
    weakref.finalize(images, _give_back, whole, os.getpid()).atexit = False
    return torch.from_numpy(images)


def _give_back(whole: NDArray[np.uint8], owner: int) -> None:
    if os.getpid() == owner:  # a child forked in the meantime has a copy of this callback but not of the batch
        whole[-1] = 0


def _send_target(target: Target) -> tuple[Any, ...]:
    # A tensor travels as shared memory that keeps a file descriptor open while it lives, five for each image of a
    # validation run; arrays travel by value.
    return _receive_target, tuple(_by_value(getattr(target, f.name)) for f in fields(target))


def _receive_target(*values: Any) -> Target:
    return Target(*map(_as_tensor, values))


def _send_batch(batch: Batch) -> tuple[Any, ...]:
    # Only the images travel as shared memory: to open it takes a connection for each tensor.
    buffer = buffer_of(batch.images)
    rest = [_by_value(getattr(batch, f.name)) for f in fields(batch)[1:]]
    form = tuple(batch.images.shape), batch.images.dtype
    return _receive_batch, (batch.images if buffer is None else buffer, *form, *rest)


def _receive_batch(images: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *rest: Any) -> Batch:
    return Batch(images if images.shape == shape else receive(images, shape, dtype), *map(_as_tensor, rest))


def _by_value(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


# Between processes alone: any other pickle of them is Python's own.
ForkingPickler.register(Target, _send_target)
ForkingPickler.register(Batch, _send_batch)
