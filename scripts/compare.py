"""Compare two detectors, several seeds of each: `python scripts/compare.py RUN RUN`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
