"""Evaluate a checkpoint on any data, or a COCO results file: `python scripts/evaluate.py --ckpt RUN`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
