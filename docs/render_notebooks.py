"""Pages of the site from the notebooks, with their outputs: `python docs/render_notebooks.py`, which `make docs` calls.

The pages are written into `docs/notebooks`, which git ignores: what is committed are the notebooks alone.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "notebooks"
KINDS = {"image/jpeg": "jpg", "image/png": "png"}
COLOUR = re.compile(r"\x1b\[[\d;]*m")  # of a terminal


def render(path: Path, folder: Path) -> Path:
    """Write the page of a notebook, and its pictures beside it.

    Args:
        path: the executed notebook.
        folder: where the page goes; it exists.

    Returns:
        the page.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_links(source))
            continue
        parts.append(f"```python\n{source}\n```")
        outputs = [_output(output, folder / f"{path.stem}_{number}_{i}") for i, output in enumerate(cell["outputs"])]
        parts += [part for part in outputs if part]
    title, _, rest = "\n\n".join(parts).partition("\n")
    where = f"*This page is [{path.name}]({path.name}), with the outputs of its last run.*"
    page = folder / f"{path.stem}.md"
    page.write_text(f"{title}\n\n{where}\n{rest}\n", encoding="utf-8")
    shutil.copy(path, folder)
    return page


def _links(text: str) -> str:
    """Links from the folder of the notebooks become those of the site, to modules those of the reference."""
    text = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", text)
    text = re.sub(r"\]\(\.\./detection/configs/(\w+)\.yaml\)", r"](../configurations.md#\1)", text)
    return re.sub(r"\]\(\.\./(detection/[\w/]+)\.py\)", lambda at: f"][{at[1].replace('/', '.')}]", text)


def _output(output: dict[str, Any], stem: Path) -> str:
    """What a cell has given, as Markdown; a picture is written into a file of its own."""
    data = output.get("data", {})
    for kind, suffix in KINDS.items():
        if kind in data:
            file = stem.with_suffix(f".{suffix}")
            file.write_bytes(base64.b64decode("".join(data[kind])))
            return f"![What the cell draws]({file.name}){{.output}}"
    text = COLOUR.sub("", "".join(output.get("text", data.get("text/plain", "")))).strip("\n")
    return f"```{{.text .output}}\n{text}\n```" if text.strip() else ""


def main() -> None:
    """Write all pages anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir()
    shutil.copy(ROOT / "notebooks" / "small.yaml", PAGES)
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        render(path, PAGES)


if __name__ == "__main__":
    main()
