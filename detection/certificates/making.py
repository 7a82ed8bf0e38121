"""Both sides of a certificate, from the files alone: what was made, what of, and with which settings.

`made` is `import` (another library's file, or a run, became ours), `take` (ours became another library's) or `export`
(ours became a graph). `measure` gives the rows of a certificate, for the first time and for each `detection verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.batch import Batch
from detection.batch import Target as Labelled
from detection.certificates.certificate import CertificateError, Measured
from detection.certificates.differences import Row, compare
from detection.certificates.other_sides import detectron2_side, mmdetection_side
from detection.certificates.seen import Picture, fit_labels
from detection.certificates.sides import AbsentError, Side, Traced, onnx_side, own_side, torchvision_side
from detection.data.spectral import PixelFormat, Pixels
from detection.interop import detectron2, mmdetection, rows
from detection.interop.exported_files import Run
from detection.interop.files import import_detector, load_detector
from detection.interop.foreign import read_foreign
from detection.interop.names import rename
from detection.interop.parity import compare_accuracy, found_by_file, found_by_model
from detection.interop.torchvision import WITHOUT_EPSILON
from detection.models.precomputed import PrecomputedProposals
from detection.models.two_stage import FasterRCNN
from detection.weights import read_saved, upgrade_names

AP_TOLERANCE = 0.01
FLAGS = ("style", "contiguous", "without_epsilon", "bgr", "stride_in_1x1", "semantics")  # of `convert import`
ANEW = "what this project makes of {} again"


@dataclass(frozen=True)
class Job:
    """What a certificate is of.

    Attributes:
        made: see above.
        file: that was made.
        source: what of.
        settings: of an import the flags in `FLAGS` and `config`; of a take `to`, `category_ids`, `without_epsilon`; of
            an export `target`, `precision`, `size`, `tolerance`. Paths begin at the file's folder.
        trust: packages whose parts the source may use.
    """

    made: str
    file: Path
    source: Path
    settings: Mapping[str, Any]
    trust: Sequence[str] = ()

    @property
    def own(self) -> Path:
        """The one of the two files that this project loads."""
        return self.file if self.made == "import" else self.source

    def form(self) -> PixelFormat:
        """The pixels that the detector takes."""
        return PixelFormat.of(load_detector(self.own, self.trust))

    def path(self, name: str) -> Path | None:
        """A file that a setting names.

        Raises:
            CertificateError: it is not there.
        """
        if not self.settings.get(name):
            return None
        path = self.file.parent / self.settings[name]
        if not path.is_file():
            raise CertificateError(f"{path}, the {name} of the certificate, is not there: put it back")
        return path


def measure(job: Job, pictures: Sequence[Picture]) -> Measured:
    """Compare, stage by stage.

    Raises:
        CertificateError: a file that it needs is not there.
        CheckpointError: one can't be read.
    """
    model = load_detector(job.own, job.trust)
    if isinstance(model.rpn, PrecomputedProposals):
        raise CertificateError("Fast R-CNN takes proposals from the data, so an image alone tells nothing of it")
    ours, theirs, replaced, more = _sides(job, model)
    if job.made == "take":
        pictures = [_at_its_size(picture, job, model) for picture in pictures]
    rough = job.made == "export" and job.settings.get("precision", "32") != "32" and not job.settings.get("tolerance")
    pictures = fit_labels(pictures, model.num_classes, model.has_masks, model.num_keypoints)
    found, total = compare(ours, theirs, pictures, rough)
    if job.settings.get("tolerance"):
        found = [replace(row, tolerance=job.settings["tolerance"]) if row.stage == "boxes" else row for row in found]
    return Measured(theirs.name, replaced, [*more, *found], total)


def accuracy(job: Job, labelled: Iterable[tuple[Pixels, Labelled]], name: str) -> dict[str, Any]:
    """The AP of the file and of what it is compared with, and how much is lost.

    Args:
        job: what the certificate is of.
        labelled: each image and its ground truth.
        name: of the data set.
    """
    from detection.inference.detector import Detector  # which needs `detection.interop`

    model = load_detector(job.own, job.trust)
    ours, theirs, _, _ = _sides(job, model)
    names = read_saved(job.own).class_names or ["?"] * (model.num_classes - 1)
    found = compare_accuracy(
        Detector(model, names, device="cpu"), _as_run(ours if job.made == "export" else theirs), labelled
    )
    file, reference = (found.model, found.file) if job.made == "import" else (found.file, found.model)
    return {"data": name, "images": found.images, "file": file, "reference": reference, "lost": reference - file}


def _as_run(side: Side) -> Run:
    """A side as `compare_accuracy` takes what runs a file."""

    def run(planes: Pixels) -> dict[str, Any]:
        found = side.look(planes[0].transpose(1, 2, 0)).found
        return {name: value.numpy()[None] for name, value in found.items()} | {"counts": [len(found["labels"])]}

    return run


def _sides(job: Job, model: FasterRCNN) -> tuple[Side, Side, str, list[Row]]:
    """Ours or the file's side, that of the reference, what took the reference's place and why, and rows of tensors."""
    if job.made == "export":
        return *_of_export(job, model), "", []
    if job.made == "take":
        return _of_take(job, model)
    if job.source.suffix == ".ckpt":
        theirs = replace(own_side(load_detector(job.source, job.trust)), name="the detector of the run")
        return own_side(model), theirs, "", []
    state, meta = read_foreign(job.source)
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    try:
        if any(name.startswith(detectron2.PREFIXES) for name in state):
            return own_side(model, _prepare(model)), detectron2_side(state, model, job.path("config")), "", []
        if any(name.startswith(mmdetection.PREFIXES) for name in state):
            config = job.path("config")
            text = mmdetection.config_of(meta) if config is None else config.read_text(encoding="utf-8")
            prepare = _prepare(model)
            return own_side(model, prepare), mmdetection_side(state, text, prepare), "", []
        without = job.settings.get("without_epsilon")
        without = job.source.name in WITHOUT_EPSILON if without is None else without
        state = rows.to_contiguous(upgrade_names(state)) if job.settings.get("contiguous") else state
        return own_side(model), torchvision_side(state, job.source.name, without), "", []
    except AbsentError as error:
        flags: dict[str, Any] = {name: job.settings[name] for name in FLAGS if name in job.settings}
        again, _ = import_detector(job.source, config=job.path("config"), **flags)
        theirs = replace(own_side(again), name=ANEW.format(job.source.name))
        told = (
            f"{error}. In its place the file is compared with {theirs.name}, and taken back to the tensors that it was "
            "made of, bit for bit"
        )
        return own_side(model), theirs, told, [_same_tensors(model, again), *_round_trip(model, state)]


def _prepare(model: FasterRCNN) -> Callable[[Pixels], Batch]:
    """An image -> the batch that `detection predict` makes of it."""
    from detection.inference.detector import Detector

    detector = Detector(model, ["?"] * (model.num_classes - 1), device="cpu")
    return lambda image: detector.batch([image])


def _of_take(job: Job, model: FasterRCNN) -> tuple[Side, Side, str, list[Row]]:
    state, _ = read_foreign(job.file)
    if job.settings["to"] == "torchvision":
        ids = bool(job.settings.get("category_ids"))
        side = torchvision_side(state, job.file.name, bool(job.settings.get("without_epsilon")), model)
        return own_side(model), _with_labels(side) if ids else side, "", []
    config = job.file.with_suffix(".yaml")
    if not config.is_file():
        raise CertificateError(f"{config}, which Detectron2 needs beside {job.file.name}, is not there: put it back")
    try:
        return own_side(model, _prepare(model)), detectron2_side(state, model, config), "", []
    except AbsentError as error:
        again, _ = import_detector(job.file, config=config)
        theirs = replace(own_side(again, _prepare(again)), name=ANEW.format(job.file.name))
        told = f"{error}. In its place the file was read back: the detector is compared with {theirs.name}"
        return own_side(model, _prepare(model)), theirs, told, []


def _with_labels(side: Side) -> Side:
    """A side with COCO's 91 category ids for labels, as one with labels 1 to 80."""

    def look(image: Pixels) -> Traced:
        traced = side.look(image)
        labels = torch.tensor([rows.COCO_IDS.index(int(label)) + 1 for label in traced.found["labels"]])
        return replace(traced, found={**traced.found, "labels": labels.long()})

    return Side(side.name, look)


def _at_its_size(picture: Picture, job: Job, model: FasterRCNN) -> Picture:
    """A picture resized before, for libraries whose filters differ from the detector's own."""
    if job.settings["to"] == "torchvision" or model.transform.resizing == "detectron2":
        return picture
    batch = _prepare(model)(picture.pixels)
    height, width = batch.image_sizes[0].tolist()
    pixels: Any = batch.images[0, :, :height, :width].permute(1, 2, 0).contiguous().numpy()
    return Picture(picture.name, pixels)


def _of_export(job: Job, model: FasterRCNN) -> tuple[Side, Side]:
    """The file, and the model as `detection predict` runs it."""
    from detection.inference.detector import Detector
    from detection.inference.exported import RUNTIMES

    names = ["?"] * (model.num_classes - 1)
    detector = Detector(model, names, device="cpu")
    if job.file.suffix == ".onnx":
        file = onnx_side(job.file)
    else:
        run = RUNTIMES[job.file.suffix].runner(job.file)
        file = Side(f"the file {job.file.name}", lambda image: Traced(found_by_file(run, image)))

    @torch.no_grad()
    def look(image: Pixels) -> Traced:
        found = found_by_model(detector, image)
        features = model.extract(detector.batch([image]))
        logits, deltas = model.rpn.head(list(features.maps))
        return Traced(
            found,
            [level[0] for level in features.maps],
            objectness=[level[0] for level in logits],
            deltas=[level[0].unflatten(0, (-1, 4)) for level in deltas],
        )

    return file, Side(f"the detector in PyTorch {torch.__version__}, as it predicts", look)


def _same_tensors(model: FasterRCNN, again: FasterRCNN) -> Row:
    """Whether a file has the tensors that converting its source once more gives."""
    ours, theirs = model.state_dict(), again.state_dict()
    if {name: v.shape for name, v in ours.items()} != {name: v.shape for name, v in theirs.items()}:
        return Row("tensors, converted anew", "", None, 0.0, "", "of other names or shapes")
    gaps = {
        name: float((value.double() - theirs[name].double()).abs().max())
        for name, value in ours.items()
        if value.numel()
    }
    worst = max(gaps, key=gaps.__getitem__)
    return Row("tensors, converted anew", "", gaps[worst], 0.0, worst, f"{len(gaps)} tensors")


def _round_trip(model: FasterRCNN, source: Mapping[str, Tensor]) -> list[Row]:
    """The tensors of the source against those that the detector gives back under the source's names."""
    back = _back(model, source)
    shared = [name for name in back if name in source and back[name].shape == source[name].shape]
    stem = next((name for name in shared if back[name].shape[1:] == (3, 7, 7)), None)
    gaps = {name: _gap(back[name], source[name]) for name in shared if name != stem}
    worst = max(gaps, key=gaps.__getitem__, default="")
    left = len(source) - len(shared)
    note = f"{len(gaps)} tensors" + (f", {left} have no counterpart" if left else "")
    found = [Row("tensors, taken back", "", gaps.get(worst), 0.0, worst, note)]
    if stem is not None:
        gap = min(_apart_from_scale(source[stem], back[stem][:, order]) for order in ([0, 1, 2], [2, 1, 0]))
        note = "apart from the scale of pixels and the order of colours, which are folded in"
        found.append(Row("first convolution, taken back", "share", gap, 1e-6, stem, note))
    return found


def _back(model: FasterRCNN, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detector's tensors under the names of the library that its source is of."""
    if any(name.startswith(detectron2.PREFIXES) for name in source):
        return detectron2.to_detectron2(model)
    state = rows.without_counters(model.state_dict())
    if any(name.startswith(mmdetection.PREFIXES) for name in source):
        table = rename(state, mmdetection.RULES)
        return {table[name]: value for name, value in rows.background_to_back(state).items()}
    return state


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _apart_from_scale(a: Tensor, b: Tensor) -> float:
    one, other = (value / value.abs().amax(dim=(0, 2, 3), keepdim=True) for value in (a.double(), b.double()))
    return float((one - other).abs().max())
