"""Executes the notebooks in order and saves them with their outputs: `python notebooks/run.py [NOTEBOOK ...]`."""

from __future__ import annotations

import base64
import hashlib
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
WIDTH = 1000  # pixels: what a page shows of a picture
QUALITY = 75  # of JPEG, which takes a quarter of PNG's bytes for a photograph, and more for a plot


def execute(path: Path) -> NotebookNode:
    """The notebook executed in its folder, with a digest of its code; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    options = {"timeout": 600, "kernel_name": "python3", "coalesce_streams": True, "record_timing": False}
    NotebookClient(notebook, resources={"metadata": {"path": str(FOLDER)}}, **options).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # not which release of it
    notebook.metadata["code_digest"] = digest(notebook)
    return notebook


def digest(notebook: NotebookNode) -> str:
    """Changes with the code of the notebook, so that outputs of earlier code are noticed."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]


def shrink(notebook: NotebookNode) -> None:
    """Keep each picture in the outputs once, as wide as a page, and as JPEG where that is smaller than PNG."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            found = [data.pop(kind) for kind in ("image/png", "image/jpeg") if kind in data]  # Pillow gives both
            if found:
                picture = Image.open(io.BytesIO(base64.b64decode(found[0]))).convert("RGB")
                picture.thumbnail((WIDTH, 2 * WIDTH), Image.Resampling.LANCZOS)
                small = {"image/png": encode(picture, "PNG"), "image/jpeg": encode(picture, "JPEG")}
                kind = min(small, key=lambda kind: len(small[kind]))
                data[kind] = base64.b64encode(small[kind]).decode()


def encode(picture: Image.Image, form: str) -> bytes:
    """The picture as a file of that form."""
    file = io.BytesIO()
    picture.save(file, form, optimize=True, **({"quality": QUALITY} if form == "JPEG" else {}))
    return file.getvalue()


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        executed = execute(path)
        shrink(executed)
        nbformat.write(executed, path)
        print(f"{path.name}: {path.stat().st_size // 1024} KB")
