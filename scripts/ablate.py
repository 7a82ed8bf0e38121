"""Train a base and its swaps, and write the table: `python scripts/ablate.py base.yaml --swap model.lr=0.01`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
