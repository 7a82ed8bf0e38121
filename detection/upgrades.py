"""Recipes in checkpoints of older versions, as this one has them."""

from __future__ import annotations

from typing import Any

PACKAGE = __name__.partition(".")[0]
# Where the makers of older checkpoints are now, and what their arguments are called.
MOVED = {
    f"{PACKAGE}.models.family.": f"{PACKAGE}.models.relatives.",
    f"{PACKAGE}.models.fpn.": f"{PACKAGE}.models.pyramid.",
    f"{PACKAGE}.interop.heads.ConvStack": f"{PACKAGE}.models.masks.MaskHead",
    f"{PACKAGE}.models.proposals.GivenProposals": f"{PACKAGE}.models.precomputed.PrecomputedProposals",
}

ARGUMENTS = {  # of builders: what they were called -> what takes their place
    "box_beta": "box_loss",
    "box_overlap_loss": "box_loss",
    "rpn_box_beta": "rpn_box_loss",
    "rpn_overlap_loss": "rpn_box_loss",
}


def upgrade(path: str, arguments: dict[str, Any], written: bool = False) -> tuple[str, dict[str, Any]]:
    """The class path and the arguments of a recipe as this version has them; those of other packages as they are.

    Args:
        path, arguments: of the recipe.
        written: by a user, who leaves out what shall have its default. A checkpoint has what it was trained with.
    """
    if not path.startswith(f"{PACKAGE}."):
        return path, arguments
    for old, new in MOVED.items():
        # `models.family` was a module of builders, and is a package of modules: only names in the package moved.
        if path.startswith(old) and "." not in path.removeprefix(old):
            path = path.replace(old, new, 1)
    if path == f"{PACKAGE}.models.masks.MaskHead":
        layers = [arguments.pop("channels", 256)] * arguments.pop("convs", 4)
        arguments |= {"layers": layers} if "layers" not in arguments and layers != [256] * 4 else {}
        arguments |= {"norm": "batch"} if arguments.pop("batch_norm", False) else {}
    for stage in ("rpn_", ""):
        overlap = arguments.pop(f"{stage or 'box_'}overlap_loss", None)
        beta = arguments.pop(f"{stage}box_beta", None)
        if overlap is not None:
            arguments[f"{stage}box_loss"] = overlap
        elif beta is not None:
            smooth_l1 = {"class_path": f"{PACKAGE}.losses.SmoothL1Loss", "init_args": {"beta": beta}}
            arguments[f"{stage}box_loss"] = smooth_l1
    if not written and "mask_grid" not in arguments and _has_masks(path, arguments):
        arguments["mask_grid"] = {"class_path": f"{PACKAGE}.mask_grid.TorchvisionMaskGrid", "init_args": {}}
    return path, arguments


def _has_masks(path: str, arguments: dict[str, Any]) -> bool:
    if path.startswith(f"{PACKAGE}.models.family."):  # younger than the choice of a grid
        return False
    builder = path.rpartition(".")[2].startswith(("mask_rcnn", "maskrcnn_"))
    return bool(builder or arguments.get("masks") or arguments.get("mask_predictor"))
