"""Model soups (Wortsman et al. 2022): one detector whose weights are the mean of those of several trainings.

A soup costs no more than one detector to run. It helps where its ingredients lie in one basin of the loss: trainings
that began with the same trained weights, or checkpoints of one training. Heads that began with different random weights
don't, and their mean detects nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detection.training.checkpoints import OF_TRAINING
from detection.weights import CheckpointError, read_torch

LEFT_OUT = (*OF_TRAINING, "callbacks")  # of one training, and of no mean
SIZES = ("min_size", "max_size")


class Ingredient(NamedTuple):
    """A checkpoint that may go into a soup."""

    path: Path
    content: dict[str, Any]

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Its weights and statistics by name."""
        tensors: Mapping[str, Tensor] = self.content["state_dict"]
        return tensors


def read_ingredients(paths: Sequence[Path]) -> list[Ingredient]:
    """The checkpoints of several runs, all of one detector.

    Args:
        paths: of the checkpoints.

    Raises:
        CheckpointError: there are fewer than two, one is no run's, or detectors, classes or sizes of images differ.
        FileNotFoundError: there is none.
    """
    if len(paths) < 2:
        raise CheckpointError(f"{len(paths)} checkpoint{'s' * (len(paths) != 1)}: a soup is the mean of two at least")
    read = [Ingredient(path, read_torch(path)) for path in paths]
    for ingredient in read:
        if not {"state_dict", "hyper_parameters"} <= ingredient.content.keys():
            raise CheckpointError(f"{ingredient.path}: no checkpoint of a run, which a soup is made of")
    first = read[0]
    for other in read[1:]:
        if found := next(_differences(_identity(first), _identity(other), ""), None):
            name, own, others = found
            raise CheckpointError(
                f"{first.path} and {other.path} are no runs of one detector: {name} is {own} here and {others} there"
            )
        here, there = ({name: tuple(value.shape) for name, value in i.state.items()} for i in (first, other))
        if found := next(_differences(here, there, ""), None):
            raise CheckpointError(
                f"{first.path} and {other.path} are no runs of one detector: {found[0]} is {found[1]} and {found[2]}"
            )
    return read


def _identity(ingredient: Ingredient) -> dict[str, Any]:
    """What all ingredients must have in common, in plain values."""
    settings, data = (
        ingredient.content.get(name) or {} for name in ("hyper_parameters", "datamodule_hyper_parameters")
    )
    return {
        "detector": settings.get("detector"),
        "class_names": settings.get("class_names"),
        "data": {name: data.get(name) for name in SIZES},
    }


def _differences(one: Any, other: Any, name: str) -> Iterator[tuple[str, str, str]]:
    """Where two nested values differ: the name, and both values as text."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*one, *other]):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(one.get(key, "missing"), other.get(key, "missing"), inner)
    elif one != other:
        yield name, f"{one}"[:80], f"{other}"[:80]


def mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor, added up in float64; of counts, which are whole numbers, that of the first.

    Running statistics of batch normalisation are averaged too. They are those of the ingredients, and not quite those
    of the soup.

    Args:
        states: with the same names and shapes.
    """
    mixed = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        mixed[name] = (
            torch.stack([v.double() for v in values]).mean(0).to(first) if first.is_floating_point() else first
        )
    return mixed


def greedy(
    ingredients: Sequence[Ingredient],
    scores: Sequence[float],
    score: Callable[[dict[str, Tensor]], float],
    say: Callable[[str], object],
) -> tuple[list[Ingredient], float]:
    """The greedy soup (recipe 1 of the paper): from the best on, each goes in where the score does not fall.

    Args:
        ingredients: to choose from.
        scores: of each alone, e.g. its AP on validation images.
        score: of a state.
        say: is told of each that was tried.

    Returns:
        those that went in, and the score of their soup.
    """
    order = sorted(range(len(ingredients)), key=lambda i: -scores[i])
    chosen, reached = [ingredients[order[0]]], scores[order[0]]
    for i in order[1:]:
        tried = [*chosen, ingredients[i]]
        found = score(mean([ingredient.state for ingredient in tried]))
        kept = found >= reached
        say(f"with {ingredients[i].path}: AP {found:.4f} after {reached:.4f}, {'goes in' if kept else 'left out'}")
        if kept:
            chosen, reached = tried, found
    return chosen, reached


def write_soup(output: Path, ingredients: Sequence[Ingredient], facts: Mapping[str, Any]) -> None:
    """Write the mean as a checkpoint that every command takes for one of a run; `soup` in it names the ingredients.

    Args:
        output: `.ckpt` file.
        ingredients: that are in it; settings of detector and data are those of the first.
        facts: what else to say of it.
    """
    content = {name: value for name, value in ingredients[0].content.items() if name not in LEFT_OUT}
    content["state_dict"] = mean([ingredient.state for ingredient in ingredients])
    content["code"] = ", ".join(dict.fromkeys(str(i.content.get("code", "unknown")) for i in ingredients))
    content["soup"] = {"ingredients": [_describe(ingredient) for ingredient in ingredients], **facts}
    content["soup"]["batch_norm"] = "statistics averaged"
    partial = output.with_suffix(".partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, partial)
    os.replace(partial, output)


def _describe(ingredient: Ingredient) -> dict[str, Any]:
    with ingredient.path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(ingredient.path), "sha256": checksum, "step": ingredient.content.get("global_step")}
