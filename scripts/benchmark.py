"""Measure this project against its peers, as ratios of medians taken in turns; see `--help`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
