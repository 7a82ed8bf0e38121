"""Detect in images, videos or a camera's pictures: `python scripts/predict.py --ckpt RUN --source photos`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
