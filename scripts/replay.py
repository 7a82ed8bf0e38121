"""Draw a training step of a run again: `python scripts/replay.py RUN --step 4211`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["replay", *sys.argv[1:]]))
