"""What single steps on a GPU must keep; how large the differences are stands in `gpu.json`."""

from __future__ import annotations

import pytest
import torch

from detection.benchmarks.gpu import Setting
from detection.benchmarks.gpu_pairs import Pair, peak_memory
from detection.benchmarks.gpu_runs import out_of_memory
from detection.benchmarks.gpu_sections import parity, sync_debug, waits

pytestmark = pytest.mark.gpu


@pytest.mark.rehearsal  # without a GPU; there the section `parity` has it
def test_same_as_torchvision(setting: Setting) -> None:
    rows = list(parity(setting, ("r50",)))  # raises where one does not hold
    assert {(row["precision"], row["what"]) for row in rows} >= {("float32", "boxes"), ("bfloat16", "loss_box_reg")}


def test_the_host_waits_in_nms_alone(setting: Setting) -> None:
    assert list(waits(setting))  # raises where it waits elsewhere


def test_sync_debug_mode_error_around_a_step(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises an error at the first wait. Within NMS, which must wait, it is allowed."""
    pair = Pair("r50", setting.sizes, setting.device)
    model = pair.quick("train").train()
    for part in model.modules():
        if hasattr(part, "nms"):

            def allowed(*args: object, nms: object = part.nms) -> torch.Tensor:
                with sync_debug("default", setting.device):
                    return nms(*args)  # type: ignore[operator, no-any-return]

            monkeypatch.setattr(part, "nms", allowed)
    batch = pair.draw(2)[0]

    def step() -> None:
        losses, _ = model.run(batch, with_losses=True, with_detections=False)
        torch.stack(list(losses.values())).sum().backward()

    step()  # constants are made in the first
    with sync_debug("error", setting.device):
        step()


def test_no_more_memory_than_torchvision(setting: Setting) -> None:
    steps, peaks = Pair("r50", setting.sizes, setting.device).steps("train", setting.half, 2), {}
    for name, step in steps.items():
        step()
        with peak_memory(setting.device) as peak:
            step()
        peaks[name] = peak[0]
    assert peaks["ours"] <= 1.05 * peaks["torchvision"]


def test_out_of_memory_says_what_to_do(setting: Setting) -> None:
    (row,) = out_of_memory(setting)
    assert "lower data.batch_size" in row["sentence"] and row["goes_on"]
