"""The command `evaluate`: a checkpoint on any data, or a results file, to figures and a report."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import yaml
from numpy.typing import NDArray

from detection.batch import Id
from detection.cli.detected import WITHOUT_RUN, content_of, data_of_run, module_of
from detection.cli.flags import check_ranges, join_ckpts, members, run_command
from detection.cli.folder import CONFIG
from detection.cli.output import set_up_output
from detection.commit import code_version
from detection.data.checks import Folder
from detection.data.datamodule import DetectionDataModule
from detection.data.images import picture, read_image
from detection.data.records import DataError
from detection.data.spectral import Pixels
from detection.evaluation.coco_files import compare_files
from detection.evaluation.collect import CollectDetections
from detection.evaluation.mean_ap import IouType, MeanAP
from detection.evaluation.report import LoadImage, write_evaluation
from detection.evaluation.results import ImageResult
from detection.inference.detector import EXPORTED
from detection.inference.exported import ExportedDetector
from detection.inference.fusing import Fusion, check_members
from detection.inference.fusing import fuse as fuse_found

Form = Literal["coco", "voc", "yolo"]


def evaluate(
    ckpt: list[Path] | Path | None = None,
    results: Path | None = None,
    split: str = "val",
    root: Path | None = None,
    format: Form | None = None,
    annotations: Path | None = None,
    images: Path | None = None,
    output: Path | None = None,
    batch_size: int | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    masks: bool = True,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    fuse: Fusion | None = None,
    beside: bool = False,
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Write figures, COCO results JSON, plots and an HTML report.

    Args:
        ckpt: run's folder, or its checkpoint; model, classes and sizes come from it, and data that is not named here.
            Several with `fuse`. Or a .safetensors file, or one of `detection export`, which is run as in `predict`:
            on data that is named here.
        results: COCO results file, in place of a checkpoint; goes with `annotations` alone.
        split: val or test of the training data; of other data the name of one of its splits, or all.
        root: folder of the training data, if it has moved; with another `split`, `format` or `annotations`, of other
            data, whose classes are compared by name.
        format: of other data, coco, voc or yolo, where more than one is there.
        annotations: COCO file of other data, relative to `root`, or to here without `root`.
        images: folder of its images, likewise.
        output: folder to write to; beside the checkpoint, or the results, by default.
        batch_size: images a batch on each device; that of training by default.
        accelerator: as of Lightning's trainer: cpu, gpu or auto.
        devices: GPUs, or processes of the CPU, that share the images; the figures are those of one.
        num_nodes: machines with so many devices each, which all see the data and `output`.
        precision: as of Lightning's trainer: 32-true or bf16-mixed.
        fuse: how what several checkpoints find becomes one: wbf is weighted box fusion, nms keeps the best. Each sees
            the images at its own size.
        masks: false compares the boxes of a detector of masks or key points alone, for data that has none.
        beside: true puts the report's pictures into a folder beside it; they are in it where that takes under 60 MB.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
    """
    set_up_output()
    check_ranges(batch_size=(batch_size, 1), devices=(devices, 1), num_nodes=(num_nodes, 1))
    if (ckpt is None) == (results is None):
        raise DataError("name what to evaluate: --ckpt, a checkpoint, or --results, a COCO results file")
    if results is not None:
        if annotations is None:
            raise DataError(f"{results}: name the COCO file that the results are compared with: --annotations")
        base = root or Path()
        _evaluate_file(results, base / annotations, base / images if images else root, output, masks, beside)
        return
    assert ckpt is not None
    ckpts = members(ckpt, fuse)
    if (file := next((path for path in ckpts if path.suffix in EXPORTED), None)) is not None:
        if devices * num_nodes > 1 or accelerator == "gpu" or precision != "32-true":
            raise DataError(f"{file}: an exported file runs in one process of the CPU, in its own precision")
        if fuse is not None:
            raise DataError(f"{file}: exported files are evaluated one by one; fuse their checkpoints")
        changes = _other_data(split, root, format, annotations, images) or {"val_split": split}
        changes |= {} if root is None else {"root": str(root)}
        _evaluate_exported(file, changes, output, masks, split if annotations is None else annotations.stem, beside)
        return
    changes = _other_data(split, root, format, annotations, images)
    moved = ({} if root is None else {"root": str(root)}) | ({} if batch_size is None else {"batch_size": batch_size})
    moved |= {} if masks else {"masks": False, "keypoints": False}
    settings: dict[str, Any] = {"logger": False, "precision": precision, "devices": devices, "num_nodes": num_nodes}
    settings["strategy"] = "ddp" if devices * num_nodes > 1 else "auto"
    collect = CollectDetections(MeanAP([]))
    trainer = L.Trainer(accelerator=accelerator, callbacks=[collect], use_distributed_sampler=False, **settings)
    seen = list[MeanAP]()
    for path in ckpts:
        module = module_of(path, trust)
        other = changes or ({"val_split": split} if path.suffix == WITHOUT_RUN and root is not None else {})
        data = data_of_run(path, trust, module, moved | other)
        if not other and split == "test" and data.hparams["test_split"] is None:
            raise DataError(f"{path}: the model was trained without naming a test split; use --split val")
        data.predict_split = "test" if not other and split == "test" else "val"
        kinds: tuple[IouType, ...] = module.metric.iou_type if masks else ("bbox",)
        collect.metric = MeanAP(module.class_names, module.hparams["detections_per_img"], kinds)
        seen.append(collect.metric)
        check_members(ckpts[: len(seen)], [m.class_names for m in seen], ["segm" in m.iou_type for m in seen])
        trainer.predict(module, datamodule=data, return_predictions=False)
        collect.metric.skeleton = data.skeleton
        if fuse is not None or not trainer.is_global_zero:
            figures = collect.metric.compute()  # which sends what this process has seen to the one that writes
            if trainer.is_global_zero:
                print(", ".join(f"{name} {value:.4f}" for name, value in figures.items() if name.endswith("map")), path)
    if not trainer.is_global_zero:
        if fuse is not None:
            MeanAP(module.class_names, iou_type=kinds).compute()  # for which the first waits
        return
    metric = seen[0] if fuse is None else _fused(seen, ckpts, fuse)
    dataset: Any = data.predict_dataloader().dataset
    metric.frequencies = dataset.frequencies
    home, name = dataset.root, split if annotations is None else annotations.stem
    facts = _facts(ckpts, fuse) | {"data": home.name, "split": name, "precision": precision}
    title, said, leads = _of_run(ckpts[0])
    title += f" and {len(ckpts) - 1} more, fused" if fuse else ""
    of = f"{ckpts[0].stem}_" if ckpts[0].suffix == WITHOUT_RUN else ""
    folder = output or ckpts[0].parent / f"evaluation_{of}{name}{f'_{fuse}' if fuse else ''}"

    def load(result: ImageResult) -> Pixels:
        return read_image(home / result.file_name, result.size, form=data.form)

    _write(folder, metric, dataset.category_ids, load, title, facts, said, leads, beside)


def _fused(seen: Sequence[MeanAP], ckpts: Sequence[Path], how: Fusion) -> MeanAP:
    """What all checkpoints found, as if one had; the AP of each alone is printed.

    Raises:
        DataError: they were validated on other images.
    """
    limit = max(metric.max_detection_thresholds[-1] for metric in seen)
    fused = MeanAP(seen[0].class_names, limit, seen[0].iou_type, skeleton=seen[0].skeleton)
    by_image = [{result.image_id: result for result in metric.results} for metric in seen]
    for own, path in zip(by_image, ckpts, strict=True):
        files = {number: result.file_name for number, result in own.items()}
        if files != {number: result.file_name for number, result in by_image[0].items()}:
            raise DataError(f"{path} and {ckpts[0]} have other validation images: name data for both, as with --root")
    fused.update([], [], [fuse_found([own[number] for own in by_image], how, limit) for number in by_image[0]])
    return fused


def _facts(ckpts: Sequence[Path], fuse: str | None) -> dict[str, str]:
    """Where the detections come from; of each checkpoint where there are several."""
    kept = [content_of(path) for path in ckpts]
    names = [path.name if fuse is None else f"{path.resolve().parent.name}/{path.name}" for path in ckpts]
    facts = {
        "checkpoint": ", ".join(names),
        "step": ", ".join(str(content.get("global_step", "unknown")) for content in kept),
        "code": ", ".join(dict.fromkeys(content.get("code", "not recorded") for content in kept)),
    }
    facts |= {} if fuse is None else {"fused by": fuse}
    if of := [ingredient["path"] for content in kept for ingredient in content.get("soup", {}).get("ingredients", ())]:
        facts["soup of"] = ", ".join(of)
    return facts if (now := code_version()) == facts["code"] else facts | {"evaluated with": now}


def main(args: Sequence[str]) -> str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    return run_command("evaluate", evaluate, join_ckpts(args), ValueError)


def _other_data(
    split: str, root: Path | None, format: Form | None, annotations: Path | None, images: Path | None
) -> dict[str, Any]:
    """The settings of data that was not trained on, as its validation split; none where the training data is meant."""
    if format is None and annotations is None:
        if images is not None:
            raise DataError("--images goes with --annotations, a COCO file")
        if split in ("val", "test"):
            return {}
        if root is None:
            raise DataError(f"the training data has no split '{split}', but val and test; for other data name --root")
    other: dict[str, Any] = {"reader": None, "fold": None, "labelled": None}
    if annotations is not None:
        if format in ("voc", "yolo"):
            raise DataError(f"--annotations names a COCO file, but --format is {format}: leave one of them out")
        other |= {"format": "coco", "val_split": str(annotations), "val_images": str(images or "")}
        if root is None:  # then both are relative to here, and no image may leave its folder
            other |= {"root": str(images or annotations.parent), "val_split": str(annotations.resolve())}
            other["val_images"] = ""
        return other
    if root is None:
        raise DataError(f"data of format {format} needs --root, its folder")
    return other | {"format": format, "val_split": split, "val_images": ""}


def _of_run(ckpt: Path) -> tuple[str, str, list[tuple[str, str]]]:
    """What the report says of the run: its title, the settings, and commands that lead on; of a file its name alone."""
    if ckpt.suffix == WITHOUT_RUN:
        return f"Evaluation of {ckpt.name}", "", []
    run, kept = ckpt.resolve().parent, content_of(ckpt)
    config = run / CONFIG
    said = config.read_text() if config.is_file() else yaml.safe_dump(dict(kept.get("hyper_parameters", {})))
    return f"Evaluation of {run.parent.name}/{run.name}", said, _leads(run)


def _leads(run: Path) -> list[tuple[str, str]]:
    """The commands that lead on from the evaluation of a run, those that apply to it, and what each tells."""
    from detection.__main__ import COMMANDS  # it calls this module

    leads = [("compare", f"{run} OTHER_RUN", "whether another run is better, with the images of both side by side")]
    if (run / CONFIG).is_file():
        leads.append(("replay", f"{run} --step N", "a step of the training again: its batch, anchors and losses"))
    leads.append(("suspects", str(run), "annotations that the detector contradicts, and what to label next"))
    for page in sorted(run.glob("*.certificate.json")):
        name = page.name.removesuffix(".certificate.json")
        files = [file for file in run.glob(f"{glob.escape(name)}.*") if file != page]
        leads += [("verify", str(file), "whether the file still is what its certificate says") for file in files]
    return [(f"detection {name} {flags}", text) for name, flags, text in leads if name in COMMANDS]


def _evaluate_file(
    results: Path, annotations: Path, images: Path | None, output: Path | None, masks: bool, beside: bool
) -> None:
    """The figures of a results file; pictures in the report where the folder of images is named."""
    compared = compare_files(annotations, results, masks=masks)
    for note in compared.notes:
        print(f"note: {note}")
    place = None if images is None else Folder(images)

    def load(result: ImageResult) -> NDArray[np.uint8]:
        assert place is not None
        return picture(place.locate(result.file_name, str(annotations)))

    facts = {"results": results.name, "annotations": annotations.name}
    folder, title = output or results.parent / f"evaluation_{results.stem}", f"Evaluation of {results.name}"
    _write(folder, compared.metric, compared.category_ids, load if place else None, title, facts, beside=beside)


def _evaluate_exported(
    file: Path, changes: dict[str, Any], output: Path | None, masks: bool, name: str, beside: bool
) -> None:
    """The figures of an exported file on data that is named."""
    if changes.get("root") is None:
        raise DataError(
            f"{file}: an exported file does not say what it was trained on: name data, --annotations or --root"
        )
    detector = ExportedDetector(file)
    points, masks = masks and detector.num_keypoints > 0, masks and detector.has_masks
    settings: dict[str, Any] = {"classes": list(detector.class_names), "masks": masks, "keypoints": points}
    settings |= {"channels": detector.form.channels, "depth": detector.form.depth}
    data = DetectionDataModule(**settings | changes)
    data.predict_split = "val"
    data.prepare_data()
    data.setup("predict")
    dataset: Any = data.predict_dataloader().dataset
    found: dict[IouType, bool] = {"bbox": True, "segm": masks, "keypoints": points}
    kinds: tuple[IouType, ...] = tuple(kind for kind, wanted in found.items() if wanted)
    metric = MeanAP(list(detector.class_names), detector.detections_per_img, kinds, skeleton=data.skeleton)
    for i in range(len(dataset)):
        sample = dataset[i]
        metric.update([detector.found(sample.pixels)], [sample.target])
    metric.frequencies = dataset.frequencies

    def load(result: ImageResult) -> Pixels:
        return read_image(dataset.root / result.file_name, result.size, form=data.form)

    facts = {"file": file.name, "code": code_version(), "data": dataset.root.name, "split": name}
    folder = output or file.parent / f"evaluation_{file.stem}_{name}"
    _write(folder, metric, dataset.category_ids, load, f"Evaluation of {file.name}", facts, beside=beside)


def _write(
    folder: Path,
    metric: MeanAP,
    category_ids: Sequence[Id | None],
    load: LoadImage | None,
    title: str,
    facts: dict[str, str],
    settings: str = "",
    leads: Sequence[tuple[str, str]] = (),
    beside: bool = False,
) -> None:
    """The report on disk; the figures, those of each class, and what was left out, in the terminal."""
    figures = write_evaluation(folder, metric, category_ids, load, title, facts, settings, leads, beside)
    width, sizes = max(map(len, figures)), metric.object_counts()
    for name, value in figures.items():
        print(_line(name, width, value, sizes.get(name.rpartition("_")[2], sizes["all"])))
    width, known = max(map(len, metric.class_names)), metric.per_class()
    for name, count in metric.objects_per_class().items():
        print(_line(f"  {name}", width + 2, known.get(name, -1.0), count))
    absent = {name for name, number in zip(metric.class_names, category_ids, strict=True) if number is None}
    left_out = {name: count for name, count in metric.absent_detections().items() if name in absent}
    if left_out:
        counts = ", ".join(f"{name} {count}" for name, count in left_out.items())
        print(f"not exported, as the annotations lack the class: {counts}")
    if crowds := sum(int(result.gt_iscrowd.sum()) for result in metric.results):
        print(
            f"{crowds} more object{'s are crowds' if crowds > 1 else ' is a crowd'}, which COCO's protocol leaves out"
        )
    print(f"report: {folder / 'report.html'}")


def _line(name: str, width: int, value: float, objects: int) -> str:
    """A figure and on how many objects it rests; a dash where there are none, so that there is no figure."""
    figure = f"{value:8.4f}" if value > -1 else f"{'-':>8}"
    return f"{name:<{width}}{figure}{objects:8} object{'s' * (objects != 1)}"
