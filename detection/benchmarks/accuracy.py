"""AP of our detector and of torchvision's after the same training: same backbone, images, batches and evaluation.

Both run through `DetectionModule`, `DetectionDataModule` and `MeanAP`; the detector is all that differs. torchvision is
trained twice over: with the settings of the baseline (batch 8, 200 steps, one learning rate, horizontal flips), and
with those of our configuration, so that what the recipe gains is not credited to the detector. AP is measured on the
way too, if asked, for how long ours trains to the AP that torchvision's ends with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import yaml
from torch import nn

from detection.benchmarks.peers import TorchvisionDetector
from detection.data.datamodule import DetectionDataModule
from detection.models.backbones import efficientnet_lite0_fpn
from detection.recipes import rebuild
from detection.training.module import DetectionModule
from detection.training.optimisation import CosineSchedule
from detection.trust import EVERYTHING

Row = dict[str, Any]
FIGURES = ("map", "map_50", "map_75")
BASELINE_DATA = {"batch_size": 8, "min_size": 240, "max_size": 400, "vflip": 0.0, "photometric": 0.0}
BASELINE_MODEL = {"lr": 0.04, "weight_decay": 1e-4, "schedule": CosineSchedule(warmup_steps=50)}  # and SGD
BASELINE_IMAGES = 1600
OURS, BF16, PEERS = "ours", "ours, bf16", ("torchvision", "torchvision, our settings")


def measure_accuracy(
    config: Path,
    root: Path,
    seeds: Sequence[int],
    contenders: Sequence[str] = (),
    output: Path | None = None,
    data: Mapping[str, Any] | None = None,
    images: int | None = None,
    every: int | None = None,
) -> list[Row]:
    """Train and test every contender with every seed; one row a run.

    Args:
        config: our configuration of the data set, e.g. `detection/configs/bccd.yaml`.
        root: folder of the data set.
        seeds: of initial weights, order and augmentation.
        contenders: some of `torchvision`, `torchvision, our settings`, `ours` and `ours, bf16` (which trains under
            autocast); the first three by default.
        output: folder that keeps ours as `ours_<seed>.ckpt`, for `detection benchmark family`.
        data: settings of the data that differ from the configuration's.
        images: that each sees; None are those of the configuration, and 1,600 for the baseline.
        every: images after which the AP of ours is measured on the validation split, again and again: the row's `way`
            has `(processor seconds of training, AP)`. That of torchvision's has its end alone. None does not.
    """
    settings = yaml.safe_load(config.read_text())
    settings["data"] |= {"root": str(root), "num_workers": 0, **(data or {})}
    rows = []
    for seed in seeds:
        for name in contenders or (*PEERS, OURS):
            row = {"detector": name, "seed": seed, **_train(settings, name, seed, output, images, every)}
            print(
                ", ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in row.items()
                    if key != "way"
                ),
                flush=True,
            )
            rows.append(row)
    return rows


def times_to_ap(rows: Sequence[Row]) -> list[Row]:
    """Our time to the AP that torchvision's detector ends with, over the time of its whole training.

    One row for each of its two trainings, each of ours and each seed; `ratio` is infinite where ours does not get
    there. Both times are the processor's, without evaluation. Ours is that of the first evaluation with the AP: up to
    `every` images too long, and flattered where AP goes up and down, as it has several chances, torchvision's one.

    Args:
        rows: of `measure_accuracy` with `every`.
    """
    table = []
    for ours in (row for row in rows if row["detector"] in (OURS, BF16)):
        for peer in (row for row in rows if row["detector"] in PEERS and row["seed"] == ours["seed"]):
            wanted = peer["way"][-1][1]
            took = next((seconds for seconds, ap in ours["way"] if ap >= wanted), float("inf"))
            figures = {"val_map": wanted, "train_cpu_s": peer["train_cpu_s"], "ours_cpu_s": took}
            names = {"ours": ours["detector"], "peer": peer["detector"], "seed": peer["seed"]}
            table.append(names | figures | {"ratio": took / peer["train_cpu_s"]})
    return table


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation of each contender over its seeds."""
    names = list(dict.fromkeys(row["detector"] for row in rows))
    table = []
    for name in names:
        runs = [row for row in rows if row["detector"] == name]
        line: Row = {"detector": name, "seeds": len(runs), "images": runs[0]["images"]}
        for figure in (*FIGURES, "train_s", "train_cpu_s"):
            values = [run[figure] for run in runs]
            line[figure] = mean(values)
            line[f"{figure}_std"] = stdev(values) if len(values) > 1 else 0.0
        table.append(line)
    return table


def _train(
    settings: Mapping[str, Any], name: str, seed: int, output: Path | None, images: int | None, every: int | None
) -> Row:
    data_args, trainer_args = dict(settings["data"]), settings["trainer"]
    model_args = {k: v for k, v in settings["model"].items() if k != "detector"}
    seen = trainer_args["max_steps"] * data_args["batch_size"]
    if name == "torchvision":
        data_args |= BASELINE_DATA
        model_args = dict(BASELINE_MODEL)
        seen = BASELINE_IMAGES
    seen, batch_size = images or seen, data_args["batch_size"]
    L.seed_everything(seed, verbose=False)
    data = DetectionDataModule(**data_args | {"seed": seed})
    detector = _detector(settings["model"]["detector"], name, len(data.class_names) + 1, data_args)
    module = DetectionModule(detector, data.class_names, **model_args)  # type: ignore[arg-type]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    clock = _Clock()
    evaluating: dict[str, Any] = {"limit_val_batches": 0}
    if every:
        interval = max((seen if name in PEERS else every) // batch_size, 1)
        evaluating = {"val_check_interval": interval, "check_val_every_n_epoch": None}
    trainer = L.Trainer(
        max_steps=seen // batch_size,
        gradient_clip_val=None if name == "torchvision" else trainer_args.get("gradient_clip_val"),
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        precision="bf16-mixed" if name == BF16 else None,
        callbacks=[clock],
        **quiet,
        **evaluating,
    )
    trainer.fit(module, datamodule=data)
    if output is not None and name not in PEERS:
        trainer.save_checkpoint(output / f"{name.replace(', ', '_')}_{seed}.ckpt")
    figures = L.Trainer(**quiet).test(module, datamodule=data, verbose=False)[0]
    times = {"train_s": clock.seconds, "train_cpu_s": clock.cpu_seconds}
    row = {"images": trainer.global_step * batch_size} | times | {f: figures[f"test/{f}"] for f in FIGURES}
    return row | ({"way": clock.way} if every else {})


class _Clock(L.Callback):
    """Seconds of training without those of validation, and AP against them."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.way: list[tuple[float, float]] = []
        self._since = (0.0, 0.0)

    def _start(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def _stop(self) -> None:
        self.seconds += time.perf_counter() - self._since[0]
        self.cpu_seconds += time.process_time() - self._since[1]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.way.append((self.cpu_seconds, float(trainer.callback_metrics["val/map"])))
        self._start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()


def _detector(spec: Mapping[str, Any], name: str, num_classes: int, data: Mapping[str, Any]) -> nn.Module:
    sizes = {"num_classes": num_classes, "min_size": data["min_size"], "max_size": data["max_size"]}
    recipe = {"class_path": spec["class_path"], "init_args": {**spec["init_args"], **sizes}}
    ours = rebuild(recipe, trust=(EVERYTHING,))
    if name not in PEERS:
        return ours
    if name == "torchvision":
        plain = efficientnet_lite0_fpn(norm="batch", trainable_layers=4)
        return TorchvisionDetector(plain, image_mean=[0.5] * 3, image_std=[0.5] * 3, **sizes)
    return TorchvisionDetector(
        ours.backbone,
        **sizes,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        anchor_sizes=ours.rpn.anchor_generator.sizes,
        rpn_pre_nms_top_n_train=ours.rpn.pre_nms_top_n["training"],
        rpn_post_nms_top_n_train=ours.rpn.post_nms_top_n["training"],
        box_batch_size_per_image=ours.roi_heads.sampler.batch_size_per_image,
    )
