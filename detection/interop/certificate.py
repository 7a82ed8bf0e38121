"""What a converted or exported file was compared with, and how far it is from that, stage by stage.

A certificate is plain values, written as JSON beside a file and inside it. It names both sides, the images, each
stage's largest difference and the tolerance that it is held to; `measure` gives the same figures again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detection.commit import code_version
from detection.data.images import read_image
from detection.data.records import DataError
from detection.data.scenes import RECIPE, draw_scene
from detection.data.spectral import RGB, PixelFormat, Pixels
from detection.interop.certificate_files import checksum, read_inside, write_inside
from detection.interop.certificate_sides import Side, Target, Traced

FORMAT = 1
SEED, COUNT = 0, 2  # of the drawn scenes
LARGEST = 1 << 24  # characters of a certificate
NEAR = 1.0  # pixels: partners differ by less
PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino", "detectron2", "mmdet")


class CertificateError(ValueError):
    """A certificate that can't be read or repeated; the message is one sentence with the way out."""


@dataclass(frozen=True)
class Row:
    """The largest difference of one stage over all images.

    Attributes:
        stage: its name.
        unit: of the difference; `share` is of the largest value.
        difference: the largest; None where the two can't be subtracted, and for a stage that nothing was found for.
        tolerance: what it may be; None for a row that is stated but not judged.
        where: image, parameter or tensor of the largest difference.
        note: what else there is to know.
    """

    stage: str
    unit: str
    difference: float | None
    tolerance: float | None
    where: str = ""
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is within its tolerance; NaN is not."""
        if self.tolerance is None:
            return True
        return self.difference is not None and self.difference <= self.tolerance


@dataclass(frozen=True)
class Picture:
    """An image that both sides saw.

    Attributes:
        name: of the file or scene.
        pixels: `(H, W, C)`.
        target: objects of a drawn scene, with labels of `draw_scene`.
    """

    name: str
    pixels: Pixels
    target: Target | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the certificate."""
        height, width = self.pixels.shape[:2]
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).tobytes()).hexdigest()
        return {"name": self.name, "width": width, "height": height, "sha256": digest}


@dataclass
class Measured:
    """What came out of a comparison.

    Attributes:
        reference: what the file was compared with, in words.
        replaced: why that is not the library itself, and what was compared in its place; empty where it is.
        rows: the stages.
        detections: that the reference has on all images.
    """

    reference: str
    replaced: str = ""
    rows: list[Row] = field(default_factory=list)
    detections: int = 0


def drawn(
    form: PixelFormat = RGB, count: int = COUNT, seed: int = SEED, size: Sequence[int] | None = None
) -> list[Picture]:
    """Scenes of this project, the same for everybody.

    Args:
        form: of the pixels; other channels than RGB get its mean, 16 bits 257 times the level.
        count: of the scenes.
        seed: of their drawing.
        size: height and width that they are resized to, as a file of one size needs; then without objects.
    """
    pictures = []
    for i in range(count):
        number = 0
        while True:  # without a scene of few objects
            pixels, objects = draw_scene(np.random.default_rng([seed, i, number]))
            if sum(not crowd for _, _, crowd in objects) >= 3:
                break
            number += 1
        kept = [(label, mask) for label, mask, crowd in objects if not crowd]
        masks = torch.from_numpy(np.stack([mask for _, mask in kept]))
        spans = [(mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]) for mask in masks]
        boxes = [[float(x[0]), float(y[0]), float(x[-1] + 1), float(y[-1] + 1)] for x, y in spans]
        target = {"boxes": torch.tensor(boxes), "labels": torch.tensor([label for label, _ in kept])}
        target["masks"] = masks.to(torch.uint8)
        if size is not None:
            pixels = np.asarray(cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR))
        named = Picture(f"scene {seed}-{i}-{number}", _in_form(pixels, form), None if size else target)
        pictures.append(named)
    return pictures


def _in_form(pixels: Pixels, form: PixelFormat) -> Pixels:
    if form.channels != 3:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True).astype(np.uint8), form.channels, axis=2)
    return pixels.astype(np.uint16) * 257 if form.depth == 16 else pixels


def photographs(folder: Path, names: Iterable[str], form: PixelFormat = RGB) -> list[Picture]:
    """Images of a folder, by name."""
    return [Picture(name, read_image(folder / name, form=form)) for name in names]


def compare(ours: Side, theirs: Side, pictures: Sequence[Picture], small: bool = False) -> tuple[list[Row], int]:
    """The rows of all stages that both sides show, and the number of the reference's detections.

    Args:
        ours, theirs: the sides.
        pictures: what both look at.
        small: boxes of low scores may come and go, as with int8: what has no partner is stated, not judged.
    """
    worst: dict[str, Row] = {}
    total = 0
    for picture in pictures:
        a, b = ours.look(picture.pixels), theirs.look(picture.pixels)
        total += len(b.found["labels"])
        for row in _stages(a, b, picture.name, small):
            known = worst.get(row.stage)
            if known is None or _worse(row, known):
                worst[row.stage] = row
    rows = list(worst.values())
    scene = next((picture for picture in pictures if picture.target is not None), None)
    if scene is not None and ours.train is not None and theirs.train is not None:
        rows += _training(ours, theirs, scene)
    return rows, total


def _worse(row: Row, known: Row) -> bool:
    """Whether it is farther beyond its tolerance, which may differ between images."""
    if row.difference is None or known.difference is None:
        return row.difference is None and known.tolerance is not None and row.tolerance is not None
    if row.tolerance and known.tolerance:
        return not row.difference / row.tolerance <= known.difference / known.tolerance
    return not row.difference <= known.difference


def _stages(a: Traced, b: Traced, name: str, small: bool) -> Iterable[Row]:
    for level, (left, right) in enumerate(zip(a.features, b.features, strict=False)):
        yield _subtracted(f"features, level {level}", "", left, right, name, 1e-4)
    if a.anchors and b.anchors:
        orders = [_nearest(left, right) for left, right in zip(a.anchors, b.anchors, strict=True)]
        placed = [left[order] for left, order in zip(a.anchors, orders, strict=True)]
        yield _flat("anchors of a cell", "pixels", placed, b.anchors, name, 1e-3, absolute=True)
    else:
        orders = [torch.arange(len(level)) for level in a.objectness]
    for stage, left_maps, right_maps in (
        ("RPN objectness", a.objectness, b.objectness),
        ("RPN deltas", a.deltas, b.deltas),
    ):
        if left_maps and right_maps:
            moved = [level[order] for level, order in zip(left_maps, orders, strict=True)]
            yield _flat(stage, "", moved, right_maps, name, 1e-4)
    if a.proposals is not None and b.proposals is not None:
        yield from _paired("proposals", a.proposals, b.proposals, name, 0.01 * len(b.proposals))
    yield from _detections(a.found, b.found, name, small)


def _detections(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str, small: bool) -> Iterable[Row]:
    allowed = None if small else 0.0
    gaps, left, right = _partners(a["boxes"], b["boxes"], a["labels"], b["labels"])
    alone = len(a["boxes"]) + len(b["boxes"]) - 2 * len(left)
    judged = {"boxes": None, "scores": None, "masks": None} if small else {"boxes": 0.01, "scores": 1e-4, "masks": 1e-3}
    if len(left):
        yield Row("boxes", "pixels", float(gaps.max()), judged["boxes"], name)
        score = (a["scores"][left] - b["scores"][right]).abs().max()
        yield Row("scores", "", float(score), judged["scores"], name)
        if "masks" in a and "masks" in b:
            mask = (a["masks"][left] - b["masks"][right]).abs().max()
            yield Row("masks", "", float(mask), judged["masks"], name)
    yield Row("detections without partner", "", float(alone), allowed, name)


def _paired(stage: str, a: Tensor, b: Tensor, name: str, allowed: float) -> Iterable[Row]:
    gaps, left, _ = _partners(a, b, torch.zeros(len(a)), torch.zeros(len(b)))
    if len(left):
        yield Row(stage, "pixels", float(gaps.max()), 0.05, name)
    alone = float(len(a) + len(b) - 2 * len(left))
    note = "at the last place that NMS or the limit gives, rounding decides"
    yield Row(f"{stage} without partner", "", alone, math.floor(allowed), name, note if alone else "")


def _partners(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of boxes of one label less than a pixel apart: largest differences, and the rows of both."""
    gaps = (a[:, None] - b).abs().amax(dim=-1)
    cost = torch.where((gaps < NEAR) & (of_a[:, None] == of_b), gaps, 1e6).double()
    left, right = (torch.from_numpy(index) for index in linear_sum_assignment(cost.numpy()))
    near = cost[left, right] < NEAR
    return gaps[left[near], right[near]], left[near], right[near]


def _nearest(a: Tensor, b: Tensor) -> Tensor:
    """The row of `a` that is most like each row of `b`: libraries order the anchors of a cell in their own ways."""
    return torch.cdist(b.float(), a.float()).argmin(dim=1)


def _subtracted(stage: str, unit: str, a: Tensor, b: Tensor, name: str, share: float, absolute: bool = False) -> Row:
    if a.shape != b.shape:
        return Row(stage, unit, None, share, name, f"{tuple(a.shape)} beside {tuple(b.shape)}")
    difference, largest = float((a - b).abs().max()), float(b.abs().max())
    if absolute:
        return Row(stage, unit, difference, share, name)
    return Row(stage, unit, difference, share * largest, name, f"of values up to {largest:.3g}")


def _flat(
    stage: str, unit: str, a: Sequence[Tensor], b: Sequence[Tensor], name: str, share: float, absolute: bool = False
) -> Row:
    """All levels in one row."""
    if [level.shape for level in a] != [level.shape for level in b]:
        return Row(stage, unit, None, share, name, "of other shapes")
    left, right = (torch.cat([level.flatten() for level in side]) for side in (a, b))
    return _subtracted(stage, unit, left, right, name, share, absolute)


def _training(ours: Side, theirs: Side, scene: Picture) -> list[Row]:
    """Losses and gradients on one scene, every anchor and proposal trained on."""
    assert ours.train is not None and theirs.train is not None and scene.target is not None
    losses, gradients = ours.train(scene.pixels, scene.target)
    wanted, wished = theirs.train(scene.pixels, scene.target)
    rows = []
    for name, value in wanted.items():
        ratio = float((losses[name] - value).abs() / value.abs().clamp(min=1e-12)) if name in losses else None
        rows.append(Row(f"{name}", "share", ratio, 1e-4, scene.name, f"of {float(value):.4f}"))
    shared = [name for name in wished if name in gradients]
    largest = {name: float((gradients[name] - wished[name]).abs().max()) for name in shared}
    most = max((float(value.abs().max()) for value in wished.values()), default=0.0)
    if shared and most:
        name = max(largest, key=largest.__getitem__)
        note = f"of the largest, {most:.3g}, in {len(shared)} parameters"
        # Before a ReLU a rounding error may change a sign, and with it a whole gradient.
        rows.append(Row("gradients", "share", largest[name] / most, 1e-2, name, note))
    return rows


def fit_labels(pictures: Sequence[Picture], num_classes: int, with_masks: bool) -> list[Picture]:
    """The pictures with the scenes' labels as ones of the detector, small enough for a quick step of training."""
    fitted = []
    for picture in pictures:
        target = picture.target
        if target is not None:
            target = {**target, "labels": (target["labels"] - 1) % (num_classes - 1) + 1}
            target = target if with_masks else {name: value for name, value in target.items() if name != "masks"}
        fitted.append(Picture(picture.name, picture.pixels, target))
    return fitted


def write(
    file: Path,
    source: Path,
    made: str,
    settings: Mapping[str, Any],
    measured: Measured,
    pictures: Sequence[Picture],
    images: Mapping[str, Any],
    accuracy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a certificate beside a file, as JSON, and inside it, where it has a place for one.

    Args:
        file: that was made.
        source: what it was made of.
        made: `import`, `take` or `export`.
        settings: with which; what `measure` needs to repeat it.
        measured: the comparison.
        pictures: that both saw.
        images: where they are from: `{"drawn": seed}`, or `{"folder": path}`.
        accuracy: the AP of both, where there is labelled data.

    Returns:
        the certificate.
    """
    content = {
        "certificate": FORMAT,
        "made": made,
        "holds": all(row.holds for row in measured.rows) and not _lost_too_much(accuracy),
        "file": {"name": file.name, "sha256": checksum(file)},
        "source": {"name": source.name, "path": relative(source, file.parent), "sha256": checksum(source)},
        "settings": dict(settings),
        "reference": measured.reference,
        "replaced": measured.replaced,
        "detections": measured.detections,
        "rows": [_plain(asdict(row)) for row in measured.rows],
        "accuracy": dict(accuracy) if accuracy else None,
        "images": dict(images) | {"recipe": RECIPE, "pictures": [picture.as_dict() for picture in pictures]},
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    write_inside(file, text)
    path_of(file).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return content


def path_of(file: Path) -> Path:
    """Where the certificate of a file lies beside it."""
    return file.with_name(f"{file.stem}.certificate.json")


def relative(path: Path, folder: Path) -> str:
    """A path as it is reached from a folder, so that both can be moved together.

    Of what is more than two folders up the name alone is left: a file that is given away names no home.
    """
    try:
        found = Path(os.path.relpath(path.resolve(), folder.resolve()))
    except ValueError:  # on another drive
        return path.name
    return path.name if found.parts[:3] == ("..",) * 3 else found.as_posix()


def _lost_too_much(accuracy: Mapping[str, Any] | None) -> bool:
    return accuracy is not None and not accuracy["lost"] <= accuracy["tolerance"]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def versions() -> dict[str, str]:
    """Of this code, of Python, and of the packages that compute; those that are not installed are left out."""
    found = {"detection": code_version(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The certificate of a file, and what is wrong with it, a sentence each.

    Raises:
        CertificateError: there is none, or it is none.
    """
    texts = {}
    beside = path_of(file)
    if beside.is_file():
        if beside.stat().st_size > LARGEST:
            raise CertificateError(f"{beside}: too large for a certificate")
        texts["beside"] = beside.read_text(encoding="utf-8")
    try:
        inside = read_inside(file)
    except (ValueError, OSError, SyntaxError) as error:
        raise CertificateError(f"{file}: not a whole file of its kind ({error}); fetch or write it again") from error
    if inside is not None:
        texts["inside"] = inside
    if not texts:
        raise CertificateError(
            f"{file} has no certificate, inside or as {beside.name}: `detection convert` and `detection export` write "
            "one"
        )
    parsed = {place: _parse(text, file) for place, text in texts.items()}
    wrong = []
    if len(parsed) == 2 and parsed["beside"] != parsed["inside"]:
        wrong.append(f"the certificate inside {file.name} is not the one in {beside.name}")
    return parsed.get("inside", parsed.get("beside", {})), wrong


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
        _check(content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CertificateError(f"{file}: its certificate can't be read ({error}): write the file again") from error
    if content.get("certificate") != FORMAT:
        raise CertificateError(f"{file}: its certificate is of a newer version: update this package")
    found: dict[str, Any] = content
    return found


def _check(content: Any) -> None:
    """Raise a TypeError or KeyError where a certificate lacks what is looked at, or has something of another kind."""
    number = (int, float, type(None))
    kinds: dict[str, Any] = {
        "made": str,
        "file": dict,
        "source": dict,
        "settings": dict,
        "images": dict,
        "versions": dict,
    }
    kinds |= {"reference": str, "date": str, "detections": int}
    wanted: list[tuple[Any, Any]] = [(content[name], kind) for name, kind in kinds.items()]
    wanted += [(content[name][key], str) for name in ("file", "source") for key in ("name", "sha256")]
    wanted += [(content["source"]["path"], str), (content["images"]["pictures"], list)]
    wanted += [(entry[key], str) for entry in content["images"]["pictures"] for key in ("name", "sha256")]
    for row in rows_of(content):
        wanted += [
            (row.stage, str),
            (row.where, str),
            (row.unit, str),
            (row.difference, number),
            (row.tolerance, number),
        ]
    if (accuracy := content["accuracy"]) is not None:
        wanted += [(accuracy[key], (int, float)) for key in ("file", "reference", "lost", "tolerance")]
        wanted += [(accuracy["data"], str)]
    for value, kind in wanted:
        if not isinstance(value, kind):
            raise TypeError(f"{str(value)[:40]!r} is no value of a certificate")


def rows_of(content: Mapping[str, Any]) -> list[Row]:
    """The rows of a certificate."""
    return [Row(**row) for row in content["rows"]]


def pictures_of(content: Mapping[str, Any], folder: Path, form: PixelFormat) -> list[Picture]:
    """The images of a certificate, here.

    Args:
        content: the certificate.
        folder: that paths in it begin at.
        form: of the pixels.

    Raises:
        CertificateError: they are not here, or not the same.
    """
    told = content["images"]
    wanted = told["pictures"]
    if "folder" in told:
        try:
            pictures = photographs(folder / told["folder"], [entry["name"] for entry in wanted], form)
        except (OSError, DataError) as error:
            raise CertificateError(
                f"an image of the certificate is missing: name the folder, --images ({error})"
            ) from error
    else:
        pictures = drawn(form, len(wanted), int(told["drawn"]), content["settings"].get("size"))
    for picture, entry in zip(pictures, wanted, strict=True):
        if picture.as_dict()["sha256"] != entry["sha256"]:
            raise CertificateError(
                f"{entry['name']} has other pixels here than when the certificate was made: give the same images"
            )
    return pictures
