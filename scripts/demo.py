"""Look at a detector at work in the browser: `python scripts/demo.py --ckpt RUN`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
