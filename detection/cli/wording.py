"""What is wrong on a command line, in one sentence: jsonargparse's and argparse's messages, and the nearest name."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser

KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
KINDS |= {"list": "a list", "dict": "names with values", "tuple": "a list"}
# What other programs call it, where spelling leads astray: `epochs` is as near to min_epochs as to max_epochs.
USUAL = {
    "epochs": "trainer.max_epochs",
    "epoch": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "iterations": "trainer.max_steps",
    "gpus": "trainer.devices",
    "workers": "data.num_workers",
    "learning_rate": "model.lr",
    "seed": "seed_everything",
    "img_size": "data.min_size",
    "imgsz": "data.min_size",
    "amp": "trainer.precision",
    "checkpoint": "resume",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The option that a word usually stands for, or is most like; or whose last part is most like the word's."""
    known = list(known)
    usual = USUAL.get(word.rpartition(".")[2].replace("-", "_"))
    if usual in known and word not in known:
        return usual
    whole = get_close_matches(word, known, 1, 0.75)
    if whole:
        return whole[0]
    by_last_part = {name.rpartition(".")[2]: name for name in sorted(known)}
    last = get_close_matches(word.rpartition(".")[2], by_last_part, 1, 0.7)
    return by_last_part[last[0]] if last else None


def flag_before(message: str, known: Collection[str]) -> str:
    """A hint where a value stands without a flag, as with commands that take their data without one."""
    stray = re.search(r"[Uu]nrecognized arguments: ([^-\s]\S*)", message)
    flag = next((name for name in ("data.root", "root", "ckpt") if name in known), None)
    return f" (a value goes behind its flag, as in --{flag} {stray[1]})" if stray and flag else ""


def is_about_names(message: str) -> bool:
    """Whether a flag or a key is unknown, and not the value of a known one wrong."""
    return re.search(r"[Uu]nrecognized arguments|is not accepted|does not accept option|not found", message) is not None


def in_words(message: str) -> str:
    """A message on a value of the wrong type, without Python's names of types; others as they are."""
    if file := re.search(r"\"config\": File does not exist: '(.*?)'", message):
        return f"--config: there is no file {file[1]}"
    key = re.match(r'Parser key "([\w.]+)":', message)
    if key and (name := re.search(r"dot import path string: (\S+)", message)):
        return f"--{key[1]}: there is no class {name[1]}"
    value = re.search(r".*(?:Got value|Given value): ?(.*)$", message)  # the last is what was typed
    if key is None or value is None or "class_path" in message:
        return message
    wanted = list[str]()
    expected = message.rpartition("Errors: ")[2]
    for kind, literals in re.findall(r"Expected a (?:<class '([\w.]+)'>|typing\.Literal\[([^\]]*)\])", expected):
        if literals:
            wanted += [choice.strip(" '\"") for choice in literals.split(",")]
        else:
            wanted.append(KINDS.get(kind, kind))
    wanted = [name for name in dict.fromkeys(wanted) if name != "null"] or wanted
    if not wanted:
        return message
    near = get_close_matches(value[1], wanted, 1, 0.6)
    hint = f" (did you mean {near[0]}?)" if near else ""
    choices = f"{', '.join(wanted[:-1])}{' or ' if wanted[1:] else ''}{wanted[-1]}"
    return f"--{key[1]} takes {choices}, not {value[1] or 'nothing'}{hint}"


def complain(message: str, options: Iterable[str]) -> NoReturn:
    """Write the one line, with the nearest option for an unknown one, and exit with code 2."""
    message = in_words(" ".join(message.split()))
    known = {option.lstrip("-") for option in options if option.startswith("--")}
    if missing := re.search(r"the following arguments are required: (.*)", message):
        names = missing[1].split(", ")
        message = f"give {', '.join(f'--{name}' if name in known else name for name in names)}"
    hint = flag_before(message, known)
    if is_about_names(message):
        for word in re.findall(r"--([\w.+-]+)", message):
            name = nearest(word, known)
            if word not in known and name:
                hint = f" (did you mean --{name}?)"
                break
    elif choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        near = get_close_matches(choice[1], re.findall(r"[\w.-]+", choice[2]), 1, 0.6)
        hint = f" (did you mean {near[0]}?)" if near else ""
    sys.stderr.write(f"error: {message}{hint}\n")
    raise SystemExit(2)


class CommandParser(ArgumentParser):  # type: ignore[misc]
    """The parser of the commands whose flags are a function's arguments; it takes no abbreviations, as `fit`'s.

    Attributes:
        config: what was given for the argument of this name, see `flags.run_command`.
    """

    config: ClassVar[Any] = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"allow_abbrev": False})

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """As usual, but `config` of the command is kept."""
        parsed = super().parse_args(*args, **options)
        CommandParser.config = parsed.get(f"{parsed.get('subcommand')}.config")
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2."""
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        complain(message, self._option_string_actions)


class Flags(argparse.ArgumentParser):
    """argparse's parser, which says the nearest flag too, and takes no abbreviations."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        complain(message, self._option_string_actions)
