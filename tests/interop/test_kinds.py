"""Kinds of Detectron2's and MMDetection's detectors beyond the plain ones, by their definition; refusals by name."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.interop import kinds, mmdetection, rows
from detection.interop.builders import Layout, build, resnet_of
from detection.interop.detectron2 import choose_style, from_detectron2, read_layout, to_detectron2
from detection.interop.heads import ConvLinearHead
from detection.interop.names import rename
from detection.interop.rows import STYLES, Style
from detection.interop.told import Told
from detection.interop.torchvision import find_builder
from detection.models.backbones import resnet_dc5, resnet_fpn
from detection.models.masks import MaskHead
from detection.models.precomputed import PrecomputedProposals
from detection.models.roi_heads import RoIHeads
from detection.models.transform import IMAGENET_MEAN, IMAGENET_STD
from detection.weights import CheckpointError

GN = Layout("resnet50", "fpn", 4, 1, True, "group", "group", "group", 4, 1, "group")
LAYOUTS = {
    "ResNet-18": Layout("resnet18", "fpn", 4, 1, False),
    "ResNet-34": Layout("resnet34", "fpn", 4, 1, False),
    "ResNeXt": Layout("resnext101_32x8d", "fpn", 81, 3, True),
    "GN": GN,
    "GN, plain heads": Layout("resnet50", "fpn", 4, 1, False, "group"),
    "SyncBN": Layout("resnet50", "fpn", 4, 1, True, "batch", "batch", "batch", 4, 1, "batch"),
    "class-agnostic": Layout("resnet50", "fpn", 4, 1, False, agnostic=True),
    "Fast R-CNN": Layout("resnet50", "fpn", 4, 1, False, precomputed=True),
    "Keypoint R-CNN": Layout("resnet50", "fpn", 2, 1, False, keypoints=17),
    "Cascade with convolutions": Layout("resnet50", "fpn", 4, 3, False, "group", "group", None, 4, 1, "group"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_kind_is_known_by_its_tensors(name: str) -> None:
    layout = LAYOUTS[name]
    with torch.device("meta"):
        theirs = to_detectron2(build(layout, STYLES["pytorch"]))
    assert read_layout(theirs) == layout
    assert any(".norm.running_mean" in key for key in theirs) == (layout.norm != "group")
    if layout.convs:
        first = "0." if layout.stages > 1 else ""
        assert theirs[f"roi_heads.box_head.{first}conv4.norm.weight"].shape == (256,)
        assert theirs["backbone.fpn_lateral5.norm.bias"].shape == (256,)


@pytest.mark.parametrize("name", ["GN", "ResNeXt", "class-agnostic", "Cascade with convolutions"])
def test_mmdetection_has_them_too(name: str) -> None:
    layout = replace(LAYOUTS[name], mask=LAYOUTS[name].mask and LAYOUTS[name].stages == 1)
    with torch.device("meta"):
        model = build(layout, STYLES["pytorch"], **(mmdetection.CASCADE if layout.stages > 1 else {}))
        ours = rows.without_counters(rows.background_to_back(model.state_dict()))
        table = rename(ours, mmdetection.RULES)
        kind = "gn" if layout.norm == "group" else "bn"
        theirs = {re.sub(r"\.bn(\d?)\.", rf".{kind}\1.", table[key]): value for key, value in ours.items()}
        again = mmdetection.from_mmdetection(theirs, STYLES["pytorch"])
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    if layout.convs:
        first = "0." if layout.stages > 1 else ""
        known = {"backbone.layer1.0.gn1.weight", "neck.lateral_convs.3.gn.bias", "neck.fpn_convs.0.conv.weight"}
        known |= {f"roi_head.bbox_head.{first}shared_convs.3.gn.weight", f"roi_head.bbox_head.{first}shared_fcs.0.bias"}
        assert known <= set(theirs)


def small(layout: Layout, seed: int = 0) -> tuple[dict[str, Tensor], Any]:
    """A detector's tensors as Detectron2 has them, random, and the detector that they make here."""
    torch.manual_seed(seed)
    state = to_detectron2(build(layout, STYLES["pytorch"]))
    state = {name: torch.randn_like(value) * 0.05 + ("norm.weight" in name) for name, value in state.items()}
    state |= {name: value.abs() + 0.5 for name, value in state.items() if name.endswith("running_var")}
    return state, from_detectron2(state, Style(False, False), Told(norm=layout.norm)).eval()


@torch.no_grad()
def test_a_block_of_a_grouped_network_with_group_norm() -> None:
    """Without statistics it is group normalisation, even beside heads without any; 32 groups of 4 channels."""
    state, model = small(Layout("resnext50_32x4d", "fpn", 4, 1, False, "group"))
    x = torch.randn(1, 64, 9, 11)
    body = "backbone.bottom_up.res2.0."

    def layer(x: Tensor, name: str, **options: Any) -> Tensor:
        norm = nn.GroupNorm(32, len(state[f"{body}{name}.weight"]))
        norm.load_state_dict({key: state[f"{body}{name}.norm.{key}"] for key in ("weight", "bias")})
        return norm(F.conv2d(x, state[f"{body}{name}.weight"], **options))

    assert state[f"{body}conv2.weight"].shape == (128, 4, 3, 3)
    y = layer(layer(x, "conv1").relu(), "conv2", padding=1, groups=32).relu()
    wanted = (layer(y, "conv3") + layer(x, "shortcut")).relu()
    torch.testing.assert_close(model.backbone.body["layer1"][0](x), wanted, atol=1e-5, rtol=1e-5)
    images = torch.rand(2, 3, 64, 96)
    quick, plain = model.for_inference("cpu"), model
    for ours, expected in zip(quick.backbone(images).values(), plain.backbone(images).values(), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_normalisation_without_statistics_is_what_the_config_says() -> None:
    """Folded frozen normalisation of old files is a factor and a shift, with statistics of 0 and 1."""
    layout = Layout("resnet18", "fpn", 4, 1, False, "group")
    state, _ = small(layout)
    model = from_detectron2(state, Style(False, False), Told(norm="frozen")).eval()
    x, body = torch.randn(1, 64, 9, 11), "backbone.bottom_up.res2.0."

    def layer(x: Tensor, name: str) -> Tensor:
        scale, shift = (state[f"{body}{name}.norm.{part}"][:, None, None] for part in ("weight", "bias"))
        return F.conv2d(x, state[f"{body}{name}.weight"], padding=1) * scale / math.sqrt(1 + 1e-5) + shift

    wanted = (layer(layer(x, "conv1").relu(), "conv2") + x).relu()
    torch.testing.assert_close(model.backbone.body["layer1"][0](x), wanted, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())
    with pytest.raises(CheckpointError, match=r"so it is group normalisation, or frozen .* GN or FrozenBN"):
        from_detectron2(state, Style(False, False))
    with pytest.raises(CheckpointError, match="the config says batch normalisation, but the tensors have no stat"):
        from_detectron2(state, Style(False, False), Told(norm="batch"))
    with torch.device("meta"):  # group normalisation elsewhere in it answers the question
        theirs = to_detectron2(build(LAYOUTS["GN"], STYLES["pytorch"]))
        assert any(isinstance(m, nn.GroupNorm) for m in from_detectron2(theirs, STYLES["pytorch"]).backbone.modules())


def test_a_cascade_with_a_mask_branch_in_each_stage() -> None:
    layout = Layout("resnet50", "fpn", 4, 3, True, mask_norm="group", stage_masks=True)
    with torch.device("meta"):
        model = build(layout, STYLES["pytorch"], semantics="mmdetection", **mmdetection.CASCADE)
        ours = rows.without_counters(rows.background_to_back(model.state_dict()))
        table = rename(ours, mmdetection.RULES)
        theirs = {table[key]: value for key, value in ours.items()}
        again = mmdetection.from_mmdetection(theirs, STYLES["pytorch"])
        with pytest.raises(CheckpointError, match="each stage has a mask branch, but Detectron2's cascades have one"):
            to_detectron2(model)
    assert mmdetection.read_layout(theirs) == layout
    assert list(again.state_dict()) == list(model.state_dict())
    known = {"0.convs.0.conv.weight", "1.convs.3.bn.bias", "2.upsample.weight", "2.conv_logits.bias"}
    assert {f"roi_head.mask_head.{name}" for name in known} <= set(theirs)
    assert theirs["roi_head.mask_head.0.conv_logits.weight"].shape == (3, 256, 1, 1)


@torch.no_grad()
def test_heads_with_group_norm() -> None:
    torch.manual_seed(0)
    head, x = ConvLinearHead(8, 5, convs=2, linears=1, norm="group", out_channels=16), torch.randn(3, 8, 5, 5)
    y = x
    for conv, norm, _ in head.convs:
        nn.init.normal_(norm.weight)
        y = nn.functional.group_norm(F.conv2d(y, conv.weight, padding=1), 32, norm.weight, norm.bias).relu()
    torch.testing.assert_close(head(x), F.linear(y.flatten(1), *head.linears[0].parameters()).relu())
    assert all(conv.bias is not None for conv, _ in MaskHead(8)) and head.out_channels == 16
    assert MaskHead(8, [])(x) is x and MaskHead(8, []).out_channels == 8


@torch.no_grad()
def test_one_box_and_one_mask_for_all_classes() -> None:
    layout = Layout("resnet18", "fpn", 4, 1, True, agnostic=True)
    state, _ = small(layout)
    one = {name: value[:1] for name, value in state.items() if ".mask_head.predictor." in name}
    model = from_detectron2(state | one, Style(False, False)).eval()
    assert isinstance(model.roi_heads, RoIHeads)
    rows_of_boxes = model.roi_heads.box_predictor(torch.randn(5, 1024))[1]
    assert rows_of_boxes.shape == (5, 4)
    masks = model.roi_heads.mask_predictor(torch.randn(2, 256, 14, 14))
    assert masks[:, 1:].std() > 0.01 and torch.equal(masks[:, 1], masks[:, 2]) and torch.equal(masks[:, 1], masks[:, 3])
    back = to_detectron2(model)
    assert torch.equal(
        back["roi_heads.box_predictor.bbox_pred.weight"], state["roi_heads.box_predictor.bbox_pred.weight"]
    )


@torch.no_grad()
def test_fast_rcnn_takes_the_proposals_that_it_is_given() -> None:
    _, model = small(Layout("resnet18", "fpn", 4, 1, False, precomputed=True))
    assert isinstance(model.rpn, PrecomputedProposals) and model.rpn.top_n == {"training": 2000, "testing": 1000}
    assert model.roi_heads.box_roi_pool.aligned
    assert not any(name.startswith("rpn.") for name in model.state_dict())


@torch.no_grad()
def test_the_first_block_of_a_dilated_stage_is_dilated_too() -> None:
    """With the stride in the 3x3 convolution, where torchvision leaves that one as it is."""
    torch.manual_seed(0)
    plain, theirs = (
        resnet_dc5("resnet50", norm="batch", dilate_first=first).body["layer4"][0] for first in (False, True)
    )
    x = torch.randn(1, 512, 7, 9)
    weight, wanted = theirs.conv2.weight, torch.zeros(1, 512, 7, 9)
    padded = F.pad(x, (2, 2, 2, 2))
    for row in range(3):
        for column in range(3):
            part = padded[:, :, 2 * row : 2 * row + 7, 2 * column : 2 * column + 9]
            wanted += torch.einsum("bchw,oc->bohw", part, weight[:, :, row, column])
    torch.testing.assert_close(theirs.conv2(x), wanted, atol=1e-4, rtol=1e-4)
    plain.conv2.weight = weight
    assert (plain.conv2(x) - wanted).abs().max() > 0.1
    with torch.device("meta"):
        built = build(Layout("resnet50", "dc5", 4, 1, False), Style(False, True))
    assert built.backbone.body["layer4"][0].conv2.dilation == (2, 2) and built.transform.size_divisible == 1


@pytest.mark.parametrize("bgr", [False, True])
@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0), (57.375, 57.12, 58.395), (70.0, 60.0, 50.0)], ids=str)
def test_pixels_of_any_order_and_size(bgr: bool, std: tuple[float, ...]) -> None:
    """Their first convolution on their pixels, and ours on ours."""
    torch.manual_seed(0)
    image, kernel = torch.randint(0, 256, (3, 20, 24)).float(), torch.randn(4, 3, 7, 7)
    mean = torch.tensor([255 * value for value in IMAGENET_MEAN])
    order = [2, 1, 0] if bgr else [0, 1, 2]
    theirs = ((image - mean[:, None, None]) / torch.tensor(std)[:, None, None])[order]
    ours = (image / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    style = Style(False, bgr, None, std)
    folded = rows.fold_pixels({rows.STEM: kernel}, style.bgr, style.scale)[rows.STEM]
    wanted = F.conv2d(theirs[None], kernel, padding=3)
    got = F.conv2d(ours[None], folded, padding=3)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_style_of_a_file() -> None:
    """Colour order, division and stride are three facts; what a file does not tell is as in the zoo."""
    imagenet = tuple(255 * value for value in IMAGENET_STD)
    with torch.device("meta"):
        plain, grouped, normed = (
            to_detectron2(build(LAYOUTS[name], STYLES["pytorch"])) for name in ("class-agnostic", "ResNeXt", "GN")
        )
    assert choose_style(plain) == Style(True, True)
    assert choose_style(grouped) == Style(False, True, None, imagenet)
    assert choose_style(normed) == Style(False, True)
    assert choose_style(plain, stride_in_1x1=False) == Style(False, True)
    assert choose_style(plain, "pytorch") == Style(False, False)
    assert choose_style(plain, "pytorch", stride_in_1x1=True) == Style(True, False)
    bgr = {"pixel_mean": torch.tensor([103.0, 116.0, 124.0]), "pixel_std": torch.tensor([57.0, 58.0, 59.0])}
    assert choose_style(plain | bgr) == Style(False, True, (124.0, 116.0, 103.0), (59.0, 58.0, 57.0))
    assert choose_style(plain | bgr, "caffe").stride_in_1x1
    with pytest.raises(CheckpointError, match="its pixel_mean is that of BGR, not RGB"):
        choose_style(plain | bgr, bgr=False)
    with torch.device("meta"):
        own = build(LAYOUTS["ResNet-18"], Style(False, True, (51.0, 102.0, 153.0)))
    assert own.recipe is not None and own.recipe["init_args"]["image_mean"] == pytest.approx([0.2, 0.4, 0.6])


R50 = {"backbone.bottom_up.stem.conv1.norm.weight", "roi_heads.box_predictor.cls_score.weight", "proposal_generator.a"}
REFUSED = [
    # marks, what distinguishes the file, what is said
    ("detectron2", {"head.cls_subnet.0.weight", "head.bbox_subnet.0.weight"}, "a RetinaNet, a one-stage detector"),
    ("detectron2", {"head.cls_subnet.0.weight", "head.ctrness.weight"}, "an FCOS"),
    ("detectron2", R50 | {"roi_heads.mask_head.point_head.fc1.weight"}, "a PointRend"),
    ("detectron2", R50 | {"roi_heads.mask_point_head.fc1.weight"}, "a PointRend"),
    ("detectron2", R50 | {"roi_heads.mask_iou_head.fc1.weight"}, "a Mask Scoring R-CNN"),
    ("detectron2", R50 | {"sem_seg_head.predictor.weight"}, "a Panoptic FPN"),
    ("detectron2", {"sem_seg_head.predictor.weight", "backbone.bottom_up.a"}, "a network for segmentation"),
    ("detectron2", R50 | {"backbone.bottom_up.res3.0.conv2_offset.weight"}, "deformable convolutions"),
    ("detectron2", {"backbone.net.blocks.0.attn.qkv.weight"}, "a ViTDet"),
    ("detectron2", R50 | {"backbone.bottom_up.patch_embed.proj.weight"}, "a Swin transformer"),
    ("detectron2", R50 | {"backbone.bottom_up.s1.b1.f.a.weight"}, "a RegNet"),
    ("detectron2", R50 | {"backbone.stem.conv3.weight"}, "DeepLab's stem"),
    ("detectron2", R50 | {"backbone.top_block.p6.weight"}, "RetinaNet's levels"),
    ("detectron2", R50 | {"proposal_generator.rpn_head.conv.conv1.weight"}, "whose RPN has several convolutions"),
    ("detectron2", {"proposal_generator.rpn_head.conv.weight"}, "an RPN alone"),
    ("detectron2", {"backbone.bottom_up.x"}, "no Fast, Faster, Mask or Cascade R-CNN"),
    ("detectron2", R50 - {"backbone.bottom_up.stem.conv1.norm.weight"}, "is no ResNet with normalisation"),
    ("mmdetection", {"bbox_head.retina_cls.weight"}, "a RetinaNet, a one-stage detector"),
    ("mmdetection", {"bbox_head.conv_centerness.weight"}, "an FCOS"),
    ("mmdetection", {"bbox_head.transformer.encoder.weight"}, "a DETR"),
    ("mmdetection", {"bbox_head.convs_pred.0.weight"}, "a one-stage detector"),
    ("mmdetection", {"roi_head.keypoint_head.a"}, "a Keypoint R-CNN"),
    ("mmdetection", {"roi_head.point_head.a"}, "a PointRend"),
    ("mmdetection", {"roi_head.mask_iou_head.a"}, "a Mask Scoring R-CNN"),
    ("mmdetection", {"roi_head.grid_head.a"}, "a Grid R-CNN"),
    ("mmdetection", {"roi_head.semantic_head.a"}, "a Hybrid Task Cascade"),
    ("mmdetection", {"rpn_head.init_proposal_bboxes.weight"}, "a Sparse R-CNN"),
    ("mmdetection", {"rpn_head.stages.0.a"}, "a Cascade RPN"),
    ("mmdetection", {"backbone.layer2.0.conv2.conv_offset.weight"}, "deformable convolutions"),
    ("mmdetection", {"backbone.patch_embed.projection.weight"}, "a transformer"),
    ("mmdetection", {"backbone.stem.0.weight"}, "a stem of three convolutions"),
    ("mmdetection", {"backbone.layer1.0.convs.0.weight"}, "a Res2Net"),
    ("mmdetection", {"backbone.layer2.0.context_block.a"}, "attention blocks"),
    ("mmdetection", {"neck.1.refine.a"}, "a second neck"),
    ("mmdetection", {"neck.pafpn_convs.0.conv.weight"}, "a PAFPN"),
    ("torchvision", {"head.regression_head.bbox_ctrness.weight"}, "an FCOS"),
    ("torchvision", {"head.classification_head.module_list.0.weight"}, "an SSD"),
    ("torchvision", {"head.classification_head.cls_logits.weight"}, "a RetinaNet, a one-stage detector"),
    ("torchvision", {"backbone.features.0.weight", "roi_heads.a"}, "a backbone without a pyramid"),
    ("torchvision", {"fc.weight", "conv1.weight"}, "a classification network"),
]


@pytest.mark.parametrize(
    ("library", "names", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_refusals_name_the_kind(library: str, names: set[str], said: str) -> None:
    read: Any = {"detectron2": read_layout, "mmdetection": mmdetection.read_layout, "torchvision": find_builder}[
        library
    ]
    with pytest.raises(CheckpointError, match=said):
        read({name: torch.zeros(4, 1) for name in names})


def test_every_mark_is_among_the_refusals() -> None:
    for library in ("detectron2", "mmdetection", "torchvision"):
        marks = getattr(kinds, library.upper())
        found = {kind for _, names, _ in REFUSED for _, kind in marks if _is_said(names, marks, kind)}
        assert found == {kind for _, kind in marks}


def _is_said(names: set[str], marks: kinds.Marks, kind: str) -> bool:
    try:
        kinds.refuse(names, "anyone", marks)
    except CheckpointError as error:
        return kind in str(error)
    return False


def test_other_refusals() -> None:
    rotated = {"proposal_generator.rpn_head.objectness_logits.weight": torch.zeros(3, 1)}
    rotated |= {"proposal_generator.rpn_head.anchor_deltas.weight": torch.zeros(15, 1)}
    with pytest.raises(CheckpointError, match="a detector of rotated boxes"):
        read_layout(rotated | {"roi_heads.box_predictor.cls_score.weight": torch.zeros(4, 1)})
    with pytest.raises(CheckpointError, match="the backbone has 5 blocks in its third stage"):
        resnet_of(5)
    with pytest.raises(CheckpointError, match="the backbone is resnext50_64x32d, where resnet18"):
        resnet_of(6, torch.zeros(2048, 32, 3, 3))
    assert resnet_of(6, torch.zeros(128, 4, 3, 3)) == "resnext50_32x4d" and resnet_of(6, None, False) == "resnet34"


def test_a_grouped_network_by_torchvisions_name() -> None:
    with torch.device("meta"):
        body: Any = resnet_fpn("resnext101_32x8d", norm="batch").body
    conv = body["layer1"][0].conv2
    assert (conv.groups, conv.out_channels) == (32, 256) and len(body["layer3"]) == 23
