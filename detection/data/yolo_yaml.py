"""What a data.yaml says: its YAML, however Windows has spelt the paths, and class names in all their spellings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from detection.data.records import DataError


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML file of a data set.

    Raises:
        DataError: it is not readable, or has no `names`.
    """
    try:
        config = _parsed(path.read_text("utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise DataError(f"{path}: not readable as YAML ({line}{error.problem}); correct the file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not readable as YAML (it is not UTF-8); save it as UTF-8") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable as YAML ({type(error).__name__}); correct the file") from error
    if not isinstance(config, dict) or "names" not in config:
        raise DataError(f"{path}: it has no 'names'; write the class names down")
    return config


def _parsed(text: str) -> Any:
    """The YAML of a text, in which a quoted path of Windows is no series of escapes."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return yaml.safe_load(text.replace("\\", "/"))


def has_names(path: Path) -> bool:
    """Whether a YAML file describes a data set; one of its usual name that can't be read counts, to be reported."""
    official = path.name.lower() in ("data.yaml", "data.yml", "dataset.yaml")
    try:
        text = path.read_text("utf-8-sig")
        if not official and not re.search(r"^\s*['\"]?names['\"]?\s*:", text, re.MULTILINE) and "{" not in text:
            return False
        config = _parsed(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return official
    return isinstance(config, dict) and "names" in config


def numbered(names: Any, count: Any, path: Path) -> dict[int, str]:
    """Class names by number: from a list, a mapping of numbers, or text with a separator.

    Args:
        names: as the file has them.
        count: how many the file says there are, if it does.
        path: of the file, for messages.

    Raises:
        DataError: they are none.
    """
    if isinstance(names, str):
        names = _split_text(names, count)
    if isinstance(names, dict):
        try:
            numbers = {int(number): name for number, name in names.items()}
        except (TypeError, ValueError):
            if all(type(number) is int for number in names.values()):  # {red: 0, blue: 1}
                numbers = {number: name for name, number in names.items()}
            else:
                raise DataError(
                    f"{path}: 'names' has keys that are no class numbers; number them 0, 1, 2, ..."
                ) from None
        if min(numbers, default=0) < 0 or len(numbers) != len(names):
            raise DataError(f"{path}: 'names' does not number the classes 0, 1, 2, ...; number each class once")
    else:
        numbers = dict(enumerate(names)) if isinstance(names, list) else {}
    if any(isinstance(name, bool) for name in numbers.values()):
        raise DataError(f"{path}: 'names' holds a yes, no, on or off, which YAML takes for true and false; quote it")
    if not numbers or not all(isinstance(name, str | int | float) for name in numbers.values()):
        raise DataError(f"{path}: 'names' is not a list of class names; write them as a YAML list")
    return {number: str(numbers[number]).strip() for number in sorted(numbers)}


def _split_text(text: str, count: Any) -> list[str]:
    """Names from one string: a list in brackets, or separated by commas, lines, or blanks where their count says so."""
    if text.strip().startswith("["):
        try:
            inner = yaml.safe_load(text)
        except yaml.YAMLError:
            inner = None
        if isinstance(inner, list):
            return [str(name) for name in inner]
    for separator in (r"[,;\n]+", r"\s+"):
        parts = [part.strip(" '\"-[]\t") for part in re.split(separator, text.strip())]
        parts = [part for part in parts if part]
        if len(parts) > 1 and (separator != r"\s+" or len(parts) == count):
            return parts
    return [text.strip()]
