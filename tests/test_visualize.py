"""Drawing: boxes where they belong, text inside the picture, colours that tell classes apart."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detection.visualize import COVERED, Tags, class_colour, draw_objects, side_by_side, text_size

NAMES = ["cat", "a name that is rather long"]


def test_box_is_drawn_in_the_colour_of_its_class_at_its_place() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    picture = draw_objects(image, np.array([[50.0, 60.0, 100.0, 90.0]]), np.array([2]), NAMES, side=400)
    pixels = np.asarray(picture)
    assert picture.size == (400, 200)  # twice as large
    rows, columns = np.nonzero((pixels == class_colour(2)).all(axis=2))
    outline = rows >= 120  # below the text
    assert (rows[outline].min(), rows.max()) == (120, 179)
    assert (columns[outline].min(), columns[outline].max()) == (100, 199)
    assert (pixels[150, 150] == 0).all()  # hollow


@pytest.mark.parametrize("shape", [(8, 8), (1000, 40), (40, 1000)])
def test_any_image_size_gives_readable_text(shape: tuple[int, int]) -> None:
    box = np.array([[0.0, 0.0, shape[1], shape[0]]])
    scores = np.array([0.87])
    picture = draw_objects(np.full((*shape, 3), 128, np.uint8), box, np.array([1]), NAMES, scores, side=300)
    assert max(picture.size) == 300
    assert (np.asarray(picture) == class_colour(1)).all(axis=2).any()


def test_no_objects_leave_the_image_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    picture = draw_objects(image, np.zeros((0, 4)), np.zeros(0, int), NAMES, np.zeros(0), side=30)
    assert (np.asarray(picture) == image).all()


def painted(picture: Image.Image) -> int:
    return int(np.asarray(picture).any(axis=2).sum())


@pytest.mark.parametrize("corner", [(-50.0, -50.0), (190.0, 0.0), (190.0, 99.0), (0.0, 500.0)])
def test_text_stays_inside(corner: tuple[float, float]) -> None:
    def write(place: tuple[float, float]) -> int:
        picture = Image.new("RGB", (200, 100), "black")
        tags = Tags(ImageDraw.Draw(picture), picture.size)
        tags.write((*place, place[0] + 20, place[1] + 20), "cat 0.87", (0, 0, 255))  # white on blue
        return painted(picture)

    assert write(corner) == write((60.0, 60.0)) > 300


def test_names_of_a_crowd_do_not_hide_each_other() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 380, (40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 100, (40, 2))], axis=1)
    together = Image.new("RGB", (480, 480), "black")
    tags, alone = Tags(ImageDraw.Draw(together), together.size), 0
    for box in boxes:
        tags.write(box, "cat 0.87", (0, 0, 255))
        single = Image.new("RGB", (480, 480), "black")
        Tags(ImageDraw.Draw(single), single.size).write(box, "cat 0.87", (0, 0, 255))
        alone += painted(single)
    assert painted(together) == alone


@pytest.mark.parametrize("side", [60, 480, 4000])
def test_text_is_readable_in_a_picture_of_its_own_size(side: int) -> None:
    image = np.zeros((side // 2, side, 3), np.uint8)
    box = np.array([[side / 4, side / 4, side / 2, side / 2 - 1]])
    picture = draw_objects(image, box, np.array([1]), NAMES, np.array([0.5]), side=None)
    assert picture.width == max(320, side)
    rows = np.nonzero((np.asarray(picture) == class_colour(1)).all(axis=2).any(axis=1))[0]
    assert (rows < picture.width // 4 - 1).sum() >= 0.018 * picture.width  # the ground of the text, above the box
    assert 9 <= text_size(picture.size) <= picture.width / 20


def test_neighbouring_classes_differ() -> None:
    colours = np.array([class_colour(label) for label in range(1, 31)], float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 1000 * np.eye(30)
    assert distances.min() > 10
    assert distances[:12, :12].min() > 70
    assert np.diag(distances, 1).min() > 100


def test_sheet_holds_every_picture() -> None:
    pairs = [(Image.new("RGB", (40, 30 + i), (255, 0, 0)), Image.new("RGB", (40, 30), (0, 0, 255))) for i in range(3)]
    sheet = np.asarray(side_by_side(pairs, ("left", "right")))
    assert (sheet == (255, 0, 0)).all(axis=2).sum() == 40 * (30 + 31 + 32)
    assert (sheet == (0, 0, 255)).all(axis=2).sum() == 3 * 40 * 30


def test_names_leave_a_crowded_picture_to_be_seen() -> None:
    """150 objects: names would cover most of it. What they cover is what differs from the picture without them."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 420, (150, 2))
    boxes, labels = np.concatenate([corners, corners + 30], axis=1), rng.integers(1, 3, 150)
    image, scores = np.full((480, 480, 3), 90, np.uint8), rng.permutation(150) / 150

    def covered(count: int, names: str) -> tuple[float, np.ndarray]:
        order = np.argsort(-scores)[:count]
        objects = (boxes[order], labels[order], NAMES, scores[order])
        plain, named = (np.asarray(draw_objects(image, *objects, names=n)) for n in ("none", names))  # type: ignore[arg-type]
        changed = (plain != named).any(axis=2)
        return float(changed.mean()), changed

    share, where = covered(150, "auto")
    assert COVERED / 2 < share <= COVERED < 0.4 < covered(150, "all")[0]
    first = boxes[np.argmax(scores)].astype(int)  # the best has its name in any case
    assert where[max(first[1] - 20, 0) : first[3] + 20, max(first[0] - 20, 0) : first[2] + 20].any()
    few, all_of_few = covered(5, "auto"), covered(5, "all")
    assert few[0] > 0 and (few[1] == all_of_few[1]).all()  # room for each: nothing shrinks


def test_line_width_is_that_of_the_boxes() -> None:
    box, image = np.array([[100.0, 100.0, 300.0, 300.0]]), np.zeros((400, 400, 3), np.uint8)
    for width in (1, 7):
        picture = np.asarray(draw_objects(image, box, np.array([1]), NAMES, side=None, names="none", line_width=width))
        assert (picture[200] == class_colour(1)).all(axis=1).sum() == 2 * width


def test_sheet_says_what_colours_mean() -> None:
    pictures = [(Image.new("RGB", (300, 60)), Image.new("RGB", (300, 60)))]
    sheet = np.asarray(side_by_side(pictures, ("truth", "found"), legend={"right": (1, 200, 3), "wrong": (200, 1, 3)}))
    assert sheet.shape[0] == np.asarray(side_by_side(pictures, ("truth", "found"))).shape[0] + 24
    for colour in ((1, 200, 3), (200, 1, 3)):
        assert (sheet[:24] == colour).all(axis=2).sum() == 14 * 14
