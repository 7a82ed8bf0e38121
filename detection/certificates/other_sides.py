"""A detector as Detectron2 or MMDetection runs it, where they are installed: stage by stage, one image."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from detection.batch import Batch
from detection.certificates.sides import AbsentError, Side, Traced
from detection.data.spectral import Pixels
from detection.interop import detectron2, mmdetection_config
from detection.interop.python_text import parse
from detection.models.two_stage import FasterRCNN
from detection.weights import CheckpointError


def detectron2_side(state: Mapping[str, Tensor], model: FasterRCNN, config: Path | None) -> Side:
    """Detectron2's own model with a file's own tensors.

    Args:
        state: of the file, under its names.
        model: ours, whose settings it gets where there is no configuration.
        config: Detectron2's, nothing of which is run.

    Raises:
        AbsentError: Detectron2 is not installed, or does not take these tensors or settings.
    """
    try:
        from detectron2.config import get_cfg
        from detectron2.data.transforms import AugInput, ResizeShortestEdge
        from detectron2.modeling import build_model
    except ImportError as error:
        raise AbsentError(f"Detectron2 is not installed here ({error})") from error
    cfg = get_cfg()
    how = "the settings that this project reads from it" if config is None else config.name
    with tempfile.TemporaryDirectory() as folder:
        if config is None:
            config = Path(folder) / "settings.yaml"
            try:
                settings = detectron2.settings_of(model, config)
            except CheckpointError as error:
                raise AbsentError(f"Detectron2's settings of it are not known: {error}") from error
            config.write_text(yaml.safe_dump(settings))
        cfg.merge_from_file(str(config), allow_unsafe=False)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    network = build_model(cfg).eval()
    fitted = {name: value for name, value in state.items() if name not in ("pixel_mean", "pixel_std")}
    missing, extra = network.load_state_dict(fitted, strict=False)
    extra = [name for name in extra if "cell_anchors" not in name and "num_batches_tracked" not in name]
    missing = [name for name in missing if not name.endswith(("num_batches_tracked", "cell_anchors"))]
    if missing or extra:
        raise AbsentError(f"Detectron2's model does not take these tensors ({[*missing, *extra][0]})")
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    @torch.no_grad()
    def look(image: Pixels) -> Traced:
        given = AugInput(image[:, :, ::-1] if cfg.INPUT.FORMAT == "BGR" else image)  # as `DefaultPredictor` does
        resize(given)
        pixels = torch.from_numpy(given.image.astype("float32").transpose(2, 0, 1).copy())
        images = network.preprocess_image([{"image": pixels}])
        maps, rpn = network.backbone(images.tensor), network.proposal_generator
        levels = [maps[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(levels)
        proposals, _ = rpn(images, maps)
        (found,), _ = network.roi_heads(images, maps, proposals)
        height, width = image.shape[:2]
        scale = torch.tensor([width / pixels.shape[2], height / pixels.shape[1]]).repeat(2)
        more = {"masks": found.pred_masks[:, 0]} if found.has("pred_masks") else {}
        if found.has("pred_keypoints"):
            more["keypoints"] = F.pad(found.pred_keypoints[..., :2] * scale[:2], (0, 1), value=1.0)
        return Traced(
            {
                "boxes": found.pred_boxes.tensor * scale,
                "labels": found.pred_classes + 1,
                "scores": found.scores,
                **more,
            },
            [level[0] for level in levels],
            list(rpn.anchor_generator.cell_anchors),
            [level[0] for level in logits],
            [level[0].unflatten(0, (-1, 4)) for level in deltas],
            proposals[0].proposal_boxes.tensor,
        )

    return Side(f"Detectron2 {version('detectron2')} with {how}", look)


def mmdetection_side(state: Mapping[str, Tensor], text: str, prepare: Callable[[Pixels], Batch]) -> Side:
    """MMDetection's own model with a file's own tensors, on pixels that were resized here.

    Args:
        state: of the file, under its names.
        text: of its configuration, nothing of which is run.
        prepare: an image -> resized and padded `(1, 3, H, W)` uint8, whose pixels MMDetection normalises and pads.

    Raises:
        AbsentError: MMDetection is not installed, or there is no configuration to build it from.
    """
    try:
        import mmcv.ops
        from mmdet.registry import MODELS
        from mmdet.structures import DetDataSample
        from mmengine.config import ConfigDict
        from mmengine.registry import init_default_scope
    except Exception as error:  # compiled for other versions, it may raise anything
        raise AbsentError(f"MMDetection is not installed here ({' '.join(str(error).split())[:120]})") from error
    del mmcv
    settings = ConfigDict(_model_of(text))
    import mmdet.models  # noqa: F401, which registers what the settings name

    settings.pop("init_cfg", None)
    settings.backbone.pop("init_cfg", None)
    init_default_scope("mmdet")  # where a model looks for its preprocessor
    network = MODELS.build(settings).eval()
    missing, extra = network.load_state_dict(dict(state), strict=False)
    if bad := [name for name in (*missing, *extra) if not name.endswith("num_batches_tracked")]:
        raise AbsentError(f"MMDetection's model does not take these tensors ({bad[0]})")

    @torch.no_grad()
    def look(image: Pixels) -> Traced:
        batch = prepare(image)
        height, width = batch.image_sizes[0].tolist()
        pixels = batch.images[0, [2, 1, 0], :height, :width]  # MMDetection reads BGR
        scale = (width / image.shape[1], height / image.shape[0])
        sample = DetDataSample(metainfo={"img_shape": (height, width), "scale_factor": scale,
                                         "ori_shape": image.shape[:2]})  # fmt: skip
        given = network.data_preprocessor({"inputs": [pixels], "data_samples": [sample]}, False)
        levels = network.extract_feat(given["inputs"])
        logits, deltas = network.rpn_head(levels)
        proposals = network.rpn_head.predict(levels, given["data_samples"], rescale=False)
        (found,) = network.roi_head.predict(levels, proposals, given["data_samples"], rescale=False)
        boxes = found.bboxes / torch.tensor(scale).repeat(2)
        return Traced(
            {"boxes": boxes, "labels": found.labels + 1, "scores": found.scores},
            [level[0] for level in levels],
            list(network.rpn_head.prior_generator.base_anchors),
            [level[0] for level in logits],
            [level[0].unflatten(0, (-1, 4)) for level in deltas],
            proposals[0].bboxes,
        )

    return Side(f"MMDetection {version('mmdet')} with its own configuration, on pixels resized here", look)


def _model_of(text: str) -> dict[str, Any]:
    """The `model` of a configuration."""
    if not mmdetection_config.is_config(text):
        raise AbsentError("the file has no configuration of MMDetection, and none was given (--config)")
    model: dict[str, Any] = parse(text)["model"]
    return model
