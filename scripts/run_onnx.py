"""Run an exported detector with numpy, Pillow and onnxruntime alone: `python run_onnx.py detector.onnx photo.jpg`.

This file needs nothing of the project: copy it beside the .onnx file.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def detect(session: Any, image: Image.Image) -> dict[str, Any]:
    """Boxes xyxy in pixels, labels from 1 on, scores, and with a mask branch masks inside the boxes, of one image."""
    planes = np.asarray(image, np.uint8).transpose(2, 0, 1)[None]
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"images": planes}), strict=True))
    count = int(found.pop("counts")[0])
    return {name: values[0, :count] for name, values in found.items()}


def lay_mask(mask: Any, box: Any, size: tuple[int, int]) -> Image.Image:
    """A mask `(m, m)` of probabilities inside its box as picture of `size`, white where the object is."""
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    small = Image.fromarray((mask * 255).astype(np.uint8))
    laid = Image.new("L", size)
    laid.paste(small.resize((max(1, x2 - x1), max(1, y2 - y1)), Image.Resampling.BILINEAR), (x1, y1))
    return laid.point(lambda value: 110 if value > 127 else 0)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="the .onnx file")
parser.add_argument("images", nargs="+")
parser.add_argument("--score-thresh", type=float, default=0.5)
parser.add_argument("--draw", action="store_true", help="write PHOTO_detections.png beside each image")
args = parser.parse_args()
session = onnxruntime.InferenceSession(args.model, providers=onnxruntime.get_available_providers())
classes = json.loads(session.get_modelmeta().custom_metadata_map.get("class_names", "null"))
for path in args.images:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    found, pen = detect(session, image), ImageDraw.Draw(image)
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
