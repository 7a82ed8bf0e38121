"""Which code this is, for reports and checkpoints."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path


def code_version() -> str:
    """Of this package: the commit of its checkout, with `+` where files differ from it; else that of the package."""
    here = Path(__file__).resolve()

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # or it would be the commit of what the package lies in
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return _installed()


def _installed() -> str:
    try:
        return f"version {metadata.version('detection')}"
    except metadata.PackageNotFoundError:  # a copy of the files
        return "unknown"
