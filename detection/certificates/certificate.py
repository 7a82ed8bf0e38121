"""What a converted or exported file was compared with, and how far it is from that, stage by stage.

A certificate is plain values, written as JSON beside a file and inside it. It names both sides, the images, each
stage's largest difference and the tolerance that it is held to; `measure` gives the same figures again.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from detection.certificates.certificate_files import checksum, read_inside, write_inside
from detection.certificates.differences import Row
from detection.certificates.seen import Picture, drawn, photographs
from detection.commit import code_version
from detection.data.records import DataError
from detection.data.scenes import RECIPE
from detection.data.spectral import PixelFormat

FORMAT = 1
LARGEST = 1 << 24  # characters of a certificate
PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino", "detectron2", "mmdet")


class CertificateError(ValueError):
    """A certificate that can't be read or repeated; the message is one sentence with the way out."""


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
