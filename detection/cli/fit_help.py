"""The page of `detection fit --help`: the flags that people use, with the texts of the docstrings.

The docstrings are read from the source, so that the page comes without importing PyTorch.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).parents[1]
CONFIGS = PACKAGE / "configs"
PRESETS = CONFIGS / "presets"  # go behind another configuration
WIDTH = 100  # characters of a line

DESCRIPTION = """Train a detector. Without arguments: the quickstart, on scenes that are drawn on the spot.

--config takes a YAML file, or the name of one of this package's: {configs}. Any other flag overrides it.
Presets go behind it as a second --config: {presets}.
--trust NAME ... goes with --resume: the run's configuration and checkpoint may use the code of these packages.
"""
SHOWN = {
    "the run": ("config", "print_config", "name", "resume", "weights", "find", "wandb", "seed_everything"),
    "the data": (
        "data.root",
        "data.format",
        "data.val_fraction",
        "data.batch_size",
        "data.num_workers",
        "data.min_size",
    ),
    "the model": ("model.detector", "model.lr", "model.freeze"),
    "the training": ("trainer.max_epochs", "trainer.devices", "trainer.precision"),
}
# Of flags that Lightning and jsonargparse add.
OWN_TEXTS = {
    "config": "YAML file, or the name of a packaged one; several, the later ones override.",
    "print_config": "Print the whole configuration as YAML, with what these flags make of it, and end.",
    "seed_everything": "Seed of weights, order and augmentation; true draws one.",
    "model.detector": "Name of a builder, such as fasterrcnn_resnet50_fpn, or class_path and init_args of your own.",
    "trainer": "YAML file with flags of the trainer.",
    "model": "YAML file with flags of the model.",
    "data": "YAML file with flags of the data.",
}
ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): ?(.*)")


def asks_for(flags: Sequence[str]) -> Literal["page", "all"] | None:
    """Whether the flags ask for the page, for every flag (`--help all`), or for no help."""
    for number, flag in enumerate(flags):
        name, _, value = flag.partition("=")
        if name in ("-h", "--help"):
            return "all" if "all" in (value, *flags[number + 1 : number + 2]) else "page"
    return None


def description() -> str:
    """What `fit` does, with the names of the packaged configurations."""
    names, presets = (", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) for folder in (CONFIGS, PRESETS))
    return DESCRIPTION.format(configs=names, presets=presets)


def page() -> str:
    """The help on the flags that people use."""
    known, formatter = texts(), partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=WIDTH)
    wrapped = "\n".join(textwrap.fill(line, WIDTH) for line in description().splitlines())
    parser = argparse.ArgumentParser(
        usage="detection fit [--config NAME] [FLAG VALUE ...]",
        description=wrapped,
        epilog="`detection fit --help all` explains every flag, --model.detector.help NAME those of one detector.",
        formatter_class=formatter,
        add_help=False,
    )
    for title, names in SHOWN.items():
        group = parser.add_argument_group(title)
        for name in names:
            value = "" if name == "print_config" else "VALUE"
            group.add_argument(f"--{name}", help=shortened(known[name]).replace("%", "%%"), metavar=value)
    return parser.format_help()


def texts(*sections: str) -> dict[str, str]:
    """Flag -> its text, of the sections of `fit` named, as their docstrings have it, or of all and the run's own."""
    installed = importlib.util.find_spec("lightning")
    assert installed is not None and installed.origin is not None
    lightning = Path(installed.origin).parent
    classes = {
        "data": (PACKAGE / "data" / "datamodule.py", "DetectionDataModule"),
        "model": (PACKAGE / "training" / "module.py", "DetectionModule"),
        "trainer": (lightning / "pytorch" / "trainer" / "trainer.py", "Trainer"),
    }
    found = {} if sections else own_flags(PACKAGE / "cli" / "fit.py")
    for section in sections or classes:
        of_section = arguments(docstring(*classes[section]))
        found |= {f"{section}.{flag}": text for flag, text in of_section.items()}
    return found | OWN_TEXTS


def explain_all(parser: argparse.ArgumentParser) -> None:
    """Put texts to flags that have none, as jsonargparse takes none of arguments that are described together."""
    known = texts("data", "model")
    for action in parser._actions:
        text = known.get(action.dest)
        if text is not None and (not action.help or text in OWN_TEXTS.values()):
            action.help = text.replace("%", "%%")


def own_flags(path: Path) -> dict[str, str]:
    """Flag -> help of each `add_argument` of a source file."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = {}
    for call in calls:
        named = bool(call.args) and isinstance(call.args[0], ast.Constant)  # not in a loop
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument" and named:
            (text,) = [ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "help"]
            found[ast.literal_eval(call.args[0]).lstrip("-")] = text
    return found


def docstring(path: Path, name: str) -> str:
    """What a class of a source file says of its arguments, or its `__init__`."""
    tree = ast.parse(path.read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    methods = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    nodes: list[ast.ClassDef | ast.FunctionDef] = [found, *methods]
    said = [text for node in nodes if (text := ast.get_docstring(node)) and "Args:\n" in text]
    return said[0]


def arguments(text: str) -> dict[str, str]:
    """Argument -> its text, of a docstring in Google's style; arguments that are described together share it."""
    found, names = dict[str, str](), list[str]()
    for line in inspect.cleandoc(text).partition("Args:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if entry := ENTRY.fullmatch(line):
            names = entry[1].split(", ")
            line = entry[2]
        found |= {name: " ".join([found.get(name, ""), line.strip()]).strip() for name in names}
    return found


def shortened(text: str) -> str:
    """The first sentence, or two where the first says little."""
    text = text.replace("``", "`")
    ends = [match.end() for match in re.finditer(r"[.](?= [A-Z`]|$)", text) if match.end() > 30]
    first = text[: ends[0]] if ends else text
    return first[0].upper() + first[1:]
