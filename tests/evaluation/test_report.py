"""The report as files, as HTML, and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from detection.batch import Target
from detection.evaluation import confusion_table, plots
from detection.evaluation.analysis import analyse, confusion_matrix, confusions
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.report import write_evaluation

NAMES = ["cat", "<b>dog</b>", "_$bird$", "never seen", "absent"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Drawn detections of 20 images in three classes, one with a hostile name, and some on a class without objects."""
    rng = np.random.default_rng(0)
    metric = MeanAP(NAMES)
    for image in range(20):
        gt = rng.uniform(0, 150, (5, 4))
        gt[:, 2:] = gt[:, :2] + rng.uniform(8, 100, (5, 2))
        dt = np.concatenate([gt + rng.normal(0, 6, gt.shape), gt[:2], rng.uniform(0, 60, (3, 4))])
        dt[:, 2:] = np.maximum(dt[:, 2:], dt[:, :2] + 1)
        labels = rng.integers(1, 4, 5)
        found = np.concatenate([np.where(rng.random(5) < 0.7, labels, rng.integers(1, 4, 5)), labels[:2], [1, 2, 5]])
        boxes = torch.tensor(gt, dtype=torch.float32)
        target = Target(
            image_id=image,
            file_name=f"folder/<{image}>.jpg",
            size=(200, 260),
            boxes=boxes,
            labels=torch.from_numpy(labels),
            areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
            iscrowd=torch.zeros(5, dtype=torch.bool),
            difficult=torch.zeros(5, dtype=torch.bool),
        )
        detection = {
            "boxes": torch.tensor(dt, dtype=torch.float32),
            "labels": torch.from_numpy(found),
            "scores": torch.tensor(rng.random(10), dtype=torch.float32),
        }
        metric.update([detection], [target])
    folder = tmp_path_factory.mktemp("evaluation") / "new"
    figures = write_evaluation(
        folder,
        metric,
        [3, 5, 7, 8, 9],
        lambda result: np.full((*result.size, 3), 90, np.uint8),
        "Test <report>",
        {"checkpoint": "a&b.ckpt"},
        "model: {lr: 0.125}",
    )
    return folder, metric, figures


class Page(HTMLParser):
    """Tags, what they load, and the text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.words, self.raw = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.raw = tag in ("script", "style")
        self.loads += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.raw = False

    def handle_data(self, data):
        if not self.raw:
            self.words.append(data)


def test_everything_is_written(evaluation):
    folder, metric, figures = evaluation
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names = ("confusion", "mistakes", "precision_recall", "reliability", "scores", "sizes")
    assert written == {"detections_bbox.json", "figures.json", "report.html", *(f"plots/{name}.png" for name in names)}
    assert all((folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    summary = json.loads((folder / "figures.json").read_text())
    assert summary["figures"] == figures == metric.compute()
    assert summary["per_class"] == metric.per_class()
    assert summary["absent_detections"] == {"absent": 20}
    assert summary["images"] == 20
    assert len(json.loads((folder / "detections_bbox.json").read_text())) == 200


def test_the_page_needs_nothing_else_and_escapes_names(evaluation):
    folder, _, figures = evaluation
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads
    assert all(load.startswith("data:image/") for load in page.loads)
    assert "url(" not in text
    assert "@import" not in text
    words = " ".join(page.words)
    for expected in ("Test <report>", "a&b.ckpt", "<b>dog</b>", "folder/<", f"{figures['map']:.3f}"):
        assert expected in words
    assert ">never seen</button>" not in text  # no row of the classes, which says nothing; but one of the matrix
    assert 12 <= page.tags.count("figure") <= 20
    assert page.tags.count("table") == 3
    assert "objects <b>100</b>" in text and "lr: 0.125" in words


def test_a_report_of_nothing_and_without_pictures(tmp_path):
    metric = MeanAP(["a"])
    metric.update([], [])
    figures = write_evaluation(tmp_path, metric, [1])
    assert figures["map"] == -1.0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<figure" not in text
    assert "nan" not in " ".join(Page(text).words).lower()


def test_crowds_are_in_the_count_of_objects_that_the_log_has(tmp_path):
    metric, crowd = MeanAP(["a"]), torch.tensor([True, False, False])
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 40, 40], [50, 50, 90, 90]])
    target = Target(
        1, "a.jpg", (100, 100), boxes, torch.ones(3, dtype=torch.int64), torch.full((3,), 400.0), crowd, ~crowd
    )
    metric.update([{"boxes": boxes[:0], "labels": boxes[:0, 0].long(), "scores": boxes[:0, 0]}], [target])
    write_evaluation(tmp_path, metric, [1])
    assert "objects <b>3 (1 of them crowds, not judged)</b>" in (tmp_path / "report.html").read_text()


def test_confusion_table_has_the_matrix_and_the_images_of_its_cells(evaluation):
    _, metric, _ = evaluation
    judged = analyse(metric.results, 5)
    matrix, cells = confusion_matrix(judged), confusions(judged)
    found = re.findall(r'data-key="(\d+),(\d+)">(\d+)<', confusion_table.table(matrix, NAMES))
    assert {(int(i), int(j)): int(n) for i, j, n in found} == {(i, j): matrix[i, j] for i, j in np.argwhere(matrix)}
    rank = np.random.default_rng(0).permutation(20)
    images = confusion_table.images_of(cells, rank)
    assert set(images) == {f"{i},{j}" for i, j in np.argwhere(matrix)}
    for key, listed in images.items():
        true, detected = map(int, key.split(","))
        expected = set(cells.image[(cells.true == true) & (cells.detected == detected)].tolist())
        assert set(listed) == expected and len(listed) == len(expected)
        assert (np.diff(rank[listed]) > 0).all()


def test_a_large_confusion_table_says_how_many_it_shows_and_keeps_shares_of_all():
    matrix = np.zeros((121, 121), np.int64)
    matrix[np.arange(120), np.arange(120)] = 3
    matrix[7, 110], matrix[7, 120] = 1, 4
    text = confusion_table.table(matrix, [f"class {k}" for k in range(120)])
    assert text.count("<tr>") == 1 + confusion_table.MOST_CLASSES + 1
    assert confusion_table.note(120) == "The 100 most confused of 120 classes are shown."
    assert (
        f'--share:{3 / 8:.3f}" title="38% of the row"><button type="button" data-show="cell" data-key="7,7">3<' in text
    )
    axes = plots.confusion(matrix, [f"class {k}" for k in range(120)]).axes[0]
    row = [label.get_text() for label in axes.get_yticklabels()].index("class 7")
    assert "25 most confused of 120 classes" in axes.get_title()
    assert axes.images[0].get_array()[row].max() == pytest.approx(4 / 8)


PROBE = """<script>
addEventListener("load", () => {
  const column = (table, i) => [...table.tBodies[0].rows].map(row => row.cells[i].dataset.value);
  const table = document.querySelectorAll("table.sortable")[1];
  const click = i => { table.tHead.rows[0].cells[i].querySelector("button").click(); return column(table, i); };
  const shown = () => [...document.querySelectorAll("figure rect")].filter(r => r.style.display !== "none").length;
  const slider = document.querySelector("#score"), counts = [];
  for (const value of [0, 0.5, 1]) {
    slider.value = value; slider.dispatchEvent(new Event("input")); counts.push(shown());
  }
  document.querySelectorAll("input[data-kind]").forEach(box => box.checked && box.click());
  counts.push(shown());
  const figures = [...document.querySelectorAll("figure")], list = document.querySelector("#filter");
  const visible = () => figures.filter(f => f.getClientRects().length).map(f => Number(f.dataset.image));
  const first = visible(), listed = {};
  for (const button of document.querySelectorAll("[data-show]")) {
    button.click();
    listed[`${button.dataset.show} ${button.dataset.key}`] = [visible(), list.textContent];
  }
  list.querySelector("button").click();
  document.querySelector("figure .frame").click();
  const dialog = document.querySelector("dialog"), large = dialog.open && dialog.querySelectorAll("rect").length > 0;
  dialog.click();
  const probed = [...document.querySelectorAll("figure rect.object")].filter(r => r.dataset.found);
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  const before = probed.map(r => r.dataset.kind);
  slider.value = 1; slider.dispatchEvent(new Event("input"));
  const after = probed.map(r => r.dataset.kind);
  slider.value = 0.3;
  const answer = {
    first, listed, large, again: visible(), closed: !dialog.open,
    kinds: [new Set(before), new Set(after)].map(s => [...s]),
    broken: [...document.images].filter(image => !(image.complete && image.naturalWidth)).length,
    images: document.images.length,
    wide: document.documentElement.scrollWidth - innerWidth,
    bold: document.querySelectorAll("td b").length,
    falling: click(3), rising: click(3), names: click(0), counts,
  };
  document.body.innerHTML = "<pre>" + JSON.stringify(answer) + "</pre>";
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(evaluation, tmp_path, width):
    page = tmp_path / "probe.html"
    page.write_text((evaluation[0] / "report.html").read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    run = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    answer = json.loads(run.stdout.split("<pre>")[1].split("</pre>")[0])
    assert answer["broken"] == 0
    assert 4 + 12 <= answer["images"] <= 4 + 20
    assert answer["wide"] <= 0
    assert answer["bold"] == 0
    falling = [float(value) for value in answer["falling"] if value]
    assert len(falling) == 3
    assert falling == sorted(falling, reverse=True)
    assert answer["falling"][-1] == ""
    assert [float(value) for value in answer["rising"] if value] == falling[::-1]
    assert answer["names"] == ["_$bird$", "<b>dog</b>", "absent", "cat"]
    assert answer["counts"][0] > answer["counts"][1] and answer["counts"][3] == 0
    # Objects that a detection finds at 0 are not found at 1, and so shown as such
    assert answer["kinds"] == [["found object"], ["object not found"]]
    assert len(answer["first"]) == 12 and answer["again"] == answer["first"] and answer["large"] and answer["closed"]
    judged = analyse(evaluation[1].results, 5)
    cells = confusions(judged)
    for key, (images, text) in answer["listed"].items():
        kind, _, key = key.partition(" ")
        if kind == "cell":
            true, detected = map(int, key.split(","))
            expected = set(cells.image[(cells.true == true) & (cells.detected == detected)].tolist())
        else:
            expected = set(judged.gt.image[judged.gt.label == int(key)].tolist())
            expected |= set(judged.dt.image[(judged.dt.label == int(key)) & (judged.dt.scores >= 0.5)].tolist())
        assert images and set(images) <= expected and f"{len(expected)} images" in text
