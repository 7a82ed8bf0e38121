"""The report as files, as HTML, and in a real browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from detection.batch import Target
from detection.evaluation import confusion_table, plots
from detection.evaluation.analysis import analyse, confusion_matrix
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.report import write_evaluation
from tests.evaluation.conftest import NAMES


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
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert "url(" not in text
    assert "@import" not in text
    words = " ".join(page.words)
    for expected in ("Test <report>", "a&b.ckpt", NAMES[1], f"{figures['map']:.3f}"):
        assert expected in words
    assert ">never seen</a>" not in text  # no row of the classes, which says nothing; but one of the matrix
    assert page.tags.count("b") == 4 + 7 + 1 and page.tags.count("script") == 3  # none of a name
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


def test_confusion_table_has_the_matrix_and_links_to_its_cells(evaluation):
    matrix = confusion_matrix(analyse(evaluation[1].results, 5))
    text = unquote(confusion_table.table(matrix, NAMES))
    found = re.findall(r'href="#cell=(\d+),(\d+)&amp;score=0.5">(\d+)<', text)
    assert {(int(i), int(j)): int(n) for i, j, n in found} == {(i, j): matrix[i, j] for i, j in np.argwhere(matrix)}


def test_a_large_confusion_table_says_how_many_it_shows_and_keeps_shares_of_all():
    matrix = np.zeros((121, 121), np.int64)
    matrix[np.arange(120), np.arange(120)] = 3
    matrix[7, 110], matrix[7, 120] = 1, 4
    text = confusion_table.table(matrix, [f"class {k}" for k in range(120)])
    assert text.count("<tr>") == 1 + confusion_table.MOST_CLASSES + 1
    assert confusion_table.note(120) == "The 100 most confused of 120 classes are shown."
    assert f'--share:{3 / 8:.3f}" title="38% of the row"><a href="#cell=7%2C7&amp;score=0.5">3<' in text
    axes = plots.confusion(matrix, [f"class {k}" for k in range(120)]).axes[0]
    row = [label.get_text() for label in axes.get_yticklabels()].index("class 7")
    assert "25 most confused of 120 classes" in axes.get_title()
    assert axes.images[0].get_array()[row].max() == pytest.approx(4 / 8)
