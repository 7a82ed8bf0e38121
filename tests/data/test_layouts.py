"""Small sets with one trap each: names that mean two files, folders and lists that look like something else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.data.finding import Layout, Stage, find
from detection.data.judging import judge
from detection.data.records import DataError, Index

LABEL = "0 0.5 0.5 0.25 0.25\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def save(root: Path, *names: str) -> None:
    """Pictures of 48 x 32 pixels."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(path)


def xml(name: str = "cat", filename: str = "") -> str:
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
    size = "<size><width>48</width><height>32</height></size>"
    return f"<annotation><filename>{filename}</filename>{size}<object><name>{name}</name>{box}</object></annotation>"


def coco(names: Iterable[str]) -> str:
    """A file with one object an image."""
    images = [{"id": i, "file_name": name, "width": 48, "height": 32} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 9, 9], "area": 81} for i in range(len(images))]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]})


def read(root: Path, stage: Stage = "train", layout: Layout | None = None) -> Index:
    split = (layout or find(root)).stage(stage)
    assert split is not None
    return split.read(None, False)


def names_of(index: Index) -> list[str]:
    return [record.file_name for record in index.records]


def problems(index: Index) -> str:
    return "\n".join(map(str, index.defects))


@pytest.mark.parametrize(("file", "folders"), [("a.json", ("a", "b")), ("train.json", ("train", "extra"))])
def test_a_coco_file_named_like_one_of_its_folders(tmp_path: Path, file: str, folders: tuple[str, str]) -> None:
    pictures = [f"{folder}/{number:04}.jpg" for number in (1, 2) for folder in folders]
    save(tmp_path, *pictures)
    write(tmp_path, {file: coco(pictures)})
    assert names_of(read(tmp_path)) == pictures


def test_coco_names_that_two_folders_hold(tmp_path: Path) -> None:
    save(tmp_path, "images/1.png", "gt/1.png")
    write(tmp_path, {"a.json": coco(["1.png"])})
    index = read(tmp_path)
    assert names_of(index) == ["images/1.png"] and not index.defects
    save(tmp_path, "images/day/2.png", "images/night/2.png")
    write(tmp_path, {"a.json": coco(["2.png"])})
    index = read(tmp_path)
    assert names_of(index) == ["images/day/2.png"] and "'images/night' holds pictures of these names too" in problems(
        index
    )


def test_a_path_into_one_split_is_none_of_another(tmp_path: Path) -> None:
    save(tmp_path, "train/1.jpg", "train/2.jpg", "val/2.jpg")
    write(tmp_path, {"val.json": coco(["val/1.jpg", "val/2.jpg"])})
    index = read(tmp_path, "val")
    assert names_of(index) == ["val/2.jpg"] and "the image is missing" in problems(index)
    write(tmp_path, {"val.json": coco(["/home/me/dev/pictures/2.jpg"])})  # of another machine
    assert names_of(read(tmp_path, "val")) == ["val/2.jpg"]


YOLO = {
    **dict.fromkeys(("labels/train/1.txt", "labels/train/2.txt", "labels/val/3.txt"), LABEL),
    "data.yaml": "names: [cat]\ntrain: images/train\nval: images/val\n",
}


def yolo(root: Path, yaml: str | None = None, **files: str) -> None:
    """Two pictures to train on and one to validate on."""
    save(root, "images/train/1.png", "images/train/2.png", "images/val/3.png")
    write(root, YOLO | files | ({"data.yaml": yaml} if yaml else {}))


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("val: images/validate", "'images/validate' of 'val' is not there; 'images/val' is read by its name"),
        ("val: images/val/*.png", "'images/val/*.png' of 'val' is not there; 'images/val' is read by its name"),
        ("val:", "it names no pictures to validate on; 'images/val' is read by its name"),
    ],
)
def test_a_yolo_split_is_found_by_its_folder_where_its_entry_leads_nowhere(
    tmp_path: Path, yaml: str, said: str
) -> None:
    yolo(tmp_path, f"names: [cat]\ntrain: images/train\n{yaml}\n")
    index = read(tmp_path, "val")
    assert names_of(index) == ["images/val/3.png"] and said in problems(index)
    assert names_of(read(tmp_path)) == ["images/train/1.png", "images/train/2.png"]


def test_a_yolo_folder_that_trains_does_not_validate_by_its_name(tmp_path: Path) -> None:
    yolo(tmp_path, "names: [cat]\ntrain: images\n")
    assert len(read(tmp_path).records) == 3 and find(tmp_path).stage("val") is None


def test_lines_of_a_list_that_lead_nowhere_are_named_where_no_file_names_the_list(tmp_path: Path) -> None:
    yolo(tmp_path, "names: [cat]\n", **{"train.txt": "images/train/1.png\nimages/train/9.png\n"})
    index = read(tmp_path)
    assert names_of(index) == ["images/train/1.png"] and "there is no picture 'images/train/9.png'" in problems(index)


@pytest.mark.parametrize("line", ["0,0.5,0.5,0.25,0.25", "0 0,5 0,5 0,25 0,25", "cat 3.0 4.0 20.0 30.0"])
@pytest.mark.parametrize("named", [True, False])
def test_what_is_no_yolo_label_is_shown(tmp_path: Path, line: str, named: bool) -> None:
    yolo(tmp_path, **dict.fromkeys(list(YOLO)[:3], f"{line}\n"))
    if not named:
        (tmp_path / "data.yaml").unlink()
    with pytest.raises(DataError, match=f"labels/train/1.txt: '{line}' is no label; write class x_center"):
        find(tmp_path)


def test_a_set_that_begins_with_sixty_empty_pictures_is_found(tmp_path: Path) -> None:
    yolo(tmp_path)
    empty = [f"train/0{number}" for number in range(10, 70)]
    save(tmp_path, *(f"images/{name}.png" for name in empty))
    write(tmp_path, {f"labels/{name}.txt": "" for name in empty})
    assert len(read(tmp_path).records) == 62


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("[no, cat]", "'names' holds a yes, no, on or off, which YAML takes for true and false; quote it"),
        ("\n\t- cat", r"not readable as YAML \(line 2: found character '\\t' that cannot start any token\)"),
    ],
)
def test_names_that_yaml_takes_for_something_else(tmp_path: Path, names: str, said: str) -> None:
    yolo(tmp_path, f"names: {names}\ntrain: images/train\nval: images/val\n")
    with pytest.raises(DataError, match=said):
        find(tmp_path)


def test_class_names_in_a_file_that_the_yaml_names(tmp_path: Path) -> None:
    yaml = "names: classes.txt\ntrain: images/train\nval: images/val\n"
    yolo(tmp_path, yaml, **{"classes.txt": "cat\ndog\n"})
    assert read(tmp_path).classes == ("cat", "dog")


def test_files_that_name_other_classes_are_reported(tmp_path: Path) -> None:
    two = "train: images/train\nval: images/val\nnames: "
    yolo(tmp_path, two + "[cat, dog]", **{"classes.txt": "dog\ncat\n", "old.yaml": two + "[dog, cat]"})
    index = read(tmp_path)
    assert index.classes == ("cat", "dog")
    assert "classes.txt: classes: it names dog, cat, but 'data.yaml' cat, dog; 'data.yaml' is read" in problems(index)
    assert "old.yaml: file: it describes a data set too; 'data.yaml' is read" in problems(index)
    write(tmp_path, {"classes.txt": "cat\ndog\n", "old.yaml": two + "[cat, dog]"})
    assert not read(tmp_path).defects


def test_key_points_that_nothing_announces_are_no_polygons(tmp_path: Path) -> None:
    line = "0 0.5 0.5 0.25 0.25 0.45 0.5 2 0 0 0\n"
    yolo(tmp_path, **{"labels/train/1.txt": 2 * line, "labels/train/2.txt": line})
    with pytest.raises(DataError, match=r"10 numbers follow each class.*key points; add the line kpt_shape: \[2, 3\]"):
        read(tmp_path)
    with (tmp_path / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 3]\n")
    np.testing.assert_allclose(read(tmp_path).records[0].boxes[0], (18, 12, 30, 20))


def test_a_number_behind_a_yolo_box_may_count_tracks(tmp_path: Path) -> None:
    yolo(tmp_path, **{"labels/train/1.txt": "0 0.5 0.5 0.25 0.25 17\n"})
    index = read(tmp_path)
    np.testing.assert_allclose(index.records[0].boxes[0], (18, 12, 30, 20))
    assert "a sixth number follows the box; it is not used" in problems(index)


@pytest.mark.parametrize(
    ("filename", "read_as"), [("a", "a.png"), ("a.jpg", "a.png"), ("", "a.png"), (r"C:\x\A.PNG", "a.png")]
)
def test_the_picture_that_a_file_of_another_name_means(tmp_path: Path, filename: str, read_as: str) -> None:
    save(tmp_path, "images/a.png", "images/b.png")
    text = xml(filename=filename).replace("<size>", r"<path>C:\x\a.jpg</path><size>")
    write(tmp_path, {"xml/7.xml": text, "xml/b.xml": xml(filename="b.png")})
    index = read(tmp_path)
    assert names_of(index) == [f"images/{read_as}", "images/b.png"]
    assert "no picture has its name, but" in problems(index)
    save(tmp_path, "images/a.bmp")  # which of the two?
    if filename in ("a", "a.jpg", ""):
        assert names_of(read(tmp_path)) == ["images/b.png"]


@pytest.mark.parametrize(
    "content",
    [
        xml("größe").replace("<annotation>", '<annotation xmlns="http://example.org/voc">').encode(),
        f"<?xml version='1.0' encoding='gbk'?>{xml('größe'.replace('ö', '图').replace('ß', '片'))}".encode("gbk"),
        f"<?xml version='1.0' encoding='ISO-8859-1'?>{xml('größe')}".encode("latin-1"),
        f"<?xml version='1.0' encoding='utf-16'?>{xml('größe')}".encode("utf-16"),
        f"\r\n<?xml version='1.0'?>\n{xml('größe')}".encode(),
        f"<?xml version='1.0' encoding='utf-8'?>{xml('größe')}".encode("utf-8-sig"),
    ],
)
def test_xml_files_however_they_are_encoded(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, "a.png")
    (tmp_path / "a.xml").write_bytes(content)
    index = read(tmp_path)
    assert index.classes in (("größe",), ("gr图片e",)) and len(index.records[0].boxes) == 1


def test_what_is_wrong_with_an_encoding_is_said(tmp_path: Path) -> None:
    save(tmp_path, "a.png", "b.png")
    write(tmp_path, {"b.xml": xml()})
    (tmp_path / "a.xml").write_bytes(xml("größe").encode("latin-1"))
    assert "not readable as XML (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xf6" in problems(read(tmp_path))


def test_xml_of_another_kind_is_named(tmp_path: Path) -> None:
    save(tmp_path, "images/a.png")
    write(tmp_path, {"train.xml": "<dataset><images><image file='a.png'/></images></dataset>"})
    with pytest.raises(DataError, match=r"train.xml: file: its root element is <dataset>; it is not read"):
        find(tmp_path)
    write(tmp_path, {"xml/a.xml": xml()})
    index = read(tmp_path)
    assert names_of(index) == ["images/a.png"]


POINTS = ("<x1>5</x1><y1>4</y1><x2>30.5</x2><y2>9</y2><x3>12</x3><y3>20</y3>",)
PTS = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in ((5, 4), (30.5, 9), (12, 20)))


@pytest.mark.parametrize("points", [*POINTS, PTS])
def test_a_voc_polygon_without_bndbox(tmp_path: Path, points: str) -> None:
    save(tmp_path, "a.png")
    start, _, rest = xml().partition("<bndbox>")
    write(tmp_path, {"a.xml": f"{start}<polygon>{points}</polygon>{rest.partition('</bndbox>')[2]}"})
    index = read(tmp_path)
    np.testing.assert_array_equal(index.records[0].boxes, [[4, 3, 30.5, 20]])
    assert "it has no bndbox" in problems(index)


def test_lists_of_single_classes_say_the_same_of_a_picture(tmp_path: Path) -> None:
    save(tmp_path, *(f"images/{stem}.png" for stem in "abc"))
    write(tmp_path, {f"xml/{stem}.xml": xml() for stem in "abc"})
    lists = {"cat_train": "a.png 1\nb.png -1\n", "dog_train": "a.png -1\nb.png 1\n", "cat_val": "c.png 1\n"}
    write(tmp_path, {f"ImageSets/Main/{name}.txt": text for name, text in lists.items()})
    layout = find(tmp_path)
    assert {name: split.count for name, split in layout.splits.items()} == {"train": 2, "val": 1}
    index = read(tmp_path)
    assert names_of(index) == ["images/a.png", "images/b.png"] and "listed twice" not in problems(index)


def test_data_sets_side_by_side_keep_their_lists(tmp_path: Path) -> None:
    for place, stems in (("one", "ab"), ("two", "cd")):
        save(tmp_path / place, *(f"JPEGImages/{stem}.png" for stem in stems))
        write(tmp_path / place, {f"Annotations/{stem}.xml": xml() for stem in stems})
        write(tmp_path / place, {"train.txt": stems[0], "val.txt": stems[1]})
    with pytest.raises(DataError, match=r"holds several data sets: one \(VOC\), two \(VOC\)"):
        find(tmp_path)
    assert names_of(read(tmp_path / "two", "val")) == ["JPEGImages/d.png"]


@pytest.mark.parametrize("ending", ["", ".jpg"])
def test_coco_names_of_no_or_another_extension(tmp_path: Path, ending: str) -> None:
    save(tmp_path, "train/a.png", "train/b.v2.png", "val/a.png")
    write(tmp_path, {f"{split}.json": coco([f"a{ending}", f"b.v2{ending}"]) for split in ("train", "val")})
    index = read(tmp_path)
    assert names_of(index) == ["train/a.png", "train/b.v2.png"]
    assert f"2 names are not those of the files, first 'a{ending}' of 'train/a.png'" in problems(index)
    save(tmp_path, "train/a.bmp")  # which of the two?
    assert names_of(read(tmp_path)) == ["train/b.v2.png"]


@pytest.mark.parametrize("absent", ["categories", "annotations"])
def test_a_coco_file_without_one_of_its_lists_is_named(tmp_path: Path, absent: str) -> None:
    save(tmp_path, "a.png")
    whole = json.loads(coco(["a.png"]))
    write(tmp_path, {"a.json": json.dumps({key: value for key, value in whole.items() if key != absent})})
    with pytest.raises(DataError, match=f"a.json: '{absent}' is missing"):
        find(tmp_path)
    write(tmp_path, {"a.xml": xml()})
    assert find(tmp_path).format == "voc"


def test_a_coco_file_comes_before_its_copy(tmp_path: Path) -> None:
    save(tmp_path, "train/a.png", "train/b.png")
    write(tmp_path, {"train.json": coco(["a.png", "b.png"]), "train (1).json": coco(["a.png"])})
    layout = find(tmp_path)
    assert len(read(tmp_path).records) == 2 and "not read: train (1).json" in str(layout)


def test_coco_boxes_that_are_text(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    whole = json.loads(coco(["a.png"]))
    whole["annotations"][0] |= {"bbox": ["2", "2.5", "9", " 9 "], "area": "81"}
    write(tmp_path, {"a.json": json.dumps(whole)})
    index = read(tmp_path)
    np.testing.assert_array_equal(index.records[0].boxes, [[2, 2.5, 11, 11.5]])
    assert index.records[0].areas.tolist() == [81] and not index.defects
    whole["annotations"][0]["bbox"][0] = "nan"
    write(tmp_path, {"a.json": json.dumps(whole)})
    assert "bbox is not four finite numbers" in problems(read(tmp_path))


def test_a_coco_image_that_is_listed_twice(tmp_path: Path) -> None:
    save(tmp_path, "a.png", "b.png")
    whole = json.loads(coco(["a.png", "b.png"]))
    whole["images"].append(whole["images"][0])
    write(tmp_path, {"a.json": json.dumps(whole)})
    index = read(tmp_path)
    assert names_of(index) == ["a.png", "b.png"] and [len(record.boxes) for record in index.records] == [1, 1]
    assert "image 0: 'a.png' is listed twice; it is read once" in problems(index)
    assert {defect.severity for defect in index.defects} == {"repairable"}
    whole["images"][-1] = whole["images"][0] | {"file_name": "b.png"}
    save(tmp_path, "c.png")
    whole["images"].append({"id": 7, "file_name": "c.png", "width": 48, "height": 32})
    write(tmp_path, {"a.json": json.dumps(whole)})
    index = read(tmp_path)  # nobody knows whose the objects of image 0 are
    assert names_of(index) == ["b.png", "c.png"] and [len(record.boxes) for record in index.records] == [1, 0]
    assert "image 0: the id is used for several files, here for 'a.png'; the image is left out" in problems(index)
    assert "here for 'b.png'" in problems(index) and {defect.severity for defect in index.defects} == {"broken"}


def test_why_no_object_is_left(tmp_path: Path) -> None:
    two = "names: [cat, dog]\ntrain: images/train\nval: images/val\n"
    yolo(tmp_path, two)
    split = find(tmp_path).stage("train")
    assert split is not None
    (defect,) = judge(split.read(["dog"], False))
    assert defect.problem == "none of 2 images has an object"
    (tmp_path / "labels/val").rename(tmp_path / "labels/test")
    (defect,) = judge(read(tmp_path, "val"), "val")
    assert "label files of these names lie in 'labels/test'" in defect.problem
