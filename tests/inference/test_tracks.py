"""Ids over the frames of a film: one object, one number, whatever finds and follows it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detection.cli.predict import main
from detection.inference import Detections, predict
from detection.inference.run import COLUMNS
from detection.inference.sources import open_source
from detection.inference.tracks import FPS, LOWEST, Tracks
from detection.visualize import UNTRACKED, class_colour
from tests.inference.blobs import NAMES, Blobs, film, scene

SIZE = (120, 200)


class Nearest:
    """Stands for the library: a box goes on with the track whose last box it overlaps most."""

    made: list[Nearest] = []  # noqa: RUF012

    def __init__(self, fps: float, score_thresh: float) -> None:
        self.fps, self.score_thresh, self.last, self.sizes = fps, score_thresh, dict[int, np.ndarray](), list[int]()
        Nearest.made.append(self)

    def update(self, detections):
        ids = []
        self.sizes.append(len(detections))
        for box in detections.xyxy:
            overlaps = {own: _overlap(box, last) for own, last in self.last.items() if own not in ids}
            best = max(overlaps, key=overlaps.__getitem__, default=None)
            ids.append(best if best is not None and overlaps[best] > 0 else len(self.last))
            self.last[ids[-1]] = box
        detections.tracker_id = np.array(ids, int)
        return detections[np.arange(len(ids))[::-1]] if len(ids) else detections  # in another order


def _overlap(a, b):
    return np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))


@pytest.fixture
def nearest(monkeypatch):
    pytest.importorskip("supervision", reason='needs pip install "detection[supervision]"')
    Nearest.made = []
    return Nearest


def moving(frame: int) -> Detections:
    """Two red things that run towards each other in two lanes, and a blue one that runs through both."""
    boxes = [(5 + 6 * frame, 20, 25 + 6 * frame, 40), (175 - 6 * frame, 70, 195 - 6 * frame, 90)]
    boxes.append((90, 4 + 4 * frame, 110, 24 + 4 * frame))
    order = np.random.default_rng(frame).permutation(3)  # as scores would have it
    scores = np.array([0.9, 0.8, 0.7], np.float32)
    return Detections(np.array(boxes, np.float32)[order], np.array([1, 1, 2])[order], scores[order], NAMES, SIZE)


def identity(found: Detections) -> list[int]:
    """Which of the three things each detection of `moving` is."""
    lane = np.where(found.boxes[:, 1] == 20, 0, 1)
    return [2 if label == 2 else int(row) for label, row in zip(found.labels, lane, strict=True)]


def test_each_thing_has_one_number(nearest):
    tracks, numbers = Tracks(12.0, make=nearest), [set[int]() for _ in range(3)]
    for frame in range(25):
        found = tracks(moving(frame))
        assert found.boxes.tolist() == moving(frame).boxes.tolist()  # in the order given
        for thing, own in zip(identity(found), found.ids.tolist(), strict=True):
            numbers[thing].add(own)
    assert sorted(own for seen in numbers for own in seen) == [1, 2, 3]
    assert len(nearest.made) >= 2 and {tracker.fps for tracker in nearest.made} == {12.0}
    assert Tracks(0.0, make=nearest) and nearest.made[-1].fps == FPS


def test_classes_are_kept_apart_and_their_time_goes_on(nearest):
    """Red turns blue in the same place: another object. While it is blue, the tracker of red sees empty frames."""
    tracks = Tracks(25.0, make=nearest)
    box, ids = np.array([[10, 10, 30, 30]], np.float32), []
    for label in (1, 1, 2, 2, 1):
        found = tracks(Detections(box, np.array([label]), np.ones(1, np.float32), NAMES, SIZE))
        ids.append(int(found.ids[0]))
    assert ids == [1, 1, 2, 2, 1]
    assert [tracker.sizes for tracker in nearest.made if tracker.sizes] == [[1, 1, 0, 0, 1], [1, 1, 0]]


def test_weak_detections_go_on_with_tracks_but_the_weakest_are_not_shown_to_them(nearest):
    tracks = Tracks(25.0, make=nearest)
    box = np.array([[10, 10, 30, 30], [60, 60, 70, 70]], np.float32)
    found = tracks(Detections(box, np.array([1, 1]), np.array([0.3, LOWEST / 2], np.float32), NAMES, SIZE))
    assert found.ids.tolist() == [1, -1] and found.above(0.2).ids.tolist() == [1]


@pytest.mark.parametrize("kind", ["film", "folder"])
def test_results_have_ids_and_each_film_begins_anew(tmp_path, nearest, kind):
    if kind == "film":
        source = str(film(tmp_path / "clip.mp4", "mp4v"))
    else:
        for i in range(9):
            path = tmp_path / "frames" / f"{i:02}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(scene(64, 96, (0, 5 * i + 4, 16, 5 * i + 28, 40), (2, 60, 44, 80, 60))).save(path)
        source = str(tmp_path / "frames")
    things = 1 if kind == "film" else 2
    for run in ("first", "second"):
        opened = open_source(source)
        predict(Blobs(), opened, tmp_path / run, batch_size=4, tracks=Tracks(opened.fps, make=nearest))
        assert nearest.made[-1].fps == (12 if kind == "film" else FPS)
        entries = json.loads((tmp_path / run / "predictions.json").read_text())["annotations"]
        assert len(entries) == 9 * things
        by_kind = {(entry["category_id"], entry["track_id"]) for entry in entries}
        assert len(by_kind) == things and {own for _, own in by_kind} == set(range(1, things + 1))
        rows = list(csv.reader((tmp_path / run / "predictions.csv").open()))
        assert rows[0] == [*COLUMNS, "id"] and {row[-1] for row in rows[1:]} == {str(i + 1) for i in range(things)}
    predict(Blobs(), open_source(source), tmp_path / "plain", pictures=False)
    assert next(csv.reader((tmp_path / "plain" / "predictions.csv").open())) == list(COLUMNS)
    assert "track_id" not in (tmp_path / "plain" / "predictions.json").read_text()


def test_pictures_have_a_colour_for_each_id():
    boxes = np.array([[20, 20, 80, 80], [100, 20, 160, 80], [20, 100, 60, 118]], np.float32)
    found = Detections(boxes, np.array([1, 1, 1]), np.ones(3, np.float32), NAMES, SIZE, ids=np.array([2, 7, -1]))
    drawn = np.asarray(found.draw(np.zeros((*SIZE, 3), np.uint8), side=400, labels="none"))
    for (x1, y1, *_), colour in zip(boxes * 2, (class_colour(2), class_colour(7), UNTRACKED), strict=True):
        assert tuple(drawn[int(y1), int(x1) + 20]) == colour
    named = np.asarray(found.draw(np.zeros((*SIZE, 3), np.uint8), side=400, labels="all"))
    assert (named != drawn).any()


def test_what_can_not_be_followed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ImportError, match=r'tracking needs trackers: pip install "detection\[track\]"'):
        Tracks(25.0)
    with pytest.raises(ValueError, match="all frames stay on one device"):
        predict(Blobs(), open_source(str(_picture(tmp_path))), tmp_path / "o", shared=True, tracks=object())
    said = main(["--ckpt", str(tmp_path / "no.ckpt"), "--source", "0", "--track", "true", "--devices", "2"])
    assert said is not None and "--track follows objects from frame to frame, on one device" in said


def _picture(folder: Path) -> Path:
    Image.fromarray(scene(*SIZE)).save(folder / "a.png")
    return folder / "a.png"


def discs(frame: int, *lanes: tuple[int, int, int, int]) -> np.ndarray:
    """Red discs that move: x and y at first, and their steps."""
    image = scene(*SIZE)
    for x, y, dx, dy in lanes:
        cv2.circle(image, (x + dx * frame, y + dy * frame), 9, (220, 30, 30), -1)
    return image


@pytest.mark.parametrize(
    "lanes", [[(15, 30, 4, 0), (185, 90, -4, 0)], [(15, 15, 4, 1), (100, 60, 0, 0), (20, 100, 3, 0)]]
)
def test_the_library_follows_discs(lanes):
    """Discs that stay apart: each is one number from its second frame on, in all thirty."""
    pytest.importorskip("trackers", reason='needs pip install "detection[track]"')
    tracks, of = Tracks(12.0), dict[int, list[int]]()
    for frame in range(30):
        found = tracks(Blobs()._find(discs(frame, *lanes)))
        centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
        for thing, (x, y, dx, dy) in enumerate(lanes):
            distance = np.abs(centres - (x + dx * frame, y + dy * frame)).max(axis=1)
            of.setdefault(thing, []).append(int(found.ids[distance.argmin()]))
    for own in of.values():
        assert own[0] == -1 and own[1] > 0 and len(set(own[1:])) == 1
    assert len({own[1] for own in of.values()}) == len(lanes)


def test_the_library_follows_through_a_gap_and_not_for_ever():
    pytest.importorskip("trackers", reason='needs pip install "detection[track]"')

    def ids_with_gap(gap: int) -> tuple[int, int]:
        tracks, ids = Tracks(10.0), list[int]()
        for frame in range(40):
            hidden = 12 <= frame < 12 + gap
            found = tracks(Blobs()._find(scene(*SIZE) if hidden else discs(frame, (20, 60, 1, 0))))
            ids += found.ids.tolist()
        return ids[11], ids[-1]

    before, after = ids_with_gap(4)
    assert before == after > 0
    before, after = ids_with_gap(20)  # two seconds
    assert before != after


def test_crossing_discs_of_one_class_are_never_more_than_two():
    """Where two of a class meet, they may change their numbers; pairs of frames elsewhere keep them."""
    pytest.importorskip("trackers", reason='needs pip install "detection[track]"')
    lanes, tracks, frames = [(15, 58, 4, 0), (185, 62, -4, 0)], Tracks(12.0), list[dict[int, float]]()
    for frame in range(42):
        found = tracks(Blobs()._find(discs(frame, *lanes)))
        frames.append(dict(zip(found.ids.tolist(), found.boxes[:, 0].tolist(), strict=True)))
    for (number, a), b in zip(enumerate(frames), frames[1:], strict=False):
        if number > 1 and len(a) == len(b) == 2 and abs(np.subtract(*a.values())) > 30:
            assert a.keys() == b.keys() and all(abs(a[own] - b[own]) <= 4 for own in a)
    assert len({own for frame in frames for own in frame if own > 0}) >= 2
