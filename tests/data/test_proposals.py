"""Proposals on disk: computed once, refused when they don't fit, and moved with the image as its boxes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from detection.data import proposals as module
from detection.data.augment import eval_transform, train_transform
from detection.data.datamodule import DetectionDataModule, init_worker
from detection.data.dataset import DetectionDataset, collate
from detection.data.images import read_image
from detection.data.proposals import ProposalCache, ProposalFiles, SearchedProposals, read_results
from detection.data.records import DataError, Index, Record
from detection.data.scenes import draw_scene
from detection.selective_search import SelectiveSearch

QUICK = {"colour_spaces": ("intensity",), "measures": ("TSF",), "scales": (100,), "width": None, "max_proposals": 60}
NAMES = ("a.png", "../escape.png", "sub/a.png")


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Three drawn scenes, two of the same base name, one whose name leads out of any folder it is put in."""
    root = tmp_path / "images" / "here"
    (root / "sub").mkdir(parents=True)
    records = []
    for i, name in enumerate(NAMES):
        image, objects = draw_scene(np.random.default_rng([9, i]))
        boxes = [(c[0], r[0], c[-1] + 1, r[-1] + 1) for r, c in (np.nonzero(m)[0:2] for _, m, _ in objects)]
        boxes = [(min(x1, x2 - 1), y1, x2, y2) for x1, y1, x2, y2 in boxes]
        count, (height, width) = len(objects), image.shape[:2]
        cv2.imwrite(str(root / name), image[..., ::-1])
        flags = np.zeros(count, np.bool_)
        arrays: dict[str, Any] = {"iscrowd": flags, "difficult": flags, "annotation_ids": np.arange(count)}
        arrays |= {"boxes": np.array(boxes, np.float32).reshape(-1, 4), "areas": np.ones(count, np.float32)}
        labels = np.array([label for label, _, _ in objects], np.int64)
        records.append(Record(10 + i, name, width, height, labels=labels, **arrays))
    return Index(root, ("a", "b", "c", "d", "e", "f"), tuple(range(1, 7)), records)


@pytest.fixture
def source(tmp_path: Path) -> SearchedProposals:
    return SearchedProposals(SelectiveSearch(**QUICK), str(tmp_path / "cache"))  # type: ignore[arg-type]


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_missing_is_computed_once(
    index: Index, source: SearchedProposals, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = {"num_workers": workers, "worker_init_fn": init_worker}
    before = set(tmp_path.rglob("*"))
    source.prepare(index, "train", **loading)
    made = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert len(made) == len(NAMES) + 1 and all(path.parent.parent == tmp_path / "cache" for path in made)
    cache = source.open(index, "train")
    for record in index.records:
        found = cache.read(record)
        np.testing.assert_array_equal(found, source.search(read_image(index.root / record.file_name)))
        assert len(found) > 10
    kept = content(tmp_path / "cache")
    monkeypatch.setattr(SelectiveSearch, "__call__", lambda *_: pytest.fail("computed again"))
    source.prepare(index, "train", **loading)
    assert content(tmp_path / "cache") == kept
    cache.path(index.records[1]).unlink()
    assert cache.missing(index.records) == [index.records[1]]


def test_other_settings_have_another_folder(index: Index, source: SearchedProposals, tmp_path: Path) -> None:
    source.prepare(index, "train", num_workers=0)
    other = SearchedProposals(SelectiveSearch(**QUICK | {"min_side": 11}), str(tmp_path / "cache"))  # type: ignore[arg-type]
    assert len(other.open(index, "train").missing(index.records)) == 3
    folder = source.open(index, "train").folder
    settings = json.loads((folder / module.MARK).read_text())
    assert settings["min_side"] == 10 and settings["scales"] == [100]
    (folder / module.MARK).write_text(json.dumps(settings | {"min_side": 11}))
    with pytest.raises(DataError, match="other settings; delete the folder"):
        source.open(index, "train")


def test_the_users_cache_keeps_data_sets_apart(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    source = SearchedProposals(SelectiveSearch(**QUICK))  # type: ignore[arg-type]
    here = source.open(index, "train")
    there = source.open(Index(tmp_path, index.classes, index.category_ids, index.records), "train")
    assert here.folder != there.folder
    assert {here.folder.parent, there.folder.parent} == {tmp_path / "home" / "detection" / "proposals"}


def test_a_folder_that_cannot_be_is_an_error_that_names_it(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/.*name another `folder`"):
        SearchedProposals(folder=str(tmp_path / "file")).open(index, "train")


def test_what_does_not_fit_is_refused(index: Index, source: SearchedProposals) -> None:
    cache, record = source.open(index, "train"), index.records[0]
    with pytest.raises(DataError, match=r"a\.png .*are missing; .*prepare_data"):
        cache.read(record)
    good = np.array([[1, 2, 30, 40]], np.float32)
    cache.write(record, good)
    np.testing.assert_array_equal(cache.read(record), good)
    for bad in ([[1, 2, 1000, 40]], [[-1, 2, 30, 40]], [[1, 2, np.nan, 40]], [[1, 2, 30]]):
        cache.write(record, np.array(bad, np.float32))
        with pytest.raises(DataError, match="no boxes inside the image; delete the file"):
            cache.read(record)
    path = cache.path(record)
    for damaged in (b"", b"PK\3\4 half a file", path.read_bytes()[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"can't be read .*delete the file"):
            cache.read(record)
    np.savez(path, boxes=np.array([{"any": "object"}], object), image=np.zeros(16, np.uint8))
    with pytest.raises(DataError, match=r"can't be read .*allow_pickle"):
        cache.read(record)


def test_another_image_of_that_name_is_noticed(index: Index, source: SearchedProposals) -> None:
    source.prepare(index, "train", num_workers=0)
    cache, record = source.open(index, "train"), index.records[0]
    path = index.root / record.file_name
    changed = cv2.imread(str(path))
    changed[0, 0] ^= 1
    cv2.imwrite(str(path), changed)
    with pytest.raises(DataError, match=r"a\.png.* were made for another image"):
        cache.read(record)
    cache.path(record).unlink()
    source.prepare(index, "train", num_workers=0)
    assert len(cache.read(record))


def test_an_interrupted_write_leaves_nothing(
    index: Index, source: SearchedProposals, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, record = source.open(index, "train"), index.records[0]
    before = content(cache.folder)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        cache.write(record, np.zeros((0, 4), np.float32))
    assert content(cache.folder) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_one_line(
    index: Index, source: SearchedProposals, workers: int
) -> None:
    (index.root / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"/a\.png: ") as error:
        source.prepare(index, "train", num_workers=workers)
    assert "\n" not in str(error.value)


def test_results_files_by_hand(tmp_path: Path) -> None:
    entries = [
        {"image_id": 7, "bbox": [1, 2, 3, 4], "score": 0.1, "category_id": 1},
        {"image_id": 5, "bbox": [0, 0, 9, 9], "score": 0.9},
        {"image_id": 7, "bbox": [10, 20, 0.5, 1], "score": 0.8},
        {"image_id": 6, "bbox": [0, 0, 1, 1], "score": 1},
        {"image_id": 7, "bbox": [5, 5, 5, 5], "score": 0.1},
    ]
    (tmp_path / "x.json").write_text(json.dumps(entries))
    boxes, ends = read_results(tmp_path / "x.json", [8, 7, 5])
    assert ends == [0, 0, 3, 4]
    assert boxes.tolist() == [[10, 20, 10.5, 21], [1, 2, 4, 6], [5, 5, 10, 10], [0, 0, 9, 9]]
    assert boxes.dtype == np.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not a readable JSON"),
        ("{}", "a list of proposals is expected, not dict"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4]}, {"image_id": 1}]', "entry 1 is not"),
        ('[{"image_id": 1, "bbox": [1, 2, 3]}]', "entry 0 is not"),
        ('[{"image_id": [1], "bbox": [1, 2, 3, 4]}]', "entry 0 is not"),
        ('[{"image_id": 1, "bbox": [1, 2, "x", 4]}]', "entry 0 is not"),
        ("[[1, 2, 3, 4]]", "entry 0 is not"),
        ('[{"image_id": 1, "bbox": [1, NaN, 3, 4]}]', "entry 0 is not finite"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": Infinity}]', "entry 0 is not finite"),
    ],
)
def test_results_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_results(tmp_path / "x.json", [1])
    assert "x.json" in str(error.value)


def test_proposals_from_files_are_clipped_and_cut(index: Index, tmp_path: Path) -> None:
    width, height = index.records[0].width, index.records[0].height
    bboxes = [[-5, -5, 20, 20], [width - 8, height - 8, 30, 30], [width + 1, 3, 5, 5], [3, 3, 0, 9], [1, 1, 5, 5]]
    entries = [{"image_id": 10, "bbox": bbox, "score": -i} for i, bbox in enumerate(bboxes)]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    (tmp_path / "val.json").write_text("[]")
    files = [str(tmp_path / f"{name}.json") for name in ("train", "val")]
    source = ProposalFiles(*files, max_proposals=2, folder=str(tmp_path / "cache"))
    source.prepare(index, "train", num_workers=0)
    cache = source.open(index, "train")
    assert cache.read(index.records[0]).tolist() == [[0, 0, 15, 15], [width - 8, height - 8, width, height]]
    assert cache.read(index.records[1]).shape == (0, 4)
    for split in ("val", "test"):
        with pytest.raises(DataError, match=r"val\.json: no proposal for any image"):
            source.prepare(index, split, num_workers=0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"nowhere\.json: .*correct the path"):
        ProposalFiles("nowhere.json", files[1]).open(index, "train")
    (tmp_path / "train.json").write_text(json.dumps(entries[:1]))  # another file under the old name
    assert len(source.open(index, "train").missing(index.records)) == 3


def test_proposals_move_with_the_image(index: Index, source: SearchedProposals) -> None:
    """The ground truth itself as proposals: whatever happens to an image, they stay what its boxes are."""
    cache = source.open(index, "train")
    for record in index.records:
        cache.write(record, np.concatenate((record.boxes, np.array([[0, 0, 0.2, 0.2]], np.float32))))
    transform = train_transform(120, 300, hflip=0.5, vflip=0.5, scale_jitter=(0.5, 1.5))
    dataset = DetectionDataset(index, transform, proposals=cache)
    plain = DetectionDataset(index, transform)
    for key in [(i, seed) for i in range(3) for seed in range(6)]:
        sample, without = dataset[key], plain[key]
        assert sample.proposals is not None
        assert torch.equal(sample.proposals, sample.boxes)  # the thin one is dropped, as a thin object would be
        assert torch.equal(sample.boxes, without.boxes) and torch.equal(sample.labels, without.labels)
        assert torch.equal(sample.image, without.image)
        assert len(sample.target.boxes) == len(index.records[key[0]].boxes) and without.proposals is None


def test_batches_pad_proposals(index: Index, source: SearchedProposals) -> None:
    cache = source.open(index, "train")
    counts = (3, 0, 1)
    for record, count in zip(index.records, counts, strict=True):
        cache.write(record, np.array([[5, 6, 25, 26 + i] for i in range(count)], np.float32).reshape(-1, 4))
    record = index.records[0]
    dataset = DetectionDataset(index, eval_transform(2 * min(record.height, record.width), 2000), proposals=cache)
    batch = collate([dataset[i] for i in range(3)])
    assert batch.proposals is not None and batch.proposals_valid is not None
    assert batch.proposals_valid.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert batch.proposals[0].tolist() == [[10, 12, 50, 52 + 2 * i] for i in range(3)]
    assert not batch.proposals[~batch.proposals_valid].any()
    moved = batch.to("cpu")
    assert moved.proposals is not None and torch.equal(moved.proposals, batch.proposals)
    without = collate([DetectionDataset(index, eval_transform(60, 200))[0]])
    assert without.proposals is None and without.proposals_valid is None and without.to("cpu").proposals is None


def test_neither_mosaic_nor_masks(index: Index, source: SearchedProposals) -> None:
    with pytest.raises(ValueError, match="neither mosaics nor masks"):
        DetectionDataModule(mosaic=0.5, proposals=source)
    with pytest.raises(ValueError, match="neither mosaics nor masks"):
        DetectionDataModule(masks=True, proposals=source)
    with pytest.raises(DataError, match="neither mosaics nor masks"):
        DetectionDataset(index, eval_transform(), mosaic=0.5, proposals=source.open(index, "train"))


def coco_root(index: Index) -> Path:
    """The readable ones of the images as COCO, half of the time in each split."""
    images = [{"id": r.image_id, "file_name": r.file_name, "width": r.width, "height": r.height} for r in index.records]
    for split, number in (("train", 0), ("val", 2)):
        x1, y1, x2, y2 = index.records[number].boxes[0].tolist()
        annotation = {"id": 1, "image_id": 10 + number, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        file = {"images": [images[number]], "annotations": [annotation | {"area": 4, "iscrowd": 0}]}
        (index.root / f"{split}.json").write_text(json.dumps(file | {"categories": [{"id": 1, "name": "a"}]}))
    return index.root


def test_the_data_module_computes_before_it_trains_and_keeps_plain_values(
    index: Index, source: SearchedProposals, tmp_path: Path
) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DetectionDataModule, "data", instantiate=False)
    search = {"class_path": "detection.selective_search.SelectiveSearch", "init_args": QUICK}
    arguments = {"search": search, "folder": str(tmp_path / "cache")}
    settings = {
        **{"format": "coco", "root": str(coco_root(index)), "num_workers": 0, "batch_size": 1},
        **{"train_split": "train.json", "val_split": "val.json"},
        "proposals": {"class_path": "detection.data.proposals.SearchedProposals", "init_args": arguments},
    }
    data = DetectionDataModule(**parser.parse_object({"data": settings}).data.as_dict())
    assert isinstance(data.proposals, SearchedProposals)
    assert data.proposals.search.settings == source.search.settings
    data.prepare_data()
    assert not (tmp_path / "cache").exists()  # no trainer says for what stage: setup does it
    data.setup("validate")
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("*.npz"))) == 1
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data.trainer = trainer
    trainer.state.fn = None
    data.prepare_data()
    assert len(list(folder.glob("*.npz"))) == 2
    data.setup("fit")
    (batch,) = list(data.val_dataloader())
    assert batch.proposals.shape[:2] == batch.proposals_valid.shape and batch.proposals_valid.sum() > 10
    again = DetectionDataModule(**data.hparams)
    assert isinstance(again.proposals, SearchedProposals)
    assert again.proposals.open(index, "train").folder == folder
    assert json.loads(json.dumps(data.hparams["proposals"])) == data.hparams["proposals"]
    direct = DetectionDataModule(proposals=data.proposals)
    assert direct.hparams["proposals"] == data.proposals.recipe  # type: ignore[attr-defined]


def test_settings_are_those_of_a_cache_in_plain_values(index: Index, tmp_path: Path) -> None:
    first = ProposalCache(tmp_path, index.root, {"scales": (50, 100)})
    assert ProposalCache(tmp_path, index.root, {"scales": [50, 100]}).folder == first.folder
    assert ProposalCache(tmp_path, index.root, {"scales": [50]}).folder != first.folder
