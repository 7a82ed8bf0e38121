"""What was changed on a detector after it was built: brought into its recipe, or refused, but never forgotten.

torchvision's users exchange a head, `model.roi_heads.box_predictor = FastRCNNPredictor(...)`, or set a threshold,
`model.roi_heads.score_thresh = 0.3`. The recipe, by which files make the detector again, does not see it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn, mask_rcnn

from detection.models.masks import MaskPredictor
from detection.models.roi_heads import FastRCNNPredictor
from detection.recipes import RecipeError, describe, packages_of, rebuild

# The argument of our builders that sets what has this path in the detector.
ARGUMENTS = {
    "transform.min_size": "min_size",
    "transform.max_size": "max_size",
    "rpn.head": "rpn_head",
    "rpn.anchor_generator": "rpn_anchor_generator",
    "rpn.nms_thresh": "rpn_nms_thresh",
    "rpn.score_thresh": "rpn_score_thresh",
    "roi_heads.score_thresh": "box_score_thresh",
    "roi_heads.nms_thresh": "box_nms_thresh",
    "roi_heads.detections_per_img": "box_detections_per_img",
    "roi_heads.soft_nms_sigma": "soft_nms_sigma",
    "roi_heads.box_roi_pool": "box_roi_pool",
    "roi_heads.box_head": "box_head",
    "roi_heads.box_predictor": "box_predictor",
    "roi_heads.mask_head": "mask_head",
    "roi_heads.mask_predictor": "mask_predictor",
}
ALIKE = {faster_rcnn.FastRCNNPredictor: FastRCNNPredictor, mask_rcnn.MaskRCNNPredictor: MaskPredictor}
NO_SETTING = ("training", "recipe", "resolved", "unrecorded")


def present_recipe(detector: Any) -> dict[str, Any] | None:
    """The recipe of a detector as it is now, with the changes made since it was built; None where it has no recipe.

    Raises:
        RecipeError: a change that no argument of the builder can describe; it names the first.
    """
    recipe: dict[str, Any] | None = detector.recipe
    if recipe is None:
        return None
    changed = _changes(detector, recipe)
    if not changed:
        return recipe
    followed = copy.deepcopy(recipe)
    for path in changed:
        _follow(followed, path, detector)
    try:
        left = _changes(detector, followed)
    except (RecipeError, TypeError, ValueError):
        left = changed
    if left:
        raise RecipeError(
            f"{left[0]} was changed after the detector was built, and a file that is written now would make it again "
            "without: give it to the builder"
        )
    return followed


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
    shapes = [{name: tuple(t.shape) for name, t in module.state_dict().items()} for module in (detector, twin)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            yield name.rpartition(".")[0].rpartition(".")[0] if name.count(".") > 2 else name
    for name in sorted(own.keys() & theirs.keys()):
        if name not in exchanged:
            for key, value in _settings(theirs[name]).items():
                if getattr(own[name], key, None) != value:
                    yield f"{name}.{key}".lstrip(".")


def _same_class(own: nn.Module, other: nn.Module) -> bool:
    kinds = [ALIKE.get(type(module), type(module)) for module in (own, other)]
    quicker = kinds[0].__module__.startswith("detection.models.fast")  # as `accelerate` makes them, with equal results
    return kinds[0] is kinds[1] or (quicker and issubclass(kinds[0], kinds[1]))


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain public values that a module keeps."""
    return {k: v for k, v in vars(module).items() if k not in NO_SETTING and not k.startswith("_") and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _follow(recipe: dict[str, Any], path: str, detector: Any) -> None:
    """Set the argument that stands for a path, in the recipe or in that of a part inside; none where there is none."""
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
        return
    plain = describe(value)
    name = ARGUMENTS.get(path, path)
    if plain is not NotImplemented and not isinstance(value, Tensor) and "." not in name:
        arguments[name] = plain
