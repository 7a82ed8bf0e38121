"""The one command: what it lists, explains and suggests without importing PyTorch; the scripts; a wheel elsewhere."""

from __future__ import annotations

import inspect
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from detection import __main__ as command
from detection.benchmarks.commands import COMMANDS as BENCHMARKS
from detection.cli import fit_help
from detection.cli.evaluate import evaluate
from detection.cli.exporting import export
from detection.cli.fit import FitCLI
from detection.cli.flags import chosen
from detection.cli.predict import predict_in
from detection.cli.serving import show
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule
from detection.training.module import DetectionModule
from tests.runs import TINY, rehearsed, scene_flags

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--data.num_workers", "0", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--wandb", "off"]


def called(*args: str) -> tuple[str, float]:
    """Exit code and output of the command in a process of its own, without PyTorch; and its processor seconds."""
    code = (
        f"import sys; from detection.__main__ import main; end = main({list(args)}); assert 'torch' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit(end)"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{done.returncode} {done.stdout}{done.stderr}", seconds


def test_all_commands_are_listed_at_once() -> None:
    said, seconds = called()
    assert said.startswith("0 usage: detection COMMAND") and said == called("--help")[0]
    wanted = ["fit", "evaluate", "predict", "check", "convert", "export", "demo", "benchmark"]
    assert re.findall(r"^  (\w+) +\w", said, re.M)[: len(wanted)] == wanted
    assert seconds < 1.5


def test_the_page_of_fit_comes_at_once_and_fits_on_one() -> None:
    said, seconds = called("fit", "--config", "bccd", "--help")
    page = said.removeprefix("0 ")
    flags = re.findall(r"^  --([\w.]+)", page, re.M)
    assert len(flags) == 20 and seconds < 1.5  # 4.4 with all flags
    assert len(page.splitlines()) < 66 and max(map(len, page.splitlines())) <= fit_help.WIDTH
    assert "--help all" in page and "own_data" in page


def test_the_page_says_what_the_docstrings_say() -> None:
    page = " ".join(fit_help.page().split())
    for of, name in ((DetectionDataModule, "data.batch_size"), (DetectionModule, "model.lr")):
        text = re.search(rf"--{re.escape(name)} VALUE (.*?)\.", page)[1]  # type: ignore[index]
        assert f"{name.partition('.')[2]}: {text[0].lower()}{text[1:]}" in " ".join(str(of.__doc__).split())
    assert "--wandb VALUE `auto`: online when logged in, else offline; or `online`, `offline`, `off`." in page


def test_arguments_that_are_described_together_share_the_text() -> None:
    args = "Args:\n    a, b: both,\n        in two lines.\n\n    c: 5 %."
    text = f"Do.\n\n{args}\n\nRaises:\n    D: no.\n"
    assert fit_help.arguments(text) == {"a": "both, in two lines.", "b": "both, in two lines.", "c": "5 %."}


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--help"], "page"),
        (["--config", "all", "-h"], "page"),
        (["--help", "all"], "all"),
        (["--help=all"], "all"),
        (["--name", "help"], None),
        (["--model.detector.help", "x"], None),
    ],
)
def test_which_help_is_asked_for(flags: list[str], asked: str | None) -> None:
    assert fit_help.asks_for(flags) == asked


def test_help_all_explains_every_flag_that_fit_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[Any] = []
    monkeypatch.setattr(FitCLI, "parse_arguments", lambda self, parser, args: known.extend(parser._actions) or exit())
    with pytest.raises(SystemExit):
        FitCLI([])
    taken = {action.dest: action for action in known if not action.option_strings[-1].endswith(("help", ".help"))}
    said, seconds = called("fit", "--help", "all")
    assert set(re.findall(r"^  --([\w.]+)", said, re.M)) == set(taken) and len(taken) > 100
    assert seconds < 1.5  # asked were 4
    explained = fit_help.flags()
    assert [name for name, (text, _) in explained.items() if len(text) < 10] == []
    for name, action in taken.items():
        if isinstance(action.default, bool | int | float | str) and name in explained and "." in name:
            assert explained[name][1].endswith(f"default: {action.default!r})")
    assert {name for names in fit_help.SHOWN.values() for name in names} <= set(taken)
    assert explained["data.vflip"][0].startswith("probability of each")


@pytest.mark.parametrize("function", [evaluate, predict_in, export, show], ids=lambda function: function.__name__)
def test_every_flag_of_the_others_is_explained(function: Any) -> None:
    explained = fit_help.arguments(inspect.getdoc(function) or "")
    parser = jsonargparse.capture_parser(lambda: jsonargparse.auto_cli(function, as_positional=False))
    without = [action.option_strings for action in parser._actions if not action.help]
    assert without == [] and set(explained) == set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_the_nearest_flag_is_suggested(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, right = {
        "fit": (["--data.batchsize", "2"], "--data.batch_size"),
        "evaluate": (["--ckptt", "x"], "--ckpt"),
        "predict": (["--ckpt", "x", "--sorce", "y"], "--source"),
        "check": (["--anchor_sizes", "3"], "--anchor-sizes"),
        "convert": (["import", "--source", "x", "--ouput", "y"], "--output"),
        "export": (["--ckpt", "x", "--outptu", "y.onnx"], "--output"),
        "demo": (["--ckpt", "x", "--prot", "1"], "--port"),
        "benchmark": ([next(iter(BENCHMARKS)), "--round", "1"], "--rounds"),
        "compare": (["a", "b", "--agianst", "c"], "--against"),
        "replay": (["run", "--step", "3", "--acelerator", "cpu"], "--accelerator"),
        "verify": (["d.onnx", "--sorce", "x"], "--source"),
        "suspects": (["run", "--folsd", "2"], "--folds"),
        "ablate": (["base", "--seedz", "1"], "--seeds"),
        "download": (["voc2007", "--root", "x", "--kep"], "--keep"),
    }[name]
    with pytest.raises(SystemExit) as end:
        command.main([name, *wrong])
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"did you mean {right}?" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit", "photos"], "a value goes behind its flag, as in --data.root photos)"),
        (["check", "photos"], "a value goes behind its flag, as in --root photos)"),
        (["predict", "run", "--source", "photos"], "a value goes behind its flag, as in --ckpt run)"),
        (["predict", "--source", "photos"], "error: give --ckpt\n"),
        (["download"], "error: give dataset, --root\n"),
        (["fit", "--config", "bcd"], "bcd (did you mean --config bccd?)"),
    ],
)
def test_what_is_missing_on_the_command_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(args)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and said in shown and shown.count("\n") == 1 and "Parser key" not in shown


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["convert", "imprt"], "did you mean import?"),
        (["benchmark", "trian"], "did you mean train?"),
    ],
)
def test_the_nearest_part_of_a_command_is_suggested(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(args)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["evalaute"], "there is no command 'evalaute' (did you mean evaluate?)"),
        (["train"], "did you mean fit?"),
        (["check_data"], "did you mean check?"),
        (["qqq"], "there are fit, evaluate, predict"),
        (["--data.root", "x"], "name a command before --data.root, as in: detection fit --data.root"),
    ],
)
def test_the_nearest_command_is_suggested(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(args) == 2
    assert said in capsys.readouterr().err


def test_the_scripts_call_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(command, "run", lambda name, flags: calls.append((name, list(flags))))
    monkeypatch.setattr(sys, "argv", ["script.py", "--trust", "my_parts"])
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    for path in scripts:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert not end.value.code
    assert {name for name, _ in calls} == set(command.COMMANDS) and len(calls) == len(scripts)
    assert all(flags == ["--trust", "my_parts"] for _, flags in calls)
    for module, _ in command.COMMANDS.values():
        assert list(inspect.signature(import_module(f"detection.cli.{module}").main).parameters)


def test_a_folder_stands_for_its_best_checkpoint_else_its_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "2026-01-01"
    run.mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"no best\.ckpt or last\.ckpt in .*2026-01-01: is it the folder of a run"
    ):
        chosen(run)
    for name in ("last.ckpt", "best.ckpt"):
        (run / name).write_bytes(b"")
        assert chosen(run) == run / name
        assert capsys.readouterr().err == f"{run}: taking {name}\n"
    assert chosen(run / "last.ckpt") == run / "last.ckpt" and capsys.readouterr().err == ""
    with pytest.raises(FileNotFoundError, match=r"name one of its runs, such as .*runs.2026-01-01"):
        chosen(tmp_path / "runs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a wheel of this project is installed in, without what it depends on."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "detection", source / "detection", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *offline, "-w", str(source / "wheels"), str(source)], check=True)
    (wheel,) = (source / "wheels").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)], check=True)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("module", rehearsed([False, True], False), ids=["detection", "python -m detection"])
def test_the_wheel_works_outside_of_a_clone(installed: Path, tmp_path: Path, module: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DETECTION_RUN_FOLDER"}
    start = [sys.executable, *(["-m", "detection"] if module else [str(installed / "bin" / "detection")])]
    data = scenes.draw(tmp_path, train=4, val=2)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*start, *args],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert "/detection/" not in done.stderr or str(installed) in done.stderr, done.stderr
        return done

    assert run("--version").stdout == "detection 0.1.0\n"
    assert "voc07_12" in run("fit", "--help").stdout
    assert run("check", "--root", str(data)).returncode < 2
    # Two processes: Lightning starts the second one by what started the first.
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"] if module else []
    fitted = run("fit", "--config", "quickstart", *TINY, *SHORT, *scene_flags(data), "--output", "runs", *two)
    assert fitted.returncode == 0, fitted.stderr
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert (folder / "best.ckpt").is_file()
    ckpt = ["--ckpt", str(folder)]
    evaluated = run("evaluate", *ckpt, "--accelerator", "cpu")
    assert evaluated.returncode == 0 and (folder / "evaluation_val" / "report.html").is_file(), evaluated.stderr
    (photo,) = list(data.rglob("*.jpg"))[:1] or list(data.rglob("*.png"))[:1]
    found = run("predict", *ckpt, "--source", str(photo), "--output", "out", "--device", "cpu")
    assert found.returncode == 0 and "1 image, " in found.stdout, found.stderr
    assert f"{folder}: taking best.ckpt" in found.stderr
    missing = run("predict", "--ckpt", "none.ckpt", "--source", str(photo))
    assert missing.returncode == 1 and missing.stderr.startswith("error: ")
