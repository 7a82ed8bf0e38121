"""Record buffers, samples and batches: nothing lost, nothing shared by accident, no memory per worker."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset, get_worker_info

from detection.batch import Batch, Target
from detection.data.augment import eval_transform, train_transform
from detection.data.datamodule import init_worker
from detection.data.dataset import DetectionDataset, collate, make_target, to_rle
from detection.data.records import DataError, Index, Record
from detection.data.store import RecordStore


def record(number: int, count: int, size: tuple[int, int] = (60, 80), segments: bool = False) -> Record:
    rng = np.random.default_rng(number)
    corners = rng.integers(0, (size[1] - 20, size[0] - 20), (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(2, 20, (count, 2))], axis=1).astype(np.float32)
    return Record(
        image_id=1000 + number,
        file_name=f"sub/ünicode {number}.png",
        width=size[1],
        height=size[0],
        boxes=boxes,
        labels=rng.integers(1, 4, count),
        areas=rng.random(count, np.float32),
        iscrowd=rng.random(count) < 0.2,
        difficult=rng.random(count) < 0.2,
        annotation_ids=rng.integers(0, 10**12, count),
        segments=[[[x1, y1, x2, y1, x2, y2]] for x1, y1, x2, y2 in boxes.tolist()] if segments else None,
    )


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Six images of three sizes, the fourth without objects."""
    (tmp_path / "sub").mkdir()
    sizes = [(60, 80), (80, 60), (50, 50)]
    records = [record(i, 0 if i == 3 else i + 2, sizes[i % 3]) for i in range(6)]
    for r in records:
        image = np.random.default_rng(r.image_id).integers(0, 256, (r.height, r.width, 3), dtype=np.uint8)
        (tmp_path / r.file_name).write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    return Index(tmp_path, ("a", "b", "c"), (1, 2, 7), records)


@pytest.mark.parametrize("segments", [False, True])
def test_store_gives_back_every_record(segments: bool) -> None:
    records = [record(i, n, segments=segments) for i, n in enumerate([3, 0, 7, 1, 0])]
    store = RecordStore(records)
    assert len(store) == 5
    for i, expected in enumerate(records):
        got = store[i]
        for name in Record.__slots__:
            a, b = getattr(got, name), getattr(expected, name)
            assert type(a) is type(b)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all(), name
            else:
                assert a == b, name


def test_store_of_nothing() -> None:
    assert len(RecordStore([])) == 0
    assert RecordStore([record(0, 0)])[0].boxes.shape == (0, 4)


def test_store_holds_all_kinds_of_segments() -> None:
    r = record(0, 4)
    mask = np.zeros((60, 80), np.uint8)
    mask[10:20, 30:50] = 1
    compressed = coco_mask.encode(np.asfortranarray(mask))
    plain = {"size": [60, 80], "counts": [30 * 60 + 10, *[10, 50] * 19, 10, 60 * 30 + 40]}
    r.segments = [None, [[30, 10, 50, 10, 50, 20, 30, 20]], compressed, plain]
    r.boxes[0] = (30, 10, 50, 20)
    target = make_target(RecordStore([r])[0])
    assert target.masks is not None
    for got in target.masks:  # pycocotools is the judge: four spellings of one mask
        np.testing.assert_array_equal(coco_mask.decode(got), mask)
        assert isinstance(got["counts"], bytes)
    assert to_rle(compressed, r.boxes[0], 60, 80)["counts"] == compressed["counts"]


def test_training_leaves_out_crowds_and_difficult(index: Index) -> None:
    for with_difficult in (False, True):
        dataset = DetectionDataset(index, eval_transform(60, 200), with_difficult)
        for i, r in enumerate(index.records):
            keep = ~r.iscrowd if with_difficult else ~r.iscrowd & ~r.difficult
            sample = dataset[i]
            assert sample.labels.tolist() == r.labels[keep].tolist()
            assert len(sample.boxes) == keep.sum()
            assert sample.target.labels.tolist() == r.labels.tolist()
            assert sample.target.iscrowd.tolist() == r.iscrowd.tolist()
            np.testing.assert_array_equal(sample.target.boxes, r.boxes)


def test_target_owns_its_memory(index: Index) -> None:
    """A view of the buffers, sent to another process, would take the whole buffer along."""
    sample = DetectionDataset(index, eval_transform(60, 200))[0]
    for tensor in (sample.target.boxes, sample.target.labels, sample.target.areas, sample.boxes, sample.labels):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_collate_pads_and_keeps_pixels(index: Index) -> None:
    dataset = DetectionDataset(index, eval_transform(70, 200))
    samples = [dataset[i] for i in range(6)]
    batch = collate(samples)
    assert batch.images.shape == (6, 3, 96, 96) and batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
    assert batch.image_sizes.tolist() == [[70, 93], [93, 70], [70, 70]] * 2
    assert batch.original_sizes.tolist() == [[60, 80], [80, 60], [50, 50]] * 2
    for i, (sample, image) in enumerate(zip(samples, batch.images, strict=True)):
        h, w = batch.image_sizes[i].tolist()
        assert torch.equal(image[:, :h, :w], sample.image)
        assert not image[:, h:].any() and not image[:, :, w:].any()
        assert torch.equal(batch.gt_boxes[i][batch.gt_valid[i]], sample.boxes)
        assert torch.equal(batch.gt_labels[i][batch.gt_valid[i]], sample.labels)
    original = cv2.imread(str(index.root / index.records[2].file_name))[..., ::-1]
    same_size = collate([DetectionDataset(index, eval_transform(50, 200))[2]])
    assert torch.equal(same_size.images[0, :, :50, :50], torch.from_numpy(original.copy()).permute(2, 0, 1))


def test_an_empty_image_makes_a_batch(index: Index) -> None:
    batch = collate([DetectionDataset(index, train_transform(60, 200))[3]])
    assert batch.gt_boxes.shape == (1, 1, 4) and not batch.gt_valid.any() and len(batch.targets[0].boxes) == 0


def test_key_with_seed_repeats_and_plain_key_draws(index: Index) -> None:
    dataset = DetectionDataset(index, train_transform([40, 60, 80, 100], 200, vflip=0.5, photometric=1.0))
    assert torch.equal(dataset[0, 5].image, dataset[0, 5].image)
    different = [dataset[0, seed].image for seed in range(6)]
    assert any(a.shape != different[0].shape or not torch.equal(a, different[0]) for a in different[1:])
    torch.manual_seed(1)
    first = [dataset[0].image for _ in range(4)]
    torch.manual_seed(1)
    assert all(torch.equal(a, dataset[0].image) for a in first)
    assert any(a.shape != first[0].shape or not torch.equal(a, first[0]) for a in first[1:])


def test_mosaic_trains_on_four_images_and_evaluates_one(index: Index) -> None:
    """Each image in a class of its own shows which of them came together."""
    for i, r in enumerate(index.records):
        r.labels[:] = i + 1
        r.iscrowd[:] = r.difficult[:] = False
    dataset = DetectionDataset(index, train_transform(60, 200), mosaic=0.5)
    samples = [dataset[0, seed] for seed in range(60)]
    mixed = [set(s.labels.tolist()) - {1} for s in samples]
    assert 15 <= sum(map(bool, mixed)) <= 45 and set.union(*mixed) == {2, 3, 5, 6}  # the fourth image has no object
    for sample in samples:
        assert set(sample.target.labels.tolist()) == {1} and len(sample.boxes) == len(sample.labels)
    assert torch.equal(samples[7].image, dataset[0, 7].image)


def test_missing_image_is_named(index: Index) -> None:
    (index.root / index.records[1].file_name).unlink()
    with pytest.raises(DataError, match=r"ünicode 1\.png"):
        DetectionDataset(index, eval_transform())[1]


class _Probe(Dataset[tuple[int, int, int]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[int, int, int]:
        info = get_worker_info()
        return cv2.getNumThreads(), torch.get_num_threads(), -1 if info is None else info.id


def test_workers_use_one_thread() -> None:
    rows = next(iter(DataLoader(_Probe(), batch_size=4, num_workers=1, worker_init_fn=init_worker)))
    assert set(rows[0].tolist()) <= {0, 1} and set(rows[1].tolist()) == {1} and set(rows[2].tolist()) == {0}


def test_workers_send_the_same_batches_without_descriptors(index: Index) -> None:
    """The batch arrives whole, and targets kept for a whole validation run hold no file open."""
    dataset = DetectionDataset(index, eval_transform(60, 200))
    expected: Batch = collate([dataset[i] for i in range(6)])
    held, kept = list[int](), list[Target]()
    for _ in range(6):
        (batch,) = DataLoader(dataset, 6, num_workers=1, collate_fn=collate)
        assert _is_mapped_shared(batch.images) and torch.equal(batch.images, expected.images)
        kept += batch.targets
        del batch
        gc.collect()  # the loaders of this test and of others
        held.append(_open_shared_files())
    assert not any(held), held
    for got, target in zip(kept, expected.targets * 6, strict=True):
        assert torch.equal(got.boxes, target.boxes) and got.boxes.dtype == torch.float32
        assert torch.equal(got.iscrowd, target.iscrowd) and got.file_name == target.file_name


def test_copy_paste_needs_masks_and_counts_what_it_covers(index: Index) -> None:
    with pytest.raises(DataError, match="copy_paste needs masks"):
        DetectionDataset(index, eval_transform(60, 200), copy_paste=0.5)
    for i, r in enumerate(index.records):
        r.labels[:] = i + 1
        r.iscrowd[:] = r.difficult[:] = False
        r.segments = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in r.boxes.tolist()]
    dataset = DetectionDataset(index, train_transform(60, 80, scale_jitter=(0.5, 2.0)), copy_paste=0.5)
    samples = [dataset[0, seed] for seed in range(60)]
    mixed = [bool(set(s.labels.tolist()) - {1}) for s in samples]
    assert 10 <= sum(mixed) <= 40 and any(sample.dropped for sample in samples)
    for sample in samples:
        assert sample.masks is not None and len(sample.masks) == len(sample.boxes) == len(sample.labels)
    assert torch.equal(samples[7].image, dataset[0, 7].image)
    batch = collate(samples)
    assert batch.objects_given - batch.objects_dropped == int(batch.gt_valid.sum())
    assert batch.objects_dropped == sum(sample.dropped for sample in samples)


def test_dropped_objects_are_counted(index: Index) -> None:
    """Images whose short side of 60 or 50 becomes 6 pixels: objects that end up thinner than a pixel are lost."""
    dataset = DetectionDataset(index, eval_transform(6, 8), with_difficult=True)
    batch = collate([dataset[i] for i in range(6)])
    given = [r.boxes[~r.iscrowd] for r in index.records]
    assert batch.objects_given == sum(map(len, given))
    thin = sum(int((np.ptp(b.reshape(-1, 2, 2), axis=1).min(axis=1) < 60 / 6).sum()) for b in given[0::3] + given[1::3])
    thin += sum(int((np.ptp(b.reshape(-1, 2, 2), axis=1).min(axis=1) < 50 / 6).sum()) for b in given[2::3])
    assert batch.objects_dropped == thin > 0


def test_unreadable_images_are_replaced_in_training(index: Index) -> None:
    broken = index.root / index.records[1].file_name
    broken.write_bytes(broken.read_bytes()[:100])
    dataset = DetectionDataset(index, train_transform(60, 200), max_unreadable=9)
    samples = [dataset[1, seed] for seed in range(20)]
    for seed, sample in enumerate(samples):
        assert sample.target.image_id != index.records[1].image_id and len(sample.boxes) == len(sample.labels)
        assert sample.unreadable and all("ünicode 1.png" in problem for problem in sample.unreadable)
        assert torch.equal(sample.image, dataset[1, seed].image)
    assert len({sample.target.image_id for sample in samples}) > 2
    assert dataset[0, 3].unreadable == ()
    assert collate([dataset[0, 1], samples[0]]).unreadable == samples[0].unreadable
    for r in index.records:
        (index.root / r.file_name).unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"ünicode \d\.png"):
        dataset[0, 0]


def _is_mapped_shared(tensor: torch.Tensor) -> bool:
    """Whether the kernel maps the tensor's memory as shared between processes (`rw-s`)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.split()[1] == "rw-s"
    return False


def _open_shared_files() -> int:
    """How many descriptors of this process lead to a tensor's shared memory. Others come and go with other tests."""
    return sum("torch_" in os.path.realpath(file) for file in Path("/proc/self/fd").iterdir())


class _Pass(Dataset[tuple[int, int]]):
    """Reads records and reports the worker's own memory."""

    def __init__(self, records: RecordStore | list[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[int, int]:
        record = self.records[i]
        target = make_target(record)
        memory = private_memory() if i % 1000 == 999 else 0
        return int(target.image_id), memory


def private_memory() -> int:
    """Kilobytes of this process that no other process shares."""
    rollup = Path("/proc/self/smaps_rollup")
    lines = rollup.read_text().splitlines()[1:]
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


@pytest.mark.rehearsal
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel reports no private memory")
def test_memory_of_workers_stays_flat() -> None:
    """4 workers, 200,000 records: after the first hundredth, private memory grows by less than a tenth."""
    template = [record(i, 7) for i in range(100)]
    store = RecordStore([template[i % 100] for i in range(200_000)])
    loader = DataLoader(_Pass(store), 100, num_workers=4, collate_fn=lambda rows: max(memory for _, memory in rows))
    seen = [memory for memory in loader if memory]
    first, last = sum(seen[:4]), sum(seen[-4:])
    assert last < 1.1 * first, f"{first} kB at first, {last} kB at last"
