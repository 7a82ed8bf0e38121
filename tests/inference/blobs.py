"""A detector that needs no training, drawn scenes, and films of them."""

from __future__ import annotations

import cv2
import numpy as np

from detection.data import rle
from detection.inference import Detections

NAMES = ("red", "blue")


class Blobs:
    """Stands for a detector: each red or blue region of a dark image is an object, its pixels the mask."""

    class_names, category_ids = NAMES, (7, 90)

    def predict(self, images, batch_size=8):
        return [self._find(image) for image in images]

    def _find(self, image):
        boxes, labels, scores, masks = [], [], [], []
        for label, channel in ((1, 0), (2, 2)):
            bright = np.ascontiguousarray(image[..., channel] > 128).astype(np.uint8)
            _, regions, stats, _ = cv2.connectedComponentsWithStats(bright)
            for number, (x, y, w, h, area) in enumerate(stats[1:].tolist(), start=1):
                boxes.append((x, y, x + w, y + h))
                labels.append(label)
                scores.append(min(0.99, 0.5 + area / 1e5))
                masks.append(rle.encode(regions == number))
        return Detections(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int64),
            np.array(scores, np.float32),
            NAMES,
            image.shape[:2],
            tuple(masks),
        )


def scene(height, width, *rectangles):
    image = np.full((height, width, 3), 30, np.uint8)
    for channel, x1, y1, x2, y2 in rectangles:
        image[y1:y2, x1:x2, channel] = 220
    return image


def film(path, codec, count=9):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 12.0, (96, 64))
    for i in range(count):
        writer.write(np.ascontiguousarray(scene(64, 96, (0, 5 * i + 4, 16, 5 * i + 28, 40))[..., ::-1]))
    writer.release()
    return path
