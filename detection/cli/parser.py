"""The parser of `detection fit`: what is wrong with a flag or a key in one line, with the nearest right one."""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import torch
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.cli import LightningArgumentParser

import detection
from detection.cli.configuration import CONFIGS, PRESETS, defaults
from detection.cli.wording import KINDS, flag_before, in_words, is_about_names, nearest
from detection.models import relatives, zoo
from detection.training.optimisation import MOVED
from detection.trust import NEVER, advice
from detection.upgrades import ARGUMENTS

TYPICAL = "detection.models.zoo.fasterrcnn_resnet_fpn"  # has the arguments that most builders share


class Parser(LightningArgumentParser):
    """Fails on an unknown flag or key with the nearest right one."""

    resumed: Path | None = None  # the configuration of the run that goes on

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2; for a part inside, raise, as it may fit another type of its hint."""
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        message = " ".join(message.split())
        if denied := re.search(r"Importing '([\w.]+)' is not allowed", message):
            package = denied[1].partition(".")[0]
            how = ", which is no part of a run" if package in NEVER else f": {advice(package)}"
            said = f"{self.resumed or 'the configuration'}: it names {denied[1]}{how}"
        else:
            said = in_words(shorten(message)) + self._suggest(message)
        sys.stderr.write(f"error: {said}\n")
        raise SystemExit(2)

    def _suggest(self, message: str) -> str:
        twice = re.search(r"Option '(lr|weight_decay)' is not accepted", message)
        if twice and "model.optimizer" in message:
            return f" (it is --model.{twice[1]})"
        for old, new in MOVED.items() if "NestedArg" not in message else ():
            if re.search(rf"\bmodel\.{old}\b|\bstring: {old}\b|\bmodel\.(optimizer|schedule).*\b{old}\b", message):
                return f" (optimiser and schedule are parts now: instead of {old} write {new})"
        if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
            near = difflib.get_close_matches(missing[2], dir(sys.modules.get(missing[1])), 1, 0.6)
            return f" (did you mean {missing[1]}.{near[0]}?)" if near else ""
        if "No module named" in message:
            return f" (neither installed nor in {os.getcwd()})"
        if part := re.search(r"given class_path '([\w.]+)': Option '([\w.]+)' is not accepted", message):
            if part[2] in ARGUMENTS:
                return f" (a loss is a part now: instead of {part[2]} give {ARGUMENTS[part[2]]})"
            near = difflib.get_close_matches(part[2], list(vars(defaults(part[1]))), 1, 0.6)
            return f" (did you mean --{'.'.join([*_keys(message), *near])}?)" if near else ""
        options = {option.lstrip("-") for option in self._option_string_actions if option.startswith("--")}
        known = options | {"trust"} | {f"model.detector.{name}" for name in vars(defaults(TYPICAL))}
        if hint := flag_before(message, known):
            return hint
        quoted = re.findall(r"['\"]([\w.+-]+)['\"]", message) if is_about_names(message) else []
        for word in re.findall(r"--([\w.+-]+)", message) + quoted:
            if word not in known and (name := nearest(word, known)):
                return f" (did you mean --{name}?)"
        if file := re.search(r'"config": File does not exist: \'.*?([\w.-]+)\'', message):
            packaged = [path.stem for folder in (CONFIGS, PRESETS) for path in folder.glob("*.yaml")]
            near = difflib.get_close_matches(Path(file[1]).stem, packaged, 1, 0.6)
            return f" (did you mean --config {near[0]}?)" if near else f"; packaged are {', '.join(sorted(packaged))}"
        if absent := re.search(r"dot import path string: (\w+)", message):
            homes = {name: home for home in (detection, loggers, callbacks, torch.optim) for name in dir(home)}
            near = difflib.get_close_matches(absent[1], homes, 1, 0.7)
            path = f"{homes[near[0]].__name__}." if near == [absent[1]] else ""  # a short name is of some types alone
            return f" (did you mean {path}{near[0]}?)" if near else ""
        builder = difflib.get_close_matches(message.split()[-1], {**vars(zoo), **vars(relatives)}, 1, 0.75)
        return f" (did you mean {builder[0]}?)" if builder else ""


def shorten(message: str) -> str:
    """What is wrong with a part, out of jsonargparse's list of all types that it is not."""
    value = re.match(
        r'Parser key "([\w.]+)": .*? Parser key "([\w.]+)": (Expected a .*?\. Got value: .*?)\. Got value', message
    )
    if value:  # of an argument of a part
        return f'Parser key "{value[1]}.{value[2]}": {value[3]}'
    called = re.findall(r"expects a function or a callable class: (.*?)(?: - Type |\.? G(?:ot|iven) value|$)", message)
    if own := [why for why in called if not why.startswith("Expected '")]:
        return f"--{'.'.join(_keys(message))}: {own[0]}"
    causes = message.rpartition("Errors: - ")[2].split(" - ")
    named = [cause for cause in causes if "given class_path" in cause]
    if "Errors: - " not in message or not named:
        return message
    inner = named[0].replace("Problem with given class_path ", "").partition(" Got value")[0]
    inner = re.sub(r"Expected a <class '(\w+)'>", lambda kind: f"it takes {KINDS.get(kind[1], kind[1])}", inner)
    return f"--{'.'.join(_keys(message))}: {inner}"


def cause(message: str) -> str:
    """Why a part can't be made, out of jsonargparse's list of all types that it is not; else the message."""
    errors = message.rpartition("Errors: - ")[2].partition(" Given value type")[0].split(" - ")
    own = [error for error in errors if not error.startswith(("Expected a", "Not of type"))]
    return own[0] if "Errors: - " in message and own else message


def _keys(message: str) -> list[str]:
    return re.findall(r'Parser key "([\w.]+)"', message)
