"""The command `demo`: a detector at work in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detection.cli.flags import check_ranges, chosen, run_command


def show(
    ckpt: Path,
    beside: Path | None = None,
    port: int = 7860,
    host: str = "127.0.0.1",
    device: str = "auto",
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Serve a page that detects in images dropped on it and shows the detector's stages, until interrupted.

    Pictures that the run was validated on, or drawn scenes, are there to begin with. Nothing that the page needs is
    loaded from anywhere else. Needs `pip install "detection[demo]"`.

    Args:
        ckpt: run's folder, its checkpoint, or .safetensors of `detection convert`.
        beside: another of these, which looks at the same images: the two are shown side by side.
        port: to listen at.
        host: to listen at; 0.0.0.0 lets everybody in who can reach this machine.
        device: auto, cpu, cuda, cuda:1, mps.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
    """
    check_ranges(port=(port, 0, 65535))
    from detection.demo.demo_page import serve

    serve([chosen(path) for path in (ckpt, beside) if path is not None], host, port, device, trust)


def main(args: Sequence[str]) -> str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    return run_command("demo", show, args, ValueError)
