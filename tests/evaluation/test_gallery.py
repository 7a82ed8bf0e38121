"""The gallery: its data against the tables of the report, its pictures, and its page in a real browser."""

from __future__ import annotations

import base64
import json
import re
from itertools import pairwise

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_api

from detection.evaluation import gallery
from detection.evaluation.analysis import analyse, confusion_matrix, error_breakdown
from detection.evaluation.comparison_page import Side, write_comparison
from detection.evaluation.gallery import SHOWN, Pictures
from detection.evaluation.results import ImageResult
from detection.evaluation.significance import compare
from tests.evaluation.conftest import NAMES


def data_of(page):
    """The data of a gallery, as its script reads it."""
    return json.loads(re.search(r'<script type="application/json" id="gallery-data"[^>]*>(.*?)</script>', page)[1])


def selected(data, least=0, label=None, size=None, cell=None, mistake=None, layer=0):
    """Objects and detections of each image that a filter selects: `(I, 2)`, by what the module says of the data."""
    kinds, none, counts = mistake and SHOWN[mistake][0], len(data["classes"]), []
    for image in data["images"]:
        own = image["layers"][layer]
        boxes = np.array(own["boxes"]).reshape(-1, 9)
        objects = np.column_stack([np.reshape(image["objects"], (-1, 6)), np.reshape(own["objects"], (-1, 3))])
        boxes = boxes[boxes[:, 6] >= least]
        found, near = objects[:, 6] >= least, objects[:, 7] >= least
        kind_of = np.where(found, gallery.FOUND, np.where(near, gallery.LOST, gallery.MISSED))
        cells = np.column_stack([np.where(objects[:, 8], objects[:, 4], -1), np.full(len(objects), none)])
        row = []
        for numbers, kind, where in ((objects, kind_of, cells), (boxes, boxes[:, 7], boxes[:, [8, 4]])):
            keep = np.ones(len(numbers), bool)
            keep &= label is None or numbers[:, 4] == label
            keep &= size is None or numbers[:, 5] == size
            keep &= cell is None or (where == cell).all(1)
            keep &= kinds is None or np.isin(kind, kinds)
            row.append(int(keep.sum()))
        counts.append(row)
    return np.array(counts).reshape(-1, 2)


def test_filters_select_what_the_tables_count(evaluation):
    folder, metric, _ = evaluation
    data, judged = data_of((folder / "report.html").read_text(encoding="utf-8")), analyse(metric.results, 5)
    assert data["classes"] == NAMES and data["images"][3]["file"] == 'folder/<3> "a" & b.jpg'
    matrix = confusion_matrix(judged)
    assert matrix.sum() > 100 and (matrix > 0).sum() > 10
    for i, j in np.ndindex(matrix.shape):
        assert selected(data, 500, cell=(i, j)).sum() == matrix[i, j]
    rows = error_breakdown(judged)
    assert sum(row.count > 0 for row in rows) >= 7
    for row in rows:
        assert selected(data, mistake=row.name).sum() == row.count
    for k, name in enumerate(NAMES):
        objects = metric.objects_per_class().get(name, 0)
        assert selected(data, label=k).sum(0).tolist() == [objects, (judged.dt.label == k + 1).sum()]
    sizes = metric.object_counts()
    assert [selected(data, size=k)[:, 0].sum() for k in range(3)] == [sizes[k] for k in ("small", "medium", "large")]
    # At a threshold an object is found by its right detection alone, as a second analysis without the others has it.
    cut = [r for r in metric.results if (r.scores >= 0.6).any()]
    assert len(cut) == 20
    above = [_above(result, 0.6) for result in cut]
    missed = [row.count for row in error_breakdown(analyse(above, 5)) if row.name == "all false negatives"]
    assert selected(data, 600, mistake="all false negatives").sum() == missed[0]


def _above(r, score):
    keep = r.scores >= score
    truth = (r.gt_boxes, r.gt_labels, r.gt_areas, r.gt_iscrowd, r.gt_difficult, None)
    return ImageResult(r.image_id, r.file_name, r.size, r.boxes[keep], r.labels[keep], r.scores[keep], None, *truth)


def test_crowds_and_what_lies_on_them_are_in_no_table():
    boxes = np.array([[0.0, 0, 50, 50], [60, 60, 90, 90]], np.float32)
    flags, area = np.array([True, False]), np.array([2500.0, 900.0], np.float32)
    found = (boxes, np.array([1, 1]), np.array([0.9, 0.8], np.float32), None)
    truth = (boxes, np.array([1, 1]), area, flags, flags & False, None)
    results = [ImageResult(1, "a.jpg", (100, 100), *found, *truth)]
    data = gallery.block(results, ["a"], {"": analyse(results, 1)})
    image = data["images"][0]
    assert image["objects"] == [60, 60, 30, 30, 0, 0] and image["layers"][0]["objects"] == [800, 800, 0]
    kinds = [data["kinds"][kind] for kind in image["layers"][0]["boxes"][7::9]]
    assert kinds == ["not judged", "right"] and image["layers"][0]["boxes"][8::9] == [-1, 0]


def _results(count, masks=None):
    empty = np.zeros(0)
    none = (np.zeros((0, 4), np.float32), empty.astype(np.int64), empty)
    truth = (none[0], none[1], empty, empty.astype(bool), empty.astype(bool), masks)
    return [ImageResult(i, f"{i}.jpg", (30, 40), *none, masks, *truth) for i in range(count)]


def _shade(result):
    return np.full((*result.size, 3), result.image_id % 250, np.uint8)


def test_each_picture_is_there_once_in_its_place(tmp_path):
    results = _results(230)
    text = gallery.gallery(results, ["a"], {"": analyse(results, 1)}, Pictures(_shade, tmp_path, "beside"))
    chunks = re.findall(r'<script type="text/plain" class="pictures">(.*?)</script>', text, re.S)
    assert len(chunks) == 3 and 'data-chunk="100"' in text and not (tmp_path / "beside").exists()
    pictures = [base64.b64decode(line) for chunk in chunks for line in chunk.split("\n")]
    assert len(pictures) == 230
    for i, picture in enumerate(pictures):
        pixels = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
        assert pixels.shape == (30, 40, 3) and abs(int(pixels.mean()) - i % 250) <= 2


@pytest.mark.parametrize("asked", [True, False])
def test_pictures_go_beside_the_page_where_asked_or_without_room(asked, tmp_path, monkeypatch):
    if not asked:
        monkeypatch.setattr(gallery, "ROOM", 300)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "000007.webp").write_bytes(b"of an earlier evaluation")
    (tmp_path / "beside" / "notes.txt").write_text("of the user")
    results = _results(3)
    text = gallery.gallery(results, ["a"], {"": analyse(results, 1)}, Pictures(_shade, tmp_path, "beside", asked))
    assert 'data-folder="beside"' in text and 'class="pictures"' not in text
    names = sorted(path.name for path in (tmp_path / "beside").iterdir())
    assert names == ["000000.webp", "000001.webp", "000002.webp", "notes.txt"]
    assert cv2.imread(str(tmp_path / "beside" / "000002.webp")).shape == (30, 40, 3)


def test_pictures_are_the_smaller_the_more_there_are():
    sides = [gallery.side_of(count) for count in (0, 1, 600, 601, 5000, 10**6)]
    assert sides == [720, 720, 720, 512, 256, 256] and all(a >= b for a, b in pairwise(sides))


def test_masks_are_outlined(tmp_path):
    mask = np.zeros((300, 400), np.uint8)
    mask[50:151, 100:301] = 1
    cv2.circle(mask, (350, 250), 30, 1, -1)
    rle = mask_api.encode(np.asfortranarray(mask))
    box, one = np.array([[100, 50, 381, 281]], np.float32), np.array([1])
    for score, drawn in ((0.9, True), (0.1, False)):  # below the least score the box is drawn
        found = (box, one, np.array([score], np.float32), [rle])
        truth = (box, one, np.array([mask.sum()], np.float32), np.zeros(1, bool), np.zeros(1, bool), [rle])
        results = [ImageResult(1, "a.jpg", (300, 400), *found, *truth)]
        image = gallery.block(results, ["a"], {"": analyse(results, 1)})["images"][0]
        (outline,), (other,) = image["outlines"], image["layers"][0]["outlines"]
        assert other == (outline if drawn else None)
        rings = [np.array(re.findall(r"\d+", ring), int).reshape(-1, 2) for ring in outline.split("Z")[:-1]]
        again = cv2.fillPoly(np.zeros_like(mask), rings, 1)
        assert (again & mask).sum() / (again | mask).sum() > 0.98 and sum(map(len, rings)) < 30


COUNT = r"(\d+) objects and (\d+) detections in (\d+) of 20 images"


# Clicks each link of the tables and the plots: its text and address, and what the gallery says then.
CLICK_ALL = """[...document.querySelectorAll("section:not(#images) a[href*='='], .tiles a")].map(link => {
  link.click();
  return [link.textContent, link.getAttribute("href"), document.querySelector("#images .count").textContent];
})"""


@pytest.mark.slow
def test_the_report_in_a_browser(evaluation, browser):
    folder, _, _ = evaluation
    data, page = data_of((folder / "report.html").read_text(encoding="utf-8")), browser.new_page()
    url = (folder / "report.html").as_uri()

    def shown():
        return tuple(map(int, re.fullmatch(COUNT, page.text_content("#images .count")).groups()))

    def expected(*args, **wanted):
        counts = selected(data, *args, **wanted)
        return (*counts.sum(0).tolist(), int((counts.sum(1) > 0).sum()))

    page.goto(url)
    assert page.locator("figure").count() == 20 and shown() == (*selected(data, 300).sum(0).tolist(), 20)
    assert page.locator("figure img[src]").count() == 0  # they are far below
    for width in (390, 1200):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    # The numbers of the tables are those of the gallery that they lead to.
    clicked = page.evaluate(CLICK_ALL)
    assert len(clicked) > 40 and sum(text.isdigit() for text, _, _ in clicked) > 20
    for text, href, count in clicked:
        objects, detections, images = map(int, re.fullmatch(COUNT, count).groups())
        if text.isdigit():
            assert int(text) == (detections if "class=" in href else objects + detections) and images > 0
    page.evaluate("go('cell=5,0&score=0.5')")
    assert shown() == expected(500, cell=(5, 0))
    page.evaluate("go('')")
    assert abs(page.locator("#images").evaluate("section => section.getBoundingClientRect().top")) < 5
    page.wait_for_function("document.querySelector('figure img').naturalWidth === 260")
    assert 0 < page.locator("figure img[src]").count() < 20
    # Filters add up, stand in the address, and go away one by one, or by the way back.
    page.select_option("[name=class]", NAMES[1])
    page.locator(".kinds button", has_text="localisation").click()
    assert shown() == expected(300, label=1, mistake="localisation") and shown()[1] > 0
    address = page.evaluate("location.hash")
    assert "mistake=localisation" in address and "class=%3C%2Fscript%3E" in address
    assert page.locator(".chips button").all_text_contents() == [f"class {NAMES[1]}", "localisation"]
    page.locator(".chips button").first.click()
    assert shown() == expected(300, mistake="localisation")
    page.go_back()
    assert shown() == expected(300, label=1, mistake="localisation") and page.evaluate("location.hash") == address
    page.fill("[name=file]", "<1")
    counts = selected(data, 300, label=1, mistake="localisation")[[i for i in range(20) if str(i)[0] == "1"]]
    assert shown()[:2] == tuple(counts.sum(0)) and shown()[2] == (counts.sum(1) > 0).sum()
    again = browser.new_page()
    again.goto(url + address)
    assert again.text_content("#images .count") == "{} objects and {} detections in {} of 20 images".format(
        *expected(300, label=1, mistake="localisation")
    )
    # The slider draws the boxes again; those that the filters leave out are faint.
    page.evaluate("go('mistake=background&score=0.5')")
    strong = page.locator("figure rect:not(.faint)")
    assert strong.count() == expected(500, mistake="background")[1]
    page.evaluate(
        "() => { const input = one('[name=score]'); input.value = 0.9; input.dispatchEvent(new Event('input')); }"
    )
    assert strong.count() == expected(900, mistake="background")[1]
    page.locator("[name=rest]").uncheck()
    assert page.locator("figure rect").count() == strong.count() and page.locator("figure b b, td b").count() == 0
    # Enlarged, and on to the next.
    page.evaluate("go('mistake=missed')")
    page.locator("figure .frame").first.click()
    first = page.text_content("dialog .heading b")
    assert page.locator("dialog rect:not(.faint)").count() > 0 and "missed object" in page.text_content("dialog p")
    page.keyboard.press("ArrowRight")
    assert page.text_content("dialog .heading b") != first
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    # Tables are sorted by a click on their heads.
    column = page.locator("#classes td:nth-child(4)")
    page.locator("#classes th button").nth(3).click()
    falling = [float(value) for value in column.evaluate_all("cells => cells.map(c => c.dataset.value)") if value]
    assert len(falling) == 3 and falling == sorted(falling, reverse=True)


@pytest.mark.slow
def test_two_runs_in_a_browser(evaluation, browser, tmp_path):
    results = evaluation[1].results
    better = [_above(result, 0.5) for result in results]  # misses some, but has fewer wrong
    found = compare([results], [better], NAMES, draws=100)
    sides = [Side(name, ["run"], own, [{}], [{}], _shade) for name, own in (("<i>one", results), ("two", better))]
    write_comparison(tmp_path, found, *sides, NAMES, 100)
    data = data_of((tmp_path / "comparison.html").read_text(encoding="utf-8"))
    assert data["layers"] == ["A: <i>one", "B: two"] and [i["change"] for i in data["images"]] == [
        pytest.approx(change, abs=1e-3) for change in found.change
    ]
    page = browser.new_page()
    page.goto((tmp_path / "comparison.html").as_uri())
    page.locator("#mistakes a", has_text="duplicate").click()
    a, b = (selected(data, 300, mistake="duplicate", layer=layer)[:, 1] for layer in (0, 1))
    assert 0 < b.sum() < a.sum()
    count = page.text_content("#images .count")
    differ = a != b
    assert count.startswith(f"0 | 0 objects and {a[differ].sum()} | {b[differ].sum()} detections in ")
    places = [int(place) for place in page.locator("figure").evaluate_all("all => all.map(f => f.dataset.image)")]
    assert set(places) == set(np.flatnonzero(differ)) and page.locator("figure .frame").count() == 2 * len(places)
    page.evaluate("go('sort=runs')")
    places = [int(place) for place in page.locator("figure").evaluate_all("all => all.map(f => f.dataset.image)")]
    changes = np.abs(np.round(found.change, 3))[places]
    assert len(places) == 20 and (np.diff(changes) <= 0).all()
    page.locator("figure .frame").first.click()
    assert page.text_content("dialog i") == "A: <i>one"
    page.keyboard.press(" ")
    assert page.text_content("dialog i") == "B: two"
