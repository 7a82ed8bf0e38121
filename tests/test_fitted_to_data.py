"""What a run takes from its data: the split that it makes, and anchors that fit; kept for all that goes on from it."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torchvision.models import WeightsEnum
from torchvision.models.detection import (
    FasterRCNN_MobileNet_V3_Large_320_FPN_Weights,
    FasterRCNN_ResNet50_FPN_V2_Weights,
)

from detection import Detector, fasterrcnn_resnet_fpn
from detection.anchors import AnchorGenerator, default_anchors
from detection.batch import Batch
from detection.cli.by_size import by_size
from detection.cli.check import main as check_data
from detection.cli.configuration import strides_of
from detection.cli.fit import FitCLI
from detection.cli.fit import main as fit
from detection.data import scenes
from detection.data.anchor_fit import Boxes, Grid, generator_for, recall
from detection.data.coco import read_coco
from detection.data.datamodule import DetectionDataModule
from detection.data.records import DataError
from detection.data.splitting import Split
from detection.data.voc import read_voc
from detection.data.writers import write_voc
from detection.models import zoo
from detection.training.module import DetectionModule
from tests.runs import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A VOC folder of 15 drawn images and their list `train`, and no other list."""
    drawn = scenes.draw(tmp_path / "drawn", train=15, val=1)
    file, images = scenes.SPLITS["train"]
    write_voc(read_coco(drawn, file, images), tmp_path / "data", "train")
    return tmp_path / "data"


def train(folder: Path, *flags: str) -> FitCLI:
    data = ["--data.format", "voc", "--data.root", str(folder), "--data.num_workers", "0"]
    runs = ["--output", str(folder.parent / "runs"), "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
    cli = FitCLI(["--config", "quickstart", *TINY, *data, *runs, *flags])
    cli.fit()
    return cli


class Idle(L.LightningModule):
    """Learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-9)


def names(data: DetectionDataModule, split: str) -> list[str]:
    return [record.file_name for record in data.read(split).records]  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--data.val_fraction", "0.3"], ["--data.fold", "2/3"]])
def test_a_split_is_made_said_written_and_kept(
    flags: list[str], folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO):
        cli = train(folder, "--data.val_split", "null", *flags)
    said = "no validation split" if "0.3" in flags else "fold 2/3"
    assert caplog.text.count(f"INFO: {said}: ") + caplog.text.count(f" {said}: ") == 1
    made = Split.of_plain(json.loads((cli.folder / "split.json").read_text("utf-8")))
    assert len(made.val) in (4, 5) and sorted(made.train + made.val) == sorted(
        f"JPEGImages/{path.name}" for path in (folder / "JPEGImages").iterdir()
    )
    checkpoint = torch.load(cli.folder / "last.ckpt", weights_only=True)
    assert checkpoint["DetectionDataModule"]["split"] == made.to_plain()

    for old, new in ((made.train[0], "train_900"), (made.val[0], "train_901")):  # two images come
        stem = Path(old).stem
        shutil.copyfile(folder / "JPEGImages" / f"{stem}.jpg", folder / "JPEGImages" / f"{new}.jpg")
        shutil.copyfile(folder / "Annotations" / f"{stem}.xml", folder / "Annotations" / f"{new}.xml")
        with (folder / "ImageSets/Main/train.txt").open("a") as file:
            file.write(f"{new}\n")
    data = DetectionDataModule.load_from_checkpoint(cli.folder / "last.ckpt")  # as evaluate.py has it
    assert sorted(names(data, "val")) == sorted(names(data, "test")) == made.val
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = FitCLI(["--resume", str(cli.folder), "--trainer.max_steps", "3", *TINY])
        again.fit()
    assert "2 images came after the split was made: JPEGImages/train_900.jpg, JPEGImages/train_901.jpg" in caplog.text
    assert again.trainer.global_step == 3 and sorted(names(again.datamodule, "val")) == made.val
    assert "JPEGImages/train_901.jpg" in names(again.datamodule, "train")
    assert Split.of_plain(json.loads((cli.folder / "split.json").read_text("utf-8"))) == made
    assert torch.load(cli.folder / "last.ckpt", weights_only=True)["DetectionDataModule"]["split"] == made.to_plain()

    (folder / "JPEGImages" / Path(made.val[0]).name).unlink()
    (folder / "Annotations" / f"{Path(made.val[0]).stem}.xml").unlink()
    with pytest.raises(DataError, match=f"split that the run began with are gone: {made.val[0]}; restore"):
        DetectionDataModule.load_from_checkpoint(cli.folder / "last.ckpt").setup("validate")


def test_a_trainer_in_python_resumes_with_the_split_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Lightning reads the checkpoint when the data module is set up already."""

    def data(**options: Any) -> DetectionDataModule:
        return DetectionDataModule(str(folder), min_size=64, max_size=96, num_workers=0, **options)

    module = Idle()
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"default_root_dir": tmp_path, "enable_model_summary": False, "limit_val_batches": 1}
    trainer, first = L.Trainer(max_steps=1, **options), data(fold="1/3")
    trainer.fit(module, datamodule=first)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    second = data(fold="2/3")
    with pytest.warns(UserWarning, match="its own split, of val_fraction 0.2, fold 1/3; for one of .* fold 2/3 begin"):
        L.Trainer(max_steps=2, **options).fit(module, datamodule=second, ckpt_path=tmp_path / "some.ckpt")
    assert second.made_split() == first.made_split() and names(second, "val") == names(first, "val")
    dataset: Any = second.val_dataloader().dataset
    assert [record.file_name for record in second.read("val").records] == [
        dataset.store[i].file_name for i in range(len(dataset))
    ]


def test_settings_of_a_division(folder: Path) -> None:
    with pytest.raises(ValueError, match="fold 2/5 validates on images of train_split: leave val_split 'val' out"):
        DetectionDataModule(str(folder), val_split="val", fold="2/5")
    with pytest.raises(ValueError, match=r"val_fraction 1\.5 must lie between 0 and 1"):
        DetectionDataModule(str(folder), val_fraction=1.5)
    with pytest.raises(ValueError, match="fold 'second' is not understood"):
        DetectionDataModule(str(folder), fold="second")


def test_what_is_trained_on_does_not_validate(folder: Path) -> None:
    """With `trainval` the list `val` is no validation split, for its images train."""
    lists, stems = folder / "ImageSets/Main", sorted(path.stem for path in (folder / "JPEGImages").iterdir())
    (lists / "val.txt").write_text("\n".join(stems[:5]))
    (lists / "trainval.txt").write_text("\n".join(stems))
    (lists / "train.txt").write_text("\n".join(stems[5:]))
    for given, train, val in ((None, 10, 5), ("trainval", 12, 3)):
        data = DetectionDataModule(str(folder), train_split=given)
        assert (len(names(data, "train")), len(names(data, "val"))) == (train, val)
        assert not set(names(data, "train")) & set(names(data, "val"))


def test_a_validation_split_that_is_gone_is_not_made_anew(folder: Path, tmp_path: Path) -> None:
    """A model is never judged by images that it has learned from."""
    stems, val = sorted(path.stem for path in (folder / "JPEGImages").iterdir()), folder / "ImageSets/Main/val.txt"
    val.write_text("\n".join(stems[:5]))
    data = DetectionDataModule(str(folder), min_size=64, max_size=96, num_workers=0)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_steps": 1}
    trainer = L.Trainer(**options, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(Idle(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    val.unlink()
    with pytest.raises(DataError, match="there is no validation split"):
        DetectionDataModule.load_from_checkpoint(tmp_path / "some.ckpt").setup("validate")


def test_scenes_have_folds_too(tmp_path: Path) -> None:
    scenes.draw(tmp_path, train=6, val=2).rename(scenes.location(tmp_path))
    data = [DetectionDataModule(str(tmp_path), "scenes", fold=f"{part}/2", num_workers=0) for part in (1, 2)]
    for part in data:
        part.prepare_data()
    assert sorted(names(data[0], "train")) == sorted(names(data[1], "val"))
    assert len(names(data[0], "val")) == 3


@pytest.mark.slow
def test_anchors_follow_the_data_and_need_none_afterwards(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        cli = train(folder, "--model.detector.rpn_anchor_generator", "auto", "--data.fold", "1/3")
    data = cli.datamodule
    wanted = generator_for(data.read("train"), (4, 8, 16, 32, 64), 64, 96)
    found = cli.model.detector.rpn.anchor_generator
    assert found.recipe == wanted.recipe != default_anchors(5).recipe
    assert f"sizes {wanted.sizes}" in caplog.text
    assert (
        yaml.safe_load((cli.folder / "config.yaml").read_text())["model"]["detector"]["init_args"][
            "rpn_anchor_generator"
        ]
        == "auto"
    )  # as it was written, for another set of data
    shutil.rmtree(folder / "JPEGImages")
    detector = DetectionModule.load_from_checkpoint(cli.folder / "last.ckpt").detector
    assert detector.rpn.anchor_generator.recipe == wanted.recipe
    assert list(Detector.from_checkpoint(cli.folder / "last.ckpt").class_names) == data.class_names


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_anchors(folder: Path) -> None:
    first = train(folder, "--model.detector.rpn_anchor_generator", "auto", "--data.fold", "1/3")
    for path in (folder / "Annotations").iterdir():  # now all boxes are small, and other anchors would fit

        def shrunk(m: re.Match[str]) -> str:
            return f"{m[0].partition('<xmax>')[0]}<xmax>{int(m[1]) + 8}</xmax><ymax>{int(m[2]) + 8}</ymax>"

        corners = r"<xmin>(\d+)</xmin><ymin>(\d+)</ymin><xmax>\d+</xmax><ymax>\d+</ymax>"
        path.write_text(re.sub(corners, shrunk, path.read_text()))
    before = first.model.detector.rpn.anchor_generator.recipe
    again = FitCLI(["--resume", str(first.folder), "--trainer.max_steps", "3", *TINY])
    assert again.model.detector.rpn.anchor_generator.recipe == before
    assert generator_for(again.datamodule.read("train"), min_size=64, max_size=96).recipe != before
    again.fit()
    assert again.trainer.global_step == 3


@pytest.mark.slow
def test_the_command_that_the_check_ends_with_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data(["--root", str(folder), "--min-size", "64", "--max-size", "96"]) < 2
    program, command, *args = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("Next: "))
    assert (program, command) == ("detection", "fit")
    small = ["--data.num_workers", "0", "--output", str(folder.parent / "runs"), "--trainer.max_steps", "1"]
    cli = FitCLI([*args, *TINY[4:], *small, "--trainer.limit_val_batches", "1"])
    cli.fit()
    assert cli.trainer.global_step == 1 and (cli.folder / "split.json").is_file()


def test_auto_without_data_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"rpn_anchor_generator: auto is for `detection fit`.*generator_for\(index"):
        fasterrcnn_resnet_fpn(rpn_anchor_generator="auto")


@pytest.mark.parametrize(
    ("builder", "strides"),
    [
        ("detection.models.zoo.fasterrcnn_efficientnet_lite0_fpn", (4, 8, 16, 32, 64)),
        ("detection.models.zoo.maskrcnn_resnet50_fpn", (4, 8, 16, 32, 64)),
        ("detection.models.zoo.cascadercnn_resnet_fpn", (4, 8, 16, 32, 64)),
        ("detection.models.relatives.fasterrcnn_resnet_c4", (16,)),
    ],
)
def test_strides_are_those_of_the_detector(builder: str, strides: tuple[int, ...]) -> None:
    before = torch.random.get_rng_state()
    given = {"rpn_anchor_generator": "auto", "weights_backbone": "nowhere.pth", "num_classes": 3}
    assert strides_of({"class_path": builder, "init_args": given}) == strides
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("strides", [(4, 8, 16, 32, 64), (8, 16, 32), (16,)], ids=len)
@pytest.mark.parametrize(("name", "split"), [("bccd", "trainval"), ("cells", None)])
def test_recall_is_that_of_the_default_or_more(
    name: str, split: str | None, strides: tuple[int, ...], shared_data: Path
) -> None:
    index = read_voc(shared_data / name, split)
    boxes, size = Boxes.of(index), (240, 400)
    generator = generator_for(index, strides, *size)
    usual, fitted = (
        recall(boxes, Grid.of(anchors, strides, *size))["all"] for anchors in (default_anchors(len(strides)), generator)
    )
    assert fitted["recall_0.5"] > usual["recall_0.5"] and fitted["recall_0.7"] > usual["recall_0.7"] + 0.05
    assert len(set(generator.num_anchors_per_location())) == 1  # the RPN's head is shared
    torch.nn.Module.__call__(generator, [(4, 4)] * len(strides), strides, (64, 64))


def test_what_is_covered_keeps_the_default(shared_data: Path) -> None:
    index = read_voc(shared_data / "voc2012_sample100")
    assert generator_for(index, min_size=320, max_size=640).recipe == default_anchors(5).recipe


def test_grids_of_generators() -> None:
    wide = AnchorGenerator([[8], [16]], [0.5, 2.0], offset=0.5, round_anchors=False, ratio_is_width_over_height=True)
    grid = Grid.of(wide, (4, 8), 100, 200)
    assert grid == Grid(((8,), (16,)), (4, 8), (2.0, 0.5), 100, 200, 0.5, False)
    with pytest.raises(DataError, match=r"these of 2 levels can't be judged on strides \(4,\)"):
        Grid.of(wide, (4,), 100, 200)
    with pytest.raises(DataError, match="the same ratios on each level"):
        Grid.of(AnchorGenerator([[8], [16]], [[1.0], [2.0]]), (4, 8), 100, 200)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (1, (8000, 0.005, 0.5)),
        (61, (132, 0.005, 0.5)),  # 8,052 images seen
        (292, (28, 0.005, 0.5)),
        (667, (12, 0.005, 0.0)),  # as often as in the "1x", so without changes of colour
        (1_000, (12, 0.01, 0.0)),
        (9_999, (12, 0.01, 0.0)),
        (118_287, (12, 0.02, 0.0)),  # COCO
        (1_000_000, (1, 0.02, 0.0)),
        (5_000_000, (1, 0.02, 0.0)),
    ],
)
def test_length_rate_and_augmentation_by_size(images: int, expected: tuple[int, float, float]) -> None:
    rule = by_size(images)
    assert (rule.max_epochs, rule.lr, rule.photometric) == expected


def test_the_table_of_the_rule_is_the_rule() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "settings.md").read_text()
    table = text.partition("### By the number of images")[2].partition("###")[0].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 5
    for images, epochs, lr, photometric in rows[1:]:
        rule = by_size(int(images.replace(",", "")))
        assert [f"{rule.max_epochs}", f"{rule.lr:g}", f"{rule.photometric:g}"] == [epochs, lr, photometric], images


@pytest.fixture
def finetune(folder: Path, tmp_path: Path) -> list[str]:
    """The packaged configuration, made small, on a folder of 12 images to train on."""
    small = [
        "--data.min_size",
        "64",
        "--data.max_size",
        "96",
        "--data.num_workers",
        "0",
        "--trainer.accelerator",
        "cpu",
    ]
    return ["--config", "finetune", "--data.root", str(folder), "--output", str(tmp_path / "runs"), *small]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("builder", "published"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1),
        pytest.param(
            "fasterrcnn_resnet50_fpn_v2", FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1, marks=pytest.mark.rehearsal
        ),
    ],
)
def test_fine_tuning_begins_with_a_file_and_follows_the_size(
    builder: str,
    published: WeightsEnum,
    folder: Path,
    finetune: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A file of the name that torchvision gives it brings the rows of the classes of the same name."""
    for path in (folder / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<name>tile<", "<name>Car<"))  # the one that COCO knows
    torch.manual_seed(1)
    state = getattr(zoo, builder)(num_classes=91).state_dict()
    file = tmp_path / Path(published.url).name
    torch.save(state, file)
    short = ["--trainer.limit_val_batches", "1", "--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"]
    with caplog.at_level(logging.INFO):
        cli = FitCLI([*finetune, "--model.detector", builder, "--model.detector.weights", str(file), *short])
    images = len(cli.datamodule.read("train").records)
    assert f"by_size: from {images} training images follows model.lr 0.005, data.photometric 0.5;" in caplog.text
    assert "; given: the end of the run" in caplog.text
    own = {name: value.clone() for name, value in cli.model.detector.state_dict().items()}
    same = [name for name in own if name.startswith(("backbone.", "rpn.")) and not name.endswith("tracked")]
    assert len(same) > 50 and all(torch.equal(own[name], state[name]) for name in same)
    rows, old = (of["roi_heads.box_predictor.cls_score.weight"] for of in (own, state))
    names = cli.datamodule.class_names
    car, known = names.index("Car") + 1, published.meta["categories"].index("car")
    assert torch.equal(rows[0], old[0]) and torch.equal(rows[car], old[known])
    assert not any((old == row).all(dim=1).any() for i, row in enumerate(rows) if i not in (0, car))
    cli.fit()
    assert cli.trainer.global_step == 2
    assert not torch.equal(
        cli.model.detector.state_dict()["rpn.head.cls_logits.weight"], own["rpn.head.cls_logits.weight"]
    )
    checkpoint = torch.load(cli.folder / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["lr"] == 0.005
    assert checkpoint["datamodule_hyper_parameters"]["photometric"] == 0.5
    written = yaml.safe_load((cli.folder / "config.yaml").read_text())
    assert written["by_size"] is True and written["model"]["lr"] == 0.02  # as it was written, for another set of data
    assert list(Detector.from_checkpoint(cli.folder / "last.ckpt").class_names) == names


@pytest.mark.slow
def test_what_is_given_stays_and_the_length_follows(finetune: list[str], caplog: pytest.LogCaptureFixture) -> None:
    smaller = ["--model.detector", "fasterrcnn_mobilenet_v3_large_320_fpn", "--model.lr", "0.003"]
    with caplog.at_level(logging.INFO):
        cli = FitCLI([*finetune, *smaller, "--model.detector.weights", "null"])
    assert (
        "from 12 training images follows trainer.max_epochs 667, data.photometric 0.5; given: model.lr" in caplog.text
    )
    assert cli.trainer.max_epochs == 667 and cli.model.lr == 0.003
    off = FitCLI(
        [*finetune, *smaller, "--model.detector.weights", "null", "--by_size", "false", "--trainer.max_epochs", "3"]
    )
    assert (off.trainer.max_epochs, off.datamodule.hparams["photometric"]) == (3, 0.0)


def test_without_the_file_one_sentence_says_where_it_was_looked_for(
    finetune: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    assert fit(finetune) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    name = Path(FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url).name
    assert str(tmp_path / "cache" / "hub" / "checkpoints" / name) in said
    for way in ("detection convert download --weights FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1", "or give its path"):
        assert way in said
