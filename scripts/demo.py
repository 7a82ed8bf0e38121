"""Look at a detector at work in the browser: `python scripts/demo.py --ckpt RUN/best.ckpt`."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from detection.errors import complaint


def main(ckpt: Path, port: int = 7860, host: str = "127.0.0.1", device: str = "auto") -> None:
    """Serve a page that detects in images dropped on it and shows the detector's stages, until interrupted.

    Nothing that the page needs is loaded from anywhere else. Needs `pip install "detection[demo]"`.

    Args:
        ckpt: checkpoint of scripts/fit.py, or .safetensors of scripts/convert.py.
        port: to listen at.
        host: to listen at; 0.0.0.0 lets everybody in who can reach this machine.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    from detection.demo import serve

    serve(ckpt, host, port, device)


if __name__ == "__main__":
    sys.exit(complaint(lambda: auto_cli(main, as_positional=False)))
