"""Compute the certificate of a converted or exported file again: `python scripts/verify.py FILE`."""

import sys

from detection.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
