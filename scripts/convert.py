"""Bring checkpoints of torchvision, Detectron2 and MMDetection here, or take ours there; see `--help`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
