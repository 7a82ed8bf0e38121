"""The end of `detection check`: anchors to paste into a configuration, and the command that trains."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from detection.anchors import AnchorGenerator, default_anchors
from detection.cli.configuration import AUTO, CONFIGS, OWN_DATA, strides_of
from detection.data.anchor_fit import Grid
from detection.data.audit import Audit
from detection.data.records import DataError
from detection.data.tree import role_of
from detection.recipes import rebuild
from detection.trust import EVERYTHING

OWN = CONFIGS / f"{OWN_DATA}.yaml"  # what `--data.root` trains with


def read_config(path: Path) -> dict[str, Any]:
    """The content of a configuration; a DataError where it can't be read."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def own_sizes() -> tuple[int, int]:
    """Short and longest side in pixels at which own data is trained where no configuration is named."""
    data = read_config(OWN)["data"]
    return data["min_size"], data["max_size"]


def detector_in(config: Path | None) -> dict[str, Any]:
    """The recipe of the detector of a configuration; without a `class_path` where it names none."""
    model = read_config(config).get("model") if config else None
    detector = model.get("detector") if isinstance(model, dict) else None
    return detector if isinstance(detector, dict) else {"class_path": detector} if detector else {}


def grid_of(
    config: Path | None,
    sides: tuple[int, int],
    sizes: Sequence[float] | None = None,
    ratios: Sequence[float] | None = None,
    strides: Sequence[int] | None = None,
) -> Grid:
    """The anchors to judge: those of the flags, else those of the configuration, else the default ones.

    Args:
        config: a configuration with a detector, or with its anchors alone.
        sides: short and longest side of the images, in pixels.
        sizes, ratios, strides: of the flags; one size and one stride a level.

    Raises:
        DataError: the anchors can't be made, or are not as many as the strides.
    """
    detector = detector_in(config)
    if strides is None and detector.get("class_path"):
        strides = _strides(config, detector)
    given = (detector.get("init_args") or {}).get("rpn_anchor_generator")
    levels = Grid().strides if strides is None else tuple(strides)
    if sizes is not None or ratios is not None:
        generator = AnchorGenerator([[s] for s in sizes or (32, 64, 128, 256, 512)], ratios or (0.5, 1.0, 2.0))
    elif isinstance(given, Mapping):
        try:
            generator = rebuild(given, trust=(EVERYTHING,))  # the user wrote it
        except (ValueError, TypeError) as error:
            raise DataError(f"{config}: {' '.join(str(error).split())}") from error
    else:
        generator = default_anchors(len(levels))
    if not isinstance(generator, AnchorGenerator):
        raise DataError(f"{config}: anchors of a {type(generator).__name__} can't be judged, but AnchorGenerator's")
    return Grid.of(generator, levels, *sides)


def _strides(config: Path | None, detector: Mapping[str, Any]) -> tuple[int, ...]:
    try:
        return strides_of(detector)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise DataError(f"{config}: {' '.join(str(error).split())}") from error


def next_steps(
    audits: Sequence[Audit], root: Path | None, config: Path | None, flags: Mapping[str, Any], detector: str | None
) -> str:
    """What to do now, in words, YAML and a command.

    Args:
        audits: of all splits.
        root: folder of the data set, None where the configuration names it.
        config: the configuration that was checked.
        flags: settings of the data that were asked about, by name; None is left out.
        detector: class path of the configuration's.
    """
    if any(audit.code == 2 for audit in audits):
        return "Next: correct what is broken, and check again."
    parts = ["detection", "fit"]
    parts += ["--config", str(config)] if config else []
    parts += ["--data.root", str(root)] if root else []
    for name, value in flags.items():
        parts += [f"--data.{name}", str(value)] if value is not None else []
    training = next((audit for audit in audits if role_of(audit.name) in ("train", "trainval")), audits[0])
    anchors, lines = training.anchors, list[str]()
    if "proposal" in anchors:
        before, after = (anchors[name]["all"]["recall_0.5"] for name in ("recall", "proposal_recall"))
        block = anchors_yaml(anchors["proposal"], detector or "detection.fasterrcnn_efficientnet_lite0_fpn")
        lines = [f"Anchors that {after:.1%} of the boxes have at IoU .5, and not {before:.1%}:", "", block]
        lines.append("To paste; `rpn_anchor_generator: auto` finds them by itself when training starts.")
        if (detector_in(config or OWN).get("init_args") or {}).get("rpn_anchor_generator") != AUTO:
            parts += ["--model.detector.rpn_anchor_generator", AUTO]
    return "\n".join([*lines, f"Next: {shlex.join(parts)}"])


def anchors_yaml(grid: Mapping[str, Any], detector: str) -> str:
    """The configuration of a detector with these anchors, as `--config` takes it.

    Args:
        grid: a `Grid` as a dictionary.
        detector: class path of its builder.
    """
    arguments: dict[str, Any] = {"sizes": [list(level) for level in grid["sizes"]]}
    arguments["aspect_ratios"] = list(grid["ratios"])
    usual = Grid()
    arguments |= {name: grid[name] for name in ("offset", "round_anchors") if grid[name] != getattr(usual, name)}
    generator = {"class_path": "detection.AnchorGenerator", "init_args": arguments}
    content = {"class_path": detector, "init_args": {"rpn_anchor_generator": generator}}
    return yaml.safe_dump({"model": {"detector": content}}, sort_keys=False, default_flow_style=None)
