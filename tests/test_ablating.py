"""`detection ablate`: the plan, runs that fail, stop and go on, what is pruned, and the table's cells."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.__main__ import main
from detection.cli import ablating
from detection.cli.ablating import BASE, Ablation, Swap, devices, planned, seconds_of, seeds_of, swaps_of
from detection.cli.detected import Detected, of_file
from detection.data import scenes as drawn_scenes
from detection.errors import SettingsError
from detection.evaluation.ablation_table import MINUS, Row, latex, markdown, write_table
from detection.evaluation.mean_ap import MeanAP
from detection.training import planned as trainings
from detection.training.locking import locked
from detection.training.planned import Planned, State, Stopped, train
from tests.evaluation import test_oks
from tests.evaluation.test_comparison import CLASSES, detect, scenes
from tests.runs import ROOT, TINY, scene_flags

# Stands for `detection fit`: what it leaves where it finishes, and its exit codes where it does not.
STUB = """
import os, pathlib, signal, sys, time
folder, swap, seed = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with (folder / "starts").open("a") as file:
    print(os.environ.get("CUDA_VISIBLE_DEVICES", ""), time.monotonic(), file=file)
if swap == "bad":
    print("error: old news\\nerror: there is no such part", file=sys.stderr)
    sys.exit(2)
if swap == "slow" and not (folder / "saved").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), os._exit(75)))
    (folder / "ready").touch()
    time.sleep(60)
run = folder / "2026-01-01_00-00-00"
run.mkdir(exist_ok=True)
(run / "best.ckpt").touch()
with (folder / "ends").open("a") as file:
    print(time.monotonic(), file=file)
"""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(self: Planned) -> list[str]:
        return [sys.executable, "-S", "-c", STUB, str(self.folder), self.swap, str(self.seed)]

    monkeypatch.setattr(Planned, "command", command)
    monkeypatch.setattr(trainings, "POLL", 0.02)


def plan_of(folder: Path, *swaps: str, seeds: int = 1) -> list[Planned]:
    return planned("quickstart", [Swap(name) for name in swaps], range(seeds), [], folder)


def never(run: Planned) -> str:
    return ""


def go(plan: list[Planned], gpus: Any = (None,), budget: float = math.inf, needless: Any = never) -> tuple[Any, Any]:
    said = list[str]()
    return train(plan, gpus, budget, needless, said.append), said


def starts(run: Planned) -> list[list[str]]:
    return [line.split(" ") for line in (run.folder / "starts").read_text().splitlines()]


def test_the_rows_of_the_swaps() -> None:
    rows = swaps_of([["model.detector.init_args.box_loss=detection.GIoULoss"], ["slow:model.lr=0.1", "data.hflip=0"]])
    assert rows[0] == Swap(BASE)
    assert rows[1] == Swap("box_loss=GIoULoss", ("--model.detector.init_args.box_loss=detection.GIoULoss",))
    assert rows[2] == Swap("slow", ("--model.lr=0.1", "--data.hflip=0"))
    nested = swaps_of([["model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1}}"]])[1]
    assert nested.flags == ("--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1}}",)
    with pytest.raises(SettingsError, match=r"two rows are called lr=1: name one"):
        swaps_of([["model.lr=1"], ["other.lr=1"]])
    with pytest.raises(SettingsError, match=r"give a setting and its value"):
        swaps_of([["model.lr"]])


def test_seeds_and_budgets() -> None:
    assert seeds_of("3,1, 1") == [3, 1]
    assert [seconds_of(text) for text in ("2h", "1h30m", "90s", "0.5h", "")] == [7200, 5400, 90, 1800, math.inf]
    for wrong in ("2", "h", "2h30"):
        with pytest.raises(SettingsError, match="give hours, minutes or seconds"):
            seconds_of(wrong)
    with pytest.raises(SettingsError, match="give whole numbers"):
        seeds_of("a")


def test_the_plan_is_ordinary_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["quickstart", "--swap", "fast:model.lr=0.1", "--seeds", "4,5", "--output", str(tmp_path / "out")]
    assert not main(["ablate", *args, "--dry_run", "--", "--trainer.max_steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"/out/(\w+) --name (\w+)", line).groups() for line in lines] == [  # type: ignore[union-attr]
        *[("base", "seed4"), ("fast", "seed4"), ("base", "seed5"), ("fast", "seed5")]
    ]
    assert "-m detection fit --config quickstart" in lines[0] and "--model.lr" not in lines[0]
    assert "--trainer.max_steps 2 --model.lr=0.1" in lines[1]
    assert lines[3].endswith(f"--output {tmp_path}/out/fast --name seed5 --seed_everything 5 --resume auto")
    assert not (tmp_path / "out").exists()


def test_one_run_a_device_at_a_time(tmp_path: Path, stub: None) -> None:
    plan = plan_of(tmp_path, "base", "swap", seeds=3)
    go(plan, ["0", "1"])
    for device in ("0", "1"):
        own = [run for run in plan if starts(run)[0][0] == device]
        times = sorted((float(starts(run)[0][1]), float((run.folder / "ends").read_text())) for run in own)
        assert len(own) >= 2 and all(a[1] < b[0] for a, b in zip(times, times[1:], strict=False))
    assert all(run.checkpoint() for run in plan)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices(None) == ["0", "1"] and devices(3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert devices(None) == ["5", "7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices(None) == [None] and devices(2) == [None, None]


def test_a_run_that_fails_is_said_and_the_others_go_on(tmp_path: Path, stub: None) -> None:
    plan = plan_of(tmp_path, "base", "bad", "swap")
    _, said = go(plan)
    assert [bool(run.checkpoint()) for run in plan] == [True, False, True]
    assert plan[1].state().code == 2 and plan[1].state().said == "there is no such part"
    assert any("bad, seed 0: failed: there is no such part" in line for line in said)
    go(plan)  # what failed is tried again, what is finished is not
    assert [len(starts(run)) for run in plan] == [1, 2, 1]


def test_a_signal_lets_all_save_and_the_same_plan_goes_on(tmp_path: Path, stub: None) -> None:
    plan = plan_of(tmp_path, "slow", "base")

    def stop() -> None:
        while not (plan[0].folder / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop).start()
    with pytest.raises(Stopped, match="SIGTERM: all runs have saved; the same command goes on"):
        go(plan)
    assert signal.getsignal(signal.SIGTERM) is before
    assert plan[0].state().code == 75 and not plan[1].folder.exists()
    go(plan)
    assert all(run.checkpoint() for run in plan) and len(starts(plan[0])) == 2


def test_what_another_call_trains_is_waited_for_and_not_trained_twice(tmp_path: Path, stub: None) -> None:
    plan = plan_of(tmp_path, "base", "swap")
    lock = locked(plan[0].folder / trainings.LOCK)
    assert lock is not None and locked(plan[0].folder / trainings.LOCK) is None

    def other() -> None:
        while plan[1].checkpoint() is None:  # the one that is free is trained meanwhile
            time.sleep(0.02)
        (plan[0].folder / "2026-01-01_00-00-00").mkdir()
        (plan[0].folder / "2026-01-01_00-00-00" / "best.ckpt").touch()
        plan[0].keep(State(list(plan[0].flags), plan[0].config, 1.0, 0))
        os.close(lock)

    thread = threading.Thread(target=other)
    thread.start()
    go(plan)
    thread.join()
    assert not (plan[0].folder / "starts").exists() and len(starts(plan[1])) == 1


def test_no_run_begins_that_the_budget_has_no_time_for(tmp_path: Path, stub: None) -> None:
    plan = plan_of(tmp_path, "base", "swap")
    go(plan[:1])
    plan[0].keep(State(list(plan[0].flags), plan[0].config, 100.0, 0))
    left_out, said = go(plan, budget=60)
    assert left_out == {plan[1]: "60 s of the budget are left and it takes 100 s"} and "left out" in said[0]
    plan[1].folder.mkdir(parents=True)
    plan[1].keep(State(list(plan[1].flags), plan[1].config, 70.0, 75))  # it has the most of it behind it
    assert go(plan, budget=60)[0] == {} and plan[1].checkpoint()


def test_the_time_of_a_run_whose_plan_was_killed_counts(tmp_path: Path, stub: None) -> None:
    (run,) = plan_of(tmp_path, "base")
    run.folder.mkdir(parents=True)
    run.keep(State(list(run.flags), run.config, 5.0))
    (run.folder / trainings.LOG).touch()
    for name, seconds in ((trainings.STATE, 100), (trainings.LOG, 140)):  # begun, and last said something
        os.utime(run.folder / name, (seconds, seconds))
    assert run.trained() == 45
    go([run])
    assert 45 <= run.state().seconds < 60


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, stub: None) -> None:
    go(plan_of(tmp_path, "base"))
    complaint = main(["ablate", "quickstart", "--seeds", "0", "--output", str(tmp_path), "--", "--model.lr", "1"])
    assert isinstance(complaint, str) and "base/seed0 holds a run of other settings" in complaint
    assert "there is no configuration nowhere" in str(main(["ablate", "nowhere"]))


class Simulated(Ablation):
    """Finished runs of detectors whose skill is known."""

    def __init__(self, folder: Path, skills: dict[str, float], seeds: int, every_seed: bool = False) -> None:
        given = {
            "every_seed": every_seed,
            "masks": False,
            "keypoints": False,
            "draws": 200,
            "output": folder,
            "accelerator": "cpu",
        }
        plan = plan_of(folder, *skills, seeds=seeds)
        super().__init__(ablating.argparse.Namespace(**given), [], plan, list(skills))
        self.skills, self.world = skills, scenes(np.random.default_rng(0), 60)

    def finish(self, *runs: Planned) -> None:
        for run in runs:
            path = run.folder / "2026-01-01_00-00-00" / "best.ckpt"
            path.parent.mkdir(parents=True)
            path.touch()
            run.keep(State(list(run.flags), run.config, 1.0, 0, data="d" * 64))

    def detected(self, run: Planned) -> Detected:
        rng = np.random.default_rng([run.seed, self.names.index(run.swap)])
        results = detect(rng, self.world, self.skills[run.swap])
        facts = {"step": "9", "code": "abc", "sha256": "f" * 64}
        return Detected(run.swap, results, CLASSES, 100, False, (), facts, {}, None, [])


def test_seeds_of_a_decided_difference_are_left_out(tmp_path: Path) -> None:
    table = Simulated(tmp_path, {"base": 1.0, "better": 3.0, "same": 1.0}, seeds=4)
    base, better, same = table.plan[:3]
    table.finish(base, better, same)
    later = {run.swap: run for run in table.plan[6:9]}
    assert table.needless(later["better"]) == ""  # of one seed each nothing is decided
    table.finish(*table.plan[3:6])
    assert re.match(r"the difference of AP is decided after 2 seeds \(p 0\.0", table.needless(later["better"]))
    assert table.needless(later["same"]) == "" and table.needless(later["base"]) == ""
    found = table.difference("better")
    assert not isinstance(found, str) and found.p < 0.05 / 3 and found.low > 0
    table.given.every_seed = True
    assert table.needless(later["better"]) == ""


def test_the_base_needs_no_seed_once_all_is_decided(tmp_path: Path) -> None:
    table = Simulated(tmp_path, {"base": 1.0, "better": 3.0}, seeds=3)
    table.finish(*table.plan[:4])
    left_out, _ = go(list(table.plan), needless=table.needless)
    assert {run.swap: why[:20] for run, why in left_out.items()} == {
        "base": "all swaps are decide",
        "better": "the difference of AP",
    }
    rows = table.rows([Swap("base"), Swap("better")], left_out)
    assert rows[0].remarks == ["seed 2 was left out: all swaps are decided"]
    assert rows[1].remarks[0].startswith("seed 2 was left out: the difference of AP is decided after 2 seeds")


def test_the_cells_are_the_figures_of_the_runs(tmp_path: Path) -> None:
    table = Simulated(tmp_path, {"base": 1.0, "a_b": 2.0, "bad": 1.0}, seeds=2)
    table.finish(*[run for run in table.plan if run.swap != "bad"])
    failed = next(run for run in table.plan if run.swap == "bad")
    failed.folder.mkdir(parents=True)
    failed.keep(State(list(failed.flags), failed.config, 1.0, 2, "no such part"))
    swaps = [Swap("base"), Swap("a_b", ("--model.lr=1",)), Swap("bad")]
    rows = table.rows(swaps, {})
    write_table(tmp_path, rows, "quickstart", "boxes")
    content = json.loads((tmp_path / "table.json").read_text())
    for row in content["rows"][:2]:
        for name, cell in row["cells"].items():
            runs = [run for run in table.plan if run.swap == row["name"]]
            wanted = []
            for run in runs:
                metric = MeanAP(CLASSES)
                metric.update([], [], table.detected(run).results)
                wanted.append(metric.compute()[name])
            assert [of["value"] for of in cell["of"]] == pytest.approx(wanted, abs=1e-12)
            assert cell["mean"] == pytest.approx(np.mean(wanted)) and cell["sd"] == pytest.approx(
                np.std(wanted, ddof=1)
            )
            assert [(of["seed"], of["commit"], of["data"], of["config"]) for of in cell["of"]] == [
                (str(run.seed), "abc", "d" * 64, run.config) for run in runs
            ]
    ap, gap = content["rows"][1]["cells"]["map"], content["rows"][1]["difference"]
    assert gap["points"] == pytest.approx(ap["mean"] - content["rows"][0]["cells"]["map"]["mean"])
    shown = (tmp_path / "table.md").read_text()
    assert f"| a_b | {100 * ap['mean']:.1f} ± {100 * ap['sd']:.1f} |" in shown
    interval = f"{100 * gap['points']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
    assert interval in shown.replace(MINUS, "-")
    assert "| bad | - | - | - | - | - | - | - | - | 0 |" in shown and "- bad: seed 0 failed: no such part" in shown
    tex = (tmp_path / "table.tex").read_text()
    assert rf"a\_b & {100 * ap['mean']:.1f} $\pm$ {100 * ap['sd']:.1f} &" in tex and "% a_b: --model.lr=1" in tex
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {8} and "commit abc" in tex
    assert json.loads((tmp_path / "comparisons" / "a_b" / "comparison.json").read_text())["a"]["name"] == "a_b"


def test_the_cells_of_key_points_are_those_of_pycocotools(tmp_path: Path) -> None:
    gt, good = test_oks.drawn(0, 3)
    (tmp_path / "gt.json").write_text(json.dumps(gt))

    def entries(run: Planned) -> list[dict[str, Any]]:
        step = {"base": 3 + run.seed, "better": 0}[run.swap]
        return [e | {"keypoints": [v + step * (k % 3 == 0) for k, v in enumerate(e["keypoints"])]} for e in good]

    class Points(Simulated):
        def detected(self, run: Planned) -> Detected:
            path = tmp_path / f"{run.swap}_{run.seed}.json"
            path.write_text(json.dumps(entries(run)))
            facts = {"step": "9", "code": "abc", "sha256": "f" * 64}
            return replace(of_file(path, tmp_path / "gt.json", None), facts=facts, **self.others)

    table = Points(tmp_path / "runs", {"base": 1.0, "better": 1.0}, seeds=2)
    table.others: dict[str, Any] = {}
    table.given.keypoints = True
    table.finish(*table.plan)
    rows = table.rows([Swap("base"), Swap("better")], {})
    write_table(tmp_path, rows, "quickstart", "key points")
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["compared"] == "key points" and content["rows"][1]["difference"]["points"] > 0.05
    for row in content["rows"]:
        wanted = [test_oks.official(gt, entries(run), (0.05,) * 3) for run in table.plan if run.swap == row["name"]]
        for name in ("map", "map_50", "map_75", "map_medium", "map_large"):
            values = [None if own[name] == -1 else own[name] for own in wanted]
            assert [own["value"] for own in row["cells"][name]["of"]] == pytest.approx(values, abs=1e-9)
        assert row["cells"]["map_small"]["mean"] is None  # of which COCO has none
    assert "\nAP of key points in points, mean" in (tmp_path / "table.md").read_text()
    table.others = {"sigmas": ()}
    said = table.rows([Swap("base")], {})[0].remarks
    assert said == ["its runs can't be read: --keypoints compares key points, but not all runs have them: leave it out"]


def test_runs_of_other_code_or_data_are_said(tmp_path: Path) -> None:
    table = Simulated(tmp_path, {"base": 1.0}, seeds=2)
    table.finish(*table.plan)
    table.plan[1].keep(State(list(table.plan[1].flags), table.plan[1].config, 1.0, 0, data="e" * 64))
    (row,) = table.rows([Swap("base")], {})
    assert row.remarks == ["not all runs have the same data: dddddddddddd, eeeeeeeeeeee"]


def test_a_table_of_nothing() -> None:
    assert "| base | - |" in markdown([Row("base", "")], "x", "boxes") and "base & - &" in latex(
        [Row("base", "")], "x", "boxes"
    )


@pytest.mark.rehearsal
def test_an_ablation_that_is_killed_ends_with_the_figures_of_its_runs(tmp_path: Path) -> None:
    data = drawn_scenes.draw(tmp_path / "scenes", train=8, val=4)
    flags = [*TINY, *scene_flags(data), "--trainer.max_steps", "2", "--data.num_workers", "0", "--wandb", "off"]
    swaps = ["--swap", "fast:model.lr=0.01", "--swap", "bad:model.optimizer=torch.optim.Nope"]
    command = [sys.executable, "-m", "detection", "ablate", "quickstart", *swaps, "--seeds", "0,1", "--parallel", "2"]
    command += ["--draws", "100", "--", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    folder = tmp_path / "ablation"
    while not list(folder.glob("*/seed1/run.json")):  # two have ended, and one trains that outlives the kill
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    ended = [path for path in folder.glob("*/*/run.json") if json.loads(path.read_text())["code"] == 0]
    times = {
        path: path.stat().st_mtime for path in folder.glob("*/*/*/best.ckpt") if path.parents[1] / "run.json" in ended
    }
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert times and all(path.stat().st_mtime == before for path, before in times.items())
    assert "bad: seed 0 failed" in again.stdout and len(list(folder.glob("[bf]a*/seed?/20*"))) == 4
    content = json.loads((folder / "table.json").read_text())
    for row in content["rows"][:2]:
        assert len(row["cells"]["map"]["of"]) == 2
        for of in row["cells"]["map"]["of"]:
            with (tmp_path / of["run"] / "metrics.csv").open(newline="") as file:
                best = max(float(line["val/map"]) for line in csv.DictReader(file) if line.get("val/map"))
            assert of["value"] == pytest.approx(best, abs=1e-5)
