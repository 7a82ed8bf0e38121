"""The data module: real folders to batches, the same on any number of workers, resumed exactly, refused clearly."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detection.batch import Batch
from detection.data import scenes, workers
from detection.data.datamodule import DetectionDataModule, TrainLoader
from detection.data.reading import check_split, describe
from detection.data.records import DataError, Defect, Index, Record
from detection.data.voc import read_voc


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few and small scenes, where the data module looks for them."""
    folder = tmp_path_factory.mktemp("cache")
    scenes.draw(folder, train=20, val=7).rename(scenes.location(folder))
    return folder


def drawn(cache: Path, **options: Any) -> DetectionDataModule:
    data = DetectionDataModule(root=str(cache), **({"batch_size": 4, "num_workers": 0} | options))
    data.prepare_data()
    data.setup("fit")
    return data


def fingerprint(batch: Batch) -> tuple[Any, ...]:
    return (*(t.image_id for t in batch.targets), int(batch.images.long().sum()), round(float(batch.gt_boxes.sum()), 3))


def test_scenes_by_default(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    (cache.parent / "detection").symlink_to(cache)
    data = DetectionDataModule(num_workers=0)
    assert data.class_names == list(scenes.CLASSES) and data.category_ids == [1, 2, 3, 4, 5, 6]
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, Batch) and len(batch) == 8 and batch.images.dtype == torch.uint8
    assert all(side % 32 == 0 for side in batch.images.shape[2:]) and int(batch.image_sizes.min(1).values.max()) == 160


def test_a_large_divisor_leaves_few_shapes(cache: Path) -> None:
    shapes = {
        size_divisible: {
            tuple(batch.images.shape[2:])
            for batch in drawn(cache, size_divisible=size_divisible, min_size=[96, 128, 160]).train_dataloader()
        }
        for size_divisible in (32, 160)
    }
    assert shapes[160] <= {(160, 160), (160, 320), (320, 160)} and len(shapes[32] - shapes[160]) > 1
    with pytest.raises(ValueError, match="size_divisible 50 must be a multiple of 32"):
        drawn(cache, size_divisible=50)


def test_evaluation_sees_every_image_once(cache: Path) -> None:
    data = drawn(cache)
    data.setup("test")
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batches: list[Any] = list(loader)
        assert [t.image_id for b in batches for t in b.targets] == list(range(1, 8))
        assert [len(b) for b in batches] == [4, 3]


def test_batches_do_not_depend_on_workers(cache: Path) -> None:
    """The same run on 0, 1 and 2 workers, two epochs that differ."""
    runs = []
    for count in (0, 1, 2):
        loader = drawn(cache, num_workers=count, photometric=0.5, min_size=[120, 160]).train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)
            epochs.append([fingerprint(batch) for batch in loader])
        assert sorted(epochs[0]) != sorted(epochs[1])
        runs.append(epochs)
    assert runs[0] == runs[1] == runs[2]


def test_real_voc(shared_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = DetectionDataModule(
        root=str(shared_data / "bccd"),
        format="voc",
        train_split="trainval",
        val_split="test",
        min_size=240,
        max_size=400,
        num_workers=0,
    )
    assert data.class_names == ["Platelets", "RBC", "WBC"]
    with caplog.at_level(logging.INFO):
        data.prepare_data()
        data.setup("fit")
        data.setup("validate")
    text = caplog.text
    assert text.count("train: 292 images") == 1 and text.count("val: 72 images") == 1
    assert "BloodImage_00338" in text and "2 records repaired or left out" in text
    batch: Any = next(iter(data.val_dataloader()))
    assert batch.images.shape == (8, 3, 256, 320) and batch.image_sizes.tolist() == [[240, 320]] * 8
    index = read_voc(shared_data / "bccd", "test")
    for i, target in enumerate(batch.targets):
        np.testing.assert_array_equal(target.boxes, index.records[i].boxes)
        torch.testing.assert_close(batch.gt_boxes[i][batch.gt_valid[i]], target.boxes / 2)


def write_voc(folder: Path, stem: str, name: str) -> None:
    """A VOC folder of one image with one object."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    cv2.imwrite(str(folder / "JPEGImages" / f"{stem}.jpg"), np.full((60, 80, 3), 90, np.uint8))
    box = "<xmin>11</xmin><ymin>11</ymin><xmax>40</xmax><ymax>30</ymax>"
    xml = f"<annotation><object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
    (folder / "Annotations" / f"{stem}.xml").write_text(xml)
    (folder / "ImageSets/Main/trainval.txt").write_text(stem)


def test_two_years_of_voc_are_one_split(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007", "000001", "dog")
    write_voc(tmp_path / "VOC2012", "000001", "cat")  # the same stem in both years
    options: dict[str, Any] = {"root": str(tmp_path), "format": "voc", "batch_size": 1, "num_workers": 0}
    options |= {"train_split": "VOC2007:trainval+VOC2012:trainval", "val_split": "VOC2012:trainval"}
    data = DetectionDataModule(**options)
    data.setup("fit")
    assert len(data.class_names) == 20  # of VOC, whichever occur
    found = {target.file_name: target for batch in data.train_dataloader() for target in batch.targets}
    assert sorted(found) == ["VOC2007/JPEGImages/000001.jpg", "VOC2012/JPEGImages/000001.jpg"]
    assert sorted(target.image_id for target in found.values()) == [0, 1]
    assert [data.class_names[int(found[name].labels[0]) - 1] for name in sorted(found)] == ["dog", "cat"]
    assert [target.file_name for b in data.val_dataloader() for target in b.targets] == sorted(found)[1:]
    data = DetectionDataModule(**options, classes=["cat"])
    data.setup("fit")
    assert data.class_names == ["cat"] and sum(int(b.gt_valid.sum()) for b in data.train_dataloader()) == 1
    with pytest.raises(DataError, match="no class 'spoon' in VOC2007, VOC2012; there are: aeroplane"):
        DetectionDataModule(**options, classes=["spoon"]).setup("fit")


def test_the_square_of_the_jitter_may_differ_from_the_size_of_validation(cache: Path) -> None:
    data = drawn(cache, scale_jitter=(2.0, 2.0), scale_jitter_size=96)
    data.setup("fit")
    assert {tuple(batch.images.shape[2:]) for batch in data.train_dataloader()} == {(96, 96)}
    assert next(iter(data.val_dataloader())).image_sizes.amax() > 96


def test_real_coco_and_chosen_classes(shared_data: Path) -> None:
    data = DetectionDataModule(
        root=str(shared_data / "tiny_coco"),
        format="coco",
        train_split="annotations/instances_train2017.json",
        train_images="train2017",
        val_split="annotations/instances_val2017.json",
        val_images="val2017",
        classes=["person", "dog"],
        masks=True,
        num_workers=0,
        repeat_threshold=0.5,
        scale_jitter=(0.5, 2.0),
    )
    assert data.class_names == ["person", "dog"] and data.category_ids == [1, 18]
    data.setup("fit")
    for batch in data.train_dataloader():
        assert set(batch.gt_labels[batch.gt_valid].tolist()) <= {1, 2}
        assert max(batch.images.shape[2:]) <= 320
    targets = [t for b in data.val_dataloader() for t in b.targets]
    assert len(targets) == 50 and any(t.iscrowd.any() for t in targets)
    assert all(t.masks is not None and len(t.masks) == len(t.boxes) for t in targets)


def test_bad_requests_fail_before_training(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs root"):
        DetectionDataModule(format="coco")
    with pytest.raises(DataError, match="RBCs"):
        DetectionDataModule(root=str(shared_data / "bccd"), format="voc", classes=["RBCs"]).setup("fit")
    with pytest.raises(DataError, match="nowhere"):
        DetectionDataModule(root=str(tmp_path / "nowhere"), format="coco").setup("fit")


@pytest.mark.parametrize(
    ("box", "label", "message"),
    [
        ((0, 0, 5, 5), 3, r"labels \[3\] are not in 1\.\.2"),
        ((0, 0, 5, 5), 0, r"labels \[0\]"),
        ((3, 0, 3, 5), 1, "empty or outside"),
        ((0, 0, 11, 5), 1, "empty or outside"),
        ((0, -1, 5, 5), 1, "empty or outside"),
        ((0, 0, float("nan"), 5), 1, "empty or outside"),
    ],
)
def test_a_reader_that_breaks_its_promise_is_caught(
    tmp_path: Path, box: tuple[float, ...], label: int, message: str
) -> None:
    flags = np.zeros(1, np.bool_)
    boxes, labels = np.array([box], np.float32), np.array([label])
    record = Record(7, "x/y.jpg", 10, 10, boxes, labels, boxes[:, 0], flags, flags, labels)
    with pytest.raises(DataError, match=message) as error:
        check_split(Index(tmp_path, ("a", "b"), (1, 2), [record]), "train")
    assert "x/y.jpg" in str(error.value) and "image 7" in str(error.value)


def test_description_counts_defects_but_not_notes(cache: Path) -> None:
    index = drawn(cache).read("val")
    index.defects += [Defect("f", "r", "bad", "fix it")] * 4 + [Defect("f", "r", "odd", "none", "note")]
    lines = describe(index, "val").split("\n")
    assert lines[0].startswith("val: 7 images (") and "star" in lines[0]
    assert lines[1].startswith("val: 4 records") and len(lines) == 6 and lines[2] == "  f: r: bad; fix it"


class StoppedError(RuntimeError):
    pass


class Seen(L.LightningModule):
    """Notes the fingerprint of every training batch; with `stop`, saves in hook `stop[0]` after `stop[1]` and dies."""

    def __init__(self, stop: tuple[str, int] | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.batches: list[tuple[Any, ...]] = []
        if stop is not None:
            setattr(self, stop[0], lambda *_: self.save_and_die(stop[1], path))

    def save_and_die(self, steps: int, path: Path | None) -> None:
        if len(self.batches) == steps and path is not None:
            self.trainer.save_checkpoint(path)
            raise StoppedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches.append((self.current_epoch, batch_idx, *fingerprint(batch)))
        return self.layer(batch.images.float().mean().view(1, 1)).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-9)


def fit(model: Seen, cache: Path, workers: int, ckpt: Path | None = None, **options: Any) -> Seen:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(model, datamodule=drawn(cache, num_workers=workers), ckpt_path=ckpt)
    return model


@pytest.mark.parametrize(
    ("stop", "workers"),
    [
        (("on_train_batch_end", 3), 2),
        (("on_train_batch_end", 5), 0),
        (("on_validation_end", 10), 0),
        (("on_train_epoch_end", 10), 0),
    ],
)
def test_a_stopped_run_resumes_exactly(cache: Path, tmp_path: Path, stop: tuple[str, int], workers: int) -> None:
    """5 batches an epoch, 3 epochs; stopped in the middle of an epoch, at its last batch, or after it."""
    whole = fit(Seen(), cache, workers)
    assert len(whole.batches) == 15 and len({b[2:] for b in whole.batches}) == 15
    path = tmp_path / "stopped.ckpt"
    first = Seen(stop, path)
    with pytest.raises(StoppedError):
        fit(first, cache, workers)
    second = fit(Seen(), cache, workers, path)
    assert [b[2:] for b in first.batches + second.batches] == [b[2:] for b in whole.batches]
    torch.load(path, weights_only=True)


def test_overfitting_sees_the_same_batches(cache: Path) -> None:
    seen = [b[2:] for b in fit(Seen(), cache, 0, overfit_batches=2).batches]
    assert len(seen) == 6 and seen[:2] == seen[2:4] == seen[4:] and seen[0] != seen[1]


def test_small_shared_memory_is_warned_of(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: usage)
    data = DetectionDataModule(root=str(cache), batch_size=16, num_workers=4, min_size=800, max_size=1333)
    with pytest.warns(UserWarning, match="64 MiB free, but 4 workers with batches of 48 MiB may need 585"):
        workers.check_shared_memory(data.hparams, 800, str(cache))


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"min_size": []}, {"min_size": [0]}, {"max_size": -1}])
def test_sizes_must_be_positive(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        DetectionDataModule(**option)


def test_state_of_the_loader(cache: Path) -> None:
    loader, shared = drawn(cache).train_dataloader(), {"world": 1, "batch_size": 4}
    assert loader.state_dict() == {"epoch": 0, "start_batch": 0} | shared
    for number, _ in enumerate(loader):
        expected = {"epoch": 0, "start_batch": number + 1} if number < 4 else {"epoch": 1, "start_batch": 0}
        assert loader.state_dict() == expected | shared
    loader.batch_sampler.set_epoch(1)
    assert loader.state_dict() == {"epoch": 1, "start_batch": 0} | shared


@pytest.mark.parametrize(
    ("before", "start"),
    [({"world": 2}, 4), ({"world": 2, "batch_size": 4}, 4), ({"world": 1, "batch_size": 2 * 4}, 4)],
)
def test_resuming_with_other_batches_says_so(before: dict[str, int], start: int, cache: Path) -> None:
    loader: TrainLoader = drawn(cache).train_dataloader()
    with pytest.warns(UserWarning, match="images of that epoch may be seen twice"):
        loader.load_state_dict({"epoch": 3, "start_batch": 2} | before)
    assert loader.state_dict() == {"epoch": 3, "start_batch": start, "world": 1, "batch_size": 4}


def _rank(rank: int, cache: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)  # OpenMP's threads did not survive the fork, and it would wait for them
    data = drawn(Path(cache))  # before the process group exists
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    train = [[t.image_id for t in batch.targets] for batch in data.train_dataloader()]
    val = [[t.image_id for t in batch.targets] for batch in data.val_dataloader()]
    torch.save((train, val), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_work(cache: Path, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_rank, (str(cache), str(tmp_path)), nprocs=2, start_method="fork")
    (train0, val0), (train1, val1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(train0) == len(train1) == 3 and len(val0) == len(val1) == 1
    ids = [i for batch in train0 + train1 for i in batch]
    assert set(ids) == set(range(1, 21)) and len(ids) == 24
    assert sorted(val0[0] + val1[0]) == [1, 1, 2, 3, 4, 5, 6, 7]


def test_workers_have_a_timeout_and_stay(cache: Path) -> None:
    loader = drawn(cache, num_workers=2, timeout=7).val_dataloader()
    assert loader.timeout == 7 and loader.persistent_workers and loader.worker_init_fn is workers.init_worker


def test_an_evaluation_file_may_list_other_categories(tmp_path: Path) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), image)
    entry = {"id": 1, "file_name": "a.jpg", "width": 60, "height": 40}

    def write(name: str, categories: dict[int, str]) -> None:
        boxes = [
            {"id": i, "image_id": 1, "category_id": i, "bbox": [i, 2, 10 + i, 9], "iscrowd": 0} for i in categories
        ]
        listed = [{"id": key, "name": value} for key, value in categories.items()]
        (tmp_path / name).write_text(json.dumps({"images": [entry], "annotations": boxes, "categories": listed}))

    write("train.json", {3: "cat", 7: "dog", 9: "fox"})
    write("val.json", {3: "dog", 4: "owl"})
    data = DetectionDataModule(str(tmp_path), "coco", "train.json", "val.json", num_workers=0, batch_size=1)
    data.setup("fit")
    target = next(iter(data.val_dataloader())).targets[0]
    assert data.class_names == ["cat", "dog", "fox"]
    assert data.category_ids == [3, 7, 9]
    assert target.labels.tolist() == [2]  # the owl is left out, the dog is found by name
    assert target.boxes.tolist() == [[3, 2, 16, 11]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_lost_during_a_run_are_named_up_to_a_cap(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    """Of twenty images two vanish after `setup` and training goes on; a third is too many. Evaluation stops at one."""
    shutil.copytree(scenes.location(cache), scenes.location(tmp_path))
    data = drawn(tmp_path, num_workers=num_workers, max_unreadable=2)
    train, val = data._datasets["train"], data._datasets["val"]
    lost = [train.root / train.store[i].file_name for i in range(3)]
    for path in lost[:2]:
        path.unlink()
    loader = data.train_dataloader()
    with caplog.at_level(logging.WARNING, "detection"):
        ids = [target.image_id for _ in range(2) for batch in loader for target in batch.targets]
    assert len(ids) == 40 and not {train.store[0].image_id, train.store[1].image_id} & set(ids)
    for path in lost[:2]:
        assert caplog.text.count(f"{path}: ") == 1  # once, though every epoch asks for it
    lost[2].unlink()
    with pytest.raises(DataError, match="3 images can't be read") as error:
        list(loader)
    assert all(str(path) in str(error.value) for path in lost)
    (val.root / val.store[0].file_name).unlink()
    with pytest.raises(DataError, match=Path(val.store[0].file_name).name):
        list(data.val_dataloader())


def test_images_without_objects_are_kept_unless_asked(shared_data: Path) -> None:
    """tiny_coco's splits have 1 and 2 images without an annotation."""
    for keep in (True, False):
        data = DetectionDataModule(
            root=str(shared_data / "tiny_coco"),
            format="coco",
            train_split="annotations/instances_train2017.json",
            val_split="annotations/instances_val2017.json",
            train_images="train2017",
            val_images="val2017",
            keep_empty=keep,
        )
        data.setup("fit")
        empty = [int((d.store.object_ends.diff() == 0).sum()) for d in data._datasets.values()]
        assert empty == [1 if keep else 0, 2]


def test_copy_paste_without_masks_is_refused(cache: Path) -> None:
    with pytest.raises(DataError, match="copy_paste needs masks"):
        drawn(cache, copy_paste=0.5)
