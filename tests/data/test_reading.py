"""Readers of the user's own: the same records in training and in the check; what breaks the contract is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from detection.cli.check import data_of, splits_of
from detection.cli.fit import main
from detection.data.datamodule import DetectionDataModule
from detection.data.reading import check_index
from detection.data.records import DataError, Index, Record
from detection.recipes import recorded
from detection.trust import RecipeError, trusting
from tests.runs import run_script

ROOT = Path(__file__).resolve().parents[2]
MODULE = '''
import csv
from pathlib import Path

from detection.data.images import image_size
from detection.data.records import Index, Record


class CsvReader:
    """One row an object: image, class, x1, y1, x2, y2."""

    def __init__(self, folder: str, delimiter: str = ",") -> None:
        self.folder, self.delimiter = folder, delimiter

    def __call__(self, root: Path, split: str) -> Index:
        with (root / self.folder / f"{split}.csv").open() as file:
            rows = list(csv.reader(file, delimiter=self.delimiter))
        classes = tuple(sorted({row[1] for row in rows}))
        records = []
        for number, name in enumerate(sorted({row[0] for row in rows})):
            own = [row for row in rows if row[0] == name]
            boxes = [[float(value) for value in row[2:]] for row in own]
            labels = [classes.index(row[1]) + 1 for row in own]
            records.append(Record.of(number, name, image_size(root / name), boxes, labels))
        return Index(root, classes, tuple(range(1, len(classes) + 1)), records)
'''


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four training and two validation images; validation knows the classes c and a, in which a is number 1 as well."""
    (tmp_path / "my_reader.py").write_text(MODULE)
    (tmp_path / "lists").mkdir()
    for split, rows in {
        "train": [(0, "a", 5), (0, "b", 30), (1, "b", 9), (2, "b", 12), (3, "a", 20)],
        "val": [(4, "c", 10), (4, "b", 30), (5, "b", 7)],
    }.items():
        lines = [f"{i}.png;{name};{x};10;{x + 20.5};40" for i, name, x in rows]
        (tmp_path / "lists" / f"{split}.csv").write_text("\n".join(lines))
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_reader", raising=False)
    return tmp_path


def settings(root: Path, **options: Any) -> dict[str, Any]:
    reader = {"class_path": "my_reader.CsvReader", "init_args": {"folder": "lists", "delimiter": ";"}}
    return {"root": str(root), "reader": reader, "batch_size": 2, "num_workers": 0, "min_size": 60} | options


def test_splits_share_the_classes_of_training(own_data: Path) -> None:
    with trusting(("my_reader",)):
        data = DetectionDataModule(**settings(own_data))
    data.setup("fit")
    assert data.class_names == ["a", "b"] and data.category_ids == [1, 2]
    val = data._datasets["val"]
    assert val.store[0].labels.tolist() == [2]  # b, which is number 1 of the validation file; c is no class of training
    assert val.store[0].boxes.tolist() == [[30, 10, 50.5, 40]]
    assert val.store[0].areas.tolist() == [20.5 * 30]
    assert "'c'" in str(data.read("val").defects[0])
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 2 and batch.gt_valid.any()
    test = data.read("test")
    assert [r.file_name for r in test.records] == ["4.png", "5.png"]


def test_wanted_classes_are_chosen_and_ordered(own_data: Path) -> None:
    with trusting(("my_reader",)):
        data = DetectionDataModule(**settings(own_data, classes=["b"]))
        assert data.class_names == ["b"] and data.category_ids == [2]
        assert [r.labels.tolist() for r in data.read("train").records] == [[1], [1], [1], []]
        with pytest.raises(DataError, match="no class 'z'; there are: a, b"):
            DetectionDataModule(**settings(own_data, classes=["z"])).setup("fit")
        with pytest.raises(DataError, match="the reader gives no record `segments`"):
            DetectionDataModule(**settings(own_data, masks=True)).setup("fit")


def test_a_checkpoint_keeps_the_reader_and_asks_for_trust(own_data: Path) -> None:
    with trusting(("my_reader",)):
        data = DetectionDataModule(**settings(own_data))
    kept = json.loads(json.dumps(dict(data.hparams)))
    with pytest.raises(RecipeError, match="--trust my_reader"):
        DetectionDataModule(**kept)
    with trusting(("my_reader",)):
        again = DetectionDataModule(**kept)
    assert again.hparams == data.hparams and len(again.read("train").records) == 4


@recorded
class Recorded:
    """A reader that says how it was made."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, root: Path, split: str) -> Index:
        records = [Record.of(i, f"{i}.png", (60, 80), [[1, 2, 30, 40]], [1]) for i in range(self.count)]
        return Index(root, ("thing",), (7,), records)


def read_with(root: Path, split: str, count: int) -> Index:
    """A reader that is a function."""
    return Recorded(count)(root, split)


class Unknown(Recorded):
    """A reader that does not say how it was made."""


def test_readers_in_python(own_data: Path) -> None:
    for reader in (Recorded(3), partial(read_with, count=3)):
        data = DetectionDataModule(root=str(own_data), reader=reader)
        assert data.class_names == ["thing"] and data.category_ids == [7] and len(data.read("val").records) == 3
        with trusting((__name__.partition(".")[0],)):
            again = DetectionDataModule(**json.loads(json.dumps(dict(data.hparams))))
        assert len(again.read("train").records) == 3
    for reader, message in (
        (Unknown(3), "recipes.recorded"),
        (Recorded, "is a class"),
        (partial(Recorded), "is a class"),
    ):
        with pytest.raises(ValueError, match=message):
            DetectionDataModule(root=str(own_data), reader=reader)
    with pytest.raises(ValueError, match="a reader needs root"):
        DetectionDataModule(reader=Recorded(3))
    with pytest.raises(ValueError, match="leave format 'coco' out"):
        DetectionDataModule(root=str(own_data), format="coco", reader=Recorded(3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda index: [index], "gave a list, not a detection.data.records.Index"),
        (lambda index: replace(index, category_ids=()), "1 classes but 0 category_ids"),
        (lambda index: replace(index, records=[{}]), "a dict in place of"),
        (lambda index: change(index, image_id=1), "another image has the image_id 1"),
        (lambda index: change(index, boxes=[[1, 2, 3, 4]]), "boxes is list, not an array of float32 .1, 4."),
        (lambda index: change(index, boxes=np.zeros((2, 4), np.float32)), "boxes is float32 .2, 4."),
        (lambda index: change(index, labels=np.ones(1)), "labels is float64"),
        (lambda index: change(index, segments=[]), "0 segments for 1 objects"),
    ],
)
def test_a_broken_contract_is_named(spoil: Callable[[Index], Any], message: str) -> None:
    index = Recorded(2)(Path(), "train")
    assert check_index(index, Recorded(2)) is index
    with pytest.raises(DataError, match=f"the reader Recorded.*{message}"):
        check_index(spoil(index), Recorded(2))


def change(index: Index, **fields: Any) -> Index:
    return replace(index, records=[replace(index.records[0], **fields), *index.records[1:]])


def configuration(folder: Path, **options: Any) -> Path:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"data": settings(folder, **options)}))
    return path


def test_the_check_reads_what_training_reads(own_data: Path) -> None:
    splits = splits_of(data_of(configuration(own_data, test_split="val")))
    assert list(splits) == ["train", "val", "test"]
    data = data_of(configuration(own_data))
    assert data.class_names == ["a", "b"]
    for split, read in splits_of(data).items():
        own, trained = read(), data.read(split)  # type: ignore[arg-type]
        assert [r.labels.tolist() for r in own.records] == [r.labels.tolist() for r in trained.records]
    (own_data / "lists" / "train.csv").write_text("0.png;a;5;10;500;40")
    with pytest.raises(DataError, match="outside 80x60"):
        splits_of(data_of(configuration(own_data)))["train"]()


def test_the_check_script_takes_a_configuration(own_data: Path) -> None:
    def check(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_script("check_data", *arguments, cwd=own_data)

    done = check("--config", str(configuration(own_data)), "--json", "found.json")
    assert done.returncode == 1, done.stdout + done.stderr  # validation has an object of a class that training lacks
    found = json.loads((own_data / "found.json").read_text())
    assert [audit["split"] for audit in found] == ["train", "val"]
    assert found[0]["statistics"]["objects"] == 5 and found[0]["anchors"]["grid"]["min_size"] == 60
    wrong = check("--config", str(configuration(own_data, rood=1)))
    assert wrong.returncode == 2 and "rood" in wrong.stderr and "Traceback" not in wrong.stderr
    assert check().returncode == 2


@pytest.mark.slow
def test_training_takes_a_reader_and_augmentations(own_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [{"class_path": "albumentations.Rotate", "init_args": {"limit": 20, "p": 0.5}}]
    config = configuration(own_data, augmentations=steps, min_visibility=0.2)
    flags = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--wandb", "off", "--output", "runs"]
    flags += ["--model.detector", "fasterrcnn_efficientnet_lite0_fpn", "--data.max_size", "96"]
    flags += ["--model.detector.weights_backbone", "null", "--trainer.check_val_every_n_epoch", "1"]
    assert main(["--config", str(config), *flags]) == 0, capsys.readouterr().err
    (ckpt,) = own_data.glob("runs/run/*/last.ckpt")
    with pytest.raises(RecipeError, match="--trust my_reader"):
        DetectionDataModule.load_from_checkpoint(ckpt, weights_only=True)
    with trusting(("my_reader",)):
        data = DetectionDataModule.load_from_checkpoint(ckpt, weights_only=True)
    assert data.class_names == ["a", "b"] and type(data.augmentations[0]).__name__ == "Rotate"
    assert data.hparams["min_visibility"] == 0.2
