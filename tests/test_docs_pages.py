"""The pages that quote errors, and those that come from other libraries: sentences are said, snippets run."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from detection import fasterrcnn_resnet50_fpn, save_detector
from detection.data import scenes
from tests.test_docs import DOCS, ROOT, Block, blocks

TROUBLE = (DOCS / "troubleshooting.md").read_text()
SENTENCES = [
    sentence
    for line in re.findall(r"^(`.+)\n:   ", TROUBLE, re.M) + re.findall(r"^\| (`.+?) \| `pip install", TROUBLE, re.M)
    for sentence in re.findall(r"`([^`]+)`", line)
]


@pytest.fixture(scope="module")
def spoken() -> list[str]:
    """Every string in the source of the package, with NUL in the place of what an f-string fills in."""
    found = []
    for path in (ROOT / "detection").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_sentences_are_found() -> None:
    assert len(SENTENCES) > 50 and "the data root is not a folder" in SENTENCES


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentence_of_troubleshooting_is_said(sentence: str, spoken: list[str]) -> None:
    """Its fixed parts stand in one string of the source, in order, with something filled in where the page says so."""
    fixed = re.split(r"<[^<>]+>", sentence)
    assert sum(map(len, fixed)) >= 12, "too short to tell one sentence from another"
    pattern = re.compile("\0+".join(map(re.escape, fixed)))
    assert any(pattern.search(text) for text in spoken), f"no error says: {sentence}"


FROM = [block for block in blocks("python") if block.page.parent.name == "from"]
RUN = {
    "here": 13,
    "in torchvision": 5,
}  # how many blocks there are; those of libraries that are not installed don't run
SMALL = "num_classes=3, min_size=64, max_size=96"  # in the place of 800 pixels, which take seconds an image


def runs(block: Block) -> bool:
    return block.title.partition(",")[0] in RUN


def collate(samples: Any) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: data, a photograph, and a converted detector."""
    folder = tmp_path_factory.mktemp("from")
    drawn = scenes.draw(folder, train=4, val=2)
    drawn.rename(folder / "my_data")
    Image.new("RGB", (60, 40), "gray").save(folder / "photo.jpg")
    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(num_classes=3, min_size=64, max_size=96)
    save_detector(folder / "d2.safetensors", model, ["car", "tractor"])
    os.link(folder / "d2.safetensors", folder / "mmdet.safetensors")
    return folder


@pytest.fixture
def inside(things: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(things)
    return things


def test_snippets_that_run_are_found() -> None:
    for title, count in RUN.items():
        assert sum(block.title.partition(",")[0] == title for block in FROM) == count, title
    assert {block.page.stem for block in FROM} == {"torchvision", "detectron2", "mmdetection"}


@pytest.mark.parametrize("page", ["torchvision", "detectron2", "mmdetection"])
def test_snippets_of_a_page_run(page: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order, in one namespace, which begins with loaders of two small images."""
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 30.0]]), "labels": torch.tensor([1])}
    samples = [(torch.rand(3, 48, 64), target), (torch.rand(3, 40, 50), target)]
    loader = DataLoader(samples, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    space: dict[str, Any] = {"loader": loader, "val_loader": loader, "torch": torch}
    ran = 0
    for block in FROM:
        if block.page.stem == page and runs(block):
            where = f"{block.page.name}, {block.title}"
            exec(compile(block.text.replace("num_classes=3", SMALL), where, "exec"), space)
            ran += 1
    assert ran >= 3 and capsys.readouterr().out


def test_both_sides_of_torchvision_agree(inside: Path) -> None:
    """With the weights that the page hands over: losses of the same names, the same detections."""
    torch.manual_seed(0)  # among random scores some images have ties that rounding decides
    space: dict[str, Any] = {}
    (block,) = [block for block in FROM if block.title == "here, weights"]
    exec(block.text.replace("num_classes=3", SMALL), space)
    images = [torch.rand(3, 48, 64)]
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 30.0]]), "labels": torch.tensor([1])}
    losses = [space[side].train()(images, [target]) for side in ("theirs", "ours")]
    assert losses[0].keys() == losses[1].keys()
    with torch.no_grad():
        found = [space[side].eval()(images)[0] for side in ("theirs", "ours")]
    torch.testing.assert_close(found[0]["boxes"], found[1]["boxes"], atol=1e-3, rtol=0)
    assert found[0]["labels"].tolist() == found[1]["labels"].tolist()
