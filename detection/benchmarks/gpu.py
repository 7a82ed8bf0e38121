"""All that is to be known of a GPU, in one command that stops by itself and loses nothing.

Each section of `gpu_sections` runs in a process beside this one, which ends it at its deadline: a section that hangs,
crashes or raises costs its own figures and no others. Every row is on the disk a moment after it was measured. Without
a GPU the same command is rehearsed on the CPU, in tiny sizes, so that nothing fails for the first time on the day that
a GPU is at hand.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from detection.benchmarks.gpu_page import page
from detection.benchmarks.gpu_sizes import REHEARSAL, Sizes
from detection.devices import has_kernels

START_UP = 120.0  # seconds that a process may take to import everything and to find its device
GRACE = 15.0  # seconds, and half of its time again, that a section may run over before it is ended
LEAST = 3.0  # seconds below which a section is not begun

Row = dict[str, Any]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Setting:
    """What a section is given.

    Attributes:
        device: to measure.
        sizes: of everything.
        until: `time.monotonic()` at which the section should be done; it looks at the clock between two rows.
        bccd: folder of the blood cells, or None.
        tests: folder of the tests marked `gpu`, or None.
    """

    device: str = "cuda"
    sizes: Sizes = field(default_factory=Sizes)
    until: float = float("inf")
    bccd: Path | None = None
    tests: Path | None = None

    @property
    def half(self) -> Precision:
        """What is timed where half precision is: float32 in a rehearsal on a CPU that would emulate it for minutes."""
        emulates = self.sizes.rehearsal and not has_kernels(torch.device(self.device), torch.bfloat16)
        return "float32" if emulates else "bfloat16"

    @property
    def left(self) -> float:
        """Seconds until the section should be done."""
        return self.until - time.monotonic()


class Section(NamedTuple):
    """One thing to measure.

    Attributes:
        run: gives its rows one by one, so that those before a deadline are kept.
        share: seconds out of eight minutes; what a section leaves over goes to those after it.
    """

    run: Callable[[Setting], Iterator[Row]]
    share: float


class Worker:
    """A process that runs sections one after the other, in a session of its own."""

    def __init__(self, sections: Mapping[str, Section], setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(dict(sections), setting, theirs))
        self._process.start()
        theirs.close()
        self._ready = False

    @property
    def alive(self) -> bool:
        """Whether it can take another section."""
        return self._process.is_alive() and not self._pipe.closed

    def run(self, name: str, seconds: float, keep: Callable[[Row], None]) -> tuple[str, str]:
        """Run a section.

        Args:
            name: of the section.
            seconds: that it should take.
            keep: called with each row.

        Returns:
            `done`, `failed` or `ended` (it was killed, or died), and what there is to say about it.
        """
        try:
            if not self._ready:
                if not self._pipe.poll(START_UP):
                    return self._end(f"its process did not start within {START_UP:g} s")
                self._pipe.recv()
                self._ready = True
            began = time.monotonic()
            self._pipe.send((name, began + seconds))
            while self._pipe.poll(max(0.0, began + 1.5 * seconds + GRACE - time.monotonic())):
                kind, value = self._pipe.recv()
                if kind != "row":
                    return kind, value
                keep(value)
            return self._end(f"it did not end within {1.5 * seconds + GRACE:.0f} s, and was ended")
        except (EOFError, OSError):
            self._process.join(5)
            return self._end(f"its process died with code {self._process.exitcode}")

    def _end(self, why: str) -> tuple[str, str]:
        self.close()
        return "ended", why

    def close(self) -> None:
        """End the process and all that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        with suppress(ProcessLookupError):
            self._process.kill()  # it has no session of its own in its first moments
        self._process.join(10)
        self._pipe.close()


def _serve(sections: Mapping[str, Section], setting: Setting, pipe: Any) -> None:
    """Run the sections that are asked for, until one fails: a GPU that raised an error may refuse all that follows."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            name, until = pipe.recv()
            try:
                for row in sections[name].run(replace(setting, until=until)):
                    pipe.send(("row", row))
            except Exception as error:
                traceback.print_exc()
                pipe.send(("failed", f"{type(error).__name__}: {error}"[:2000]))
                os._exit(1)
            _clean_up()
            pipe.send(("done", ""))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os.killpg(0, signal.SIGKILL)


def _clean_up() -> None:
    """Give the next section the device as the last one found it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def measure(sections: Mapping[str, Section], setting: Setting, minutes: float, path: Path) -> dict[str, Any]:
    """Run all sections in their order within the minutes.

    Args:
        sections: by name, the most valuable first.
        setting: for all of them.
        minutes: in all.
        path: of the JSON file, written anew after each row.

    Returns:
        What the file holds: of each section its `state`, `why`, `seconds` and `rows`. A section is `running` while it
        runs and `left out` where no time was left.
    """
    began = time.monotonic()
    found: dict[str, Any] = {"rehearsal": setting.sizes.rehearsal, "minutes": minutes, "sections": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    worker: Worker | None = None
    names = list(sections)
    try:
        for i, name in enumerate(names):
            started = time.monotonic()
            left = began + 60 * minutes - started
            seconds = left * sections[name].share / sum(sections[other].share for other in names[i:])
            result: dict[str, Any] = {"state": "running", "why": "", "seconds": 0.0, "rows": []}
            found["sections"][name] = result
            if seconds < LEAST:
                result |= {"state": "left out", "why": "no time was left"}
                _write(path, found)
                continue
            _write(path, found)
            if worker is None or not worker.alive:
                worker = Worker(sections, setting)

            def keep(row: Row, result: dict[str, Any] = result) -> None:
                result["rows"].append(row)
                _write(path, found)

            result["state"], result["why"] = worker.run(name, seconds, keep)
            if result["state"] != "done":
                worker.close()
            result["seconds"] = round(time.monotonic() - started, 2)
            _write(path, found)
            sys.stderr.write(f"{name}: {result['state']} in {result['seconds']:.0f} s {result['why']}\n")
    finally:
        if worker is not None:
            worker.close()
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """The file as a whole or not at all, and no page that says something else."""
    for target, text in ((path, json.dumps(content, indent=1)), (path.with_suffix(".md"), page(content))):
        part = target.with_name(target.name + ".part")
        part.write_text(text)
        os.replace(part, target)


def failures(found: Mapping[str, Any]) -> list[str]:
    """Names of the sections that did not do what they should: failed, or ended from outside."""
    return [name for name, section in found["sections"].items() if section["state"] not in ("done", "left out")]


def run(minutes: float, output: Path, docs: Path | None, rehearse: bool | None, only: list[str],
        bccd: Path | None) -> None:  # fmt: skip
    """Measure the GPU of this machine, or rehearse that on the CPU; arguments as of `commands.gpu`.

    Raises:
        RunError: a section failed; all others are in the file.
    """
    import torch

    from detection.benchmarks.gpu_sections import SECTIONS
    from detection.errors import RunError

    if unknown := set(only) - set(SECTIONS):
        raise RunError(f"--only {sorted(unknown)[0]}: there is no such section; there are {', '.join(SECTIONS)}")
    rehearse = not torch.cuda.is_available() if rehearse is None else rehearse
    if rehearse:
        minutes = max(minutes, 30.0)  # it is to reach its end, however slow the machine
        sys.stderr.write("this is a rehearsal on the CPU, in tiny sizes: its figures mean nothing\n")
    beside = [Path("shared/data/bccd"), Path("../shared/data/bccd")]
    tests = Path(__file__).resolve().parents[2] / "tests" / "gpu"
    setting = Setting(
        "cpu" if rehearse else "cuda",
        REHEARSAL if rehearse else Sizes(),
        bccd=bccd or next((path.resolve() for path in beside if path.is_dir()), None),
        tests=tests if tests.is_dir() else None,
    )
    chosen = {name: section for name, section in SECTIONS.items() if not only or name in only}
    path = output / "gpu.json"
    found = measure(chosen, setting, minutes, path)
    if docs is not None and not rehearse:
        _write(docs / "gpu.json", found)
    sys.stdout.write(page(found) + f"\n{path} and {path.with_suffix('.md')} are written.\n")
    if failed := failures(found):
        raise RunError(f"{len(failed)} of {len(found['sections'])} sections failed: {', '.join(failed)}; see {path}")
