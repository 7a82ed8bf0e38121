"""Random damage to valid annotations: a clean load or a DataError, and never a box that is not in the file."""

from __future__ import annotations

import copy
import json
import os
import random
import string
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from defusedxml.ElementTree import fromstring
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detection.data.coco import read_coco
from detection.data.images import image_size, read_image
from detection.data.records import DataError, Index
from detection.data.rle import compress
from detection.data.voc import read_voc
from detection.data.yolo import read_yolo

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=10_000,  # ms: a hang is a failure
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    print_blob=True,
)
WIDTH, HEIGHT = 40, 30
SEEDS = st.integers(0, 2**32)
JUNK = [
    *(None, True, False, 0, -1, 1, 3, 7, 39.5, -0.0, 1e-320, 1e300, -1e18, 2**31, 2**63, 10**30, -(10**400)),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "0",
        "9",
        "-3",
        "1e3",
        "\u0000",
        "\u0661",
        "\ud800",
        "x" * 5000,
    ),
    *("a.png", "../a.png", "/etc/passwd", "sub", "nul\u0000.png", "C:\\x", [], {}, [[]], [None], [1], [1, 2, 3, 4]),
    *([[1, 2, 3, 4, 5, 6]], [float("nan")] * 4, ["1", "2", "3", "4"], [0, 0, 1e9, 1e9], [5, 5, 0, 3], [38, 28, 5, 5]),
    *({"size": [30, 40], "counts": [1200]}, {"size": [30, 40], "counts": [5, 10, 1185]}, {"size": [30, 40]}),
    *({"size": [30, 40], "counts": "o" * 50}, {"size": "x", "counts": {}}, {"counts": [-5, 1205], "size": [30, 40]}),
    {"size": [30, 40], "counts": [0, 10**15]},
]


def coco_content() -> dict[str, Any]:
    def annotation(number: int, image: int, **more: Any) -> dict[str, Any]:
        box = [number, 2 + number, 10.5, 20.25]
        return {"id": number, "image_id": image, "category_id": 9 * (number % 2), "bbox": box, "area": 99.5} | more

    polygon = [6, 4, 20, 4, 20, 9, 6, 9]
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 0, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 7, "file_name": "sub/b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 0, "name": "cat"}],
        "annotations": [
            annotation(1, 0, iscrowd=0, segmentation=[polygon]),
            annotation(2, 0, iscrowd=1, segmentation={"size": [30, 40], "counts": [300, 20, 880]}),
            annotation(3, 7, segmentation={"size": [30, 40], "counts": compress([300, 20, 880]).decode()}),
            annotation(4, 7, segmentation=[]),
        ],
    }


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    found = [(node, key) for key in keys]
    for key in keys:
        found += places(node[key])
    return found


def damage_json(content: dict[str, Any], rng: random.Random) -> str | bytes:
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 4)):
        container, key = rng.choice(places(content) or [({"": 0}, "")])
        action = rng.random()
        if action < 0.2:
            del container[key]
        elif action < 0.4 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif action < 0.5:
            container[key] = [container[key]]
        elif action < 0.6:
            container[key] = copy.deepcopy(rng.choice(places(content)))[0]
        elif action < 0.65:
            container[key] = str(container[key])
        else:
            container[key] = copy.deepcopy(rng.choice(JUNK))
    text = json.dumps(content)
    return text if rng.random() < 0.8 else damage_text(text, rng)


def damage_text(text: str, rng: random.Random) -> bytes:
    data = bytearray(text, "utf-8", "surrogatepass")
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(data) or 1)
        action = rng.random()
        if action < 0.3:
            del data[at : at + rng.choice((1, 1, 5, 100))]
        elif action < 0.6:
            data[at:at] = rng.choice(
                (b"<", b"&", b">", b'"', b"{", b"]", b",", b"\x00", b"\xff", b"9", b"-", b"e9", b"\n")
            )
        elif action < 0.9 and at < len(data):
            data[at] = rng.randrange(256)
        else:
            data[at:at] = data[at : at + 200]
    return bytes(data)


def well_formed(index: Index) -> None:
    """What every index promises, see `Record`."""
    assert index.records and index.classes and len(index.category_ids) == len(index.classes)
    for record in index.records:
        count = len(record.boxes)
        assert record.boxes.shape == (count, 4) and record.boxes.dtype == np.float32
        for name in ("labels", "areas", "iscrowd", "difficult", "annotation_ids"):
            assert getattr(record, name).shape == (count,)
        x1, y1, x2, y2 = record.boxes.T
        assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= WIDTH).all() and (y2 <= HEIGHT).all()
        assert (x2 > x1).all() and (y2 > y1).all()
        assert ((record.labels >= 1) & (record.labels <= len(index.classes))).all()
        assert np.isfinite(record.areas).all() and (record.areas > 0).all()
        assert record.segments is None or len(record.segments) == count
        assert (record.width, record.height) == (WIDTH, HEIGHT) and not record.file_name.startswith(("/", ".."))
    assert all(len(str(defect)) < 2000 for defect in index.defects)


def names(error: DataError, file: str) -> None:
    assert file in str(error) and len(str(error)) < 1500


def clipped(x1: float, y1: float, x2: float, y2: float) -> tuple[float, ...]:
    corners = np.clip([x1, y1, x2, y2], 0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
    return tuple(np.asarray(corners, np.float32).tolist())


def coco_boxes(text: str | bytes) -> set[tuple[float, ...]]:
    """Every box that the file may mean, by a second, naive reading."""
    found = set()
    for item in json.loads(text)["annotations"]:
        if isinstance(item, dict):
            try:
                x, y, w, h = (float(v) for v in item["bbox"])
                found.add(clipped(x, y, x + w, y + h))
            except (KeyError, TypeError, ValueError, OverflowError):
                pass
            shape = item.get("segmentation")
            if isinstance(shape, list):
                points = [v for p in shape if isinstance(p, list) for v in p if isinstance(v, int | float)]
                found.add(clipped(*(f(points[i::2] or [0]) for f in (min, max) for i in (0, 1))))
    # the run lengths of `coco_content` and `JUNK`, by hand
    return found | {(10, 0, 11, 20), (0, 5, 1, 15), (0, 0, WIDTH, HEIGHT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("a.png", "sub/b.png", "JPEGImages/a.png", "images/train/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / name)
    for name in ("Annotations", "labels/train"):
        (root / name).mkdir(parents=True)
    (root / "data.yaml").write_text("names: [cat, dog]")
    return root


@fuzz
@given(SEEDS, st.booleans())
def test_coco(folder: Path, seed: int, masks: bool) -> None:
    text = damage_json(coco_content(), random.Random(seed))
    (folder / "gt.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        index = read_coco(folder, "gt.json", masks=masks)
    except DataError as error:
        return names(error, "gt.json")
    well_formed(index)
    allowed = coco_boxes(text)
    if not any(isinstance(s, list) and len(s) > 1 for r in index.records for s in r.segments or ()):
        assert {tuple(box) for record in index.records for box in record.boxes.tolist()} <= allowed


@pytest.mark.parametrize("width", [0, WIDTH + 1])
def test_an_endless_id_is_cut_in_what_is_said(folder: Path, width: int) -> None:
    content = coco_content()
    content["images"][0] |= {"id": "x" * 5000, "width": width}
    (folder / "gt.json").write_text(json.dumps(content))
    well_formed(read_coco(folder, "gt.json"))


def test_undamaged_coco_is_read_whole(folder: Path) -> None:
    (folder / "gt.json").write_text(json.dumps(coco_content()))
    index = read_coco(folder, "gt.json", masks=True)
    well_formed(index)
    assert sum(len(r.boxes) for r in index.records) == 4
    assert [s is not None for r in index.records for s in r.segments or ()] == [True, True, True, False]


def voc_tree() -> ElementTree.Element:
    def leaf(parent: ElementTree.Element, tag: str, text: object = "") -> ElementTree.Element:
        child = ElementTree.SubElement(parent, tag)
        child.text = str(text)
        return child

    tree = ElementTree.Element("annotation")
    leaf(tree, "filename", "a.png")
    size = leaf(tree, "size")
    for tag, value in (("width", WIDTH), ("height", HEIGHT), ("depth", 3)):
        leaf(size, tag, value)
    for number in range(3):
        item = leaf(tree, "object")
        leaf(item, "name", ("cat", "dog", "cat")[number])
        leaf(item, "difficult", number % 2)
        box = leaf(item, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), (1 + number, 2, 20.5 + number, 30), strict=True):
            leaf(box, tag, value)
    return tree


def damage_xml(tree: ElementTree.Element, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        parents = [node for node in tree.iter() if len(node)] or [tree]
        parent = rng.choice(parents)
        child = rng.choice(list(parent) or [parent])
        action = rng.random()
        if action < 0.25 and child is not parent:
            parent.remove(child)
        elif action < 0.4:
            parent.append(copy.deepcopy(child))
        elif action < 0.5:
            parent[:] = rng.sample(list(parent), len(parent))
        elif action < 0.6:
            child.tag = rng.choice(("object", "bndbox", "name", "xmin", "size", "x"))
        else:
            junk = (str(value) for value in JUNK if not isinstance(value, list | dict))
            child.text = "".join(c for c in rng.choice(list(junk)) if c in string.printable and c not in "\x0b\x0c")
    data = ElementTree.tostring(tree)
    return data if rng.random() < 0.7 else damage_text(data.decode(), rng)


def voc_boxes(data: bytes) -> set[tuple[float, ...]]:
    found = set()
    for box in fromstring(data).iter("bndbox"):
        try:
            values = [float(box.findtext(tag) or "") for tag in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError:
            continue
        found.add(clipped(values[0] - 1, values[1] - 1, *values[2:]))
    return found


@fuzz
@given(SEEDS)
def test_voc(folder: Path, seed: int) -> None:
    data = damage_xml(voc_tree(), random.Random(seed))
    (folder / "Annotations" / "a.xml").write_bytes(data)
    try:
        index = read_voc(folder)
    except DataError as error:
        return names(error, str(folder))
    well_formed(index)
    assert {tuple(box) for record in index.records for box in record.boxes.tolist()} <= voc_boxes(data)


@fuzz
@given(
    st.one_of(SEEDS.map(lambda s: damage_text("1 0.5 0.5 0.25 0.5\n0 .1 .1 .2 .2\n", random.Random(s))), st.binary())
)
def test_yolo(folder: Path, data: bytes) -> None:
    (folder / "labels" / "train" / "a.txt").write_bytes(data)
    try:
        index = read_yolo(folder, "train")
    except DataError as error:
        return names(error, str(folder))
    well_formed(index)


@fuzz
@given(SEEDS, st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP", "BMP"]))
def test_images(tmp_path: Path, seed: int, kind: str) -> None:
    rng, path = random.Random(seed), tmp_path / "image"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path, kind)
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(min(len(data), rng.choice((40, 400, 10_000))))
        if rng.random() < 0.2:
            del data[at : at + rng.randint(1, 50)]
        else:
            data[at] = rng.randrange(256)
    path.write_bytes(data)
    try:
        size, image = image_size(path), read_image(path)
    except DataError as error:
        return names(error, str(path))
    assert image.shape == (*size, 3) and image.dtype == np.uint8
