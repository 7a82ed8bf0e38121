"""What a run detects in its validation images: computed once, and kept beside its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import yaml

from detection.batch import Id
from detection.cli.folder import CONFIG
from detection.data.checks import Folder
from detection.data.datamodule import DetectionDataModule
from detection.data.dataset import DetectionDataset, make_target
from detection.data.images import picture, read_image
from detection.data.records import DataError
from detection.data.spectral import Pixels
from detection.evaluation.coco_files import compare_files
from detection.evaluation.coco_results import write_coco_results
from detection.evaluation.collect import CollectDetections
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.report import LoadImage
from detection.evaluation.results import ImageResult, image_result
from detection.inference.detector import most_detections
from detection.interop import load_detector
from detection.training.checkpoints import best_or_last
from detection.training.module import DetectionModule
from detection.weights import NO_NAMES, CheckpointError, read_saved, read_torch, readable

WITHOUT_RUN = ".safetensors"  # such a file has a detector, but not what it was trained on
KEPT, OF = "detections_{split}_{checkpoint}", "of.json"  # folder beside the checkpoint; what its files are of


@dataclass(frozen=True, slots=True)
class Detected:
    """The detections of one run, beside the ground truth.

    Attributes:
        name: of the run, or of the results file.
        results: images in the order of their ids.
        class_names: C.
        limit: detections of an image that the run gives at most.
        masks: whether they have masks.
        sigmas: of OKS, one a key point; empty where they have none.
        facts: where it comes from: checkpoint, step, code, data.
        settings: of the run by name, with dots; empty for a results file.
        load_image: gives the pixels of an image, or None where the images are not at hand.
        notes: sentences on how it was read.
    """

    name: str
    results: list[ImageResult]
    class_names: list[str]
    limit: int
    masks: bool
    sigmas: tuple[float, ...]
    facts: dict[str, str]
    settings: dict[str, Any]
    load_image: LoadImage | None
    notes: list[str]


def runs_in(path: Path) -> list[Path]:
    """The runs that a path stands for: a folder of runs is all of them, in the order of their names.

    Raises:
        FileNotFoundError: there is nothing, or a folder without a checkpoint below it.
    """
    if path.is_file():
        return [path]
    inside = sorted({file.parent for name in ("best.ckpt", "last.ckpt") for file in path.glob(f"*/{name}")})
    try:
        return [best_or_last(path)]
    except FileNotFoundError:
        if not inside:
            raise
        return [best_or_last(run) for run in inside]


def of_file(results: Path, annotations: Path, images: Path | None) -> Detected:
    """The detections of a COCO results file."""
    read = compare_files(annotations, results)
    place = None if images is None else Folder(images)

    def load(result: ImageResult) -> Pixels:
        assert place is not None
        return picture(place.locate(result.file_name, str(annotations)))

    return Detected(
        name=results.stem,
        results=read.metric.results,
        class_names=read.metric.class_names,
        limit=read.metric.max_detection_thresholds[-1],
        masks="segm" in read.metric.iou_type,
        sigmas=_sigmas(read.metric),
        facts={"results": str(results), "sha256": _checksum(results), "data": annotations.name},
        settings={},
        load_image=load if place else None,
        notes=read.notes,
    )


def of_run(
    ckpt: Path, split: str, trust: list[str], root: Path | None, accelerator: str, batch_size: int | None
) -> Detected:
    """The detections of a checkpoint on its own validation or test images.

    They are read where an earlier call has kept those of this very file, and computed and kept otherwise.
    """
    module = DetectionModule.load_from_checkpoint(ckpt, trust, map_location="cpu")
    moved = ({} if root is None else {"root": str(root)}) | ({} if batch_size is None else {"batch_size": batch_size})
    data = data_of_run(ckpt, trust, module, moved)
    if split == "test" and data.hparams["test_split"] is None:
        raise DataError(f"{ckpt}: the model was trained without naming a test split; use --split val")
    data.predict_split = "test" if split == "test" else "val"
    limit, kinds = module.metric.max_detection_thresholds[-1], module.metric.iou_type
    folder = ckpt.parent / KEPT.format(split=split, checkpoint=ckpt.stem)
    data.prepare_data()
    data.setup("predict")
    dataset: Any = data.predict_dataloader().dataset
    of = {"checkpoint": _checksum(ckpt), "images": _checksum_of_images(dataset)}
    if _is_of(folder, of):
        metric = MeanAP(module.class_names, limit, kinds)
        _read(folder, dataset, metric)
        note = f"{ckpt}: detections read from {folder}"
    else:
        metric = detect_all(module, data, accelerator)
        _keep(folder, dataset, metric, of)
        note = f"{ckpt}: detected in {len(metric.results)} images; kept in {folder}"
    metric.skeleton = dataset.skeleton
    content, home, form = read_torch(ckpt), dataset.root, data.form

    def load(result: ImageResult) -> Pixels:
        return read_image(home / result.file_name, result.size, form=form)

    run = ckpt.resolve().parent
    return Detected(
        name=f"{run.parent.name}/{run.name}",
        results=metric.results,
        class_names=module.class_names,
        limit=limit,
        masks="segm" in kinds,
        sigmas=_sigmas(metric),
        facts={
            "checkpoint": ckpt.name,
            "step": str(content.get("global_step", "unknown")),
            "code": str(content.get("code", "not recorded")),
            "data": f"{home.name}, {split}",
            "sha256": of["checkpoint"],
        },
        settings=_settings(run, content),
        load_image=load,
        notes=[note],
    )


def detect_all(module: DetectionModule, data: DetectionDataModule, accelerator: str) -> MeanAP:
    """What a detector finds in all images of `data.predict_split`."""
    metric = MeanAP(module.class_names, module.metric.max_detection_thresholds[-1], module.metric.iou_type)
    options: dict[str, Any] = {"logger": False, "callbacks": [CollectDetections(metric)], "devices": 1}
    trainer = L.Trainer(accelerator=accelerator, enable_model_summary=False, **options)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return metric


def module_of(ckpt: Path, trust: list[str]) -> DetectionModule:
    """The module of a run's checkpoint, or one around the detector of a `.safetensors` file.

    Raises:
        CheckpointError: the file does not say how to build its detector, or what its classes are called.
    """
    if ckpt.suffix != WITHOUT_RUN:
        return DetectionModule.load_from_checkpoint(ckpt, trust, map_location="cpu")
    model, names = load_detector(ckpt, trust), read_saved(ckpt).class_names
    if names is None:
        raise CheckpointError(f"{ckpt}: {NO_NAMES}")
    return DetectionModule(model, names, detections_per_img=most_detections(model))


def content_of(ckpt: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: nothing, where it is a `.safetensors` file."""
    return {} if ckpt.suffix == WITHOUT_RUN else read_torch(ckpt)


def data_of_run(ckpt: Path, trust: list[str], module: DetectionModule, settings: dict[str, Any]) -> DetectionDataModule:
    """The data of the checkpoint's training with these settings in place of its own."""
    settings = {"classes": module.class_names} | settings
    if "min_size" in (content_of(ckpt).get("datamodule_hyper_parameters") or {}):  # of a `DetectionDataModule`
        with readable(ckpt):
            data = DetectionDataModule.load_from_checkpoint(ckpt, trust, **settings)
        if "root" not in settings and (home := data.hparams["root"]) and not Path(home).exists():
            raise DataError(f"{home}: the data of the training is not there (any more): give its folder as --root")
        return data
    alone = ckpt.suffix == WITHOUT_RUN
    if "val_split" not in settings:
        raise DataError(
            f"{ckpt}: a {WITHOUT_RUN} file does not say what it was trained on; name data: --annotations or --root"
            if alone
            else f"{ckpt}: it was trained with loaders that can't be made again; name data: --annotations, or --root "
            "and --format"
        )
    shape = module.detector.transform
    sizes: dict[str, Any] = {"min_size": shape.min_size[-1], "max_size": shape.max_size}
    sizes |= {"channels": shape.channels, "depth": shape.image_depth}
    sizes |= {"masks": module.detector.has_masks, "keypoints": "keypoints" in module.metric.iou_type}
    if alone and (tiles := read_saved(ckpt).tiles):
        sizes |= {"tile": tiles[0], "tile_overlap": tiles[1]}
    return DetectionDataModule(**sizes | settings)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of_images(dataset: DetectionDataset) -> str:
    records = [dataset.store[i] for i in range(len(dataset))]
    images = [(record.image_id, record.file_name, record.width, record.height) for record in records]
    return hashlib.sha256(json.dumps(images).encode()).hexdigest()


def _is_of(folder: Path, of: dict[str, str]) -> bool:
    try:
        return bool(json.loads((folder / OF).read_text()) == of)
    except (OSError, ValueError):
        return False


def _keep(folder: Path, dataset: DetectionDataset, metric: MeanAP, of: dict[str, str]) -> None:
    """Write the results files, and last of what they are, so that a file that was cut off is not taken."""
    folder.mkdir(exist_ok=True)
    (folder / OF).unlink(missing_ok=True)
    for kind in metric.iou_type:
        write_coco_results(folder / f"detections_{kind}.json", metric.results, dataset.category_ids, kind)
    (folder / OF).write_text(json.dumps(of))


def _read(folder: Path, dataset: DetectionDataset, metric: MeanAP) -> None:
    """Give the metric what `_keep` has written, beside the ground truth of the data set."""
    labels = {number: label for label, number in enumerate(dataset.category_ids, start=1)}
    kept = {kind: _by_image(folder / f"detections_{kind}.json") for kind in metric.iou_type}
    for i in range(len(dataset)):
        record = dataset.store[i]
        found = kept["bbox"][record.image_id]
        detection: dict[str, Any] = {
            "boxes": np.array([_corners(entry["bbox"]) for entry in found]),
            "labels": np.array([labels[entry["category_id"]] for entry in found]),
            "scores": np.array([entry["score"] for entry in found]),
        }
        if "segm" in kept:
            detection["masks"] = [_rle(entry["segmentation"]) for entry in kept["segm"][record.image_id]]
        if "keypoints" in kept:
            rows = [entry["keypoints"] for entry in kept["keypoints"][record.image_id]]
            detection["keypoints"] = (
                np.array(rows, np.float32).reshape(len(rows), -1, 3) if rows else np.zeros((0, 0, 3))
            )
        options: dict[str, Any] = {"masks": "segm" in kept, "keypoints": "keypoints" in kept}
        metric.update([], [], [image_result(detection, make_target(record), len(labels), **options)])


def _by_image(file: Path) -> dict[Id, list[dict[str, Any]]]:
    entries: dict[Id, list[dict[str, Any]]] = defaultdict(list)
    for entry in json.loads(file.read_text()):
        entries[entry["image_id"]].append(entry)
    return entries


def _corners(box: Sequence[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def _rle(segment: Mapping[str, Any]) -> dict[str, Any]:
    return {"size": segment["size"], "counts": segment["counts"].encode()}


def _sigmas(metric: MeanAP) -> tuple[float, ...]:
    return metric.sigmas(metric.results) if "keypoints" in metric.iou_type else ()


def _settings(run: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, flat: its `config.yaml`, or what the checkpoint knows of model and data."""
    try:
        said = yaml.safe_load((run / CONFIG).read_text())
    except (OSError, yaml.YAMLError):
        said = None
    if not isinstance(said, dict):
        said = {"model": content.get("hyper_parameters"), "data": content.get("datamodule_hyper_parameters")}
    return dict(_flat(said, ""))


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, own in value.items() for pair in _flat(own, f"{name}.{key}" if name else str(key))]
    return [(name, value)]
