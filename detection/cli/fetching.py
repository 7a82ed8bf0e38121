"""The command `download`: COCO 2017 or Pascal VOC; an interrupted download continues where it stopped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from detection.cli.wording import Flags
from detection.data.download import DATASETS, download
from detection.data.records import DataError


def main(args: Sequence[str]) -> int:
    """Run the command with its flags; returns the exit code."""
    parser = Flags("detection download", description="Fetch COCO 2017 or Pascal VOC; goes on where it stopped.")
    parser.add_argument("dataset", choices=sorted(DATASETS), help="which")
    parser.add_argument("--root", type=Path, required=True, help="folder to put the data set in")
    parser.add_argument("--keep", action="store_true", help="keep the archives after unpacking")
    given = parser.parse_args(args)
    try:
        download(DATASETS[given.dataset], given.root, given.keep)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
