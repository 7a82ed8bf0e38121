"""How benchmarks show what they measured."""

from __future__ import annotations

import platform
from json import dumps
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table


def report(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print rows as a table under a line that says what they were measured on; write them as JSON.

    A list, such as a curve's points, is left to the JSON.
    """
    machine = f"torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.get_num_threads()} threads"
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    table = Table(*columns, title=f"{machine}, Python {platform.python_version()}, {platform.machine()}")
    for row in rows:
        values = [row[name] for name in columns]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console(width=160).print(table)
    if path is not None:
        path.write_text(dumps({"machine": machine, "rows": rows}, indent=2))
