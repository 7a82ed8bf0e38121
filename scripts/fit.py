#!/usr/bin/env python
"""Train a detector: `python scripts/fit.py [--config FILE] [--data.root FOLDER ...]`; see `--help`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["fit", *sys.argv[1:]]))
