"""Where weights come from, a file or torchvision's cache, and fitting them to a model. Nothing is downloaded here.

Files are read without unpickling objects (`weights_only`), or from safetensors.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from detection.trust import RecipeError
from detection.unopened import NO_RUN, why_unopened

log = logging.getLogger(__name__)

# A name such as "DEFAULT" or "IMAGENET1K_V1", torchvision's own enumeration member, a path, or None for none.
Weights: TypeAlias = str | Path | WeightsEnum | None

FACTS = "detection"  # the entry of a safetensors file's metadata that holds all but the tensors, as JSON
FROZEN_EPS = 1e-5  # of FrozenBatchNorm2d
BACKGROUND = ("__background__", "no person")  # as torchvision's lists of categories call it
OLD_NAMES = (  # what torchvision called its tensors before version 0.13; it upgrades such files in loading, too
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    *((rf"^roi_heads\.mask_head\.mask_fcn{i + 1}\.(weight|bias)$", rf"roi_heads.mask_head.{i}.0.\1") for i in range(4)),
)
WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DataParallel and AveragedModel, torch.compile, a LightningModule

NO_RECIPE = "it does not say how to build its detector: build that as in training, and give it the tensors"
NO_NAMES = (
    "does not name its classes: write it with `detection convert import --class_names`, or with "
    "save_detector(..., class_names)"
)


class CheckpointError(ValueError):
    """A file of weights that can't be used; the message names the file or the tensor, and the way out."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file of weights holds.

    Attributes:
        tensors: under this project's (torchvision's) names.
        recipe: how to rebuild the detector; see `detection.recipes`. None in files that others wrote.
        class_names: of the foreground, label 1 first, if the file says so.
        category_ids: of the data set, one for each class name, likewise.
        sizes: `min_size` and `max_size` of the data that a run was trained on.
        origins: of a converted file, where each fact is from: `tensors`, `config` or `default`.
        edges: positions of key points that pictures join by a line, where a run's data says so.
        tiles: side in pixels and overlap of the tiles that a run was trained on, if it was.
    """

    tensors: dict[str, Tensor]
    recipe: dict[str, Any] | None = None
    class_names: list[str] | None = None
    category_ids: list[int] | None = None
    sizes: tuple[Any, int] | None = None
    origins: dict[str, str] | None = None
    edges: list[tuple[int, int]] | None = None
    tiles: tuple[int, float] | None = None


def is_given(weights: Weights) -> bool:
    """Whether weights are wanted at all; "none" says no on a command line."""
    return weights is not None and str(weights).lower() != "none"


def find_weights(weights: Weights, names: type[WeightsEnum] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, or of a named set of weights in torch.hub's cache.

    Args:
        weights: what to load.
        names: torchvision's enumeration of the names that may be given; None when only a file will do.

    Raises:
        ValueError: a name that isn't one of `names`, or a file that can't be read.
        FileNotFoundError: nothing there; the message says where it looked and how to supply the file.
    """
    return read_saved(_locate(weights, names)).tensors


def find_class_names(weights: Weights, names: type[WeightsEnum] | None = None) -> list[str] | None:
    """Names of the foreground classes that weights were trained for, label 1 first; None if they don't say.

    Arguments and errors as for `find_weights`. torchvision's COCO names have `N/A` in the gaps of the category ids. A
    file that torchvision publishes says nothing, but is known by its name, which has a checksum in it.
    """
    named = _named(weights, names) or _published(weights, names)
    if named is not None:
        categories: list[str] | None = named.meta.get("categories")
        return categories[1:] if categories and categories[0] in BACKGROUND else None
    return read_saved(_locate(weights, names)).class_names


def cache_path(weights: WeightsEnum) -> Path:
    """Where torchvision keeps a named set of weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name


def _named(weights: Weights, names: type[WeightsEnum] | None) -> WeightsEnum | None:
    if isinstance(weights, str) and names is not None and weights in (*names.__members__, "DEFAULT"):
        return names[weights]
    return weights if isinstance(weights, WeightsEnum) else None


def _published(weights: Weights, names: type[WeightsEnum] | None) -> WeightsEnum | None:
    members = names.__members__.values() if names is not None and isinstance(weights, str | Path) else ()
    return next((named for named in members if Path(str(weights)).name == Path(named.url).name), None)


def _locate(weights: Weights, names: type[WeightsEnum] | None) -> Path:
    named = _named(weights, names)
    path = Path(str(weights)) if named is None else cache_path(named)
    if path.is_file():
        return path
    if named is None:
        choices = f"one of {', '.join(names.__members__)}, DEFAULT, or " if names is not None else ""
        raise FileNotFoundError(f"no weights at {path}: give {choices}the path of a .pth or .safetensors file")
    raise FileNotFoundError(
        f"the weights {named} are not at {path} and nothing is downloaded unasked: run `detection convert download "
        f"--weights {named}`; or fetch {named.url} on a machine with access and put the file there, or give its path "
        "instead of the name"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state_dict in a `.safetensors` file, or in a PyTorch file that holds plain values only."""
    return read_saved(path).tensors


def read_saved(path: Path) -> Saved:
    """Read a `.safetensors` file, a `.pth` file of a state_dict (bare, or under `model`), or a run's `.ckpt`.

    Raises:
        CheckpointError: damaged, or with more in it than tensors and plain values.
    """
    if path.suffix == ".safetensors":
        tensors, facts = read_safetensors(path)
        names = ("recipe", "class_names", "category_ids", "origins", "tiles")
        known = {name: facts.get(name) for name in names}
        return Saved(tensors if known["recipe"] else upgrade_names(tensors), **known)
    content = read_torch(path)
    settings = content.get("hyper_parameters", {})
    tensors = find_state(content, path)
    own = {name.removeprefix("detector."): value for name, value in tensors.items() if name.startswith("detector.")}
    data = content.get("datamodule_hyper_parameters") or {}
    sizes = (data["min_size"], data["max_size"]) if {"min_size", "max_size"} <= data.keys() else None
    tiles = (data["tile"], data["tile_overlap"]) if data.get("tile") else None
    known = {"sizes": sizes, "edges": (content.get("skeleton") or {}).get("edges"), "tiles": tiles}
    recipe, found = settings.get("detector"), own or tensors
    return Saved(found if recipe else upgrade_names(found), recipe, settings.get("class_names"), **known)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a `.safetensors` file, and what this project has written into its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get(FACTS, "{}"))
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole .safetensors file ({error}); fetch or write it again") from error
    return tensors if facts else unwrapped(tensors), facts


def read_torch(path: Path) -> dict[str, Any]:
    """What `torch.save` has written, as long as it is tensors and plain values: nothing else is unpickled."""
    with readable(path), torch.serialization.safe_globals([(_Flags, "argparse.Namespace")]):
        check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a state_dict; save model.state_dict()")
    return {name: value for name, value in content.items() if not isinstance(value, _Flags)}


class _Flags:
    """In the place of the `argparse.Namespace` that training scripts, such as torchvision's, save: it takes nothing."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None: ...


def check_sums(path: Any) -> None:
    """Compare a PyTorch file with the checksums in it, as PyTorch does not: a wrong byte would be a wrong weight."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise CheckpointError(f"{path}: damaged in {name}; fetch or write it again")


@contextmanager
def readable(path: Any) -> Iterator[None]:
    """Whatever goes wrong inside, with a PyTorch file that may be damaged, foreign or hostile, is a CheckpointError."""
    try:
        if str(path).endswith(".safetensors") and Path(path).is_file():
            raise CheckpointError(NO_RUN)
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}") from None
    except (CheckpointError, RecipeError) as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except Exception as error:  # a damaged or foreign file may raise anything
        raise CheckpointError(f"{path}: {why_unopened(path, error)}") from error


def find_state(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The state_dict in the content of a file: the content itself, or what stands under the usual names."""
    for name in ("state_dict", "model", "model_state_dict"):
        if isinstance(content.get(name), Mapping):
            if "model_ema" in content:
                _say(f"{path} holds {name} and model_ema, an average of it: {name} is taken")
            content = content[name]
    state = unwrapped(content)
    others = [name for name, value in state.items() if not isinstance(value, Tensor) and not hasattr(value, "dtype")]
    if others or not state:
        found = f"{others[0]} is no tensor" if others else "it is empty"
        raise CheckpointError(f"{path}: no state_dict in it: {found}; save model.state_dict()")
    return state


@cache
def _say(text: str) -> None:
    """In the log, once however often a file is read."""
    log.warning(text)


def unwrapped(state: Mapping[Any, Any]) -> dict[str, Any]:
    """The same under the names of the detector itself: without the prefixes that wrappers put before every name.

    The count that an `AveragedModel` has beside them, `n_averaged`, is left out.
    """
    own = {str(n): value for n, value in state.items() if n != "n_averaged" or getattr(value, "ndim", 0) > 0}
    prefix = next((p for p in WRAPPERS if own and all(name.startswith(p) for name in own)), None)
    return own if prefix is None else unwrapped({name.removeprefix(prefix): value for name, value in own.items()})


def upgrade_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with today's names for those that bear the ones of older torchvision files."""
    upgraded = dict(state)
    for pattern, replacement in OLD_NAMES:
        upgraded = {re.sub(pattern, replacement, name): value for name, value in upgraded.items()}
    return upgraded


def fold_epsilon(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for frozen normalisation without epsilon, as torchvision's COCO_V1 of ResNet-50, for one with `1e-5`.

    The epsilon is taken off the variances. Where so little would be left that rounding eats it, the weight takes the
    difference, so that the output stays the same either way.
    """
    folded = dict(state)
    for name in _frozen_variances(state):
        variance, weight = state[name].double(), name.replace("running_var", "weight")
        tiny = variance < 0.1 * FROZEN_EPS
        change = torch.where(tiny & (variance > 0), (FROZEN_EPS / variance).sqrt(), 1.0)
        folded[weight] = (state[weight].double() * change).to(state[weight].dtype)
        folded[name] = torch.where(tiny, 0.0, variance - FROZEN_EPS).to(state[name].dtype)
    return folded


def unfold_epsilon(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: weights for frozen normalisation with epsilon `1e-5`, for one without."""
    variances = {n: (state[n].double() + FROZEN_EPS).to(state[n].dtype) for n in _frozen_variances(state)}
    return dict(state) | variances


def widen(backbone: nn.Module, in_channels: int, image_mean: Sequence[float], image_std: Sequence[float]) -> nn.Module:
    """Let a backbone's first convolution, made for RGB, take images of so many channels, in place.

    The kernels of red, green and blue are repeated in turn, scaled so that the sum stays; for one channel they are
    added (timm's `adapt_input_conv`). What was changed trains, even where the stem is frozen.

    Args:
        backbone: of any kind; one that takes these channels already stays as it is.
        in_channels: of the images.
        image_mean, image_std: must have as many values.

    Raises:
        ValueError: they don't, or there is no such convolution.
    """
    if not len(image_mean) == len(image_std) == in_channels:
        raise ValueError(
            f"images of {in_channels} channels need as many values of image_mean and image_std, not {len(image_mean)} "
            f"and {len(image_std)}; `detection check` prints those of your images"
        )
    if in_channels != 3:
        stem = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
        if stem is None or stem.in_channels not in (3, in_channels):
            raise ValueError(
                f"{type(backbone).__name__} has no first convolution that could take {in_channels} channels"
            )
        if stem.in_channels == 3:
            stem.weight = nn.Parameter(adapt_input_conv(in_channels, stem.weight.detach()))
            stem.in_channels = in_channels
    return backbone


def fit_stem(state: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a detector of RGB for one of other channels, which `widen` has made; `fresh` is its `state_dict()`.

    Weights for another number of key points, too, see `fit_keypoints`.
    """
    fitted = fit_keypoints(state, fresh)
    for name, value in state.items():
        slot = fresh.get(name, value)
        if value.ndim == slot.ndim == 4 and value.shape[1] == 3 != slot.shape[1] and value.shape[0] == slot.shape[0]:
            fitted[name] = adapt_input_conv(slot.shape[1], value)
    return fitted


def fit_keypoints(state: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for another number of key points: the last layer of the branch starts afresh, as they are others."""
    layer = "roi_heads.keypoint_predictor.kps_score_lowres"
    names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in state and name in fresh]
    return dict(state) | {name: fresh[name] for name in names if fresh[name].shape != state[name].shape}


def _frozen_variances(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in state if name.startswith("backbone.body.") and name.endswith("running_var")]


def adapt_classes(
    state: Mapping[str, Tensor], fresh: Mapping[str, Tensor], old_names: Sequence[str], new_names: Sequence[str]
) -> dict[str, Tensor]:
    """Weights for other classes: those of the same name, and the background, keep their rows in the last layers.

    Args:
        state: weights of a detector of `old_names`.
        fresh: `state_dict()` of the new model, which gives the rows of classes that `old_names` does not have.
        old_names, new_names: of the foreground, label 1 first. Names count as the same whatever their case.

    Raises:
        CheckpointError: the number of old names isn't that of the classes in `state`.
    """
    old = {name.strip().lower(): label for label, name in reversed(list(enumerate(old_names, start=1)))}
    labels = [0, *(old.get(name.strip().lower()) for name in new_names)]
    return pick_classes(state, fresh, labels, len(old_names) + 1)


def pick_classes(
    state: Mapping[str, Tensor], fresh: Mapping[str, Tensor], labels: Sequence[int | None], num_classes: int
) -> dict[str, Tensor]:
    """Put the rows of other labels into the last layers of classes, boxes and masks.

    Args:
        state: weights of a detector with `num_classes` classes, background included.
        fresh: weights of one with `len(labels)` classes, and maybe another number of key points.
        labels: for each new label the old one; None keeps the rows of `fresh`.
        num_classes: of `state`.
    """
    kept = [(new, old) for new, old in enumerate(labels) if old is not None]
    targets = torch.tensor([new for new, _ in kept])
    sources = torch.tensor([old for _, old in kept])
    adapted = fit_keypoints(state, fresh)
    for name in state:
        rows = class_rows(name) or _rows_of_own(name, state, fresh, num_classes, len(labels))
        if not rows or len(state[name]) == rows == 4:  # one box for all classes
            continue
        if len(state[name]) != rows * num_classes or len(fresh[name]) != rows * len(labels):
            raise CheckpointError(
                f"{name} has {len(state[name])} rows for {num_classes - 1} class names, and {len(fresh[name])} for "
                f"{len(labels) - 1} new ones: there must be {rows} for each and for the background"
            )
        old_rows, new_rows = state[name].unflatten(0, (-1, rows)), fresh[name].detach().clone().unflatten(0, (-1, rows))
        new_rows[targets] = old_rows[sources].to(new_rows)
        adapted[name] = new_rows.flatten(0, 1)
    return adapted


def _rows_of_own(name: str, state: Mapping[str, Any], fresh: Mapping[str, Any], num_classes: int, wanted: int) -> int:
    """As `class_rows`, of a predictor none of whose layers is known by name: by the number of rows, as the log says."""
    home = re.match(r".*predictor[^.]*\.", name)
    if home is None or "keypoint" in name or name not in fresh or not state[name].ndim:
        return 0
    if any(class_rows(other) for other in state if other.startswith(home[0])):  # whose other layers have no classes
        return 0
    counts = len(state[name]), len(fresh[name])
    rows = next((n for n in (1, 4) if counts == (n * num_classes, n * wanted)), 0)
    if rows:
        log.info("%s is taken for the last layer of a predictor, with %d rows for each class", name, rows)
    return rows


def class_rows(name: str) -> int:
    """How many rows each class has in the tensor of this name; 0 where there are none by class."""
    if not name.startswith("roi_heads.") or not name.endswith((".weight", ".bias")):
        return 0
    return {"cls_score": 1, "bbox_pred": 4, "mask_fcn_logits": 1, "iou_score": 1}.get(name.split(".")[-2], 0)
