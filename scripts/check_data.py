"""Finds what is wrong in a data set before training, and says what is in it.

Exit code 0: clean; 1: the loader repairs or leaves out some records; 2: something can't be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from detection.data.anchor_fit import Grid
from detection.data.audit import audit, find_splits, look_across, write_json
from detection.data.audit_report import picture_sheet, print_audit
from detection.data.records import DataError


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--format", choices=("coco", "voc", "yolo"), required=True)
    parser.add_argument("--split", help="VOC or YOLO split (default: all)")
    parser.add_argument("--annotations", help="COCO file or VOC folder, relative to the root (default: found)")
    parser.add_argument("--images", help="folder of images, relative to the root (default: found)")
    parser.add_argument("--min-size", type=int, default=800, help="shorter side after resizing (default: 800)")
    parser.add_argument("--max-size", type=int, default=1333, help="limit of the longer side (default: 1333)")
    parser.add_argument("--anchor-sizes", type=float, nargs="+", default=[32, 64, 128, 256, 512], help="one a level")
    parser.add_argument("--anchor-ratios", type=float, nargs="+", default=[0.5, 1, 2], help="height / width")
    parser.add_argument("--strides", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="one a level")
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    parser.add_argument("--sheet", type=Path, help="write a picture sheet of samples with boxes to this file")
    args = parser.parse_args()
    if len(args.anchor_sizes) != len(args.strides):
        parser.error("--anchor-sizes and --strides need one number a level each")
    sizes = tuple((size,) for size in args.anchor_sizes)
    grid = Grid(sizes, tuple(args.strides), tuple(args.anchor_ratios), args.min_size, args.max_size)
    try:
        splits = find_splits(args.root, args.format, args.annotations, args.images, args.split)
        audits = [audit(name, read, grid) for name, read in splits.items()]
        look_across(audits, args.root, args.format)
        for found in audits:
            print_audit(found, Console())
        if args.json:
            write_json(audits, args.json)
        if args.sheet:
            picture_sheet(audits, args.sheet)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    return max(found.code for found in audits)


if __name__ == "__main__":
    sys.exit(main())
