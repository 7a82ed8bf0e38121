"""`make gpu` loses nothing to a section that hangs or dies, and is rehearsed from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path
from typing import Literal

import pytest
import torch
from packaging.requirements import Requirement

from detection.benchmarks import gpu
from detection.benchmarks.gpu import Row, Setting, failures, measure
from detection.benchmarks.gpu_page import NOTHING, page
from detection.benchmarks.gpu_pairs import Recorder
from detection.benchmarks.gpu_sections import parity, places_of_waiting
from detection.benchmarks.gpu_sizes import REHEARSAL
from detection.boxes import BoxCoder
from detection.errors import RunError
from tests.benchmarks.fake_sections import FAKES

ROOT = Path(__file__).resolve().parents[2]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.slow
def test_a_section_that_hangs_dies_or_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    began = time.monotonic()
    found = measure(FAKES, Setting("cpu"), 0.5, tmp_path / "gpu.json")
    assert time.monotonic() - began < 60
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    sections = found["sections"]
    states = {name: section["state"] for name, section in sections.items()}
    assert states == {"good": "done", "hangs": "ended", "dies": "ended", "fails": "failed", "last": "done"}
    assert failures(found) == ["hangs", "dies", "fails"]
    assert all(len(section["rows"]) == 1 for section in sections.values())  # what came before the end is kept
    assert "did not end within" in sections["hangs"]["why"] and "code 3" in sections["dies"]["why"]
    assert sections["fails"]["why"] == "ValueError: a bug"
    pids = [section["rows"][0]["pid"] for section in sections.values()]
    assert pids[0] == pids[1] and len(set(pids)) == 4  # a new process after each trouble, and only then
    assert not any(map(is_alive, [*pids, sections["hangs"]["rows"][0]["child"]]))
    text = (tmp_path / "gpu.md").read_text()
    assert "**Ended**: its process died with code 3." in text and text == page(found)


def test_what_has_no_time_left_is_left_out(tmp_path: Path) -> None:
    found = measure(FAKES, Setting("cpu"), 0.0, tmp_path / "gpu.json")
    assert {section["state"] for section in found["sections"].values()} == {"left out"}
    assert failures(found) == []


def test_the_page_of_the_docs_is_made_from_the_file_beside_it() -> None:
    path = ROOT / "docs" / "gpu.json"
    content = json.loads(path.read_text()) if path.is_file() else None
    assert (ROOT / "docs" / "gpu.md").read_text() == page(content)
    assert content is None or not content["rehearsal"]
    assert "Nothing has been measured" in NOTHING


def test_the_page_shows_every_row() -> None:
    rows = [{"batch": 8, "asked": 16, "ours_ms": 1.23456, "holds": True}, {"batch": 1, "asked": 1, "note": "a|b"}]
    sections = {"training": {"state": "done", "why": "", "seconds": 1.0, "rows": rows}}
    text = page({"rehearsal": False, "minutes": 8, "sections": sections})
    assert "| batch | asked | ours_ms | holds | note |\n|---|---|---|---|---|\n| 8 | 16 | 1.235 | yes |  |\n" in text
    assert "a\\|b" in text and "did not fit into memory" in text and "rehearsal" not in text


def test_waits_are_found_where_they_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    from detection import boxes

    def waiting(*_: object, **__: object) -> torch.Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return torch.zeros(1, 2)

    monkeypatch.setattr(torch, "minimum", waiting)

    def step() -> None:
        warnings.warn("something else", stacklevel=1)
        boxes.clip_boxes(torch.rand(1, 4), torch.ones(2))

    assert places_of_waiting(step, "cpu") == {"boxes.py:clip_boxes": 1}


def test_out_of_memory_halves_the_batch() -> None:
    from detection.benchmarks.gpu_pairs import halving

    tried: list[int] = []

    def fits_two(count: int) -> dict[str, int]:
        tried.append(count)
        if count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ms": 1}

    assert halving(16, fits_two) == {"batch": 2, "asked": 16, "ms": 1} and tried == [16, 8, 4, 2]


def test_the_limit_repeats_the_same_arithmetic() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    with Recorder() as recorder:
        net(torch.rand(2, 3, 4, 4)).sum().backward()
    # Forward: a convolution and a product. Backward: of the convolution, and two products of the linear layer.
    names = [str(func.overloadpacket.__name__) for func, *_ in recorder.calls]
    assert sorted(names) == ["addmm", "convolution", "convolution_backward", "mm", "mm"]
    again = Recorder()
    run = recorder.replay()
    with again:
        run()
    assert [call[1:] for call in again.calls] == [call[1:] for call in recorder.calls]


@pytest.mark.rehearsal  # where a processor emulates bfloat16
@pytest.mark.parametrize("kind", ["mask", "v2"])
def test_each_loss_in_half_precision_is_torchvisions(kind: Literal["mask", "v2"]) -> None:
    rows = list(parity(Setting("cpu", REHEARSAL), (kind,)))  # raises where one does not hold
    losses = {row["what"] for row in rows if row["precision"] == "bfloat16"}
    assert losses >= {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert ("loss_mask" in losses) == (kind == "mask")


def test_a_box_branch_that_is_off_in_half_precision_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BoxCoder.encode

    def off(self: BoxCoder, gt_boxes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return plain(self, gt_boxes, boxes) * (1.05 if torch.is_autocast_enabled("cpu") else 1.0)

    monkeypatch.setattr(BoxCoder, "encode", off)
    rows: list[Row] = []
    with pytest.raises(RunError, match="2 of 7 figures differ from torchvision's"):
        rows.extend(parity(Setting("cpu", REHEARSAL), ("r50",)))
    wrong = {(row["precision"], row["what"]) for row in rows if not row["holds"]}
    assert wrong == {("bfloat16", "loss_box_reg"), ("bfloat16", "loss_rpn_box_reg")}


@pytest.mark.rehearsal
def test_the_rehearsal_runs_to_its_end(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/benchmark.py", "gpu", "--minutes", "8", "--rehearse", "true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rehearsal"] and {section["state"] for section in found["sections"].values()} == {"done"}
    assert all(section["rows"] for section in found["sections"].values())
    assert scripts_of("gpu") == "scripts/benchmark.py gpu --minutes 8"


def scripts_of(target: str) -> str:
    plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return " ".join(plan.split("/python ")[-1].split()[:4])


def test_make_oldest_takes_the_lower_bounds() -> None:
    plan = subprocess.run(["make", "-n", "oldest"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--resolution lowest-direct -e '.[dev]'" in plan and "-m 'not slow'" in plan
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    free = {r.name for r in map(Requirement, sum(extras, project["dependencies"])) if ">=" not in str(r.specifier)}
    assert free == {"detection", "types-defusedxml", "types-PyYAML"}  # of these the lowest are as old as can be
