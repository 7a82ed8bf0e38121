"""The command `compare`: whether one detector is better than another by more than the chance of images and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np
from rich.console import Console
from rich.table import Table

from detection.cli.detected import WITHOUT_RUN, Detected, of_file, of_run, runs_in
from detection.cli.flags import TRUST, answered, check_ranges, take_trust
from detection.cli.wording import Flags
from detection.data.records import DataError
from detection.evaluation import oks
from detection.evaluation.comparison_page import SURE, Side, shown_figures, verdict, write_comparison
from detection.evaluation.results import ImageResult
from detection.evaluation.significance import Contrast, compare

DESCRIPTION = """Compares two detectors on the same validation images: A - B, with 95 % intervals.

  detection compare A B                           one run each, or folders of runs: their seeds
  detection compare A1 A2 A3 --against B1 B2 B3   the seeds by name
  detection compare a.json b.json --gt instances.json

A run is its folder, a checkpoint, or a COCO results file.
"""


def main(flags: Sequence[str]) -> int | str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    flags, trust = take_trust(flags)
    parser = Flags("detection compare", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="of A; without --against A and B")
    parser.add_argument("--against", type=Path, nargs="+", metavar="RUN", help="of B")
    parser.add_argument("--gt", type=Path, help="COCO annotations of results files")
    parser.add_argument("--images", type=Path, help="folder of their images, for the pictures")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="of the runs' data (default: val)")
    parser.add_argument("--root", type=Path, help="folder of the runs' data, if it has moved")
    parser.add_argument("--common", action="store_true", help="compare on the images that all have, where they differ")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--masks", action="store_true", help="compare masks instead of boxes")
    kind.add_argument("--keypoints", action="store_true", help="compare key points instead of boxes")
    parser.add_argument("--draws", type=int, default=1000, help="of bootstrap and permutation (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: comparison_A_B)")
    parser.add_argument("--beside", action="store_true", help="pictures in a folder beside the page, not in it")
    parser.add_argument("--accelerator", default="auto", help="to detect with, where needed: cpu, gpu, auto")
    parser.add_argument("--batch_size", type=int, help="images a batch there (default: that of training)")
    parser.add_argument(TRUST, nargs="+", help="packages whose parts the checkpoints may use: their code runs")
    given = parser.parse_args(flags)
    return answered(lambda: _compare(given, trust))


def _compare(given: argparse.Namespace, trust: list[str]) -> None:
    check_ranges(draws=(given.draws, 100), batch_size=(given.batch_size, 1))
    paths = _sides(given.runs, given.against)
    sides = [[_detected(path, given, trust) for path in side] for side in paths]
    a, b = same_images(sides, given.common)
    if given.masks and not all(run.masks for run in (*a, *b)):
        raise DataError("--masks compares masks, but not all runs have them: leave it out")
    sigmas = shared_sigmas([*a, *b]) if given.keypoints else ()
    names = _names(given, a, b)
    found, left, right = contrast(a, b, names, given.masks, given.draws, given.seed, sigmas)
    folder = given.output or Path(f"comparison_{_plain(left.name)}_{_plain(right.name)}")
    write_comparison(folder, found, left, right, a[0].class_names, given.draws, given.beside)
    _print(found, left, right)
    for note in dict.fromkeys(note for run in (*a, *b) for note in run.notes):
        print(f"note: {note}")
    print(f"page: {folder / 'comparison.html'}")


def contrast(
    a: list[Detected],
    b: list[Detected],
    names: tuple[str, str],
    masks: bool = False,
    draws: int = 1000,
    seed: int = 0,
    sigmas: Sequence[float] = (),
) -> tuple[Contrast, Side, Side]:
    """What is found of two sides, and the sides as the page shows them.

    Args:
        a, b: the runs of each, all on the same images, see `same_images`.
        names: what to call the sides.
        masks: compare masks instead of boxes.
        draws: of bootstrap and permutation.
        seed: of the draws.
        sigmas: of OKS, where key points are compared.
    """
    classes, limits = a[0].class_names, limits_of(max(run.limit for run in (*a, *b)), sigmas)
    found = compare([r.results for r in a], [r.results for r in b], classes, limits, masks, draws, seed, sigmas)
    return found, _side(a, names[0]), _side(b, names[1])


def limits_of(most: int, sigmas: Sequence[float] = ()) -> tuple[int, ...]:
    """How many detections of an image count: of key points as COCO has it, of the rest 1, 10 and `most`."""
    return (oks.MOST,) if sigmas else (1, min(10, most), most)


def shared_sigmas(runs: Sequence[Detected]) -> tuple[float, ...]:
    """The sigmas of OKS that all runs share.

    Raises:
        DataError: one has no key points, or others.
    """
    if not all(run.sigmas for run in runs):
        raise DataError("--keypoints compares key points, but not all runs have them: leave it out")
    for run in runs:
        if run.sigmas != runs[0].sigmas:
            raise DataError(
                f"{run.name} and {runs[0].name} have other key points, or other sigmas of OKS ({run.sigmas}; "
                f"{runs[0].sigmas}): compare detectors of the same, with the same data.keypoint_sigmas"
            )
    return runs[0].sigmas


def _sides(runs: list[Path], against: list[Path] | None) -> tuple[list[Path], list[Path]]:
    """The runs of both sides."""
    if against is None and len(runs) != 2:
        raise DataError(
            f"{len(runs)} run{'s' * (len(runs) != 1)} and no --against: give two, or the seeds of each: "
            "detection compare A1 A2 --against B1 B2"
        )
    left, right = (runs, against) if against is not None else (runs[:1], runs[1:])
    a, b = ([run for path in side for run in runs_in(path)] for side in (left, right))
    if twice := {path.resolve() for path in a} & {path.resolve() for path in b}:
        raise DataError(f"{twice.pop()} is on both sides: a run can't differ from itself")
    return a, b


def _detected(path: Path, given: argparse.Namespace, trust: list[str]) -> Detected:
    if path.suffix == WITHOUT_RUN:
        raise DataError(
            f"{path}: a {WITHOUT_RUN} file does not say what it was trained on: compare the results file that "
            f"`detection evaluate --ckpt {path} --root DATA` writes, with --gt"
        )
    if path.suffix != ".json":
        return of_run(path, given.split, trust, given.root, given.accelerator, given.batch_size)
    if given.gt is None:
        raise DataError(f"{path}: name the COCO file that the results are compared with: --gt")
    return of_file(path, given.gt, given.images)


def same_images(sides: Sequence[Sequence[Detected]], common: bool = False) -> list[list[Detected]]:
    """The runs, all on the same images with the same objects, in the same order.

    Args:
        sides: the runs of each side.
        common: leave out images that some lack, or have other objects in; otherwise they are an error.

    Raises:
        DataError: classes or images differ, or no two images are left.
    """
    first = sides[0][0]
    kept = {result.image_id: result for result in first.results}
    for run in (run for side in sides for run in side):
        if run.class_names != first.class_names:
            raise DataError(
                f"{run.name} and {first.name} have other classes ({', '.join(run.class_names)[:80]}; "
                f"{', '.join(first.class_names)[:80]}): compare detectors of the same classes in the same order"
            )
        own = {result.image_id: result for result in run.results}
        same = {number: kept[number] for number in kept if number in own and _same(kept[number], own[number])}
        if not common and (len(same) < len(kept) or len(own) > len(kept)):
            raise DataError(
                f"{run.name} and {first.name} have other validation sets ({len(own)} and {len(kept)} images, "
                f"{len(same)} the same with the same objects): --common compares on those alone"
            )
        kept = same
    if len(kept) < 2:
        raise DataError(f"{len(kept)} images are the same in all runs: two at least are needed to compare")
    return [
        [replace(run, results=[result for result in run.results if result.image_id in kept]) for run in side]
        for side in sides
    ]


def _same(one: ImageResult, other: ImageResult) -> bool:
    """Whether two runs mean the same image with the same objects; files round coordinates, and know no folders."""
    return (
        PurePath(one.file_name).name == PurePath(other.file_name).name
        and np.array_equal(one.gt_labels, other.gt_labels)
        and np.array_equal(one.gt_iscrowd, other.gt_iscrowd)
        and np.allclose(one.gt_boxes, other.gt_boxes, rtol=1e-5, atol=0.01)
        and np.allclose(one.gt_areas, other.gt_areas, rtol=1e-3, atol=0.01)
        and (one.gt_keypoints is None or other.gt_keypoints is None or _same_points(one, other))
    )


def _same_points(one: ImageResult, other: ImageResult) -> bool:
    a, b = (np.asarray(result.gt_keypoints) for result in (one, other))
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=0.01)


def _names(given: argparse.Namespace, a: list[Detected], b: list[Detected]) -> tuple[str, str]:
    """What to call the sides: the name that a side's runs share, or its first path where both share one."""
    shared = [{run.name.partition("/")[0] for run in side} for side in (a, b)]
    if all(len(names) == 1 for names in shared) and shared[0] != shared[1]:
        return shared[0].pop(), shared[1].pop()
    paths = given.runs[0], (given.against or given.runs[1:])[0]
    return str(paths[0]), str(paths[1])


def _side(runs: list[Detected], name: str) -> Side:
    return Side(
        name=name,
        runs=[run.name for run in runs],
        results=runs[0].results,
        facts=[run.facts for run in runs],
        settings=[run.settings for run in runs],
        load_image=runs[0].load_image,
    )


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).strip("_.")


def _print(found: Contrast, a: Side, b: Side) -> None:
    """The figures as a table, and the verdict on AP."""
    heads = ("figure", "A", "B", "A - B", f"{SURE} interval", "p", "p images")
    table = Table(*heads, box=None, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in shown_figures(found):
        table.add_row(*row)
    for letter, side in (("A", a), ("B", b)):
        print(f"{letter}: {side.name}, {', '.join(side.runs)}")
    Console().print(table)
    print(verdict(found.figures[0], a.name, b.name))
