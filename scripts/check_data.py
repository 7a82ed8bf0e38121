"""Finds what is wrong in a data set before training, and says what is in it; see `--help`."""

from __future__ import annotations

import sys

from detection.cli.check import main

if __name__ == "__main__":
    sys.exit(main())
