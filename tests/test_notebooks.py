"""The notebooks run to the end, say nothing on stderr, and are committed as they run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tests.runs import rehearsed

nbformat = pytest.importorskip("nbformat", reason='needs pip install "detection[notebooks]"')
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 500 * 1024  # bytes: a repository keeps every version for ever
PATHS = re.compile(r"/(home|root|work|Users|tmp|opt)/\w|[A-Z]:\\\\")


def load_runner() -> Any:
    """`notebooks/run.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location("notebook_runner", ROOT / "notebooks" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds(notebook: Any) -> list[list[str]]:
    """Which outputs each code cell has."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted({output.get("name", output.output_type) for output in cell.outputs}) for cell in cells]


def texts(notebook: Any) -> list[str]:
    """All that a reader sees of the outputs but for pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [value for output in outputs for name, value in output.get("data", {}).items() if name.startswith("text/")]
    return [*data, *(output.text for output in outputs if output.output_type == "stream")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_those_of_the_code(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stale = "run `python notebooks/run.py` and commit what it writes"
    assert notebook.metadata.get("code_digest") == load_runner().digest(notebook), f"{path.name}: {stale}"
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), f"{path.name}: {stale}"
    pictures = [
        output for cell in code for output in cell.outputs if {"image/png", "image/jpeg"} & {*output.get("data", {})}
    ]
    assert len(pictures) >= 4
    assert path.stat().st_size < LARGEST
    assert not [text for text in texts(notebook) if PATHS.search(text)]


@pytest.mark.slow
@pytest.mark.parametrize("count", rehearsed([1, 4], 1))
def test_notebooks_run(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason='needs pip install "detection[notebooks]"')
    pytest.importorskip("ipykernel", reason='needs pip install "detection[notebooks]"')
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the kernels': they find the first one's run, and no older
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS[:count]:
        executed = load_runner().execute(path)  # an error in a cell is raised
        said = [text for cell in executed.cells for text in cell.get("outputs", []) if text.get("name") == "stderr"]
        assert not said, f"{path.name} wrote to stderr: {said[0].text}"
        assert kinds(executed) == kinds(nbformat.read(path, as_version=4)), f"{path.name}: other outputs than committed"
        assert not [text for text in texts(executed) if PATHS.search(text) or str(tmp_path) in text]
