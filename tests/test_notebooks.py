"""The notebooks run to the end, say nothing on stderr, and are committed as they run."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat", reason='needs pip install "detection[notebooks]"')
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 500 * 1024  # bytes: a repository keeps every version for ever
PATHS = re.compile(r"/(home|root|work|Users|tmp|opt)/\w|[A-Z]:\\\\")


def load_runner(path: str = "notebooks/run.py") -> Any:
    """A script that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pages_of_the_site_show_what_the_notebooks_hold(path: Path, tmp_path: Path) -> None:
    page = load_runner("docs/render_notebooks.py").render(path, tmp_path).read_text()
    notebook = nbformat.read(path, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert all(f"```python\n{source}\n```" in page for source in code)
    shown = re.findall(r"!\[[^]]+\]\((\S+?)\)", page)
    drawn = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/" in "".join(o.get("data", {}))]
    assert len(shown) == len(drawn)
    for name in shown:
        Image.open(tmp_path / name).verify()
    said = [o.text.strip("\n") for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stdout"]
    assert said and all(text in page for text in said if "\x1b" not in text)
    assert "\x1b" not in page and ".ipynb)" not in page.replace(f"[{path.name}]({path.name})", "")
    assert not PATHS.search(page) and "../detection" not in page


@pytest.mark.rehearsal
def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason='needs pip install "detection[notebooks]"')
    pytest.importorskip("ipykernel", reason='needs pip install "detection[notebooks]"')
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the kernels': they find the first one's run, and no older
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        executed = load_runner().execute(path)  # an error in a cell is raised
        said = [text for cell in executed.cells for text in cell.get("outputs", []) if text.get("name") == "stderr"]
        assert not said, f"{path.name} wrote to stderr: {said[0].text}"
        assert kinds(executed) == kinds(nbformat.read(path, as_version=4)), f"{path.name}: other outputs than committed"
        assert not [text for text in texts(executed) if PATHS.search(text) or str(tmp_path) in text]


@pytest.mark.slow
def test_the_second_notebook_takes_photographs(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of blood cells as VOC, without a validation split, in the place of the drawn scenes."""
    pytest.importorskip("nbclient", reason='needs pip install "detection[notebooks]"')
    pytest.importorskip("ipykernel", reason='needs pip install "detection[notebooks]"')
    cells = shared_data / "bccd"
    for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for file in sorted((cells / folder).glob(f"*.{suffix}"))[:24]:
            shutil.copy(file, tmp_path / "photos" / folder)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.joinpath("photos").rglob("*")}
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MY_PHOTOS", str(tmp_path / "photos"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    runner = load_runner()
    short = tmp_path / "short.ipynb"
    text = NOTEBOOKS[1].read_text()
    assert "else (20, 4)" in text
    short.write_text(text.replace("else (20, 4)", "else (1, 4)"))  # epochs
    executed = runner.execute(short)
    assert kinds(executed)[-1] == ["display_data"]
    said = "".join(texts(executed))
    assert "RBC" in said and "set aside" in said and "melon" not in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.joinpath("photos").rglob("*")} == before
