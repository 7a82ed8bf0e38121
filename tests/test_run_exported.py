"""`examples/run_exported.py` does by itself what the detector does behind its network; `test_export` runs it whole."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.interop.parity import locate_in_regions
from detection.mask_grid import MaskGrid, TorchvisionMaskGrid, paste_masks

RUNNER = Path(__file__).resolve().parents[1] / "examples" / "run_exported.py"


@pytest.mark.parametrize("grid", [MaskGrid(), TorchvisionMaskGrid()], ids=lambda grid: type(grid).__name__)
def test_lays_masks_as_the_detector_did(grid):
    lay = runpy.run_path(str(RUNNER))["lay_mask"]
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        low, extent = torch.rand(2, generator=draw) * 60 - 5, torch.rand(2, generator=draw) * 40 + 3
        box, mask = torch.cat((low, low + extent)), torch.rand((1, 28, 28), generator=draw)
        wanted = grid.inside(paste_masks(mask, box[None], (70, 90), grid))[0, 0].numpy()
        laid = np.asarray(lay(mask[0].numpy(), box.tolist(), (90, 70), type(grid).__name__)) > 0
        assert (laid != wanted).mean() < 1e-3, box  # a pixel at 0.5 may round to either side


@pytest.mark.parametrize("side", [0.4, 3.0, 55.9, 130.2])
def test_finds_the_key_points_of_the_detector(side):
    """In regions that are smaller than a pixel, and both smaller and larger than their heatmaps of 14 cells."""
    torch.manual_seed(0)
    find = runpy.run_path(str(RUNNER))["find_points"]
    heatmaps = torch.randn(1, 40, 14, 14)
    region = torch.tensor([[7.3, 2.1, 7.3 + side, 2.1 + 0.7 * side]])
    box = torch.tensor([[11.0, 3.0, 11.0 + 2 * side, 3.0 + side]])
    wanted = locate_in_regions({"boxes": box, "heatmaps": heatmaps, "regions": region})["keypoints"][0, :, :2]
    np.testing.assert_allclose(find(heatmaps[0].numpy(), region[0], box[0]), wanted, atol=1e-3)


def test_says_what_is_absent_and_where_nothing_is_found(tmp_path):
    done = subprocess.run([sys.executable, RUNNER, tmp_path / "no.onnx", "x.jpg"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"{tmp_path / 'no.onnx'}: there is no such file\n"
