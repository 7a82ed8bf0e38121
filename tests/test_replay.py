"""A step drawn again is the very step: of a run that was killed and went on, the bits that were logged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image

from detection.__main__ import main
from detection.batch import Batch
from detection.cli.fit import FitCLI
from detection.data import scenes
from detection.training.logged import Saved, compare, logged, reasons, saved, verdict
from tests.runs import ROOT, TINY, scene_flags

KEEP = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "3"]


class Killed(Exception):  # noqa: N818
    """What ends the first part of the run."""


class Witness(L.Callback):
    """Keeps the batches of a run as they are trained on, and ends it before a step."""

    def __init__(self, seen: dict[int, Batch], end: int) -> None:
        self.seen, self.end = seen, end

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, place: int) -> None:
        if trainer.global_step == self.end:
            raise Killed
        self.seen[trainer.global_step] = batch


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Batch]]:
    """A run of two epochs of four steps that was killed before its step 5, and its batches."""
    output, seen = tmp_path_factory.mktemp("runs"), dict[int, Batch]()
    data = scenes.draw(output / "scenes", train=8, val=2)
    flags = ["--config", "quickstart", *TINY, *scene_flags(data), "--output", str(output), *KEEP]
    flags += ["--trainer.callbacks.save_top_k=-1", "--trainer.max_epochs", "2", "--data.num_workers", "0"]
    for end, resumed in ((5, []), (-1, ["--resume", "auto"])):
        run = FitCLI([*flags, *resumed])
        run.trainer.callbacks.insert(0, Witness(seen, end))
        with suppress(Killed):
            run.fit()
    return run.folder, seen


def files_of(run: Path) -> dict[Path, bytes]:
    there = (path for path in run.rglob("*") if path.is_file() and "replay_" not in str(path))
    return {path: path.read_bytes() for path in there}


STEPS = [(1, "the beginning"), (4, "epoch=0-step=3.ckpt"), (7, "epoch=1-step=6.ckpt")]


# Before the kill, between the checkpoint that the run went on from and the kill, and after it; and from where
@pytest.mark.slow
@pytest.mark.parametrize(("step", "begin"), STEPS)
def test_a_step_is_drawn_again_bit_for_bit(
    step: int, begin: str, killed: tuple[Path, dict[int, Batch]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, seen = killed
    before = files_of(run)
    assert main(["replay", str(run), "--step", str(step)]) is None
    said, found = capsys.readouterr().out, json.loads((run / f"replay_{step}" / "replay.json").read_text())
    assert f"step {step} is drawn again bit for bit" in said
    assert files_of(run) == before  # nothing of the run is touched
    assert found["from"] == begin and found["repeated"] == len(found["steps_compared"]) - 1
    assert found["logged"] == found["figures"] and len(found["figures"]) == 7  # five losses, gradient, rate
    assert found["logged"] == {name: logged(run)[step][name] for name in found["logged"]}
    (batch,), true = found["batches"], seen[step]
    assert batch["shape"] == list(true.images.shape)
    for i, image in enumerate(batch["images"]):
        assert image["file"] == true.targets[i].file_name
        assert image["boxes"] == true.gt_boxes[i][true.gt_valid[i]].tolist()
        _check_image(image, run / f"replay_{step}", i + 1)


def _check_image(image: dict[str, Any], folder: Path, number: int) -> None:
    """What trained on an image fits together, and is drawn."""
    counted, regions = image["anchors_counted"], image["regions"]
    assert counted["foreground"] == len(image["anchors"]) and counted["sampled"] == len(image["anchors_sampled"])
    assert {row["object"] for row in image["anchors"]} <= set(range(len(image["labels"])))
    assert all(row["label"] == image["labels"][row["object"]] for row in regions if row["label"])
    assert regions and any(row["box"] in image["boxes"] for row in regions)  # ground truth is among the proposals
    for name in ("matching", "anchors", "regions"):
        with Image.open(folder / f"{number}_{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10**6)) > 100  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_step_that_never_was(killed: tuple[Path, dict[int, Batch]]) -> None:
    run = killed[0]
    assert "has no step 8: it ends after 8 steps" in str(main(["replay", str(run), "--step", "8"]))
    assert "has no config.yaml" in str(main(["replay", str(run.parent), "--step", "1"]))


@pytest.mark.rehearsal
def test_other_weights_are_noticed(killed: tuple[Path, dict[int, Batch]], capsys: pytest.CaptureFixture[str]) -> None:
    run = killed[0]
    path = next(point.path for point in saved(run) if point.steps == 6)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["state_dict"] if name.endswith("cls_score.bias"))
    content["state_dict"][name][0] += 0.1
    torch.save(content, path)
    try:
        assert main(["replay", str(run), "--step", "7"]) is None
    finally:
        path.write_bytes(whole)
    assert "step 7 is not drawn again exactly: the figures differ from step 6 on" in capsys.readouterr().out


VARIANTS = {
    "processes": ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
    "accumulated": ["--trainer.accumulate_grad_batches", "2"],
    "bfloat16": ["--trainer.precision", "bf16-mixed"],
    "float16": ["--trainer.precision", "16-mixed"],
    "masks": ["--data.masks", "true", "--model.detector", "detection.models.zoo.maskrcnn_efficientnet_lite0_fpn"],
}


@pytest.mark.rehearsal
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_of_any_kind_of_run_is_drawn_again(variant: str, tmp_path: Path) -> None:
    data = scenes.draw(tmp_path / "scenes", train=16, val=2)
    flags = ["--config", "quickstart", *VARIANTS[variant], *TINY, *scene_flags(data), *KEEP]
    flags += ["--trainer.callbacks.save_top_k=-1", "--trainer.max_steps", "6", "--data.num_workers", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    program = [sys.executable, "-m", "detection"]
    told: dict[str, Any] = {"cwd": tmp_path, "env": environment, "check": True, "capture_output": True, "text": True}
    subprocess.run([*program, "fit", *flags, "--output", "runs"], **told)
    (run,) = (tmp_path / "runs" / "quickstart").iterdir()
    said = subprocess.run([*program, "replay", str(run), "--step", "4"], **told).stdout
    assert "step 4 is drawn again bit for bit" in said
    found = json.loads((run / "replay_4" / "replay.json").read_text())
    assert found["equal"] and len(found["batches"]) == (2 if variant == "accumulated" else 1)
    assert ("train/loss_mask" in found["figures"]) == (variant == "masks")
    if variant == "processes":
        other = json.loads((run / "replay_4" / "rank_1" / "replay.json").read_text())
        assert other["equal"] and set(other["logged"]) == {"train/grad_norm", "lr"}
        assert other["batches"][0]["sha256"] != found["batches"][0]["sha256"]


def test_the_verdict_tells_where_figures_part() -> None:
    ours = {
        n: {"train/loss": torch.tensor(value), "train/own": torch.tensor(0.0)} for n, value in enumerate([1.0, 2.5])
    }
    same = compare(ours, {0: {"train/loss": 1.0}, 1: {"train/loss": 2.5}}, 1)
    assert same.steps == [0, 1] and same.first is None and same.at == {"train/loss": (2.5, 2.5, True)}
    assert "bit for bit" in verdict(same, 1, "")
    other = compare(ours, {0: {"train/loss": 1.0}, 1: {"train/loss": 2.0}}, 1)
    assert other.first == 1 and other.largest == (0.25, "train/loss")
    assert "from step 1 on, at most by 0.25" in verdict(other, 1, "")
    bad = {1: {"train/loss": torch.tensor(math.nan)}}
    assert compare(bad, {1: {"train/loss": math.nan}}, 1).first is None
    assert math.isinf(compare(bad, {1: {"train/loss": 1.0}}, 1).largest[0])
    assert "nothing to compare" in verdict(compare(ours, {}, 1), 1, "")


def test_reasons_name_code_processes_and_device() -> None:
    last = Saved(8, Path("last.ckpt"), "abc", 2)
    said = reasons(last, True, {"code": "def", "world": 1, "device": "cpu"})
    assert "abc, and this is def" in said and "2 processes" in said and "GPU, and this is a CPU" in said
    assert "--trainer.deterministic" in reasons(last, True, {"code": "abc", "world": 2, "device": "NVIDIA"})
