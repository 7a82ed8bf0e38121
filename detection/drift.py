"""What was changed on a detector after it was built: brought into its recipe, or refused, but never forgotten.

torchvision's users exchange a head, `model.roi_heads.box_predictor = FastRCNNPredictor(...)`, set a threshold,
`model.roi_heads.score_thresh = 0.3`, or assign a part, `model.rpn.sampler = HardExampleSampler()`. The recipe, by which
files make the detector again, does not see it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from inspect import isfunction, ismethod, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torchvision.models.detection import faster_rcnn, keypoint_rcnn, mask_rcnn

from detection.models.family.keypoints import KeypointPredictor
from detection.models.masks import MaskPredictor
from detection.models.roi_heads import FastRCNNPredictor
from detection.recipes import WEIGHTS, describe, packages_of, rebuild
from detection.trust import PACKAGE, RecipeError

log = logging.getLogger(__name__)

# The argument of our builders that sets what has this path in the detector.
ARGUMENTS = {
    "transform.min_size": "min_size",
    "transform.max_size": "max_size",
    "transform.size_divisible": "size_divisible",
    "transform.resizing": "resizing",
    "rpn.head": "rpn_head",
    "rpn.anchor_generator": "rpn_anchor_generator",
    "rpn.matcher": "rpn_matcher",
    "rpn.sampler": "rpn_sampler",
    "rpn.box_coder": "rpn_box_coder",
    "rpn.objectness_loss": "rpn_objectness_loss",
    "rpn.box_loss": "rpn_box_loss",
    "rpn.nms_thresh": "rpn_nms_thresh",
    "rpn.score_thresh": "rpn_score_thresh",
    "roi_heads.score_thresh": "box_score_thresh",
    "roi_heads.nms_thresh": "box_nms_thresh",
    "roi_heads.detections_per_img": "box_detections_per_img",
    "roi_heads.soft_nms_sigma": "soft_nms_sigma",
    "roi_heads.matcher": "box_matcher",
    "roi_heads.sampler": "box_sampler",
    "roi_heads.box_coder": "box_coder",
    "roi_heads.class_loss": "class_loss",
    "roi_heads.box_loss": "box_loss",
    "roi_heads.mask_loss": "mask_loss",
    "roi_heads.mask_grid": "mask_grid",
    "roi_heads.mask_roi_pool": "mask_roi_pool",
    "roi_heads.box_roi_pool": "box_roi_pool",
    "roi_heads.box_head": "box_head",
    "roi_heads.box_predictor": "box_predictor",
    "roi_heads.mask_head": "mask_head",
    "roi_heads.mask_predictor": "mask_predictor",
    "roi_heads.keypoint_loss": "keypoint_loss",
    "roi_heads.keypoint_roi_pool": "keypoint_roi_pool",
    "roi_heads.keypoint_head": "keypoint_head",
    "roi_heads.keypoint_predictor": "keypoint_predictor",
}
ALIKE = {
    faster_rcnn.FastRCNNPredictor: FastRCNNPredictor,
    mask_rcnn.MaskRCNNPredictor: MaskPredictor,
    keypoint_rcnn.KeypointRCNNPredictor: KeypointPredictor,
}
ROUNDED = 1e-2  # what a detector's way through bfloat16 may leave on a constant
LIBRARIES = (PACKAGE, "builtins", "torch", "torchvision", "timm")
NO_SETTING = ("training", "recipe", "resolved", "unrecorded")


def present_recipe(detector: Any) -> dict[str, Any] | None:
    """The recipe of a detector as it is now, with the changes made since it was built; None where it has no recipe.

    Raises:
        RecipeError: a change that no argument of the builder can describe; it names the first.
    """
    recipe: dict[str, Any] | None = detector.recipe
    if recipe is None:
        return None
    changed = [path for path in _changes(detector, recipe) if not _is_state(detector, path)]
    if not changed:
        return recipe
    followed = copy.deepcopy(recipe)
    for path in changed:
        _follow(followed, path, detector)
    try:
        left = [path for path in _changes(detector, followed) if not _is_state(detector, path, said=True)]
    except (RecipeError, TypeError, ValueError):
        left = changed
    if left:
        raise RecipeError(
            f"{left[0]} was changed after the detector was built, and a file that is written now would make it again "
            "without: give it to the builder"
        )
    return followed


def _is_state(detector: Any, path: str, said: bool = False) -> bool:
    """Whether a path is of what a user's own part keeps beside its arguments, as a count of its calls.

    Nothing tells that from a setting which was changed by hand, so it is logged, unless it was `said`.
    """
    *names, key = path.split(".")
    part: Any = detector
    for name in names:
        part = getattr(part, name, None)
    if not _is_of_users(part) or key not in vars(part) or key in signature(type(part)).parameters:
        return False
    if not said:
        value = vars(part)[key]
        now = value if _is_plain(value) else f"a {type(value).__name__}"
        log.warning("%s is %s now, which no file keeps: register it as a buffer if it matters", path, now)
    return True


def _is_of_users(part: Any) -> bool:
    return type(part).__module__.partition(".")[0] not in LIBRARIES and hasattr(part, "__dict__")


def _changes(detector: Any, recipe: Mapping[str, Any]) -> list[str]:
    """Paths of what is different in a detector made anew by the recipe, the innermost alone."""
    with torch.random.fork_rng([]):
        try:
            with torch.device("meta"):  # no memory, no time
                twin = rebuild(recipe, packages_of(recipe))
        except Exception:  # a part of the user's that looks at values
            twin = rebuild(recipe, packages_of(recipe))
    return list(dict.fromkeys(_differences(detector, twin)))


def _differences(detector: nn.Module, twin: nn.Module) -> Iterator[str]:
    theirs = dict(twin.named_modules())
    own = dict(detector.named_modules())
    exchanged = [name for name in own.keys() & theirs.keys() if not _same_class(own[name], theirs[name])]
    for name in sorted(exchanged, key=len):
        yield name
    shapes = [
        {name: tuple(t.shape) for name, t in module.state_dict().items() if isinstance(t, Tensor)}
        for module in (detector, twin)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            yield name.rpartition(".")[0].rpartition(".")[0] if name.count(".") > 2 else name
    for name in sorted(own.keys() & theirs.keys()):
        if name not in exchanged:
            for key in _unlike(own[name], theirs[name]):
                yield f"{name}.{key}".strip(".")


def _unlike(own: nn.Module, other: nn.Module) -> Iterator[str]:
    """Names of settings and parts that differ in two modules of a class; an empty one for the module as a whole."""
    yield from _changed_settings(own, other)
    for key in sorted({key for module in (own, other) for key in _parts(module)}):
        part, twin = getattr(own, key, None), getattr(other, key, None)
        if not _same_part(part, twin):
            inner = _changed_settings(part, twin) if _is_of_users(part) and _is_described_alike(part, twin) else []
            yield from [f"{key}.{name}" for name in inner] or [key]
    if _in_tensors(own) != _in_tensors(other):
        yield ""
    yield from _changed_constants(own)


def _changed_settings(own: Any, other: Any) -> list[str]:
    """Names of the other's settings that are different here; no recipe names a file of weights."""
    now, then = _settings(own), _settings(other)
    return [key for key, value in then.items() if key not in WEIGHTS and (key not in now or now[key] != value)]


def _is_described_alike(own: Any, other: Any) -> bool:
    same = type(own) is type(other) and not isfunction(own) and not ismethod(own)
    return same and bool(_described(own) == _described(other))


def _changed_constants(module: nn.Module) -> Iterator[str]:
    """Names of tensors that come from a module's recipe and no file has, as an image's mean, with other values now."""
    recipe, kept = getattr(module, "recipe", None), module.state_dict()
    constants = {name: tensor for name, tensor in module.named_buffers(recurse=False) if name not in kept}
    if recipe is None or not constants or list(module.children()):
        return
    built = dict(rebuild(recipe, packages_of(recipe)).named_buffers(recurse=False))
    for name, tensor in constants.items():
        if name in built and not torch.allclose(built[name].float(), tensor.cpu().float(), rtol=ROUNDED):
            yield name


def _in_tensors(module: nn.Module) -> dict[str, Any]:
    """What a module was given and keeps in no plain value, as weights of classes: the meta device has no numbers."""
    recipe = getattr(module, "recipe", None)
    if recipe is None or module.state_dict() or list(module.children()):
        return {}
    return {key: value for key, value in recipe["init_args"].items() if key not in vars(module)}


def _parts(module: nn.Module) -> list[str]:
    """Names of what a module calls, but modules that both will have."""
    own = [k for k, v in vars(module).items() if not k.startswith("_") and k not in NO_SETTING and _is_part(v)]
    return own + [k for k, v in module.named_children() if not v.state_dict()]


def _is_part(value: Any) -> bool:
    known = callable(value) or hasattr(value, "encode") or hasattr(value, "targets")  # coders of boxes, grids of masks
    return known and not isinstance(value, Tensor | torch.device)


def _same_part(own: Any, other: Any) -> bool:
    """Whether two parts do the same, as far as their class, code and plain values tell."""
    if own is other or (isinstance(own, nn.Module) and isinstance(other, nn.Module)):  # modules are compared by name
        return True
    if type(own) is not type(other):
        return False
    if ismethod(own):
        return _same_part(own.__func__, other.__func__)
    if isfunction(own):
        return own.__code__ is other.__code__ and own.__defaults__ == other.__defaults__
    if isinstance(own, partial):
        return _same_part(own.func, other.func) and describe(own.keywords) == describe(other.keywords)
    return _described(own) == _described(other) and _settings(own) == _settings(other)


def _described(value: Any) -> Any:
    """As `describe`, with the settings that a part has now in the place of those that it was made with."""
    plain, now = describe(value), _settings(value)
    if not isinstance(plain, dict) or "init_args" not in plain:
        return plain
    return plain | {"init_args": {key: now.get(key, was) for key, was in plain["init_args"].items()}}


def _same_class(own: nn.Module, other: nn.Module) -> bool:
    types = [type_before_parametrizations(module) for module in (own, other)]  # each has a class of its own
    kinds = [ALIKE.get(kind, kind) for kind in types]
    quicker = kinds[0].__module__.startswith("detection.models.fast")  # as `accelerate` makes them, with equal results
    return kinds[0] is kinds[1] or (quicker and issubclass(kinds[0], kinds[1]))


def _settings(part: Any) -> dict[str, Any]:
    """The plain public values that a part keeps."""
    values = getattr(part, "__dict__", {})
    return {k: v for k, v in values.items() if k not in NO_SETTING and not k.startswith("_") and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _follow(recipe: dict[str, Any], path: str, detector: Any) -> None:
    """Set the argument that stands for a path, in the recipe or in that of a part inside; none where there is none."""
    if path not in ARGUMENTS and (part := path.rpartition(".")[0]) in ARGUMENTS:
        path = part  # whose setting it is
    arguments, names = recipe["init_args"], path.split(".")
    inner = arguments.get(names[0])
    if len(names) > 1 and isinstance(inner, dict) and "class_path" in inner:
        _follow(inner, ".".join(names[1:]), getattr(detector, names[0]))
        return
    value: Any = detector
    for name in names:
        value = getattr(value, name)
    if isinstance(value, nn.Module) and type(value) in ALIKE:
        arguments["num_classes"] = detector.num_classes
        if getattr(detector, "has_keypoints", False):
            arguments["num_keypoints"] = detector.num_keypoints
        return
    plain, name = _described(value), ARGUMENTS.get(path, path)
    if plain is not NotImplemented and not isinstance(value, Tensor) and "." not in name:
        arguments[name] = plain
