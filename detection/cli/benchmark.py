"""The command `benchmark`: this project against its peers, as ratios of medians taken in turns."""

from __future__ import annotations

from collections.abc import Sequence

from detection.benchmarks.commands import COMMANDS
from detection.cli.flags import run_command


def main(args: Sequence[str]) -> str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    return run_command("benchmark", COMMANDS, args)
