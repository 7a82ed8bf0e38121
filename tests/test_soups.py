"""Model soups: the mean of weights, the greedy choice, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from detection.__main__ import main
from detection.interop.files import load_detector
from detection.models import zoo
from detection.training.module import DetectionModule
from detection.training.soups import Ingredient, greedy, mean
from detection.weights import read_torch

CLASSES = ["cat", "dog"]


def save(path: Path, seed: int, class_names: list[str] = CLASSES, **options: Any) -> Path:
    """The checkpoint of a module that was never trained, with live statistics of its own."""
    torch.manual_seed(seed)
    options = {"weights_backbone": None, "fpn_channels": 16, "min_size": 64, "max_size": 96} | options
    detector = zoo.fasterrcnn_efficientnet_lite0_fpn(num_classes=len(class_names) + 1, **options)
    for name, buffer in detector.named_buffers():
        if "fpn" in name and name.endswith("running_mean"):
            buffer += torch.rand_like(buffer)
        elif "fpn" in name and name.endswith("num_batches_tracked"):
            buffer += 5 + seed
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(DetectionModule(detector, class_names))
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [save(folder / f"{seed}.ckpt", seed) for seed in range(3)]


def test_the_mean_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 3, 4)).astype(np.float32)
    states = [
        {"w": torch.from_numpy(v), "n": torch.tensor(i), "h": torch.tensor([i]).half()} for i, v in enumerate(values)
    ]
    mixed = mean(states)
    np.testing.assert_array_equal(mixed["w"].numpy(), values.astype(np.float64).mean(0).astype(np.float32))
    assert mixed["n"] == 0 and mixed["h"].dtype == torch.float16 and mixed["h"] == 2.0


def test_a_soup_is_a_checkpoint_of_the_mean(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "soups" / "soup.ckpt"
    assert main(["soup", *map(str, runs), "--output", str(output)]) is None
    assert "uniform soup of 3 of 3 checkpoints" in capsys.readouterr().out
    states, content = [read_torch(path)["state_dict"] for path in runs], read_torch(output)
    for name, value in content["state_dict"].items():
        own = np.stack([state[name].double().numpy() for state in states])
        wanted = own.mean(0) if value.is_floating_point() else own[0]
        np.testing.assert_allclose(value.double().numpy(), wanted, rtol=1e-6, atol=1e-7)
    name = next(name for name in states[0] if "fpn" in name and name.endswith("running_mean"))
    assert not torch.equal(states[0][name], states[1][name])  # or nothing was averaged above
    assert [i["path"] for i in content["soup"]["ingredients"]] == [str(path) for path in runs]
    assert content["soup"]["kind"] == "uniform" and content["soup"]["batch_norm"] == "statistics averaged"
    assert content["hyper_parameters"] == read_torch(runs[0])["hyper_parameters"] and "optimizer_states" not in content
    module, detector = DetectionModule.load_from_checkpoint(output), load_detector(output)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, module.detector.state_dict()[name]) and torch.equal(
            value, content["state_dict"][f"detector.{name}"]
        )


def test_the_greedy_soup_leaves_out_what_lowers_the_score() -> None:
    """Weights are numbers whose best is 1: 0.9 is first, 0.5 lowers, 1.2 brings the mean to 1.05 and goes in."""
    states = [{"w": torch.tensor(value)} for value in (0.5, 1.2, 0.9)]
    kitchen = [Ingredient(Path(f"{i}.ckpt"), {"state_dict": state}) for i, state in enumerate(states)]

    def score(state: dict[str, Tensor]) -> float:
        return -abs(float(state["w"]) - 1)

    said = list[str]()
    chosen, reached = greedy(kitchen, [score(state) for state in states], score, said.append)
    assert [ingredient.path.name for ingredient in chosen] == ["2.ckpt", "1.ckpt"]
    assert reached == pytest.approx(-0.05, abs=1e-6)
    assert "with 1.ckpt: AP -0.0500 after -0.1000, goes in" in said[0] and "left out" in said[1]


def test_what_makes_no_soup_is_said(runs: list[Path], tmp_path: Path) -> None:
    def said(*paths: Path, output: str = "soup.ckpt") -> str:
        return str(main(["soup", *map(str, paths), "--output", str(tmp_path / output)]))

    other = save(tmp_path / "birds.ckpt", 0, ["cat", "bird"])
    assert "class_names is ['cat', 'dog'] here and ['cat', 'bird'] there" in said(runs[0], other)
    wide = save(tmp_path / "wide.ckpt", 0, fpn_channels=32)
    assert "detector.init_args.fpn_channels is 16 here and 32 there" in said(runs[0], wide)
    assert "1 checkpoint: a soup is the mean of two at least" in said(runs[0])
    assert "a soup is a checkpoint, name it .ckpt" in said(*runs, output="soup.safetensors")
    assert "is an ingredient" in str(main(["soup", *map(str, runs), "--output", str(runs[0])]))
    torch.save({"w": torch.zeros(1)}, tmp_path / "bare.ckpt")
    assert "bare.ckpt: no checkpoint of a run" in said(runs[0], tmp_path / "bare.ckpt")
    assert not list(tmp_path.glob("soup*"))
