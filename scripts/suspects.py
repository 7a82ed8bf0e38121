"""List labels that a cross-validated detector contradicts: `python scripts/suspects.py RUN`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["suspects", *sys.argv[1:]]))
