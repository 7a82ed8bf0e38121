"""Run an exported detector with numpy, Pillow and onnxruntime alone: `python run_onnx.py detector.onnx photo.jpg`.

This file needs nothing of the project: copy it beside the .onnx file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps


def read(path: str) -> Image.Image:
    """The picture as training reads it: turned by its EXIF, RGB without alpha, of 16 bits the high byte."""
    stored = Image.open(path)
    deep = stored.mode[:4] == "I;16" or (stored.mode, stored.format) in (("I", "PNG"), ("I", "PPM"))
    if stored.mode in ("I", "F") and not deep:
        raise SystemExit(f"{path}: 32-bit pixels have no known range; convert the image to 8 or 16 bits")
    image = ImageOps.exif_transpose(stored)
    return (Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if deep else image).convert("RGB")


def open_onnx(path: str) -> tuple[Callable[[Any], dict[str, Any]], list[str] | None]:
    """What runs the file on `(1, 3, H, W)` uint8, and its classes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    names, facts = [output.name for output in session.get_outputs()], session.get_modelmeta().custom_metadata_map
    classes = json.loads(facts.get("class_names", "null"))
    return lambda planes: dict(zip(names, session.run(None, {"images": planes}), strict=True)), classes


def lay_mask(mask: Any, box: Any, size: tuple[int, int]) -> Image.Image:
    """A mask `(m, m)` of probabilities inside its box as picture of `size`, white where the object is."""
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    small, laid = Image.fromarray((mask * 255).astype(np.uint8)), Image.new("L", size)
    laid.paste(small.resize((max(1, x2 - x1), max(1, y2 - y1)), Image.Resampling.BILINEAR), (x1, y1))
    return laid.point(lambda value: 110 if value > 127 else 0)


def main(open_model: Callable[[str], Any]) -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description="Run an exported detector.")
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--score-thresh", type=float, default=0.5)
    parser.add_argument("--draw", action="store_true", help="write PHOTO_detections.png beside each image")
    args = parser.parse_args()
    if absent := [path for path in [args.model, *args.images] if not Path(path).is_file()]:
        raise SystemExit(f"{absent[0]}: there is no such file")
    run, classes = open_model(args.model)
    for path in args.images:
        pen = ImageDraw.Draw(image := read(path))
        found = {name: values[0] for name, values in run(np.asarray(image).transpose(2, 0, 1)[None]).items()}
        chosen = np.flatnonzero(found["scores"][: int(found["counts"])] >= args.score_thresh)
        for i in chosen:
            box, label = found["boxes"][i].tolist(), int(found["labels"][i])
            name = classes[label - 1] if classes else f"class {label}"
            print(path, name, f"{found['scores'][i]:.3f}", *(f"{value:.1f}" for value in box))
            if "masks" in found:
                image.paste((255, 90, 0), (0, 0), lay_mask(found["masks"][i], box, image.size))
            pen.rectangle(box, outline=(255, 90, 0), width=2)
            pen.text((box[0] + 3, box[1] + 2), name, fill=(255, 255, 255))
        if not len(chosen):
            print(f"{path}: nothing scores {args.score_thresh:g} or more (--score-thresh lowers that)")
        if args.draw:
            image.save(f"{path}_detections.png")


if __name__ == "__main__":
    main(open_onnx)
