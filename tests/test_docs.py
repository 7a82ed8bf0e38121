"""README.md and docs/ say nothing that is not so: commands parse, configurations parse, names and links exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jsonargparse
import pytest
import torch
import yaml
from PIL import Image

import detection
from detection.__main__ import COMMANDS
from detection.__main__ import main as command
from detection.cli import flags
from detection.cli.check import data_of, splits_of
from detection.cli.configuration import CONFIGS
from detection.cli.fit import main
from detection.data import scenes
from detection.recipes import rebuild
from detection.trust import RecipeError
from tests.runs import TINY, rows, scene_flags

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
RENDERED = DOCS / "notebooks"  # made of the notebooks, where `make docs` has run
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [page for page in sorted(DOCS.rglob("*.md")) if page.parent != RENDERED]
FENCE = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^\1```", re.M | re.S)
STANDS_FOR = re.compile(r"<[^<>\n]+>")  # <time>
# `detection fit ...`, or `scripts/fit.py ...`, which is the same
CALL = re.compile(
    rf"(?:\b(?:scripts|examples)/(\w+)\.py|(?<![\w./-])detection ({'|'.join(COMMANDS)})(?![\w./]))([^&;]*)"
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    title: str
    text: str


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        for indent, kind, title, body in FENCE.findall(page.read_text()):
            lines = [line.removeprefix(indent) for line in body.splitlines()]
            if kind == language and "--8<--" not in body:
                found.append(Block(page, kind, title, "\n".join(lines) + "\n"))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """Command and arguments of each line that calls one, or a script; also of those in tables and job scripts."""
    texts = [block.text for block in blocks("bash")] + [path.read_text() for path in DOCS.rglob("*.sbatch")]
    for page in PAGES:
        inline = re.findall(r"`([^`\n]+)`", page.read_text())
        texts += [text for text in inline if (call := CALL.search(text)) and call[3].strip()]  # not only its name
    found: dict[str, tuple[str, list[str]]] = {}
    for text in texts:
        for line in STANDS_FOR.sub("X", text.replace("\\\n", " ")).splitlines():
            match = CALL.search(line)
            if match and not line.lstrip().startswith("#"):
                name = {"check_data": "check"}.get(match[1], match[1] or match[2])
                call = (name, shlex.split(match[3], comments=True))
                found.setdefault(" ".join([name, *call[1]]), call)
    return list(found.values())


CALLS = commands()
YAML_BLOCKS = blocks("yaml")
CONFIGURATIONS = [block for block in YAML_BLOCKS if not block.text.startswith("name: detection")]


class Parsed(Exception):  # noqa: N818
    """The command line is right; what it asks for is not done."""


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the configurations and modules that the pages give a name; what it holds can be imported."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for block in [*YAML_BLOCKS, *blocks("python")]:
        if block.title:
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.text)
    for path in [*EXAMPLES.glob("*.yaml"), *EXAMPLES.glob("my_parts/*.py")]:
        (tmp_path / path.relative_to(EXAMPLES)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    titles = {block.title.removesuffix(".py") for block in blocks("python")} | {"my_parts"}
    for name in [name for name in sys.modules if name.partition(".")[0] in titles]:
        del sys.modules[name]


def test_there_is_something_to_test() -> None:
    assert len(CALLS) > 30 and len(CONFIGURATIONS) > 15
    assert {*COMMANDS, "run_exported"} - {name for name, _ in CALLS} <= {"download"}


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[" ".join([s, *a])[:82] for s, a in CALLS])
def test_command_line_is_understood(
    name: str, arguments: list[str], beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "fit":
        code = parse_fit(arguments)
        assert code == 0
        return
    if name == "run_exported":
        pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')

    def parse_only(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        parse(self, *args, **kwargs)
        raise Parsed

    def parse_calls(components: Any, args: list[str], **kwargs: Any) -> NoReturn:
        parser = jsonargparse.capture_parser(lambda: jsonargparse.CLI(components, **kwargs))
        parser.exit_on_error = False
        parser.parse_args(args)
        raise Parsed

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(flags, "auto_cli", parse_calls)
    by_argparse = ("ablate", "check", "compare", "download", "replay", "run_exported", "soup", "suspects", "verify")
    if name in by_argparse:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", ["run_exported.py", *arguments])
    alone = partial(runpy.run_path, str(ROOT / "examples" / "run_exported.py"), run_name="__main__")
    with pytest.raises(Parsed):
        alone() if name == "run_exported" else command([name, *arguments])


def parse_fit(arguments: list[str]) -> int:
    """The exit code of the command line without its run; what it resumes need not be there."""
    own = [a for a in arguments if a != "--print_config" and not a.endswith(".help")]
    if own != arguments and "--print_config" not in arguments:
        return 0  # help on one builder, which names nothing else
    try:
        return main([*own, "--print_config"])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=[f"{b.page.stem}-{b.text[:24]!r}" for b in CONFIGURATIONS])
def test_configuration_parses(block: Block, beside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = beside / "block.yaml"
    path.write_text(block.text)
    assert parse_fit(["--config", str(path)]) == 0, capsys.readouterr().err
    printed = yaml.safe_load(capsys.readouterr().out)
    assert_contained(yaml.safe_load(block.text), printed)


def section(page: Path, heading: str) -> list[Block]:
    """The YAML blocks of a section."""
    text = page.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [block for block in YAML_BLOCKS if block.page == page and block.text in text]


LOSSES = section(DOCS / "settings.md", "Losses and sampling")


def test_losses_that_are_shown_are_found() -> None:
    shown = "".join(block.text for block in LOSSES)
    for name in ("FocalLoss", "ClassWeights", "HardExampleSampler", "rpn_box_loss", "SmoothL1Loss", "BalancedL1Loss"):
        assert name in shown
    assert all(len(block.text.splitlines()) < 10 for block in LOSSES)


@pytest.mark.parametrize(
    "block", LOSSES, ids=[b.text.splitlines()[4].split()[0].rstrip(":") + f"-{i}" for i, b in enumerate(LOSSES)]
)
def test_loss_or_sampler_trains(block: Block, beside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (beside / "block.yaml").write_text(block.text)
    data = scene_flags(scenes.draw(beside, train=4, val=2))
    short = [
        "--trainer.max_steps",
        "2",
        "--data.num_workers",
        "0",
        "--trainer.num_sanity_val_steps",
        "0",
        "--wandb",
        "off",
    ]
    assert main(["--config", "block.yaml", *TINY, *data, *short, "--output", "runs"]) == 0, capsys.readouterr().err
    losses = [
        float(row[name])
        for row in rows(next((beside / "runs").glob("*/*")))
        for name in row
        if "loss" in name and row[name]
    ]
    assert len(losses) >= 10 and all(math.isfinite(loss) for loss in losses)


FAMILY = section(DOCS / "settings.md", "Other necks and heads")


def part_of(block: Block) -> str:
    """The module and the class of the family's part that a block shows."""
    return block.text.partition("family.")[2].split()[0].rstrip("}")


@pytest.mark.rehearsal
@pytest.mark.parametrize("block", FAMILY, ids=[part_of(b) for b in FAMILY])
def test_neck_or_head_trains(block: Block, beside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(FAMILY) == 5 and len(block.text.splitlines()) < 10
    (beside / "block.yaml").write_text(block.text)
    data = scene_flags(scenes.draw(beside, train=4, val=2))
    flags = ["--model.detector.weights_backbone", "null", "--trainer.max_steps", "2", "--data.num_workers", "0"]
    flags += ["--trainer.num_sanity_val_steps", "0", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    flags += ["--data.min_size", "64", "--data.max_size", "96", "--data.batch_size", "2", "--wandb", "off"]
    assert main(["--config", "block.yaml", *data, *flags, "--output", "runs"]) == 0, capsys.readouterr().err
    run = next((beside / "runs").glob("*/*"))
    losses = {name: float(row[name]) for row in rows(run) for name in row if "loss" in name and row[name]}
    assert ("train/loss_iou" in losses) == ("iou_branch" in block.text)
    assert len(losses) >= 5 and all(math.isfinite(loss) for loss in losses.values())
    kept = str(torch.load(run / "last.ckpt", weights_only=True)["hyper_parameters"]["detector"])
    assert part_of(block) in kept
    assert detection.Detector.from_checkpoint(run / "last.ckpt").class_names


def assert_contained(part: Any, whole: Any, where: str = "") -> None:
    """What the page says has reached the configuration, where the name of a class may be written short."""
    if isinstance(part, str) and isinstance(whole, dict) and "class_path" in whole:
        assert whole["class_path"].rpartition(".")[2] == part.rpartition(".")[2], where
    elif isinstance(part, dict):
        for key, value in part.items():
            if key == "class_path":
                assert whole[key].rpartition(".")[2] == value.rpartition(".")[2], where
            else:
                assert_contained(value, whole[key], f"{where}.{key}")
    elif isinstance(part, list):
        for number, (one, other) in enumerate(zip(part, whole, strict=True)):
            assert_contained(one, other, f"{where}[{number}]")
    else:
        assert whole == part, where


def test_unknown_flags_and_keys_would_be_noticed(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_fit(["--model.lrr", "1"]) == 2
    (beside / "wrong.yaml").write_text("model:\n  detector:\n    class_path: detection.NoSuchDetector\n")
    assert parse_fit(["--config", "wrong.yaml"]) == 2
    for script, flag in (("predict", "--sauce"), ("check", "--rood")):
        with pytest.raises((SystemExit, argparse.ArgumentError, jsonargparse.ArgumentError)):
            test_command_line_is_understood(script, [flag, "x"], beside, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", text)
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in link or not target:
            continue
        path = page.parent / target
        if path.parent == RENDERED:
            path = ROOT / "notebooks" / f"{path.stem}.ipynb"
        assert path.exists(), f"{page.name}: {link}"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], link


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page.stem)
def test_python_names_what_exists(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("detection"):
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{block.page.name}: {node.module} has no {missing}"


def test_the_reader_of_the_tutorial_reads(beside: Path) -> None:
    """Two images in a table, checked and made into a batch by the configuration that stands beside it."""
    (beside / "my_data").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40)).save(beside / "my_data" / name)
    for split in ("train", "val"):
        (beside / "my_data" / f"{split}.csv").write_text(
            "a.png;dog;1;2;30.5;40\nb.png;cat;5;5;60;20\na.png;cat;0;0;9;9\n"
        )
    data = data_of(beside / "my_table.yaml")
    assert data.class_names == ["cat", "dog"]
    records = splits_of(data)["train"]().records
    assert [r.labels.tolist() for r in records] == [[2, 1], [1]] and records[0].boxes[0].tolist() == [1, 2, 30.5, 40]
    data.hparams["num_workers"] = 0
    data.setup("fit")
    assert int(next(iter(data.val_dataloader())).gt_valid.sum()) == 3


OWN_PART = (DOCS / "tutorials" / "your-own-part.md").read_text()


def test_the_contract_of_the_tutorial_is_the_one_that_holds() -> None:
    (contract,) = [block.text for block in blocks("python") if block.text.startswith("class RPNHeadPart")]
    assert contract in (ROOT / "detection" / "parts.py").read_text()
    for name in re.findall(r"^\|.*\| `(\w+)` \|", OWN_PART, re.M):
        assert f"class {name}(Protocol)" in (ROOT / "detection" / "parts.py").read_text(), name


def test_the_tutorial_names_every_own_part() -> None:
    """Each file of the example is in the table, and what the table names is there."""
    named = re.findall(r"`(my_parts\.(\w+)\.(\w+))` \|$", OWN_PART, re.M)
    assert {module for _, module, _ in named} == {path.stem for path in EXAMPLES.glob("my_parts/[!_]*.py")}
    for _, module, name in named:
        assert re.search(rf"^(class|def) {name}\b", (EXAMPLES / "my_parts" / f"{module}.py").read_text(), re.M), name


def test_the_error_of_the_tutorial_is_the_one_that_comes(beside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head without its factor of four, at the place where the tutorial puts it."""
    path = beside / "my_parts" / "rpn_head.py"
    path.write_text(path.read_text().replace("4 * num_anchors", "num_anchors"))
    part = "my_parts.rpn_head.DepthwiseHead"
    data = scene_flags(scenes.draw(beside, train=2, val=1))
    builder = ["--model.detector", "fasterrcnn_efficientnet_lite0_fpn", "--model.detector.rpn_head", part]
    assert main([*builder, *data, "--output", "runs", "--wandb", "off"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] in OWN_PART
    with pytest.raises(RecipeError) as caught:
        rebuild({"class_path": "my_parts.backbone.SmallNet", "init_args": {}})
    assert f"error: best.ckpt: {caught.value}\n" in OWN_PART


@pytest.mark.slow
def test_the_tests_of_the_example_pass(beside: Path) -> None:
    shutil.copy(EXAMPLES / "test_parts.py", beside)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_parts.py"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


def test_reference_has_every_public_name_and_module() -> None:
    index = (DOCS / "api" / "index.md").read_text()
    named = set(re.findall(r"^\| \[`(\w+)`\]", index, re.M))
    assert named == set(detection.__all__)
    documented = set(
        re.findall(r"^::: (detection[\w.]+)", "".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M)
    )
    for page in documented:
        place = ROOT / Path(*page.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file(), page
    rooms = ("models", "models.family", "models.fast", "interop", "certificates", "inference", "evaluation", "data")
    rooms += ("training", "cli")
    private = {"detection.evaluation.page", "detection.evaluation.gallery_looks", "detection.demo.demo_looks"}  # HTML
    folders = {room: ROOT / "detection" / room.replace(".", "/") for room in rooms}
    modules = {f"detection.{room}.{p.stem}" for room, folder in folders.items() for p in folder.glob("[!_]*.py")}
    modules |= {f"detection.{p.stem}" for p in (ROOT / "detection").glob("[!_]*.py")}
    assert modules - documented <= private


def test_every_packaged_configuration_is_on_its_page() -> None:
    page = (DOCS / "configurations.md").read_text()
    shown = set(re.findall(r'--8<-- "detection/configs/(?:presets/)?(\w+)\.yaml"', page))
    assert shown == {path.stem for path in CONFIGS.rglob("*.yaml")}


def test_extras_that_are_named_exist() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    text = "".join(page.read_text() for page in PAGES)
    for names in re.findall(r'pip install (?:-e )?"(?:\.|detection)\[([\w,]+)\]"', text):
        assert set(names.split(",")) <= extras, names


def test_pictures_are_small_and_used() -> None:
    pictures = sorted((DOCS / "images").iterdir())
    sizes = [path.stat().st_size for path in pictures]
    assert max(sizes) <= 200_000 and sum(sizes) <= 1_000_000
    text = "".join(page.read_text() for page in PAGES)
    for path in pictures:
        assert path.name in text, path.name
        if path.suffix == ".jpg":
            Image.open(path).verify()


def test_site_asks_no_other_host() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False
    own = [*settings["extra_css"], *settings.get("extra_javascript", [])]
    assert not [name for name in own if "//" in name]
    for path in [*DOCS.rglob("*.css"), *DOCS.rglob("*.svg")]:
        assert not re.search(r"url\([\"']?https?:|@import|<script|xlink:href=\"http", path.read_text()), path.name


def test_citation_and_hooks_are_in_order() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["title"] and citation["message"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # nothing is fetched
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks[0]["hooks"])
