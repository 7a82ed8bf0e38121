"""Compiled by PyTorch's own compiler, a detector learns and detects as it does otherwise."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from detection.anchors import AnchorGenerator
from detection.models.compose import faster_rcnn
from detection.models.fast import accelerate
from detection.models.two_stage import TwoStageDetector
from detection.training.compiling import compile_parts
from tests.models.fast.test_accelerated import COMMON, RPN, assert_same_detections, make_batch

needs_a_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="inductor needs a C++ compiler"
)


class Small(nn.Module):
    """Four convolutions, two of them a pyramid's: what takes a minute to compile, and not five."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, stride=4, padding=3)
        self.norm = nn.GroupNorm(4, 16)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.lateral, self.smooth = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.norm(self.stem(images)).relu()
        coarse = self.down(fine).relu()
        joined = self.lateral(fine) + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return {"0": self.smooth(joined), "1": coarse}


def step(model: TwoStageDetector) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    losses: Any = model.train().run(make_batch(0), with_losses=True, with_detections=False)[0]
    torch.stack(list(losses.values())).sum().backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@needs_a_compiler
def test_training_and_inference_are_those_of_the_detector_as_it_is() -> None:
    """Backbone, RPN head, box head and box predictor are a graph each in training, and one more each in detection."""
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,)))
    model = accelerate(faster_rcnn(Small(), 4, rpn_anchor_generator=anchors, **COMMON, **RPN), "cpu")
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    compile_parts(compiled)
    (wanted, wanted_gradients), (losses, gradients) = step(model), step(compiled)
    graphs = [counters["stats"]["unique_graphs"]]
    assert losses.keys() == wanted.keys() and gradients.keys() == wanted_gradients.keys()
    for name, loss in wanted.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=0, msg=name)
    for name, gradient in wanted_gradients.items():
        difference = float((gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-3))
        assert difference < 1e-3, f"{name}: {difference:.1e}"
    step(compiled)  # what has a graph runs it again
    graphs.append(counters["stats"]["unique_graphs"])
    with torch.no_grad():
        expected, found = (form.eval()(make_batch(1)) for form in (model, compiled))
    graphs.append(counters["stats"]["unique_graphs"])
    assert_same_detections(expected, found)
    assert graphs == [4, 4, 8] and not counters["graph_break"]
    torch._dynamo.reset()
