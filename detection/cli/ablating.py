"""The command `ablate`: a base and its swaps, each with several seeds, and the table of the paper."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from detection.cli.comparing import contrast, limits_of, same_images, shared_sigmas
from detection.cli.detected import Detected, data_of_run, of_run
from detection.cli.fit_help import CONFIGS
from detection.cli.flags import TRUST, answered, check_ranges, split_behind, take_trust
from detection.cli.wording import Flags
from detection.data.finding import Stage
from detection.data.records import DataError
from detection.errors import SettingsError, explain
from detection.evaluation.ablation_table import Row, markdown, write_table
from detection.evaluation.coco_eval import judge
from detection.evaluation.comparison_page import write_comparison
from detection.evaluation.resampling import drawn, figure_names
from detection.evaluation.significance import LEVEL, Difference
from detection.training.module import DetectionModule
from detection.training.planned import Planned, State, train
from detection.training.resume import INTERRUPTED

DESCRIPTION = """Trains a base and what swaps some of its settings, each with every seed, and writes the paper's table.

  detection ablate base.yaml --swap model.detector.init_args.box_loss=detection.GIoULoss --seeds 0,1,2 --budget 2h
  detection ablate bccd --swap data.hflip=0 --swap "slow:model.lr=0.001" "trainer.max_steps=2000" -- --data.root BCCD

Each --swap is a row; several settings in one are swapped together; NAME: before them names it. What stands behind --
goes to each `detection fit`. The same command goes on where it was stopped.
"""
BASE = "base"
SETTING = re.compile(r"(?:([^:=]+):)?([A-Za-z_][\w.+]*)=(.*)", re.S)


class Swap(NamedTuple):
    """A row of the table: its name, and the flags in which it differs from the base."""

    name: str
    flags: tuple[str, ...] = ()


def main(flags: Sequence[str]) -> int | str | None:
    """Run the command with its flags; returns the sentence on what went wrong, or 75 where a signal stopped it."""
    own, behind = split_behind(flags)
    own, trust = take_trust(own)
    parser = Flags("detection ablate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of the base: a file, or the name of a packaged one")
    parser.add_argument("--swap", nargs="+", action="append", metavar="SETTING=VALUE", help="a row of the table")
    parser.add_argument("--seeds", default="0,1,2", help="of every row (default: 0,1,2)")
    parser.add_argument("--budget", default="", help="no run begins that would end later, as in 90m, 2h, 1h30m")
    parser.add_argument("--parallel", type=int, help="runs at a time (default: one a GPU; one without)")
    parser.add_argument("--every_seed", action="store_true", help="train those of decided differences too")
    parser.add_argument("--output", type=Path, default=Path("ablation"), help="folder of the runs and the table")
    parser.add_argument("--dry_run", action="store_true", help="print the command lines, and train nothing")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--masks", action="store_true", help="compare masks instead of boxes")
    kind.add_argument("--keypoints", action="store_true", help="compare key points instead of boxes")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (default: 1000)")
    parser.add_argument("--accelerator", default="auto", help="to detect with for the table: cpu, gpu, auto")
    parser.add_argument(TRUST, nargs="+", help="packages whose parts the checkpoints may use: their code runs")
    given = parser.parse_args(own)
    return answered(lambda: _ablate(given, behind, trust))


def _ablate(given: argparse.Namespace, behind: list[str], trust: list[str]) -> None:
    check_ranges(draws=(given.draws, 100), parallel=(given.parallel, 1))
    swaps, seeds, budget = swaps_of(given.swap or []), seeds_of(given.seeds), seconds_of(given.budget)
    plan = planned(given.config, swaps, seeds, behind, given.output)
    if given.dry_run:
        for run in plan:
            print(shlex.join(run.command()))
        return
    if other := next((run for run in plan if run.began_otherwise()), None):
        raise SettingsError(
            f"{other.folder} holds a run of other settings: give another --output, or take the folder away"
        )
    table = Ablation(given, trust, plan, [swap.name for swap in swaps])
    left_out = train(plan, devices(given.parallel), budget, table.needless, print)
    rows = table.rows(swaps, left_out)
    base = shlex.join([given.config, *behind])
    compared = "key points" if given.keypoints else "masks" if given.masks else "boxes"
    write_table(given.output, rows, base, compared)
    print(markdown(rows, base, compared).partition("\nBase: ")[0])
    print(f"table: {given.output / 'table.md'}, {given.output / 'table.tex'}, {given.output / 'table.json'}")


def swaps_of(given: Sequence[Sequence[str]]) -> list[Swap]:
    """The rows: the base, and each swap by its name, or what it sets.

    Raises:
        SettingsError: it is no setting with a value, or two rows have one name.
    """
    swaps = [Swap(BASE)]
    for settings in given:
        name, flags, short = "", list[str](), list[str]()
        for setting in settings:
            match = SETTING.fullmatch(setting.removeprefix("--"))
            if match is None:
                raise SettingsError(f"--swap {setting}: give a setting and its value, as in --swap model.lr=0.01")
            name = name or match[1] or ""
            flags += [f"--{match[2]}={match[3]}"]
            value = match[3].rpartition(".")[2] if re.fullmatch(r"[A-Za-z_][\w.]*", match[3]) else match[3]
            short.append(f"{match[2].rpartition('.')[2]}={value}")
        swaps.append(Swap(name or " ".join(short), tuple(flags)))
    folders = [_folder(swap.name) for swap in swaps]
    if twice := next((swap.name for swap, own in zip(swaps, folders, strict=True) if folders.count(own) > 1), None):
        raise SettingsError(f"two rows are called {twice}: name one, as in --swap NAME:SETTING=VALUE")
    return swaps


def seeds_of(given: str) -> list[int]:
    """The seeds, in their order."""
    if not re.fullmatch(r"\d+(,\d+)*", given.replace(" ", "")):
        raise SettingsError(f"--seeds {given}: give whole numbers with commas between, as in 0,1,2")
    return list(dict.fromkeys(int(seed) for seed in given.split(",")))


def seconds_of(given: str) -> float:
    """A time such as `1h30m`, `90m` or `45s`, in seconds; without one all the time there is."""
    if not given:
        return float("inf")
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", given)
    if match is None:
        raise SettingsError(f"--budget {given}: give hours, minutes or seconds, as in 2h, 1h30m or 90s")
    return sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))


def planned(
    config: str, swaps: Sequence[Swap], seeds: Sequence[int], behind: Sequence[str], output: Path
) -> list[Planned]:
    """The runs, seed by seed, so that all rows have one before any has two.

    Args:
        config: of the base.
        swaps: the rows.
        seeds: of each.
        behind: flags of every run.
        output: folder of the plan.
    """
    file = Path(config) if Path(config).is_file() else CONFIGS / f"{config}.yaml"
    if not file.is_file():
        raise SettingsError(f"there is no configuration {config}: give a file, or the name of a packaged one")
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    return [
        Planned(
            swap=swap.name,
            seed=seed,
            flags=("--config", config, "--wandb_group", swap.name, *behind, *swap.flags),
            config=content,
            folder=output / _folder(swap.name) / f"seed{seed}",
        )
        for seed in seeds
        for swap in swaps
    ]


def devices(parallel: int | None) -> list[str | None]:
    """One device for each run at a time, as CUDA_VISIBLE_DEVICES has them; without GPUs None."""
    count = torch.cuda.device_count()
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]
    if not names:
        return [None] * (parallel or 1)
    return [names[i % count] for i in range(parallel or count)]


class Ablation:
    """What the finished runs of a plan say.

    Args:
        given: flags of the command.
        trust: packages whose parts the checkpoints may use.
        plan: the runs.
        names: of the rows, the base first.
    """

    def __init__(self, given: argparse.Namespace, trust: list[str], plan: Sequence[Planned], names: list[str]) -> None:
        self.given, self.trust, self.plan, self.names = given, trust, plan, names
        self._detected = dict[Path, Detected]()
        self._found = dict[tuple[str, tuple[Planned, ...]], Difference | str]()

    def needless(self, run: Planned) -> str:
        """Why a run need not be trained: the comparison has decided without it. Empty where it must be.

        Each look at a difference may err. So with `n` seeds, and as many as `n - 1` looks, it is decided where p is
        below 0.05 / (n - 1) (Bonferroni).
        """
        if self.given.every_seed:
            return ""
        if run.swap != self.names[0]:
            return self._decided(run.swap)
        return "all swaps are decided" if self.names[1:] and all(map(self._decided, self.names[1:])) else ""

    def _decided(self, name: str) -> str:
        base, swap = self.finished(self.names[0]), self.finished(name)
        seeds = len(self.plan) // len(self.names)
        if min(len(base), len(swap)) < 2 or len(swap) == seeds:
            return ""  # of one run nothing is known of other seeds
        found = self.difference(name)
        if isinstance(found, str) or not found.p * (seeds - 1) < 1 - LEVEL:
            return ""
        return f"the difference of AP is decided after {len(swap)} seeds (p {found.p:.4f})"

    def finished(self, name: str) -> list[Planned]:
        """The finished runs of a row."""
        return [run for run in self.plan if run.swap == name and run.checkpoint() is not None]

    def difference(self, name: str) -> Difference | str:
        """The AP of a swap less that of the base; or why it can't be said. The page of the comparison is written."""
        sides = self.finished(name), self.finished(self.names[0])
        key = name, (*sides[0], *sides[1])
        if key not in self._found:
            try:
                self._found[key] = self._compare(name, sides)
            except Exception as error:
                if (said := explain(error)) is None:
                    raise
                self._found[key] = said
                print(f"{name} can't be compared: {said}")
        return self._found[key]

    def _compare(self, name: str, sides: Sequence[Sequence[Planned]]) -> Difference:
        a, b = same_images([[self.detected(run) for run in side] for side in sides])
        sigmas = shared_sigmas([*a, *b]) if self.given.keypoints else ()
        found, left, right = contrast(a, b, (name, self.names[0]), self.given.masks, self.given.draws, sigmas=sigmas)
        folder = self.given.output / "comparisons" / _folder(name)
        write_comparison(folder, found, left, right, a[0].class_names, self.given.draws)
        return found.figures[0]

    def detected(self, run: Planned) -> Detected:
        """What a finished run detects in its validation images."""
        path = run.checkpoint()
        assert path is not None
        if path not in self._detected:
            found = of_run(path, "val", self.trust, None, self.given.accelerator, None)
            if self.given.masks and not found.masks:
                raise DataError("--masks compares masks, but not all runs have them: leave it out")
            self._detected[path] = replace(found, name=f"{run.folder.parent.name}/{run.folder.name}")
        return self._detected[path]

    def rows(self, swaps: Sequence[Swap], left_out: dict[Planned, str]) -> list[Row]:
        """The table.

        Args:
            swaps: the rows.
            left_out: runs that were not trained, and why.
        """
        rows = []
        for swap in swaps:
            done, remarks, row = self.finished(swap.name), list[str](), Row(swap.name, shlex.join(swap.flags))
            for run in (run for run in self.plan if run.swap == swap.name and run not in done):
                remarks.append(f"seed {run.seed} {_absence(run.state(), left_out.get(run, ''))}")
            try:
                facts = [self._facts(run) for run in done]
                row = replace(row, runs=facts, figures=[self.figures(run) for run in done])
            except Exception as error:
                if (said := explain(error)) is None:
                    raise
                remarks.append(f"its runs can't be read: {said}")
            if row.runs and swap.name != self.names[0] and self.finished(self.names[0]):
                found = self.difference(swap.name)
                row = replace(row, difference=None if isinstance(found, str) else found)
                remarks += [f"not compared: {found}"] if isinstance(found, str) else []
            rows.append(replace(row, remarks=remarks))
        for key in ("commit", "data"):
            if len(values := {run[key] for row in rows for run in row.runs}) > 1:
                own = f"not all runs have the same {key}: {', '.join(sorted(value[:12] for value in values))}"
                rows[0] = replace(rows[0], remarks=[*rows[0].remarks, own])
        return rows

    def figures(self, run: Planned) -> dict[str, float]:
        """The figures of a finished run, as `detection compare` has them."""
        own = self.detected(run)
        sigmas = shared_sigmas([own]) if self.given.keypoints else ()
        limits, count = limits_of(own.limit, sigmas), len(own.class_names)
        one = np.ones((1, len(own.results)), np.int16)
        judged = list(judge(own.results, count, limits[-1], self.given.masks, sigmas=sigmas))
        figures = dict(zip(figure_names(limits), drawn(judged, count, one, one, limits)[0][0].tolist(), strict=True))
        return figures | ({"map_small": math.nan} if sigmas else {})  # of which COCO has none

    def _facts(self, run: Planned) -> dict[str, str]:
        facts, state, path = self.detected(run).facts, run.state(), run.checkpoint()
        assert path is not None
        if not state.data:
            state = replace(state, data=data_checksum(path, self.trust))
            run.keep(state)
        return {
            "run": str(path.parent),
            "seed": str(run.seed),
            "step": facts["step"],
            "commit": facts["code"],
            "data": state.data,
            "config": state.config,
            "checkpoint": facts["sha256"],
            "time": f"{state.seconds:.0f} s",
        }


def data_checksum(ckpt: Path, trust: list[str]) -> str:
    """Of what a run has trained and validated on: names and sizes of its images, their objects and classes."""
    module = DetectionModule.load_from_checkpoint(ckpt, trust, map_location="cpu")
    data = data_of_run(ckpt, trust, module, {})
    digest = hashlib.sha256()
    stages: tuple[Stage, ...] = ("train", "val")
    for split in stages:
        index = data.read(split)
        digest.update(repr((split, index.classes)).encode())
        for record in index.records:
            digest.update(repr((record.file_name, record.width, record.height, record.segments)).encode())
            for values in (record.boxes, record.labels, record.iscrowd, record.difficult):
                digest.update(values.tobytes())
    return digest.hexdigest()


def _absence(state: State, why: str) -> str:
    """Why a run has no figures."""
    if state.code not in (None, 0, INTERRUPTED):
        return f"failed: {state.said}"
    begun = "was interrupted, and not gone on with" if state.flags else "was left out"
    return f"{begun}: {why}" if why else begun


def _folder(name: str) -> str:
    """A name as a folder has it."""
    return re.sub(r"[^\w.=+-]+", "_", name).strip("_.")
