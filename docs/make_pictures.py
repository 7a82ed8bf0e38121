"""Makes the pictures of README.md and the site again, from a run of the quickstart.

    detection fit --wandb off
    python docs/make_pictures.py --run runs/quickstart/<time>

They show nothing but the scenes that this project draws, and what the run's `best.ckpt` makes of them. The gallery of
the report is a picture of the page, taken by playwright's chromium or that of the system. With
`--certificate FILE.certificate.json` in the place of `--run` that certificate alone is drawn.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import Tensor

from detection import Detector
from detection.__main__ import main as detection_command
from detection.data import scenes
from detection.data.coco import read_coco
from detection.data.dataset import make_target
from detection.data.images import read_image
from detection.data.records import Record
from detection.evaluation.plots import training_curves
from detection.evaluation.results import image_result
from detection.evaluation.suspects_page import cut
from detection.evaluation.suspicion import suspects
from detection.teaching import plot_anchors, plot_proposals, plot_pyramid, plot_samples
from detection.visualize import draw_objects, side_by_side

SHOWN = 0.5  # score from which detections are drawn
SHAPE = (1.1, 1.25)  # width / height of the scenes that are shown
MOST = 200_000  # bytes of a picture
FILTERS = "mistake=missed&score=0.5"  # of the gallery that is shown


def detections(detector: Detector, records: list[tuple[Record, Path]]) -> Image.Image:
    """Objects beside what the detector finds, for each image."""
    pairs = []
    for record, path in records:
        pixels = read_image(path)
        found = detector(path)
        sure = found.scores >= SHOWN
        drawn = draw_objects(pixels, record.boxes, record.labels, detector.class_names, side=300)
        found_too = draw_objects(
            pixels, found.boxes[sure], found.labels[sure], detector.class_names, found.scores[sure], side=300
        )
        pairs.append((drawn, found_too))
    return side_by_side(pairs, ("ground truth", f"detections of score {SHOWN} and more"), columns=2)


def certificate(path: Path) -> Figure:
    """Each stage's difference beside what is allowed, on a logarithmic scale; equal stages lie at the left edge."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in content["rows"] if row["tolerance"] and "partner" not in row["stage"]]
    figure = Figure(figsize=(7.6, 0.28 * len(rows) + 1.1))
    axes = figure.subplots()
    least = 1e-8
    for i, row in enumerate(rows):
        value = max(row["difference"], least)
        axes.plot([value, row["tolerance"]], [i, i], color="#c9d4e2", linewidth=2, zorder=1)
        axes.plot(value, i, "o", color="#1f6feb", label="difference" if not i else None)
        axes.plot(row["tolerance"], i, "|", color="#d1442f", markersize=11, label="allowed" if not i else None)
    axes.set_xscale("log")
    axes.set_xlim(least / 2, 1)
    units = {"pixels": ", pixels", "share": ", share"}
    axes.set_yticks(range(len(rows)), [row["stage"] + units.get(row["unit"], "") for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{content['file']['name']} against {content['reference']}", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def suspicious(detector: Detector, records: list[tuple[Record, Path]]) -> Image.Image:
    """The strongest suspects among labels of which some are damaged: removed, of another class, moved."""
    results = []
    for number, (record, path) in enumerate(records):
        found = detector(path)
        boxes, labels = record.boxes.copy(), record.labels.copy()
        kept = np.arange(len(labels)) != (0 if number % 10 == 0 else -1)
        if number % 10 == 3:
            labels[0] = labels[0] % len(detector.class_names) + 1
        if number % 10 == 6:
            boxes[0] += 0.3 * (boxes[0, 2] - boxes[0, 0])
        target = Record.of(number, str(path), (record.height, record.width), boxes[kept], labels[kept])
        detected = {"boxes": found.boxes, "labels": found.labels, "scores": found.scores}
        results.append(image_result(detected, make_target(target), len(detector.class_names)))
    pairs, names = [], detector.class_names
    strongest = suspects(results, len(names))
    for kind in ("missing", "class", "box"):
        for one in [own for own in strongest if own.kind == kind][:2]:
            shapes = [shape for shape in (one.annotated, one.proposed) if shape is not None]
            square, left, top = cut(read_image(Path(results[one.image].file_name)), shapes)
            drawn = []
            for shape in (one.annotated, one.proposed):
                own = [shape] if shape is not None else []
                boxes = np.array([s.box for s in own], np.float32).reshape(-1, 4) - np.array([left, top, left, top])
                drawn.append(
                    draw_objects(square, boxes, np.array([s.label for s in own]), names, side=160, names="all")
                )
            pairs.append((drawn[0], drawn[1]))
    return side_by_side(pairs, ("annotated", "found"), columns=3)


def save(picture: Image.Image | Figure, path: Path, most: int = MOST) -> None:
    """Write a JPEG, the better the more room there is."""
    if isinstance(picture, Figure):
        picture.savefig(path.with_suffix(".png"), dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.08)
        picture = Image.open(path.with_suffix(".png")).convert("RGB")
        path.with_suffix(".png").unlink()
    for quality in (88, 80, 70, 60):
        picture.save(path, quality=quality, optimize=True, progressive=True)
        if path.stat().st_size <= most:
            break
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size // 1000} kB")


def example(record: Record, path: Path) -> tuple[Tensor, dict[str, Any]]:
    """An image `(3, h, w)` and its target, as detectors take them."""
    pixels = torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)
    target = {"boxes": torch.as_tensor(record.boxes), "labels": torch.as_tensor(record.labels).long()}
    return pixels, target


def gallery(run: Path, root: Path) -> Image.Image:
    """The gallery of the run's report, filtered."""
    annotations, images = scenes.SPLITS["val"]
    where = ["--root", str(root), "--annotations", annotations, "--images", images, "--output", str(run / "report")]
    if complaint := detection_command(["evaluate", "--ckpt", str(run), "--accelerator", "cpu", *where]):
        raise SystemExit(complaint)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 720}, color_scheme="light")
        page.goto(f"{(run / 'report' / 'report.html').resolve().as_uri()}#{FILTERS}")
        page.wait_for_timeout(1000)  # for the pictures
        shot = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(shot)).convert("RGB")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--run", type=Path, help="folder of a run of the quickstart")
    wanted.add_argument("--certificate", type=Path, help="JSON of a certificate")
    parser.add_argument("--scenes", type=Path, help="folder of its scenes (default: drawn anew into the run's folder)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    args = parser.parse_args()
    if args.certificate:
        path = args.output / "certificate.png"
        certificate(args.certificate).savefig(path, dpi=80, facecolor="white", bbox_inches="tight", pad_inches=0.08)
        Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=16).save(path, optimize=True)  # small
        return
    root = args.scenes or scenes.draw(args.run / "scenes", train=4, val=60)
    index = read_coco(root, *scenes.SPLITS["val"])
    full = sorted(index.records, key=lambda r: -len(r.labels))
    # Of one shape, so that the sheet has no gaps, and not so full that names hide the objects.
    chosen = [
        (r, Path(root) / r.file_name) for r in full if SHAPE[0] < r.width / r.height < SHAPE[1] and len(r.labels) <= 8
    ]
    detector = Detector.from_checkpoint(args.run / "best.ckpt", device="cpu")
    model, (image, target) = detector.model, example(*chosen[0])
    args.output.mkdir(parents=True, exist_ok=True)
    save(detections(detector, chosen[:4]), args.output / "detections.jpg")
    save(suspicious(detector, [(r, Path(root) / r.file_name) for r in full]), args.output / "suspects.jpg", 45_000)
    save(plot_anchors(model, image), args.output / "anchors.jpg")
    save(plot_proposals(model, image, target, counts=(10, 50, 300)), args.output / "proposals.jpg")
    save(plot_samples(model, image, target, detector.class_names), args.output / "samples.jpg")
    save(plot_pyramid(model, image), args.output / "pyramid.jpg")
    save(gallery(args.run, Path(root)), args.output / "gallery.jpg", most=80_000)
    with (args.run / "metrics.csv").open(newline="") as file:
        save(training_curves(list(csv.DictReader(file))), args.output / "curves.jpg")


if __name__ == "__main__":
    main()
