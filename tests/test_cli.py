"""Flags and configurations of the command line: what is completed, filled in and printed, and mistakes."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from detection.cli.configuration import CONFIGS, expand, fit_detector_to_data
from detection.cli.fit import FitCLI, main
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from tests.runs import ROOT, scene_flags


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=8, val=3)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data.bath_size", "4"], "--data.batch_size"),
        (["--data.batch", "4"], "--data.batch_size"),
        (["--trainer.max_epoch=3"], "--trainer.max_epochs"),
        (["--batch_size", "4"], "--data.batch_size"),
        (["--model.warmup_steps", "9"], "instead of warmup_steps write --model.schedule.warmup_steps"),
        (["--model.optimizer", "adamw"], "instead of adamw write torch.optim.AdamW"),
        (["--model.schedule", "multistep"], "instead of multistep write detection.MultiStepSchedule"),
        (["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.1"], "it is --model.lr"),
        (["--model.detector.min_sze", "320"], "--model.detector.min_size"),
        (["--model.detector", "fasterrcn_resnet50_fpn"], "fasterrcnn_resnet50_fpn"),
        (["--data.format", "coko"], "coco"),
        (["--config", "nope.yaml"], "nope.yaml"),
    ],
)
def test_misspelt_flag_fails_with_the_nearest(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert expected in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(("old", "new"), [("box_beta", "box_loss"), ("rpn_overlap_loss", "rpn_box_loss")])
def test_an_argument_of_older_builders_says_what_took_its_place(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = {"class_path": "detection.fasterrcnn_resnet_fpn", "init_args": {old: 1.0}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"model": {"detector": detector}}))
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(tmp_path / "old.yaml")])
    assert stop.value.code == 2 and f"instead of {old} give {new}" in capsys.readouterr().err


def test_misspelt_key_in_a_file_fails_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["data"]["batchsize"] = 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "config.yaml")])
    assert "batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data.format", "voc"], "needs root"),
        (["--data.format", "voc", "--data.root", "/nowhere"], "/nowhere"),
        (["--resume", "/nowhere"], "no checkpoint at /nowhere"),
        (["--weights", "/nowhere"], "no checkpoint at /nowhere"),
        (["--model.detector.num_classes", "3"], "num_classes=7"),
        (["--model.detector.weights_backbone", "/nowhere.pth"], "/nowhere.pth"),
    ],
)
def test_mistake_is_one_line_and_code_2(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--trainer.accelerator", "cpu"]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_configuration_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--config", path.stem, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    assert printed["name"] == path.stem
    for section in ("trainer", "data", "model"):
        for key, value in written[section].items():
            if key in ("optimizer", "schedule"):  # parts, whose defaults are filled in
                part = printed[section][key]
                assert part["class_path"] == value["class_path"]
                assert part["init_args"] | value.get("init_args", {}) == part["init_args"]
            elif key not in ("detector", "proposals"):
                assert printed[section][key] == value, key
    detector = printed["model"]["detector"]["init_args"]
    assert {key for key in written["model"]["detector"].get("init_args", {}) if key not in detector} == set()


def test_short_names_are_completed() -> None:
    assert expand([]) == ["--config", str(CONFIGS / "quickstart.yaml")]
    assert expand(["--config=voc"]) == [f"--config={CONFIGS / 'voc.yaml'}"]
    assert expand(["-c", "voc", "--name", "voc"]) == ["-c", str(CONFIGS / "voc.yaml"), "--name", "voc"]
    flags = expand(["--model.detector", "fasterrcnn_resnet50_fpn"])
    assert flags[-1] == "detection.models.zoo.fasterrcnn_resnet50_fpn"


def test_flags_override_a_configuration_wherever_they_stand() -> None:
    config = str(CONFIGS / "voc.yaml")
    assert expand(["--model.lr", "0.5", "--config", "voc"]) == ["--config", config, "--model.lr", "0.5"]
    args = ["--config=voc", "--name", "a", "-c", "debug", "--name=b"]
    assert expand(args)[3:] == ["--name", "a", "--name=b"] and expand(args)[0] == f"--config={config}"


def test_another_builder_takes_classes_and_sizes_from_the_data(data: Path) -> None:
    flags = ["--model.detector", "fasterrcnn_mobilenet_v3_large_320_fpn", "--data.min_size=[64,96]"]
    cli = FitCLI([*flags, "--data.max_size", "200", "--trainer.accelerator", "cpu", *scene_flags(data)])
    transform = cli.model.detector.transform
    assert cli.model.detector.num_classes == 7
    assert (tuple(transform.min_size), transform.max_size) == ((64, 96), 200)


def test_what_the_user_sets_stays() -> None:
    from jsonargparse import Namespace

    path = "detection.fasterrcnn_resnet50_fpn"
    detector = Namespace(class_path=path, init_args=Namespace(num_classes=None, min_size=500, max_size=1333))
    fit_detector_to_data(detector, DetectionDataModule(min_size=160, max_size=320))
    assert detector.init_args.as_dict() == {"num_classes": 7, "min_size": 500, "max_size": 320}


HELP = f"""
import runpy, sys, torch
sys.argv = [{str(ROOT / "scripts" / "fit.py")!r}, "--help", "all"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
assert not torch.cuda.is_initialized()
"""


def test_help_is_complete_and_leaves_cuda_alone() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for flag in (
        "--config",
        "--resume",
        "--wandb",
        "--trainer.devices",
        "--trainer.precision",
        "--data.root",
        "--model.lr",
    ):
        assert flag in done.stdout


@pytest.mark.rehearsal
def test_help_is_quick() -> None:
    libraries = "import albumentations, lightning.pytorch.cli, timm, torchvision"
    least = {libraries: math.inf, HELP: math.inf}  # processor time of each, the better of two turns
    for turn in [libraries, HELP] * 2:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", turn], capture_output=True, check=True, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        least[turn] = min(least[turn], seconds)
    # Against the libraries' own imports, which no flag can do without: seconds alone would measure the machine.
    assert least[HELP] < 1.5 * least[libraries], least.values()
