"""Measure this project against its peers, as ratios of medians taken in turns; see `benchmark.py --help`."""

from __future__ import annotations

from jsonargparse import auto_cli

from detection.benchmarks.commands import COMMANDS

if __name__ == "__main__":
    auto_cli(COMMANDS, as_positional=False)
