"""Fetches COCO 2017 or Pascal VOC; an interrupted download continues where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path

from detection.cli.wording import Flags
from detection.data.download import DATASETS, download
from detection.data.records import DataError


def main() -> int:
    """Run the command; returns the exit code."""
    parser = Flags(description=__doc__)
    parser.add_argument("dataset", choices=sorted(DATASETS))
    parser.add_argument("--root", type=Path, required=True, help="folder to put the data set in")
    parser.add_argument("--keep", action="store_true", help="keep the archives after unpacking")
    args = parser.parse_args()
    try:
        download(DATASETS[args.dataset], args.root, args.keep)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
