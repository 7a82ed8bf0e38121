"""The plain forms stay short and readable: nothing of PyTorch's inside, and no tricks for one device."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

from detection import models

FILES = sorted(Path(models.__file__).parent.glob("*.py"))
FAMILY = sorted((Path(models.__file__).parent / "family").glob("*.py"))
QUICK = sorted((Path(models.__file__).parent / "fast").glob("*.py"))
INSIDE = ("torch._C", "._compiled_call_impl", "torch.ops.mkldnn", "device.type")
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Lines that hold code: blank ones, comments and docstrings do not count."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in LAYOUT for n in range(t.start[0], t.end[0] + 1)}
    return len(lines - documented)


def test_lines_are_counted_without_comments_and_docstrings() -> None:
    source = (
        '"""Of the module."""\n\nx = 1  # why\n# alone\n\ndef f():\n    """Of f,\n    long."""\n    return """a\nb"""\n'
    )
    assert code_lines(source) == 1 + 1 + 2


@pytest.mark.parametrize("file", FILES + FAMILY, ids=lambda file: file.stem)
def test_the_plain_forms_need_no_private_name_and_ask_for_no_device(file: Path) -> None:
    found = [name for name in INSIDE if name in file.read_text()]
    assert not found, f"{file.name} names {found}: that belongs into detection/models/fast"


def test_the_quick_forms_are_where_such_names_are() -> None:
    """Or the search would find nothing anywhere."""
    everything = "".join(file.read_text() for file in QUICK)
    assert all(name in everything for name in ("torch._C", "torch.ops.mkldnn", "device.type"))


def test_parts_of_the_family_are_short() -> None:
    counts = {file.name: code_lines(file.read_text()) for file in FAMILY}
    assert max(counts.values()) < 200, counts


def test_the_main_line_does_not_know_the_family() -> None:
    named = {file.name for file in FILES if "models.family" in file.read_text()}
    assert not named


def test_the_plain_forms_have_less_than_2000_lines_of_code() -> None:
    counts = {file.name: code_lines(file.read_text()) for file in FILES}
    assert len(counts) > 15 and sum(counts.values()) < 2000, counts
