"""Fast R-CNN and R-CNN whole: against Faster R-CNN on its own proposals, and trained from the command line."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from detection.batch import Batch
from detection.cli.configuration import CONFIGS
from detection.cli.fit import FitCLI
from detection.data import scenes
from detection.data.images import read_image
from detection.models.backbones import Backbone, resnet_fpn
from detection.models.compose import faster_rcnn
from detection.models.fast import accelerate
from detection.models.pooling import RoIPool, RoIPooler
from detection.models.precomputed import PrecomputedProposals
from detection.models.rcnn import RegionWarp
from detection.models.relatives import (
    fast_rcnn,
    fasterrcnn_resnet_c4,
    fasterrcnn_resnet_dc5,
    fastrcnn_efficientnet_lite0_fpn,
    fastrcnn_resnet_fpn,
    rcnn_efficientnet_lite0,
    rcnn_resnet,
)
from detection.models.two_stage import FasterRCNN
from detection.parts import FeatureMaps
from detection.recipes import rebuild
from detection.selective_search import SelectiveSearch
from detection.training.module import DetectionModule

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"colour_spaces": ["intensity"], "measures": ["TSF"], "scales": [100], "width": 100, "max_proposals": 60}
TINY: dict[str, dict[str, Any]] = {
    "fastrcnn_efficientnet_lite0_fpn": {"fpn_channels": 16, "weights_backbone": None},
    "fastrcnn_resnet_fpn": {"backbone_name": "resnet18"},
    "rcnn_efficientnet_lite0": {"crop_size": 32, "weights_backbone": None},
    "rcnn_resnet": {"crop_size": 32},
}


def make_batch(seed: int = 0) -> Batch:
    """Two images of noise, the second smaller, with objects and proposals around them and elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, 96, 128), generator=generator).to(torch.uint8)
    images[1, :, 80:], images[1, :, :, 100:] = 0, 0
    gt_boxes = torch.tensor([[[10.0, 10, 50, 60], [60, 20, 90, 70]], [[5, 5, 70, 60], [0, 0, 0, 0]]])
    corners = torch.rand((2, 40, 2, 2), generator=generator).sort(dim=2).values.flatten(2)
    proposals = torch.cat((gt_boxes[:, :1] + 2, corners * torch.tensor([100.0, 80, 100, 80])), dim=1)
    sizes = torch.tensor([[96, 128], [80, 100]])
    valid = torch.ones(2, 41, dtype=torch.bool)
    valid[1, 30:] = False
    return Batch(
        images,
        sizes,
        gt_boxes,
        torch.tensor([[1, 2], [2, 0]]),
        torch.tensor([[True, True], [True, False]]),
        sizes * 2,
        proposals=proposals * valid[..., None],
        proposals_valid=valid,
    )


class Frozen(nn.Module):
    """An RPN whose proposals are written down: wraps one and keeps what it gave, call by call."""

    def __init__(self, rpn: nn.Module) -> None:
        super().__init__()
        self.rpn = rpn
        self.given: list[Any] = []

    def forward(self, *args: Any) -> Any:
        proposals, losses = self.rpn(*args)
        self.given.append(proposals)
        return proposals, losses


def test_fast_rcnn_on_the_proposals_of_faster_rcnn_detects_the_same() -> None:
    torch.manual_seed(0)
    backbone = resnet_fpn("resnet18")
    faster = faster_rcnn(backbone, 3, box_score_thresh=0.0).eval()
    fast = fast_rcnn(backbone, 3, box_roi_pool=RoIPooler(), box_score_thresh=0.0).eval()
    fast.roi_heads.load_state_dict(faster.roi_heads.state_dict())
    faster.rpn = Frozen(faster.rpn)  # type: ignore[assignment]
    batch = make_batch()
    with torch.no_grad():
        expected = faster(batch)
        given = [torch.cat([getattr(p, name) for p in faster.rpn.given]) for name in ("boxes", "valid")]
        found = fast(replace(batch, proposals=given[0], proposals_valid=given[1]))
    assert sum(len(d["scores"]) for d in expected) > 10
    for a, b in zip(found, expected, strict=True):
        for name, value in b.items():
            assert torch.equal(a[name], value), name


@pytest.mark.parametrize("name", TINY)
def test_losses_reach_every_parameter_and_detections_are_in_original_pixels(name: str) -> None:
    torch.manual_seed(0)
    builder = globals()[name]
    model = builder(num_classes=3, box_score_thresh=0.0, box_detections_per_img=20, **TINY[name])
    batch = make_batch()
    losses, _ = model.train().run(batch, with_losses=True, with_detections=False)
    assert set(losses) == {"loss_classifier", "loss_box_reg"}
    torch.stack(list(losses.values())).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # The last level of a pyramid serves the RPN alone; all else must have learned something.
    idle = {name for name, p in trained.items() if p.grad is None or not p.grad.any()}
    assert all(p.grad is not None for p in trained.values()) and not {n for n in idle if "roi_heads" in n}, idle
    with torch.no_grad():
        losses, detections = model.eval().run(batch, with_losses=True, with_detections=True)
    assert all(loss.isfinite() for loss in losses.values())
    for detection, (height, width) in zip(detections, batch.original_sizes.tolist(), strict=True):
        assert len(detection["scores"]) == 20
        assert (detection["boxes"][:, 2:] > torch.tensor([50, 40])).any()
        assert (detection["boxes"] <= torch.tensor([width, height, width, height])).all()


def test_an_image_without_proposals_or_objects_trains_and_detects_nothing() -> None:
    batch = make_batch()
    assert batch.proposals is not None and batch.proposals_valid is not None
    empty = replace(
        batch,
        proposals=torch.zeros_like(batch.proposals),
        proposals_valid=torch.zeros_like(batch.proposals_valid),
        gt_valid=torch.zeros_like(batch.gt_valid),
    )
    for name, arguments in TINY.items():
        model = globals()[name](num_classes=3, box_score_thresh=0.0, **arguments)
        losses, _ = model.train().run(empty, with_losses=True, with_detections=False)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        assert total.item() == 0.0
        with torch.no_grad():
            detections = model.eval().run(empty, with_losses=False, with_detections=True)[1]
        assert [len(d["scores"]) for d in detections] == [0, 0]


def test_parts_are_those_of_the_papers() -> None:
    fast = fastrcnn_efficientnet_lite0_fpn(num_classes=3, weights_backbone=None, proposals_train=7, proposals_test=9)
    assert isinstance(fast.rpn, PrecomputedProposals) and fast.rpn.top_n == {"training": 7, "testing": 9}
    assert isinstance(fast.rpn.source, SelectiveSearch) and fast.rpn.source.width == 500
    assert isinstance(fast.roi_heads.box_roi_pool, RoIPool)
    assert fast.transform.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    warp = rcnn_resnet(crop_size=64).roi_heads.box_roi_pool
    assert isinstance(warp, RegionWarp) and (warp.output_size, warp.context) == (64, 5)

    class One(nn.Module):
        """A single map, which is pooled from: there is no coarser one for an RPN."""

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"0": nn.functional.avg_pool2d(images, 16)}

    pool = fast_rcnn(Backbone(One(), [3], (16,), out_channels=None)).roi_heads.box_roi_pool
    assert isinstance(pool, RoIPool) and pool.num_levels is None
    feature = torch.rand(1, 3, 4, 6)
    assert pool(FeatureMaps((feature,), (16,)), torch.tensor([[[0.0, 0, 95, 63]]])).max() == feature.max()


@pytest.mark.parametrize("name", TINY)
def test_a_recipe_makes_the_same_detector(name: str) -> None:
    search = SelectiveSearch(**QUICK)
    model = globals()[name](num_classes=4, proposal_source=search, box_score_thresh=0.3, **TINY[name])
    again = rebuild(model.recipe)
    again.load_state_dict(model.state_dict())
    assert again.rpn.source.settings == search.settings and again.roi_heads.score_thresh == 0.3
    assert again.num_classes == 4
    frozen = globals()[name](num_classes=4, **TINY[name] | {"norm": "frozen"})
    assert [p.requires_grad for p in rebuild(frozen.recipe).parameters()] == [
        p.requires_grad for p in frozen.parameters()
    ]


def test_weights_of_the_backbone_freeze_and_say_so() -> None:
    for builder, arguments in ((fastrcnn_efficientnet_lite0_fpn, {}), (rcnn_efficientnet_lite0, {"crop_size": 32})):
        model = builder(num_classes=2, **arguments)  # type: ignore[operator]
        again = rebuild(model.recipe)
        again.load_state_dict(model.state_dict())
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
        assert not all(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in fastrcnn_resnet_fpn(backbone_name="resnet18").parameters())


def test_pictures_alone_are_searched_as_they_are() -> None:
    """`model(images)` gives what the same proposals from the data give: the search sees pixels, nothing normalised."""
    torch.manual_seed(0)
    search = SelectiveSearch(**QUICK)
    arguments = {"min_size": 96, "max_size": 200, "box_score_thresh": 0.0, "proposal_source": search}
    model = fastrcnn_efficientnet_lite0_fpn(num_classes=3, fpn_channels=16, weights_backbone=None, **arguments).eval()
    pixels, _ = scenes.draw_scene(np.random.default_rng(3))
    image = torch.from_numpy(np.ascontiguousarray(pixels[:96, :128])).permute(2, 0, 1)
    boxes = torch.from_numpy(search(pixels[:96, :128]))[None]
    size = torch.tensor([[96, 128]])
    nothing = (torch.zeros(1, 1, 4), torch.zeros(1, 1).long(), torch.zeros(1, 1).bool())
    given = torch.ones(boxes.shape[:2], dtype=torch.bool)
    batch = Batch(image[None], size, *nothing, size, proposals=boxes, proposals_valid=given)
    with torch.no_grad():
        (expected,), (found,) = model(batch), model([image])
    assert len(expected["scores"]) > 5
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)
    model.train()
    losses = model([image / 255], [{"boxes": boxes[0, :2], "labels": torch.tensor([1, 2])}])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=4, val=2)


def configuration(name: str, data: Path, output: Path) -> Path:
    """A packaged configuration, made small: drawn scenes, a quick search, two steps, networks without weights."""
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    splits = {f"{split}_split": file for split, (file, _) in scenes.SPLITS.items()}
    splits |= {f"{split}_images": images for split, (_, images) in scenes.SPLITS.items()}
    content["data"] |= {"format": "coco", "root": str(data), "batch_size": 2, "num_workers": 0, "min_size": 64}
    content["data"] |= splits
    search = {"class_path": "detection.SelectiveSearch", "init_args": QUICK}
    content["data"]["proposals"]["init_args"] = {"search": search, "folder": str(output / "cache")}
    builder = content["model"]["detector"]["class_path"].rpartition(".")[2]
    content["model"]["detector"]["init_args"] |= TINY[builder] | {"proposal_source": search}
    content["trainer"] |= {"max_steps": 2, "check_val_every_n_epoch": 1, "accelerator": "cpu", "log_every_n_steps": 1}
    path = output / "config.yaml"
    path.write_text(yaml.safe_dump(content | {"output": str(output / "runs")}))
    return path


@pytest.mark.parametrize("name", ["bccd_fastrcnn", "bccd_rcnn"])
def test_the_packaged_configurations_train_from_the_command_line(name: str, data: Path, tmp_path: Path) -> None:
    cli = FitCLI(["--config", str(configuration(name, data, tmp_path))])
    before = [p.detach().clone() for p in cli.model.parameters()]
    cli.fit()
    assert any(not torch.equal(a, b) for a, b in zip(before, cli.model.parameters(), strict=True))
    (cache,) = (tmp_path / "cache").iterdir()
    assert len(list(cache.glob("*.npz"))) == 4 + 2
    (folder,) = (tmp_path / "runs" / name).iterdir()
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert [row["val/map"] for row in rows if row["val/map"]]
    loaded = DetectionModule.load_from_checkpoint(folder / "last.ckpt").detector
    accelerate(loaded, "cpu")  # as the run's: other kernels round otherwise
    images = [torch.from_numpy(read_image(path)).permute(2, 0, 1) for path in sorted((data / "val").iterdir())]
    found: list[list[dict[str, Tensor]]] = []
    for detector in (loaded, cli.model.detector):  # on pictures alone: the checkpoint knows how to search them
        detector.roi_heads.score_thresh = 0.0  # type: ignore[assignment]
        found.append(detector.predict(images[:1]))
    assert len(found[0][0]["scores"]) > 0
    for key, value in found[0][0].items():
        assert torch.equal(found[1][0][key], value), key


@pytest.mark.parametrize("build", [fasterrcnn_resnet_c4, fasterrcnn_resnet_dc5])
def test_one_map_of_stride_16_serves_proposals_and_heads(build: Callable[..., FasterRCNN]) -> None:
    torch.manual_seed(0)
    model = build(num_classes=3, min_size=64, max_size=96, rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=50)
    assert model.backbone.strides == (16,) and model.rpn.anchor_generator.num_anchors_per_location() == [15]
    target = {"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([1])}
    losses = model.train()([torch.rand(3, 64, 90)], [target])
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    again = rebuild(model.recipe or {})
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.slow
def test_two_processes_compute_proposals_once(data: Path, tmp_path: Path) -> None:
    config = configuration("bccd_fastrcnn", data, tmp_path)
    flags = ["--config", str(config), "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "1"]
    command = [sys.executable, str(ROOT / "scripts" / "fit.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("Selective Search on 4 images") == 1
    assert done.stderr.count("Selective Search on 2 images") == 1
    (folder,) = (tmp_path / "runs" / "bccd_fastrcnn").iterdir()
    assert (folder / "last.ckpt").is_file()
