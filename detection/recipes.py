"""How a part was made, in plain values, and making it again: what lets a checkpoint rebuild its own detector.

A recipe is `{"class_path": "package.module.Name", "init_args": {...}}`, the form that configuration files have too, and
both go through `rebuild`. A recipe that leaves out arguments without a default makes a factory, `functools.partial`, to
which the builder gives the rest: channels, classes, strides. Whose code may run for it, `detection.trust` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import partial, wraps
from inspect import Parameter, isclass, isfunction, signature
from pathlib import Path
from typing import Any, TypeVar

from detection.trust import (
    A_RUN,
    EVERYTHING,
    RecipeError,
    find,
    is_looked_for,
    is_recorded,
    trusted,
    trusting,
)
from detection.upgrades import upgrade

Made = TypeVar("Made", bound=Callable[..., Any])
WEIGHTS = ("weights", "weights_backbone")  # arguments of builders that name a file: no part of a recipe
DEEPEST, MOST = 50, 100_000  # of a recipe's values: a file of some bytes can describe more than memory holds


def recorded(maker: Made) -> Made:
    """Decorate a class or a builder function, so that what it makes keeps how it was made.

    What it makes gets two attributes. `recipe` is its class path with all arguments, defaults included, or None where
    an argument has no plain form. `unrecorded` names those arguments, see `note`. A subclass is recorded where it is
    decorated itself.

    Weights are left out of a recipe, as a checkpoint has its own. A builder whose arguments of None became something
    else because it had weights notes what they became in `resolved`, a dictionary on what it makes.
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
    """Write down on a part how it was made.

    Args:
        made: the part; one that takes no attributes, such as a tuple, stays without a recipe.
        path: of its class or builder.
        arguments: all that it was made with. Where one has no plain form, the part's `recipe` is None and its
            `unrecorded` maps the path of what is to blame, e.g. `roi_heads.box_head`, to its type.
    """
    resolved = getattr(made, "resolved", {})
    named = {name: None if _names_weights(name, value) else value for name, value in arguments.items()}
    named |= {name: resolved[name] for name, value in named.items() if value is None and name in resolved}
    plain = {name: describe(value) for name, value in named.items()}
    missing = [name for name, value in plain.items() if value is NotImplemented]
    try:
        recipe = None if missing or not _is_importable(path) else {"class_path": path, "init_args": plain}
        lost = {where: kind for name in missing for where, kind in blame(named[name], name).items()}
        set_attribute = object.__setattr__ if is_dataclass(made) else setattr  # one may be frozen
        set_attribute(made, "recipe", recipe)
        set_attribute(made, "unrecorded", lost)
    except AttributeError:
        pass


def _names_weights(name: str, value: Any) -> bool:
    return name in WEIGHTS and isinstance(value, str | Path | Enum)


def _is_importable(path: str) -> bool:
    """Whether a class or function of this path is there for others: none is that a script or a function defines."""
    return "<" not in path and not path.startswith("__main__.")


def describe(value: Any) -> Any:
    """A value in plain form, parts and factories as recipes; NotImplemented where there is none.

    Tuples become lists, and paths text, as they do in a file.
    """
    if value is None:
        return None
    if isinstance(value, Enum):
        inner, member = describe(type(value)), describe(value.value)
        usable = inner is not NotImplemented and member is not NotImplemented
        return {"class_path": inner["class_path"], "init_args": {"value": member}} if usable else NotImplemented
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # NumPy's float64 is a float too, but no plain value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        items = [describe(item) for item in value]
        return NotImplemented if NotImplemented in items else items
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):  # which a file's JSON would turn into text
            pairs = describe([[name, item] for name, item in value.items()])
            path = f"{keyed.__module__}.{keyed.__qualname__}"
            return pairs if pairs is NotImplemented else {"class_path": path, "init_args": {"pairs": pairs}}
        entries = {name: describe(item) for name, item in value.items()}
        return NotImplemented if NotImplemented in entries.values() else entries
    if isinstance(value, partial) and not value.args:
        inner, arguments = describe(value.func), describe(value.keywords)
        usable = isinstance(inner, dict) and "partial" in inner and arguments is not NotImplemented
        return inner | {"init_args": arguments} if usable else NotImplemented
    if isfunction(value) and (recipe := getattr(value, "recipe", None)):  # which another one has made
        return recipe
    if isclass(value) or isfunction(value):
        path = f"{value.__module__}.{value.__qualname__}"
        return {"class_path": path, "init_args": {}, "partial": True} if _is_importable(path) else NotImplemented
    recipe = getattr(value, "recipe", None)
    return NotImplemented if recipe is None else recipe


@recorded
def keyed(pairs: list[Any]) -> dict[Any, Any]:
    """A dictionary from its keys and values, as recipes have those whose keys are not text."""
    return dict(pairs)


def blame(value: Any, where: str) -> dict[str, str]:
    """What in a value has no plain form: its path, beginning with `where`, and its type, innermost parts alone."""
    inner: dict[str, Any] = {}
    if isinstance(value, list | tuple):
        inner = {str(i): item for i, item in enumerate(value)}
    elif isinstance(value, Mapping):
        inner = {str(name): item for name, item in value.items()}
    elif isinstance(value, partial):
        inner = value.keywords
    elif known := getattr(value, "unrecorded", None):
        return {f"{where}.{name}": named for name, named in known.items()}
    found = [blame(item, f"{where}.{name}") for name, item in inner.items() if describe(item) is NotImplemented]
    kind: Any = value if isclass(value) or isfunction(value) else type(value)
    return {name: kind for part in found for name, kind in part.items()} or {where: kind.__qualname__}


def rebuild(recipe: Any, trust: Iterable[str] = ()) -> Any:
    """Make again what a recipe describes, or a factory where arguments without a default are left to the caller.

    Args:
        recipe: as `describe` gives it. Plain values, and lists and dictionaries of them, come back as they are.
        trust: packages whose code may run besides this one's, and those of `trusting`. `EVERYTHING` and `A_RUN` cover
            this recipe, but no file that one of its builders opens.

    Raises:
        RecipeError: it names something that is not trusted or not there, or arguments that don't fit.
    """
    named_in(recipe)  # refuses what is too large
    marks = tuple(mark for mark in (EVERYTHING, A_RUN) if mark in trust)
    with trusting([name for name in ((trust,) if isinstance(trust, str) else trust) if name not in marks]):
        return _rebuild(recipe, (*trusted(), *marks))


def named_in(recipe: Any) -> list[str]:
    """The class paths that a recipe names, each once.

    Raises:
        RecipeError: it is deeper or larger than any recipe. Within a pickle a list may even hold itself.
    """
    todo, seen, paths = [(recipe, 0)], 0, dict[str, None]()
    while todo:
        value, depth = todo.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST:
            raise RecipeError("the recipe is no detector's: it is too large, or nested too deeply")
        if isinstance(value, Mapping):
            if isinstance(value.get("class_path"), str):
                paths[value["class_path"]] = None
            todo.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, list | tuple):
            todo.extend((item, depth + 1) for item in value)
    return list(paths)


def packages_of(recipe: Any) -> list[str]:
    """The packages that a checkpoint with this recipe asks to trust."""
    paths = (path for path in named_in(recipe) if not is_looked_for(path))
    return sorted({path.partition(".")[0] for path in paths})


def _rebuild(recipe: Any, trust: tuple[str, ...]) -> Any:
    if isinstance(recipe, list | tuple):
        return [_rebuild(item, trust) for item in recipe]
    if not isinstance(recipe, Mapping):
        return recipe
    if "class_path" not in recipe:
        return {name: _rebuild(value, trust) for name, value in recipe.items()}
    path, given = str(recipe["class_path"]), recipe.get("init_args") or {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RecipeError(f"the recipe of {path} has arguments without names")
    written = EVERYTHING in trust or A_RUN in trust
    path, init_args = upgrade(path, dict(given), written)
    maker = find(path, trust)
    if not written and (named := [name for name in WEIGHTS if _names_weights(name, init_args.get(name))]):
        raise RecipeError(f"the recipe of {path} names {named[0]}: a checkpoint has its own, and opens no other file")
    arguments = {name: _rebuild(value, trust) for name, value in init_args.items()}
    refused = "" if written else f"the recipe of {path} can't be followed"
    if isclass(maker) and issubclass(maker, Enum):  # whose signature leaves `value` out since Python 3.12
        return _make(maker, arguments, refused)
    try:
        signature(maker).bind_partial(**arguments)
    except (TypeError, ValueError) as error:
        package = path.partition(".")[0]
        raise RecipeError(f"the recipe of {path} does not fit this version of {package}: {error}") from error
    if recipe.get("partial") or _needs_more(maker, arguments):
        return partial(maker, **arguments) if arguments else maker
    made = _make(maker, arguments, refused)
    if getattr(made, "recipe", None) is None and not is_recorded(maker):
        note(made, path, arguments)
    return made


def _make(maker: Callable[..., Any], arguments: Mapping[str, Any], complaint: str) -> Any:
    """Call the maker; with a complaint, whatever it raises is a RecipeError that begins so."""
    try:
        return maker(**arguments)
    except RecipeError:
        raise
    except Exception as error:
        if not complaint:
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RecipeError(f"{complaint}: {said}") from error


def _needs_more(maker: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    parameters = signature(maker).parameters.values()
    if isclass(maker) and [p.kind for p in parameters] == [Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD]:
        # It hands on whatever it is given, so the class behind it says what is wanted.
        below = [base for base in maker.__mro__ if "__init__" in vars(base)][1:2]
        return any(_needs_more(base, arguments) for base in below)
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    wanted = (p for p in parameters if p.kind in kinds and p.default is Parameter.empty)
    return any(p.name not in arguments for p in wanted)


class Unnamed:
    """Stands for arguments of `*args`, which a recipe can't hold."""


def _arguments(
    maker: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], skip: str = ""
) -> dict[str, Any]:
    """All arguments of a call by name, defaults included: they may change, the checkpoint may not."""
    bound = signature(maker).bind(*args, **kwargs)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is Parameter.VAR_KEYWORD:
            named |= value
        elif kind is Parameter.VAR_POSITIONAL:
            named |= {f"*{name}": Unnamed()} if value else {}
        elif name != skip:
            named[name] = value
    return named
