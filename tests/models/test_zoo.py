"""The builders: torchvision's arguments, parameter counts, weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torchvision.models import detection as reference

from detection.anchors import AnchorGenerator
from detection.losses import CIoULoss, GIoULoss, OverlapLoss
from detection.models import zoo
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import FastRCNNPredictor, TwoFCHead
from detection.models.rpn import RPNHead
from detection.recipes import rebuild
from detection.weights import CheckpointError

TWINS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    name: (getattr(zoo, name), getattr(reference, name))
    for name in (
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
    )
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert count(zoo.fasterrcnn_resnet50_fpn(norm="frozen")) == 41_755_286
        assert count(zoo.fasterrcnn_resnet50_fpn_v2()) == 43_712_278
        assert count(zoo.fasterrcnn_mobilenet_v3_large_fpn(norm="frozen")) == 19_386_354
        assert count(zoo.fasterrcnn_mobilenet_v3_large_320_fpn(norm="frozen")) == 19_386_354
        v1 = zoo.fasterrcnn_resnet50_fpn(norm="frozen", num_classes=81)
        assert count(v1.backbone) == 26_799_296
        # Detectron2's detector has no box row for the background.
        assert count(v1) - 4 * 1025 == 41_699_936


@pytest.mark.parametrize("name", TWINS)
def test_keys_shapes_and_gradients_are_torchvisions(name: str) -> None:
    ours, theirs = TWINS[name]
    with torch.device("meta"):
        a, b = ours(num_classes=7), theirs(weights=None, weights_backbone=None, num_classes=7)
    assert [(k, v.shape) for k, v in a.state_dict().items()] == [(k, v.shape) for k, v in b.state_dict().items()]
    assert [(k, p.requires_grad) for k, p in a.named_parameters()] == [
        (k, p.requires_grad) for k, p in b.named_parameters()
    ]


def test_defaults_are_torchvisions() -> None:
    theirs = inspect.signature(reference.FasterRCNN.__init__).parameters
    ours = inspect.signature(zoo.faster_rcnn).parameters
    assert set(theirs) - set(ours) == {"self", "kwargs"}
    own = {"soft_nms_sigma", "rpn", "roi_heads", "class_loss", "rpn_objectness_loss", "mask_loss"}
    own |= {f"{stage}{part}" for stage in ("", "rpn_") for part in ("box_coder", "box_loss")}
    own |= {f"{stage}_{part}" for stage in ("box", "rpn") for part in ("matcher", "sampler")}
    own |= {"in_channels", "image_depth", "size_divisible", "resizing", "mask_grid"}
    own |= {"mask_roi_pool", "mask_head", "mask_predictor"}  # those of torchvision's `MaskRCNN`
    assert set(ours) - set(theirs) == own
    theirs_values = {name: theirs[name].default for name in set(ours) - own if name != "backbone"}
    for name, value in theirs_values.items():
        if value is None or name == "num_classes":
            assert name in ("num_classes", "bbox_reg_weights", "image_mean", "image_std") or ours[name].default is None
        else:
            assert ours[name].default == value, name


@pytest.mark.parametrize("name", TWINS)
def test_settings_inside_are_torchvisions(name: str) -> None:
    ours, theirs = TWINS[name]
    with torch.device("meta"):
        theirs_model = theirs(weights=None, weights_backbone=None)
    ours_model: Any = ours()
    rpn, roi = theirs_model.rpn, theirs_model.roi_heads
    assert ours_model.rpn.pre_nms_top_n == rpn._pre_nms_top_n
    assert ours_model.rpn.post_nms_top_n == rpn._post_nms_top_n
    for attribute in ("nms_thresh", "score_thresh", "min_size"):
        assert getattr(ours_model.rpn, attribute) == getattr(rpn, attribute)
    for attribute in ("nms_thresh", "score_thresh", "detections_per_img"):
        assert getattr(ours_model.roi_heads, attribute) == getattr(roi, attribute)
    assert ours_model.roi_heads.box_coder.weights == roi.box_coder.weights
    assert ours_model.transform.min_size == theirs_model.transform.min_size
    assert ours_model.transform.max_size == theirs_model.transform.max_size
    assert ours_model.rpn.anchor_generator.sizes == rpn.anchor_generator.sizes
    assert ours_model.rpn.anchor_generator.num_anchors_per_location() == rpn.anchor_generator.num_anchors_per_location()
    assert ours_model.roi_heads.box_roi_pool.sampling_ratio == roi.box_roi_pool.sampling_ratio
    assert (ours_model.roi_heads.box_roi_pool.output_size,) * 2 == roi.box_roi_pool.output_size


SETTINGS: dict[str, Any] = {
    "num_classes": 3,
    "weights": None,
    "weights_backbone": None,
    "trainable_backbone_layers": 2,
    "min_size": 100,
    "max_size": 150,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.2, 0.2, 0.2],
    "rpn_pre_nms_top_n_train": 11,
    "rpn_pre_nms_top_n_test": 12,
    "rpn_post_nms_top_n_train": 13,
    "rpn_post_nms_top_n_test": 14,
    "rpn_nms_thresh": 0.61,
    "rpn_fg_iou_thresh": 0.62,
    "rpn_bg_iou_thresh": 0.23,
    "rpn_batch_size_per_image": 15,
    "rpn_positive_fraction": 0.4,
    "rpn_score_thresh": 0.01,
    "box_score_thresh": 0.02,
    "box_nms_thresh": 0.33,
    "box_detections_per_img": 16,
    "box_fg_iou_thresh": 0.54,
    "box_bg_iou_thresh": 0.45,
    "box_batch_size_per_image": 17,
    "box_positive_fraction": 0.5,
    "bbox_reg_weights": (1.0, 2.0, 3.0, 4.0),
}


@pytest.mark.filterwarnings("ignore:Changing trainable_backbone_layers has no effect")  # torchvision's own
@pytest.mark.parametrize("name", TWINS)
def test_torchvisions_arguments_reach_their_places(name: str) -> None:
    ours, theirs = TWINS[name]
    with torch.device("meta"):
        theirs(**SETTINGS)  # torchvision takes the same call
    model: Any = ours(**SETTINGS)
    rpn, roi = model.rpn, model.roi_heads
    assert model.num_classes == 3
    assert (rpn.pre_nms_top_n, rpn.post_nms_top_n) == (
        {"training": 11, "testing": 12},
        {"training": 13, "testing": 14},
    )
    assert (rpn.nms_thresh, rpn.matcher.fg_iou_thresh, rpn.matcher.bg_iou_thresh) == (0.61, 0.62, 0.23)
    assert (rpn.sampler.batch_size_per_image, rpn.sampler.max_positive, rpn.score_thresh) == (15, 6, 0.01)
    assert (roi.score_thresh, roi.nms_thresh, roi.detections_per_img) == (0.02, 0.33, 16)
    assert (roi.matcher.fg_iou_thresh, roi.matcher.bg_iou_thresh) == (0.54, 0.45)
    assert (roi.sampler.batch_size_per_image, roi.sampler.max_positive) == (17, 8)
    assert roi.box_coder.weights == (1.0, 2.0, 3.0, 4.0)
    assert (model.transform.min_size, model.transform.max_size) == ((100,), 150)
    assert model.transform.mean.flatten().tolist() == [0.5] * 3
    assert model.transform.std.flatten().tolist() == pytest.approx([0.2] * 3)


def test_parts_can_be_replaced() -> None:
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator([(16, 32)] * 3),
        "rpn_head": RPNHead(256, 6),
        "box_roi_pool": RoIPooler(5, num_levels=2),
        "box_head": TwoFCHead(256, 5, 64),
        "box_predictor": FastRCNNPredictor(64, 9),
    }
    model = zoo.fasterrcnn_mobilenet_v3_large_fpn(**parts, min_size=64, max_size=64)
    assert model.num_classes == 9
    assert model.rpn.anchor_generator is parts["rpn_anchor_generator"] and model.rpn.head is parts["rpn_head"]
    assert model.roi_heads.box_predictor is parts["box_predictor"]
    losses = model.train()(
        [torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([8])}]
    )
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("build", [zoo.fasterrcnn_mobilenet_v3_large_fpn, zoo.fasterrcnn_resnet50_fpn_v2])
def test_heads_follow_the_anchors(build: Callable[..., nn.Module]) -> None:
    levels = 3 if build is zoo.fasterrcnn_mobilenet_v3_large_fpn else 5
    with torch.device("cpu"):
        model: Any = build(rpn_anchor_generator=AnchorGenerator([(16, 32)] * levels, (1.0,)), num_classes=2)
    assert model.rpn.head.cls_logits.out_channels == 2


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "fasterrcnn_efficientnet_lite0_fpn",
    ],
)
def test_the_command_line_builds_what_a_call_builds(name: str) -> None:
    """jsonargparse hands over all arguments that it finds, also those behind `**kwargs`."""
    parser = ArgumentParser()
    parser.add_function_arguments(getattr(zoo, name))
    options = {"weights_backbone": None} if "lite0" in name else {}
    arguments = parser.parse_object({"num_classes": 3, **options}).as_dict()
    assert "rpn_nms_thresh" in arguments  # they are found
    with torch.device("meta" if "resnet50" in name else "cpu"):
        given, called = getattr(zoo, name)(**arguments), getattr(zoo, name)(num_classes=3, **options)
    assert str(given) == str(called)
    for part in ("rpn", "roi_heads", "transform"):
        a, b = (plain_settings(getattr(model, part)) for model in (given, called))
        assert a and a == b
    if "resnet50" not in name:
        assert torch.equal(given.transform.mean, called.transform.mean)
        assert torch.equal(given.transform.std, called.transform.std)


def plain_settings(part: nn.Module) -> dict[str, Any]:
    plain = (int, float, tuple, dict)
    return {key: value for key, value in vars(part).items() if isinstance(value, plain) and not key.startswith("_")}


def test_create_faster_rcnn() -> None:
    with torch.device("meta"):
        model = zoo.create_faster_rcnn(5)
    assert model.num_classes == 5
    assert type(model.roi_heads.box_head).__name__ == "ConvFCHead"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_are_not_there_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"fasterrcnn_resnet50_fpn_v2_coco-.*nothing is downloaded"):
        zoo.create_faster_rcnn(5, pretrained=True)
    with pytest.raises(FileNotFoundError, match=r"no weights at nowhere\.pth: give one of COCO_V1"):
        zoo.fasterrcnn_mobilenet_v3_large_fpn(weights="nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"no weights at IMAGENET"):
        zoo.fasterrcnn_resnet_fpn(weights="IMAGENET")


@pytest.fixture
def coco_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of torch.hub, in another place."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def randomise(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights with statistics so small that the epsilon of normalisation counts, and with outputs of ordinary size."""
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.005, 0.01)
        elif "body" in name and name.endswith(("bn1.weight", "bn2.weight", "bn3.weight")):
            value.fill_(0.01 if "bn3" in name else 0.08)
    return state


@pytest.mark.slow
def test_weights_of_torchvision_give_its_features(coco_cache: Path) -> None:
    """Its COCO_V1 weights go without the epsilon of frozen normalisation; a rebuilt model has to know that too."""
    weights = reference.FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    state = randomise(reference.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    torch.save(state, coco_cache / Path(weights.url).name)
    theirs = reference.fasterrcnn_resnet50_fpn(weights=weights).eval()
    image = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def difference(model: nn.Module) -> float:
        expected = theirs.backbone.body(image)["3"]
        return float((model.eval().backbone.body(image)["3"] - expected).abs().max() / expected.abs().max())

    for given in (weights, "COCO_V1", "DEFAULT"):
        ours = zoo.fasterrcnn_resnet50_fpn(weights=given)
        assert ours.num_classes == 91 and difference(ours) < 1e-5
    again = rebuild(ours.recipe)
    again.load_state_dict(ours.state_dict())
    assert difference(again) < 1e-5
    # A file may be anybody's, and keeps the epsilon.
    assert difference(zoo.fasterrcnn_resnet50_fpn(weights=coco_cache / Path(weights.url).name)) > 1e-4
    flags = [[(k, p.requires_grad) for k, p in model.named_parameters()] for model in (ours, theirs, again)]
    assert flags[0] == flags[1] == flags[2]


@pytest.mark.slow
def test_create_faster_rcnn_from_coco_has_a_fresh_predictor(coco_cache: Path) -> None:
    weights = reference.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1
    state = randomise(reference.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None))
    torch.save(state, coco_cache / Path(weights.url).name)
    model = zoo.create_faster_rcnn(5, pretrained=True)
    assert model.num_classes == 5
    assert torch.equal(model.backbone.body.layer4[0].conv1.weight, state["backbone.body.layer4.0.conv1.weight"])
    assert not model.backbone.body.conv1.weight.requires_grad
    with torch.device("meta"):
        again = rebuild(model.recipe)
    assert [(k, p.requires_grad, p.shape) for k, p in again.named_parameters()] == [
        (k, p.requires_grad, p.shape) for k, p in model.named_parameters()
    ]


@pytest.mark.parametrize("loss", [GIoULoss(2.0), CIoULoss()])
def test_overlap_losses_train_both_stages_and_come_back_from_a_checkpoint(loss: OverlapLoss) -> None:
    torch.manual_seed(0)
    model = zoo.fasterrcnn_efficientnet_lite0_fpn(
        num_classes=3, weights_backbone=None, min_size=64, max_size=96, rpn_box_loss=loss, box_loss=loss
    )
    target = {"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([1])}
    losses = model.train()([torch.rand(3, 64, 80)], [target])
    torch.stack(list(losses.values())).sum().backward()
    assert 0 < losses["loss_box_reg"] < 2 * loss.weight and 0 < losses["loss_rpn_box_reg"] < 2 * loss.weight
    again = rebuild(model.recipe or {})
    assert type(again.rpn.box_loss) is type(loss) and again.roi_heads.box_loss.weight == loss.weight


def test_weights_of_another_detector_are_refused_in_a_line(tmp_path: Path) -> None:
    torch.save(zoo.fasterrcnn_resnet_fpn(num_classes=4).state_dict(), tmp_path / "mine.pth")
    wanted = r"mine\.pth: these are not the weights of this detector: size mismatch for roi_heads\.box_predictor.*"
    with pytest.raises(CheckpointError, match=wanted) as refused:
        zoo.fasterrcnn_resnet_fpn(num_classes=7, weights=tmp_path / "mine.pth")
    assert "\n" not in str(refused.value)
