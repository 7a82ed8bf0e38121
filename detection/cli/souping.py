"""The command `soup`: one detector whose weights are the mean of those of several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from detection.cli.detected import data_of_run, detect_all, runs_in
from detection.cli.flags import TRUST, answered, take_trust
from detection.cli.wording import Flags
from detection.data.records import DataError
from detection.evaluation.mean_ap import MeanAP
from detection.training.module import DetectionModule
from detection.training.soups import Ingredient, greedy, read_ingredients, write_soup

DESCRIPTION = """Averages the weights of several runs of one detector that began with the same trained weights.

  detection soup RUN RUN RUN --output soup.ckpt            the mean of all
  detection soup RUN RUN RUN --output soup.ckpt --greedy   of those that don't lower the AP on the validation images

A run is its folder, a folder of runs, or a checkpoint. evaluate, predict, export, compare and fit --weights take the
soup as the checkpoint of a run.
"""


def main(flags: Sequence[str]) -> int | str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    flags, trust = take_trust(flags)
    parser = Flags("detection soup", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of runs, or a checkpoint")
    parser.add_argument("--output", type=Path, required=True, help=".ckpt file to write")
    parser.add_argument("--greedy", action="store_true", help="leave out what lowers the AP")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="of the AP's images (default: val)")
    parser.add_argument("--root", type=Path, help="folder of the runs' data, if it has moved")
    parser.add_argument("--accelerator", default="auto", help="to detect with for --greedy: cpu, gpu, auto")
    parser.add_argument(TRUST, nargs="+", help="packages whose parts the checkpoints may use: their code runs")
    given = parser.parse_args(flags)
    return answered(lambda: _soup(given, trust))


def _soup(given: argparse.Namespace, trust: list[str]) -> None:
    if given.output.suffix != ".ckpt":
        raise DataError(
            f"{given.output}: a soup is a checkpoint, name it .ckpt; `detection convert import` makes others"
        )
    ingredients = read_ingredients([path for run in given.runs for path in runs_in(run)])
    if given.output.resolve() in {ingredient.path.resolve() for ingredient in ingredients}:
        raise DataError(f"{given.output} is an ingredient: give the soup another name")
    facts: dict[str, Any] = {"kind": "uniform"}
    chosen = ingredients
    if given.greedy:
        chosen, reached, images = _choose(ingredients, given, trust)
        facts = {"kind": "greedy", "ap": reached, "images": images, "of": [str(i.path) for i in ingredients]}
    write_soup(given.output, chosen, facts)
    print(f"{given.output}: {facts['kind']} soup of {len(chosen)} of {len(ingredients)} checkpoints")
    print("statistics of batch normalisation are averaged, too; what it detects is not known: detection evaluate says")


def _choose(
    ingredients: Sequence[Ingredient], given: argparse.Namespace, trust: list[str]
) -> tuple[list[Ingredient], float, str]:
    """The ingredients of the greedy soup, its AP, and the images that this is of: those of the first's data."""
    first = ingredients[0].path
    root = {} if given.root is None else {"root": str(given.root)}
    module = DetectionModule.load_from_checkpoint(first, trust, map_location="cpu")
    data = data_of_run(first, trust, module, root)
    if given.split == "test" and data.hparams["test_split"] is None:
        raise DataError(f"{first}: the model was trained without naming a test split; use --split val")
    data.predict_split = given.split

    def score(state: dict[str, Tensor]) -> float:
        module.load_state_dict(state)
        return _ap(detect_all(module, data, given.accelerator))

    scores = []
    for ingredient in ingredients:
        scores.append(score(dict(ingredient.state)))
        print(f"{ingredient.path}: AP {scores[-1]:.4f}")
    chosen, reached = greedy(ingredients, scores, score, print)
    return chosen, reached, f"{data.hparams['root']}, {given.split}"


def _ap(metric: MeanAP) -> float:
    """The AP of boxes, or of masks where there are masks."""
    figures = metric.compute()
    return figures.get("map", figures.get("segm_map", -1.0))
