"""The recipes for sweeps, each with two runs at once, in two processes of this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from tests.runs import ROOT
from tests.test_tracking import records

QUICK = [
    *("--trainer.max_steps=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"),
    *("--data.min_size=64", "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
]
DRAWS: list[dict[str, Any]] = [
    {"model.lr": 0.003, "model.weight_decay": 0.05, "data.batch_size": 2},
    {"model.lr": 0.01, "model.weight_decay": 0.1, "data.batch_size": 4},
]


@pytest.fixture(scope="module")
def ray_tune() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_tune", ROOT / "sweeps" / "ray_tune.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle looks for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_agents_of_wandb_train_what_they_were_given(shared_data: Path, tmp_path: Path) -> None:
    """What `wandb agent` does but for its server: command, draw and identity by flags, file and environment."""
    sweep = yaml.safe_load((ROOT / "sweeps" / "bccd.yaml").read_text())
    agents, given = [], {"interpreter": [sys.executable], "program": [sweep["program"]]}
    for i, draw in enumerate(DRAWS):
        values = {name: {"value": value} for name, value in draw.items()}
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump({"wandb_version": 1} | values))
        macros = create_sweep_command_args({"args": values}) | given
        line = [word for part in create_sweep_command(sweep["command"]) for word in macros.get(part[2:-1], [part])]
        line += [f"--data.root={shared_data / 'bccd'}", *QUICK, f"--output={tmp_path / str(i)}"]
        environment = os.environ | {"WANDB_SWEEP_ID": "s", "WANDB_SWEEP_PARAM_PATH": str(tmp_path / f"{i}.yaml")}
        environment |= {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        agents.append(subprocess.Popen(line, cwd=ROOT, env=environment))
    assert [agent.wait(500) for agent in agents] == [0, 0]
    for i, draw in enumerate(DRAWS):
        (record,) = tmp_path.glob(f"{i}/bccd/*/wandb/offline-run-*/*.wandb")
        found = list(records(record))
        updates = [item for r in found if r.HasField("run") for item in r.run.config.update]
        config = {item.key: json.loads(item.value_json) for item in updates}
        sections = {name: config[name.split(".")[0]][name.split(".")[1]] for name in draw}
        assert {name: config[name] for name in draw} == sections == draw
        logged = {".".join(item.nested_key) or item.key for r in found for item in r.history.item}
        assert sweep["metric"]["name"] in logged


def test_an_agent_of_wandb_runs_a_line_of_an_ablation(tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "sweeps" / "ablation.yaml").read_text())
    (tmp_path / "lines.txt").write_text("echo first\necho 'the second' one\necho third\n")
    macros = create_sweep_command_args({"args": {"line": {"value": 2}}}) | {"program": [sweep["program"]]}
    line = [word for part in create_sweep_command(sweep["command"]) for word in macros.get(part[2:-1], [part])]
    assert subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "the second one\n"


@pytest.mark.parametrize("library", ["optuna", "ray"])
def test_the_recipe_of_the_tutorial_starts_each_line_once(library: str, tmp_path: Path) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    (tmp_path / "lines.txt").write_text("".join(f"echo {i} >> done\n" for i in range(4)))
    page, title = (ROOT / "docs" / "tutorials" / "ablate.md").read_text(), {"optuna": "study", "ray": "cells"}[library]
    recipe = page.partition(f'```python title="{title}.py"\n')[2].partition("```")[0]
    recipe = recipe.replace("num_gpus=1", "num_cpus=1")
    subprocess.run([sys.executable, "-c", recipe], cwd=tmp_path, check=True)
    assert sorted((tmp_path / "done").read_text().split()) == ["0", "1", "2", "3"]


@pytest.mark.rehearsal
def test_two_trials_of_ray_train_what_was_drawn(ray_tune: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    """What Ray calls, by two threads; it runs wherever Ray is not."""
    flags = [f"--data.root={shared_data / 'bccd'}", *QUICK, "--wandb=off"]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda draw: ray_tune.trial(draw, flags, tmp_path), DRAWS))
    assert all(0 <= figures["val/map"] <= 1 for figures in found)
    runs = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("runs/tune/*/bccd/*/config.yaml")]
    trained = [{name: run[name.split(".")[0]][name.split(".")[1]] for name in DRAWS[0]} for run in runs]
    assert sorted(trained, key=lambda draw: draw["model.lr"]) == DRAWS


@pytest.mark.rehearsal
def test_ray_searches_with_two_trials(
    ray_tune: ModuleType, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="Ray Tune is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "sweeps")]))  # of Ray's processes
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        best = ray_tune.main([f"--data.root={shared_data / 'bccd'}", *QUICK, "--wandb=off"], trials=2)
    finally:
        ray.shutdown()
    assert best.keys() == DRAWS[0].keys()
    assert len(list(tmp_path.glob("runs/tune/*/bccd/*/metrics.csv"))) == 2
