"""Settings of the data that can't be, or not together: each named in a sentence before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHANCES = ("hflip", "vflip", "photometric", "mosaic", "copy_paste")
SHARES = ("min_visibility", "repeat_threshold", "tile_visibility", "empty_tiles")
COUNTS = ("num_workers", "max_unreadable", "timeout")


def check_settings(given: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first setting which can't be.

    Args:
        given: the arguments of `DetectionDataModule` by name.
    """
    format, reader = given["format"], given["reader"]
    if given["root"] is None and (format not in (None, "scenes") or reader is not None):
        kind = f"format '{format}'" if reader is None else "a reader"
        raise ValueError(f"{kind} needs root, the folder of the data set")
    if reader is not None and format not in (None, "scenes"):
        raise ValueError(f"data.reader reads in place of data.format: leave format '{format}' out")
    _check_numbers(given)
    if given["proposals"] and (given["mosaic"] or given["masks"] or given["keypoints"]):
        raise ValueError(
            "proposals go with neither mosaics nor masks nor key points: leave `mosaic`, `masks`, `keypoints` out"
        )
    if given["tile"] is not None and any(given[name] for name in ("proposals", "mosaic", "copy_paste", "keypoints")):
        raise ValueError(
            "tiles go with neither proposals, mosaics, copy_paste nor key points: leave these, or data.tile, out"
        )


def _check_numbers(given: Mapping[str, Any]) -> None:
    batch_size, min_size, max_size = (given[name] for name in ("batch_size", "min_size", "max_size"))
    sizes = [min_size] if isinstance(min_size, int) else min_size
    if batch_size < 1 or max_size < 1 or not sizes or min(sizes) < 1:
        raise ValueError(f"batch_size {batch_size}, min_size {min_size} and max_size {max_size} must be positive")
    for name in (*CHANCES, *SHARES):
        if not 0 <= given[name] <= 1:
            raise ValueError(f"data.{name} is {given[name]}: it must be from 0 to 1")
    for name in COUNTS:
        if given[name] < 0:
            raise ValueError(f"data.{name} is {given[name]}: it must be 0 or more")
    jitter, divisor = given["scale_jitter"], given["size_divisible"]
    if jitter is not None and not 0 < jitter[0] <= jitter[1]:
        raise ValueError(f"data.scale_jitter is {jitter}: give two factors above 0, the smaller first")
    if divisor is not None and (divisor < 32 or divisor % 32):
        raise ValueError(f"size_divisible {divisor} must be a multiple of 32, the coarsest stride")
