"""Plain loaders and other data modules: torchvision's form trains and evaluates, and a user's metrics see all of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric
from torchmetrics.detection import IntersectionOverUnion, MeanAveragePrecision

from detection.batch import Batch
from detection.evaluation.coco_eval import IOU_THRESHOLDS, RECALL_THRESHOLDS
from detection.models.transform import ImageTransform
from detection.recipes import rebuild
from detection.training.callbacks import PredictionPictures, Results, Throughput
from detection.training.loaders import as_batch, images_per_step
from detection.training.module import DetectionModule
from detection.training.proposal_figures import ProposalRecall, SampledForeground
from detection.training.tracking import Tracking
from tests.test_module import make_module
from tests.test_optimisation import QUIET

Sample = tuple[Tensor, dict[str, Any]]


def sample(number: int, with_id: bool = True) -> Sample:
    """An image with three objects, the last of them a crowd, in torchvision's form."""
    generator = torch.Generator().manual_seed(number)
    height, width = 60 + 10 * (number % 3), 80
    corner = torch.rand((3, 2), generator=generator) * 30
    boxes = torch.cat((corner, corner + 10 + torch.rand((3, 2), generator=generator) * 18), dim=1).round()
    masks = torch.zeros((3, height, width), dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1 : x2 - 2] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1, 2, 1 + number % 2]), "masks": masks}
    target |= {"iscrowd": torch.tensor([0, 0, 1])} | ({"image_id": torch.tensor([7 * number])} if with_id else {})
    return torch.rand((3, height, width), generator=generator), target


def pairs(batch: Sequence[Sample]) -> tuple[Any, ...]:
    return tuple(zip(*batch, strict=True))


def loader(numbers: Sequence[int], batch_size: int = 2, with_id: bool = True) -> DataLoader[Any]:
    return DataLoader([sample(i, with_id) for i in numbers], batch_size=batch_size, collate_fn=pairs)  # type: ignore[arg-type]


class Oracle(nn.Module):
    """Finds what is there, a little beside it, and a few things that are not."""

    has_masks, num_classes, recipe = True, 3, None

    def __init__(self) -> None:
        super().__init__()
        self.transform = ImageTransform(64, 96)
        self.weight = nn.Parameter(torch.zeros(()))

    def run(self, batch: Batch, with_losses: bool, with_detections: bool) -> Any:
        """As `TwoStageDetector.run`."""
        return {"loss_all": self.weight * 0 + len(batch)}, [self.find(target) for target in batch.targets]

    def find(self, target: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(target.image_id)
        count = len(target.labels)
        boxes = target.boxes + torch.randn((count, 4), generator=generator) * 1.5
        boxes = torch.cat((boxes, boxes[:1] + 3)).clamp(0, 60)
        labels = torch.cat((target.labels, 3 - target.labels[:1]))
        order = torch.rand((count + 1,), generator=generator).sort(descending=True)
        masks = torch.ones((count + 1, 28, 28))
        return {"boxes": boxes[order[1]], "labels": labels[order[1]], "scores": order[0], "masks": masks}


def theirs() -> MeanAveragePrecision:
    """With the official thresholds: its own come from float32 and move AP in the third digit."""
    thresholds = {"iou_thresholds": IOU_THRESHOLDS.tolist(), "rec_thresholds": RECALL_THRESHOLDS.tolist()}
    return MeanAveragePrecision(iou_type=("bbox", "segm"), class_metrics=True, **thresholds)


def evaluated(data: DataLoader[Any], **options: Any) -> dict[str, float]:
    module = DetectionModule(Oracle(), ["a", "b"], metrics=[theirs()], fast=False)  # type: ignore[arg-type]
    return dict(L.Trainer(**QUIET | options).validate(module, data, verbose=False)[0])


def without_losses(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if "loss" not in name}


def assert_metrics_agree(figures: dict[str, float]) -> None:
    for ours, other in (("map", "bbox_map"), ("map_75", "bbox_map_75"), ("mar_10", "bbox_mar_10"), ("segm_map",) * 2):
        assert 0.02 < figures[f"val/{ours}"] < 1
        assert figures[f"val/{ours}"] == pytest.approx(figures[f"val/MeanAveragePrecision/{other}"], abs=1e-6), ours


def test_torchmetrics_own_map_and_ours_agree(caplog: pytest.LogCaptureFixture) -> None:
    figures = evaluated(loader(range(7)))
    assert_metrics_agree(figures)
    assert "MeanAveragePrecision/classes is no single number, so it is not logged" in caplog.text
    assert not any("classes" in name for name in figures)


class Count(Metric):
    """A user's metric of one number: images and objects."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[dict[str, Tensor]], target: list[dict[str, Tensor]]) -> None:
        """torchvision's form."""
        assert preds[0]["masks"].shape[1:] == target[0]["masks"].shape[1:] and preds[0]["masks"].dtype == torch.bool
        assert set(preds[0]) == {"boxes", "scores", "labels", "masks"}
        assert set(target[0]) == {"boxes", "labels", "area", "iscrowd", "image_id", "masks"}
        self.images += len(preds)  # type: ignore[operator]

    def compute(self) -> Tensor:
        return self.images  # type: ignore[return-value]


def test_metrics_begin_anew_at_each_validation_and_are_told_apart() -> None:
    module = DetectionModule(
        Oracle(),  # type: ignore[arg-type]
        ["a", "b"],
        metrics=[Count(), IntersectionOverUnion(), Count()],
        fast=False,
    )
    trainer = L.Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, loader(range(2)), loader(range(5)))
    assert {name for name in trainer.callback_metrics if "Count" in name} == {"val/Count", "val/Count_2"}
    assert trainer.callback_metrics["val/Count"] == trainer.callback_metrics["val/Count_2"] == 5
    assert 0.3 < trainer.callback_metrics["val/IntersectionOverUnion/iou"] < 1


def test_a_metric_from_a_recipe_is_kept_in_the_settings_and_others_are_named(caplog: pytest.LogCaptureFixture) -> None:
    recipe = {"class_path": "torchmetrics.detection.MeanAveragePrecision", "init_args": {"iou_type": "bbox"}}
    kept = make_module(metrics=[rebuild(recipe)]).hparams["metrics"]
    assert kept == [recipe]
    assert [type(metric) for metric in make_module(metrics=kept).own_metrics] == [MeanAveragePrecision]
    with caplog.at_level("INFO"):
        assert "metrics" not in make_module(metrics=[Count()]).hparams
    assert "checkpoints can't keep model.metrics, so give it to load_from_checkpoint again" in caplog.text


def main(rank: int, folder: Path) -> None:
    """One of two processes that share five images: three and two of them, or one twice."""
    own = loader(range(3) if rank == 0 else range(3, 5), batch_size=1)
    shared: dict[str, Any] = {"strategy": "ddp", "devices": 2}
    uneven = evaluated(own, use_distributed_sampler=False, **shared)
    padded = evaluated(loader(range(5), batch_size=1), **shared)  # Lightning's sampler repeats an image
    (folder / f"{rank}.json").write_text(json.dumps([uneven, padded]))


@pytest.mark.slow
def test_two_processes_with_unequally_many_images_agree_with_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment | {"LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    alone = evaluated(loader(range(5), batch_size=1))
    for rank in range(2):
        for figures in json.loads((tmp_path / f"{rank}.json").read_text()):
            assert_metrics_agree(figures)
            # Lightning's mean of losses over processes weights them wrongly where one has more images
            assert without_losses(figures) == pytest.approx(without_losses(alone), abs=1e-6)


class Seen(L.Callback):
    """A user's callback."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        self.outputs += zip(outputs, batch.targets, strict=True)


def test_plain_loaders_train_validate_test_and_predict_with_every_callback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, seen = make_module(lr=0.01), Seen()
    module.detector.transform.min_size, module.detector.transform.max_size = (64,), 96
    ours = [Throughput(), PredictionPictures(str(tmp_path)), Results(), ProposalRecall(), SampledForeground()]
    trainer = L.Trainer(max_epochs=2, callbacks=[seen, *ours, Tracking(tmp_path)], **QUIET)
    trainer.fit(module, loader(range(8)), loader(range(3), with_id=False))
    assert trainer.optimizers[0].defaults["lr"] == pytest.approx(0.01 * 2 / 16)
    assert "val/map" in trainer.callback_metrics and trainer.global_step == 8
    assert [result.image_id for result in module.metric.results] == [0, 1, 2]
    for output, target in seen.outputs:
        height, width = target.size
        assert set(output) == {"boxes", "labels", "scores", "masks"}
        inside = (output["boxes"] >= 0).all() and (output["boxes"][:, [0, 2]] <= width).all()
        assert inside and (output["boxes"][:, [1, 3]] <= height).all()
        assert all(tuple(mask["size"]) == target.size for mask in output["masks"])
    assert caplog.text.count("the files of these images are not known") == 1
    assert "test/map" in trainer.test(module, loader(range(3)), verbose=False)[0]
    alone = DataLoader([sample(i)[0] for i in range(3)], batch_size=1, collate_fn=list)  # type: ignore[arg-type]
    assert len(trainer.predict(module, alone)) == 3  # type: ignore[arg-type]


class Data(L.LightningDataModule):
    """Somebody's own, with settings of its own."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(range(4), batch_size=4)


def test_any_data_module_trains() -> None:
    module = make_module(lr=0.01)
    trainer = L.Trainer(max_epochs=1, accumulate_grad_batches=2, **QUIET)
    trainer.fit(module, datamodule=Data())
    assert trainer.optimizers[0].defaults["lr"] == pytest.approx(0.01 * 8 / 16)


class Stream(IterableDataset[Any]):
    """Batches by itself."""

    def __iter__(self) -> Any:
        yield pairs([sample(0), sample(1)])


def test_a_loader_that_does_not_tell_its_batch_is_asked_about() -> None:
    data = DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match=r"\(DataLoader\) doesn't say how many images .*images_per_batch=\.\.\."):
        L.Trainer(max_steps=1, **QUIET).fit(make_module(), data)
    trainer = L.Trainer(max_steps=1, **QUIET)
    trainer.fit(make_module(images_per_batch=2), data)
    assert trainer.global_step == 1 and images_per_step(trainer, 3) == 3


def test_what_becomes_of_torchvisions_form() -> None:
    module = make_module()
    module.detector.transform.min_size, module.detector.transform.max_size = (120,), 160
    image, target = sample(1)
    batch = as_batch(((image,), (target,)), module.detector, [5], trains=False)
    assert batch.gt_valid.sum() == 2 and batch.images.shape == (1, 3, 128, 160)  # a crowd is no object to learn
    scale = torch.tensor([120 / 70] * 4)
    torch.testing.assert_close(batch.gt_boxes[0, :2], target["boxes"][:2] * scale, rtol=0.03, atol=0)
    (truth,) = batch.targets
    assert (truth.image_id, truth.file_name, truth.size) == (7, "image 7", (70, 80))
    assert truth.iscrowd.tolist() == [False, False, True]
    assert torch.equal(truth.boxes, target["boxes"])
    assert torch.equal(truth.areas, target["masks"].flatten(1).sum(1).float())
    given = as_batch(
        ((image,), (target | {"area": [1, 2, 3], "file_name": "x.png"},)), module.detector, [5], trains=True
    )
    assert given.targets[0].areas.tolist() == [1, 2, 3] and given.targets[0].file_name == "x.png"
    assert given.targets[0].masks is None  # nothing compares with them
    del target["image_id"]
    assert as_batch(((image,), (target,)), module.detector, [5], trains=True).targets[0].image_id == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda images, targets: {"images": images},
            "a loader has given dict: a batch is a Batch, or",
        ),
        (lambda images, targets: (images, [t["boxes"] for t in targets]), "targets that are no dictionaries"),
        (lambda images, targets: (images, targets[:1]), "2 images but 1 targets"),
        (
            lambda images, targets: (images, [{k: v for k, v in t.items() if k != "masks"} for t in targets]),
            "the detector predicts masks, but the target of image 0 has none",
        ),
        (lambda images, targets: (images, [t | {"labels": t["labels"] + 2} for t in targets]), "label outside 1 to 2"),
    ],
)
def test_what_is_no_batch_is_refused_in_a_sentence(change: Any, message: str) -> None:
    images, targets = pairs([sample(0), sample(3)])
    with pytest.raises(ValueError, match=message):
        as_batch(change(list(images), list(targets)), make_module().detector, range(2), trains=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
