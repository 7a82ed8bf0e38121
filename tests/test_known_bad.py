"""No release that is known to be bad is installed, or allowed by pyproject.toml."""

from __future__ import annotations

import contextlib
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LINES = [line.partition("#")[0].strip() for line in (ROOT / "tests" / "known_bad.txt").read_text().splitlines()]
BAD = [Requirement(line) for line in LINES if line]


def allowed() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    requirements = [Requirement(text) for text in texts]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def lets_in(requirement: Requirement, bad: Requirement) -> bool:
    """Whether a release that `bad` describes, by `==` or `<`, satisfies a requirement."""
    named = [spec.version for spec in bad.specifier if spec.operator == "=="]
    below = [Version(spec.version) for spec in bad.specifier if spec.operator == "<"]
    lowest = max(
        (Version(spec.version) for spec in requirement.specifier if spec.operator == ">="), default=Version("0")
    )
    return any(requirement.specifier.contains(name) for name in named) or any(lowest < limit for limit in below)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_not_installed_and_not_allowed(bad: Requirement) -> None:
    with contextlib.suppress(PackageNotFoundError):
        assert not bad.specifier.contains(version(bad.name), prereleases=True), f"{bad} is installed"
    requirement = allowed().get(canonicalize_name(bad.name))
    assert requirement is None or not lets_in(requirement, bad), f"pyproject.toml allows {bad}: {requirement}"


def test_the_list_can_fail() -> None:
    assert lets_in(Requirement("lightning>=2.6"), Requirement("lightning==2.6.2"))
    assert not lets_in(Requirement("lightning>=2.6.4"), Requirement("lightning==2.6.2"))
    assert lets_in(Requirement("torch"), Requirement("torch<2.6"))
    assert {"lightning", "torch"} <= {bad.name for bad in BAD}
