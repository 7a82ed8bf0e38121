"""The command `check`: what is wrong in a data set, and what is in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from detection.cli.advice import detector_in, grid_of, next_steps, own_sizes
from detection.cli.configuration import sizes_of
from detection.cli.wording import Flags
from detection.data.audit import audit, look_across, splits_in, splits_named, write_json
from detection.data.audit_report import picture_sheet, print_audit
from detection.data.datamodule import DetectionDataModule
from detection.data.finding import Stage, find
from detection.data.reading import check_records
from detection.data.records import DataError, Index
from detection.data.spectral import PixelFormat
from detection.recipes import rebuild
from detection.trust import EVERYTHING, import_from_working_directory

DESCRIPTION = """Finds what is wrong in a data set before training, and says what is in it.

Exit code 0: clean; 1: the loader repairs or leaves out some records; 2: something can't be used.
"""


def main(flags: Sequence[str]) -> int:
    """Run the command with its flags; returns the exit code."""
    parser = Flags("detection check", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="configuration to check, its data and anchors")
    parser.add_argument("--root", type=Path, help="folder of the data set; with --config in place of its data")
    parser.add_argument("--format", choices=("coco", "voc", "yolo"), help="of the annotations (default: found)")
    parser.add_argument("--split", help="the only split to check (default: all)")
    parser.add_argument("--annotations", help="COCO file or VOC folder, relative to the root (default: found)")
    parser.add_argument("--images", help="folder of images, relative to the root (default: found)")
    parser.add_argument("--channels", type=int, default=3, help="of the images (default: 3, as RGB)")
    parser.add_argument("--depth", type=int, choices=(8, 16), default=8, help="bits of a channel (default: 8)")
    parser.add_argument(
        "--min-size",
        type=int,
        help="shorter side after resizing (default: that of training)",
    )
    parser.add_argument("--max-size", type=int, help="limit of the longer side (default: that of training)")
    parser.add_argument("--anchor-sizes", type=float, nargs="+", help="one a level (default: the configuration's)")
    parser.add_argument("--anchor-ratios", type=float, nargs="+", help="height / width")
    parser.add_argument("--strides", type=int, nargs="+", help="one a level (default: the detector's)")
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    parser.add_argument("--sheet", type=Path, help="write a picture sheet of samples with boxes to this file")
    args = parser.parse_args(flags)
    if not args.config and not args.root:
        parser.error("name the data: --root, or --config")
    try:
        shown, form, options = own_sizes(), PixelFormat(args.channels, args.depth), {}
        if args.config and not args.root:
            data = data_of(args.config)
            splits, shown, form = splits_of(data), sizes_of(data), data.form
            options = {"as_tiles": data.as_tiles}
        elif args.annotations or args.images:
            splits = splits_named(args.root, args.format, args.annotations, args.images, args.split)
        else:
            layout = find(args.root, args.format)
            print(f"{layout.root}: {layout}")
            for other in layout.others:
                print(f"  also there, not read: {other}; --format or another --root chooses it")
            if layout.stage("train") and not layout.stage("val"):
                print("  no validation split: training sets a fifth of the images aside (data.val_fraction)")
            splits = splits_in(layout, args.split)
        sides = (args.min_size or shown[0], args.max_size or shown[1])
        grid = grid_of(args.config, sides, args.anchor_sizes, args.anchor_ratios, args.strides)
        audits = [audit(name, read, grid, form, **options) for name, read in splits.items()]
        look_across(audits)
        for found in audits:
            print_audit(found, Console())
            if found.tiles and found.name == "train":
                print(f"{found.name}: {found.tiles}")
        if args.json:
            write_json(audits, args.json)
        if args.sheet:
            picture_sheet(audits, args.sheet)
        asked = {"format": args.format, "train_split": args.annotations or args.split, "train_images": args.images}
        asked |= {"min_size": args.min_size, "max_size": args.max_size}
        print(next_steps(audits, args.root, args.config, asked, detector_in(args.config).get("class_path")))
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
        check_records(index, split)  # `audit` judges the split as a whole, with the rest
        return index

    named = [split for split in get_args(Stage) if split != "test" or data.hparams["test_split"]]
    return {split: partial(read, split) for split in named}
