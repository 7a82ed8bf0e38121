"""Key points of COCO files and YOLO folders: read as they are written, or refused and reported with the cause."""

from __future__ import annotations

import json
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detection.batch import pad_keypoints
from detection.data import audit as auditing
from detection.data.coco import read_coco
from detection.data.datamodule import DetectionDataModule
from detection.data.dataset import make_target
from detection.data.figures import NAMES, SKELETON, draw_figures
from detection.data.finding import find
from detection.data.records import DataError, Index, relabel
from detection.data.skeletons import COCO_NAMES, Skeleton, pairs_by_name
from detection.data.store import RecordStore
from detection.data.yolo import read_yolo

WIDTH, HEIGHT = 64, 48


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(path)


def write(root: Path, annotations: list[dict[str, Any]], **category: Any) -> Path:
    """A COCO set of one picture and one category `man` of three points, or of the categories named."""
    picture(root / "a.png")
    man = {"id": 1, "name": "man", "keypoints": ["nose", "left_hand", "right_hand"], "skeleton": [[1, 2], [1, 3]]}
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0} | entry
            for i, entry in enumerate(annotations, 1)
        ],
        "categories": category.get("categories") or [man],
    }
    (root / "a.json").write_text(json.dumps(content))
    return root


def read(root: Path, **options: Any) -> Index:
    return read_coco(root, "a.json", keypoints=True, **options)


def points(index: Index) -> list[Any]:
    found = index.records[0].keypoints
    assert found is not None and found.dtype == np.float32
    return list(found.tolist())


def test_points_are_read_as_they_are_written(tmp_path: Path) -> None:
    index = read(write(tmp_path, [{"keypoints": [12, 13.5, 2, 11, 20, 1, 0, 0, 0], "num_keypoints": 2}, {}]))
    assert index.skeleton == Skeleton(("nose", "left_hand", "right_hand"), ((1, 2),), ((0, 1), (0, 2)))
    assert points(index) == [[[12, 13.5, 2], [11, 20, 1], [0, 0, 0]], [[0, 0, 0]] * 3]
    assert not index.defects
    assert read_coco(tmp_path, "a.json").records[0].keypoints is None


@pytest.mark.parametrize(
    ("entry", "problem", "left"),
    [
        ({"keypoints": [1, 2, 2]}, "keypoints holds 3 numbers, not 9 for 3 points", [0, 0, 0]),
        ({"keypoints": "x"}, "keypoints holds str, not 9", [0, 0, 0]),
        ({"keypoints": [1, 2, 3, 11, 12, 2, 0, 0, 0]}, "the visibility of 1 key points is 3", [0, 2, 0]),
        ({"keypoints": [90, 2, 2, 11, 12, 2, 0, 0, 0]}, "1 key points lie outside the image", [0, 2, 0]),
        ({"keypoints": [0, 0, 2, 11, 12, 2, 0, 0, 0]}, r"1 annotated key points lie at \(0, 0\)", [2, 2, 0]),
        ({"keypoints": [1, None, 2, 11, 12, 2, 0, 0, 0]}, "1 key points are not finite", [0, 2, 0]),
        ({"keypoints": [9, 9, 2, 11, 12, 2, 0, 0, 0], "num_keypoints": 3}, "num_keypoints is 3, but 2", [2, 2, 0]),
    ],
)
def test_what_is_wrong_is_reported(tmp_path: Path, entry: dict[str, Any], problem: str, left: list[int]) -> None:
    import re

    index = read(write(tmp_path, [entry]))
    assert [row[2] for row in points(index)[0]] == left
    assert len(index.defects) == 1 and re.search(problem, index.defects[0].problem), index.defects
    assert "annotation 1" in index.defects[0].record


def test_classes_of_other_points_are_refused_unless_nobody_asked(tmp_path: Path) -> None:
    man, dog = (
        {"id": 1, "name": "man", "keypoints": ["nose", "hand"]},
        {"id": 2, "name": "dog", "keypoints": ["nose", "tail", "paw"]},
    )
    root = write(tmp_path, [{"keypoints": [12, 13, 2, 14, 15, 2]}], categories=[man, dog, {"id": 3, "name": "tree"}])
    with pytest.raises(DataError, match=r"'man' has 2 key points \(nose, hand\), but 'dog' 3.*data\.classes"):
        read(root)
    assert len(read(root, classes=["man", "tree"]).skeleton or ()) == 2
    unasked = read_coco(root, "a.json", keypoints=None)
    assert unasked.skeleton is None and unasked.records[0].keypoints is None
    assert "'man' has 2 key points" in unasked.defects[0].problem and unasked.defects[0].severity == "note"


def test_points_far_from_their_box_are_noted_by_the_audit(tmp_path: Path) -> None:
    root = write(tmp_path, [{"keypoints": [60, 45, 2, 11, 12, 2, 31, 12, 2], "num_keypoints": 3}])
    found = auditing.audit("train", next(iter(auditing.splits_in(find(root)).values())))
    far = [defect for defect in found.defects if "far outside" in defect.problem]
    assert [defect.problem for defect in far] == ["1 key points lie far outside of its box"]
    assert found.statistics["key points"] == 3 and found.statistics["hidden key points"] == 0


def yolo(root: Path, lines: list[str], config: str) -> Path:
    picture(root / "images/train/a.png")
    (root / "labels/train").mkdir(parents=True)
    (root / "labels/train/a.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/train\nnames: [man]\n{config}\n")
    return root


def test_yolo_points_with_and_without_visibility(tmp_path: Path) -> None:
    box = "0 0.5 0.5 0.5 0.5"
    three = read_yolo(
        yolo(tmp_path / "3", [f"{box} 0.5 0.25 2 0.25 0.5 1 0 0 0", box], "kpt_shape: [3, 3]\nflip_idx: [0, 2, 1]"),
        "train",
        keypoints=True,
    )
    assert points(three) == [[[32, 12, 2], [16, 24, 1], [0, 0, 0]], [[0, 0, 0]] * 3]
    assert three.skeleton == Skeleton(("0", "1", "2"), ((1, 2),))
    assert [defect.problem for defect in three.defects] == ["no key points follow the box"]
    two = read_yolo(yolo(tmp_path / "2", [f"{box} 0.5 0.25 0 0"], "kpt_shape: [2, 2]"), "train", keypoints=True)
    assert points(two) == [[[32, 12, 2], [0, 0, 0]]]
    assert two.skeleton is not None and two.skeleton.pairs is None  # nothing says which are left and right
    plain = read_yolo(tmp_path / "2", "train")
    assert plain.records[0].keypoints is None and len(plain.records[0].boxes) == 1


def test_yolo_names_and_mistakes(tmp_path: Path) -> None:
    named = "kpt_shape: [2, 2]\nkpt_names:\n  0: [left_eye, right_eye]"
    index = read_yolo(yolo(tmp_path / "a", ["0 .5 .5 .5 .5 .5 .5 .4 .4"], named), "train", keypoints=True)
    assert index.skeleton == Skeleton(("left_eye", "right_eye"), ((0, 1),))
    wrong = yolo(tmp_path / "b", ["0 .5 .5 .5 .5 .5 .5 .4 .4"], "kpt_shape: [2, 2]\nflip_idx: [1, 1]")
    with pytest.raises(DataError, match="flip_idx must give each of the 2 points its partner"):
        read_yolo(wrong, "train", keypoints=True)
    long = yolo(tmp_path / "c", ["0 .5 .5 .5 .5 .5 .5 .4 .4", "0 .1 .1 .3 .1 .3 .3"], "kpt_shape: [2, 2]")
    assert "6 numbers follow the class" in [d.problem for d in read_yolo(long, "train").defects]


def test_real_key_points(shared_data: Path) -> None:
    index = read_yolo(shared_data / "wild/y_pose_12_2", "train", keypoints=True)
    assert index.skeleton is not None and len(index.skeleton) == 12
    for record in index.records:
        assert record.keypoints is not None and (record.keypoints[..., 2] == 2).all()
        inside = (record.keypoints[..., :2] > 0) & (record.keypoints[..., :2] < (record.width, record.height))
        assert inside.all()
    coco = read_coco(shared_data / "tiny_coco", "annotations/person_keypoints_train2017.json", "train2017",
                     keypoints=True)  # fmt: skip
    raw = json.loads((shared_data / "tiny_coco/annotations/person_keypoints_train2017.json").read_text())
    stated = sum(entry["num_keypoints"] for entry in raw["annotations"])
    assert stated == sum(int((r.keypoints[..., 2] > 0).sum()) for r in coco.records if r.keypoints is not None) > 300
    assert coco.skeleton is not None and coco.skeleton.names == COCO_NAMES


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (COCO_NAMES, ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16))),
        (("eye_l", "nose", "eye_r"), ((0, 2),)),
        (("LeftEye", "RightEye"), ((0, 1),)),
        (("Left Eye", "right eye"), ((0, 1),)),
        (("left", "right", "top"), ((0, 1),)),
        (("top", "bottom", "centre"), ()),
        (("wheel_l", "top"), ()),  # a letter alone says nothing
        (("left_eye", "nose"), None),
        (("left_eye", "right_eye", "Right Eye"), None),
    ],
)
def test_pairs_follow_from_names_or_are_not_known(names: tuple[str, ...], pairs: Any) -> None:
    assert pairs_by_name(names) == pairs


def test_settings_name_pairs_and_sigmas() -> None:
    known = Skeleton(("a", "b", "c"))
    assert known.with_settings([("a", 2)], [0.1, 0.2, 0.3]) == Skeleton(("a", "b", "c"), ((0, 2),), (), (0.1, 0.2, 0.3))
    flip = known.with_settings([("a", 2)], None).flip
    assert flip is not None and flip.tolist() == [2, 1, 0]
    for pairs, sigmas, said in (
        ([("a", "x")], None, "there is no point 'x'; there are 0 to 2: a, b, c"),
        ([("a", 5)], None, "there is no point 5"),
        ([("a", "b"), ("b", "c")], None, "the point 'b' is there twice"),
        (None, [0.1], "give one above 0 for each of 3 key points"),
        (None, [0.1, 0.0, 0.2], "give one above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            known.with_settings(pairs, sigmas)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_figures(tmp_path_factory.mktemp("figures"), 8, 4)


def data(root: Path, **options: Any) -> DetectionDataModule:
    settings: dict[str, Any] = {"num_workers": 0, "batch_size": 4, "min_size": 128, "max_size": 128}
    return DetectionDataModule(root=str(root), format="coco", keypoints=True, **settings | options)


def test_drawn_figures_come_back_as_they_were_written(figures: Path) -> None:
    index = read_coco(figures, "annotations/val.json", keypoints=True)
    assert index.skeleton == SKELETON and not index.defects and index.classes == ("figure",)
    points = np.concatenate([record.keypoints for record in index.records if record.keypoints is not None])
    assert points.shape[1:] == (len(NAMES), 3) and set(np.unique(points[..., 2])) <= {1, 2}
    assert (points[:, 1, 0] > points[:, 2, 0]).all()  # the left hand is on the right


def test_batches_of_workers_are_those_of_the_main_process(figures: Path) -> None:
    batches = []
    for workers in (0, 1):
        module = data(figures, num_workers=workers)
        module.setup("fit")
        batches.append((next(iter(module.train_dataloader())), next(iter(module.val_dataloader()))))
    (one, val), (other, other_val) = batches
    assert one.gt_keypoints is not None and other.gt_keypoints is not None and one.gt_keypoints.shape[2:] == (5, 3)
    assert torch.equal(one.gt_keypoints, other.gt_keypoints)
    assert one.gt_keypoints.shape[:2] == one.gt_boxes.shape[:2] and not one.gt_keypoints[~one.gt_valid].any()
    shown = one.gt_keypoints[one.gt_valid]
    # Mirrored or not, the left hand stays on the right.
    there = (shown[:, 1, 2] > 0) & (shown[:, 2, 2] > 0)
    assert there.any() and (shown[there, 1, 0] > shown[there, 2, 0]).all()
    for target, same in zip(val.targets, other_val.targets, strict=True):
        assert target.keypoints is not None and same.keypoints is not None
        assert torch.equal(target.keypoints, same.keypoints)
    again = pickle.loads(bytes(ForkingPickler.dumps(val.targets[0])))
    assert torch.equal(again.keypoints, val.targets[0].keypoints)


def test_the_store_costs_nothing_without_points(figures: Path) -> None:
    index = read_coco(figures, "annotations/train.json", keypoints=True)
    store, bare = RecordStore(index.records), RecordStore(read_coco(figures, "annotations/train.json").records)
    assert store.keypoints is not None and bare.keypoints is None and bare[0].keypoints is None
    first = index.records[0].keypoints
    assert first is not None and store[0].keypoints is not None and (store[0].keypoints == first).all()
    target = make_target(store[0])
    assert target.keypoints is not None and target.keypoints.shape == first.shape


def test_a_split_of_other_classes_keeps_points_with_their_objects(tmp_path: Path) -> None:
    two = [{"id": 1, "name": "man", "keypoints": ["nose"]}, {"id": 2, "name": "tree"}]
    entries = [{"category_id": 2}, {"keypoints": [12, 13, 2]}]
    index = relabel(read(write(tmp_path, entries, categories=two)), ["man"])
    assert points(index) == [[[12, 13, 2]]]


def test_mirrors_without_known_pairs_are_refused(tmp_path: Path) -> None:
    root = yolo(tmp_path, ["0 .5 .5 .5 .5 .5 .5 .4 .4"], "kpt_shape: [2, 2]")
    settings: dict[str, Any] = {"num_workers": 0, "keypoints": True, "format": "yolo", "batch_size": 1}
    with pytest.raises(
        DataError, match=r"which are partners is not known \(0, 1\): name them with data.keypoint_pairs"
    ):
        DetectionDataModule(root=str(root), **settings).setup("fit")
    for extra in ({"hflip": 0.0}, {"keypoint_pairs": []}, {"keypoint_pairs": [(0, 1)]}):
        module = DetectionDataModule(root=str(root), **settings | extra)  # type: ignore[arg-type]
        module.setup("fit")
        assert next(iter(module.train_dataloader())).gt_keypoints is not None


def test_points_that_are_not_there_are_refused(figures: Path, shared_data: Path) -> None:
    (figures / "bare.json").write_text(
        json.dumps(
            json.loads((figures / "annotations/val.json").read_text()) | {"categories": [{"id": 1, "name": "figure"}]}
        )
    )
    with pytest.raises(DataError, match=r"data\.keypoints is true, but no class has key points"):
        data(figures, train_split="bare.json", val_split="bare.json").setup("fit")
    content = json.loads((figures / "annotations/val.json").read_text())
    content["categories"][0]["keypoints"] = ["a", "b", "c", "d", "e"]
    (figures / "other.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="but another has"):
        data(figures, train_split="annotations/train.json", val_split="other.json").setup("fit")
    with pytest.raises(ValueError, match="nor key points"):
        data(figures, proposals={"class_path": "detection.data.proposals.SelectiveSearch"})


def test_points_of_no_object_have_a_row(figures: Path) -> None:
    assert pad_keypoints([torch.zeros(0, 5, 3), torch.ones(2, 5, 3)], 2).shape == (2, 2, 5, 3)
