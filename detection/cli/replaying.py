"""The command `replay`: a training step of a run drawn again, as numbers and as pictures."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from rich.table import Column, Table

from detection.cli.fit import FitCLI, listed
from detection.cli.flags import TRUST, check_ranges, take_trust
from detection.cli.folder import CONFIG
from detection.cli.output import set_up_output
from detection.cli.wording import Flags
from detection.data.records import DataError
from detection.errors import complaint
from detection.training.checkpoints import Start
from detection.training.logged import Saved, compare, logged, reasons, saved, verdict, was_on_gpu
from detection.training.replay import Recorder, Replayed, Restore, as_json
from detection.training.replay_pictures import draw_step
from detection.trust import import_from_working_directory

log = logging.getLogger(__name__)

DESCRIPTION = """Draws a training step again: its batch, what anchors and regions trained on, losses and gradients.

  detection replay runs/voc/<time> --step 4211

It trains from the newest checkpoint before that step, or from the beginning of the run, writes nothing of the run, and
says whether the figures equal those logged, bit for bit. Steps count from 0, as in metrics.csv.
"""


def main(flags: Sequence[str]) -> int | str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    flags, trust = take_trust(flags)
    parser = Flags("detection replay", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--step", type=int, required=True, help="as metrics.csv counts, from 0")
    parser.add_argument("--root", type=Path, help="folder of the run's data, if it has moved")
    parser.add_argument("--accelerator", help="to train on: cpu, gpu, auto (default: as the run)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/replay_STEP)")
    parser.add_argument(TRUST, nargs="+", help="packages whose parts the run may use: their code runs")
    given = parser.parse_args(flags)
    set_up_output()
    warnings.filterwarnings("ignore", "(?s).*callbacks used to create the checkpoint.*")  # those that write
    import_from_working_directory()
    try:
        return complaint(lambda: _replay(given, trust))
    except ValueError as error:
        return f"error: {error}"


class ReplayCLI(FitCLI):
    """Builds a run anew from its folder, with a recorder in the place of all that writes.

    Args:
        run: its folder.
        checkpoint: to begin from; None for the beginning of the run.
        recorder: of the step.
        output: folder of what is recorded.
        flags: of `detection fit`, which take the place of the run's settings.
    """

    def __init__(
        self, run: Path, checkpoint: Path | None, recorder: Recorder, output: Path, flags: Sequence[str] = ()
    ) -> None:
        self._begin, self._recorder = Start(output, checkpoint), recorder
        super().__init__(["--resume", str(run), *flags])

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """As for the run itself, but nothing is saved or shown."""
        super().parse_arguments(parser, args)
        self.save_config_callback = None
        self.config.trainer.enable_checkpointing = True  # for `Restore`, which Lightning takes for one that saves
        self.config.trainer.enable_progress_bar = False
        if self._begin.checkpoint is None and self.config.seed_everything is False:
            raise DataError(
                "this run had no seed (seed_everything: false), so its beginning can't be repeated, and it has no "
                f"checkpoint before that step: {KEEP}"
            )

    def _choose_start(self) -> Start:
        return self._begin

    def _callbacks(self, given: Namespace) -> list[Callback]:
        writes = Checkpoint | ProgressBar
        return [self._recorder, *(c for c in listed(given.callbacks) if not isinstance(c, writes)), Restore()]

    def _loggers(self, given: Namespace) -> list[Logger]:
        return [DummyLogger()]  # for callbacks that want one


KEEP = (
    "a run keeps some with --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps 500 "
    "--trainer.callbacks.save_top_k=-1"
)


def _replay(given: argparse.Namespace, trust: list[str]) -> None:
    check_ranges(step=(given.step, 0))
    if not (given.run / CONFIG).is_file():
        raise DataError(f"{given.run} has no {CONFIG}: name the folder of a run")
    there = saved(given.run)
    begin = max((point for point in there if point.steps <= given.step), default=None)
    output = given.output or given.run / f"replay_{given.step}"
    flags = [f"{TRUST}={','.join(trust)}"] if trust else []
    flags += ["--data.root", str(given.root)] if given.root else []
    flags += ["--trainer.accelerator", given.accelerator] if given.accelerator else []
    recorder = Recorder(given.step)
    cli = ReplayCLI(given.run, begin.path if begin else None, recorder, output, flags)
    _announce(begin, given.step)
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.checkpoint)
    except Replayed:
        pass
    else:
        raise DataError(f"{given.run} has no step {given.step}: it ends after {cli.trainer.global_step} steps")
    if cli.trainer.global_rank:
        output = output / f"rank_{cli.trainer.global_rank}"
    found = compare(recorder.figures, logged(given.run, cli.trainer.global_rank), given.step)
    content = as_json(recorder, found)
    content |= {"from": begin.path.name if begin else "the beginning", "repeated": len(recorder.figures) - 1}
    content["verdict"] = verdict(
        found, given.step, reasons(there[-1] if there else None, was_on_gpu(given.run), recorder.facts)
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "replay.json").write_text(json.dumps(content, indent=1, ensure_ascii=False))
    draw_step(recorder.parts, cli.model.detector, cli.model.class_names, output)
    if cli.trainer.is_global_zero:
        _print(content)
        print(content["verdict"])
        count = cli.trainer.world_size
        others = "" if count == 1 else f"; of the other processes in rank_1 to rank_{count - 1} there"
        print(f"numbers and pictures: {output}{others}")


def _announce(begin: Saved | None, step: int) -> None:
    count = step - (begin.steps if begin else 0)
    steps = f"repeating {count} step{'s' * (count != 1)} from"
    if begin is not None:
        log.info("%s %s", steps, begin.path)
    else:
        log.info("%s the beginning of the run, as no checkpoint is older than step %d: %s", steps, step, KEEP)


def _print(content: dict[str, Any]) -> None:
    """The figures beside those logged, the gradients by part, and each image with what trained on it."""
    console = Console()
    figures = Table("figure", "replayed", "logged", box=None, padding=(0, 1, 0, 0))
    for name, value in content["figures"].items():
        figures.add_row(name, str(value), str(content["logged"].get(name, "-")))
    norms = Table("gradient of", "norm", box=None, padding=(0, 1, 0, 0))
    for name, value in content["gradient_norms"].items():
        norms.add_row(name, str(value))
    images = Table(
        Column("image", overflow="fold"),
        "size",
        "objects",
        "anchors fg / ignored / drawn",
        "regions fg / drawn",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for image in (image for batch in content["batches"] for image in batch["images"]):
        anchors, regions = image.get("anchors_counted"), image.get("regions")
        foreground = sum(region["label"] > 0 for region in regions or ())
        height, width = image["size"]
        images.add_row(
            str(image.get("file", "-")),
            f"{width} x {height}",
            str(len(image["labels"])),
            "{foreground} / {ignored} / {sampled}".format(**anchors) if anchors else "-",
            f"{foreground} / {len(regions)}" if regions is not None else "-",
        )
    for table in (figures, norms, images):
        console.print(table)
