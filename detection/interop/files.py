"""Detectors in files: a `.safetensors` file that says how to build what its tensors are for, and other libraries'."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import save_file

from detection.data.voc import VOC_CLASSES
from detection.drift import present_recipe
from detection.interop import (
    detectron2,
    detectron2_config,
    mmdetection,
    mmdetection_config,
    rows,
    torchvision,
)
from detection.interop.foreign import PIXELS, read_foreign
from detection.interop.names import load, state_of
from detection.interop.semantics import Library as Rules
from detection.interop.told import CONFIG, DEFAULT, TENSORS, Told, origins_of
from detection.models.two_stage import FasterRCNN
from detection.pretrained import fit_classes
from detection.recipes import blame, rebuild
from detection.trust import RecipeError, trusting
from detection.weights import (
    FACTS,
    NO_NAMES,
    NO_RECIPE,
    CheckpointError,
    Saved,
    adapt_classes,
    read_saved,
)

StyleName = Literal["pytorch", "caffe"]
Library = Literal["torchvision", "detectron2"]


def load_detector(path: str | Path, trust: Iterable[str] = ()) -> FasterRCNN:
    """The detector of a file that `save_detector` or a run has written, in evaluation mode; no settings are needed.

    Args:
        path: of the file.
        trust: packages whose parts it may use besides this one's.

    Raises:
        CheckpointError: the file doesn't say how to build it, names parts of a package that is not trusted, or its
            tensors don't fit.
        FileNotFoundError: there is none.
    """
    saved = _read_own(Path(path))
    model = _rebuild(Path(path), saved.recipe, trust)
    if saved.sizes is not None:  # that of its data, which an older run's recipe may not know
        take_sizes(model, *saved.sizes)
    _named(Path(path), lambda: load(model, saved.tensors))
    return model.eval()


def detector_for_classes(
    path: str | Path, class_names: Sequence[str] | None = None, num_keypoints: int | None = None
) -> FasterRCNN:
    """A detector to train further on other classes; those of the same name keep what was learned of them.

    Args:
        path: as for `load_detector`; packages other than this one are trusted with `detection.trust.trusting`, on
            the command line with `--trust`.
        class_names: of the foreground, label 1 first; None for those of the file. On the command line, the data's.
        num_keypoints: of each object, likewise; where there are others than in the file, the last layer of their branch
            starts afresh.

    Raises:
        CheckpointError: also where the file does not name its classes, or its detector finds no key points.
    """
    saved = _read_own(Path(path))
    if saved.recipe is None or saved.class_names is None:
        raise CheckpointError(f"{path}: {NO_NAMES}")
    class_names = saved.class_names if class_names is None else class_names
    arguments = {**saved.recipe["init_args"], "num_classes": len(class_names) + 1}
    if num_keypoints is not None:
        if arguments.get("num_keypoints", 0) == 0:
            raise CheckpointError(f"{path}: its detector finds no key points: begin with one that does")
        arguments["num_keypoints"] = num_keypoints
    model = _rebuild(Path(path), {**saved.recipe, "init_args": arguments})
    old_names = saved.class_names
    _named(Path(path), lambda: load(model, adapt_classes(saved.tensors, model.state_dict(), old_names, class_names)))
    return model


def take_sizes(model: FasterRCNN, min_size: int | Sequence[int], max_size: int) -> bool:
    """Let a detector resize as the data it is trained and evaluated on; whether it did so otherwise.

    Args:
        model: whose transform gets the sizes.
        min_size, max_size: see `DetectionDataModule`.
    """
    sides, transform = (min_size,) if isinstance(min_size, int) else tuple(sorted(min_size)), model.transform
    if (transform.min_size[-1], transform.max_size) == (sides[-1], max_size):
        return False
    transform.min_size, transform.max_size = sides, max_size
    return True


def take_weights(model: FasterRCNN, path: str | Path, class_names: Sequence[str]) -> None:
    """Begin with the weights of a file; classes of the same name keep what was learned of them, others begin anew.

    For a file that does not name its classes see `fit_classes`.

    Args:
        model: gets them.
        path: `.ckpt` of a run, `.safetensors` or `.pth`.
        class_names: of the model's foreground, label 1 first.

    Raises:
        CheckpointError: they are those of another detector.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    saved = read_saved(path)

    def take() -> None:
        load(model, fit_classes(saved.tensors, model.state_dict(), saved.class_names, class_names, path))

    _named(path, take)


def save_detector(
    path: str | Path,
    model: FasterRCNN,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    origins: Mapping[str, str] | None = None,
    tiles: Sequence[float] | None = None,
) -> None:
    """Write a detector as `.safetensors`: its tensors, how to build it, and what its labels mean.

    Args:
        path: of the file.
        model: from one of the builders.
        class_names: of the foreground, label 1 first.
        category_ids: of the data set, likewise.
        origins: of a converted detector, see `Saved`.
        tiles: that it was trained on, likewise.

    Raises:
        CheckpointError: the model has parts, or was changed in a way, that no recipe describes; or another number of
            classes.
    """
    if model.recipe is None:
        lost = ", ".join(f"{name}: {kind}" for name, kind in blame(model, "detector").items())
        raise CheckpointError(
            f"a file can't tell how to build this detector again, as no recipe describes {lost}: decorate its class "
            "with detection.recorded"
        )
    for what, given in (("class names", class_names), ("category ids", category_ids)):
        if given is not None and len(given) != model.num_classes - 1:
            raise CheckpointError(f"{len(given)} {what} are given for {model.num_classes - 1} classes")
    try:
        recipe = present_recipe(model)
    except RecipeError as error:
        raise CheckpointError(str(error)) from error
    facts: dict[str, Any] = {
        "recipe": recipe,
        "class_names": list(class_names) if class_names is not None else None,
        "category_ids": list(category_ids) if category_ids is not None else None,
    }
    if origins is not None:
        facts["origins"] = dict(origins)
    if tiles is not None:
        facts["tiles"] = list(tiles)
    tensors = state_of(model)
    metadata = {"format": "pt", FACTS: json.dumps(facts)}
    _write(Path(path), lambda part: save_file(tensors, part, metadata))


def import_detector(
    source: Path,
    style: StyleName | None = None,
    contiguous: bool = False,
    without_epsilon: bool | None = None,
    trust: Iterable[str] = (),
    bgr: bool | None = None,
    stride_in_1x1: bool | None = None,
    config: Path | None = None,
    semantics: Rules | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[FasterRCNN, Saved]:
    """The detector in a file of torchvision, Detectron2 or MMDetection, or in a checkpoint of one of our runs.

    Args:
        source: `.pth`, `.pkl`, `.safetensors` or `.ckpt`.
        style: of a ResNet: `caffe` has its stride in the 1x1 convolutions and sees BGR from 0 to 255. By default what
            the file says, else that of such models in Detectron2's zoo (`detectron2.choose_style`), and for MMDetection
            `pytorch` unless its name has `caffe`.
        contiguous, without_epsilon: see `torchvision.from_torchvision`.
        trust: see `load_detector`.
        bgr, stride_in_1x1: either half of a style by itself, see `rows.Style`.
        config: what the other library calls its configuration, for what tensors can't show: a `.yaml` of Detectron2
            with its bases, a `.py` of MMDetection. Nothing in it is run. By default what a checkpoint of MMDetection
            has of it, and else the library's defaults.
        semantics: whose rules training on follows, see `Semantics`; by default those of the library that wrote it.
        class_names: of the foreground, label 1 first, for a file that does not name them. By default those of the data
            set that has so many classes: COCO, or VOC.

    Returns:
        the detector, and its tensors with recipe, class names, category ids, and where each fact is from.

    Raises:
        CheckpointError: it can't be read, or does not fit, as the class names may; the message names the file.
        FileNotFoundError: there is none.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no checkpoint at {source}")
    with trusting(trust):
        halves: dict[str, Any] = {"bgr": bgr, "stride_in_1x1": stride_in_1x1}
        model, saved, named = _named(
            source, lambda: _import(source, style, halves, contiguous, without_epsilon, config, semantics)
        )
    if class_names is None:
        return model, saved
    return model, _named(source, lambda: _rename(saved, list(class_names), model.num_classes - 1, named))


def _import(
    source: Path,
    style: StyleName | None,
    halves: dict[str, Any],
    contiguous: bool,
    without_epsilon: bool | None,
    config: Path | None,
    semantics: Rules | None,
) -> tuple[FasterRCNN, Saved, bool]:
    """As `import_detector`, and whether the file itself names its classes."""
    state, meta = read_foreign(source)
    names: list[str] | None = None
    facts, said = Told(), style is not None or halves["bgr"] is not None
    if any(name.startswith(detectron2.PREFIXES) for name in state):
        guess = detectron2.choose_style(state, style, **halves)
        said = said or "pixel_mean" in state
        facts = (_follow(config, detectron2_config.read_told) if config else facts).ask(semantics)
        model = detectron2.from_detectron2(state, facts.settle(guess, said), facts)
    elif any(name.startswith(mmdetection.PREFIXES) for name in state):
        told, names = mmdetection.read_meta(meta)
        guess = rows.STYLES[style or told or ("caffe" if "caffe" in source.name else "pytorch")]
        guess = replace(guess, **{name: half for name, half in halves.items() if half is not None})
        if config is not None:
            facts = _follow(config, mmdetection_config.read_file)
        elif mmdetection_config.is_config(text := mmdetection.config_of(meta)):
            facts = mmdetection_config.read_told(text)
        facts = facts.ask(semantics)
        model = mmdetection.from_mmdetection(state, facts.settle(guess, said), facts)
    elif config is not None or semantics is not None:
        what = f"--config {config}" if config else f"--semantics {semantics}"
        raise CheckpointError(f"{what}: only checkpoints of Detectron2 and MMDetection have one")
    elif any(name.startswith("detector.") for name in state):
        saved = read_saved(source)
        return load_detector(source).train(), saved, saved.class_names is not None
    else:
        said = True
        model = torchvision.from_torchvision(state, source.name, None, without_epsilon, contiguous)
    named = names is not None and len(names) == model.num_classes - 1
    if names is None and (model.num_classes, model.num_keypoints) == (2, 17):
        names = ["person"]  # COCO's key points
    names, ids = _classes(model.num_classes, names)
    style_from = CONFIG if facts.style else TENSORS if said else DEFAULT
    origins = origins_of(model.recipe or {}, facts, style_from)
    return model, Saved(model.state_dict(), model.recipe, names, ids, origins=origins), named


def _rename(saved: Saved, given: list[str], count: int, named: bool) -> Saved:
    """The same with the class names that were given, where the file itself has none."""
    if len(given) != count:
        raise CheckpointError(f"{len(given)} class names are given for {count} classes: name each but the background")
    if given == saved.class_names:
        return saved
    if named:
        raise CheckpointError(f"it names its classes, {', '.join(saved.class_names or [])}: give no others")
    return replace(saved, class_names=given, category_ids=list(range(1, count + 1)))


def _follow(config: Path, read: Callable[[Path], Told]) -> Told:
    """What a configuration tells; where something is wrong with it, its name stands before what it is."""
    told: Told = _named(config, lambda: read(config))
    return told


def export_detector(
    source: Path,
    output: Path,
    library: Library,
    category_ids: bool = False,
    without_epsilon: bool = False,
    trust: Iterable[str] = (),
) -> str:
    """Write a detector of ours for another library.

    Args:
        source: as for `load_detector`.
        output: `.pth`, `.safetensors`, or, for Detectron2, `.pkl`. For Detectron2 its configuration is written beside
            it, as `.yaml`.
        library: who shall read it.
        category_ids, without_epsilon: see `torchvision.to_torchvision`.
        trust: see `load_detector`.

    Returns:
        what to do over there to load it.

    Raises:
        CheckpointError: the library has no such detector, or no such kind of file.
    """
    model = load_detector(source, trust)
    content: dict[str, Any]
    metadata: dict[str, str] = {}
    if library == "torchvision":
        content = state = torchvision.to_torchvision(model, without_epsilon, category_ids)
        advice = torchvision.advice(model, state)
    else:
        state = detectron2.to_detectron2(model)
        pixels = {name: value.flatten().tolist() for name, value in detectron2.pixel_statistics(model).items()}
        content, metadata = {"model": state, PIXELS: pixels}, {PIXELS: json.dumps(pixels)}
        settings, config = detectron2.settings_of(model, output), output.with_suffix(".yaml")
        advice = f"Beside it is {config.name}: cfg.merge_from_file({str(config)!r}), then DefaultPredictor(cfg)"
    if output.suffix == ".safetensors":
        _write(output, lambda part: save_file(state, part, metadata | {"format": "pt"}))
    elif output.suffix == ".pth":
        _write(output, lambda part: torch.save(content, part))
    elif output.suffix == ".pkl" and library == "detectron2":
        arrays = {name: value.numpy() for name, value in state.items()}
        named = {"model": arrays, PIXELS: pixels, "__author__": "detection"}
        _write(output, lambda part: part.write_bytes(pickle.dumps(named)))
    else:
        raise CheckpointError(f"{output}: write .pth or .safetensors, or .pkl for Detectron2")
    if library == "detectron2":
        _write(config, lambda part: part.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8"))
    return advice


def _classes(num_classes: int, names: list[str] | None) -> tuple[list[str] | None, list[int] | None]:
    """Names and category ids: as the file says, else those of the data set that has so many classes."""
    count = num_classes - 1
    if count == len(rows.COCO_NAMES) and names in (None, rows.COCO_NAMES):
        return rows.COCO_NAMES, rows.COCO_IDS
    if names is not None and len(names) == count:
        return names, list(range(1, count + 1))
    if count == len(rows.CATEGORIES) - 1:
        return rows.CATEGORIES[1:], list(range(1, count + 1))
    return (list(VOC_CLASSES), list(range(1, count + 1))) if count == len(VOC_CLASSES) else (None, None)


def _read_own(path: Path) -> Saved:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    saved = read_saved(path)
    if saved.recipe is None:
        of_a_run = path.suffix == ".ckpt"
        told = NO_RECIPE if of_a_run else "does not say how to build its detector: convert it with `detection convert`"
        raise CheckpointError(f"{path}: {told}")
    return saved


def _rebuild(path: Path, recipe: Mapping[str, Any] | None, trust: Iterable[str] = ()) -> FasterRCNN:
    try:
        model = rebuild(recipe or {}, trust)
    except RecipeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(model, FasterRCNN):
        raise CheckpointError(f"{path}: its recipe is not that of a detector")
    return model


def _named(path: Path, action: Callable[[], Any]) -> Any:
    """Do something with a file's content, and put the file's name before what is wrong with it."""
    try:
        return action()
    except CheckpointError as error:
        said = str(error)
        raise CheckpointError(said if said.startswith(str(path)) else f"{path}: {said}") from error


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that has its name only when it is whole."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
