#!/usr/bin/env python
"""Train a detector: python scripts/fit.py [--config FILE] [--data.root FOLDER ...]; see --help."""

import sys

from detection.cli import main

if __name__ == "__main__":
    sys.exit(main())
