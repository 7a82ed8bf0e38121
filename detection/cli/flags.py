"""What the commands have in common on the command line: `--trust`, `--ckpt`, and how they end."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from detection.cli.output import set_up_output
from detection.cli.wording import CommandParser
from detection.data.records import DataError
from detection.errors import complaint
from detection.training.checkpoints import best_or_last
from detection.training.planned import Stopped
from detection.training.resume import INTERRUPTED

TRUST, CKPT = "--trust", "--ckpt"


def take_trust(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--trust`, and the packages it names: several behind one flag, or the flag repeated."""
    left, given = _take(args, TRUST)
    return left, [name for value in given for name in value.strip("[]").replace(",", " ").split()]


def _take(args: Sequence[str], wanted: str) -> tuple[list[str], list[str]]:
    """The arguments without a flag, and the values behind each of it."""
    left, values, taking = list[str](), list[str](), False
    for arg in args:
        flag, equals, value = arg.partition("=")
        taking = flag == wanted or (taking and not arg.startswith("-"))
        if not taking:
            left.append(arg)
        elif flag != wanted or equals:
            values.append(value if equals else arg)
    return left, values


def join_ckpts(args: Sequence[str]) -> list[str]:
    """The arguments with several checkpoints, behind one `--ckpt` or each behind its own, as the one list of them."""
    left, paths = _take(args, CKPT)
    return [*left, f"{CKPT}={json.dumps(paths)}"] if len(paths) > 1 else list(args)


def members(ckpt: Path | list[Path], fuse: str | None) -> list[Path]:
    """The checkpoints that are to be asked, see `chosen`.

    Raises:
        DataError: there are several and it is not said how to fuse them, or the other way round.
    """
    paths = [chosen(path) for path in (ckpt if isinstance(ckpt, list) else [ckpt])]
    if (len(paths) > 1) != (fuse is not None):
        raise DataError(
            f"{len(paths)} checkpoints: say how to fuse what they find, --fuse wbf (weighted box fusion) or --fuse nms"
            if fuse is None
            else f"--fuse {fuse} fuses what several checkpoints find, but there is one: give --ckpt A --ckpt B"
        )
    return paths


def chosen(ckpt: Path) -> Path:
    """The checkpoint to work with, see `best_or_last`; says which of a folder's it is."""
    found = best_or_last(ckpt)
    if found != ckpt:
        print(f"{ckpt}: taking {found.name}", file=sys.stderr)
    return found


def split_behind(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own flags, and those behind `--`, which are for others."""
    own = list(flags)
    at = own.index("--") if "--" in own else len(own)
    return own[:at], own[at + 1 :]


def answered(command: Callable[[], object]) -> int | str | None:
    """Run a command; the sentence on what went wrong, or 75 where a signal stopped its trainings, for `sys.exit`."""
    set_up_output()
    try:
        return complaint(command)
    except ValueError as error:
        return f"error: {error}"
    except Stopped as stop:
        print(stop)
        return INTERRUPTED


def run_command(
    name: str, command: Callable[..., Any] | Mapping[str, Any], args: Sequence[str], *expected: type[Exception]
) -> str | None:
    """Run a function, or that of several which the first argument names, with flags.

    Args:
        name: of the command.
        command: the function, or those of several names.
        args: the flags.
        *expected: errors that explain themselves, beside those that `errors.explain` knows.

    Returns:
        the sentence on what went wrong, for `sys.exit`; None where all is well. What is a bug is raised.
    """
    args, trust = take_trust(args)
    args += [f"{TRUST}=[{','.join(trust)}]"] if trust else []
    command = {n: _with_config(f) for n, f in command.items()} if isinstance(command, Mapping) else command
    try:
        return complaint(
            lambda: auto_cli(
                command, args=args, as_positional=False, parser_class=CommandParser, prog=f"detection {name}"
            )
        )
    except expected as error:
        return f"error: {error}"


def _with_config(command: Any) -> Any:
    """A function that gets its argument `config`, which `auto_cli` reads, and then takes for its own and drops."""
    if not callable(command) or "config" not in inspect.signature(command).parameters:
        return command

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        return command(**given, config=CommandParser.config)

    return call


def check_ranges(**limits: tuple[float | None, float] | tuple[float | None, float, float]) -> None:
    """Refuse numbers of a command line that make no sense.

    Args:
        **limits: name of the flag -> its value, the least and, where there is one, the most.

    Raises:
        ValueError: one is outside of its range.
    """
    for name, (value, least, *most) in limits.items():
        if value is not None and (not value >= least or any(value > limit for limit in most)):
            wanted = f"from {least:g} to {most[0]:g}" if most else f"at least {least:g}"
            raise ValueError(f"--{name} is {value:g}: it must be {wanted}")
