"""Trainings that are planned together: each is one `detection fit`, and its folder says how far it is.

`PLAN/SWAP/seed0/` holds the run's own folder, `log.txt`, `run.json` and `lock`. The lock is the process's own: it is
gone when the process is, however it ended. So a plan that was killed goes on with the same command: what is finished
stays, what was interrupted is resumed, and what still trains is waited for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from detection.training.checkpoints import best_or_last, newest_run
from detection.training.locking import locked
from detection.training.resume import INTERRUPTED

STATE, LOCK, LOG = "run.json", "lock", "log.txt"
POLL = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True, slots=True)
class Planned:
    """A run that is to be trained.

    Attributes:
        swap: what it is a run of.
        seed: its `--seed_everything`.
        flags: of `detection fit`, all but those of name, folder and seed.
        config: checksum of the configuration that the flags name.
        folder: its own; two levels below that of the plan.
    """

    swap: str
    seed: int
    flags: tuple[str, ...]
    config: str
    folder: Path

    def command(self) -> list[str]:
        """The command line, which begins the run or goes on with it."""
        own = ["--output", str(self.folder.parent), "--name", self.folder.name, "--seed_everything", str(self.seed)]
        return [sys.executable, "-m", "detection", "fit", *self.flags, *own, "--resume", "auto"]

    def state(self) -> State:
        """How far it is."""
        try:
            return State(**json.loads((self.folder / STATE).read_text()))
        except (OSError, ValueError, TypeError):
            return State()

    def trained(self) -> float:
        """Seconds it has trained, up to the last line of its log where it trains or its plan was killed."""
        state, files = self.state(), [self.folder / name for name in (LOG, STATE)]
        if state.code is not None or not all(file.is_file() for file in files):
            return state.seconds
        log, begun = (file.stat().st_mtime for file in files)
        return state.seconds + max(0.0, log - begun)

    def keep(self, state: State) -> None:
        """Write how far it is, whole or not at all."""
        partial = self.folder / f"{STATE}.partial"
        partial.write_text(json.dumps(asdict(state), indent=2))
        partial.replace(self.folder / STATE)

    def checkpoint(self) -> Path | None:
        """The best checkpoint of the run, if it is finished."""
        newest = newest_run(self.folder)
        if newest is None or self.state().code != 0:
            return None
        with suppress(FileNotFoundError):
            return best_or_last(newest)
        return None

    def began_otherwise(self) -> bool:
        """Whether its folder holds a run of other settings."""
        state = self.state()
        return bool(state.flags) and (state.flags, state.config) != (list(self.flags), self.config)


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a run.

    Attributes:
        flags, config: it was begun with, see `Planned`.
        seconds: it has trained.
        code: it ended with; None while it trains, or where it was killed together with the plan.
        said: the last line of its log, where it failed.
        data: checksum of its data, once that was computed.
    """

    flags: list[str] = field(default_factory=list)
    config: str = ""
    seconds: float = 0.0
    code: int | None = None
    said: str = ""
    data: str = ""


class Training:
    """A planned run in a process of its own.

    Args:
        run: that is begun or gone on with.
        device: that it shall see, as CUDA_VISIBLE_DEVICES has it; None for all.
        lock: of its folder; the process holds it, too.
    """

    def __init__(self, run: Planned, device: str | None, lock: int) -> None:
        self.run, self.device, self._lock = run, device, lock
        run.keep(State(list(run.flags), run.config, run.trained()))
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        with (run.folder / LOG).open("ab") as log:
            self._log_from = log.tell()
            self.process = subprocess.Popen(
                run.command(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is passed on once, and not twice
            )

    def ended(self) -> State | None:
        """What came of it, once it has ended."""
        code = self.process.poll()
        if code is None:
            return None
        seconds = self.run.trained()  # the clock would count a comparison, during which nobody looks
        state = State(list(self.run.flags), self.run.config, seconds, code, self._complaint(code))
        self.run.keep(state)
        os.close(self._lock)
        return state

    def _complaint(self, code: int) -> str:
        """What the run said of its failure: its last error, or else its last line."""
        if code in (0, INTERRUPTED):
            return ""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        text = (self.run.folder / LOG).read_bytes()[self._log_from :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or [f"exit code {code}"])[-1]


def train(
    plan: Sequence[Planned],
    devices: Sequence[str | None],
    budget: float,
    needless: Callable[[Planned], str],
    say: Callable[[str], object],
) -> dict[Planned, str]:
    """Train what is not finished, in the order of the plan, one run a device at a time.

    Args:
        plan: the runs.
        devices: as CUDA_VISIBLE_DEVICES has them, one for each run at a time; None is not to choose.
        budget: seconds; no run begins that would take longer, as long as the longest so far did.
        needless: says why a run need not be trained; empty where it must be.
        say: is told of each begin and end.

    Returns:
        why runs were left out.

    Raises:
        Stopped: a signal came; all runs have saved and ended.
    """
    until = time.monotonic() + budget
    waiting, active, left_out = list(plan), list[Training](), dict[Planned, str]()
    with _noted() as signals:
        passed_on = 0
        while waiting or active:
            while passed_on < len(signals):
                waiting.clear()
                for training in active:
                    training.process.send_signal(signals[passed_on])
                passed_on += 1
            for training in list(active):
                if (state := training.ended()) is not None:
                    active.remove(training)
                    say(_ended(training.run, state))
            free = list(devices)
            for training in active:
                free.remove(training.device)
            for run in list(waiting) if free else ():
                if run.checkpoint() is not None:
                    waiting.remove(run)
                elif why := needless(run) or _too_long(run, plan, until - time.monotonic()):
                    waiting.remove(run)
                    left_out[run] = why
                    say(f"{run.swap}, seed {run.seed}: left out, {why}")
                elif (lock := locked(run.folder / LOCK)) is not None:
                    waiting.remove(run)
                    say(f"{run.swap}, seed {run.seed}: training, see {run.folder / LOG}")
                    active.append(Training(run, free[0], lock))
                    break  # what ends until the next look may decide what is needless
            else:
                time.sleep(POLL)
    if signals:
        raise Stopped(f"{signal.Signals(signals[0]).name}: all runs have saved; the same command goes on")
    return left_out


class Stopped(Exception):  # noqa: N818
    """A signal came, and all runs have ended."""


@contextmanager
def _noted() -> Iterator[list[int]]:
    """Note signals down, for the trainings; gives the list of those that came."""
    came = list[int]()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _too_long(run: Planned, plan: Sequence[Planned], left: float) -> str:
    """Why there is no time for a run; one that goes on needs only the rest of the longest."""
    longest = max((state.seconds for state in (other.state() for other in plan) if state.code == 0), default=0.0)
    needed = max(0.0, longest - run.state().seconds)
    return "" if needed < left else f"{max(0.0, left):.0f} s of the budget are left and it takes {needed:.0f} s"


def _ended(run: Planned, state: State) -> str:
    known: dict[int | None, str] = {0: "finished", INTERRUPTED: "interrupted"}
    how = known.get(state.code, f"failed: {state.said}")
    return f"{run.swap}, seed {run.seed}: {how} after {state.seconds:.0f} s"
