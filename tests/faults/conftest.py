"""The fault matrix: runs of the command line in a process of their own, and a table of what was promised and came.

A row is a test that bears `@pytest.mark.fault(fault=..., injected=..., promised=...)`; what happened is what it records
with `record_property("happened", ...)`. `make faults` prints the table and writes it, to `--fault-table FILE` if named.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from detection.cli.fit import FitCLI, main
from detection.data import scenes
from tests.runs import scene_flags

SMALL = [
    *("--data.num_workers", "0"),
    *("--data.min_size", "64"),
    *("--data.batch_size", "2"),
    *("--model.detector.fpn_channels", "16"),
    *("--model.detector.weights_backbone", "null"),
    *("--trainer.accelerator", "cpu"),
    *("--trainer.max_epochs", "2"),
    *("--trainer.num_sanity_val_steps", "0"),
]
MARK = "fault(fault, injected, promised): a row of the fault matrix"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, default=None, help="write the fault matrix to this Markdown file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARK)
    if not hasattr(config, "workerinput"):
        for path in config.cache.mkdir("faults").glob("*.json"):
            path.unlink()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = (yield).get_result()
    mark = item.get_closest_marker("fault")
    if mark is None or not (report.when == "call" or report.skipped):
        return
    said = [str(value) for name, value in item.user_properties if name == "happened"]
    said += [str(report.longrepr[2]).removeprefix("Skipped: ")] if report.skipped else []
    case = item.callspec.id if hasattr(item, "callspec") else ""  # type: ignore[attr-defined]
    row = {name: text.format(case=case) for name, text in mark.kwargs.items()}
    row |= {"happened": "; ".join(said) or report.outcome, "outcome": report.outcome}
    name = "".join(c if c.isalnum() else "_" for c in item.nodeid)[-150:]
    (item.config.cache.mkdir("faults") / f"{name}.json").write_text(json.dumps(row | {"test": item.nodeid}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = [json.loads(path.read_text()) for path in config.cache.mkdir("faults").glob("*.json")]
    columns = ("fault", "injected", "promised", "happened", "outcome")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in sorted(rows, key=lambda row: row["test"]):
        lines.append("| " + " | ".join(" ".join(row[c].split()).replace("|", "\\|")[:400] for c in columns) + " |")
    path = config.getoption("--fault-table") or config.cache.mkdir("faults") / "faults.md"
    path.write_text("\n".join(lines) + "\n")
    terminalreporter.section(
        f"fault matrix: {len(rows)} rows, {sum(r['outcome'] == 'passed' for r in rows)} as promised"
    )
    terminalreporter.write_line("\n".join(lines))
    terminalreporter.write_line(f"written to {path}")


@dataclass(frozen=True)
class Run:
    """How a run of the command line ended: exit code, what it said, seconds after the fault was injected."""

    code: int
    output: str
    seconds: float

    @property
    def error(self) -> str:
        """The last line that begins with `error:`; there must be one, and no traceback."""
        assert "Traceback" not in self.output, self.output
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert lines, self.output
        return lines[-1]


class Injected(L.Callback):
    """Runs an action once, before step `at`, in the process of a rank."""

    def __init__(self, action: Callable[[L.Trainer, Any], None], at: int, rank: int, note: Path) -> None:
        self.action, self.at, self.rank, self.note = action, at, rank, note

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.at and trainer.global_rank == self.rank and not self.note.exists():
            self.note.write_text(str(time.time()))
            self.action(trainer, pl_module)


def _child(args: list[str], output: Path, callbacks: list[L.Callback], before: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    own = FitCLI._callbacks
    FitCLI._callbacks = lambda cli, given: [*callbacks, *own(cli, given)]  # type: ignore[method-assign]
    if before is not None:
        before()
    sys.exit(main(args))


Fit = Callable[..., Run]


@pytest.fixture
def fit(tmp_path: Path, data: list[str]) -> Fit:
    """`fit(*flags, action=..., at=3, before=..., ranks=1, rank=0)`: a run on small data, forked, with a fault in it.

    `action` is called with trainer and module before step `at` in rank `rank`, `before` in each process at its start;
    `bare` leaves out the flags for small data and a small detector.
    """

    def start(
        *flags: str,
        action: Any = None,
        at: int = 3,
        before: Any = None,
        ranks: int = 1,
        rank: int = 0,
        bare: bool = False,
    ) -> Run:
        processes, note = [], tmp_path / "injected"
        note.unlink(missing_ok=True)
        callbacks = [Injected(action, at, rank, note)] if action is not None else []
        args = [*flags] if bare else [*SMALL, *data, "--output", str(tmp_path / "runs"), *flags]
        if ranks > 1:
            args += ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]
        port, began = str(20_000 + os.getpid() % 20_000), time.time()
        for number in range(ranks):
            environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": str(number), "LOCAL_RANK": str(number)}
            environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

            def prepare(values: dict[str, str] = environment) -> None:
                os.environ.update(values if ranks > 1 else {})
                rank_zero_only.rank = int(values["RANK"])  # which was looked for when Lightning was imported
                if before is not None:
                    before()

            files = tmp_path / f"output{number}"
            process = multiprocessing.get_context("fork").Process(target=_child, args=(args, files, callbacks, prepare))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(240)
            if process.exitcode is None:
                process.kill()
                process.join()
        ended = time.time()
        output = "".join((tmp_path / f"output{number}").read_text() for number in range(ranks))
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        return Run(int(code or 0), output, ended - (float(note.read_text()) if note.exists() else began))

    return start


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags for a small data set of drawn scenes."""
    return scene_flags(scenes.draw(tmp_path_factory.mktemp("scenes"), train=8, val=3))


@pytest.fixture(scope="session")
def small() -> list[str]:
    """The flags for a small detector."""
    return SMALL


@pytest.fixture(scope="session")
def checkpoint(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`last.ckpt` of a short run, with all its folder beside it."""
    output = tmp_path_factory.mktemp("whole")
    args = [*SMALL, *data, "--output", str(output), "--trainer.max_epochs", "1"]
    process = multiprocessing.get_context("fork").Process(target=_child, args=(args, output / "said", [], None))
    process.start()
    process.join(240)
    assert process.exitcode == 0, (output / "said").read_text()
    (path,) = (output / "quickstart").glob("*/last.ckpt")
    return path


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`tmpfs("size=1m")`: the path of a file system of that size; skipped where one can't be mounted."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        path = tmp_path / f"tmpfs{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting needs root: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=False)
