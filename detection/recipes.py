"""How a model was made, in plain values, and making it again: what lets a checkpoint rebuild its own detector.

A recipe is `{"class_path": "detection....", "init_args": {...}}`, the form that configuration files have too. It names
nothing outside this package, so that loading somebody's checkpoint runs no code but ours.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import isclass, signature
from typing import Any, TypeVar

from jsonargparse import set_parsing_settings

Made = TypeVar("Made", bound=Callable[..., Any])
PACKAGE = __name__.partition(".")[0]
# Whose classes the configuration in a run's folder may name: it may have come with somebody's checkpoint.
KNOWN = (
    *(PACKAGE, "lightning.pytorch", "lightning.fabric", "torch.nn", "torch.optim", "torchmetrics"),
    *("torchvision.models", "torchvision.ops", "albumentations", "timm"),
)


class RecipeError(ValueError):
    """A recipe that names something it may not, or that doesn't fit this version."""


def recorded(maker: Made) -> Made:
    """Decorate a class or a builder function: what it makes gets `recipe`, or None if an argument has no plain form.

    Weights are left out of a recipe, as a checkpoint has its own; a builder may note in `model.implied`, a dictionary,
    what they decided about arguments that were None.
    """
    path = f"{maker.__module__}.{maker.__qualname__}"
    if isclass(maker):
        init = maker.__init__  # type: ignore[misc]

        @wraps(init)
        def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            if type(self) is maker:
                self.recipe = _describe(path, _arguments(init, (self, *args), kwargs, skip="self"))  # type: ignore[attr-defined]

        maker.__init__ = initialise  # type: ignore[misc, method-assign]
        maker.is_recorded = True  # type: ignore[attr-defined]
        return maker

    @wraps(maker)
    def build(*args: Any, **kwargs: Any) -> Any:
        model = maker(*args, **kwargs)
        arguments = _arguments(maker, args, kwargs)
        arguments |= {name: None for name in arguments if name in ("weights", "weights_backbone")}
        implied = {name: value for name, value in getattr(model, "implied", {}).items() if arguments.get(name) is None}
        model.recipe = _describe(path, arguments | implied)
        return model

    build.is_recorded = True  # type: ignore[attr-defined]
    return build  # type: ignore[return-value]


def rebuild(recipe: Mapping[str, Any]) -> Any:
    """Make again what a recipe describes.

    Raises:
        RecipeError: it names something outside this package, or arguments that this version doesn't know.
    """
    path = str(recipe.get("class_path"))
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] != PACKAGE:
        raise RecipeError(f"the recipe names {path}: only parts of {PACKAGE} may be rebuilt from a checkpoint")
    try:
        maker = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"the recipe names {path}, which this version of {PACKAGE} does not have") from error
    if not getattr(maker, "is_recorded", False):  # others could do anything, such as writing files
        raise RecipeError(f"the recipe names {path}, which is not a part of a detector")
    arguments = {key: _restore(value) for key, value in dict(recipe.get("init_args") or {}).items()}
    try:
        return maker(**arguments)
    except TypeError as error:
        raise RecipeError(f"the recipe of {path} does not fit this version of {PACKAGE}: {error}") from error


def name_only_known(own: Iterable[str]) -> None:
    """From now on configurations of this process name nothing but parts of `KNOWN` packages and what `own` names.

    Args:
        own: values that the user has typed where classes are expected: the packages they name are trusted.
    """
    words = [name for argument in own for name in re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", argument)]
    typed = {name.partition(".")[0] for name in words} - {"jsonargparse", *sys.stdlib_module_names}
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*KNOWN, *sorted(typed)])


def _arguments(
    maker: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], skip: str = ""
) -> dict[str, Any]:
    """All arguments of a call by name, defaults included: they may change, the checkpoint may not."""
    bound = signature(maker).bind(*args, **kwargs)
    bound.apply_defaults()
    named = {name: value for name, value in bound.arguments.items() if name not in (skip, "kwargs")}
    return named | bound.arguments.get("kwargs", {})


def _describe(path: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    plain = {name: _plain(value) for name, value in arguments.items()}
    return None if NotImplemented in plain.values() else {"class_path": path, "init_args": plain}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return NotImplemented if NotImplemented in items else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    recipe = getattr(value, "recipe", None)
    return NotImplemented if recipe is None else recipe


def _restore(value: Any) -> Any:
    if isinstance(value, Mapping):
        return rebuild(value)
    return [_restore(item) for item in value] if isinstance(value, list) else value
