"""What detector a file is of, where it is none that can be converted: by the names of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from detection.weights import CheckpointError

Marks = Sequence[tuple[str, str]]  # (pattern that one name has, what it is then); the first that is found counts

KEY_POINTS = "a Keypoint R-CNN, which can be converted from torchvision's and Detectron2's files alone"
DEFORMABLE = "a detector with deformable convolutions in its backbone, which have no counterpart here"
ONE_STAGE = "a one-stage detector, and only two-stage detectors can be converted"
RETINANET = f"a RetinaNet, {ONE_STAGE}"
FCOS = f"an FCOS, {ONE_STAGE}"

DETECTRON2: Marks = (
    (r"^head\.ctrness\.", FCOS),
    (r"^head\.(cls|bbox)_subnet\.", RETINANET),
    (r"^roi_heads\.(mask_point_head|mask_coarse_head|mask_head\.(point|coarse)_head)\.",
     "a PointRend, whose mask head has no counterpart here"),
    (r"^roi_heads\.mask_iou_head\.", "a Mask Scoring R-CNN, whose head for the masks' quality has no counterpart here"),
    (r"^sem_seg_head\.(.*\n)*?proposal_generator\.",
     "a Panoptic FPN, whose segmentation head has no counterpart here"),
    (r"^sem_seg_head\.", "a network for segmentation, and only detectors can be converted"),
    (r"\.conv2_offset\.", DEFORMABLE),
    (r"^backbone\.net\.", "a ViTDet, whose transformer backbone can't be converted"),
    (r"^backbone\.bottom_up\.(patch_embed|layers)\.", "a detector on a Swin transformer, which can't be converted"),
    (r"^backbone\.(bottom_up\.)?s1\.b1\.", "a detector on a RegNet, which can't be converted"),
    (r"^backbone\.(bottom_up\.)?stem\.conv3\.", "a detector with DeepLab's stem of three convolutions, which has no "
     "counterpart here"),
    (r"^backbone\.top_block\.", "a detector whose pyramid has RetinaNet's levels, made by convolutions, which have no "
     "counterpart here"),
    (r"^proposal_generator\.rpn_head\.conv\.conv1\.", "a detector whose RPN has several convolutions, of which one can "
     "be converted"),
)  # fmt: skip
MMDETECTION: Marks = (
    (r"^bbox_head\.retina_(cls|reg)\.", RETINANET),
    (r"^bbox_head\.conv_centerness\.", FCOS),
    (r"^(bbox_head\.transformer|encoder|decoder|bbox_head\.fc_reg)\b", f"a DETR, {ONE_STAGE}"),
    (r"^bbox_head\.(?!(\d\.)?(fc_cls|shared_))", ONE_STAGE),
    (r"^roi_head\.keypoint_head\.", KEY_POINTS),
    (r"^roi_head\.point_head\.", "a PointRend, whose mask head has no counterpart here"),
    (r"^roi_head\.mask_iou_head\.", "a Mask Scoring R-CNN, whose head for the masks' quality has no counterpart here"),
    (r"^roi_head\.grid_head\.", "a Grid R-CNN, whose grid head has no counterpart here"),
    (r"^roi_head\.semantic_head\.", "a Hybrid Task Cascade, whose segmentation head has no counterpart here"),
    (r"^rpn_head\.init_proposal_", "a Sparse R-CNN, whose learned proposals have no counterpart here"),
    (r"^rpn_head\.(stages|conv_loc)\b", "a Cascade RPN or guided anchors, which have no counterpart here"),
    (r"\.conv2\.conv_offset\.|\.conv2_offset\.", DEFORMABLE),
    (r"^backbone\.patch_embed\.|^backbone\.stages\.\d\.blocks\.", "a detector on a transformer, which can't be "
     "converted"),
    (r"^backbone\.stem\.\d", "a detector on a ResNet with a stem of three convolutions, which has no counterpart here"),
    (r"^backbone\.layer1\.0\.convs\.", "a detector on a Res2Net, which can't be converted: ResNets and ResNeXts can"),
    (r"\.context_block|\.gen_attention_block", "a detector with attention blocks in its backbone, which have no "
     "counterpart here"),
    (r"^neck\.\d\.", "a detector with a second neck (Libra R-CNN), which has no counterpart here"),
    (r"^neck\.downsample_convs\.|^neck\.pafpn_convs\.", "a detector with a PAFPN neck, which has no counterpart here"),
)  # fmt: skip
TORCHVISION: Marks = (
    (r"^head\.regression_head\.bbox_ctrness\.", FCOS),
    (r"^head\.classification_head\.module_list\.", f"an SSD, {ONE_STAGE}"),
    (r"^head\.(classification|regression)_head\.", RETINANET),
    (r"^backbone\.features\.", "a detector on a backbone without a pyramid, such as torchvision's tutorial builds: "
     "build it with faster_rcnn and load the tensors"),
    (r"^(fc|classifier|head)\.(weight|\d\.weight)$", "a classification network: give it as weights_backbone"),
)  # fmt: skip


def refuse(names: Iterable[str], library: str, marks: Marks) -> None:
    """Raise a CheckpointError that names the kind of detector, if one of the marks is found.

    Args:
        names: of the tensors.
        library: that wrote them.
        marks: of what can't be converted.
    """
    text = "\n".join(sorted(names, reverse=True))  # so that one pattern can ask for two names
    for pattern, kind in marks:
        if re.search(pattern, text, re.MULTILINE):
            raise CheckpointError(f"this is {kind} (a file of {library})")
