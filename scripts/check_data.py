"""Find what is wrong in a data set before training, and say what is in it; see `--help`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
