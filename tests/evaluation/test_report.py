"""The report as files, as HTML, and in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from detection.batch import Target
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
    names = ("confusion", "mistakes", "precision_recall", "scores", "sizes")
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
    assert "never seen" not in words
    assert page.tags.count("figure") == 12
    assert page.tags.count("table") == 2


def test_a_report_of_nothing_and_without_pictures(tmp_path):
    metric = MeanAP(["a"])
    metric.update([], [])
    figures = write_evaluation(tmp_path, metric, [1])
    assert figures["map"] == -1.0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<figure" not in text
    assert "nan" not in " ".join(Page(text).words).lower()


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
  const answer = {
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
def test_in_a_browser(evaluation, tmp_path):
    page = tmp_path / "probe.html"
    page.write_text((evaluation[0] / "report.html").read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900"]
    run = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    answer = json.loads(run.stdout.split("<pre>")[1].split("</pre>")[0])
    assert answer["broken"] == 0
    assert answer["images"] == 5 + 12
    assert answer["wide"] <= 0
    assert answer["bold"] == 0
    falling = [float(value) for value in answer["falling"] if value]
    assert len(falling) == 3
    assert falling == sorted(falling, reverse=True)
    assert answer["falling"][-1] == ""
    assert [float(value) for value in answer["rising"] if value] == falling[::-1]
    assert answer["names"] == ["_$bird$", "<b>dog</b>", "absent", "cat"]
    assert answer["counts"][0] > answer["counts"][1] > answer["counts"][2] > answer["counts"][3] == 0
