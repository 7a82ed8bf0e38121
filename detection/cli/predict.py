"""The command `predict`: detections in images, videos or a camera's pictures, as files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from detection.cli.flags import check_ranges, join_ckpts, members, run_command
from detection.data.records import DataError
from detection.inference import Detector, Tiles, predict
from detection.inference.detector import Precision
from detection.inference.ensemble import Ensemble
from detection.inference.fusing import Fusion
from detection.inference.runtimes import Runtime, file_of
from detection.inference.sources import Images, Listed, open_source
from detection.inference.tracks import Tracks
from detection.visualize import Names


def predict_in(
    ckpt: list[Path] | Path,
    source: str,
    output: Path = Path("predictions"),
    score_thresh: float | None = None,
    classes: list[str] | None = None,
    batch_size: int = 8,
    tile: int | None = None,
    overlap: float | None = None,
    limit: int | None = None,
    pictures: bool = True,
    labels: Names = "auto",
    line_width: int | None = None,
    annotations: Path | None = None,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    precision: Precision = "32",
    runtime: Runtime = "pytorch",
    fuse: Fusion | None = None,
    track: bool = False,
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Write annotated images or a video, predictions.json (COCO) and predictions.csv.

    Args:
        ckpt: run's folder, its checkpoint, .safetensors of `detection convert`, or a file of `detection export`: .onnx
            (run by ONNX Runtime), .xml (OpenVINO) or .pt2, on the CPU, in its own precision; several with `fuse`.
        source: image, folder, pattern such as 'photos/*.jpg' (quoted), video, URL of a stream, or number of a camera.
        output: folder to write to.
        score_thresh: detections below it are left out; 0.5, or 0 with `annotations`, by default.
        classes: those wanted, e.g. '[car, person]'; all by default.
        batch_size: images, or tiles, a batch.
        tile: side in pixels of tiles to look at one by one, for large images; 0 looks at whole images. By default the
            tiles of the training, if it was on tiles (`data.tile`), else whole images.
        overlap: of neighbouring tiles, as a share of their side; that of the training by default, else 0.2.
        limit: stop after so many images or frames.
        pictures: false leaves the annotated images or video out.
        labels: auto shrinks names, or leaves them out, where they would cover over a tenth of a picture; all; none.
        line_width: of the boxes in pixels; a 300th of the picture's longer side by default.
        annotations: COCO file, e.g. image_info_test-dev2017.json, whose images in the folder `source` are looked at;
            detections_bbox.json then has the ids of that file.
        device: auto, cpu, cuda, cuda:1, mps.
        devices: GPUs, or processes of the CPU, that share the images; the files are those of one. A video or a stream
            stays on one.
        num_nodes: machines with so many devices each, which all see `source` and `output`.
        precision: of the network: 32, bf16 or 16.
        runtime: pytorch, or onnxruntime or openvino, on the CPU; the exported file is written beside the checkpoint by
            the first call, and used by the next.
        fuse: how what several checkpoints find becomes one: wbf is weighted box fusion, nms keeps the best.
        track: true gives objects ids over the frames of a video, or over images in the order of their names, each in
            a colour of its own.
        trust: packages whose parts the checkpoint may use besides this one's, e.g. my_parts: their code runs.
    """
    check_ranges(score_thresh=(score_thresh, 0, 1), batch_size=(batch_size, 1), limit=(limit, 1), tile=(tile, 0))
    check_ranges(line_width=(line_width, 1), devices=(devices, 1), num_nodes=(num_nodes, 1))
    if track and devices * num_nodes > 1:
        raise DataError(
            "--track follows objects from frame to frame, on one device: leave --devices and --num_nodes out"
        )
    ckpts = members(ckpt, fuse)
    if runtime != "pytorch":
        ckpts, device, precision = _exported(ckpts, runtime, device, precision, trust), "auto", "32"
    fabric = _processes(device, devices, num_nodes) if devices * num_nodes > 1 else None
    on = str(fabric.device) if fabric else device
    asked = [Detector.from_checkpoint(path, on, precision, trust) for path in ckpts]
    detector = asked[0] if fuse is None else Ensemble(asked, fuse, [str(path) for path in ckpts])
    tiles = _tiles(tile, overlap, asked, ckpts)
    detector_of, form = detector.class_names, detector.form
    if unknown := [name for name in classes or () if name not in detector_of]:
        raise DataError(f"{ckpts[0]}: there is no class '{unknown[0]}'; there are: {', '.join(detector_of)}")
    listed = Listed(annotations, Path(source).expanduser(), form) if annotations is not None else None
    found_in = listed or open_source(source, form)
    lowest = score_thresh if score_thresh is not None else 0.5 if annotations is None else 0.0
    if fabric is not None:
        if not isinstance(found_in, Images):
            raise DataError(
                f"{found_in.name}: frames come one after the other, so a video or a stream stays on one device: leave "
                "--devices and --num_nodes out"
            )
        fabric.launch()  # only now, so that one process alone says what is wrong
    drawn: dict[str, Any] = {"pictures": pictures, "labels": labels, "line_width": line_width}
    shared = fabric is not None
    drawn["tracks"] = Tracks(found_in.fps, lowest) if track else None
    done = predict(detector, found_in, output, lowest, classes, batch_size, tiles, limit, **drawn, shared=shared)
    if fabric is not None and not fabric.is_global_zero:
        return
    found, each = sum(done.counts.values()), ", ".join(f"{name} {count}" for name, count in done.counts.items())
    told = f": {each}" if found else f" of score {lowest:g} or more (--score_thresh lowers that)"
    print(f"{done.images} image{'s' * (done.images != 1)}, {found} object{'s' * (found != 1)}{told}")
    print(f"results in {output}")
    if tiles is not None and tile is None:
        print(f"looked at in {tiles}, as it was trained (--tile sets it, 0 for whole images)")
    if done.left_out:
        print(f"in no JSON, as {annotations} lacks the class: {done.left_out}", file=sys.stderr)
    if done.notes:
        print(*done.notes, sep="\n", file=sys.stderr)
    if done.problems:
        print(f"{len(done.problems)} not read:", *done.problems, sep="\n  ", file=sys.stderr)
    if not done.images:
        raise DataError(f"{source}: nothing in it could be read")


def _tiles(
    tile: int | None, overlap: float | None, detectors: Sequence[Detector], ckpts: Sequence[Path]
) -> Tiles | None:
    """What is asked for, or else the tiles that the detectors were trained on.

    Raises:
        DataError: they were trained on different ones.
    """
    known = {detector.tiles for detector in detectors}
    if tile is None and len(known) > 1:
        raise DataError(
            f"{', '.join(map(str, ckpts))} were trained on different tiles: give --tile, 0 for whole images"
        )
    trained = detectors[0].tiles if len(known) == 1 else None
    size = tile if tile is not None else trained.size if trained else 0
    if not size:
        if overlap is not None:
            raise DataError("--overlap is that of tiles: give their side too, --tile")
        return None
    return Tiles(size, overlap if overlap is not None else trained.overlap if trained else 0.2)


def _exported(ckpts: list[Path], runtime: Runtime, device: str, precision: Precision, trust: list[str]) -> list[Path]:
    """The files by which `runtime` runs the checkpoints."""
    if device not in ("auto", "cpu"):
        raise DataError(f"--device {device} is not for --runtime {runtime}, which is run on the CPU: leave one out")
    return [file_of(ckpt, runtime, precision, trust) for ckpt in ckpts]


def _processes(device: str, devices: int, num_nodes: int) -> Fabric:
    """What starts the other processes, or finds those of torchrun and srun."""
    if device not in ("auto", "cpu", "cuda"):
        raise DataError(
            f"--device {device} is one device, but {devices * num_nodes} are to share the images: leave --device out, "
            "or give cpu or cuda"
        )
    return Fabric(accelerator=device, devices=devices, num_nodes=num_nodes, strategy="ddp")


def main(args: Sequence[str]) -> str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    return run_command("predict", predict_in, join_ckpts(args), ValueError, ImportError)
