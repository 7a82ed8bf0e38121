"""Whose code a recipe may run: what it names is found here, or refused with what to do.

A checkpoint may name what `@recorded` marks in this package, and the classes of `HARMLESS`: their constructors keep
values, and open, fetch or run nothing. Anything else is made only where the user trusts its package by name.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import isclass, isfunction
from typing import Any

PACKAGE = __name__.partition(".")[0]
# Which classes of other libraries a checkpoint may name: those defined under the first path that are subclasses of the
# second. Other metrics of torchmetrics fetch networks; classes outside of `torch.nn.modules` start processes.
HARMLESS = (
    ("torch.nn.modules", "torch.nn.Module"),
    ("torchvision.ops", "torch.nn.Module"),
    ("torchvision.models.detection", "torch.nn.Module"),
    ("torch.optim", "torch.optim.Optimizer"),
    ("torch.optim", "torch.optim.lr_scheduler.LRScheduler"),
    ("torchmetrics.aggregation", "torchmetrics.Metric"),
    ("torchmetrics.classification", "torchmetrics.Metric"),
    ("torchmetrics.detection", "torchmetrics.Metric"),
    ("albumentations", "albumentations.BasicTransform"),
    ("albumentations", "albumentations.BaseCompose"),
)
IMPORTED = ("torch.nn", "torch.optim", *(home for home, _ in HARMLESS))  # modules in which they are looked for
# None of these is part of a detector, so the advice to trust it would be a bad one.
NEVER = {"None", "torch", *sys.stdlib_module_names}
EVERYTHING = "*"  # trust in whatever is named: for a configuration that the user wrote
A_RUN = "*run"  # trust in a run's configuration: it may name files of weights, and builders that open one
_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # a recipe may import it, and it asks the network then


class RecipeError(ValueError):
    """A recipe that names something it may not, or that doesn't fit this version."""


def is_recorded(maker: Any) -> bool:
    """Whether `recorded` has decorated this class, rather than one that it inherits from, or this function."""
    return bool(isclass(maker) or isfunction(maker)) and vars(maker).get("is_recorded") is True


def trusted() -> tuple[str, ...]:
    """The packages that are trusted now."""
    return _trusted.get()


@contextmanager
def trusting(packages: Iterable[str]) -> Iterator[None]:
    """Inside, recipes may name anything of these packages too, which the working directory may hold."""
    packages = trusted_names(packages)
    if packages:
        import_from_working_directory()
    token = _trusted.set((*_trusted.get(), *packages))
    try:
        yield
    finally:
        _trusted.reset(token)


def trusted_names(packages: Iterable[str]) -> tuple[str, ...]:
    """Names of packages as a tuple, from a single name as well.

    Raises:
        RecipeError: one that is no name, such as a file or a dotted path.
    """
    names = (packages,) if isinstance(packages, str) else tuple(packages)
    for name in names:
        if not name.isidentifier():
            raise RecipeError(f"trust takes the name that a package is imported by (my_parts), not {name}")
    return names


def import_from_working_directory() -> None:
    """Let a user's own module in the working directory be imported; it shadows no module that is installed."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def find(path: str, trust: Iterable[str]) -> Any:
    """The class or function of this name, if a recipe may name it; nothing else is imported.

    Raises:
        RecipeError: with what to do.
    """
    package = path.partition(".")[0]
    free = EVERYTHING in trust or package in trust
    if not free and not is_looked_for(path):
        if package in NEVER or not package.isidentifier():
            raise RecipeError(f"the recipe names {path}, which is not a part of a detector")
        raise RecipeError(f"the recipe names {path}: {advice(package)}")
    try:
        if not free and any(name.startswith("_") for name in path.split(".")):
            raise ImportError(f"{path} is private")
        maker = import_path(path)
    except ImportError as error:
        missing = f"which this version of {PACKAGE} does not have" if package == PACKAGE else f"but {error}"
        raise RecipeError(f"the recipe names {path}, {missing}") from error
    if not callable(maker) or not (free or _is_part(maker, package, A_RUN in trust)):
        raise RecipeError(f"the recipe names {path}, which is not a part of a detector")
    return maker


def advice(package: str) -> str:
    """What to do where a file names a package that is not trusted."""
    return f'if you trust the code of {package}, say so with --trust {package} (in Python trust=("{package}",))'


def is_looked_for(path: str) -> bool:
    """Whether a name lies where a recipe may look without trust."""
    return f"{path}.".startswith(tuple(f"{home}." for home in (PACKAGE, *IMPORTED)))


def _is_part(maker: Any, package: str, in_a_run: bool) -> bool:
    if package != PACKAGE:
        return _is_harmless(maker)
    return is_recorded(maker) or (in_a_run and _gives_a_detector(maker))


def _gives_a_detector(maker: Any) -> bool:
    """Whether it is a builder: `detector_for_classes` isn't recorded, as it opens a file."""
    made = maker.__annotations__.get("return") if isfunction(maker) else None
    return made is not None and getattr(made, "__name__", made) in ("FasterRCNN", "TwoStageDetector")


def import_path(path: str) -> Any:
    """What a dotted path names; an ImportError says in one sentence what is not there."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ImportError(f"{path} names no module: write module.Name")
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ImportError(f"{module} can't be imported: {error}") from error  # it needs another that is not there
        raise ImportError(
            f"there is no module {error.name} among those installed and in {os.getcwd()}: run from the folder that "
            "holds it, or install it"
        ) from error
    except Exception as error:
        raise ImportError(f"{module} can't be imported: {type(error).__name__}: {error}") from error
    if not hasattr(home, name):
        raise ImportError(f"{module} has no {name}, in {getattr(home, '__file__', None) or module}")
    return getattr(home, name)


def _is_harmless(maker: Any) -> bool:
    if isfunction(maker):
        return maker.__module__ == "torch.nn.functional"
    return isclass(maker) and any(
        f"{maker.__module__}.".startswith(f"{home}.") and issubclass(maker, import_path(base))
        for home, base in HARMLESS
    )
