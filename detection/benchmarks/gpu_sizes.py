"""How large everything is that `gpu.py` measures: on a GPU, and in its rehearsal on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["r50", "v2", "mask", "cascade"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured.

    Attributes:
        height, width: of the images in pixels, without padding.
        batch: images of a training step; where they don't fit into memory, half of them, and half of those.
        inference: images of a call.
        rounds: timed steps of each detector at most, after two that are thrown away.
        backbone: torchvision's name of the network of all detectors but v2, which is ResNet-50.
        options: of all detectors that are timed.
        compared: detectors whose numbers are compared with torchvision's.
        side: of the largest images for that.
        images: that the loader reads.
        workers: loader processes at most.
        fit: flags of the real training beside those of its configuration.
        backend: of `torch.compile`.
        rehearsal: whether this is one.
    """

    height: int = 800
    width: int = 1333
    batch: int = 16
    inference: tuple[int, ...] = (1, 16)
    rounds: int = 7
    backbone: str = "resnet50"
    options: Mapping[str, Any] = field(default_factory=dict)
    compared: tuple[Kind, ...] = ("r50", "mask", "v2")
    side: int = 512
    images: int = 512
    workers: int = 16
    fit: tuple[str, ...] = ()
    backend: str = "inductor"
    rehearsal: bool = False


REHEARSAL = Sizes(
    height=64,
    width=96,
    batch=2,
    inference=(1,),
    rounds=1,
    backbone="resnet18",
    options={
        "num_classes": 5,
        **{f"rpn_{n}_nms_top_n_{m}": 20 for n in ("pre", "post") for m in ("train", "test")},
        "box_batch_size_per_image": 16,
        "box_detections_per_img": 5,
    },
    compared=("r50",),
    side=96,
    images=8,
    workers=1,
    fit=(
        *("--data.min_size", "64", "--data.max_size", "96", "--data.num_workers", "0"),
        *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "2", "--trainer.log_every_n_steps", "1"),
        *("--model.detector.fpn_channels", "16", "--model.detector.weights_backbone", "null"),
    ),
    backend="eager",
    rehearsal=True,
)
