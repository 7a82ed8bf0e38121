"""Exported files at work, as checkpoints are: ONNX Runtime runs `.onnx`, OpenVINO `.xml`, PyTorch `.pt2`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detection.batch import Batch
from detection.data.records import DataError
from detection.data.skeletons import edges_of
from detection.data.spectral import PixelFormat, Pixels
from detection.inference.detections import Detections
from detection.inference.detector import Detector, most_detections
from detection.inference.tiles import Tiles
from detection.interop.exported_files import Run, onnx_runner, read_facts, read_torch_facts, torch_runner
from detection.interop.openvino import openvino_runner, read_openvino_facts
from detection.interop.parity import found_by_file
from detection.mask_grid import MaskGrid, TorchvisionMaskGrid
from detection.training.encoding import encode_detections
from detection.weights import CheckpointError

GRIDS = {type(grid).__name__: grid for grid in (MaskGrid(), TorchvisionMaskGrid())}
KEPT = ("class_names", "pixels", "sizes", "detections_per_img", "mask_grid")


class Runtime(NamedTuple):
    """What runs files of one suffix, and what reads the facts that `detection export` has put into them."""

    runner: Callable[..., Run]
    facts: Callable[[Path], dict[str, Any]]


RUNTIMES = {
    ".onnx": Runtime(onnx_runner, read_facts),
    ".xml": Runtime(openvino_runner, read_openvino_facts),
    ".pt2": Runtime(torch_runner, read_torch_facts),
}


class ExportedDetector(Detector):
    """An exported file that is called as a `Detector` is, on the CPU, image by image.

    Its detections are those of the checkpoint within what the check of `detection export` stated. It has no `model`.

    Args:
        path: of the `.onnx`, `.xml` or `.pt2`.

    Raises:
        CheckpointError: the file does not say what its classes, images or masks are.
        FileNotFoundError: there is none.
        ImportError: its runtime is not installed.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        runtime = RUNTIMES[path.suffix]
        try:
            facts = runtime.facts(path)
        except ImportError:
            raise
        except Exception as error:  # each runtime has its own
            raise CheckpointError(f"{path}: it can't be read as {path.suffix}: {str(error).splitlines()[0]}") from error
        if absent := [name for name in KEPT if facts.get(name) is None]:
            raise CheckpointError(f"{path}: it does not say its {absent[0]}: write it with `detection export`")
        if facts["mask_grid"] not in (*GRIDS, "none"):
            raise CheckpointError(
                f"{path}: its masks are laid on images by {facts['mask_grid']}, which is not in the file: take the "
                "checkpoint"
            )
        self.detections_per_img = int(facts["detections_per_img"])
        self.path, self._run = path, runtime.runner(path)
        self.has_masks = facts["mask_grid"] != "none"
        self._grid = GRIDS.get(facts["mask_grid"], GRIDS["MaskGrid"])
        self.num_keypoints, self._size = int(facts.get("num_keypoints", 0)), facts.get("size")
        self.edges = edges_of(self.num_keypoints)
        self.device, self.precision = torch.device("cpu"), "32"
        self.class_names = tuple(facts["class_names"])
        self.category_ids = tuple(facts.get("category_ids") or range(1, len(self.class_names) + 1))
        self.min_size, self.max_size = facts["sizes"]
        self.form = PixelFormat(*facts["pixels"])
        self._divisor = 1  # one image at a time
        self.tiles = Tiles(*facts["tiles"]) if facts.get("tiles") else None

    def _detect(self, pixels: Sequence[Pixels]) -> list[Detections]:
        return [self._pack(self.found(image), image.shape[:2]) for image in pixels]

    def found(self, image: Pixels) -> dict[str, Any]:
        """What `encode_detections` gives for an image `(H, W, C)`: tensors, and masks as COCO RLE."""
        size = image.shape[:2]
        if self._size is not None and list(size) != self._size:
            height, width = self._size
            raise DataError(
                f"{self.path}: it takes images of {width} x {height} pixels alone, and one is {size[1]} x {size[0]}"
            )
        sizes, nothing = torch.tensor([size]), torch.zeros(0)
        batch = Batch(nothing, sizes, nothing, nothing, nothing, sizes)
        return encode_detections([found_by_file(self._run, image)], batch, self._grid)[0]


def kept_facts(
    model: Any,
    class_names: Sequence[str] | None,
    category_ids: Sequence[int] | None,
    tiles: Sequence[float] | None = None,
) -> Mapping[str, Any]:
    """What a file has to say for `ExportedDetector`, beside its tensors.

    Args:
        model: the detector that is exported.
        class_names, category_ids: of the foreground, label 1 first; None where nobody knows.
        tiles: side and overlap of those that it was trained on, if it was.
    """
    transform = model.transform
    return {
        "class_names": class_names,
        "category_ids": category_ids,
        "tiles": None if tiles is None else list(tiles),
        "pixels": list(PixelFormat.of(model)),
        "sizes": [transform.min_size[-1], transform.max_size],
        "detections_per_img": most_detections(model),
        "mask_grid": type(model.mask_grid).__name__ if model.has_masks else "none",
        "num_keypoints": model.num_keypoints,
    }
