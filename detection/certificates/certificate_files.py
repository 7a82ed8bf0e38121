"""A certificate inside a file, in the place that each format has for such things, and the checksum of all the rest.

Safetensors have it in their header, ONNX in `metadata_props`, OpenVINO in the `rt_info` of the `.xml`, files of PyTorch
(`.pth`, `.ckpt`, `.pt2`) as one more record of their archive. It is JSON everywhere: reading it runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree  # to write: parsing is defusedxml's

from defusedxml.ElementTree import fromstring

NAME = "certificate"
RECORD = "extra/certificate.json"  # below the archive's own folder, where torch.export looks for extra files
LARGEST_HEADER = 1 << 27  # bytes
SECTION = "detection"  # of OpenVINO's rt_info, see `openvino.FACTS`
CHUNK = 1 << 20


class _Format(NamedTuple):
    """How a kind of file holds a certificate.

    Attributes:
        read: its text, or None.
        write: puts it in, in the place of one that is there.
        digest: SHA-256 of all but it.
    """

    read: Callable[[Path], str | None]
    write: Callable[[Path, str], None]
    digest: Callable[[Path], str]


def read_inside(path: Path) -> str | None:
    """The text of the certificate in a file; None where there is none, or no place for one."""
    found = _format(path)
    return found.read(path) if found else None


def write_inside(path: Path, text: str) -> bool:
    """Put a certificate into a file, where it is of a kind that has a place for one; whether it is."""
    found = _format(path)
    if found is not None:
        found.write(path, text)
    return found is not None


def checksum(path: Path) -> str:
    """SHA-256 of all of a file but the certificate in it; of OpenVINO with its weights in the `.bin`."""
    found = _format(path)
    return found.digest(path) if found else _hash_file(path, hashlib.sha256()).hexdigest()


def _format(path: Path) -> _Format | None:
    found = FORMATS.get(path.suffix)
    return None if found is _ARCHIVE and not zipfile.is_zipfile(path) else found  # as PyTorch wrote them before 1.6


def _hash_file(path: Path, digest: Any) -> Any:
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest


# Safetensors: 8 bytes that say how long the header is, the header as JSON, the tensors.
def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > LARGEST_HEADER:
            raise ValueError(f"{path}: its header is too large to be one")
        return json.loads(file.read(length)), 8 + length


def _read_safetensors(path: Path) -> str | None:
    text: str | None = _header(path)[0].get("__metadata__", {}).get(NAME)
    return text


def _write_safetensors(path: Path, text: str) -> None:
    header, begin = _header(path)
    header["__metadata__"] = {**header.get("__metadata__", {}), NAME: text}
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with path.open("rb") as old, part.open("wb") as new:
            new.write(struct.pack("<Q", len(content)) + content)
            old.seek(begin)
            shutil.copyfileobj(old, new, CHUNK)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _digest_safetensors(path: Path) -> str:
    header, begin = _header(path)
    header.get("__metadata__", {}).pop(NAME, None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    with path.open("rb") as file:
        file.seek(begin)
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _read_onnx(path: Path) -> str | None:
    import onnx

    found = onnx.load(path, load_external_data=False).metadata_props
    return next((str(entry.value) for entry in found if entry.key == NAME), None)


def _write_onnx(path: Path, text: str) -> None:
    import onnx

    model = _without_certificate(onnx.load(path))
    model.metadata_props.add(key=NAME, value=text)
    onnx.save(model, path)


def _digest_onnx(path: Path) -> str:
    import onnx

    model = _without_certificate(onnx.load(path))
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _without_certificate(model: Any) -> Any:
    kept = [entry for entry in model.metadata_props if entry.key != NAME]
    entries = [(entry.key, entry.value) for entry in kept]
    del model.metadata_props[:]
    for key, value in entries:
        model.metadata_props.add(key=key, value=value)
    return model


# OpenVINO: <net> ... <rt_info><detection><certificate value="..."/></detection></rt_info></net>
def _parse(path: Path) -> Any:
    return fromstring(path.read_bytes())


def _read_openvino(path: Path) -> str | None:
    found = _parse(path).find(f"rt_info/{SECTION}/{NAME}")
    return None if found is None else found.get("value")


def _write_openvino(path: Path, text: str) -> None:
    root = _bare(path)
    section = root.find(f"rt_info/{SECTION}")
    if section is None:
        raise ValueError(f"{path}: not written by this project, it has no place for a certificate")
    ElementTree.SubElement(section, NAME, {"value": text})
    path.write_bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _bare(path: Path) -> Any:
    root = _parse(path)
    section = root.find(f"rt_info/{SECTION}")
    for old in [] if section is None else section.findall(NAME):
        section.remove(old)
    return root


def _digest_openvino(path: Path) -> str:
    text = ElementTree.canonicalize(ElementTree.tostring(_bare(path), encoding="unicode"))
    return _hash_file(path.with_suffix(".bin"), hashlib.sha256(text.encode())).hexdigest()


# PyTorch: an archive with one folder, whose records are stored as they are.
def _read_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if name.endswith(f"/{RECORD}")]
        return archive.read(found[-1]).decode() if found else None


def _write_archive(path: Path, text: str) -> None:
    """Add the record; a file that is written anew has none yet."""
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        there = any(name.endswith(f"/{RECORD}") for name in archive.namelist())
    if there:
        raise ValueError(f"{path}: it has a certificate already; write the file again")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{folder}/{RECORD}", text)


def _digest_archive(path: Path) -> str:
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(f"/{RECORD}"):
                digest.update(f"{name}\0{archive.getinfo(name).file_size}\0".encode())
                with archive.open(name) as record:
                    while part := record.read(CHUNK):
                        digest.update(part)
    return digest.hexdigest()


_ARCHIVE = _Format(_read_archive, _write_archive, _digest_archive)
FORMATS = {
    ".safetensors": _Format(_read_safetensors, _write_safetensors, _digest_safetensors),
    ".onnx": _Format(_read_onnx, _write_onnx, _digest_onnx),
    ".xml": _Format(_read_openvino, _write_openvino, _digest_openvino),
    **dict.fromkeys((".pth", ".pt", ".ckpt", ".pt2"), _ARCHIVE),
}
