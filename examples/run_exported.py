"""Run an exported detector with numpy, Pillow and its runtime alone: `python run_exported.py detector.onnx photo.jpg`.

The runtime is onnxruntime for .onnx, and openvino for .xml. Copy this file beside yours: it needs no other.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

FACTS = ("class_names", "mask_grid")


def read(path: str) -> Image.Image:
    """The picture as training reads it: turned by its EXIF, RGB without alpha, of 16 bits the high byte."""
    stored = Image.open(path)
    deep = stored.mode[:4] == "I;16" or (stored.mode, stored.format) in (("I", "PNG"), ("I", "PPM"))
    if stored.mode in ("I", "F") and not deep:
        raise SystemExit(f"{path}: 32-bit pixels have no known range; convert the image to 8 or 16 bits")
    image = ImageOps.exif_transpose(stored)
    return (Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if deep else image).convert("RGB")


def open_model(path: str) -> tuple[Callable[[Any], dict[str, Any]], dict[str, Any]]:
    """What runs the file on `(1, 3, H, W)` uint8, and what the file says of itself, such as `class_names`."""
    if path.endswith(".xml"):
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # else it reports the import
        import openvino

        said = openvino.Core().read_model(path).get_rt_info("detection").value
        facts = {name: json.loads(said[name]) for name in (*FACTS, "inference_precision") if name in said}
        settings = {"INFERENCE_PRECISION_HINT": facts["inference_precision"]}  # else bfloat16 where it can
        compiled = openvino.compile_model(path, "CPU", settings)
        return lambda planes: {port.any_name: value for port, value in compiled(planes).items()}, facts
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    names = [output.name for output in session.get_outputs()]
    said = session.get_modelmeta().custom_metadata_map
    facts = {name: json.loads(said[name]) for name in FACTS if name in said}
    return lambda planes: dict(zip(names, session.run(None, {"images": planes}), strict=True)), facts


def lay_mask(mask: Any, box: Any, size: tuple[int, int], grid: str = "MaskGrid") -> Image.Image:
    """A mask `(m, m)` of probabilities inside its box as picture of `size`, white where the object is."""
    side, border = len(mask), 1  # in cells
    if grid == "TorchvisionMaskGrid":  # the box takes the border in, and is cut to whole pixels
        middle, half = np.add(box[2:], box[:2]) / 2, np.subtract(box[2:], box[:2]) / 2 * (side + 2) / side
        box = [*(middle - half).astype(int).tolist(), *((middle + half).astype(int) + 1).tolist()]
        side, border = side + 2, 0
    a, e = (side / max(box[i + 2] - box[i], 1e-6) for i in (0, 1))  # cells a pixel
    where = (a, 0, border - box[0] * a, 0, e, border - box[1] * e), Image.Resampling.BILINEAR
    laid = Image.fromarray(np.pad(mask, 1)).transform(size, Image.Transform.AFFINE, *where)
    return Image.fromarray(np.uint8(np.asarray(laid) >= 0.5) * np.uint8(110))


def enlarging(cells: int, pixels: int) -> Any:
    """`(pixels, cells)`: how much each cell counts in each pixel of an enlarged row, bicubic with a = -0.75."""
    place = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
    weights = np.zeros((pixels, cells))
    for tap in (-1, 0, 1, 2):
        cell = np.floor(place) + tap
        x = np.abs(place - cell)
        cubic = np.where(x <= 1, (1.25 * x - 2.25) * x**2 + 1, -0.75 * (((x - 5) * x + 8) * x - 4))
        np.add.at(weights, (np.arange(pixels), cell.clip(0, cells - 1).astype(int)), cubic)
    return weights


def find_points(heatmaps: Any, region: Any, box: Any) -> Any:
    """`(k, 2)`: where each of the heatmaps `(k, m, m)`, enlarged to its region, is highest, in pixels of the box."""
    region, box = np.asarray(region, float), np.asarray(box, float)
    sides = np.maximum(region[2:] - region[:2], 1)
    width, height = np.ceil(sides).astype(int)
    across, down = enlarging(heatmaps.shape[2], width), enlarging(heatmaps.shape[1], height)
    highest = np.array([np.argmax(down @ heatmap @ across.T) for heatmap in heatmaps])
    share = (np.stack((highest % width, highest // width), axis=1) + 0.5) / (width, height)
    return box[:2] + share * sides / (region[2:] - region[:2]) * (box[2:] - box[:2])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the .onnx or .xml file")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--score-thresh", type=float, default=0.5)
    parser.add_argument("--draw", action="store_true", help="write PHOTO_detections.png beside each image")
    args = parser.parse_args()
    if absent := [path for path in [args.model, *args.images] if not Path(path).is_file()]:
        raise SystemExit(f"{absent[0]}: there is no such file")
    run, facts = open_model(args.model)
    classes, grid = facts.get("class_names"), facts.get("mask_grid", "MaskGrid")
    for path in args.images:
        pen = ImageDraw.Draw(image := read(path))
        found = run(np.asarray(image).transpose(2, 0, 1)[None])
        chosen = np.flatnonzero(found["scores"][0, : int(found["counts"][0])] >= args.score_thresh)
        if not len(chosen):
            print(f"{path}: nothing scores {args.score_thresh:g} or more (--score-thresh lowers that)")
        for i in chosen:
            box, label = found["boxes"][0, i].tolist(), int(found["labels"][0, i])
            name = classes[label - 1] if classes else f"class {label}"
            points = find_points(found["heatmaps"][0, i], found["regions"][0, i], box) if "heatmaps" in found else ()
            numbers = [*box, *np.ravel(points)]  # of key points x and y, one after the other
            print(path, name, f"{found['scores'][0, i]:.3f}", *(f"{value:.1f}" for value in numbers))
            if "masks" in found:
                image.paste((255, 90, 0), (0, 0), lay_mask(found["masks"][0, i], box, image.size, grid))
            pen.rectangle(box, outline=(255, 90, 0), width=2)
            for x, y in points:
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(0, 200, 255))
            pen.text((box[0] + 3, box[1] + 2), name, fill=(255, 255, 255))
        if args.draw:
            image.save(f"{path}_detections.png")


if __name__ == "__main__":
    main()
