"""How long a fine-tuning is, at what rate, and how strongly its images are changed, by how many images there are.

The rule, of which `docs/settings.md` has the table and the sources, is for a detector that has learned a large set. It
is one of thumb: it was not fitted to measurements of this project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from inspect import signature
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from detection.data.datamodule import DetectionDataModule
from detection.training.module import DetectionModule

EPOCHS = 12  # the "1x" of MMDetection
LEAST_SEEN = 8_000  # images, or 500 steps of 16: BiT (Kolesnikov et al. 2020) gives its smallest sets 500 steps
MOST_SEEN = 1_440_000  # images, or 90,000 steps of 16: the "1x" of Detectron2
# Images of COCO by which training from scratch is far from, and as good as, one that goes on (He et al. 2019).
FEW, MANY = 1_000, 10_000
RATES = {"few": 0.005, "some": 0.01, "many": 0.02}  # of SGD for 16 images; 0.02 is that of training from ImageNet
PHOTOMETRIC = 0.5  # where each image is seen more often than in the "1x"


@dataclass(frozen=True, slots=True)
class BySize:
    """What follows from the number of training images.

    Attributes:
        max_epochs: of the trainer.
        lr: of the model, for 16 images.
        photometric: of the data.
    """

    max_epochs: int
    lr: float
    photometric: float


def by_size(images: int) -> BySize:
    """The rule for so many training images, at least one."""
    epochs = max(1, min(max(EPOCHS, math.ceil(LEAST_SEEN / images)), MOST_SEEN // images))
    kind = "few" if images < FEW else "some" if images < MANY else "many"
    return BySize(epochs, RATES[kind], PHOTOMETRIC if epochs > EPOCHS else 0.0)


def follow_size(config: Namespace, data: DetectionDataModule) -> None:
    """Fill in, aloud, what follows from the number of training images and has its default. What was given stays.

    Args:
        config: of a run, its trainer and its model.
        data: with a training split.
    """
    images = len(data.read("train").records)
    rule, trainer = by_size(max(1, images)), config.trainer
    ends = trainer.max_steps != -1 or trainer.max_epochs is not None or trainer.max_time is not None
    given = {
        "trainer.max_epochs": ends,
        "model.lr": config.model.lr != _default(DetectionModule, "lr"),
        "data.photometric": data.hparams["photometric"] != _default(DetectionDataModule, "photometric"),
    }
    values = {"trainer.max_epochs": rule.max_epochs, "model.lr": rule.lr, "data.photometric": rule.photometric}
    filled = {name: value for name, value in values.items() if not given[name]}
    for name, value in filled.items():
        if name.startswith("data."):
            data.hparams["photometric"] = value
        else:
            config[name] = value
    became = ", ".join(f"{name} {value:g}" for name, value in filled.items()) or "nothing"
    stays = [{"trainer.max_epochs": "the end of the run"}.get(name, name) for name in given if given[name]]
    kept = f"; given: {', '.join(stays)}" if stays else ""
    rank_zero_info(f"by_size: from {images} training images follows {became}{kept}")


def _default(part: Any, name: str) -> Any:
    return signature(part).parameters[name].default
