"""What the tests of whole runs share: flags of a tiny run on drawn scenes, and what two runs must have in common."""

from __future__ import annotations

import csv
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.data import scenes

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("images/s", "time/", "gpu/", "memory/")  # figures that two runs never share
TINY = [
    *("--data.min_size", "64"),
    *("--data.max_size", "96"),
    *("--model.detector.fpn_channels", "16"),
    *("--model.detector.weights_backbone", "null"),
    *("--model.detector.trainable_backbone_layers", "1"),
    *("--model.detector.box_head", "detection.models.roi_heads.TwoFCHead"),
    *("--model.detector.box_head.in_channels", "16"),
    *("--model.detector.box_head.out_channels", "32"),
    *("--trainer.accelerator", "cpu"),
    *("--trainer.log_every_n_steps", "1"),
    *("--data.batch_size", "2"),
]


def rehearsed(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters of which every run of the tests takes those that are `kept`, and `make rehearsal` the others too."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.rehearsal) for value in values]


def scene_flags(root: Path) -> list[str]:
    """Flags to read the scenes drawn in `root`."""
    flags = ["--name", "quickstart", "--data.format", "coco", "--data.root", str(root)]
    for split, (file, images) in scenes.SPLITS.items():
        flags += [f"--data.{split}_split", file, f"--data.{split}_images", images]
    return flags


def rows(folder: Path) -> list[dict[str, str]]:
    """`metrics.csv` without the figures that depend on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in csv.DictReader(file)]


def state(path: Path) -> dict[str, Any]:
    """All of a checkpoint that decides how training goes on, loaded as anybody would; of `best.ckpt` the weights."""
    content = torch.load(path, weights_only=True)
    wanted = ("epoch", "global_step", "state_dict", "current_model_state", "averaging_state", "optimizer_states")
    return {name: content.get(name) for name in (*wanted, "lr_schedulers")} | {
        "random": content.get("resume", {}).get("random")
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Names of what is not equal bit for bit in two nested structures of tensors and plain values."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [name for key in a for name in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [name for i, pair in enumerate(zip(a, b, strict=True)) for name in differences(*pair, f"{where}.{i}")]
    return [] if a == b else [f"{where}: {a!r:.40} and {b!r:.40}"]


def run_script(name: str, *args: Any, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script as a user runs it in a folder, in a fork of this process, which has imported all that it needs.

    Python alone would begin by importing PyTorch and Lightning for many seconds. For what depends on how a process
    starts, on signals or on several devices there is `subprocess`.

    Args:
        name: without `.py`.
        *args: of the command line.
        cwd: the folder.
        **environment: variables beside those of this process.
    """
    command = [str(ROOT / "scripts" / f"{name}.py"), *map(str, args)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        given = command, cwd, environment, out.fileno(), err.fileno()
        process = multiprocessing.get_context("fork").Process(target=_be_script, args=given)
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
        process.join()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, process.exitcode or 0, out.read(), err.read())


def _be_script(command: list[str], cwd: Path, environment: Mapping[str, str], out: int, err: int) -> None:
    """The rest of a forked process's life: what of the tests would not be there in a new one is forgotten."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(*how) for how in ((nothing, "r"), (1, "w", 1), (2, "w", 1)))
    os.chdir(cwd)
    os.environ.update(environment)
    installed = sys.prefix, sys.base_prefix
    for module, content in list(sys.modules.items()):
        if not (getattr(content, "__file__", None) or sys.prefix).startswith((*installed, str(ROOT))):
            del sys.modules[module]  # a user's, of another test
    sys.path[:] = [str(Path(command[0]).parent), str(ROOT), *(path for path in sys.path if path.startswith(installed))]
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
