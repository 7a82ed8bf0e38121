"""How Detectron2 and MMDetection train a detector, where they do not train as torchvision does.

Shape shorthand:
    B: images     G: ground truth boxes an image, padded     A: anchors     P: proposals of an image
    S: sampled anchors of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from detection.batch import Batch
from detection.boxes import BoxCoder
from detection.fitting import attribute_of
from detection.matching import Matcher
from detection.models.cascade import CascadeRoIHeads
from detection.models.roi_heads import RoIHeads, RoISample
from detection.models.rpn import RegionProposalNetwork
from detection.models.two_stage import FasterRCNN
from detection.parts import FeatureMaps, Losses, Proposals
from detection.recipes import recorded

Library = Literal["torchvision", "detectron2", "mmdetection"]
BORDER = {1: -1.0, 3: 0.0}  # MMDetection's `allowed_border`, by the stages of a detector with a pyramid


@recorded
class Semantics:
    """The rules of training of a library; a library's name alone stands for its usual ones.

    `torchvision`: losses of the RPN are divided by the anchors that were sampled; all stages of a cascade have the
    regions that the first one sampled, and each a share of the gradient (Detectron2's, too).

    `detectron2`: losses of the RPN are divided by `rpn_batch_size_per_image` times the images, whether there were so
    many anchors or not.

    `mmdetection`: dw and dh have a lower bound; `MaxIoUMatcher` and `InsideImage` in the RPN, whose losses are divided
    by what was sampled, foreground and background of an image counted as one at least; in Mask R-CNN `MaxIoUMatcher`
    for proposals, too; stages of a cascade sample anew, see `Resampling`.

    Args:
        rules: whose.
        min_pos_iou: for MMDetection, see `MaxIoUMatcher`.
        allowed_border: for MMDetection, see `InsideImage`; default: -1, and 0 in a cascade.
        stage_loss_weights: for MMDetection, of a cascade.

    Raises:
        ValueError: there is no such library.
    """

    def __init__(
        self,
        rules: Library = "mmdetection",
        min_pos_iou: float = 0.3,
        allowed_border: float | None = None,
        stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
    ) -> None:
        if rules not in get_args(Library):
            raise ValueError(f"semantics of {rules!r} are not known: {', '.join(get_args(Library))} are")
        self.rules, self.min_pos_iou, self.allowed_border = rules, min_pos_iou, allowed_border
        self.stage_loss_weights = list(stage_loss_weights)

    def parts(self, arguments: dict[str, Any], masks: bool = False) -> dict[str, Any]:
        """The arguments of `faster_rcnn` with this library's matchers and box coders, where none are given.

        Args:
            arguments: as given.
            masks: whether it is a Mask R-CNN.
        """
        if self.rules != "mmdetection":
            return arguments
        weights = arguments.get("bbox_reg_weights", (10.0, 10.0, 5.0, 5.0))
        ious = arguments.get("rpn_fg_iou_thresh", 0.7), arguments.get("rpn_bg_iou_thresh", 0.3)
        own = {
            "rpn_matcher": MaxIoUMatcher(*ious, self.min_pos_iou),
            "rpn_box_coder": bounded(BoxCoder()),
            "box_coder": bounded(BoxCoder(weights)),
        }
        if masks:
            high, low = arguments.get("box_fg_iou_thresh", 0.5), arguments.get("box_bg_iou_thresh", 0.5)
            own["box_matcher"] = MaxIoUMatcher(high, low, high)
        return arguments | {name: part for name, part in own.items() if arguments.get(name) is None}

    def apply(self, model: FasterRCNN) -> FasterRCNN:
        """The model, changed to train by these rules.

        Raises:
            ValueError: as many weights as stages are needed.
        """
        rpn, heads = model.rpn, model.roi_heads
        if self.rules == "detectron2" and isinstance(rpn, RegionProposalNetwork):
            rpn.counted_rows = AskedRows(int(attribute_of("rpn_sampler", rpn.sampler, "batch_size_per_image")))
        if self.rules != "mmdetection":
            return model
        stages = len(heads.stages) if isinstance(heads, CascadeRoIHeads) else 1
        if isinstance(rpn, RegionProposalNetwork):
            border = BORDER.get(stages, 0.0) if self.allowed_border is None else self.allowed_border
            rpn.counted_rows, rpn.candidates = OneOfEach(), InsideImage(border) if border >= 0 else None
        if isinstance(heads, CascadeRoIHeads):
            heads.training_rule = Resampling(self.stage_loss_weights)
            if len(self.stage_loss_weights) != stages:
                raise ValueError(f"{len(self.stage_loss_weights)} stage_loss_weights for {stages} stages: give one for "
                                 "each")  # fmt: skip
            for stage in heads.stages:
                stage.box_coder = bounded(stage.box_coder)  # type: ignore[arg-type,assignment]
        return model


def bounded(coder: BoxCoder) -> BoxCoder:
    """The coder with the bound of dw and dh on both sides, as MMDetection's `DeltaXYWHBBoxCoder` has it."""
    return BoxCoder(coder.weights, coder.max_log_ratio, -coder.max_log_ratio)


@recorded
class MaxIoUMatcher(Matcher):
    """MMDetection's `MaxIoUAssigner` with low-quality matches.

    As `Matcher`, but for the anchors with the highest IoU of a ground truth: they are foreground only where that IoU
    is `min_pos_iou` or more, and are assigned this ground truth, whatever they overlap more; of several the last.

    Args:
        fg_iou_thresh, bg_iou_thresh: see `Matcher`.
        min_pos_iou: in [0, 1].
    """

    def __init__(self, fg_iou_thresh: float, bg_iou_thresh: float, min_pos_iou: float = 0.3) -> None:
        super().__init__(fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches=True)
        self.min_pos_iou = min_pos_iou

    def _is_best(self, iou: Tensor, peak: Tensor) -> Tensor:
        """Of each anchor the last ground truth whose highest IoU it has, -1 for none: `(..., A)`."""
        reached = torch.where(peak >= self.min_pos_iou, peak, torch.inf)  # padding is below 0
        number = torch.arange(1, iou.shape[-2] + 1, device=iou.device)[:, None]
        return (number * (iou == reached[..., None])).amax(dim=-2) - 1

    def _assign(self, best_iou: Tensor, best_gt: Tensor, forced: Tensor | None) -> Tensor:
        assigned = super()._assign(best_iou, best_gt, None)
        return assigned if forced is None else torch.where(forced >= 0, forced, assigned)


@recorded
class InsideImage:
    """Which anchors train: those that stand out of the image by less than a border. They alone compete for objects.

    Args:
        border: pixels, MMDetection's `allowed_border`. At 0 the left and upper edge belong to the image, the others
            do not.
    """

    def __init__(self, border: float = 0.0) -> None:
        self.border = border

    def __call__(self, anchors: Tensor, image_sizes: Tensor) -> Tensor:
        """Anchors `(A, 4)` and sizes `(B, 2)`, (height, width) in pixels -> `(B, A)` bool."""
        limit = image_sizes.flip(-1)[:, None].to(anchors.dtype) + self.border
        return (anchors[:, :2] >= -self.border).all(dim=-1) & (anchors[:, 2:] < limit).all(dim=-1)


@recorded
class AskedRows:
    """Detectron2's divisor of the RPN's losses: the anchors that were asked for, whether there were so many or not.

    Args:
        batch_size_per_image: as the sampler has it.
    """

    def __init__(self, batch_size_per_image: int) -> None:
        self.batch_size_per_image = batch_size_per_image

    def __call__(self, foreground: Tensor, valid: Tensor) -> Tensor:
        """`(B, S)` bool each -> `(B, batch_size_per_image)`, all True."""
        return valid.new_ones((len(valid), self.batch_size_per_image))


@recorded
class OneOfEach:
    """MMDetection's divisor of the RPN's losses: what was sampled, but one of each kind in an image at least."""

    def __call__(self, foreground: Tensor, valid: Tensor) -> Tensor:
        """`(B, S)` bool each -> `(B, S + 2)`."""
        kinds = [foreground & valid, ~foreground & valid]
        return torch.cat((valid, *(~kind.any(dim=1, keepdim=True) for kind in kinds)), dim=1)


@recorded
class Resampling:
    """A cascade's training as MMDetection has it (`CascadeRoIHead`), a `training_rule` of `CascadeRoIHeads`.

    Each stage samples anew: among the boxes that the one before has moved, without the ground truth that it was given
    beside the proposals, and the ground truth again. Its losses have a weight, and its gradient reaches the features
    whole. A mask branch of a stage learns on that stage's sample, one branch for all on the first stage's.

    Args:
        stage_loss_weights: of each stage.
    """

    def __init__(self, stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25)) -> None:
        self.stage_loss_weights = list(stage_loss_weights)

    def __call__(self, heads: CascadeRoIHeads, features: FeatureMaps, proposals: Proposals, batch: Batch) -> Losses:
        """As `CascadeRoIHeads.losses`."""
        found: Losses = {}
        for i, (stage, weight) in enumerate(zip(heads._heads, self.stage_loss_weights, strict=True)):
            sample = stage.sample(features, proposals, batch)
            foreground = stage.foreground_part(sample)
            logits, deltas = stage.predict(features, sample.boxes)
            losses = stage.box_losses(logits, deltas, sample, batch) | stage.mask_losses(features, *foreground, batch)
            if i == 0 and heads.mask_predictor is not None:
                masks = heads.mask_losses(features, *foreground, batch)
                found |= {name: weight * loss for name, loss in masks.items()}
            found |= {f"{name}_stage{i}": weight * loss for name, loss in losses.items()}
            proposals = self._moved(heads, stage, sample, deltas, batch)
        return found

    @staticmethod
    def _moved(heads: CascadeRoIHeads, stage: RoIHeads, sample: RoISample, deltas: Tensor, batch: Batch) -> Proposals:
        """The sampled regions where the stage has moved them, as the proposals of the next."""
        same = (sample.boxes[:, :, None] == batch.gt_boxes[:, None]).all(dim=-1) & batch.gt_valid[:, None]
        valid = sample.valid & ~same.any(dim=-1)
        boxes = heads._refine(stage, sample.boxes, deltas, batch.image_sizes)
        return Proposals(torch.where(valid[..., None], boxes, 0.0), valid.float(), valid)
