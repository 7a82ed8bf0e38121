"""Do the parts fit? Each is run once, on a blank image and a few boxes, when the detector is built.

What a part gets and gives stands in `detection.parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class PartError(ValueError):
    """A part that does not keep its contract; the message names the part, the method and the shapes."""


def finish(name: str, part: nn.Module | Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """The part itself, or what its factory makes of the arguments that only the builder knows.

    Args:
        name: of the part, for messages.
        part: a module, or a factory of one.
        arguments: see `Made by` in `detection.parts`.

    Raises:
        PartError: the factory does not take these arguments, or makes no module.
    """
    if isinstance(part, nn.Module):
        return part
    given = ", ".join(map(str, arguments))
    try:
        made = part(*arguments)
    except TypeError as error:
        raise PartError(f"{name}: {name_of(part)} can't be called with ({given}): {error}") from error
    if not isinstance(made, nn.Module):
        raise PartError(f"{name}: {name_of(part)}({given}) made {type(made).__name__}, which is no torch.nn.Module")
    return made


def name_of(part: Any) -> str:
    """What a part or a factory is called, in a message."""
    part = getattr(part, "func", part)
    return str(getattr(part, "__name__", type(part).__name__))


def run(name: str, part: Any, method: str, *arguments: Any) -> Any:
    """What a method of a part gives.

    Raises:
        PartError: it raised, with what it said.
    """
    function = part if method == "__call__" else getattr(part, method, None)
    shown = ", ".join(map(_shape, arguments))
    if function is None or not callable(function):
        raise PartError(
            f"{name}: {name_of(part)} has no method {method}({shown}); detection.parts says what it must do"
        )
    called = name_of(part) if method == "__call__" else f"{name_of(part)}.{method}"
    try:
        return function(*arguments)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        if isinstance(error, PartError):
            raise
        said = " ".join(str(error).split())[:300]
        raise PartError(f"{name}: {called}({shown}) failed: {type(error).__name__}: {said}") from error


def expect(name: str, part: Any, what: str, value: Any, shape: Sequence[int | str]) -> None:
    """Refuse a value that is not a tensor of this shape; a side that is a word may have any length.

    Raises:
        PartError: it isn't.
    """
    wanted = f"({', '.join(map(str, shape))})"
    fits = isinstance(value, Tensor) and value.ndim == len(shape)
    if not fits or any(isinstance(s, int) and s != n for s, n in zip(shape, value.shape, strict=True)):
        raise PartError(f"{name}: {name_of(part)} gave {what} {_shape(value)} in the place of {wanted}")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shape, value))}]"
    return type(value).__name__


@contextmanager
def trial(module: nn.Module) -> Iterator[None]:
    """Inside, a module can be run without leaving a trace: no gradient, no statistics, no random number drawn."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def check_prediction(predictor: nn.Module, given: Any, num_classes: int) -> None:
    """Refuse what is not logits `(1, K)` and deltas `(1, K * 4)` or `(1, 4)`.

    Raises:
        PartError: see above.
    """
    name = "box_predictor"
    logits, deltas = given if isinstance(given, tuple | list) and len(given) == 2 else (given, None)
    expect(name, predictor, "class logits", logits, (1, num_classes))
    agnostic = isinstance(deltas, Tensor) and deltas.shape[-1] == 4
    expect(name, predictor, "box deltas", deltas, (1, 4 if agnostic else 4 * num_classes))


def count_classes(predictor: nn.Module) -> int:
    """Classes of a predictor, background included.

    Raises:
        PartError: it does not say how many.
    """
    declared = getattr(predictor, "num_classes", getattr(getattr(predictor, "cls_score", None), "out_features", None))
    if declared is None:
        raise PartError(
            f"box_predictor: {name_of(predictor)} does not say how many classes it has: give it an attribute "
            "num_classes, with background"
        )
    return int(declared)


def width_of(name: str, head: nn.Module, shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> int:
    """The channels of what a head gives for features of this shape.

    Args:
        name: of the part, for messages.
        head: run once on zeros.
        shape: of what it gets.
        wanted: of what it must give, see `expect`.

    Raises:
        PartError: it gives something else.
    """
    parameter = next(head.parameters(), torch.empty(()))
    with trial(head):
        given = run(name, head, "__call__", torch.zeros(shape, device=parameter.device))
    expect(name, head, "features", given, wanted)
    return int(given.shape[1])
