"""Where figures go: `metrics.csv` in the run's folder, and W&B, which may fail without the run noticing."""

from __future__ import annotations

import csv
import io
import logging
import netrc
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

log = logging.getLogger(__name__)

RUN_FLAGS = ("project", "entity", "group", "tags", "notes", "name")  # what W&B's runs are found and grouped by
# Whose largest value is the run's summary.
BEST_OF = ("val/map", "val/map_50", "val/map_75", "val/segm_map", "val/keypoints_map")
WandbMode = Literal["off", "auto", "online", "offline"]
START_TIMEOUT = 30.0  # seconds that W&B's server has to answer before the run is recorded offline
END_TIMEOUT = 60.0  # seconds for the rest of the upload after training; what is left stays on disk


class MetricsFile(Logger):
    """`metrics.csv`, a row for each time that figures are logged, on the disk at once; a resumed run goes on with it.

    The file is whole at any moment: a row is one write, and for a new column the file is written anew beside the old
    one. Rows that a full disk has no room for are kept, and written when it has.

    Args:
        folder: of the run.
    """

    name = version = ""  # no folders of Lightning's within the run's

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self._columns: list[str] | None = None
        self._rows = 0
        self._waiting: list[dict[str, Any]] = []

    @property
    def save_dir(self) -> str:
        """The run's folder, where Lightning writes `config.yaml` too."""
        return str(self.path.parent)

    @property
    def rows(self) -> int:
        """How many there are, with those that wait."""
        self._open()
        return self._rows + len(self._waiting)

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: `config.yaml` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write a row; the figures of one step may come in several."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        columns, reported = self._open(), bool(self._waiting)
        self._waiting.append(row | {"step": step})
        try:
            new = {name for row in self._waiting for name in row if name not in columns}
            if new or not self.path.is_file():
                self._write_anew(self._read() + self._waiting, sorted({*columns, *new}))
            else:
                self._append(self._waiting, columns)
            self._rows, self._waiting = self._rows + len(self._waiting), []
        except OSError as error:
            if not reported:
                log.error("%s can't be written (%s): its rows wait for room", self.path, error.strerror)

    @rank_zero_only
    def cut(self, rows: int) -> None:
        """Keep the first rows only: those of the checkpoint from which the run goes on."""
        if rows < self.rows:
            self._write_anew(self._read()[:rows], self._open())
            self._rows = rows

    def _open(self) -> list[str]:
        """The columns of the file, which an earlier process may have begun."""
        if self._columns is None:
            found = self._read()
            self._columns, self._rows = list(found[0]) if found else [], len(found)
        return self._columns

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _append(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        text, size = io.StringIO(), self.path.stat().st_size
        csv.DictWriter(text, columns).writerows(rows)
        try:
            with self.path.open("a", newline="") as file:
                file.write(text.getvalue())
        except OSError:
            os.truncate(self.path, size)  # half a row would spoil the next
            raise

    def _write_anew(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".partial")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        beside.replace(self.path)
        self._columns = columns


class Tracker(WandbLogger):
    """A W&B run that asks for nothing, waits for little, and is the same run again when resumed.

    Whatever W&B does, training goes on: without a key or a server the run is recorded in the folder, to be sent later;
    and after an error in the middle of a run nothing more is sent. Each is one line in the log. A row's step is the
    optimiser step, so that steps which a resumed run repeats replace nothing and leave no gap. `WANDB_PROJECT`,
    `WANDB_NAME` and `WANDB_RUN_ID` count where they are set.

    Args:
        mode: `online`, `offline`, or `auto`: online when a key is known, else offline.
        folder: of the run; W&B's files go there too.
        config: what W&B shows as the run's configuration; None takes the hyperparameters that Lightning gives.
        shown: those of `RUN_FLAGS` that are given; they come before the variables of the environment.

    Raises:
        ValueError: `online` without a key.
    """

    def __init__(
        self,
        mode: WandbMode,
        folder: Path,
        config: Mapping[str, Any] | None = None,
        shown: Mapping[str, Any] | None = None,
    ) -> None:
        known = logged_in()
        if mode == "online" and not known:
            raise ValueError("W&B knows no key for --wandb online: run `wandb login`, or use --wandb auto")
        options: dict[str, Any] = {} if config is None else {"config": dict(config)}
        super().__init__(
            project=os.environ.get("WANDB_PROJECT", "detection"),
            name=os.environ.get("WANDB_NAME") or f"{folder.parent.name}/{folder.name}",
            id=os.environ.get("WANDB_RUN_ID") or run_id(folder),
            save_dir=str(folder),
            offline=mode == "offline" or not known,
            **options,
        )
        self._wandb_init.pop("anonymous", None)  # W&B warns of it
        self._wandb_init |= {name: value for name, value in (shown or {}).items() if value is not None}
        self.folder, self._wanted = folder, mode
        self.lost = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, started at the first call; one that drops everything where W&B can't start at all."""
        if self._experiment is None:
            self._experiment = self._start()
        return self._experiment

    def _start(self) -> Any:
        import wandb  # takes a second, which --help and the runs without it need not wait for

        if wandb.run is not None:  # the caller's own, as in a sweep from Python
            return wandb.run
        self.folder.mkdir(parents=True, exist_ok=True)
        limits = {"init_timeout": START_TIMEOUT, "login_timeout": START_TIMEOUT, "finish_timeout": END_TIMEOUT}
        for mode in ("offline",) if self._offline else ("online", "offline"):
            if mode == "offline":
                os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline, W&B would still look up its server
            try:
                run = wandb.init(**self._wandb_init, mode=mode, settings=wandb.Settings(silent=True, **limits))  # type: ignore[arg-type]
            except Exception as error:
                log.warning("W&B can't start %s (%s)", mode, _first_line(error))
                wandb.teardown()  # or the next attempt finds the run in use
                continue
            if mode == "online":
                log.info("W&B: %s", run.url)
            else:
                why = "" if self._wanted == "offline" or logged_in() else "not logged in, so "
                send = f"wandb sync {self.folder.as_posix()}/wandb/offline-run-*"
                log.info("W&B: %soffline; send the run later with: %s", why, send)
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step")
            for name in BEST_OF:
                run.define_metric(name, step_metric="trainer/global_step", summary="max")
            return run
        self.lost = True
        return wandb.init(mode="disabled")

    def start(self) -> None:
        """Start W&B's run now, and not with the first figures."""
        self.attempt(lambda: self.experiment)

    def attempt(self, action: Callable[[], object]) -> None:
        """Do it, on the first rank, unless W&B has failed before; its first failure is a warning and no more."""
        if self.lost or getattr(rank_zero_only, "rank", 0) != 0:  # type: ignore[arg-type]
            return
        try:
            action()
        except Exception as error:
            self.lost = True
            log.warning("W&B failed (%s); training goes on without it, metrics.csv has all figures", _first_line(error))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add figures, or W&B's media, to the row of an optimiser step; rows that are complete stay as they are."""

        def send() -> None:
            run = self.experiment
            if step is None:
                run.log(dict(metrics))
            elif step >= run.step:  # W&B has the others from before the interruption, and would warn of each
                run.log({**metrics, "trainer/global_step": step}, step=step)

        self.attempt(send)

    def log_hyperparams(self, params: Any) -> None:
        """Show them as the configuration, unless there is one."""
        if "config" not in self._wandb_init:
            log_all = super().log_hyperparams
            self.attempt(lambda: log_all(params))

    def log_checkpoint(self, path: Path, figures: Mapping[str, float]) -> None:
        """Keep a checkpoint as an artifact with the aliases `best` and `latest`; offline too, where it is sent later.

        Args:
            path: the file, which W&B copies.
            figures: shown beside it.
        """

        def send() -> None:
            import wandb

            run = self.experiment
            artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=dict(figures))
            artifact.add_file(str(path), name=path.name)
            run.log_artifact(artifact, aliases=["best", "latest"])

        self.attempt(send)

    def log_facts(self, kind: str, files: Mapping[str, str], facts: Mapping[str, Any], name: str | None = None) -> None:
        """Keep small texts as an artifact; the same content again, in any run, is the same version of its name.

        Args:
            kind: `dataset` or `config`, the artifact's type.
            files: name -> content.
            facts: shown beside them.
            name: what runs share it by; None is for this run alone.
        """
        shared = re.sub(r"[^\w.-]+", "-", name or "")

        def send() -> None:
            import wandb

            run = self.experiment
            artifact = wandb.Artifact(f"{kind}-{shared or run.id}", type=kind, metadata=dict(facts))
            for name, content in files.items():
                with artifact.new_file(name, mode="w", encoding="utf-8") as file:
                    file.write(content)
            run.log_artifact(artifact)

        self.attempt(send)

    def summarise(self, figures: Mapping[str, Any]) -> None:
        """Put figures into the run's summary, by which runs are compared."""
        self.attempt(lambda: self.experiment.summary.update(dict(figures)))

    def finalize(self, status: str) -> None:
        """End W&B's run: as finished, or as failed."""
        run, self._experiment = self._experiment, None
        if run is not None:
            import wandb

            try:
                run.finish(exit_code=int(status != "success"))
            except Exception as error:
                log.warning("W&B could not end its run (%s)", _first_line(error))
                with suppress(Exception):
                    wandb.teardown()  # what it left running would speak up at the end of the process


def run_id(folder: Path) -> str:
    """W&B's id of the run in this folder: that of its earlier part, else a new one that no other run has."""
    earlier = sorted((folder / "wandb").glob("*run-*-*"))
    found = [match[1] for path in earlier if (match := re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(.+)", path.name))]
    return found[-1] if found else re.sub(r"\W+", "-", f"{folder.parent.name}-{folder.name}-{secrets.token_hex(2)}")


def logged_in() -> bool:
    """Whether W&B would find a key without asking."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
