"""A Python program as text: the names that it assigns, with their values where these are literals. Nothing is run."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from detection.weights import CheckpointError

LARGEST = 1 << 20  # characters
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Unread:
    """A value that is no literal.

    Args:
        line: where it stands in the text.
    """

    def __init__(self, line: int) -> None:
        self.line = line


def parse(text: str) -> dict[str, Any]:
    """The names that a configuration assigns, with their values; what is no literal stands there unread.

    Raises:
        CheckpointError: no Python, or too large.
    """
    if len(text) > LARGEST:
        raise CheckpointError("its config is too large to be one")
    try:
        program = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"its config is no Python text ({error})") from error
    known: dict[str, Any] = {}
    for statement in program.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name):
                known[target.id] = _value(statement.value, known)
    return known


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """A literal, `dict(...)` of literals, arithmetic of numbers, or a name that was assigned before."""
    unread = Unread(node.lineno)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id, unread)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, known) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        if len(keys) == len(node.keys):
            return {key: _value(item, known) for key, item in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        if all(keyword.arg for keyword in node.keywords):
            return {keyword.arg: _value(keyword.value, known) for keyword in node.keywords}
        return unread
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, known)
        return -inner if isinstance(inner, int | float) else unread
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        sides = [_value(side, known) for side in (node.left, node.right)]
        if all(isinstance(side, int | float) for side in sides) and not (
            sides[1] == 0 and isinstance(node.op, ast.Div)
        ):
            return OPERATORS[type(node.op)](*sides)
    return unread
