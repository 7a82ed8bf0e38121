"""Run an exported detector with numpy, Pillow and onnxruntime alone: `python run_onnx.py detector.onnx photo.jpg`.

This file needs nothing of the project: copy it beside the .onnx file.
"""

import argparse
import json
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def read(path: str) -> Image.Image:
    """The picture as training reads it: turned by its EXIF, RGB without alpha, of 16 bits the high byte."""
    stored = Image.open(path)
    deep = stored.mode[:4] == "I;16" or (stored.mode, stored.format) in (("I", "PNG"), ("I", "PPM"))
    if stored.mode in ("I", "F") and not deep:
        raise SystemExit(f"{path}: 32-bit pixels have no known range; convert the image to 8 or 16 bits")
    image = ImageOps.exif_transpose(stored)
    return (Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if deep else image).convert("RGB")


def detect(session: Any, image: Image.Image) -> dict[str, Any]:
    """Boxes xyxy in pixels, labels from 1 on, scores, and with a mask branch masks inside the boxes, of one image."""
    names, planes = [output.name for output in session.get_outputs()], np.asarray(image).transpose(2, 0, 1)
    found = dict(zip(names, session.run(None, {"images": planes[None]}), strict=True))
    return {name: values[0, : int(found["counts"][0])] for name, values in found.items() if name != "counts"}


def lay_mask(mask: Any, box: Any, size: tuple[int, int]) -> Image.Image:
    """A mask `(m, m)` of probabilities inside its box as picture of `size`, white where the object is."""
    a, e = (len(mask) / max(box[i + 2] - box[i], 1e-6) for i in (0, 1))  # cells a pixel; the border has one more
    where = (a, 0, 1 - box[0] * a, 0, e, 1 - box[1] * e), Image.Resampling.BILINEAR
    laid = Image.fromarray(np.pad(mask, 1)).transform(size, Image.Transform.AFFINE, *where)
    return Image.fromarray(np.uint8(np.asarray(laid) >= 0.5) * np.uint8(110))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="the .onnx file")
parser.add_argument("images", nargs="+")
parser.add_argument("--score-thresh", type=float, default=0.5)
parser.add_argument("--draw", action="store_true", help="write PHOTO_detections.png beside each image")
args = parser.parse_args()
session = onnxruntime.InferenceSession(args.model, providers=onnxruntime.get_available_providers())
classes = json.loads(session.get_modelmeta().custom_metadata_map.get("class_names", "null"))
for path in args.images:
    found, pen = detect(session, image := read(path)), ImageDraw.Draw(image)
    for i in np.flatnonzero(found["scores"] >= args.score_thresh):
        box, label = found["boxes"][i].tolist(), int(found["labels"][i])
        name = classes[label - 1] if classes else f"class {label}"
        print(path, name, f"{found['scores'][i]:.3f}", *(f"{value:.1f}" for value in box))
        if "masks" in found:
            image.paste((255, 90, 0), (0, 0), lay_mask(found["masks"][i], box, image.size))
        pen.rectangle(box, outline=(255, 90, 0), width=2)
        pen.text((box[0] + 3, box[1] + 2), name, fill=(255, 255, 255))
    if args.draw:
        image.save(f"{path}_detections.png")
