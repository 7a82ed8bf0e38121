"""The one command: `detection fit`, `detection predict`, ...; `python -m detection` and the scripts call the same.

What a command needs is imported when it is called, so that lists and help come at once.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from detection.cli.fit_help import asks_for, page, whole_page
from detection.freed_memory import keep_freed_memory

# Name -> the module whose `main` takes the arguments behind it, and what it does.
COMMANDS = {
    "fit": ("fit", "train a detector; without flags the quickstart, on drawn scenes"),
    "evaluate": ("evaluate", "figures, plots and a report of a checkpoint"),
    "predict": ("predict", "detect in images, videos, streams or a camera's pictures"),
    "check": ("check", "find what is wrong in a data set, and say what is in it"),
    "convert": ("convert", "bring checkpoints of other libraries here, or take ours there"),
    "export": ("exporting", "write a detector as ONNX or .pt2, and check what was written"),
    "demo": ("serving", "look at a detector at work in the browser"),
    "benchmark": ("benchmark", "measure speed and accuracy beside other libraries"),
    "compare": ("comparing", "say whether one detector is better than another, or it is noise"),
    "verify": ("verifying", "compute the certificate of a converted or exported file again"),
    "soup": ("souping", "average the weights of several runs of one detector"),
    "replay": ("replaying", "draw a training step again: its batch, anchors, regions, losses and gradients"),
    "suspects": ("suspecting", "list labels that a cross-validated detector contradicts, and what to label next"),
    "ablate": ("ablating", "train a base and its swaps with several seeds, and write the table"),
    "download": ("fetching", "fetch COCO 2017 or Pascal VOC"),
}
# What other programs call them.
USUAL = {"train": "fit", "val": "evaluate", "validate": "evaluate", "eval": "evaluate", "test": "evaluate"}
USUAL |= {"detect": "predict", "infer": "predict", "inference": "predict", "check_data": "check", "import": "convert"}


def main(args: Sequence[str] | None = None) -> int | str | None:
    """Run a command.

    Args:
        args: its name and its flags; those of the command line by default.

    Returns:
        the exit code, or the sentence on what went wrong, for `sys.exit`.
    """
    name, *flags = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"detection {installed_version()}")
    elif name not in COMMANDS:
        return _unknown(name)
    elif name == "fit" and (help := asks_for(flags)):
        print(page() if help == "page" else whole_page(), end="")
    else:
        return run(name, flags)
    return 0


def run(name: str, flags: Sequence[str]) -> int | str | None:
    """Import a command and call it with its flags."""
    keep_freed_memory()
    module = f"detection.cli.{COMMANDS[name][0]}"
    if module not in sys.modules:
        gc.disable()  # importing makes a million objects and no garbage; looking for it takes a fifth of the time
        import_module(module)
        gc.freeze()  # nor is there any later, here or in the loaders' processes, which would copy what they look at
        gc.enable()
    result: int | str | None = import_module(module).main(flags)
    return result


def overview() -> str:
    """All commands with a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    first = "usage: detection COMMAND [FLAG VALUE ...]\n\nFaster R-CNN and its family from their parts."
    return "\n".join(
        [first, "", *lines, "", "`detection COMMAND --help` says what it takes; --version which one this is."]
    )


def installed_version() -> str:
    """The version that pip has installed; a clone that is only on the path has none."""
    try:
        return version("detection")
    except PackageNotFoundError:
        return "of a clone that is not installed"


def _unknown(name: str) -> int:
    near = USUAL.get(name) or next(iter(get_close_matches(name, COMMANDS, 1, 0.5)), None)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(COMMANDS)}"
    if name.startswith("-"):
        said = f"name a command before {name}, as in: detection fit {name}"
    else:
        said = f"there is no command '{name}' ({hint})"
    sys.stderr.write(f"error: {said}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
