"""What a run shows of itself beside its figures: plots, and the media that W&B gets.

Shape shorthand:
    D: detections of one image     N: objects of one image     H, W: height and width of one image
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from detection.data import rle
from detection.data.dataset import DetectionDataset
from detection.data.images import read_image
from detection.data.spectral import RGB, PixelFormat, false_colour
from detection.evaluation.analysis import analyse
from detection.evaluation.coco_eval import RECALL_THRESHOLDS, evaluate
from detection.evaluation.mean_ap import mean_valid
from detection.evaluation.plots import training_curves
from detection.evaluation.report import draw_plots
from detection.evaluation.results import ImageResult, spread
from detection.training.callbacks import Results, is_rehearsal
from detection.training.loaders import image_folder, image_format
from detection.training.loggers import Tracker
from detection.training.module import DetectionModule
from detection.visualize import class_colour, draw_points

Pixels = NDArray[np.uint8]
POINTS_SCORE = 0.5  # of detections whose key points are drawn
MOST_MASK_CLASSES = 255  # W&B keeps the class of each pixel in a byte


class Tracking(L.Callback):
    """Plots in the run's folder, and to W&B, where it is in use, plots, a table by class, pictures and the checkpoint.

    After a validation: `plots/*.png` as `detection evaluate` draws them, AP by class as a table, and the same images
    each time with boxes and masks of ground truth and predictions to switch on and off. In a long run that happens ever
    more rarely, 32 times and then 16 in each doubling of validations, for the sake of disk and quota. At the end:
    `plots/curves.png`, and the best checkpoint as an artifact, if wanted.

    Args:
        folder: of the run.
        log_model: send `best.ckpt`.
        count: images, spread over the validation split.
        score_thresh: detections below it are not sent.
    """

    def __init__(
        self, folder: str | Path, log_model: bool = False, count: int = 16, score_thresh: float = 0.05
    ) -> None:
        self.folder, self.log_model = Path(folder), log_model
        self.count, self.score_thresh = count, score_thresh
        self.validations = 0
        self._drawn = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for tracker in trackers(trainer):
            tracker.start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        config = self.folder / "config.yaml"
        for tracker in trackers(trainer):
            if facts := data_facts(trainer):  # reads all objects, so only where it is wanted
                folder = Path(next(iter(facts.values()))["root"]).name
                tracker.log_facts("dataset", {"dataset.json": json.dumps(facts, indent=1)}, facts, folder)
            if config.is_file():
                tracker.log_facts("config", {config.name: config.read_text(encoding="utf-8")}, {})

    def on_validation_end(self, trainer: L.Trainer, pl_module: DetectionModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking:
            return
        self.validations += 1
        self._drawn = self.validations % (1 << max(0, self.validations.bit_length() - 5)) == 0
        if self._drawn:
            self._show(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: DetectionModule) -> None:  # type: ignore[override]
        if not trainer.is_global_zero or is_rehearsal(trainer):
            return
        if not self._drawn:
            self._show(trainer, pl_module)
        for logger in trainer.loggers:
            logger.save()
        for results in (callback for callback in trainer.callbacks if isinstance(callback, Results) and callback.best):  # type: ignore[attr-defined]
            best = {name.replace("val/", "best/", 1): value for name, value in results.best.items()}
            for tracker in trackers(trainer):
                tracker.summarise(best | {"best/step": results.best_step})
        if (self.folder / "metrics.csv").is_file():
            with (self.folder / "metrics.csv").open(newline="") as file:
                self._save("curves", training_curves(list(csv.DictReader(file))))
        for callback in trainer.checkpoint_callbacks if self.log_model else ():
            path = Path(getattr(callback, "best_model_path", ""))
            if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and path.is_file():
                for tracker in trackers(trainer):
                    tracker.log_checkpoint(path, {callback.monitor: float(callback.best_model_score or 0.0)})

    def _show(self, trainer: L.Trainer, pl_module: DetectionModule) -> None:
        results, names = pl_module.metric.results, pl_module.class_names
        if not trainer.is_global_zero or is_rehearsal(trainer) or not results:
            return
        figures = draw_plots(results, names, analyse(results, len(names)))
        files = {name: self._save(name, figure) for name, figure in figures.items()}
        root, form = image_folder(trainer), image_format(trainer)
        edges = () if pl_module.metric.skeleton is None else pl_module.metric.skeleton.edges
        step = max(0, trainer.global_step - 1)  # that of the figures of the same validation

        def send(tracker: Tracker) -> None:
            tracker.log_metrics(self._media(files, results, names, root, form, edges), step)

        for tracker in trackers(trainer):
            tracker.attempt(partial(send, tracker))

    def _save(self, name: str, figure: Any) -> Path:
        path = self.folder / "plots" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        return path

    def _media(
        self,
        files: Mapping[str, Path],
        results: Sequence[ImageResult],
        names: Sequence[str],
        root: Path | None,
        form: PixelFormat,
        edges: Sequence[tuple[int, int]],
    ) -> dict[str, Any]:
        import wandb  # takes a second to import; only where it is in use

        media: dict[str, Any] = {f"plots/{name}": wandb.Image(str(path)) for name, path in files.items()}
        media["val/classes"] = wandb.Table(columns=[*CLASS_COLUMNS], data=class_rows(results, names))
        media["curves/precision_recall"] = wandb.plot.line(
            wandb.Table(columns=["recall", "precision"], data=mean_precision(results, len(names))),
            "recall",
            "precision",
            title="Precision and recall at IoU .50, mean of classes",
        )
        if root is None:  # loaders that are not DetectionDataModule's don't say where their images lie
            return media
        options: dict[str, Any] = {"form": form, "edges": edges}
        shown = [overlays(result, names, root, self.score_thresh, **options) for result in spread(results, self.count)]
        media["val/images"] = [wandb.Image(**image, file_type="jpg") for image in same_size(shown)]
        return media

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]


def trackers(trainer: L.Trainer) -> list[Tracker]:
    """The loggers that are W&B runs."""
    return [logger for logger in trainer.loggers if isinstance(logger, Tracker)]


def data_facts(trainer: L.Trainer) -> dict[str, Any]:
    """Folder, images and objects of each class of `train` and `val`; empty where the data set is not of ours."""
    facts: dict[str, Any] = {}
    for split, loader in (("train", trainer.train_dataloader), ("val", trainer.val_dataloaders)):
        data: Any = getattr(loader, "dataset", None)
        if isinstance(data, DetectionDataset):
            labels = np.concatenate([data.store[i].labels for i in range(len(data))])
            counts = np.bincount(labels, minlength=len(data.classes) + 1)[1:].tolist()
            objects = dict(zip(data.classes, counts, strict=True))
            facts[split] = {"root": str(data.root), "images": len(data), "objects": sum(counts), "per_class": objects}
    return facts


def mean_precision(results: Sequence[ImageResult], num_classes: int) -> list[list[float]]:
    """Recall and interpolated precision at IoU .50, averaged over the classes with objects, best 100 an image."""
    precision = evaluate(results, num_classes).precision[0, :, :, 0, -1]
    known = precision[:, precision[0] > -1]
    return np.stack([RECALL_THRESHOLDS, known.mean(1)], 1).tolist() if known.size else []


CLASS_COLUMNS = ("class", "AP", "AP50", "AP75", "objects", "detections")


def class_rows(results: Sequence[ImageResult], names: Sequence[str]) -> list[list[Any]]:
    """A row of `CLASS_COLUMNS` for each class with objects or detections; AP is None without objects."""
    precision = evaluate(results, len(names)).precision[:, :, :, 0, -1]
    crowds = np.concatenate([result.gt_iscrowd for result in results])
    objects = np.bincount(np.concatenate([result.gt_labels for result in results])[~crowds], minlength=len(names) + 1)
    found = np.bincount(np.concatenate([result.labels for result in results]), minlength=len(names) + 1)
    rows: list[list[Any]] = []
    for k, name in enumerate(names):
        if objects[k + 1] or found[k + 1]:
            values = [mean_valid(part) for part in (precision[:, :, k], precision[0, :, k], precision[5, :, k])]
            known = [value if value > -1 else None for value in values]
            rows.append([name, *known, int(objects[k + 1]), int(found[k + 1])])
    return rows


def overlays(
    result: ImageResult,
    names: Sequence[str],
    root: Path,
    score_thresh: float = 0.0,
    side: int = 800,
    form: PixelFormat = RGB,
    edges: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """What `wandb.Image` takes to show an image with layers `ground_truth` and `predictions` of boxes and masks.

    Args:
        result: the image's ground truth and detections, in its own pixels.
        names: of label 1 first.
        root: folder that the image's file name is relative to.
        score_thresh: detections below it are left out.
        side: longer side in pixels that larger images are shrunk to; boxes follow.
        form: channels and depth of its file.
        edges: positions of key points to join by a line.

    Returns:
        `data_or_path` `(H, W, 3)` uint8, `caption`, `boxes` and, if there are any, `masks`: the class of each pixel,
        the best score on top. More than 255 classes do not fit into W&B's masks. W&B has no key points: those of
        detections that score .5 or more are drawn into the image.
    """
    image = false_colour(read_image(root / result.file_name, result.size, form=form))
    scale = min(1.0, side / max(result.size))
    if scale < 1.0:
        small = Image.fromarray(image)
        small.thumbnail((side, side), Image.Resampling.BILINEAR)
        image = np.asarray(small)
    keep = np.flatnonzero(result.scores >= score_thresh)
    if result.keypoints is not None:
        image = _with_points(image, result, edges)
    shown = [result.masks[i] for i in keep.tolist()] if result.masks is not None else None
    layers = {
        "ground_truth": (result.gt_boxes, result.gt_labels, None, result.gt_masks),
        "predictions": (result.boxes[keep], result.labels[keep], result.scores[keep], shown),
    }
    titles = {0: "background", **dict(enumerate(names, 1))}
    factors = np.tile([image.shape[1] / result.size[1], image.shape[0] / result.size[0]], 2)
    boxes = {
        layer: {"box_data": _box_data(b * factors, labels, scores, names), "class_labels": titles}
        for layer, (b, labels, scores, _) in layers.items()
    }
    drawn = {"data_or_path": image, "caption": result.file_name, "boxes": boxes}
    if result.gt_masks is not None and len(names) <= MOST_MASK_CLASSES:
        drawn["masks"] = {
            layer: {"mask_data": _label_map(masks or [], labels, scores, image.shape[:2]), "class_labels": titles}
            for layer, (_, labels, scores, masks) in layers.items()
        }
    return drawn


def _with_points(image: Pixels, result: ImageResult, edges: Sequence[tuple[int, int]]) -> Pixels:
    """The image, which may be smaller than its file, with the key points of good detections."""
    picture = Image.fromarray(image)
    pen, radius = ImageDraw.Draw(picture), max(2.0, max(picture.size) / 160)
    scale = (picture.width / result.size[1], picture.height / result.size[0], 1.0)
    for i in np.flatnonzero(result.scores >= POINTS_SCORE) if result.keypoints is not None else ():
        draw_points(pen, result.keypoints[i] * scale, class_colour(int(result.labels[i])), edges, radius)  # type: ignore[index]
    return np.asarray(picture)


def same_size(images: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The images of `overlays` filled up with black to one size: W&B shows a list as if all had that of the first."""
    shapes = np.array([image["data_or_path"].shape[:2] for image in images])
    for image, missing in zip(images, shapes.max(0) - shapes, strict=True):
        room = [(0, int(missing[0])), (0, int(missing[1]))]
        image["data_or_path"] = np.pad(image["data_or_path"], [*room, (0, 0)])
        for layer in image.get("masks", {}).values():
            layer["mask_data"] = np.pad(layer["mask_data"], room)
    return images


def _box_data(
    boxes: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any] | None, names: Sequence[str]
) -> list[dict[str, Any]]:
    data = []
    for i, (corners, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        position = dict(zip(("minX", "minY", "maxX", "maxY"), corners, strict=True))
        box = {"position": position, "domain": "pixel", "class_id": label, "box_caption": names[label - 1]}
        if scores is not None:
            box["box_caption"] += f" {scores[i]:.2f}"
            box["scores"] = {"score": float(scores[i])}
        data.append(box)
    return data


def _label_map(
    masks: Sequence[dict[str, Any]], labels: NDArray[Any], scores: NDArray[Any] | None, size: tuple[int, ...]
) -> Pixels:
    painted = np.zeros(size, np.uint8)
    for i in np.argsort(scores, kind="stable") if scores is not None else range(len(masks)):
        mask = Image.fromarray(rle.decode(masks[i])).resize((size[1], size[0]), Image.Resampling.NEAREST)
        painted[np.asarray(mask)] = labels[i]
    return painted
