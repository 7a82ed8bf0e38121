"""Average the weights of several runs: `python scripts/soup.py RUN RUN --output soup.ckpt`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["soup", *sys.argv[1:]]))
