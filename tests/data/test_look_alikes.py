"""Sets in which several files have one name, or a name that means something else: none gets the labels of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from detection.data.coco import read_coco
from detection.data.finding import find
from detection.data.records import DataError, Index
from detection.data.yolo import read_yolo

SIZE = (160, 120)


def draw(root: Path, name: str, x: int) -> None:
    """A picture of a square from x to x + 30, by which it is known again."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", SIZE)
    ImageDraw.Draw(image).rectangle((x, 20, x + 29, 49), fill=(255, 255, 255))
    image.save(path)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def yolo_label(x: int) -> str:
    return f"0 {(x + 15) / SIZE[0]} {35 / SIZE[1]} {30 / SIZE[0]} {30 / SIZE[1]}\n"


def xml(x: int) -> str:
    box = f"<xmin>{x + 1}</xmin><ymin>21</ymin><xmax>{x + 30}</xmax><ymax>50</ymax>"
    head = f"<filename>0.png</filename><size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
    cat = f"<object><name>cat</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
    return f"<annotation>{head}{cat}</annotation>"


def coco(*rows: tuple[int, str, int], name: str = "cat") -> str:
    """Of (image id, file name, x of the square)."""
    images = [{"id": i, "file_name": file, "width": SIZE[0], "height": SIZE[1]} for i, file, _ in rows]
    boxes = [
        {"id": number, "image_id": i, "category_id": 1, "bbox": [x, 20, 30, 30], "area": 900}
        for number, (i, _, x) in enumerate(rows)
    ]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": name}]})


def boxes_are_where_drawn(index: Index) -> bool:
    """Whether each picture has one box, around what is drawn there."""
    for record in index.records:
        drawn = Image.open(index.root / record.file_name).convert("L").point(lambda v: 255 * (v > 127)).getbbox()
        if record.boxes.round().tolist() != [list(drawn or ())]:
            return False
    return bool(index.records)


def names_of(index: Index) -> list[str]:
    return [record.file_name for record in index.records]


def read(root: Path, split: str) -> Index:
    return find(root).splits[split].read(None, False)


def problems(index: Index) -> str:
    return "\n".join(map(str, index.defects))


@pytest.mark.parametrize("names", [("cat_1", "train_1", "test_1"), ("train_001", "train_002", "val3")])
def test_yolo_pictures_called_like_splits_keep_their_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    for i, name in enumerate(names):
        draw(tmp_path, f"images/{name}.png", 20 * i)
        write(tmp_path, f"labels/{name}.txt", yolo_label(20 * i))
    write(tmp_path, "data.yaml", "train: images\nval: images\nnames: [cat]\n")
    index = read(tmp_path, "train")
    assert len(index.records) == 3 and boxes_are_where_drawn(index) and not index.defects


def test_labelled_yolo_pictures_outside_the_splits_are_reported(tmp_path: Path) -> None:
    for i, folder in enumerate(("train", "extra", ".")):
        draw(tmp_path, f"images/{folder}/{i}.png", 20 * i)
        write(tmp_path, f"labels/{folder}/{i}.txt", yolo_label(20 * i))
    write(tmp_path, "classes.txt", "cat\n")
    index = read(tmp_path, "train")
    assert names_of(index) == ["images/train/0.png"]
    assert "2 labelled pictures lie in no split's folder" in problems(index)


@pytest.mark.parametrize("written", ["D:\\proj\\{0}\\frames\\{1}.png", "{1}.png"])
def test_one_picture_does_not_get_the_objects_of_another_of_its_name(tmp_path: Path, written: str) -> None:
    rows = [(1, "cam1", 0), (2, "cam2", 0), (3, "cam2", 1)]
    for i, folder, number in rows:
        draw(tmp_path, f"{folder}/{number}.png", 20 * i)
    entries = [(i, written.format(folder, number), 20 * i) for i, folder, number in rows]
    write(tmp_path, "a.json", coco(*entries))
    index = read_coco(tmp_path, "a.json")
    assert names_of(index) == ["cam2/1.png"] and boxes_are_where_drawn(index)
    assert "2 images, the first of them 1, are found in 'cam2/0.png', but one may be 'cam1/0.png'" in problems(index)
    whole = read_coco(tmp_path, "a.json", "cam2")  # who names the folder means its pictures
    assert names_of(whole) == ["cam2/0.png", "cam2/1.png"]


def test_a_name_with_its_folder_is_not_in_doubt(tmp_path: Path) -> None:
    for x, folder in enumerate(("cam1", "cam2")):
        draw(tmp_path, f"{folder}/0.png", 20 * x)
    write(tmp_path, "a.json", coco((1, "cam2/0.png", 20), (2, "./cam2/0.png", 20), (3, "cam1/0.png", 0)))
    index = read_coco(tmp_path, "a.json")
    assert names_of(index) == ["cam2/0.png", "cam1/0.png"] and boxes_are_where_drawn(index)


def test_a_coco_file_has_the_pictures_of_its_own_data_set(tmp_path: Path) -> None:
    for site, x in (("siteA", 10), ("siteB", 90)):
        for number in (0, 1):
            draw(tmp_path, f"{site}/images/{number}.png", x + number)
        write(tmp_path, f"{site}/annotations.json", coco((0, "0.png", x), (1, "1.png", x + 1)))
    for site in ("siteA", "siteB"):
        index = read_coco(tmp_path, f"{site}/annotations.json")
        assert boxes_are_where_drawn(index) and not index.defects
    with pytest.raises(DataError, match="it holds several data sets: siteA"):
        find(tmp_path)


@pytest.mark.parametrize("where", ["image", "class"])
def test_a_coco_file_with_the_word_caption_is_read(tmp_path: Path, where: str) -> None:
    for number in range(4):
        draw(tmp_path, f"images/{number}.png", 20 * number)
    name = "caption" if where == "class" else "cat"
    for split, numbers in {"train": (0, 1), "val": (2, 3)}.items():
        content = json.loads(coco(*((n, f"{n}.png", 20 * n) for n in numbers), name=name))
        if where == "image":
            content["images"][0]["caption"] = "a square"
        write(tmp_path, f"{split}.json", json.dumps(content))
    assert set(find(tmp_path).splits) == {"train", "val"}
    assert all(boxes_are_where_drawn(read(tmp_path, split)) for split in ("train", "val"))


@pytest.mark.parametrize("folders", [("photos", "images"), ("images", "data")])
def test_pictures_of_one_name_have_the_labels_beside_them(tmp_path: Path, folders: tuple[str, str]) -> None:
    for folder, x in zip(folders, (10, 90), strict=True):
        draw(tmp_path, f"{folder}/0.png", x)
        write(tmp_path, f"{folder}/0.xml", xml(x))
    index = read(tmp_path, "")
    assert sorted(names_of(index)) == sorted(f"{folder}/0.png" for folder in folders)
    assert boxes_are_where_drawn(index) and not index.defects


def test_pictures_of_one_name_have_the_labels_of_the_same_folder(tmp_path: Path) -> None:
    for folder, x in (("photos", 10), ("pictures", 90)):
        draw(tmp_path, f"images/{folder}/0.png", x)
        write(tmp_path, f"labels/{folder}/0.txt", yolo_label(x))
    write(tmp_path, "classes.txt", "cat\n")
    index = read(tmp_path, "")
    assert len(index.records) == 2 and boxes_are_where_drawn(index) and not index.defects


def test_a_folder_of_pictures_that_is_not_there(tmp_path: Path) -> None:
    for folder, x in (("infrared", 10), ("visible", 90)):
        draw(tmp_path, f"{folder}/0.png", x)
    write(tmp_path, "a.json", coco((1, "0.png", 90)))
    with pytest.raises(DataError, match=r"there is no folder 'visble'; did you mean 'visible'\?"):
        read_coco(tmp_path, "a.json", "visble")
    assert boxes_are_where_drawn(read_coco(tmp_path, "a.json", "visible"))


@pytest.mark.parametrize("text", ["look at 0 again\n", "", "torch==2.0\n"])
def test_notes_beside_voc_pictures_are_no_list(tmp_path: Path, text: str) -> None:
    draw(tmp_path, "0.png", 10)
    write(tmp_path, "0.xml", xml(10))
    write(tmp_path, "notes_test.txt", text)
    index = read(tmp_path, "")
    assert names_of(index) == ["0.png"] and boxes_are_where_drawn(index)
    write(tmp_path, "train.txt", "0\n")
    assert boxes_are_where_drawn(read(tmp_path, "train"))


def test_voc_objects_in_an_element_of_their_own(tmp_path: Path) -> None:
    draw(tmp_path, "0.png", 10)
    write(
        tmp_path, "0.xml", xml(10).replace("<object>", "<objects><object>").replace("</object>", "</object></objects>")
    )
    assert boxes_are_where_drawn(read(tmp_path, ""))


def test_a_blank_line_among_class_names_keeps_its_number(tmp_path: Path) -> None:
    for number in (0, 2):
        draw(tmp_path, f"{number}.png", 20)
        write(tmp_path, f"{number}.txt", f"{number}{yolo_label(20)[1:]}")
    write(tmp_path, "classes.txt", "cat\n\ndog\n\n")
    index = read(tmp_path, "")
    assert index.classes == ("cat", "class 1", "dog")
    assert [index.classes[record.labels[0] - 1] for record in index.records] == ["cat", "dog"]
    assert "classes.txt: line 2: it names no class; it counts as 'class 1'" in problems(index)


def test_a_yolo_split_behind_a_link_that_leads_out(tmp_path: Path) -> None:
    draw(tmp_path, "elsewhere/0.png", 20)
    root = tmp_path / "root"
    for split in ("val", "test"):
        draw(root, f"images/{split}/1.png", 20)
        write(root, f"labels/{split}/1.txt", yolo_label(20))
    (root / "images/train").symlink_to(tmp_path / "elsewhere")
    write(root, "data.yaml", "train: images/train\nval: images/val\nnames: [cat]\n")
    with pytest.raises(DataError, match="'images/train' of 'train' is not there, but 'images/train' is a link that"):
        read_yolo(root, "train")
    assert "images/train: link: it leads out of the root; what is behind it is not read" in problems(read(root, "val"))
