"""Parts of a user's own package, from the YAML that names them to every command that opens the checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.inference import Detector
from detection.interop import CheckpointError, load_detector
from detection.models.roi_heads import TwoFCHead
from detection.models.zoo import fasterrcnn_efficientnet_lite0_fpn
from detection.training.checkpoints import WholeFiles
from detection.training.module import DetectionModule
from tests.runs import TINY, rehearsed, run_script, scene_flags

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


class AbsoluteLoss(nn.Module):
    """L1 of the deltas."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, box_coder: object) -> Tensor:
        return self.weight * (deltas - box_coder.encode(gt_boxes, boxes)).abs().sum(dim=1)
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=4, val=2)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the user's module lies and in which a run was trained for two steps; the run is `run`."""
    home = tmp_path_factory.mktemp("user")
    (home / "my_parts.py").write_text(PARTS)
    activation = {"class_path": "torch.nn.LeakyReLU"}
    part = {"class_path": "my_parts.PlainHead", "init_args": {"width": 12, "activation": activation}}
    detector = {"class_path": "detection.fasterrcnn_efficientnet_lite0_fpn", "init_args": {"box_head": part}}
    detector["init_args"]["box_loss"] = {"class_path": "my_parts.AbsoluteLoss", "init_args": {"weight": 0.5}}
    (home / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "model": {"detector": detector}}))
    pairs = [pair for pair in zip(TINY[::2], TINY[1::2], strict=True) if "box_head" not in pair[0]]
    flags = [word for pair in pairs for word in pair]
    flags += ["--trainer.max_steps", "2", "--data.num_workers", "1", "--wandb", "off"]
    done = run_script("fit", "--config", "mine.yaml", *flags, *scene_flags(data), "--name", "mine", cwd=home)
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
@pytest.mark.parametrize("name", rehearsed(COMMANDS, "evaluate", "resume"))
def test_without_trust_a_command_says_what_to_do(name: str, trained: Path, data: Path) -> None:
    line = error_of(run_script(*command(name, trained, data), cwd=trained))
    assert "my_parts.PlainHead" in line or "my_parts.AbsoluteLoss" in line
    assert str(trained / "run") in line and "--trust my_parts" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", rehearsed(COMMANDS, "predict"))
def test_from_another_folder_a_command_says_where_it_has_looked(
    name: str, trained: Path, data: Path, tmp_path: Path
) -> None:
    line = error_of(run_script(*command(name, trained, data), "--trust", "my_parts", cwd=tmp_path))
    for word in (str(trained / "run"), "the recipe names my_parts.", "there is no module my_parts", str(tmp_path)):
        assert word in line


@pytest.mark.slow
@pytest.mark.parametrize("name", rehearsed(["evaluate", "predict", "export", "convert", "benchmark"], "predict"))
def test_with_trust_a_command_runs(name: str, trained: Path, data: Path) -> None:
    done = run_script(*command(name, trained, data), "--trust", "other_parts", "my_parts", cwd=trained)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_with_trust_a_run_goes_on(trained: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copy(trained / "my_parts.py", tmp_path)
    words = [word.format(run=tmp_path / "run", data=data) for word in COMMANDS["resume"]]
    done = run_script(*words, "--trust=my_parts", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_python_rebuilds_a_part_of_ones_own_where_it_is_trusted(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained / "run" / "last.ckpt"
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "path", list(sys.path))
    said = rf'{path}: the recipe names my_parts\.\w+: .*--trust my_parts .*trust=\("my_parts",\)'
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
        assert head.layers[1].out_features == 12 and module.roi_heads.box_loss.weight == 0.5
        for name, value in module.state_dict().items():
            assert torch.equal(value, saved[f"detector.{name}"]), name
    assert DetectionDataModule.load_from_checkpoint(path, trust=("my_parts",)).hparams["batch_size"] == 2
    del sys.modules["my_parts"]


def test_a_warning_at_the_start_names_the_parts_that_no_checkpoint_can_make_again(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class OwnHead(TwoFCHead):
        """Not in a module."""

    sizes = {"min_size": 64, "max_size": 96, "num_classes": 1 + len(scenes.CLASSES)}
    options: dict[str, Any] = {"rpn_post_nms_top_n_train": 50, "weights_backbone": None, "fpn_channels": 16}
    own = fasterrcnn_efficientnet_lite0_fpn(**sizes, **options, box_head=OwnHead(16))
    ours = fasterrcnn_efficientnet_lite0_fpn(**sizes, **options, box_head=TwoFCHead(16, 7, 32))
    splits = {f"{split}_split": file for split, (file, _) in scenes.SPLITS.items()}
    splits |= {f"{split}_images": images for split, (_, images) in scenes.SPLITS.items()}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "max_steps": 1, "limit_val_batches": 0, "accelerator": "cpu"}
    for detector, count in ((own, 1), (ours, 0)):
        caplog.clear()
        loaders = DetectionDataModule(
            str(data), "coco", batch_size=2, num_workers=0, min_size=64, max_size=96, **splits
        )
        module = DetectionModule(detector, scenes.CLASSES)
        trainer = L.Trainer(**quiet)
        trainer.fit(module, datamodule=loaders)
        records = {id(r): r.getMessage() for r in caplog.records}.values()  # a record may pass two handlers
        said = [message for message in records if "no recipe describes" in message]
        assert len(said) == count and all("box_head: " in m and "OwnHead" in m for m in said)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.strategy.connect(DetectionModule(own, scenes.CLASSES))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    for load in (DetectionModule.load_from_checkpoint, Detector.from_checkpoint):
        with pytest.raises(CheckpointError, match=r"own\.ckpt: it does not say how to build its detector"):
            load(tmp_path / "own.ckpt")
    again = DetectionModule.load_from_checkpoint(tmp_path / "own.ckpt", detector=own)
    assert again.class_names == list(scenes.CLASSES)


def of_builder(**arguments: Any) -> dict[str, Any]:
    return {"model": {"detector": {"class_path": "detection.fasterrcnn_resnet_fpn", "init_args": arguments}}}


EVIL = {"class_path": "evil_parts.make", "init_args": {}}
# Each form in which a configuration is parsed.
BODIES: dict[str, dict[str, Any]] = {
    "trust of its own": {"trust": ["evil_parts"], "model": {"detector": EVIL}},
    "coder": of_builder(box_coder=EVIL),
    "text": of_builder(box_coder=json.dumps(EVIL)),
    "name": of_builder(box_head="evil_parts.make"),
    "loss": of_builder(box_loss=EVIL),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", rehearsed(BODIES, "trust of its own", "text"))
def test_a_configuration_of_a_run_can_not_bring_code(form: str, data: Path, tmp_path: Path) -> None:
    """Fault: the config.yaml beside somebody's checkpoint names a module of theirs, in each form that is parsed |
    injected: such files, and the module | promise: one sentence; the module is not imported, and the parts of ours
    that open files are not trusted with it either."""
    (tmp_path / "evil_parts.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\ndef make(): ...\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(BODIES[form]))
    WholeFiles().save_checkpoint(
        {"loops": {}, "optimizer_states": [], "state_dict": {}, "epoch": 0, "global_step": 1},
        tmp_path / "last.ckpt",
    )
    done = run_script("fit", "--resume", str(tmp_path), *scene_flags(data), cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "mark").exists(), done.stderr
    assert "evil_parts" in error_of(done)
