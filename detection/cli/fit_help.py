"""The pages of `detection fit --help`: the flags that people use, or all, with the texts of the docstrings.

Signatures and docstrings are read from the source, so that the pages come without importing PyTorch.
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
from typing import Any, Literal

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
FROM_DATA = {"class_names", "images_per_batch"}  # arguments of the model that are no flags
# Our samplers are rank-aware by themselves; the table of layers has one line that says anything.
DEFAULTS = {"trainer.use_distributed_sampler": False, "trainer.enable_model_summary": False}
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
    known = flags()
    shown = {title: {name: (shortened(known[name][0]), "") for name in names} for title, names in SHOWN.items()}
    return _page(
        shown, "`detection fit --help all` explains every flag, --model.detector.help NAME those of one detector."
    )


def whole_page() -> str:
    """The help on every flag, with its type and default."""
    titles = {"data": "the data", "model": "the model", "trainer": "the training, flags of Lightning's Trainer"}
    shown = dict[str, dict[str, tuple[str, str]]]()
    for name, texts in flags().items():
        section, dot, _ = name.partition(".")
        shown.setdefault(titles[section] if dot else "the run", {})[name] = texts
    return _page(shown, "--trainer.callbacks.help NAME explains the flags of one class, as with each flag that takes a "
                 "class; a page with those that most people use: `detection fit --help`.")  # fmt: skip


def _page(shown: dict[str, dict[str, tuple[str, str]]], epilog: str) -> str:
    formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=WIDTH)
    wrapped = "\n".join(textwrap.fill(line, WIDTH) for line in description().splitlines())
    parser = argparse.ArgumentParser(
        usage="detection fit [--config NAME] [FLAG VALUE ...]",
        description=wrapped,
        epilog=textwrap.fill(epilog, WIDTH),
        formatter_class=formatter,
        add_help=False,
    )
    for title, known in shown.items():
        group = parser.add_argument_group(title)
        for name, (text, of_value) in known.items():
            value = "" if name == "print_config" else "VALUE"
            group.add_argument(f"--{name}", help=f"{text} {of_value}".strip().replace("%", "%%"), metavar=value)
    return parser.format_help()


def flags() -> dict[str, tuple[str, str]]:
    """Flag -> its text, and its type and default in brackets; the run's own, then the sections'."""
    installed = importlib.util.find_spec("lightning")
    assert installed is not None and installed.origin is not None
    classes = {
        "data": (PACKAGE / "data" / "datamodule.py", "DetectionDataModule"),
        "model": (PACKAGE / "training" / "module.py", "DetectionModule"),
        "trainer": (Path(installed.origin).parent / "pytorch" / "trainer" / "trainer.py", "Trainer"),
    }
    found = {name: (text, "") for name, text in OWN_TEXTS.items()} | own_flags(PACKAGE / "cli" / "fit.py")
    for section, (path, name) in classes.items():
        text, values = described(path, name)
        texts = {f"{section}.{flag}": said for flag, said in arguments(text).items()} | OWN_TEXTS
        for flag, (kind, default) in values.items():
            if flag not in FROM_DATA:
                value = DEFAULTS.get(f"{section}.{flag}", default)
                found[f"{section}.{flag}"] = texts[f"{section}.{flag}"], in_brackets(kind, value)
    return found


def own_flags(path: Path) -> dict[str, tuple[str, str]]:
    """Flag -> help, type and default of each `add_argument` of a source file."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = {}
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            name, text = (ast.literal_eval(value) for value in (call.args[0], given["help"]))
            found[name.lstrip("-")] = text, in_brackets(ast.unparse(given["type"]), ast.unparse(given["default"]))
    return found


def described(path: Path, name: str) -> tuple[str, dict[str, tuple[str, Any]]]:
    """What a class of a source file says of its arguments, or its `__init__`; argument -> its type and default."""
    tree = ast.parse(path.read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    (init,) = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    said = [text for node in (found, init) if (text := ast.get_docstring(node)) and "Args:\n" in text]
    own, of_names = init.args.args[1:], init.args.kwonlyargs
    defaults = [*[None] * (len(own) - len(init.args.defaults)), *init.args.defaults, *init.args.kw_defaults]
    values = {
        argument.arg: (
            ast.unparse(argument.annotation) if argument.annotation else "",
            default and ast.unparse(default),
        )
        for argument, default in zip([*own, *of_names], defaults, strict=True)
    }
    return said[0], values


def in_brackets(kind: str, default: Any) -> str:
    """A flag's type and default; one that has none has to be given."""
    return f"({kind}; {'required' if default is None else f'default: {default}'})"


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
