"""Write a detector as ONNX or .pt2: `python scripts/export.py --ckpt RUN --output detector.onnx`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
