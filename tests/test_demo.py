"""The demo page: one run of the network for an image, every stage of every kind of detector, and a visit by browser."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from defusedxml.ElementTree import fromstring
from PIL import Image

from detection import (
    Detector,
    cascadercnn_efficientnet_lite0_fpn,
    fasterrcnn_efficientnet_lite0_fpn,
    fastrcnn_efficientnet_lite0_fpn,
    maskrcnn_efficientnet_lite0_fpn,
    save_detector,
)
from detection.data import scenes
from detection.data.images import read_image
from detection.data.spectral import RGB, PixelFormat
from detection.errors import RunError
from detection.models.two_stage import FasterRCNN

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "demo.py"
NAMES = ("ball", "ring", "star")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


def tiny(builder: Any = maskrcnn_efficientnet_lite0_fpn, **arguments: Any) -> FasterRCNN:
    """A detector of random heads whose best scores lie around one half."""
    torch.manual_seed(8)
    options = {"min_size": 96, "max_size": 160, "box_score_thresh": 0.1, "box_detections_per_img": 150} | arguments
    model = builder(num_classes=len(NAMES) + 1, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("cls_score.weight"):
                parameter.mul_(0.5)
    return model


def noise(seed: int = 0) -> np.ndarray[Any, Any]:
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC))


@pytest.fixture
def demo() -> Any:
    pytest.importorskip("nicegui", reason='needs pip install "detection[demo]"')
    return importlib.import_module("detection.demo.demo_page")


@pytest.mark.slow
def test_choosing_does_not_run_the_network_again(demo: Any) -> None:
    detector = Detector(tiny(), NAMES, device="cpu")
    model, runs = demo.model_of(detector), []
    for backbone in (detector.model.backbone, model.backbone):
        backbone.register_forward_hook(lambda *_: runs.append(1))
    study = demo.Study(detector, model, noise())
    pictures = {study.picture(study.choose(thresh, [])) for thresh in (0.0, 0.5, 0.6, 1.0)}
    pictures |= {study.picture(study.choose(0.5, [name])) for name in ("ring", "star")}
    assert len(runs) == 1 and len(pictures) == 6
    stages = [study.stage(stage) for stage in demo.STAGES]
    drawn = len(runs)
    assert stages == [study.stage(stage) for stage in demo.STAGES] and len(runs) == drawn


def test_what_is_chosen_is_what_the_detector_gives(demo: Any) -> None:
    detector = Detector(tiny(), NAMES, device="cpu")
    study, found = demo.Study(detector, demo.model_of(detector), noise()), detector(noise())
    assert 0 < len(found.above(0.6)) < len(found.above(0.5)) < len(found)
    chosen = study.choose(0.5, ["ring", "ball"])
    names = zip(found.scores, found.names, strict=True)
    expected = [(i, f"{s:.2f}", n) for i, (s, n) in enumerate(names) if s >= 0.5 and n != "star"]
    rows = study.rows(study.where(0.5, ["ring", "ball"]), "7-")
    assert expected and [(row["key"], row["score"], row["name"]) for row in rows] == [
        (f"7-{i}", score, name) for i, score, name in expected
    ]
    assert chosen.masks and study.picture(chosen) != study.picture(replace(chosen, masks=None))
    assert len(study.choose(0.5, ["a class of another detector"])) == 0


def test_boxes_and_files_are_those_that_are_chosen(demo: Any) -> None:
    detector = Detector(tiny(), ("ball", "<ring>", "star"), category_ids=(5, 7, 9), device="cpu")
    study = demo.Study(detector, demo.model_of(detector), noise(), "a photo.png")
    where = study.where(0.5, [])
    chosen = study.choose(0.5, [])
    drawn = fromstring(study.boxes(where, "1-0-"))
    assert drawn.attrib["viewBox"] == "0 0 160 120"
    boxes = {rect.attrib["data-box"]: [float(rect.attrib[k]) for k in ("x", "y", "width", "height")] for rect in drawn}
    assert list(boxes) != sorted(boxes) and {*boxes} == {row["key"] for row in study.rows(where, "1-0-")}
    areas = [box[2] * box[3] for box in boxes.values()]
    assert np.all(np.diff(areas) < 0.2 * np.array(areas[1:]))  # rounded; the small lie above the large
    document = json.loads(study.json(chosen))
    assert document["images"] == [{"id": 1, "file_name": "a photo.png", "width": 160, "height": 120}]
    assert {entry["id"]: entry["name"] for entry in document["categories"]} == {5: "ball", 7: "<ring>", 9: "star"}
    assert [entry["score"] for entry in document["annotations"]] == chosen.scores.tolist()
    for i, entry in zip(where, document["annotations"], strict=True):
        assert entry["bbox"] == pytest.approx(boxes[f"1-0-{i}"], abs=0.06)
    file = Image.open(io.BytesIO(study.jpeg(chosen)))
    assert file.format == "JPEG" and file.width >= 160 and file.width / file.height == pytest.approx(4 / 3)


def test_examples_are_validation_pictures_or_drawn_scenes(demo: Any, tmp_path: Path) -> None:
    study = importlib.import_module("detection.demo.study")
    save_detector(tmp_path / "tiny.safetensors", tiny(), NAMES)
    drawn, said = study.examples(tmp_path / "tiny.safetensors", RGB, tmp_path)
    assert said == "Drawn scenes" and len(drawn) == study.EXAMPLES
    assert np.array_equal(read_image(drawn[0].path), scenes.draw_scene(np.random.default_rng(0))[0])
    assert study.examples(tmp_path / "tiny.safetensors", PixelFormat(5, 16), tmp_path) == ([], "")
    data = scenes.draw(tmp_path / "scenes", train=2, val=9)
    settings = {"root": str(data), "format": "coco"}
    for split, (file, images) in scenes.SPLITS.items():
        settings |= {f"{split}_split": file, f"{split}_images": images}
    kept = {"datamodule_hyper_parameters": settings, "pytorch-lightning_version": "2.6.6"}
    torch.save(kept, tmp_path / "run.ckpt")
    chosen, said = study.examples(tmp_path / "run.ckpt", RGB, tmp_path)
    paths = sorted((data / scenes.SPLITS["val"][1]).iterdir())
    assert "validated" in said and [example.path for example in chosen] == [paths[i] for i in (0, 1, 3, 4, 6, 8)]
    assert all(example.small.startswith("data:image/jpeg;base64,") for example in chosen)


def test_what_a_detector_knows(demo: Any) -> None:
    study = importlib.import_module("detection.demo.study")
    assert "trained on: cat, dog. All else" in study.knows(["cat", "dog"])
    assert "k11 and 68 more." in study.knows([f"k{i}" for i in range(80)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("builder", "missing"),
    [
        (fasterrcnn_efficientnet_lite0_fpn, ()),
        (maskrcnn_efficientnet_lite0_fpn, ()),
        (cascadercnn_efficientnet_lite0_fpn, ()),
        (fastrcnn_efficientnet_lite0_fpn, ("Anchors", "Matching")),
    ],
)
def test_every_kind_of_detector_has_its_stages(demo: Any, builder: Any, missing: tuple[str, ...]) -> None:
    detector = Detector(tiny(builder), NAMES, device="cpu")
    study = demo.Study(detector, demo.model_of(detector), noise())
    for stage in demo.STAGES:
        if stage.title in missing:
            with pytest.raises(ValueError, match="no anchors"):
                study.stage(stage)
        else:
            assert study.stage(stage).startswith("data:image/jpeg;base64,")


def test_stages_are_drawn_at_the_size_that_was_detected_at(demo: Any) -> None:
    detector = Detector(tiny(), NAMES, min_size=64, max_size=100, device="cpu")
    model = demo.model_of(detector)
    seen = model.transform([torch.from_numpy(noise()).permute(2, 0, 1)], None, len(NAMES) + 1)
    assert seen.image_sizes.tolist() == detector.batch([noise()]).image_sizes.tolist()
    assert detector.model.transform.min_size == (96,)


def test_without_nicegui_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "detection.demo.demo_page", raising=False)
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(RunError, match=r'pip install "detection\[demo\]"'):
        importlib.import_module("detection.demo.demo_page")


def test_a_port_that_is_taken(demo: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"127.0.0.1:{port} .*--port"):
            demo.serve([tmp_path / "none.ckpt"], "127.0.0.1", port)


def test_a_missing_checkpoint(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--ckpt", str(tmp_path / "none.ckpt"), "--port", str(free_port())])
    with pytest.raises(SystemExit, match=r"^error: [^\n]*none\.ckpt[^\n]*$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """The page of a checkpoint, served by the script, and what the script has printed."""

    def __init__(self, ckpt: Path, log: Path, *flags: str) -> None:
        self.url, self._log = f"http://127.0.0.1:{free_port()}", log
        command = [sys.executable, str(SCRIPT), "--ckpt", str(ckpt), "--device", "cpu"]
        command += ["--port", self.url.rpartition(":")[2], *flags]
        # NiceGUI would take the process for a test of its own.
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, cwd=log.parent, env=environment)
        deadline = time.monotonic() + 120
        while self.url not in self.text:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.1)

    @property
    def text(self) -> str:
        return self._log.read_text()


@pytest.fixture
def served(demo: Any, tmp_path: Path) -> Iterator[Served]:
    save_detector(tmp_path / "tiny.safetensors", tiny(), NAMES)
    served = Served(tmp_path / "tiny.safetensors", tmp_path / "log.txt")
    yield served
    served.process.kill()
    served.process.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A context of a headless chromium with a profile of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason='needs pip install "detection[dev]"')
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed")
    flags = [*FLAGS.split(), "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=chromium, headless=True, args=flags
        )
        context.set_default_timeout(20_000)
        playwright.expect.set_options(timeout=30_000)  # machines are busy
        yield context
        context.close()


@pytest.mark.slow
def test_a_visit(browser: Any, served: Served, tmp_path: Path) -> None:
    expect = importlib.import_module("playwright.sync_api").expect
    found = Detector.from_checkpoint(tmp_path / "tiny.safetensors", "cpu")(noise())
    Image.fromarray(noise()).save(tmp_path / "scene.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "notes.txt").write_text("no image either")
    page, requests = browser.new_page(), []
    browser.on("request", lambda request: requests.append(request.url))
    page.on("websocket", lambda socket: requests.append(socket.url))
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(served.url)
    count, rows, picture = (
        page.locator(".list .count"),
        page.locator(".list tbody tr"),
        page.locator("img.picture:visible"),
    )

    # No image, then something else than one.
    expect(count).to_have_text("No image yet")
    page.set_input_files("input[type=file]", tmp_path / "broken.jpg")
    expect(page.locator(".error")).to_have_text(re.compile(r"^broken\.jpg: not a readable image .* file$"))
    page.set_input_files("input[type=file]", tmp_path / "notes.txt")
    expect(page.locator(".error")).to_have_text(re.compile(r"^Not an image .*\.png"))
    expect(picture).to_have_count(0)

    # An image: what the detector finds, from a score of 0.5 on.
    page.set_input_files("input[type=file]", tmp_path / "scene.png")
    sure = len(found.above(0.5))
    expect(count).to_have_text(re.compile(f"^{sure} of {len(found)} detections"))
    expect(page.locator(".error")).to_be_hidden()
    expect(rows).to_have_count(sure)
    expect(picture).to_have_count(1)
    pictures = [picture.get_attribute("src")]

    # A higher threshold, then one class of it.
    page.locator(".q-slider__track-container").press("PageUp")
    expect(page.locator(".controls .count")).to_have_text("0.60")
    chosen = found.above(0.6)
    assert 0 < len(chosen) < sure
    expect(count).to_have_text(re.compile(f"^{len(chosen)} of {len(found)} "))
    expect(picture).not_to_have_attribute("src", pictures[-1])
    pictures.append(picture.get_attribute("src"))
    name = min(chosen.names, key=chosen.names.count)
    page.locator(".classes").click()
    page.get_by_role("option", name=name).click()
    page.keyboard.press("Escape")
    only = chosen.of([name])
    assert 0 < len(only) < len(chosen)
    expect(count).to_have_text(re.compile(f"^{len(only)} of {len(found)} "))
    expect(rows).to_have_text([re.compile(f"{name}.*{score:.2f}") for score in only.scores])
    expect(picture).not_to_have_attribute("src", pictures[-1])
    pictures.append(picture.get_attribute("src"))

    # Back through the stages, each with its picture.
    for title in ("Regions", "Proposals", "Matching", "Anchors", "Features"):
        page.get_by_role("button", name="Back").click()
        drawn = page.locator(f"img[alt={title}]")
        expect(drawn).to_be_visible()
        assert drawn.evaluate("image => image.decode().then(() => image.naturalWidth)") > 800
        pictures.append(picture.get_attribute("src"))
    expect(page.get_by_role("button", name="Back")).to_be_disabled()
    page.locator(".q-stepper__tab", has_text="Detections").click()
    expect(page.locator("img[alt=Detections]")).to_have_attribute("src", pictures[2])

    # All that with one run of the network; nothing from another host, and no error.
    assert len(set(pictures)) == len(pictures) == 8
    assert served.text.count(" detections in ") == 1
    assert "Traceback" not in served.text and not problems
    loaded = [url for url in requests if not url.startswith(("data:", "blob:"))]  # which are in the browser already
    assert len(loaded) > 5 and {re.sub(r"^ws", "http", url)[: len(served.url)] for url in loaded} == {served.url}
    served.process.terminate()
    served.process.wait(20)
    assert "Traceback" not in served.text


@pytest.mark.slow
def test_rows_and_boxes_point_at_each_other_and_files_are_given(browser: Any, demo: Any, tmp_path: Path) -> None:
    """Side by side: what one detector has points at nothing of the other, whose classes are others."""
    expect = importlib.import_module("playwright.sync_api").expect
    save_detector(tmp_path / "tiny.safetensors", tiny(), NAMES)
    save_detector(tmp_path / "other.safetensors", tiny(), ("ball", "hat", "shoe"))
    flags = ("--beside", str(tmp_path / "other.safetensors"))
    served = Served(tmp_path / "tiny.safetensors", tmp_path / "log.txt", *flags)
    try:
        page = browser.new_page()
        page.goto(served.url)
        sentences = page.locator(".knows")
        expect(sentences).to_have_text([re.compile("ball, ring, star"), re.compile("ball, hat, shoe")])
        expect(page.locator(".example")).to_have_count(6)
        page.locator(".example").nth(1).click()
        expect(page.locator("img.picture:visible")).to_have_count(2)
        rows, boxes = page.locator("tr[data-box]"), page.locator("rect[data-box]")
        expect(rows.first).to_be_visible()
        keys = rows.evaluate_all("rows => rows.map(row => row.dataset.box)")
        assert len(set(keys)) == len(keys) == boxes.count() > 2
        assert {key.split("-")[1] for key in keys} == {"0", "1"}

        marked = """() => [...document.querySelectorAll("[data-box]")].filter(e => e.tagName === "TR"
          ? getComputedStyle(e).backgroundColor !== "rgba(0, 0, 0, 0)" : getComputedStyle(e).stroke !== "none")
          .map(e => [e.tagName.toUpperCase(), e.dataset.box])"""
        assert page.evaluate(marked) == []
        last = keys[-1]
        page.locator(f'tr[data-box="{last}"]').hover()
        both = sorted([["TR", last], ["RECT", last]])
        assert sorted(page.evaluate(marked)) == both
        page.locator(".title").hover()
        assert page.evaluate(marked) == []
        page.locator(f'rect[data-box="{last}"]').dispatch_event("click")  # another may lie above its middle
        page.locator(".title").hover()
        assert sorted(page.evaluate(marked)) == both  # kept
        page.keyboard.press("Escape")
        assert page.evaluate(marked) == []

        for number in range(2):
            lists = page.locator(".list .q-table__container").nth(number).locator("tr[data-box]")
            with page.expect_download() as given:
                page.get_by_role("button", name="JSON").nth(number).click()
            assert given.value.suggested_filename == "scene_2_detections.json"
            document = json.loads(Path(given.value.path()).read_text())
            names = {entry["id"]: entry["name"] for entry in document["categories"]}
            found = [f"{names[e['category_id']]} {e['score']:.2f}" for e in document["annotations"]]
            assert found == [" ".join(text.split()[:2]) for text in lists.all_inner_texts()]
            with page.expect_download() as given:
                page.get_by_role("button", name="Picture").nth(number).click()
            size = document["images"][0]["width"], document["images"][0]["height"]
            drawn = Image.open(given.value.path())
            assert drawn.format == "JPEG" and drawn.width / drawn.height == pytest.approx(size[0] / size[1], rel=0.01)
        assert "Traceback" not in served.text
    finally:
        served.process.kill()
        served.process.wait()
