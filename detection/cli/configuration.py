"""From the command line and its YAML to the arguments of model and data: completed, checked, fitted to the data."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from inspect import isclass, signature
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from detection.cli.fit_help import CONFIGS, PRESETS
from detection.cli.flags import take_trust
from detection.cli.folder import CONFIG
from detection.data.anchor_fit import generator_for
from detection.data.channels import measure_channels
from detection.data.datamodule import DetectionDataModule
from detection.data.spectral import RGB
from detection.models import relatives, zoo
from detection.recipes import WEIGHTS, named_in, rebuild
from detection.training.checkpoints import LAST, progress
from detection.trust import A_RUN, EVERYTHING, RecipeError, find, import_path, trusted_names
from detection.upgrades import upgrade

QUICKSTART, OWN_DATA = "quickstart", "own_data"
AUTO = "auto"  # of `rpn_anchor_generator`: anchors that fit the data
# Whose classes the configuration in a run's folder may name: it may have come with somebody's checkpoint.
KNOWN = (
    *("detection", "lightning.pytorch", "lightning.fabric", "torch.nn", "torch.optim", "torchmetrics"),
    *("torchvision.models", "torchvision.ops", "albumentations", "timm"),
)


class Given(NamedTuple):
    """A completed command line.

    Attributes:
        args: for the parser.
        resumed: the configuration in the folder of the run that goes on, if it is used.
        trust: in whose parts, see `rebuild`: everybody's, but in the configuration of a run those that are named.
    """

    args: list[str]
    resumed: Path | None = None
    trust: tuple[str, ...] = (EVERYTHING,)


def expand(args: Sequence[str]) -> list[str]:
    """The arguments that `complete` gives."""
    return complete(args).args


def complete(args: Sequence[str]) -> Given:
    """Write out in full what may be short, and choose a configuration where none is given.

    Short are the name of a packaged configuration (`bccd` for its file) and of a builder (without its module). A
    command line without `--config`, or with presets alone, uses the configuration of the run that it resumes, or whose
    weights it takes. Else it uses the quickstart, or with `--data.root` the settings for own data, but not their
    detector where it names another. What the configuration of a run names is checked, as it may be somebody else's.

    Raises:
        ValueError: the checkpoint to resume, which has no configuration beside it, is damaged.
        RecipeError: the run to resume has no configuration; or it names a part of a package that is not trusted, or
            that can't be imported.
    """
    args, trust = take_trust(args)
    trust = list(trusted_names(trust))
    expanded, own, previous, default = list[str](), list[str](), "", CONFIGS / f"{QUICKSTART}.yaml"
    configs, chosen, unknown = list[Path](), False, None
    for arg in args:
        flag, equals, value = arg.partition("=") if arg.startswith("-") else (previous, "", arg)
        if flag in ("-c", "--config") and value:
            packaged = (folder / f"{value}.yaml" for folder in (CONFIGS, PRESETS) if not Path(value).is_file())
            value = str(next((path for path in packaged if path.is_file()), value))
            configs.append(Path(value))
        home = next((module for module in (zoo, relatives) if value in vars(module)), None)
        if flag in ("--model.detector", "--model.detector.class_path"):
            chosen = chosen or bool(value)
            value = f"{home.__name__}.{value}" if home is not None else value
        expanded.append(f"{flag}{equals}{value}" if arg.startswith("-") else value)
        if flag.startswith(("--trainer.", "--model.", "--data.proposals", "--data.reader", "--data.augmentations")):
            own.append(value)
        previous = arg
        if flag in ("--data.root", "--data.reader") and value and default.stem == QUICKSTART:
            default = CONFIGS / f"{OWN_DATA}.yaml"
        if flag in ("--resume", "--weights") and value and Path(value).exists():
            run = Path(value) if Path(value).is_dir() else Path(value).parent
            if (run / CONFIG).is_file():
                default = run / CONFIG
            elif flag == "--resume":
                unknown = Path(value)
    if unknown is not None and all(path.parent == PRESETS for path in configs):
        _refuse_without_settings(unknown)
    expanded = _configs_first(expanded)
    if not all(path.parent == PRESETS for path in configs):
        return Given(expanded, None, (EVERYTHING, *trust))
    if default.parent == CONFIGS:
        config = _without_detector(default) if chosen else str(default)
        return Given(["--config", config, *expanded], None, (EVERYTHING, *trust))
    expanded = ["--config", str(default), *expanded]
    trusted = name_only_known(own, trust)
    check_parts(default, (A_RUN, *trusted))
    return Given(expanded, default, (A_RUN, *trusted))


def _refuse_without_settings(resume: Path) -> NoReturn:
    """Say what is wrong with the checkpoint, or else with its folder, which has no configuration."""
    if resume.is_file():
        progress(resume)
    run = resume if resume.is_dir() else resume.parent
    if runs := sorted(path.parent for path in run.glob(f"*/{LAST}")):
        raise RecipeError(f"{run} has no {CONFIG}; name one of its runs, such as --resume {runs[-1]}")
    raise RecipeError(
        f"{run} has no {CONFIG}, so the settings of its run are not known: give --config with them, or begin another "
        f"run with its weights, with --weights {resume}"
    )


def _configs_first(args: Sequence[str]) -> list[str]:
    """The arguments with configurations before all others, which override them wherever they stand."""
    configs, others, taking = list[str](), list[str](), False
    for arg in args:
        taken = taking or arg in ("-c", "--config") or arg.startswith(("-c=", "--config="))
        (configs if taken else others).append(arg)
        taking = not taking and arg in ("-c", "--config")
    return [*configs, *others]


def name_only_known(own: Iterable[str], trust: Iterable[str] = ()) -> tuple[str, ...]:
    """From now on configurations of this process name nothing but parts of `KNOWN` packages and what the user named.

    Args:
        own: values that the user has typed where classes are expected: the packages they name are trusted.
        trust: further packages that the user has named.

    Returns:
        the packages trusted, for `rebuild`.
    """
    words = [name for argument in own for name in re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", argument)]
    typed = {name.partition(".")[0] for name in words} - {"jsonargparse", "detection", "torch"}
    typed -= sys.stdlib_module_names
    trusted = tuple(sorted(typed | set(trusted_names(trust))))
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*KNOWN, *trusted])
    return trusted


def _without_detector(config: Path) -> str:
    """The text of a configuration for another detector, whose own defaults are better than settings for this one."""
    content = yaml.safe_load(config.read_text())
    del content["model"]["detector"]
    return yaml.safe_dump(content, default_flow_style=True, width=10**6)


def check_parts(config: Path, trust: Sequence[str]) -> None:
    """Refuse a configuration whose model or data name what may not be named or is not there: a RecipeError.

    A configuration that can't be read is left to the parser.
    """
    try:
        content = yaml.safe_load(config.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return
    sections = content if isinstance(content, dict) else {}
    try:
        for path in named_in([sections.get("model"), sections.get("data")]):
            find(path, trust)
    except RecipeError as error:
        raise RecipeError(f"{config}: {error}") from error


def plain(value: Any, trust: Sequence[str] = (EVERYTHING,)) -> Any:
    """What jsonargparse has parsed, as a recipe: a dictionary or list, and text for a path, as a checkpoint keeps them.

    Args:
        value: of an argument.
        trust: in whom, see `rebuild`.
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item, trust) for item in value]
    if not isinstance(value, Namespace | dict):
        return value
    items = (vars(value) if isinstance(value, Namespace) else value).items()
    entries = {name: plain(item, trust) for name, item in items}
    if "class_path" not in entries:
        return entries
    path, given = entries["class_path"], entries.get("init_args") or {}
    given |= entries.get("dict_kwargs") or {}
    # Where a hint says nothing, jsonargparse gives None for arguments that are left to the builder.
    wanted = {name for name, p in signature(find(path, trust)).parameters.items() if p.default is p.empty}
    return {"class_path": path, "init_args": {k: v for k, v in given.items() if v is not None or k not in wanted}}


def fit_detector_to_data(detector: Namespace, data: DetectionDataModule) -> None:
    """Fill in the arguments of a detector that follow from the data, where they have the builder's own defaults."""
    sizes = data.hparams["min_size"]
    follow: dict[str, Any] = {
        "num_classes": len(data.class_names) + 1,
        "min_size": sizes if isinstance(sizes, int) else sorted(sizes),
        "max_size": data.hparams["max_size"],
    }
    if data.form != RGB:
        follow |= {"in_channels": data.form.channels, "image_depth": data.form.depth}
        follow["image_mean"], follow["image_std"] = measure_channels(data.read("train"), data.form)
    if data.hparams["keypoints"] and (skeleton := data.read("train").skeleton) is not None:
        follow["num_keypoints"] = len(skeleton)
    if any(detector.init_args.get(name) for name in ("weights", "path")):
        follow["class_names"] = data.class_names  # to keep what the weights know of classes of the same name
    known = defaults(detector.class_path)
    for name, value in follow.items():
        if name in detector.init_args and plain(detector.init_args[name]) == plain(known.get(name)):
            detector.init_args[name] = value


def fit_anchors_to_data(
    detector: Namespace, data: DetectionDataModule, kept: Mapping[str, Any], trust: Sequence[str] = (EVERYTHING,)
) -> None:
    """Put anchors in the place of `rpn_anchor_generator: auto`: those of the training data, or of a run that goes on.

    Args:
        detector: the arguments of a detector, its sizes of images among them.
        data: whose training split is read, if anchors have to be found.
        kept: the recipe of the detector in the checkpoint of the run; empty for a new one.
        trust: in whom, see `rebuild`.
    """
    if detector.init_args.get("rpn_anchor_generator") != AUTO:
        return
    found = (kept.get("init_args") or {}).get("rpn_anchor_generator")
    if found is None:
        strides = strides_of(plain(detector, trust), trust)
        found = generator_for(data.as_tiles(data.read("train"))[0], strides, *sizes_of(data)).recipe
    detector.init_args["rpn_anchor_generator"] = found


def keep_mask_grid(detector: Namespace, kept: Mapping[str, Any]) -> None:
    """Let a run that goes on keep its `mask_grid`, which settings of before there was a choice do not name.

    Args:
        detector, kept: see `fit_anchors_to_data`.
    """
    if kept and "mask_grid" in detector.init_args and detector.init_args.mask_grid is None:
        detector.init_args.mask_grid = upgrade(kept["class_path"], dict(kept["init_args"]))[1].get("mask_grid")


def strides_of(detector: Mapping[str, Any], trust: Sequence[str] = (EVERYTHING,)) -> tuple[int, ...]:
    """Pixels between neighbouring cells of each map of a detector, of which one without weights is built to see.

    Args:
        detector: its recipe.
        trust: in whom, see `rebuild`.
    """
    known = vars(defaults(detector["class_path"]))
    without = {name: None for name in (*WEIGHTS, "rpn_anchor_generator", "rpn_head") if name in known}
    with torch.random.fork_rng():
        made = rebuild({**detector, "init_args": {**(detector.get("init_args") or {}), **without}}, trust)
    return tuple(made.strides)


def sizes_of(data: DetectionDataModule) -> tuple[int, int]:
    """Short side and longest side in pixels at which the data is evaluated."""
    sides = data.hparams["min_size"]
    return sides if isinstance(sides, int) else max(sides), data.hparams["max_size"]


def defaults(class_path: str) -> Namespace:
    """The arguments of a class or a builder, those that it hands on included, and their defaults."""
    maker = import_path(class_path)
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isclass(maker) else parser.add_function_arguments
    add(maker, fail_untyped=False)
    return parser.get_defaults()
