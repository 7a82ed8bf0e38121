"""Measure this project against its peers, as ratios of medians taken in turns; see `benchmark.py --help`."""

from __future__ import annotations

import sys

from detection.benchmarks.commands import COMMANDS
from detection.cli.flags import run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS))
