from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from defusedxml import ElementTree
from PIL import Image

from detection.data import rle
from detection.data.coco import read_coco
from detection.data.records import DataError, Index
from detection.data.voc import VOC_CLASSES, read_voc

BOX = "<xmin>1</xmin><ymin>2</ymin><xmax>40</xmax><ymax>30</ymax>"


def obj(name: str = "cat", box: str = BOX, extra: str = "<difficult>0</difficult>") -> str:
    return f"<object><name>{name}</name>{extra}<bndbox>{box}</bndbox></object>"


def xml(*objects: str, size: str = "<width>40</width><height>30</height>", name: str = "a.png") -> str:
    return f"<annotation><filename>{name}</filename><size>{size}</size>{''.join(objects)}</annotation>"


def write(root: Path, **files: str) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for stem, text in files.items():
        (root / "Annotations" / f"{stem}.xml").write_text(text)
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{stem}.png")
    return root


def problems(index: Index) -> list[str]:
    return [f"{d.severity}: {d.file}: {d.record}: {d.problem}" for d in index.defects]


def test_one_based_inclusive_becomes_zero_based(tmp_path: Path) -> None:
    index = read_voc(write(tmp_path, a=xml(obj())))
    record = index.records[0]
    np.testing.assert_array_equal(record.boxes, [[0, 1, 40, 30]])
    assert record.areas.tolist() == [40 * 29] and index.defects == []
    assert (record.image_id, record.file_name, record.width, record.height) == (0, "JPEGImages/a.png", 40, 30)
    assert index.classes == VOC_CLASSES and record.labels.tolist() == [8] and index.category_ids == tuple(range(1, 21))


def test_class_names_are_of_the_whole_set_in_every_split(tmp_path: Path) -> None:
    root = write(tmp_path, a=xml(obj("cat")), b=xml(obj("zebra"), name="b.png"))
    for split, stem in (("train", "a"), ("val", "b")):
        (root / f"ImageSets/Main/{split}.txt").write_text(f"{stem}\n")
    assert read_voc(root, "train").classes == read_voc(root, "val").classes == ("cat", "zebra")
    assert read_voc(root, "val").records[0].labels.tolist() == [2]
    index = read_voc(root, "train", classes=["zebra"])
    assert len(index.records[0].boxes) == 0 and "1 objects of it are not read" in index.defects[0].problem
    with pytest.raises(DataError, match="no class 'Zebra' in the data; did you mean 'zebra'"):
        read_voc(root, "train", classes=["Zebra"])


@pytest.mark.parametrize(
    ("text", "expected", "boxes"),
    [
        (
            xml(obj(box=BOX.replace(">40<", ">1<"))),
            "repairable: Annotations/a.xml: file, object 0 (cat): box has zero width",
            0,
        ),
        (
            xml(obj(box=BOX.replace(">30<", ">1<"))),
            "repairable: Annotations/a.xml: file, object 0 (cat): box has negative h",
            0,
        ),
        (xml(obj(box=BOX.replace(">30<", ">nan<"))), "ymax is missing or not a finite number", 0),
        (xml(obj(box="<xmin>1</xmin>")), "ymin is missing", 0),
        (xml("<object><name>cat</name></object>"), "it has no bndbox", 0),
        (xml(obj(name=" "), obj()), "object 0: it has no name", 1),
        (
            xml(obj(box=BOX.replace(">40<", ">45<"))),
            "note: Annotations/a.xml: file, object 0 (cat): box reaches 5 px",
            1,
        ),
        (xml(obj(box=BOX.replace(">1<", ">0<"))), "box reaches 1 px outside", 1),
        (xml(obj(extra="<difficult>maybe</difficult>")), "difficult is 'maybe'", 1),
        (xml(obj(extra="")), "note: Annotations/a.xml: objects: 1 have no <difficult>", 1),
        (
            xml(obj(), size="<width>30</width><height>40</height>"),
            "says 30x40 (width x height) but the file is 40x30",
            1,
        ),
        (xml(obj(), size="<width>0</width><height/>"), "the image's size is missing or not positive", 1),
        (xml(obj(), name="other.jpg"), "note: Annotations/a.xml: filename: <filename> says 'other.jpg'", 1),
        (xml(obj(), name=""), "<filename> is missing or empty", 1),
        (
            xml(obj()).replace("<size>", "<path>C:\\x\\a.png</path><size>"),
            "path: <path> 'C:\\x\\a.png' leads elsewhere",
            1,
        ),
    ],
)
def test_defects_are_reported_and_the_rest_is_read(tmp_path: Path, text: str, expected: str, boxes: int) -> None:
    index = read_voc(write(tmp_path, a=text))
    assert any(expected in problem for problem in problems(index)), problems(index)
    assert sum(len(record.boxes) for record in index.records) == boxes and len(index.records) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<annotation>",
        "<other/>",
        "\x00\xff",
        '<?xml version="1.0" encoding="none"?><annotation/>',
        '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>',
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><annotation><filename>&b;</filename></annotation>',
    ],
)
def test_unreadable_files_are_left_out_and_named(tmp_path: Path, text: str) -> None:
    index = read_voc(write(tmp_path, a=xml(obj()), b=text))
    assert len(index.records) == 1
    (problem,) = [p for p in problems(index) if p.startswith("broken: Annotations/b.xml")]
    assert "not readable as XML" in problem or "root element" in problem
    os.remove(tmp_path / "Annotations" / "a.xml")
    with pytest.raises(DataError, match="no usable image"):
        read_voc(tmp_path)


def test_tags_in_any_order_floats_and_parts(tmp_path: Path) -> None:
    box = "<ymax>20.75</ymax><xmax> 30.5 </xmax><ymin>1.7</ymin><xmin>2.0</xmin>"
    part = f"<part><name>head</name><bndbox>{BOX}</bndbox></part>"
    index = read_voc(write(tmp_path, a=xml(f"<object>{part}<bndbox>{box}</bndbox><name>head</name></object>")))
    np.testing.assert_array_equal(index.records[0].boxes, np.array([[1, 0.7, 30.5, 20.75]], np.float32))
    assert index.classes == ("head",)


def test_splits(tmp_path: Path) -> None:
    root = write(tmp_path, a=xml(obj()), b=xml(name="b.png"), c=xml(obj(), name="c.png"))
    (root / "ImageSets/Main/val.txt").write_text("c  1\r\nb -1\n\nc\nd\n")
    index = read_voc(root, "val")
    assert [(r.image_id, r.file_name) for r in index.records] == [(0, "JPEGImages/c.png"), (1, "JPEGImages/b.png")]
    assert problems(index) == [
        "repairable: ImageSets/Main/val.txt: line 4: 'c' is listed twice",
        "broken: Annotations/d.xml: file: the XML file is missing",
    ]
    with pytest.raises(DataError, match="did you mean 'val'"):
        read_voc(root, "vall")
    (root / "ImageSets/Main/bad.txt").write_text("../../x")
    with pytest.raises(DataError, match="is not inside"):
        read_voc(root, "bad")


def test_missing_image_is_broken(tmp_path: Path) -> None:
    root = write(tmp_path, a=xml(obj()), b=xml(obj(), name="b.png"))
    os.remove(root / "JPEGImages" / "b.png")
    assert any(p == "broken: Annotations/b.xml: file: its image is missing" for p in problems(read_voc(root)))
    (root / "JPEGImages" / "b.png").write_bytes(b"\x89PNG")
    assert any(p.startswith("broken: JPEGImages/b.png: image: not a readable image") for p in problems(read_voc(root)))
    os.remove(root / "JPEGImages" / "b.png")
    os.symlink("/etc/hostname", root / "JPEGImages" / "b.png")
    with pytest.raises(DataError, match="is not inside"):
        read_voc(root)


def test_instance_masks_leave_void_out(tmp_path: Path) -> None:
    boxes = (
        "<xmin>3</xmin><ymin>3</ymin><xmax>12</xmax><ymax>10</ymax>",
        "<xmin>21</xmin><ymin>5</ymin><xmax>35</xmax><ymax>25</ymax>",
    )
    root = write(tmp_path, a=xml(*(obj(box=b) for b in (*boxes, BOX))), b=xml(obj(), name="b.png"))
    numbers = np.zeros((30, 40), np.uint8)
    numbers[2:10, 2:12], numbers[4:25, 20:35], numbers[4:25, 19] = 1, 2, 255
    (root / "SegmentationObject").mkdir()
    image = Image.fromarray(numbers, "P")
    image.putpalette(list(range(256)) * 3)
    image.save(root / "SegmentationObject" / "a.png")
    index = read_voc(root, masks=True)
    segments = index.records[0].segments
    assert segments is not None and index.records[1].segments == [None] and segments[2] is None
    for number, segment in enumerate(segments[:2], 1):
        np.testing.assert_array_equal(rle.decode(segment), numbers == number)
    assert [d.problem for d in index.defects] == ["no pixel of SegmentationObject is its"]


# ---- real data


def test_bccd_splits(shared_data: Path) -> None:
    root = shared_data / "bccd"
    counts = {}
    for split in ("train", "val", "trainval", "test", None):
        index = read_voc(root, split)
        counts[split] = (len(index.records), sum(len(r.boxes) for r in index.records))
        assert index.classes == ("Platelets", "RBC", "WBC")
    assert [c[0] for c in counts.values()] == [205, 87, 292, 72, 364]
    assert counts[None][1] == 4888 - 2
    repaired = [d for d in read_voc(root).defects if d.severity != "note"]
    assert sorted(d.file[12:30] for d in repaired) == ["BloodImage_00338.x", "BloodImage_00343.x"]
    assert all("zero width" in d.problem for d in repaired)


def test_sample100_agrees_in_three_formats(shared_data: Path) -> None:
    root = shared_data / "voc2012_sample100"
    voc = read_voc(root)
    imagenet = read_voc(root, annotations="gts/imagenet_format/Annotations")
    coco = {r.file_name: r for r in read_coco(root, "gts/coco_format_v1/instances_default.json", "images").records}
    assert len(voc.records) == 100 and voc.classes == VOC_CLASSES
    assert sum(int(r.difficult.sum()) for r in voc.records) == 38
    touching = 0
    for ours, other in zip(voc.records, imagenet.records, strict=True):
        expected = np.sort(coco[ours.file_name].boxes - np.float32([1, 1, 0, 0]), axis=0)
        np.testing.assert_array_equal(np.sort(ours.boxes, axis=0), expected)
        np.testing.assert_array_equal(np.sort(other.boxes, axis=0), expected)
        touching += int(((ours.boxes[:, 2] == ours.width) | (ours.boxes[:, 3] == ours.height)).sum())
    assert touching == 69
    notes = {d.problem for d in imagenet.defects}
    assert "<depth> is empty" in notes and any("no <difficult>" in note for note in notes)


def test_cells_are_found_by_their_stem(shared_data: Path) -> None:
    index = read_voc(shared_data / "cells")
    assert len(index.records) == 356 and index.classes == ("cellbody",)
    assert sum("<filename> says" in d.problem for d in index.defects) == 356
    boxes = np.concatenate([r.boxes for r in index.records])
    assert len(boxes) == 641 and (boxes[:, 2:] - boxes[:, :2] <= 33).all()
    record = next(r for r in index.records if r.file_name.endswith("000083.jpg"))
    tree = ElementTree.parse(shared_data / "cells" / "Annotations" / "000083.xml")
    first = [float(tree.findtext(f"object/bndbox/{tag}") or "") for tag in ("xmin", "ymin", "xmax", "ymax")]
    np.testing.assert_array_equal(record.boxes[0], np.subtract(first, [1, 1, 0, 0]))


def test_flat_folders(shared_data: Path) -> None:
    index = read_voc(shared_data / "deepforest")
    assert len(index.records) == 3 and max(len(r.boxes) for r in index.records) > 200
    assert any(
        d.severity == "broken" and "crop2.xml" in d.file and "image is missing" in d.problem for d in index.defects
    )
    fridge = read_voc(shared_data / "icevision" / "fridge" / "odFridgeObjects")
    assert (len(fridge.records), sum(len(r.boxes) for r in fridge.records), len(fridge.classes)) == (6, 12, 4)


def test_official_instance_masks(shared_data: Path) -> None:
    index = read_voc(shared_data / "icevision" / "voc", masks=True)
    first, second = index.records
    numbers = np.asarray(Image.open(shared_data / "icevision" / "voc" / "SegmentationObject" / "2007_000063.png"))
    assert first.segments is not None and second.segments == [None]
    for number, segment in enumerate(first.segments, 1):
        np.testing.assert_array_equal(rle.decode(segment), numbers == number)
    np.testing.assert_array_equal(second.boxes, np.array([[129, 44.70000076293945, 375, 470]], np.float32))
