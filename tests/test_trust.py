"""Parts of a user's own package, from the YAML that names them to every command that opens the checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.inference import Detector
from detection.interop import CheckpointError, load_detector
from detection.training.module import DetectionModule
from tests.runs import ROOT, TINY, scene_flags

PARTS = '''
from __future__ import annotations

import torch
from torch import Tensor, nn


class PlainHead(nn.Module):
    """One layer; made by the builder, which knows channels and size."""

    def __init__(self, in_channels: int, output_size: int, width: int = 8, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.out_channels = width
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(in_channels * output_size**2, width), activation or nn.ReLU()
        )

    def forward(self, pooled: Tensor) -> Tensor:
        return self.layers(pooled)


class FixedHead(PlainHead):
    """The same for a detector whose channels are known."""

    def __init__(self, width: int = 8, activation: nn.Module | None = None) -> None:
        super().__init__(16, 7, width, activation)
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=4, val=2)


def run(script: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script as a user would run it in a folder."""
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the user's module lies and in which a run was trained for two steps; the run is `run`."""
    home = tmp_path_factory.mktemp("user")
    (home / "my_parts.py").write_text(PARTS)
    activation = {"class_path": "torch.nn.LeakyReLU"}
    part = {"class_path": "my_parts.FixedHead", "init_args": {"width": 12, "activation": activation}}
    detector = {"class_path": "detection.fasterrcnn_efficientnet_lite0_fpn", "init_args": {"box_head": part}}
    (home / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "model": {"detector": detector}}))
    pairs = [pair for pair in zip(TINY[::2], TINY[1::2], strict=True) if "box_head" not in pair[0]]
    flags = [word for pair in pairs for word in pair]
    flags += ["--trainer.max_steps", "2", "--data.num_workers", "1", "--wandb", "off"]
    done = run("fit", "--config", "mine.yaml", *flags, *scene_flags(data), cwd=home)
    assert done.returncode == 0, done.stderr
    assert (
        "--trust my_parts" in done.stderr and "--trust my_parts" in next(home.glob("runs/mine/*/README.md")).read_text()
    )
    (folder,) = (home / "runs" / "mine").iterdir()
    folder.rename(home / "run")
    return home


COMMANDS = {
    "evaluate": ["evaluate", "--ckpt", "{run}/best.ckpt", "--accelerator", "cpu"],
    "predict": ["predict", "--ckpt", "{run}/best.ckpt", "--source", "{data}/val", "--device", "cpu"],
    "export": ["export", "--ckpt", "{run}/best.ckpt", "--output", "out/detector.pt2"],
    "convert": ["convert", "import", "--source", "{run}/best.ckpt", "--output", "out/detector.safetensors"],
    "take": ["convert", "export", "--source", "{run}/best.ckpt", "--output", "out/detector.pth", "--to", "torchvision"],
    "benchmark": ["benchmark", "family", "--ckpts", "[{run}/best.ckpt]", "--images", "1", "--rounds", "1"],
    "demo": ["demo", "--ckpt", "{run}/best.ckpt", "--device", "cpu", "--port", "0"],
    "resume": ["fit", "--resume", "{run}", "--trainer.max_steps", "3", "--wandb", "off"],
}


def command(name: str, trained: Path, data: Path) -> list[str]:
    return [word.format(run=trained / "run", data=data) for word in COMMANDS[name]]


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command ended with."""
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "not a whole file" not in lines[0]
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_without_trust_a_command_says_what_to_do(name: str, trained: Path, data: Path) -> None:
    line = error_of(run(*command(name, trained, data), cwd=trained))
    for word in (str(trained / "run"), "my_parts.FixedHead", "--trust my_parts"):
        assert word in line


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_from_another_folder_a_command_says_where_it_has_looked(
    name: str, trained: Path, data: Path, tmp_path: Path
) -> None:
    line = error_of(run(*command(name, trained, data), "--trust", "my_parts", cwd=tmp_path))
    for word in (str(trained / "run"), "my_parts.FixedHead", "there is no module my_parts", str(tmp_path)):
        assert word in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "predict", "export", "convert", "benchmark"])
def test_with_trust_a_command_runs(name: str, trained: Path, data: Path) -> None:
    done = run(*command(name, trained, data), "--trust", "other_parts", "my_parts", cwd=trained)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_with_trust_a_run_goes_on(trained: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copy(trained / "my_parts.py", tmp_path)
    words = [word.format(run=tmp_path / "run", data=data) for word in COMMANDS["resume"]]
    done = run(*words, "--trust=my_parts", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_python_rebuilds_a_part_of_ones_own_where_it_is_trusted(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained / "run" / "last.ckpt"
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "path", list(sys.path))
    said = rf'{path}: the recipe names my_parts.FixedHead: .*--trust my_parts .*trust=\("my_parts",\)'
    for load in (Detector.from_checkpoint, load_detector, DetectionModule.load_from_checkpoint):
        with pytest.raises(CheckpointError, match=said):
            load(path)
        with pytest.raises(CheckpointError, match=r"trust takes the name .* not my_parts\.py"):
            load(path, trust=["my_parts.py"])
    saved = torch.load(path, weights_only=True)["state_dict"]
    for module in (
        DetectionModule.load_from_checkpoint(path, trust=("my_parts",)).detector,
        load_detector(path, trust="my_parts"),
    ):
        head = module.roi_heads.get_submodule("box_head")
        assert type(head).__module__ == "my_parts" and isinstance(head.layers[2], torch.nn.LeakyReLU)
        assert head.layers[1].out_features == 12
        for name, value in module.state_dict().items():
            assert torch.equal(value, saved[f"detector.{name}"]), name
    assert DetectionDataModule.load_from_checkpoint(path, trust=("my_parts",)).hparams["batch_size"] == 2
    del sys.modules["my_parts"]
