"""Memory that workers use again: never while anyone can still see the batch in it."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detection.batch import Batch
from detection.data import shared

SHAPE = (2, 3, 40, 60)


@pytest.fixture
def in_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shared, "get_worker_info", lambda: object())
    monkeypatch.setattr(shared, "_buffers", [])
    yield
    gc.collect()


def send(images: Tensor) -> Tensor:
    """What the receiving process makes of it, on the same memory."""
    buffer = shared.buffer_of(images)
    assert buffer is not None
    return shared.receive(buffer, tuple(images.shape))


def test_memory_is_used_again_only_when_the_batch_is_gone(in_worker: None) -> None:
    first = shared.empty(SHAPE)
    first.fill_(7)
    received = send(first)
    view = received[1].flatten()[5:]  # any view keeps the memory
    del received
    second = shared.empty(SHAPE)
    assert second.data_ptr() != first.data_ptr()
    assert view.unique().tolist() == [7]
    del view
    assert shared.empty(SHAPE).data_ptr() == first.data_ptr()
    assert shared.empty(SHAPE).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_smallest_that_fits_and_never_more_than_the_most(in_worker: None) -> None:
    sizes = [(10, 10), (30, 30), (20, 20)]
    tensors = [shared.empty(size) for size in sizes]
    addresses = {size: tensor.data_ptr() for size, tensor in zip(sizes, tensors, strict=True)}
    for tensor in tensors:
        send(tensor)  # received and freed at once
    assert shared.empty((15, 15)).data_ptr() == addresses[20, 20]
    assert shared.empty((16, 16)).data_ptr() == addresses[30, 30]
    large = shared.empty((50, 50))  # takes the place of the free one that is too small
    assert sorted(map(len, shared._buffers)) == [401, 901, 2501]
    assert shared.buffer_of(large) is not None
    rest = [shared.empty((60, 60)) for _ in range(shared.MOST)]
    assert len(shared._buffers) == shared.MOST
    assert [shared.buffer_of(tensor) is None for tensor in rest] == [False] * (shared.MOST - 3) + [True] * 3


def test_a_forked_child_gives_nothing_back(in_worker: None) -> None:
    images = shared.empty(SHAPE)
    held = [send(images)]
    pid = os.fork()
    if not pid:
        held.clear()
        gc.collect()
        os._exit(0)
    os.waitpid(pid, 0)
    assert shared.empty(SHAPE).data_ptr() != images.data_ptr()
    held.clear()
    assert shared.empty(SHAPE).data_ptr() == images.data_ptr()


def batch_of(images: Tensor) -> Batch:
    count = len(images)
    sizes = torch.full((count, 2), 32)
    return Batch(images, sizes, torch.rand(count, 1, 4), sizes[:, :1], sizes[:, :1] > 0, sizes)


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 120

    def __getitem__(self, i: int) -> int:
        return i


def numbered(items: list[int]) -> Batch:
    images = shared.empty((len(items), 3, 32, 32 + 32 * (items[0] % 3)))
    images.copy_(torch.tensor(items).view(-1, 1, 1, 1))
    return batch_of(images)


@pytest.mark.parametrize("keep", [True, False])
def test_batches_of_workers_are_intact(keep: bool) -> None:
    loader = DataLoader(Numbers(), 4, num_workers=2, collate_fn=numbered, persistent_workers=True)  # type: ignore[arg-type]
    for _ in range(2):
        kept = []
        for i, batch in enumerate(loader):
            assert (batch.images == torch.arange(4 * i, 4 * i + 4).view(-1, 1, 1, 1)).all()
            assert batch.gt_boxes.shape == (4, 1, 4) and batch.gt_valid.dtype == torch.bool
            if keep:
                kept.append(batch)
        for i, batch in enumerate(kept):
            assert (batch.images == torch.arange(4 * i, 4 * i + 4).view(-1, 1, 1, 1)).all()


def test_batch_is_received_under_inference_mode_and_freed_outside(in_worker: None) -> None:
    images = shared.empty(SHAPE)
    with torch.inference_mode():
        received = send(images)
    del received
    assert shared.empty(SHAPE).data_ptr() == images.data_ptr()


def test_batch_survives_pickling() -> None:
    batch = batch_of(torch.randint(0, 256, SHAPE, dtype=torch.uint8))
    copy = pickle.loads(pickle.dumps(batch))
    assert copy.targets == () and copy.gt_masks is None
    for name in ("images", "image_sizes", "gt_boxes", "gt_labels", "gt_valid", "original_sizes"):
        one, other = getattr(copy, name), getattr(batch, name)
        assert torch.equal(one, other) and one.dtype == other.dtype
