"""The command line of `scripts/check_data.py`: what is wrong in a data set, and what is in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from detection.cli.wording import Flags
from detection.data.anchor_fit import Grid
from detection.data.audit import audit, find_splits, look_across, write_json
from detection.data.audit_report import picture_sheet, print_audit
from detection.data.datamodule import DetectionDataModule
from detection.data.finding import Stage
from detection.data.reading import check_split
from detection.data.records import DataError, Index
from detection.recipes import EVERYTHING, import_from_working_directory, rebuild

DESCRIPTION = """Finds what is wrong in a data set before training, and says what is in it.

Exit code 0: clean; 1: the loader repairs or leaves out some records; 2: something can't be used.
"""


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = Flags(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="configuration whose data to check, in place of root and format")
    parser.add_argument("--root", type=Path, help="folder of the data set")
    parser.add_argument("--format", choices=("coco", "voc", "yolo"), help="of the annotations (default: found)")
    parser.add_argument("--split", help="the only split to check (default: all)")
    parser.add_argument("--annotations", help="COCO file or VOC folder, relative to the root (default: found)")
    parser.add_argument("--images", help="folder of images, relative to the root (default: found)")
    parser.add_argument("--min-size", type=int, help="shorter side after resizing (default: 800)")
    parser.add_argument("--max-size", type=int, help="limit of the longer side (default: 1333)")
    parser.add_argument("--anchor-sizes", type=float, nargs="+", default=[32, 64, 128, 256, 512], help="one a level")
    parser.add_argument("--anchor-ratios", type=float, nargs="+", default=[0.5, 1, 2], help="height / width")
    parser.add_argument("--strides", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="one a level")
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    parser.add_argument("--sheet", type=Path, help="write a picture sheet of samples with boxes to this file")
    args = parser.parse_args()
    if not args.config and not args.root:
        parser.error("name the data: --root, or --config")
    if len(args.anchor_sizes) != len(args.strides):
        parser.error("--anchor-sizes and --strides need one number a level each")
    try:
        shown = (800, 1333)
        if args.config:
            data = data_of(args.config)
            splits, shown = splits_of(data), sizes_of(data)
        else:
            splits = find_splits(args.root, args.format, args.annotations, args.images, args.split)
        sizes = tuple((size,) for size in args.anchor_sizes)
        sides = (args.min_size or shown[0], args.max_size or shown[1])
        grid = Grid(sizes, tuple(args.strides), tuple(args.anchor_ratios), *sides)
        audits = [audit(name, read, grid) for name, read in splits.items()]
        look_across(audits)
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


def data_of(path: Path) -> DetectionDataModule:
    """The data module of a configuration's `data` section, as training would make it.

    Raises:
        DataError: the file or its section can't be read; the message names the key.
    """
    import_from_working_directory()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DetectionDataModule, "data", instantiate=False)
    try:
        content = yaml.safe_load(path.read_text())
        section = content.get("data") if isinstance(content, dict) else None
        settings = parser.parse_object({"data": section or {}}).data.as_dict()
        return DetectionDataModule(**rebuild(settings, trust=(EVERYTHING,)))  # the user wrote it
    except (OSError, yaml.YAMLError, ArgumentError, ValueError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from error


def splits_of(data: DetectionDataModule) -> dict[str, Callable[[], Index]]:
    """What there is to check: a function that reads each split, in the classes of the training split."""
    data.prepare_data()

    def read(split: Stage) -> Index:
        _ = data.class_names  # which the training split names for all
        index = data.read(split)
        check_split(index, split)
        return index

    named = [split for split in get_args(Stage) if split != "test" or data.hparams["test_split"]]
    return {split: partial(read, split) for split in named}


def sizes_of(data: DetectionDataModule) -> tuple[int, int]:
    """Short side and longest side in pixels at which the data is evaluated."""
    sides = data.hparams["min_size"]
    return sides if isinstance(sides, int) else max(sides), data.hparams["max_size"]
