"""The command `suspects`: annotations that a cross-validated detector contradicts, and what to label next."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from detection.batch import Id
from detection.cli.ablating import devices
from detection.cli.detected import data_of_run, of_file, of_run
from detection.cli.flags import TRUST, answered, check_ranges, chosen, split_behind, take_trust
from detection.cli.folder import CONFIG
from detection.cli.wording import Flags
from detection.data.duplicates import gradients
from detection.data.images import read_image
from detection.data.listing import as_id, read_listing
from detection.data.records import DataError
from detection.data.spectral import false_colour
from detection.errors import SettingsError
from detection.evaluation.next_labels import Unlabelled, merged, ranked, write_next
from detection.evaluation.suspect_files import Judged, write_files
from detection.evaluation.suspects_page import render
from detection.evaluation.suspicion import KINDS, partly_annotated, suspects
from detection.inference.detector import Detector
from detection.inference.sources import Images, open_source
from detection.training.checkpoints import LAST, STAMP
from detection.training.module import DetectionModule
from detection.training.planned import Planned, train

DESCRIPTION = """Lists annotations that a detector contradicts which has not trained on them.

  detection suspects runs/bccd/<time>               the training images: in 3 folds, each judged by a detector that
                                                    is trained on the others, with the settings of the run
  detection suspects runs/bccd/<time> --split val   the validation images, judged by the run itself; trains nothing
  detection suspects results.json --gt instances.json --images images

What stands behind -- goes to each training. The same command goes on where it was stopped.
"""
SHOWN = 0.1  # suspects on the sheet, as a share of the annotations


def main(flags: Sequence[str]) -> int | str | None:
    """Run the command with its flags; returns the sentence on what went wrong, or 75 where a signal stopped it."""
    own, behind = split_behind(flags)
    own, trust = take_trust(own)
    parser = Flags("detection suspects", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a COCO results file")
    parser.add_argument("--folds", type=int, default=3, help="trainings, each without one part (default: 3)")
    parser.add_argument("--split", choices=("val", "test"), help="judge this split by the run itself")
    parser.add_argument("--gt", type=Path, help="COCO annotations of a results file")
    parser.add_argument("--images", type=Path, help="folder of its images, for the pictures")
    parser.add_argument("--unlabelled", type=Path, help="folder of pictures to rank: what to label next")
    parser.add_argument("--limit", type=int, help="suspects on the sheet and in tasks (default: 10 %% of annotations)")
    parser.add_argument("--root", type=Path, help="folder of the run's data, if it has moved")
    parser.add_argument("--parallel", type=int, help="trainings at a time (default: one a GPU; one without)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/suspects)")
    parser.add_argument("--accelerator", default="auto", help="to detect with: cpu, gpu, auto")
    parser.add_argument(TRUST, nargs="+", help="packages whose parts the checkpoints may use: their code runs")
    given = parser.parse_args(own)
    return answered(lambda: _suspects(given, behind, trust))


def _suspects(given: argparse.Namespace, behind: list[str], trust: list[str]) -> None:
    check_ranges(folds=(given.folds, 2), parallel=(given.parallel, 1), limit=(given.limit, 1))
    run: Path = given.run
    of_results = run.suffix == ".json"
    if of_results and given.gt is None:
        raise DataError(f"{run}: name the COCO file that the results are compared with: --gt")
    if of_results and given.unlabelled is not None:
        raise DataError(f"{run}: a results file can't look at --unlabelled pictures: name a run")
    output = given.output or (
        Path(f"suspects_{run.stem}") if of_results else (run.parent if run.is_file() else run) / "suspects"
    )
    detectors = list[Path]()
    if of_results:
        judged = of_results_file(run, given.gt, given.images)
    elif given.split:
        detectors = [chosen(run)]
        judged = of_split(detectors[0], given.split, trust, given.root, given.accelerator)
    else:
        detectors = trained(folds(given, behind, trust, output), given.parallel)
        parts = [of_split(ckpt, "val", trust, given.root, given.accelerator) for ckpt in detectors]
        folder = (run.parent if run.is_file() else run).resolve()
        judged = joined(f"{folder.parent.name}/{folder.name}", parts)
    output.mkdir(parents=True, exist_ok=True)
    _write(output, judged, given.limit)
    if given.unlabelled is not None:
        _write_next(output, detectors, given.unlabelled, given.accelerator, trust)


def folds(given: argparse.Namespace, behind: Sequence[str], trust: Sequence[str], output: Path) -> list[Planned]:
    """The trainings: each like the run, from the same initial weights, without one part of the training images.

    Raises:
        DataError: the run has no settings to train with again.
        SettingsError: the folder holds trainings of other settings.
    """
    config = (given.run.parent if given.run.is_file() else given.run) / CONFIG
    try:
        content = config.read_bytes()
        settings: Any = yaml.safe_load(content)
    except OSError as error:
        raise DataError(f"{given.run} has no {CONFIG}: name the folder of a run, or --split val") from error
    seed = settings.get("seed_everything") if isinstance(settings, dict) else None
    flags = ["--config", str(config), "--wandb", "off", "--data.val_split", "null"]
    flags += ["--data.root", str(given.root)] if given.root else []
    flags += [f"{TRUST}={','.join(trust)}"] if trust else []
    plan = [
        Planned(
            swap=f"fold {k} of {given.folds}",
            seed=seed if type(seed) is int else 0,
            flags=(*flags, *behind, "--data.fold", f"{k}/{given.folds}"),
            config=hashlib.sha256(content).hexdigest(),
            folder=output / "folds" / f"{k}_of_{given.folds}",
        )
        for k in range(1, given.folds + 1)
    ]
    if other := next((fold for fold in plan if fold.began_otherwise()), None):
        raise SettingsError(
            f"{other.folder} holds a training of other settings: give another --output, or take the folder away"
        )
    if waiting := sum(fold.checkpoint() is None for fold in plan):
        took = _time_of(config.parent)
        cost = f"; the run took {took}, so about {waiting} times that" if took else ""
        several, share = "s" * (waiting > 1), f"1/{given.folds}"
        print(f"{waiting} training{several} like {config.parent}, each without {share} of the images{cost}")
    return plan


def trained(plan: Sequence[Planned], parallel: int | None) -> list[Path]:
    """The checkpoint of each fold; those that are finished are not trained again.

    Raises:
        SettingsError: one failed.
    """
    train(plan, devices(parallel), float("inf"), lambda run: "", print)
    made = [(fold, fold.checkpoint()) for fold in plan]
    if failed := next((fold for fold, ckpt in made if ckpt is None), None):
        raise SettingsError(
            f"{failed.swap} failed: {failed.state().said or 'see its log'} ({failed.folder / 'log.txt'})"
        )
    return [ckpt for _, ckpt in made if ckpt is not None]


def of_split(ckpt: Path, split: str, trust: list[str], root: Path | None, accelerator: str) -> Judged:
    """What a checkpoint makes of a split of its data: the validation split of a fold is what it has not trained on."""
    found = of_run(ckpt, split, trust, root, accelerator, None)
    moved = {} if root is None else {"root": str(root)}
    data = data_of_run(ckpt, trust, DetectionModule.load_from_checkpoint(ckpt, trust, map_location="cpu"), moved)
    data.prepare_data()
    index = data.read("test" if split == "test" else "val")
    ids = {record.image_id: record.annotation_ids.tolist() for record in index.records}
    return Judged(
        name=found.name,
        results=found.results,
        annotation_ids=[ids[result.image_id] for result in found.results],
        class_names=found.class_names,
        category_ids=_complete(index.category_ids),
        load_image=found.load_image,
    )


def joined(name: str, parts: Sequence[Judged]) -> Judged:
    """The folds of a run of this name as one."""
    first = parts[0]
    return Judged(
        name=name,
        results=[result for part in parts for result in part.results],
        annotation_ids=[ids for part in parts for ids in part.annotation_ids],
        class_names=first.class_names,
        category_ids=first.category_ids,
        load_image=first.load_image,
    )


def of_results_file(results: Path, annotations: Path, images: Path | None) -> Judged:
    """Detections of a COCO results file against its annotations."""
    found, listing = of_file(results, annotations, images), read_listing(annotations, annotated=True)
    ids: dict[Id, list[Any]] = {}
    for item in listing.annotations:
        image, category = as_id(item.get("image_id")), as_id(item.get("category_id"))
        if image is not None and category in listing.categories:
            ids.setdefault(image, []).append(item.get("id"))
    return Judged(
        name=found.name,
        results=found.results,
        annotation_ids=[ids.get(result.image_id, []) for result in found.results],
        class_names=found.class_names,
        category_ids=list(listing.categories),
        load_image=found.load_image,
    )


def _complete(ids: Sequence[Id | None]) -> list[Id]:
    """Ids of all classes; those that the file lacks are counted on."""
    known = [number for number in ids if isinstance(number, int)]
    new = iter(range(max(known, default=0) + 1, max(known, default=0) + 1 + len(ids)))
    return [next(new) if number is None else number for number in ids]


def _write(output: Path, judged: Judged, limit: int | None) -> None:
    count = len(judged.class_names)
    found, parts = suspects(judged.results, count), partly_annotated(judged.results, count)
    shown = min(len(found), limit or max(1, round(SHOWN * judged.annotations)))
    write_files(output, judged, found, shown)
    facts = {"images": str(len(judged.results)), "annotations": str(judged.annotations), "suspects": str(len(found))}
    (output / "suspects.html").write_text(render(judged, found, parts, shown, facts), encoding="utf-8")
    kinds = Counter(one.kind for one in found[:shown])
    table = Table("kind", f"of the first {shown}", "all", box=None, padding=(0, 1, 0, 0))
    every = Counter(one.kind for one in found)
    for kind, (name, _) in KINDS.items():
        table.add_row(name, str(kinds[kind]), str(every[kind]))
    Console().print(table)
    if parts:
        print(f"{len({part.image for part in parts})} images are annotated in part, see the page")
    print(f"page: {output / 'suspects.html'}")


def _write_next(output: Path, ckpts: Sequence[Path], folder: Path, accelerator: str, trust: Sequence[str]) -> None:
    device = {"gpu": "cuda"}.get(accelerator, accelerator)
    detectors = [Detector.from_checkpoint(ckpt, device, trust=trust) for ckpt in ckpts]
    form = detectors[0].form
    source = open_source(str(folder), form)
    if not isinstance(source, Images):
        raise DataError(f"{folder} is not a folder of pictures: give one as --unlabelled")
    pictures = []
    for name, pixels in source:
        found = [detector.predict([pixels])[0] for detector in detectors]
        objects = merged([(one.boxes, one.labels, one.scores) for one in found])
        height, width = pixels.shape[:2]
        pictures.append(Unlabelled(name, (height, width), objects, gradients(false_colour(pixels))))
    order = ranked(pictures)
    write_next(output, order, detectors[0].class_names, source.root, partial(read_image, form=form))
    for problem in source.problems:
        print(f"not read: {problem}")
    print(f"what to label next, {len(order)} pictures: {output / 'next.html'}")


def _time_of(run: Path) -> str:
    """How long a run took, breaks included, by its name and its last checkpoint; empty where that is not known."""
    match, last = STAMP.fullmatch(run.resolve().name), run / LAST
    if match is None or not last.is_file():
        return ""
    seconds = last.stat().st_mtime - datetime.strptime(match[1], "%Y-%m-%d_%H-%M-%S").timestamp()
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(seconds, 1):.0f} seconds"
