"""Fetch COCO 2017 or Pascal VOC; an interrupted download continues where it stopped."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["download", *sys.argv[1:]]))
