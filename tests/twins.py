"""One drawn data set in several formats: 8-bit RGB, four channels, 16 bits, grey, and what a test asks for.

`python -m tests.twins` trains a detector on each format and prints the AP beside that of its twin.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.cli.fit import main

CLASSES = ("disc", "square", "triangle")
HEIGHT, WIDTH = 96, 128
Shape = tuple[int, list[int]]  # label, and x, y, width, height


def draw_shapes(rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[Shape]]:
    """A picture `(HEIGHT, WIDTH, 3)` of up to four shapes that don't overlap, in any colours on a grainy slope."""
    slope = np.linspace(rng.uniform(40, 200, 3), rng.uniform(40, 200, 3), WIDTH)[None].repeat(HEIGHT, 0)
    picture = (slope + rng.normal(0, 8, (HEIGHT, WIDTH, 3))).clip(0, 255).astype(np.uint8)
    shapes: list[Shape] = []
    taken = np.zeros((HEIGHT, WIDTH), bool)
    for _ in range(int(rng.integers(1, 5))):
        side, label = int(rng.integers(14, 44)), int(rng.integers(1, 4))
        x, y = int(rng.integers(1, WIDTH - side - 1)), int(rng.integers(1, HEIGHT - side - 1))
        if taken[y : y + side, x : x + side].any():
            continue
        taken[y : y + side, x : x + side] = True
        under = picture[y : y + side, x : x + side].mean(axis=(0, 1))
        colour = tuple(int(v) for v in np.where(under > 127, rng.uniform(0, 70, 3), rng.uniform(185, 255, 3)))
        canvas = np.ascontiguousarray(picture[y : y + side, x : x + side])
        if label == 1:
            cv2.circle(canvas, (side // 2, side // 2), (side - 1) // 2, colour, -1)
        elif label == 2:
            canvas[:] = colour
        else:
            corners = np.array([[side // 2, 0], [0, side - 1], [side - 1, side - 1]])
            cv2.fillPoly(canvas, [corners], colour)
        picture[y : y + side, x : x + side] = canvas
        shapes.append((label, [x, y, side, side]))
    return picture, shapes


def four(picture: NDArray[np.uint8]) -> NDArray[Any]:
    """RGB and a dimmed negative of their mean, which a bare RGB reader would take for transparency."""
    return np.dstack([picture, ((255 - picture.mean(axis=2)) / 2).astype(np.uint8)])


def sixteen(picture: NDArray[np.uint8]) -> NDArray[Any]:
    """The same light in 16 bits."""
    return picture.astype(np.uint16) * 257


def dim(picture: NDArray[np.uint8]) -> NDArray[Any]:
    """The same in the lowest 12 of 16 bits, as many sensors have it: its high byte has 16 steps."""
    return picture.astype(np.uint16) * 16


def grey(picture: NDArray[np.uint8]) -> NDArray[Any]:
    """One channel."""
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]


def write(path: Path, pixels: NDArray[Any]) -> None:
    """A file of the kind that its name says; PNG and TIFF as OpenCV writes them."""
    if path.suffix == ".npy":
        np.save(path, pixels)
        return
    order = [2, 1, 0, 3][: pixels.shape[2]] if pixels.shape[2] in (3, 4) else slice(None)
    assert cv2.imwrite(str(path), np.ascontiguousarray(pixels[..., order]))


def draw_set(
    root: Path,
    form: Callable[[NDArray[np.uint8]], NDArray[Any]] = lambda picture: picture,
    suffix: str = ".png",
    train: int = 12,
    val: int = 6,
) -> Path:
    """A COCO data set of shapes in this form; the pictures are the same whatever the form."""
    for split, count, seed in (("train", train, 0), ("val", val, 1)):
        (root / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            picture, shapes = draw_shapes(np.random.default_rng([seed, i]))
            name = f"{i:04d}{suffix}"
            write(root / split / name, form(picture))
            images.append({"id": i + 1, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for label, box in shapes:
                number, area = len(annotations) + 1, box[2] * box[3]
                annotation = {"id": number, "image_id": i + 1, "category_id": label, "bbox": box, "area": area}
                annotations.append(annotation | {"iscrowd": 0})
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def flags(root: Path) -> list[str]:
    """Flags of `fit.py` that name the set."""
    names = {"format": "coco", "root": str(root), "train_split": "train.json", "val_split": "val.json"}
    names |= {"train_images": "train", "val_images": "val"}
    return [f"--data.{name}={value}" for name, value in names.items()]


SETS: dict[str, tuple[Callable[[NDArray[np.uint8]], NDArray[Any]], int, int]] = {  # form, channels, bits
    "RGB, 8 bits": (lambda picture: picture, 3, 8),
    "four channels": (four, 4, 8),
    "16 bits": (sixteen, 3, 16),
    "12 of 16 bits": (dim, 3, 16),
    "one channel": (grey, 1, 8),
    "one channel, read as RGB": (grey, 3, 8),
}


def average_precision(name: str, seed: int) -> float:
    """Validation AP after 160 steps of the quickstart's detector on 320 images of one format."""
    form, channels, bits = SETS[name]
    with tempfile.TemporaryDirectory() as folder:
        root = draw_set(Path(folder) / "data", form, train=320, val=60)
        wanted = [*flags(root), f"--data.channels={channels}", f"--data.depth={bits}", f"--output={folder}/runs"]
        wanted += ["--config=quickstart", "--name=twin", "--data.min_size=96", "--data.max_size=128", "--wandb=off"]
        wanted += ["--trainer.max_epochs=2", f"--seed_everything={seed}", "--data.num_workers=0"]
        if main([*wanted, "--trainer.accelerator=cpu"]):
            raise RuntimeError(f"training on {name} failed")
        (metrics,) = Path(folder).glob("runs/twin/*/metrics.csv")
        with metrics.open(newline="") as file:
            return [float(row["val/map"]) for row in csv.DictReader(file) if row.get("val/map")][-1]


if __name__ == "__main__":
    for number in map(int, sys.argv[1:] or ["0"]):
        for kind in SETS:
            print(f"seed {number}, {kind}: AP {average_precision(kind, number):.4f}", flush=True)
