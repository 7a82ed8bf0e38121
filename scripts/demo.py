"""Look at a detector at work in the browser: `python scripts/demo.py --ckpt RUN/best.ckpt`."""

from __future__ import annotations

import sys
from pathlib import Path

from detection.cli.flags import check_ranges, run_command


def main(ckpt: Path, port: int = 7860, host: str = "127.0.0.1", device: str = "auto",
         trust: list[str] = []) -> None:  # noqa: B006  # fmt: skip
    """Serve a page that detects in images dropped on it and shows the detector's stages, until interrupted.

    Nothing that the page needs is loaded from anywhere else. Needs `pip install "detection[demo]"`.

    Args:
        ckpt: checkpoint of scripts/fit.py, or .safetensors of scripts/convert.py.
        port: to listen at.
        host: to listen at; 0.0.0.0 lets everybody in who can reach this machine.
        device: auto, cpu, cuda, cuda:1, mps.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
    """
    check_ranges(port=(port, 0, 65535))
    from detection.demo import serve

    serve(ckpt, host, port, device, trust)


if __name__ == "__main__":
    sys.exit(run_command(main, ValueError))
