"""Names of tensors in other libraries: tables of substitutions, and taking tensors over by them.

A table turns this project's names into the others'; the names of a model that was built make it a dictionary, which
works in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from detection.fitting import name_of
from detection.weights import CheckpointError

Rules = Sequence[tuple[str, str]]  # (pattern, replacement), applied one after the other
SHOWN = 4  # names in a message


def rename(names: Iterable[str], rules: Rules) -> dict[str, str]:
    """The other library's name of each of ours."""
    table = {}
    for name in names:
        other = name
        for pattern, replacement in rules:
            other = re.sub(pattern, replacement, other)
        table[name] = other
    return table


def drop(state: Mapping[str, Tensor], patterns: Sequence[str]) -> dict[str, Tensor]:
    """The tensors whose names none of the patterns finds."""
    return {name: value for name, value in state.items() if not any(re.search(p, name) for p in patterns)}


def collect(state: Mapping[str, Tensor], wanted: Mapping[str, str]) -> dict[str, Tensor]:
    """All tensors under new names.

    Args:
        state: by their old names.
        wanted: new name -> old name.

    Raises:
        CheckpointError: some are missing or left over; it names them.
    """
    missing = [old for old in wanted.values() if old not in state]
    extra = sorted(set(state) - set(wanted.values()))
    problems = [
        f"{len(names)} tensors {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for names, what in ((missing, "are missing"), (extra, "have no place in such a detector"))
        if names
    ]
    if problems:
        raise CheckpointError(" and ".join(problems))
    return {new: state[old] for new, old in wanted.items()}


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of exactly the model's tensors, with one sentence for what does not fit.

    Raises:
        CheckpointError: names or shapes differ.
    """
    slots = model.state_dict()
    collect(state, {name: name for name in slots})
    for name, slot in slots.items():
        if state[name].shape != slot.shape:
            raise CheckpointError(f"{name} is {tuple(state[name].shape)} where {tuple(slot.shape)} is wanted")
    model.load_state_dict(dict(state))


def check_scores(model: nn.Module, library: str) -> None:
    """Refuse a detector whose weights another library would take, and read its scores otherwise.

    Raises:
        CheckpointError: its class loss has `probabilities` of its own, or its `cls_score` is no plain linear layer.
    """
    for name, part in model.named_modules():
        loss = getattr(part, "class_loss", None)
        if hasattr(loss, "probabilities"):
            raise CheckpointError(
                f"{name_of(loss)} has scores of its own, where {library} takes a softmax: the weights would load there "
                "and detect something else"
            )
        if name.endswith("box_predictor.cls_score") and type(part) is not nn.Linear:
            raise CheckpointError(
                f"{name} is {name_of(part)}, which {library} does not have: the weights would load there and detect "
                "something else"
            )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors as files have them: on the CPU, without gradient, and with their rows in order."""
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    return {name: value if value.is_meta else value.cpu() for name, value in state.items()}


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow a prefix: blocks of a stage, stages of a cascade."""
    found = {match[1] for name in names if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return len(found)
