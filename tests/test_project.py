"""The project's own files agree with one another and with what is installed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import detection

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
DEV = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]


def test_environment_file_agrees() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    by_conda = [Requirement(line) for line in environment["dependencies"] if isinstance(line, str)]
    (by_pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    assert by_pip == ["-e .[dev]"]  # the dependencies themselves, and so the same
    stated = {r.name: r.specifier for r in by_conda}
    assert stated.pop("python") == PROJECT["requires-python"]
    assert set(stated) == {"pip"}


@pytest.mark.parametrize("requirement", [*DEPENDENCIES, *DEV], ids=lambda r: r.name)
def test_installed_version_is_in_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_lower_bounds_and_no_needless_upper_ones() -> None:
    for requirement in DEPENDENCIES:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators, requirement.name
        assert operators == {">="} or requirement.name == "albumentations", requirement.name


def test_stolen_lightning_releases_are_shut_out() -> None:
    (lightning,) = [r for r in DEPENDENCIES if r.name == "lightning"]
    assert not any(lightning.specifier.contains(bad) for bad in ("2.6.2", "2.6.3"))
    assert lightning.specifier.contains("2.6.4")
    assert version("lightning") not in ("2.6.2", "2.6.3")


@pytest.mark.parametrize("package", ["albumentationsx", "opencv-python", "opencv-contrib-python"])
def test_not_installed(package: str) -> None:
    with pytest.raises(PackageNotFoundError):
        version(package)


def test_scripts_are_short_and_only_call() -> None:
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    assert scripts
    for path in scripts:
        assert len(path.read_text().splitlines()) < 60, path.name


def test_readme_names_only_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"scripts/\w+\.py", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"--config (\w+)\b(?!\.)", text):
        assert list((ROOT / "detection" / "configs").rglob(f"{name}.yaml")), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"`?make (\w+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def test_readme_is_short_and_names_the_one_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert "make fit" in text and "make test" in text
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        calls = re.findall(r"python (?:\.\./)?scripts/(\w+)\.py", page.read_text())
        assert set(calls) <= ({"fit"} if page.name == "README.md" else set()), page  # scripts are said once


def test_make_fit_installs_before_it_runs(tmp_path: Path) -> None:
    # VENV names a place with nothing in it: a fresh machine.
    command = ["make", "-n", "fit", f"VENV={tmp_path / 'venv'}", "CPU=1"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = ["-m venv", "pip install  torch torchvision --index-url", "pip install  -e .", "scripts/fit.py"]
    positions = [plan.find(step) for step in steps]
    assert -1 not in positions
    assert positions == sorted(positions)


def test_ci_runs_everything() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert all(target in script.read_text() for target in ("lint", "types", "test"))


def test_public_names_are_the_same_for_type_checkers() -> None:
    tree = ast.parse((ROOT / "detection" / "__init__.py").read_text())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and str(node.module)[:9] == "detection"
    ]
    declared = {alias.name: node.module for node in imports for alias in node.names}
    assert declared == detection._MODULES
    assert all(getattr(detection, name) is not None for name in detection.__all__)


def test_importing_the_package_imports_nothing_of_training() -> None:
    heavy = "lightning", "wandb", "albumentations", "matplotlib"
    code = f"import sys, detection; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_models_know_nothing_of_data() -> None:
    others = re.compile(r"^\s*(from|import) detection\.(data|training|evaluation|inference|interop|cli)", re.M)
    for path in (ROOT / "detection" / "models").rglob("*.py"):
        assert not others.search(path.read_text()), path


def test_no_two_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "detection").rglob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))
