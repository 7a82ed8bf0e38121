"""What a configuration of another library says of a detector, in this project's words, and where each fact is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from detection.interop.rows import Style
from detection.models.norms import Norm
from detection.weights import CheckpointError

TENSORS, CONFIG, DEFAULT, ASKED = "tensors", "config", "default", "asked"
LVIS_CLASSES = (1203, 1230)  # of its versions 1 and 0.5
# Both libraries' settings for it: so many classes have low scores, and LVIS counts 300 detections of an image.
LVIS = {"box_score_thresh": 1e-4, "box_detections_per_img": 300}


@dataclass(frozen=True, slots=True)
class Told:
    """What a configuration says.

    Attributes:
        arguments: of the builder, by name.
        shape: what the tensors show too, such as `num_classes`, and must agree with.
        style: of the backbone, and its pixels; None where nothing is said.
        trainable_layers: see `resnet_fpn`; None for the library's usual.
        asked: arguments of the builder that the caller asks for, whatever the configuration says.
        norm: of the backbone; None where nothing is said.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    style: Style | None = None
    trainable_layers: int | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    norm: Norm | None = None

    def check(self, found: Mapping[str, Any]) -> None:
        """Compare with what the tensors show.

        Raises:
            CheckpointError: they are not the configuration's; it names the first difference.
        """
        for name, value in self.shape.items():
            if name in found and found[name] != value:
                raise CheckpointError(f"the config says {name} {value}, but the tensors are of {found[name]}: give the "
                                      "config that they were trained with")  # fmt: skip

    def ask(self, semantics: str | None) -> Told:
        """With the rules of training of a library; where the configuration is of that one, they are as it says."""
        own = self.arguments.get("semantics")
        if semantics is None or (own is not None and own.rules == semantics):
            return self
        arguments = {name: value for name, value in self.arguments.items() if name != "box_matcher"}  # which is a rule
        return replace(self, asked={"semantics": semantics}, arguments=arguments)

    def settle(self, guess: Style, said: bool) -> Style:
        """How the backbone was trained: as the configuration says, or the caller, or by what is known of such files.

        Args:
            guess: what the caller says, or is known.
            said: whether caller or file say the colours.

        Raises:
            CheckpointError: caller or file say another than the configuration.
        """
        if self.style is None:
            return guess
        if said and (guess.bgr, guess.stride_in_1x1) != (self.style.bgr, self.style.stride_in_1x1):
            raise CheckpointError(
                f"the config says BGR {self.style.bgr} and stride in the 1x1 convolutions {self.style.stride_in_1x1}, "
                f"but the style that is given, or the file's pixel_mean, BGR {guess.bgr} and {guess.stride_in_1x1}"
            )
        return self.style


def usual(num_classes: int) -> dict[str, Any]:
    """What follows from the number of classes, background included, where no configuration says otherwise."""
    return dict(LVIS) if num_classes - 1 in LVIS_CLASSES else {}


FACTS = (  # arguments that no tensor shows
    *(
        "min_size",
        "max_size",
        "resizing",
        "image_mean",
        "rpn_anchor_generator",
        "box_roi_pool",
        "mask_roi_pool",
        "keypoint_roi_pool",
        "rpn_box_coder",
    ),
    *("bbox_reg_weights", "cascade_bbox_reg_weights", "cascade_iou_thresh", "box_score_thresh", "box_nms_thresh"),
    *("box_detections_per_img", "rpn_nms_thresh", "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test"),
    *("rpn_pre_nms_top_n_train", "rpn_post_nms_top_n_train", "rpn_fg_iou_thresh", "rpn_bg_iou_thresh"),
    *("rpn_batch_size_per_image", "rpn_positive_fraction", "box_fg_iou_thresh", "box_bg_iou_thresh"),
    *("box_batch_size_per_image", "box_positive_fraction", "rpn_box_loss", "box_loss", "semantics"),
)


def origins_of(recipe: Mapping[str, Any], told: Told, style: str) -> dict[str, str]:
    """Where each fact of a converted detector is from.

    Args:
        recipe: of the detector.
        told: by a configuration.
        style: where colours and strides are from.
    """
    given = recipe.get("init_args", {})
    origins = dict.fromkeys(("backbone", "num_classes", "stages", "masks"), TENSORS)
    origins |= dict.fromkeys(("colours", "stride"), style)
    if told.norm is not None:
        origins["norm"] = CONFIG
    elif given.get("backbone", {}).get("init_args", {}).get("norm") == "affine":
        origins["norm"] = DEFAULT
    for name in FACTS:
        if name in told.asked:
            origins[name] = ASKED
        elif name in told.arguments:
            origins[name] = CONFIG
        elif name in given:
            origins[name] = DEFAULT
    return origins


def report(origins: Mapping[str, str]) -> str:
    """The facts of a converted file by where they are from, a line each."""
    names = {TENSORS: "from its tensors", CONFIG: "from the config", DEFAULT: "the library's default, not in the file",
             ASKED: "as asked"}  # fmt: skip
    lines = []
    for origin, words in names.items():
        facts = sorted(name for name, given in origins.items() if given == origin)
        if facts:
            lines.append(f"{words}: {', '.join(facts)}")
    return "\n".join(lines)
