"""Do the parts fit? Each is run once, on a blank image and a few boxes, when the detector is built.

What a part gets and gives stands in `detection.parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    fits = isinstance(value, Tensor) and value.ndim == len(shape)
    if not fits or any(isinstance(s, int) and s != n for s, n in zip(shape, value.shape, strict=True)):
        raise PartError(f"{name}: {name_of(part)} gave {what} {_shape(value)} in the place of {wanted}")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shape, value))}]"
    return "nothing" if value is None else type(value).__name__


def attribute_of(name: str, part: Any, attribute: str) -> Any:
    """An attribute that the contract asks for.

    Raises:
        PartError: there is none.
    """
    if not hasattr(part, attribute):
        raise PartError(f"{name}: {name_of(part)} has no {attribute}; detection.parts says what it must have")
    return getattr(part, attribute)


@contextmanager
def trial(module: nn.Module) -> Iterator[None]:
    """Inside, a module can be run without leaving a trace: no gradient, no statistics, no random number drawn."""
    modes = [(m, m.training) for m in module.modules()]
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def check_proposals(rpn: nn.Module, given: Any) -> None:
    """Refuse what is not proposals of one image, and losses by name.

    Raises:
        PartError: see above.
    """
    proposals, losses = given if isinstance(given, tuple | list) and len(given) == 2 else (given, None)
    boxes, scores, valid = (getattr(proposals, name, None) for name in ("boxes", "scores", "valid"))
    if not isinstance(boxes, Tensor) or not isinstance(losses, Mapping):
        raise PartError(
            f"rpn: {name_of(rpn)} gave {_shape(given)} in the place of (Proposals, losses by name); see Proposer in "
            "detection.parts"
        )
    expect("rpn", rpn, "boxes", boxes, (1, "P", 4))
    expect("rpn", rpn, "scores", scores, (1, boxes.shape[1]))
    expect("rpn", rpn, "valid", valid, (1, boxes.shape[1]))


def check_detections(heads: nn.Module, given: Any) -> None:
    """Refuse what is not the boxes, labels and scores of one image.

    Raises:
        PartError: see above.
    """
    if not isinstance(given, list | tuple) or len(given) != 1 or not isinstance(given[0], Mapping):
        raise PartError(f"roi_heads: {name_of(heads)}.detect gave {_shape(given)}, not a list of a dictionary an image")
    found = given[0]
    expect("roi_heads", heads, "boxes", found.get("boxes"), ("D", 4))
    for name in ("labels", "scores"):
        expect("roi_heads", heads, name, found.get(name), (len(found["boxes"]),))


def check_training(stage: str, part: Any, class_loss: Callable[..., Any], logits: Tensor, labels: Tensor) -> None:
    """Run what only training uses on two boxes, of which the first is an object.

    Args:
        stage: how the builder's arguments begin: `rpn_`, or `box_` for the RoI heads.
        part: has `matcher`, `sampler`, `box_coder` and `box_loss`.
        class_loss: the loss of logits and labels.
        logits, labels: of two boxes, `(2, ...)` each.

    Raises:
        PartError: one does not keep its contract.
    """
    boxes = torch.tensor([[0.0, 0, 32, 32], [16, 16, 48, 48]], device=logits.device)
    first, name = torch.ones((1, 1), dtype=torch.bool, device=boxes.device), f"{stage}matcher"
    matched = run(name, part.matcher, "__call__", boxes[None, :1], first, boxes[None])
    expect(name, part.matcher, "assignments", matched, (1, 2))
    name, hardness = f"{stage}sampler", boxes.new_zeros((1, 2))
    attribute_of(name, part.sampler, "max_positive")
    more = [lambda: hardness] * (2 if getattr(part.sampler, "wants_overlaps", False) else 1)
    given = run(name, part.sampler, "__call__", torch.ones_like(matched), *more)
    indices, valid = given if isinstance(given, tuple | list) and len(given) == 2 else (given, None)
    expect(name, part.sampler, "indices", indices, (1, "S"))
    expect(name, part.sampler, "which of them are valid", valid, (1, indices.shape[1]))
    stage = stage.removeprefix("box_")
    name = f"{stage}box_coder"
    for method in ("encode", "decode"):
        coded = run(name, part.box_coder, method, boxes, boxes)
        expect(name, part.box_coder, f"by {method}", coded, (2, 4))
    name = "rpn_objectness_loss" if stage else "class_loss"
    expect(name, class_loss, "losses", run(name, class_loss, "__call__", logits, labels), (2,))
    if hasattr(class_loss, "probabilities"):
        read = run(name, class_loss, "probabilities", logits[None])
        expect(name, class_loss, "probabilities", read, (1, *logits.shape))
    name = f"{stage}box_loss"
    losses = run(name, part.box_loss, "__call__", torch.zeros_like(boxes), boxes, boxes, part.box_coder)
    expect(name, part.box_loss, "losses", losses, (2,))


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
