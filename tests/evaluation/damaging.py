"""Damage done on purpose to the labels of a VOC folder: objects removed, classes swapped, boxes moved or scaled."""

from __future__ import annotations

import math
import os
import random
import shutil
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

from defusedxml.ElementTree import parse

SIDES = ("xmin", "ymin", "xmax", "ymax")
Box = tuple[int, int, int, int]


class Damage(NamedTuple):
    """What was done: `kind` is missing, class or box; the box as it was, and as it is now."""

    image: str
    kind: str
    name: str
    box: Box
    now: Box


def damage_voc(source: Path, target: Path, split: str, seed: int, share: float = 0.05) -> list[Damage]:
    """A copy of the folder in which this share of the objects of a split is damaged, a third of it in each way.

    A box is moved by 25 to 50 % of its sides in any direction, or made larger or smaller by as much.
    """
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in [target, *target.rglob("*")]:  # the source may be read-only
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    images = (source / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    trees = {image: parse(source / "Annotations" / f"{image}.xml") for image in images}
    objects = [(image, item) for image in images for item in trees[image].iter("object") if _has_area(_box(item))]
    names = sorted({item.findtext("name", "") for _, item in objects})
    draw, done = random.Random(seed), list[Damage]()
    for k, (image, item) in enumerate(draw.sample(objects, round(share * len(objects)))):
        kind, box, name = ("missing", "class", "box")[k % 3], _box(item), item.findtext("name", "")
        now = box
        if kind == "missing":
            trees[image].getroot().remove(item)
        elif kind == "class":
            _set(item, "name", draw.choice([other for other in names if other != name]))
        else:
            size = trees[image].find("size")
            assert size is not None
            width, height = int(size.findtext("width", "")), int(size.findtext("height", ""))
            while now == box or not _has_area(now) or _iou(box, now) > 0.8:  # cut at the edge it may be nearly the old
                now = _moved(draw, box, width, height)
            for side, value in zip(SIDES, now, strict=True):
                _set(item, f"bndbox/{side}", str(value))
        done.append(Damage(image, kind, name, box, now))
    for image, tree in trees.items():
        tree.write(target / "Annotations" / f"{image}.xml")
    return done


def _moved(draw: random.Random, box: Box, width: int, height: int) -> Box:
    share, w, h = draw.uniform(0.25, 0.5), box[2] - box[0], box[3] - box[1]
    if draw.random() < 0.5:
        angle = draw.uniform(0, 2 * math.pi)
        dx, dy = share * w * math.cos(angle), share * h * math.sin(angle)
        new = (box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy)
    else:
        grown = draw.choice((-1, 1)) * share / 2
        dx, dy = grown * w, grown * h
        new = (box[0] - dx, box[1] - dy, box[2] + dx, box[3] + dy)
    return max(1, round(new[0])), max(1, round(new[1])), min(width, round(new[2])), min(height, round(new[3]))


def _box(item: Element) -> Box:
    x1, y1, x2, y2 = (int(float(item.findtext(f"bndbox/{side}", "0"))) for side in SIDES)
    return x1, y1, x2, y2


def _set(item: Element, path: str, text: str) -> None:
    found = item.find(path)
    assert found is not None
    found.text = text


def _has_area(box: Box) -> bool:
    return box[2] > box[0] and box[3] > box[1]


def _iou(a: Box, b: Box) -> float:
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)
