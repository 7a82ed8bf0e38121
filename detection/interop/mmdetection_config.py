"""MMDetection's configuration, a Python program, read as text: assignments of literals, of which nothing is run.

A checkpoint has it in its `meta`, and a run writes it into its folder, in both with the bases that it inherits from in
it already. A value that is not written as a literal is refused only where it is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detection.anchors import AnchorGenerator
from detection.boxes import BoxCoder
from detection.interop.python_text import LARGEST, Unread, parse
from detection.interop.rows import Style
from detection.interop.semantics import MaxIoUMatcher, Semantics, bounded
from detection.interop.told import Told
from detection.losses import SmoothL1Loss
from detection.matching import Matcher
from detection.models.norms import Norm
from detection.models.pooling import RoIPooler
from detection.weights import CheckpointError

DETECTORS = ("FasterRCNN", "MaskRCNN", "CascadeRCNN")


class _Node:
    """A place in a configuration, which knows its path, so that what is wrong there can be named."""

    def __init__(self, value: Any, path: str) -> None:
        self.value, self.path = value, path

    def __getitem__(self, name: str | int) -> _Node:
        path = f"{self.path}[{name}]" if isinstance(name, int) else f"{self.path}.{name}"
        if isinstance(self.value, Mapping) and isinstance(name, str):
            return _Node(self.value.get(name), path)
        if isinstance(self.value, list) and isinstance(name, int):
            return _Node(self.value[name] if name < len(self.value) else None, path)
        return _Node(None, path)

    def get(self, default: Any) -> Any:
        """The value, or the default where nothing is said; a default of a number wants a number, and so on."""
        if isinstance(self.value, Unread):
            raise CheckpointError(f"{self.path} (line {self.value.line}) is not written as a plain value, and nothing "
                                  "in a config is run: write the value there")  # fmt: skip
        if self.value is None:
            return default
        kinds = (int, float) if isinstance(default, int | float) and not isinstance(default, bool) else type(default)
        if default is not None and not isinstance(self.value, kinds):
            raise CheckpointError(f"{self.path} is {self.value!r}, where MMDetection has a value like {default!r}")
        return self.value

    def must(self, *values: Any) -> Any:
        """The value, the first of those that can be built where nothing is said.

        Raises:
            CheckpointError: it is another one.
        """
        value = self.get(None)
        if value is None:
            return values[0]
        if value not in values:
            can = ", ".join(str(item) for item in values)
            raise CheckpointError(f"{self.path} {value} can't be built: {can} can")
        return value

    def absent(self, *names: str) -> None:
        """Refuse what can't be built where it is there."""
        for name in names:
            inner = self[name]
            if inner.value not in (None, False):
                raise CheckpointError(f"{inner.path} can't be built")

    def each(self) -> list[_Node]:
        """The stages of a cascade; of other detectors the one that there is."""
        return [self[i] for i in range(len(self.value))] if isinstance(self.value, list) else [self]


def read_file(path: Path) -> Told:
    """`read_told` of a `.py` file.

    Raises:
        CheckpointError: there is none, or see `read_told`.
    """
    if not path.is_file() or path.suffix != ".py":
        raise CheckpointError(f"no config at {path}: give the .py file that MMDetection writes into a run's folder")
    if path.stat().st_size > LARGEST:
        raise CheckpointError("too large for a configuration")
    return read_told(path.read_text(encoding="utf-8", errors="replace"))


def is_config(text: str) -> bool:
    """Whether a text is that of a configuration with a model in it."""
    try:
        return isinstance(parse(text).get("model"), dict)
    except CheckpointError:
        return False


def read_told(text: str) -> Told:
    """What a configuration says of its detector.

    Raises:
        CheckpointError: it inherits from others, or says something that can't be built, by name.
    """
    config = parse(text)
    if "_base_" in config:
        raise CheckpointError("_base_ names other files: give the config that MMDetection writes into a run's folder, "
                              "or the checkpoint itself, which both have all in them")  # fmt: skip
    if not isinstance(config.get("model"), dict):
        raise CheckpointError("its config says nothing of a model")
    model = _Node(config["model"], "model")
    kind = model["type"].must(*DETECTORS)
    train, test = (_Node(config["model"].get(name) or config.get(name), f"model.{name}")
                   for name in ("train_cfg", "test_cfg"))  # fmt: skip
    heads = model["roi_head"]["bbox_head"].each()
    arguments = _sizes(config)
    if model["rpn_head"].value is not None:
        arguments |= _rpn(model["rpn_head"], train, test)
    if model["roi_head"].value is not None:
        arguments |= _boxes(model["roi_head"], heads, train["rcnn"].each(), test["rcnn"])
    arguments["semantics"] = _semantics(train["rpn"], model["roi_head"], len(heads))
    masks = isinstance(model["roi_head"]["mask_head"].value, dict)
    if masks:
        _check_masks(model["roi_head"])
        arguments["mask_roi_pool"] = _pooler(model["roi_head"]["mask_roi_extractor"], 14)
    backbone = model["backbone"]
    pixels = _Node(model["data_preprocessor"].value or config.get("img_norm_cfg"), "model.data_preprocessor")
    _check_backbone(backbone, model["neck"])
    shape = {"depth": backbone["depth"].get(None), "num_classes": heads[0]["num_classes"].get(None)}
    if model["roi_head"].value is not None:
        if kind != "CascadeRCNN" and heads[0]["num_classes"].get(80) > 1:
            shape["agnostic"] = heads[0]["reg_class_agnostic"].get(False)
        shape |= {"mask": masks, "stages": len(heads) if kind == "CascadeRCNN" else 1}
    if shape["num_classes"] is not None:
        shape["num_classes"] += 1
    stride_in_1x1 = backbone["style"].must("pytorch", "caffe") == "caffe"
    bgr, mean, std = stride_in_1x1, None, None
    if pixels.value is not None:
        bgr = not (pixels["bgr_to_rgb"].get(False) or pixels["to_rgb"].get(False))
        mean, std = (tuple(pixels[name].get([])[:: -1 if bgr else 1]) for name in ("mean", "std"))
        if not len(mean) == len(std) == 3:
            raise CheckpointError(f"{pixels.path}: images that are not normalised by a mean and std of three channels "
                                  "can't be built")  # fmt: skip
    trained = min(5, 4 - backbone["frozen_stages"].get(-1)) if backbone["frozen_stages"].value is not None else None
    return Told(
        arguments,
        {name: value for name, value in shape.items() if value is not None},
        Style(stride_in_1x1, bgr, mean, std),
        trained,
        norm=_norm(backbone),
    )


def _check_backbone(backbone: _Node, neck: _Node) -> None:
    backbone["type"].must("ResNet", "ResNeXt")
    backbone["norm_cfg"]["type"].must("BN", "SyncBN", "GN")
    backbone.absent("dcn", "plugins", "deep_stem", "avg_down")
    neck["type"].must("FPN")
    neck["start_level"].must(0)
    neck["num_outs"].must(5)
    neck.absent("add_extra_convs", "no_norm_on_lateral", "relu_before_extra_convs")
    neck["upsample_cfg"]["mode"].must("nearest")


def _norm(backbone: _Node) -> Norm:
    """How the backbone's normalisation trains."""
    if backbone["norm_cfg"]["type"].value == "GN":
        return "group"
    learns = backbone["norm_cfg"]["requires_grad"]
    if not backbone["norm_eval"].get(True):
        learns.must(True)
        return "batch"
    return "affine" if learns.get(True) else "frozen"


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the images in evaluation, which stand in the pipeline."""
    places = [
        _Node(config.get("test_dataloader"), "test_dataloader")["dataset"]["pipeline"],
        _Node(config.get("data"), "data")["test"]["pipeline"],
        _Node(config.get("test_pipeline"), "test_pipeline"),
    ]
    pipeline = next((place for place in places if isinstance(place.value, list)), None)
    if pipeline is None:
        return {}
    for step in pipeline.each():
        if step["type"].value == "MultiScaleFlipAug":
            return _side(step["img_scale"])
        if step["type"].value == "Resize":
            step["keep_ratio"].must(True)
            return _side(step["scale"] if step["scale"].value is not None else step["img_scale"])
    return {}


def _side(scale: _Node) -> dict[str, Any]:
    sides = scale.get([1333, 800])
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise CheckpointError(f"{scale.path} {sides} can't be built: one pair of sides can, such as (1333, 800)")
    return {"min_size": min(sides), "max_size": max(sides)}


def _rpn(head: _Node, train: _Node, test: _Node) -> dict[str, Any]:
    head["type"].must("RPNHead")
    head["num_convs"].must(1)
    head["loss_cls"]["use_sigmoid"].must(True)
    head["loss_cls"]["loss_weight"].must(1, 1.0)
    assigner, sampler = train["rpn"]["assigner"], train["rpn"]["sampler"]
    _check_assigner(assigner, True)
    _check_sampler(sampler, False)
    test["rpn"]["nms"]["type"].must("nms")
    test["rpn"]["min_bbox_size"].must(0)
    # MMDetection 2 and 1 had some of these under other names, or in the head.
    proposals = train["rpn_proposal"]
    return {
        "rpn_anchor_generator": _anchors(head["anchor_generator"]),
        "rpn_box_coder": _coder(head["bbox_coder"]),
        "rpn_box_loss": _box_loss(head["loss_bbox"]),
        "rpn_fg_iou_thresh": assigner["pos_iou_thr"].get(0.7),
        "rpn_bg_iou_thresh": assigner["neg_iou_thr"].get(0.3),
        "rpn_batch_size_per_image": sampler["num"].get(256),
        "rpn_positive_fraction": sampler["pos_fraction"].get(0.5),
        "rpn_pre_nms_top_n_train": proposals["nms_pre"].get(2000),
        "rpn_post_nms_top_n_train": proposals["max_per_img"].get(proposals["max_num"].get(1000)),
        "rpn_pre_nms_top_n_test": test["rpn"]["nms_pre"].get(1000),
        "rpn_post_nms_top_n_test": test["rpn"]["max_per_img"].get(test["rpn"]["max_num"].get(1000)),
        "rpn_nms_thresh": test["rpn"]["nms"]["iou_threshold"].get(test["rpn"]["nms_thr"].get(0.7)),
    }


def _semantics(train: _Node, roi_head: _Node, stages: int) -> Semantics:
    """The rules of training, as far as the library has settings for them."""
    train["pos_weight"].must(-1)
    lowest, border = train["assigner"]["min_pos_iou"], train["allowed_border"]
    values: dict[str, Any] = {}
    if train["assigner"].value is not None:
        values["min_pos_iou"] = lowest.get(0.0)
    if border.value is not None:
        values["allowed_border"] = border.get(-1)
    if stages > 1:
        weights = roi_head["stage_loss_weights"]
        values["stage_loss_weights"] = weights.get([1.0, 0.5, 0.25])
        if len(values["stage_loss_weights"]) != stages:
            raise CheckpointError(f"{weights.path} {weights.value} can't be built: one for each of {stages} stages can")
    return Semantics("mmdetection", **values)


def _anchors(generator: _Node) -> AnchorGenerator:
    generator["type"].must("AnchorGenerator")
    generator["scale_major"].must(True)
    generator["centers"].must(None)
    strides, ratios = generator["strides"].get([4, 8, 16, 32, 64]), generator["ratios"].get([0.5, 1.0, 2.0])
    bases = generator["base_sizes"].get(strides)
    scales = generator["scales"].get(None)
    if scales is None:
        octaves = generator["scales_per_octave"].get(1)
        scales = [generator["octave_base_scale"].get(8) * 2 ** (i / octaves) for i in range(octaves)]
    sizes = [[base * scale for scale in scales] for base in bases]
    return AnchorGenerator(sizes, ratios, generator["center_offset"].get(0.0), round_anchors=False)


def _boxes(roi_head: _Node, heads: list[_Node], train: list[_Node], test: _Node) -> dict[str, Any]:
    roi_head["type"].must("StandardRoIHead", "CascadeRoIHead")
    for head in heads:
        head["type"].must("Shared2FCBBoxHead", "ConvFCBBoxHead", "Shared4Conv1FCBBoxHead")
        head["loss_cls"]["type"].must("CrossEntropyLoss")
        head["loss_cls"]["use_sigmoid"].must(False)
        head["loss_cls"]["loss_weight"].must(1, 1.0)
        head.absent("reg_decoded_bbox", "with_avg_pool")
        if len(heads) > 1 and heads[0]["num_classes"].get(80) > 1 and not head["reg_class_agnostic"].get(False):
            raise CheckpointError(f"{head.path}.reg_class_agnostic False can't be built in a cascade: True can")
    for stage in train:
        _check_assigner(stage["assigner"], False if len(heads) > 1 else None)
        _check_sampler(stage["sampler"], True)
        stage["pos_weight"].must(-1)
    _check_stages(train)
    test["nms"]["type"].must("nms")
    losses = [head["loss_bbox"].value for head in heads]
    if any(loss != losses[0] for loss in losses):
        raise CheckpointError(f"{roi_head.path}.bbox_head: stages with different loss_bbox can't be built")
    weights = [_coder(head["bbox_coder"], [0.1, 0.1, 0.2, 0.2]).weights for head in heads]
    assigner, sampler = train[0]["assigner"], train[0]["sampler"]
    arguments: dict[str, Any] = {
        "box_roi_pool": _pooler(roi_head["bbox_roi_extractor"], 7),
        "box_loss": _box_loss(heads[0]["loss_bbox"]),
        "box_batch_size_per_image": sampler["num"].get(512),
        "box_positive_fraction": sampler["pos_fraction"].get(0.25),
        "box_score_thresh": test["score_thr"].get(0.05),
        "box_nms_thresh": test["nms"]["iou_threshold"].get(test["nms"]["iou_thr"].get(0.5)),
        "box_detections_per_img": test["max_per_img"].get(100),
    }
    if len(heads) > 1:
        ious = [stage["assigner"]["pos_iou_thr"].get(0.5 + 0.1 * i) for i, stage in enumerate(train)]
        return arguments | {"cascade_iou_thresh": ious, "cascade_bbox_reg_weights": [list(w) for w in weights]}
    high, low = (assigner[f"{kind}_iou_thr"].get(0.5) for kind in ("pos", "neg"))
    if assigner.value is not None:
        lowest = assigner["min_pos_iou"].get(0.0)
        arguments["box_matcher"] = MaxIoUMatcher(high, low, lowest) if _low_quality(assigner) else Matcher(high, low)
    single = {"bbox_reg_weights": list(weights[0]), "box_fg_iou_thresh": high, "box_bg_iou_thresh": low}
    return arguments | single


def _check_masks(roi_head: _Node) -> None:
    head = roi_head["mask_head"]
    head["type"].must("FCNMaskHead")
    head["upsample_cfg"]["type"].must("deconv")
    head["loss_mask"]["loss_weight"].must(1, 1.0)


def _check_assigner(assigner: _Node, low_quality: bool | None) -> None:
    """Refuse what can't be built; `low_quality` says which value of `match_low_quality` can, None that both can."""
    assigner["type"].must("MaxIoUAssigner")
    assigner["ignore_iof_thr"].must(-1)
    assigner["gt_max_assign_all"].must(True)
    matched = assigner["match_low_quality"]
    if assigner.value is None or low_quality is None:
        return
    if _low_quality(assigner) != low_quality:
        raise CheckpointError(f"{matched.path} {not low_quality} can't be built here: {low_quality} can")


def _low_quality(assigner: _Node) -> bool:
    """Whether the boxes with the highest IoU of an object are its own, as the assigner's default is."""
    return bool(assigner["match_low_quality"].get(True))


def _check_stages(train: list[_Node]) -> None:
    """Refuse stages of a cascade that differ in more than their IoU, which is both thresholds of each."""
    for stage in train if len(train) > 1 else []:
        high, low = (stage["assigner"][name] for name in ("pos_iou_thr", "neg_iou_thr"))
        pairs = [(low, high)] + [
            (stage["sampler"][name], train[0]["sampler"][name]) for name in ("num", "pos_fraction")
        ]
        for one, other in pairs:
            if one.value != other.value:
                raise CheckpointError(f"{one.path} {one.value} can't be built beside {other.path} {other.value}")


def _check_sampler(sampler: _Node, adds_objects: bool) -> None:
    sampler["type"].must("RandomSampler")
    sampler["neg_pos_ub"].must(-1)
    sampler["add_gt_as_proposals"].must(adds_objects)


def _coder(coder: _Node, stds: list[float] | None = None) -> BoxCoder:
    coder["type"].must("DeltaXYWHBBoxCoder")
    coder["target_means"].must([0.0, 0.0, 0.0, 0.0])
    coder["clip_border"].must(True)
    coder.absent("add_ctr_clamp")
    return bounded(BoxCoder([1 / std for std in coder["target_stds"].get(stds or [1.0, 1.0, 1.0, 1.0])]))


def _box_loss(loss: _Node) -> SmoothL1Loss:
    loss["loss_weight"].must(1, 1.0)
    kind = loss["type"].must("L1Loss", "SmoothL1Loss")
    return SmoothL1Loss(loss["beta"].get(1.0) if kind == "SmoothL1Loss" else 0.0)


def _pooler(extractor: _Node, side: int) -> RoIPooler:
    extractor["type"].must("SingleRoIExtractor")
    extractor["finest_scale"].must(56)
    layer = extractor["roi_layer"]
    layer["type"].must("RoIAlign")
    layer["pool_mode"].must("avg")
    given = layer["output_size"].get(layer["out_size"].get(side))  # MMDetection 2.0 had the other name
    return RoIPooler(given, layer["sampling_ratio"].get(0), layer["aligned"].get(True))
