"""How a part was made, in plain values, and making it again: what lets a checkpoint rebuild its own detector.

A recipe is `{"class_path": "package.module.Name", "init_args": {...}}`, the form that configuration files have too, and
both go through `rebuild`. A recipe that leaves out arguments without a default makes a factory, `functools.partial`, to
which the builder gives the rest: channels, classes, strides.

Loading somebody's checkpoint runs no code but this package's, and constructors of PyTorch's layers and albumentations'
transforms, unless the user trusts another package by name.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import partial, wraps
from inspect import Parameter, isclass, isfunction, signature
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made", bound=Callable[..., Any])
PACKAGE = __name__.partition(".")[0]
# Whose classes the configuration in a run's folder may name: it may have come with somebody's checkpoint.
KNOWN = (
    *(PACKAGE, "lightning.pytorch", "lightning.fabric", "torch.nn", "torch.optim", "torchmetrics"),
    *("torchvision.models", "torchvision.ops", "albumentations", "timm"),
)
# Whose classes a checkpoint may name: their constructors keep values, and open or run nothing.
HARMLESS = {
    "torch.nn.modules": ("torch.nn", "Module"),
    "torchvision.ops": ("torch.nn", "Module"),
    "torchvision.models.detection": ("torch.nn", "Module"),
    "torch.optim": ("torch.optim", "Optimizer"),
    "torch.optim.lr_scheduler": ("torch.optim.lr_scheduler", "LRScheduler"),
    "torchmetrics": ("torchmetrics", "Metric"),
    "albumentations.core.composition": ("albumentations", "BaseCompose"),
    "albumentations": ("albumentations", "BasicTransform"),
}
NEVER = {"None", *sys.stdlib_module_names}  # is no part of a detector, so the advice to trust it would be a bad one
EVERYTHING = "*"  # trust in whatever is named: for configurations that the user wrote
_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


class RecipeError(ValueError):
    """A recipe that names something it may not, or that doesn't fit this version."""


def recorded(maker: Made) -> Made:
    """Decorate a class or a builder function: what it makes gets `recipe`, or None if an argument has no plain form.

    Weights are left out of a recipe, as a checkpoint has its own. What a builder decided about arguments that were None
    because it had weights, it notes in `resolved`, a dictionary on what it makes. Where there is no recipe,
    `unrecorded` names the arguments that are to blame.
    """
    path = f"{maker.__module__}.{maker.__qualname__}"
    if isclass(maker):
        init = maker.__init__  # type: ignore[misc]

        @wraps(init)
        def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            if type(self) is maker:
                note(self, path, _arguments(init, (self, *args), kwargs, skip="self"))

        maker.__init__ = initialise  # type: ignore[misc, method-assign]
        maker.is_recorded = True  # type: ignore[attr-defined]
        return maker

    @wraps(maker)
    def build(*args: Any, **kwargs: Any) -> Any:
        made = maker(*args, **kwargs)
        note(made, path, _arguments(maker, args, kwargs))
        return made

    build.is_recorded = True  # type: ignore[attr-defined]
    return build  # type: ignore[return-value]


def rebuildable(builder: Made) -> Made:
    """Decorate a function that only fixes arguments of a recorded builder, whose recipe stays."""
    builder.is_recorded = True  # type: ignore[attr-defined]
    return builder


def note(made: Any, path: str, arguments: Mapping[str, Any]) -> None:
    """Write down on a part how it was made: `recipe` and `unrecorded`. What takes no attributes stays without."""
    resolved = getattr(made, "resolved", {})
    named = {name: None if name in ("weights", "weights_backbone") else value for name, value in arguments.items()}
    named |= {name: resolved[name] for name, value in named.items() if value is None and name in resolved}
    plain = {name: describe(value) for name, value in named.items()}
    missing = [name for name, value in plain.items() if value is NotImplemented]
    try:
        made.recipe = None if missing else {"class_path": path, "init_args": plain}
        made.unrecorded = {name: type(named[name]).__name__ for name in missing}
    except AttributeError:
        pass


def describe(value: Any) -> Any:
    """A value in plain form, parts and factories as recipes; NotImplemented where there is none."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        items = [describe(item) for item in value]
        return NotImplemented if NotImplemented in items else items
    if isinstance(value, Mapping):
        entries = {str(name): describe(item) for name, item in value.items()}
        return NotImplemented if NotImplemented in entries.values() else entries
    if isinstance(value, partial) and not value.args:
        inner, arguments = describe(value.func), describe(value.keywords)
        usable = isinstance(inner, dict) and arguments is not NotImplemented
        return inner | {"init_args": arguments} if usable else NotImplemented
    if isclass(value) or isfunction(value):
        path = f"{value.__module__}.{value.__qualname__}"
        return NotImplemented if "<" in path else {"class_path": path, "init_args": {}, "partial": True}
    recipe = getattr(value, "recipe", None)
    return NotImplemented if recipe is None or isinstance(value, Enum) else recipe


@contextmanager
def trusting(packages: Iterable[str]) -> Iterator[None]:
    """Inside, recipes may name anything of these packages too, which the working directory may hold."""
    packages = tuple(packages)
    if packages:
        import_from_working_directory()
    token = _trusted.set((*_trusted.get(), *packages))
    try:
        yield
    finally:
        _trusted.reset(token)


def import_from_working_directory() -> None:
    """Let a user's own module in the working directory be imported; it shadows no module that is installed."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def rebuild(recipe: Any, trust: Iterable[str] = ()) -> Any:
    """Make again what a recipe describes, or a factory where arguments without a default are left to the caller.

    Args:
        recipe: as `describe` gives it. Plain values, and lists and dictionaries of them, come back as they are.
        trust: packages whose code may run besides this one's.

    Raises:
        RecipeError: it names something that is not trusted or not there, or arguments that don't fit.
    """
    with trusting(trust):
        return _rebuild(recipe)


def _rebuild(recipe: Any) -> Any:
    if isinstance(recipe, list | tuple):
        return [_rebuild(item) for item in recipe]
    if not isinstance(recipe, Mapping):
        return recipe
    if "class_path" not in recipe:
        return {name: _rebuild(value) for name, value in recipe.items()}
    path, init_args = upgrade(str(recipe["class_path"]), dict(recipe.get("init_args") or {}))
    maker = _find(path)
    arguments = {name: _rebuild(value) for name, value in init_args.items()}
    try:
        signature(maker).bind_partial(**arguments)
        if recipe.get("partial") or _needs_more(maker, arguments):
            return partial(maker, **arguments) if arguments else maker
        made = maker(**arguments)
    except TypeError as error:
        package = path.partition(".")[0]
        raise RecipeError(f"the recipe of {path} does not fit this version of {package}: {error}") from error
    if getattr(made, "recipe", None) is None and not getattr(maker, "is_recorded", False):
        note(made, path, arguments)
    return made


def _needs_more(maker: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    wanted = (p for p in signature(maker).parameters.values() if p.kind in kinds and p.default is Parameter.empty)
    return any(p.name not in arguments for p in wanted)


def _find(path: str) -> Any:
    """The class or function of this name, if a recipe may name it."""
    package, trusted = path.partition(".")[0], _trusted.get()
    free = EVERYTHING in trusted or package in trusted
    checked = package in (PACKAGE, "torch") or path.startswith(tuple(HARMLESS))
    if not free and not checked and package.isidentifier() and package not in NEVER:
        raise RecipeError(
            f"the recipe names {path}: if you trust the code of {package}, say so with --trust {package} "
            f'(in Python trust=("{package}",))'
        )
    if not free and not checked:
        raise RecipeError(f"the recipe names {path}, which is not a part of a detector")
    try:
        maker = _import(path)
    except ImportError as error:
        missing = f"which this version of {PACKAGE} does not have" if package == PACKAGE else f"but {error}"
        raise RecipeError(f"the recipe names {path}, {missing}") from error
    if not free and not (getattr(maker, "is_recorded", False) if package == PACKAGE else _is_harmless(maker)):
        # others could do anything, such as writing files
        raise RecipeError(f"the recipe names {path}, which is not a part of a detector")
    return maker


def _import(path: str) -> Any:
    """What a dotted path names; an ImportError says what is not there."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ImportError(f"{path} names no module: write module.Name")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ImportError(f"{module} has no {name}") from error
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the module is there, but one that it needs is not
        raise ImportError(
            f"there is no module {error.name} among those installed and in {os.getcwd()}: run from the folder that "
            "holds it, or install it"
        ) from error


def _is_harmless(maker: Any) -> bool:
    for home, (module, base) in HARMLESS.items():
        if isclass(maker) and f"{maker.__module__}.".startswith(f"{home}."):
            return issubclass(maker, getattr(importlib.import_module(module), base))
    return False


def name_only_known(own: Iterable[str], trust: Iterable[str] = ()) -> None:
    """From now on configurations of this process name nothing but parts of `KNOWN` packages and what `own` names.

    Args:
        own: values that the user has typed where classes are expected: the packages they name are trusted.
        trust: further packages that the user has named.
    """
    from jsonargparse import set_parsing_settings

    words = [name for argument in own for name in re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", argument)]
    typed = {name.partition(".")[0] for name in words} - {"jsonargparse", *sys.stdlib_module_names}
    allowed = [*KNOWN, *sorted(typed | set(trust))]
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed)


def _arguments(
    maker: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], skip: str = ""
) -> dict[str, Any]:
    """All arguments of a call by name, defaults included: they may change, the checkpoint may not."""
    bound = signature(maker).bind(*args, **kwargs)
    bound.apply_defaults()
    named = {name: value for name, value in bound.arguments.items() if name not in (skip, "kwargs")}
    return named | bound.arguments.get("kwargs", {})


# Where the makers of older checkpoints are now, and what their arguments are called.
MOVED = {
    f"{PACKAGE}.models.family.": f"{PACKAGE}.models.relatives.",
    f"{PACKAGE}.models.fpn.": f"{PACKAGE}.models.pyramid.",
    f"{PACKAGE}.models.proposals.GivenProposals": f"{PACKAGE}.models.precomputed.PrecomputedProposals",
}


def upgrade(path: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class path and the arguments of a recipe as this version has them."""
    for old, new in MOVED.items():
        path = path.replace(old, new, 1) if path.startswith(old) else path
    for stage in ("rpn_", ""):
        overlap = arguments.pop(f"{stage or 'box_'}overlap_loss", None)
        beta = arguments.pop(f"{stage}box_beta", None)
        if overlap is not None:
            arguments[f"{stage}box_loss"] = overlap
        elif beta is not None:
            smooth_l1 = {"class_path": f"{PACKAGE}.losses.SmoothL1Loss", "init_args": {"beta": beta}}
            arguments[f"{stage}box_loss"] = smooth_l1
    return path, arguments
