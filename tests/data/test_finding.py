"""Data sets as people have them are found and read right, or refused with the truth. The truth is in the pixels."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detection.data.datamodule import DetectionDataModule
from detection.data.finding import Layout, find
from detection.data.images import read_image
from detection.data.records import DataError, Index
from tests.data.drawn_sets import CLASSES, LAYOUTS, WITHOUT_SPLIT, WRITERS, Picture, Style

# ---- the sets of the wild


def objects_of(pixels: np.ndarray) -> dict[int, np.ndarray]:
    """`(H, W)` bool of the red (1) and the blue (2) pixels."""
    red, green, blue = (pixels[..., i].astype(int) for i in range(3))
    return {1: (red - blue > 90) & (green < 120), 2: (blue - red > 90) & (green < 140)}


def assert_on_pixels(index: Index) -> None:
    """Each box holds its class's colour (or what lies over it), and its edges are where the colour ends."""
    for record in index.records:
        pixels = read_image(index.root / record.file_name, (record.height, record.width))
        colours = objects_of(pixels)
        coloured = colours[1] | colours[2]
        assert len(record.boxes), record.file_name
        inside = np.zeros(coloured.shape, bool)
        for place, (box, label) in enumerate(zip(record.boxes.round().astype(int), record.labels, strict=True)):
            x1, y1, x2, y2 = box
            number = CLASSES.index(index.classes[label - 1]) + 1 if index.classes[label - 1] in CLASSES else 1
            others = np.zeros(coloured.shape, bool)  # what may lie over it
            for x3, y3, x4, y4 in np.delete(record.boxes, place, axis=0).round().astype(int):
                others[y3:y4, x3:x4] = True
            own = (colours[number] | (others & coloured))[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
            assert own.mean() > 0.9, (record.file_name, box)
            inside[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = True
        assert not (coloured & ~inside).any(), f"{record.file_name}: an object has no box"


READ = {  # format, pictures and objects of training, of validation where there is a split
    "c_entry_per_ann": ("coco", 4, 2),
    "c_idsdiffer": ("coco", 6, 4),
    "c_kp": ("coco", 4, 2),
    "c_roboflow": ("coco", 4, 2),
    "v_labelimg": ("voc", 3, None),
    "v_space1": ("voc", 3, 1),
    "v_subdirs": ("voc", 2, 1),
    "v_upperxml": ("voc", 2, 1),
    "v_vott": ("voc", 2, 1),
    "y_case": ("yolo", 2, 2),
    "y_cvat11": ("yolo", 4, None),
    "y_emptytest": ("yolo", 2, 2),
    "y_formats": ("yolo", 7, 7),
    "y_ipynb": ("yolo", 2, 1),
    "y_labelstudio": ("yolo", 4, None),
    "y_listsub": ("yolo", 2, 2),
    "y_motion": ("yolo", 2, 1),
    "y_nolabelsval": ("yolo", 2, 1),
    "y_orphan": ("yolo", 1, 1),
    "y_prefix": ("yolo", 2, 1),
    "y_quotedkeys": ("yolo", 2, 1),
    "y_winpath": ("yolo", 2, 1),
}


@pytest.mark.parametrize("name", READ)
def test_wild_sets_are_read_to_the_pixel(shared_data: Path, name: str) -> None:
    format, train, val = READ[name]
    layout = find(shared_data / "wild" / name)
    assert layout.format == format
    for stage, count in (("train", train), ("val", val)):
        split = layout.stage(stage)  # type: ignore[arg-type]
        assert (split is None) == (count is None)
        if split is not None:
            index = split.read(None, False)
            assert len(index.records) == count
            assert_on_pixels(index)


def test_key_points_are_no_polygons(shared_data: Path) -> None:
    split = find(shared_data / "wild" / "y_pose_12_2").stage("train")
    assert split is not None
    index = split.read(None, False)
    assert index.classes == ("tiger",) and len(index.records) == 3
    assert_on_pixels(index)


def test_orphans_are_named(shared_data: Path) -> None:
    split = find(shared_data / "wild" / "y_orphan").stage("train")
    assert split is not None
    (defect,) = split.read(None, False).defects
    assert defect.file == "labels/train/b.txt" and defect.problem == "it has no picture"


def test_several_sets_in_one_folder_are_refused_by_name(shared_data: Path) -> None:
    with pytest.raises(DataError, match=r"holds several data sets: y_case \(YOLO\).*pass the folder of one"):
        find(shared_data / "wild")


def test_sets_without_pictures_say_so(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of its pictures is below"):
        find(shared_data / "eval_refs")
    with pytest.raises(DataError, match="but no file; put the pictures there"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("name", "format", "images"),
    [
        ("bccd", "voc", 205),
        ("cells", "voc", 302),
        ("deepforest", "voc", 3),
        ("nuts", "coco", 18),
        ("panoptic", "coco", 2),
        ("tiny_coco", "coco", 50),
        ("icevision", "coco", 6),
        ("voc2012_sample100", "coco", 100),
    ],
)
def test_real_sets_are_found(shared_data: Path, name: str, format: str, images: int) -> None:
    layout = find(shared_data / name)
    split = layout.stage("train")
    assert layout.format == format and split is not None and len(split.read(None, False).records) == images
    if name in ("icevision", "voc2012_sample100"):
        assert any(other.startswith("VOC") for other in layout.others)


# ---- sets as they might be


def check(root: Path, format: str, pictures: list[Picture], style: Style) -> Layout:
    """Every picture is read with its boxes and classes, in its split; a picture in none is named by a defect."""
    layout = find(root)
    assert layout.format == format, layout
    stages = (
        {"train": style.splits[0], "val": style.splits[-1]} if len(style.splits) > 1 else {"train": style.splits[0]}
    )
    for stage, name in stages.items():
        split = layout.stage(stage)  # type: ignore[arg-type]
        assert split is not None, layout
        index = split.read(None, False)
        wanted = {p.place: p for p in pictures if p.split == name}
        assert {record.file_name for record in index.records} == set(wanted), (layout, index.defects)
        for record in index.records:
            found = [
                (CLASSES.index(index.classes[label - 1]), *box.round().astype(int).tolist())
                for box, label in zip(record.boxes, record.labels, strict=True)
            ]
            assert sorted(found) == sorted(wanted[record.file_name].objects)
    assert len(stages) > 1 or layout.stage("val") is None
    return layout


PATHS = {
    "as it is": lambda name: name,
    "dot": lambda name: f"./{name}",
    "parent": lambda name: f"../{name}",
    "absolute": lambda name: f"/home/somebody/set/{name}",
    "windows": lambda name: "C:\\Users\\me\\set\\" + name.replace("/", "\\"),
    "project": lambda name: f"Project-1/{name}",
}
STEMS = {
    "letters": ("a", "b", "c", "d", "e"),
    "flags": ("photo", "photo 1", "photo 0", "photo -1", "photo 2"),
    "accents": ("\u00e9t\u00e9", "na\u00efve", "\u00fcber", "\u00f1o", "\u00e5"),
    "dots": ("a.1", "b.v2.final", "c.jpg", "d..", "e-5"),
    "blanks": ("my photo", "a  b", "c (1)", "d#2", "e+f"),
    "numbers": ("000001", "000002", "000010", "000011", "000100"),
}
SPLITS = [("train", "val"), ("train", "valid"), ("training", "validation"), ("Train", "Val"), ("train2017", "val2017")]
NAMES = [
    "names: [red, blue]",
    "names: {0: red, 1: blue}",
    "names:\n  '0': red\n  '1': blue",
    "names:\n- red\n- blue",
    "names: red, blue",
    "names: \"['red', 'blue']\"",
    "nc: 2\nnames: |\n  red\n  blue",
]


@st.composite
def styles(draw: st.DrawFn) -> tuple[str, Style]:
    format = draw(st.sampled_from(sorted(WRITERS)))
    layout = draw(st.sampled_from(LAYOUTS[format]))
    nested = draw(st.sampled_from(["no", "one", "two"]))
    single = (format, layout) in WITHOUT_SPLIT
    style = Style(
        suffix=draw(st.sampled_from([".png", ".jpg", ".JPG", ".jpeg", ".bmp"])),
        stems=STEMS[draw(st.sampled_from(sorted(STEMS)))],
        folders={"no": lambda i: "", "one": lambda i: "deep", "two": lambda i: f"s{i % 2}/t"}[nested],
        splits=("train",) if single else draw(st.sampled_from(SPLITS)),
        layout=layout,
        path=PATHS[draw(st.sampled_from(sorted(PATHS)))],
        upper=draw(st.booleans()),
        form=draw(st.sampled_from(["NFC", "NFD"])),
        escape=draw(st.booleans()),
        double=draw(st.booleans()) if format != "coco" else False,
        label_suffix={
            "voc": draw(st.sampled_from([".xml", ".XML"])),
            "yolo": draw(st.sampled_from([".txt", ".TXT"])),
        }.get(format, ""),
        names=draw(st.sampled_from(NAMES)),
        ids=draw(st.sampled_from([lambda i: i + 1, lambda i: i, lambda i: 2**40 + 7 * i, lambda i: 2**62 - 1 - i])),
    )
    return format, style


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(styles())
def test_variants_are_read_right(case: tuple[str, Style]) -> None:
    """Case, form, nesting, style of paths, extensions, ids and names of splits change nothing."""
    format, style = case
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), format, WRITERS[format](Path(folder), style), style)


def test_what_nobody_reads_is_named(tmp_path: Path) -> None:
    """Pictures of unread kinds, with labels and without, and pictures in hidden folders."""
    WRITERS["yolo"](tmp_path, Style())
    (tmp_path / "images/train/a.png").unlink()
    (tmp_path / "images/train/a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (tmp_path / "images/train/z.psd").write_bytes(b"8BPS")
    (tmp_path / "images/.ipynb_checkpoints").mkdir()
    (tmp_path / "images/.ipynb_checkpoints/b-checkpoint.png").write_bytes((tmp_path / "images/val/d.png").read_bytes())
    split = find(tmp_path).stage("train")
    assert split is not None
    index = split.read(None, False)
    assert [record.file_name for record in index.records] == ["images/train/b.png", "images/train/c.png"]
    said = {(defect.severity, defect.file): str(defect) for defect in index.defects}
    assert "HEIC is not read" in said["broken", "images/train/a.heic"]
    assert "1 pictures are .psd, a kind that is not read" in said["note", "images/train/z.psd"]
    assert "hidden folders are not read" in said["note", "images/.ipynb_checkpoints"]


def test_a_polygon_far_away_is_named_and_not_filled(shared_data: Path) -> None:
    """A coordinate of 1e12 would be rasterised for minutes."""
    split = find(shared_data / "wild" / "c_rle").stage("train")
    assert split is not None
    index = split.read(None, True)
    assert index.records[0].segments == [None, None]
    assert any("1 of its polygons lie far outside the image" in defect.problem for defect in index.defects)
    assert_on_pixels(index)


REFUSED = {  # what is said before anything trains
    "eval_refs": "none of its pictures is below",
    "wild": "holds several data sets",
    "c_norm": "the boxes look relative to the image",
    "c_xyxy": "lie inside as corners",
}
REAL = ("bccd", "cells", "deepforest", "eval_refs", "icevision", "nuts", "panoptic", "tiny_coco", "voc2012_sample100")
ALL = (*REAL, "wild", *(f"wild/{name}" for name in (*READ, "c_norm", "c_xyxy", "c_rle", "c_uint64", "y_pose_12_2")))


@pytest.mark.parametrize("name", ALL)
def test_a_root_alone_gives_batches_of_every_set(shared_data: Path, name: str) -> None:
    """All that is said of the data is its folder; a validation split is there, or made."""
    data = DetectionDataModule(str(shared_data / name), num_workers=0, batch_size=2)
    before = set((shared_data / name).rglob("*"))
    if (problem := REFUSED.get(Path(name).name)) is not None:
        with pytest.raises(DataError, match=problem):
            data.setup("fit")
        return
    data.prepare_data()
    data.setup("fit")
    assert next(iter(data.train_dataloader())).images.shape[:2] == (2, 3)
    assert len(list(data.val_dataloader())) > 0
    assert set((shared_data / name).rglob("*")) == before, "it wrote into somebody's data"
