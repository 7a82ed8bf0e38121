"""The command `fit`, driven as a user would on tiny data: its folder, resuming, reloading."""

from __future__ import annotations

import csv
import gc
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image

from detection.cli.fit import FitCLI, main
from detection.data import scenes
from detection.data.coco import read_coco
from detection.data.dataset import DetectionDataset
from detection.data.images import read_image
from detection.data.samplers import TrainBatchSampler
from detection.inference import Detector
from detection.interop import save_detector
from detection.models.fast import accelerate
from detection.training.module import DetectionModule
from tests.runs import ROOT, scene_flags

SMALL = [
    *("--config", "quickstart"),
    *("--data.num_workers", "0"),
    *("--data.min_size", "64"),
    *("--model.detector.fpn_channels", "16"),
    *("--model.detector.weights_backbone", "null"),
    *("--trainer.accelerator", "cpu"),
]


def read_metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=8, val=3)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FitCLI, Path]:
    """A finished run of two epochs and its folder."""
    output = tmp_path_factory.mktemp("runs")
    flags = ["--trainer.max_epochs", "2", "--data.batch_size", "4", "--output", str(output)]
    flags += ["--trainer.log_every_n_steps", "1"]
    cli = FitCLI([*flags, *SMALL, *scene_flags(data)])
    cli.fit()
    (folder,) = (output / "quickstart").iterdir()
    return cli, folder


def test_run_folder_holds_what_it_should(run: tuple[FitCLI, Path]) -> None:
    names = {path.name for path in run[1].iterdir()}
    files = {"README.md", "config.yaml", "metrics.csv", "plots", "predictions.jpg"}
    assert names == files | {"best.ckpt", "last.ckpt", "previous.ckpt", ".lock"}
    plots = {path.stem for path in (run[1] / "plots").iterdir()}
    assert plots == {"confusion", "curves", "mistakes", "precision_recall", "reliability", "scores", "sizes"}
    assert min(Image.open(run[1] / "predictions.jpg").size) > 100
    readme = (run[1] / "README.md").read_text()
    assert f'Detector.from_checkpoint("{run[1]}/best.ckpt")' in readme


def test_a_run_without_checkpoints_does_not_speak_of_them(data: Path, tmp_path: Path) -> None:
    flags = ["--trainer.max_steps", "1", "--trainer.enable_checkpointing", "false", "--output", str(tmp_path)]
    FitCLI([*flags, *SMALL, *scene_flags(data)]).fit()
    (folder,) = (tmp_path / "quickstart").iterdir()
    assert not list(folder.glob("*.ckpt"))
    assert "config.yaml" in (folder / "README.md").read_text() and ".ckpt" not in (folder / "README.md").read_text()


def test_map_is_logged_each_epoch_and_best_is_the_largest(run: tuple[FitCLI, Path]) -> None:
    rows = [row for row in read_metrics(run[1]) if row["val/map"]]
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    assert all(math.isfinite(float(row["val/loss"])) for row in rows)
    best = torch.load(run[1] / "best.ckpt", weights_only=True)
    last = torch.load(run[1] / "last.ckpt", weights_only=True)
    largest = max(rows, key=lambda row: float(row["val/map"]))
    assert best["epoch"] == int(largest["epoch"])
    assert last["epoch"] == 1


@pytest.mark.parametrize("rarely", [["--trainer.limit_val_batches", "0"], ["--trainer.check_val_every_n_epoch", "9"]])
def test_a_run_that_is_never_validated_is_saved_after_each_epoch(rarely: list[str], data: Path, tmp_path: Path) -> None:
    flags = ["--trainer.max_epochs", "1", "--data.batch_size", "4", "--output", str(tmp_path)]
    FitCLI([*flags, *rarely, *SMALL, *scene_flags(data)]).fit()
    (folder,) = (tmp_path / "quickstart").iterdir()
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert last["epoch"] == 0 and last["global_step"] == 2


def test_a_validation_split_without_objects_is_refused_unless_none_is_wanted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / scenes.SPLITS["val"][0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    flags = ["--trainer.max_steps", "1", "--data.batch_size", "2", "--output", str(tmp_path), "--wandb", "off"]
    flags += [*SMALL, *scene_flags(tmp_path / "data")]
    assert main(flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    words = "the val split: none of 3 images has an object; there is nothing to validate on: name the right split, or"
    assert f"{words} train without (--trainer.limit_val_batches 0)" in line
    assert main([*flags, "--name", "without", "--trainer.limit_val_batches", "0"]) == 0
    (folder,) = (tmp_path / "without").iterdir()
    readme = (folder / "README.md").read_text()
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["last.ckpt"]
    assert f"{folder}/last.ckpt" in readme and "best.ckpt" not in readme


def test_training_on_from_a_file_keeps_classes_of_the_same_name(
    run: tuple[FitCLI, Path], data: Path, tmp_path: Path
) -> None:
    chosen = ["star", "ball"]  # in another order, and the others left out
    save_detector(tmp_path / "old.safetensors", run[0].model.detector, scenes.CLASSES)
    part = {"class_path": "detection.detector_for_classes", "init_args": {"path": str(tmp_path / "old.safetensors")}}
    (tmp_path / "on.yaml").write_text(yaml.safe_dump({"name": "on", "model": {"detector": part}}))
    flags = ["--config", str(tmp_path / "on.yaml"), "--output", str(tmp_path), "--data.classes", str(chosen)]
    new = FitCLI([*flags, *scene_flags(data)]).model.detector
    rows = [0, *(scenes.CLASSES.index(name) + 1 for name in chosen)]
    old, own = (d.roi_heads.get_submodule("box_predictor.cls_score") for d in (run[0].model.detector, new))
    assert torch.equal(own.weight, old.weight[rows]) and new.num_classes == 3


def test_throughput_is_logged(run: tuple[FitCLI, Path]) -> None:
    rows = [row for row in read_metrics(run[1]) if row["images/s"]]
    assert len(rows) == 4
    assert all(float(row["images/s"]) > 0 and 0 <= float(row["time/data"]) <= 1 for row in rows)
    assert float(rows[0]["lr"]) < 0.03 * 4 / 16  # scaled to the batch, and warming up


def test_checkpoint_alone_detects_the_same(run: tuple[FitCLI, Path], data: Path) -> None:
    cli, folder = run
    images = [torch.from_numpy(read_image(path)).permute(2, 0, 1) for path in sorted((data / "val").iterdir())]
    loaded = DetectionModule.load_from_checkpoint(folder / "last.ckpt")
    assert loaded.class_names == list(scenes.CLASSES)
    accelerate(loaded.detector, torch.device("cpu"))  # the forms that the trainer has chosen
    for module in (cli.model, loaded):  # so little training finds nothing: show what it would find
        module.detector.roi_heads.score_thresh = 0.0
    found, expected = loaded.detector.predict(images), cli.model.detector.predict(images)
    assert sum(len(detection["scores"]) for detection in expected) > 0
    for got, want in zip(found, expected, strict=True):
        for name, value in want.items():
            assert torch.equal(got[name], value), name


def test_a_folder_is_its_best_checkpoint_in_python_too(run: tuple[FitCLI, Path], tmp_path: Path) -> None:
    by_folder, by_file = (Detector.from_checkpoint(path, "cpu") for path in (run[1], run[1] / "best.ckpt"))
    assert by_folder.class_names == scenes.CLASSES
    for own, wanted in zip(by_folder.model.parameters(), by_file.model.parameters(), strict=True):
        assert torch.equal(own, wanted)
    with pytest.raises(FileNotFoundError, match=rf"no best.ckpt or last.ckpt in .*; name one of its runs.*{run[1]}"):
        Detector.from_checkpoint(run[1].parent)


def test_saved_configuration_repeats_the_run(run: tuple[FitCLI, Path], data: Path) -> None:
    saved = yaml.safe_load((run[1] / "config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 2
    assert saved["data"]["root"] == str(data)
    assert saved["model"]["detector"]["init_args"]["num_classes"] is None  # follows from the data, then as now
    again = FitCLI(["--config", str(run[1] / "config.yaml")])
    again.clean_up()
    assert again.config.as_dict()["data"] == run[0].config.as_dict()["data"]
    assert again.model.detector.num_classes == 1 + len(scenes.CLASSES)


def test_a_run_at_its_end_says_what_would_make_it_longer(
    run: tuple[FitCLI, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = (run[1] / "last.ckpt").read_bytes()
    assert main(["--resume", str(run[1])]) == 0
    said = capsys.readouterr().err
    assert "no batch was left to train on: to go on further raise --trainer.max_epochs" in said
    assert "Restored" not in said and (run[1] / "last.ckpt").read_bytes() == saved


def test_resume_goes_on_in_the_same_folder(run: tuple[FitCLI, Path]) -> None:
    before, runs = read_metrics(run[1]), len(list(run[1].parent.iterdir()))
    assert main(["--trainer.max_epochs", "3", "--resume", str(run[1])]) == 0  # all else as in its config.yaml
    after = read_metrics(run[1])
    assert len(list(run[1].parent.iterdir())) == runs
    assert [{k: row[k] for k in before[0]} for row in after[: len(before)]] == before
    assert {row["epoch"] for row in after[len(before) :]} == {"2"}
    assert torch.load(run[1] / "last.ckpt", weights_only=True)["epoch"] == 2


def test_a_run_that_ends_within_an_epoch_is_validated(data: Path, tmp_path: Path) -> None:
    flags = ["--trainer.max_steps", "3", "--data.batch_size", "4", "--output", str(tmp_path)]
    assert main([*flags, *SMALL, *scene_flags(data), "--trainer.max_epochs=-1"]) == 0
    (folder,) = (tmp_path / "quickstart").iterdir()
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    assert [int(row["step"]) for row in read_metrics(folder) if row["val/map"]] == [1, 2]


@pytest.mark.parametrize("flags", [["--trainer.strategy", "ddp"], ["--trainer.devices", "2"]])
def test_gradients_of_ddp_lie_in_what_is_sent(flags: list[str], data: Path, tmp_path: Path) -> None:
    strategy = FitCLI([*flags, "--output", str(tmp_path), *SMALL, *scene_flags(data)]).trainer.strategy
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True}  # and it looks for no unused parameters


def test_what_never_trains_leaves_no_folder(data: Path, tmp_path: Path) -> None:
    cli = FitCLI([*SMALL, *scene_flags(data), "--output", str(tmp_path)])
    assert cli.folder.is_dir()  # another run of this second must not take it
    del cli
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_leaves_nothing_on_disk(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "detection")
    flags = ["--trainer.fast_dev_run", "true", "--data.batch_size", "2", "--output", str(tmp_path / "runs")]
    cli = FitCLI([*flags, *SMALL, *scene_flags(data)])
    cli.fit()
    assert cli.trainer.global_step == 1 and cli.trainer.callback_metrics["val/map"] >= 0
    assert not (tmp_path / "runs").exists() and str(cli.folder) not in caplog.text


def test_printed_learning_rate_follows_accumulation(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "detection")
    flags = ["--trainer.fast_dev_run", "4", "--trainer.accumulate_grad_batches", "4", "--data.batch_size", "2"]
    cli = FitCLI([*flags, "--model.lr", "0.02", *SMALL, *scene_flags(data), "--output", str(tmp_path)])
    cli.fit()
    assert cli.trainer.optimizers[0].defaults["lr"] == pytest.approx(0.02 * 2 * 4 / 16)
    assert any("learning rate 0.01: 0.02 for 16 images, scaled to 8 a step; 1 steps" in m for m in caplog.messages)


@pytest.mark.slow
def test_wandb_without_a_key_runs_offline_and_asks_nothing(data: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    flags = ["--wandb", "auto", "--trainer.max_epochs", "1", "--data.batch_size", "4", "--output", "runs"]
    command = [sys.executable, str(ROOT / "scripts" / "fit.py"), *flags, *SMALL, *scene_flags(data)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "not logged in" in done.stdout + done.stderr
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


WATCH = """
import json, os, lightning as L, torch

class Watch(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append([int(batch.gt_valid.sum()), float(outputs["loss"])])

    def on_fit_end(self, trainer, module):
        weights = torch.cat([p.detach().flatten().double() for p in module.parameters()])
        report = {"seen": self.seen, "weights": [float(weights.sum()), float(weights.abs().sum())]}
        report |= {"threads": torch.get_num_threads(), "map": float(trainer.callback_metrics["val/map"])}
        with open(f"rank{trainer.global_rank}.json", "w") as file:
            json.dump(report, file)
"""


def half_empty_data(root: Path) -> tuple[Path, int]:
    """A COCO folder in which half of the images hold nothing, and a seed that gives rank 1 of 2 only those."""
    images, annotations = [], []
    for i in range(8):
        pixels = np.full((64, 64, 3), 90, np.uint8)
        if i < 4:
            pixels[16:48, 16:48] = (200, 60, 60)
            box = {
                "id": i + 1,
                "image_id": i + 1,
                "category_id": 1,
                "bbox": [16, 16, 32, 32],
                "area": 1024,
                "iscrowd": 0,
            }
            annotations.append(box)
        Image.fromarray(pixels).save(root / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": 64, "height": 64})
    content: dict[str, Any] = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "square"}]
    (root / "all.json").write_text(json.dumps(content))
    store = DetectionDataset(read_coco(root, "all.json"), None).store  # type: ignore[arg-type]
    for seed in range(1000):
        batches = [[i for i, _ in batch] for batch in TrainBatchSampler(store, 4, seed)]
        if min(batches[1]) >= 4:  # rank 1 takes every second batch
            return root, seed
    raise AssertionError("no such seed")


@pytest.mark.slow
def test_two_processes_of_which_one_sees_no_object(tmp_path: Path) -> None:
    root, seed = half_empty_data(tmp_path)
    (tmp_path / "watch.py").write_text(WATCH)
    flags = [
        "--config",
        "quickstart",
        "--data.format",
        "coco",
        "--data.root",
        str(root),
        "--data.batch_size",
        "4",
        "--data.seed",
        str(seed),
    ]
    flags += ["--data.train_split", "all.json", "--data.val_split", "all.json", "--output", "runs"]
    flags += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    flags += ["--trainer.callbacks+=watch.Watch"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # watch.py lies in the working directory
    command = [sys.executable, str(ROOT / "scripts" / "fit.py"), *flags, *SMALL]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [objects for objects, _ in ranks[0]["seen"]] == [4]
    assert [objects for objects, _ in ranks[1]["seen"]] == [0]
    assert all(math.isfinite(loss) for rank in ranks for _, loss in rank["seen"])
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["map"] == ranks[1]["map"]
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    assert {"best.ckpt", "last.ckpt", "metrics.csv", "config.yaml"} <= {path.name for path in folder.iterdir()}
