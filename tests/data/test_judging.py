"""What a whole split shows: each slip made from a good set is named as what it is, and good sets raise nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from detection.data.checks import Objects
from detection.data.judging import judge, one_record_per_picture
from detection.data.reading import check_split
from detection.data.records import DataError, Defect, Form, Index, Record, relabel

Boxes = NDArray[np.float64]


# How the corners of an object are written, and how each format reads four numbers: by columns, without our code.
WRITTEN: dict[str, Callable[[Boxes], list[Any]]] = {
    "xyxy": lambda b: [b[:, 0], b[:, 1], b[:, 2], b[:, 3]],
    "xywh": lambda b: [b[:, 0], b[:, 1], b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]],
    "cxcywh": lambda b: [(b[:, 0] + b[:, 2]) / 2, (b[:, 1] + b[:, 3]) / 2, b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]],
    "yxyx": lambda b: [b[:, 1], b[:, 0], b[:, 3], b[:, 2]],
    "yxhw": lambda b: [b[:, 1], b[:, 0], b[:, 3] - b[:, 1], b[:, 2] - b[:, 0]],
    "xxyy": lambda b: [b[:, 0], b[:, 2], b[:, 1], b[:, 3]],
}


READ: dict[Form, Callable[[Any, Any, Any, Any], list[Any]]] = {
    "xyxy": lambda a, b, c, d: [a, b, c, d],
    "xywh": lambda a, b, c, d: [a, b, a + c, b + d],
    "cxcywh": lambda a, b, c, d: [a - c / 2, b - d / 2, a + c / 2, b + d / 2],
}


NAMED = {
    "xyxy": "corners (x1",
    "xywh": "corner and size (x",
    "cxcywh": "centre and size (cx",
    "yxyx": "corners with y first",
    "yxhw": "corner and size with y first",
    "xxyy": "sides (x1",
}


@st.composite
def good_sets(draw: st.DrawFn, fewest: int = 10) -> tuple[list[tuple[int, int]], list[Boxes]]:
    """Sizes (width, height) of 4 to 30 pictures, and in each 1 to 6 boxes of 5 to 60 % of its sides."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(max(4, fewest // 2), 30))
    largest = draw(st.sampled_from([64, 400, 2000]))
    sizes = [(int(w), int(h)) for w, h in rng.integers(40, largest + 1, (count, 2))]
    sets = []
    for width, height in sizes:
        sides = rng.uniform(0.05, 0.6, (rng.integers(1, 7), 2)) * (width, height)
        corners = rng.uniform(0, 1, sides.shape) * ((width, height) - sides)
        sets.append(np.hstack([corners, corners + sides]))
    assume(sum(map(len, sets)) >= fewest)
    return sizes, sets


def index_of(sizes: list[tuple[int, int]], read: list[Boxes], form: Form = "xyxy") -> Index:
    """What a reader makes of boxes that it has read as these corners, clipping and leaving out what it does."""
    index = Index(Path("nowhere"), ("thing",), (1,), [], form=form)
    for number, ((width, height), boxes) in enumerate(zip(sizes, read, strict=True)):
        objects = Objects("file", f"image {number}", width, height, index.defects)
        for i, box in enumerate(boxes.tolist()):
            objects.add(f"object {i}", box, 1, i)
        index.records.append(objects.finish(number, f"{number}.png", False))
    return index


def wrong_boxes(sizes: list[tuple[int, int]], read: list[Boxes]) -> int:
    """Boxes without a size, or beyond an edge by more than 2 px and 1 % of the side."""
    count = 0
    for (width, height), boxes in zip(sizes, read, strict=True):
        for x1, y1, x2, y2 in boxes:
            across, down = max(2, width / 100), max(2, height / 100)
            inside = x1 >= -across and y1 >= -down and x2 <= width + across and y2 <= height + down
            count += not (x2 > x1 and y2 > y1 and inside)
    return count


@given(good_sets(), st.sampled_from(list(READ)))
def test_good_sets_raise_nothing(drawn: Any, form: Form) -> None:
    sizes, sets = drawn
    assert judge(index_of(sizes, [np.stack(READ[form](*WRITTEN[form](b)), axis=1) for b in sets], form)) == []


@given(good_sets(fewest=40), st.sampled_from(list(READ)), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_objects_that_reach_out_of_the_picture_raise_nothing(drawn: Any, form: Form, share: float, seed: int) -> None:
    """Some sets draw the whole of an object that the edge cuts, on any side: no other reading explains that."""
    sizes, sets = drawn
    rng = np.random.default_rng(seed)
    moved = []
    for boxes in sets:
        by = (
            (boxes[:, 2:] - boxes[:, :2])
            * rng.uniform(-0.5, 0.5, (len(boxes), 2))
            * (rng.random((len(boxes), 1)) < share)
        )
        moved.append(boxes + np.hstack([by, by]))
    assert judge(index_of(sizes, moved, form)) == []


@given(good_sets(), st.sampled_from(list(READ)), st.sampled_from(list(WRITTEN)), st.floats(0.1, 1), st.randoms())
def test_numbers_of_another_meaning_are_named(drawn: Any, form: Form, meaning: str, share: float, rng: Any) -> None:
    sizes, sets = drawn
    slipped = set(rng.sample(range(len(sets)), max(1, round(share * len(sets)))))
    read = [np.stack(READ[form](*WRITTEN[meaning if i in slipped else form](b)), axis=1) for i, b in enumerate(sets)]
    wrong, boxes = wrong_boxes(sizes, read), sum(map(len, sets))
    found = judge(index_of(sizes, read, form))
    if wrong < max(3, 0.02 * boxes):
        assert found == []
    if wrong >= max(8, 0.02 * boxes):
        (defect,) = found
        assert NAMED[meaning] in defect.problem.partition("lie inside as")[2]
        assert defect.problem.startswith(f"{wrong} of {boxes} boxes are empty or outside")
        assert defect.severity == ("broken" if wrong >= 0.1 * boxes else "repairable")
        assert NAMED[form] in defect.fix


@given(good_sets(), st.sampled_from(list(READ)), st.booleans(), st.floats(0.1, 1), st.randoms())
def test_relative_boxes_are_named(drawn: Any, form: Form, from_one: bool, share: float, rng: Any) -> None:
    sizes, sets = drawn
    slipped = set(rng.sample(range(len(sets)), max(1, round(share * len(sets)))))
    read = []
    for i, ((width, height), boxes) in enumerate(zip(sizes, sets, strict=True)):
        numbers = boxes / (width, height, width, height) if i in slipped else boxes
        read.append(numbers - [1, 1, 0, 0] if from_one and i in slipped else numbers)  # VOC counts from 1
    found = judge(index_of(sizes, read, form))
    if len(slipped) >= 3 and sum(len(sets[i]) for i in slipped) >= 6:
        (defect,) = found
        assert f"relative to the image: in {len(slipped)} of {len(sets)} images" in defect.problem
        assert defect.severity == ("broken" if len(slipped) >= 0.1 * len(sets) else "repairable")
        assert "multiply x and width by the width" in defect.fix
    else:
        assert not any(defect.severity == "broken" for defect in found)


@given(good_sets(fewest=30), st.sampled_from(list(READ)), st.floats(2, 5), st.floats(2, 5))
def test_boxes_of_larger_pictures_are_named(drawn: Any, form: Form, across: float, down: float) -> None:
    sizes, sets = drawn
    read = [boxes * (across, down, across, down) for boxes in sets]
    (defect,) = judge(index_of(sizes, read, form))
    wrong, boxes = wrong_boxes(sizes, read), sum(map(len, sets))
    assert defect.problem.startswith(f"{wrong} of {boxes} boxes reach beyond the right or lower edge")
    assert "drawn on larger pictures" in defect.problem and defect.severity == "broken"


@pytest.mark.parametrize("box", [[0, 0, 1, 1], [0, 0, 0.4, 0.7]])
def test_a_click_or_a_box_that_stands_for_none_is_not_a_relative_set(box: list[float]) -> None:
    good = np.array([[5.0, 5, 30, 30]])
    assert judge(index_of([(60, 60)] * 5, [*[good] * 4, np.array([box])])) == []
    assert judge(index_of([(60, 60)] * 5, [np.array([[0.0, 0, 1, 1]])] * 5)) == []


def test_difficult_objects_count_where_they_train(tmp_path: Path) -> None:
    index = index_of([(60, 60)], [np.array([[5.0, 5, 30, 30]])])
    index.records[0].difficult[:] = True
    with pytest.raises(DataError, match="all of 1 objects are crowds or difficult"):
        check_split(index, "train")
    check_split(index, "train", with_difficult=True)
    check_split(index, "val")  # COCO's figures know of no difficult objects


@settings(max_examples=30)
@given(good_sets(), st.randoms())
def test_entries_of_one_picture_become_one_record(drawn: Any, rng: Any) -> None:
    """The objects of each picture are dealt out to one to three entries, some to two of them."""
    sizes, sets = drawn
    whole, entries, copies = index_of(sizes, sets), list[Record](), 0
    for record in whole.records:
        hands: list[list[int]] = [[] for _ in range(rng.randint(1, 3))]
        for i in range(len(record.labels)):
            to = rng.sample(range(len(hands)), min(len(hands), rng.choice([1, 1, 1, 2])))
            copies += len(to) - 1
            for hand in to:
                hands[hand].append(i)
        for own in hands:
            fields = {name: getattr(record, name)[own] for name in ("boxes", "labels", "areas", "annotation_ids")}
            flags = np.zeros(len(own), bool)
            entries.append(
                Record(len(entries), record.file_name, record.width, record.height, iscrowd=flags, difficult=flags,
                       segments=[[[float(i)] * 6] for i in own], **fields)
            )  # fmt: skip
    index = one_record_per_picture(Index(whole.root, whole.classes, whole.category_ids, entries))
    first = {entry.file_name: entry.image_id for entry in reversed(entries)}
    assert [(r.file_name, r.image_id) for r in index.records] == [
        (r.file_name, first[r.file_name]) for r in whole.records
    ]
    for record, right in zip(index.records, whole.records, strict=True):
        assert sorted(record.annotation_ids.tolist()) == right.annotation_ids.tolist()
        order = np.argsort(record.annotation_ids)
        np.testing.assert_array_equal(record.boxes[order], right.boxes)
        assert [segment[0][0] for segment in record.segments or ()] == record.annotation_ids.tolist()
    listed = len(entries) > len(whole.records)
    assert [d.severity for d in index.defects] == ["note"] * listed + ["repairable"] * (copies > 0)
    if copies:
        assert index.defects[1].problem.startswith(f"{copies} objects are listed again")


def test_untrained_classes_are_counted_together() -> None:
    index = index_of([(60, 60)], [np.array([[5.0, 5, 30, 30], [6, 6, 40, 40]])])
    index.classes = ("Traffic-Light",)
    same = relabel(index, ["traffic lights", "car"])
    assert (
        same.classes == ("traffic lights", "car")
        and same.category_ids == (None, None)
        and not len(same.records[0].labels)
    )
    (defect,) = same.defects
    assert defect.problem.endswith("not trained: 'Traffic-Light' (2; training calls it 'traffic lights')")
    assert defect.severity == "note" and defect.is_of_split and not Defect("f", "r", "p", "x").is_of_split


def test_labels_in_a_folder_of_another_name_are_the_reason(tmp_path: Path) -> None:
    index = index_of([(60, 60)], [np.zeros((0, 4))])
    index.root = tmp_path
    for folder, text in {"labels/empty": "", "labels/other": "0 .5 .5 .1 .1"}.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.txt").write_text(text)
    (defect,) = judge(index, "val")
    assert "has an object: label files of these names lie in 'labels/other'" in defect.problem
