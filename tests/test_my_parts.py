"""The parts of `examples/my_parts` as a user has them: outside the package, by YAML, through all commands, and back."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml

from detection import Detector
from detection.data.datamodule import DetectionDataModule
from detection.fitting import PartError
from detection.interop import CheckpointError, load_detector
from detection.models.fast import accelerate
from detection.models.two_stage import TwoStageDetector
from detection.recipes import named_in, rebuild
from detection.training.module import DetectionModule
from detection.trust import EVERYTHING, RecipeError
from tests.runs import ROOT, differences, rehearsed, rows, run_script, state

EXAMPLES = ROOT / "examples"
WHOLE = yaml.safe_load((EXAMPLES / "my_parts.yaml").read_text())
PARTS = sorted(set(re.findall(r"my_parts\.\w+\.\w+", (EXAMPLES / "my_parts.yaml").read_text())))
SHORT = ["--trainer.max_epochs", "5", "--trainer.accelerator", "cpu", "--data.num_workers", "1", "--wandb", "off"]
SHORT += ["--trainer.log_every_n_steps", "1", "--save_every", "0", "--trainer.num_sanity_val_steps", "0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the package, the configurations, and a few scenes."""
    folder = tmp_path_factory.mktemp("user") / "work"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("my_scenes", "runs", "__pycache__"))
    done = start([str(folder / "draw_scenes.py"), "my_scenes", "8", "4"], folder).wait(100)
    assert done == 0, (folder / "log.txt").read_text()
    return folder


@pytest.fixture
def my_parts(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder as working directory of this process, which forgets the package afterwards."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path, str(home)])
    forget()
    yield home
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_parts"]:
        del sys.modules[name]


def start(command: list[str], cwd: Path) -> subprocess.Popen[bytes]:
    """A script in a session of its own; what it says is in `log.txt`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (cwd / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *command], cwd=cwd, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def run(script: str, *args: str, cwd: Path) -> tuple[int, str]:
    """The exit code of a script, and what it said."""
    done = run_script(script, *args, cwd=cwd)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The folder of ten steps with all parts at once, which nothing disturbed."""
    code, said = run("fit", "--config", "my_parts.yaml", *SHORT, "--output", "whole", cwd=home)
    assert code == 0, said
    (folder,) = (home / "whole" / "my_parts").iterdir()
    return folder


@pytest.fixture(scope="module")
def resumed(home: Path) -> Path:
    """The folder of the same run, killed on its way and begun again with `--resume`."""
    fit = str(ROOT / "scripts" / "fit.py")
    process = start([fit, "--config", "my_parts.yaml", *SHORT], home)
    try:
        for _ in range(1200):
            tables = list(home.glob("runs/my_parts/*/metrics.csv"))
            if tables and (tables[0].with_name("last.ckpt")).exists() and len(rows(tables[0].parent)) > 3:
                break
            assert process.poll() is None, (home / "log.txt").read_text()
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    (folder,) = (home / "runs" / "my_parts").iterdir()
    assert 0 < state(folder / "last.ckpt")["global_step"] < 10
    code, said = run("fit", "--resume", str(folder), "--trust", "my_parts", cwd=home)
    assert code == 0, said
    return folder


@pytest.mark.slow
def test_killed_run_goes_on_as_if_it_had_not_been(whole: Path, resumed: Path) -> None:
    """So own samplers and augmentations draw the same numbers again, and the own optimiser has kept what it knew."""
    assert state(resumed / "last.ckpt")["global_step"] == 10
    assert differences(state(whole / "last.ckpt"), state(resumed / "last.ckpt")) == []
    assert rows(whole) == rows(resumed)
    assert any(row.get("val/CountError") for row in rows(resumed))
    moved = state(resumed / "last.ckpt")["optimizer_states"][0]["state"]
    assert moved and all("momentum" in value for value in moved.values())


@pytest.mark.slow
def test_checkpoint_names_every_part_in_plain_values(resumed: Path) -> None:
    saved = torch.load(resumed / "last.ckpt", weights_only=True)
    named = named_in([saved["hyper_parameters"], saved["datamodule_hyper_parameters"]])
    assert sorted(path for path in named if path.startswith("my_parts.")) == PARTS
    assert len(PARTS) == len(list((EXAMPLES / "my_parts").glob("[!_]*.py"))) - 1  # all but the proposer


COMMANDS = {
    "evaluate": "evaluate --ckpt {run}/best.ckpt --accelerator cpu --output evaluation",
    "predict": "predict --ckpt {run}/best.ckpt --source {images} --device cpu --score_thresh 0.01 --output predictions",
    "export": "export --ckpt {run}/best.ckpt --images {images} --output detector.onnx",
    "convert": "convert import --source {run}/best.ckpt --output detector.safetensors",
    "resume": "fit --resume {run}",
}


def command(name: str, home: Path, folder: Path) -> list[str]:
    (images,) = home.glob("my_scenes/scenes-*/val")
    return COMMANDS[name].format(run=folder, images=images).split()


@pytest.mark.slow
@pytest.mark.parametrize("name", rehearsed(COMMANDS, "export"))
def test_without_trust_a_command_says_which_part_and_what_to_do(name: str, home: Path, resumed: Path) -> None:
    code, said = run(*command(name, home, resumed), cwd=home)
    assert code == (2 if name == "resume" else 1) and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"the recipe names my_parts\.\w+\.\w+: if you trust the code of my_parts, say so with --trust my_parts", line
    )


@pytest.mark.slow
def test_with_trust_it_is_evaluated_and_predicts(home: Path, resumed: Path) -> None:
    for name, wanted in (("evaluate", ["evaluation/report.html"]), ("predict", ["predictions/predictions.json"])):
        code, said = run(*command(name, home, resumed), "--trust", "my_parts", cwd=home)
        assert code == 0, said
        assert all((home / file).is_file() for file in wanted)
    assert "4 images" in said


@pytest.mark.slow
def test_with_trust_it_is_exported_and_the_file_agrees(home: Path, resumed: Path) -> None:
    pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')
    code, said = run(*command("export", home, resumed), "--trust", "my_parts", cwd=home)
    assert code == 0, said
    found = r"(\d+) detections on 4 images, 0 in one .* others ([\d.e-]+) pixels, ([\d.e-]+) of a score"
    ((count, box, score),) = re.findall(found, said)
    assert int(count) > 0 and float(box) < 1e-2 and float(score) < 1e-4


@pytest.mark.slow
def test_with_trust_it_is_converted_and_loaded(my_parts: Path, resumed: Path) -> None:
    code, said = run(*command("convert", my_parts, resumed), "--trust", "my_parts", cwd=my_parts)
    assert code == 0, said
    with pytest.raises(CheckpointError, match=r'my_parts\.backbone\.SmallNet: .*trust=\("my_parts",\)'):
        load_detector(my_parts / "detector.safetensors")
    converted = load_detector(my_parts / "detector.safetensors", trust=("my_parts",))
    assert_same(converted, load_detector(resumed / "best.ckpt", trust=("my_parts",)))
    assert type(converted.backbone).__name__ == "SmallNet"


def assert_same(one: TwoStageDetector, other: TwoStageDetector) -> None:
    """The same weights by name and, in the quick forms of parts that training has, the same detections."""
    assert differences(dict(one.state_dict()), dict(other.state_dict())) == []
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand((3, *size), generator=generator) for size in ((80, 120), (130, 90))]
    found, wanted = (accelerate(detector, "cpu").predict(images) for detector in (one, other))
    assert sum(len(detection["scores"]) for detection in found) > 0
    assert differences(found, wanted) == []


MODEL, DATA = WHOLE["model"], WHOLE["data"]
LATTICE = yaml.safe_load((EXAMPLES / "my_proposer.yaml").read_text())["model"]["detector"]
SMALL = {"weights_backbone": None, "fpn_channels": 16, "min_size": 64, "max_size": 96, "box_score_thresh": 0.0}
# Each part by itself: arguments of the detector, of the module, of the data. All read with the own reader.
ALONE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    **{
        name: ({name: part}, {}, {}) for name, part in MODEL["detector"]["init_args"].items() if "my_parts" in str(part)
    },
    "rpn": ({"rpn": LATTICE["init_args"]["rpn"]}, {}, {}),
    **{name: ({}, {name: MODEL[name]}, {}) for name in ("optimizer", "schedule", "metrics")},
    "augmentations": ({}, {}, {"augmentations": DATA["augmentations"]}),
    "reader": ({}, {}, {}),
}


def make(recipe: Any) -> Any:
    """What a part of a configuration describes, where functions go by their names."""
    by_name = isinstance(recipe, str) and recipe.startswith("my_parts.")
    return rebuild({"class_path": recipe} if by_name else recipe, trust=(EVERYTHING,))


def build(
    detector: dict[str, Any], model: dict[str, Any], data: dict[str, Any]
) -> tuple[DetectionModule, DetectionDataModule]:
    """A small detector with some parts of its own, and the scenes, as a configuration would have it."""
    own = "backbone" in detector
    builder = "detection.faster_rcnn" if own else "detection.fasterrcnn_efficientnet_lite0_fpn"
    small = {
        name: value for name, value in SMALL.items() if not own or name not in ("weights_backbone", "fpn_channels")
    }
    torch.manual_seed(0)
    made = make({"class_path": builder, "init_args": small | detector | {"num_classes": 7}})
    sizes: dict[str, Any] = {"batch_size": 2, "num_workers": 0, "min_size": 64, "max_size": 96}
    settings = {name: DATA[name] for name in ("root", "reader", "train_split", "val_split")} | data
    scenes = DetectionDataModule(**{name: make(value) for name, value in settings.items()}, **sizes)
    parts = {name: make(value) for name, value in model.items()}
    return DetectionModule(made, scenes.class_names, **parts), scenes


@pytest.mark.slow
@pytest.mark.parametrize("part", rehearsed(ALONE, "backbone", "augmentations", "reader"))
def test_each_part_alone_trains_and_comes_out_of_the_checkpoint(part: str, my_parts: Path, tmp_path: Path) -> None:
    module, data = build(*ALONE[part])
    before = {name: value.clone() for name, value in module.detector.state_dict().items()}
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=2, accelerator="cpu", enable_model_summary=False, limit_val_batches=1, **options)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2 and all(loss.isfinite() for loss in module.step_losses.values())
    assert any(not torch.equal(value, before[name]) for name, value in module.detector.state_dict().items())
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    if part == "reader":  # which every case has
        with pytest.raises(RecipeError, match=r"my_parts\.reader\.read_csv: if you trust"):
            DetectionDataModule.load_from_checkpoint(path)
        assert DetectionDataModule.load_from_checkpoint(path, trust=("my_parts",)).class_names == data.class_names
        return
    if part == "augmentations":
        again = DetectionDataModule.load_from_checkpoint(path, trust=("my_parts",))
        assert [type(step).__name__ for step in again.augmentations] == ["RandomBrightnessContrast", "Tint"]
        assert again.augmentations[1].strength == 0.3
        return
    with pytest.raises(CheckpointError, match="if you trust the code of my_parts, say so with --trust my_parts"):
        DetectionModule.load_from_checkpoint(path)
    loaded = DetectionModule.load_from_checkpoint(path, trust=("my_parts",))
    assert_same(loaded.detector, module.detector.eval())
    assert differences(dict(loaded.hparams), dict(module.hparams)) == []
    if "my_parts" in str(module.hparams["detector"]):
        with pytest.raises(RecipeError, match="--trust my_parts"):
            rebuild(module.hparams["detector"])
        again = rebuild(module.hparams["detector"], trust=("my_parts",))
        again.load_state_dict(module.detector.state_dict())
        assert_same(again, module.detector)


@pytest.mark.rehearsal
def test_own_proposer_goes_to_onnx(my_parts: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')
    from detection.interop.exported_files import onnx_runner, to_onnx
    from detection.interop.parity import compare

    module, _ = build(LATTICE["init_args"], {}, {})
    to_onnx(module.detector, tmp_path / "lattice.onnx", {})
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 80), (90, 70), (64, 96))]
    own = Detector(module.detector, module.class_names, device="cpu")
    parity = compare(own, onnx_runner(tmp_path / "lattice.onnx"), images)
    assert parity.detections > 0 and parity.unmatched == 0 and parity.box < 1e-2 and parity.score < 1e-4


def test_own_part_that_does_not_fit_is_named(my_parts: Path) -> None:
    """A box head in the place of an RPN head: both take two numbers."""
    with pytest.raises(PartError, match=r"rpn_head: SqueezeHead\(\[\(1, 16, 16, 16\), .*\) failed: TypeError: conv2d"):
        build({"rpn_head": {"class_path": "my_parts.box_head.SqueezeHead"}}, {}, {})


def test_parts_are_short_and_repeat_no_number() -> None:
    for path in (EXAMPLES / "my_parts").glob("*.py"):
        assert len(path.read_text().splitlines()) < 40, path.name
    for path in EXAMPLES.glob("*.yaml"):
        assert not re.search("channels|strides|num_classes|num_anchors", path.read_text()), path.name


def test_hard_background_draws_all_foreground_first_and_then_the_hardest(my_parts: Path) -> None:
    sampler = rebuild(
        {"class_path": "my_parts.sampler.HardBackground", "init_args": {"size": 4, "share": 0.5}}, trust=("my_parts",)
    )
    labels = torch.tensor([[0, 3, 0, -1, 0, 0], [1, 2, 3, 0, 0, -1]])
    losses = torch.tensor([[0.1, 0.0, 0.9, 5.0, 0.4, 0.3], [0.0, 0.0, 0.0, 0.2, 0.1, 9.0]])
    indices, valid = sampler(labels, lambda: losses)
    assert indices[0].tolist() == [1, 2, 4, 5] and valid.all()
    assert indices[1, 2:].tolist() == [3, 4] and set(indices[1, :2].tolist()) < {0, 1, 2}
