"""Fetches COCO 2017 and Pascal VOC 2007/2012 when asked to, and never otherwise.

An archive is written to `name.part`, continued there after an interruption, compared with its checksum, and only then
gets its name; it is unpacked into a folder beside the target, which is moved into place when complete. So whatever
lies under its final name is whole.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from detection.data.records import DataError

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
LARGEST = 64 << 30  # bytes that one archive may unpack to; COCO train2017 has 20 GB
MEMBERS = 2_000_000


@dataclass(frozen=True, slots=True)
class Archive:
    """One file to fetch.

    Attributes:
        url: where it lies.
        checksum: `"md5:..."` or `"sha256:..."`.
        folder: what it unpacks to, relative to the target; an archive whose folder exists is not fetched again.
        inside: folder inside the archive that becomes `folder`.
    """

    url: str
    checksum: str
    folder: str
    inside: str


_COCO, _VOC = "http://images.cocodataset.org", "https://thor.robots.ox.ac.uk/pascal/VOC"
DATASETS: dict[str, tuple[Archive, ...]] = {
    "coco2017": (
        Archive(
            f"{_COCO}/annotations/annotations_trainval2017.zip",
            "md5:f4bbac642086de4f52a3fdda2de5fa2c",
            "annotations",
            "annotations",
        ),
        Archive(f"{_COCO}/zips/val2017.zip", "md5:442b8da7639aecaf257c1dceb8ba8c80", "val2017", "val2017"),
        Archive(f"{_COCO}/zips/train2017.zip", "md5:cced6f7f71b7629ddf16f17bbcfab6b2", "train2017", "train2017"),
    ),
    "voc2007": (
        Archive(
            f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar",
            "md5:c52e279531787c972589f7e41ab4ae64",
            "VOC2007",
            "VOCdevkit/VOC2007",
        ),
        Archive(
            f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar",
            "md5:b6e924de25625d8de591ea690078ad9f",
            "VOC2007test",  # the folder inside has the name of the training set's
            "VOCdevkit/VOC2007",
        ),
    ),
    "voc2012": (
        Archive(
            f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar",
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
            "VOC2012",
            "VOCdevkit/VOC2012",
        ),
    ),
}


def download(
    archives: tuple[Archive, ...], target: Path, keep: bool = False, log: Callable[[str], None] = print
) -> None:
    """Fetch and unpack archives; folders that are already there are left as they are.

    Args:
        archives: e.g. `DATASETS["voc2012"]`.
        target: folder to put them in.
        keep: keep the archives after unpacking.
        log: receives one line a step.

    Raises:
        DataError: no connection, an answer other than the file, a wrong checksum, an unsafe archive, or a full disk.
    """
    target.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        if (target / archive.folder).exists():
            log(f"{target / archive.folder} is there already")
            continue
        path = target / PurePosixPath(archive.url).name
        if not path.exists():
            log(f"fetching {archive.url}")
            fetch(archive.url, path, archive.checksum)
        log(f"unpacking {path.name}")
        unpack(path, target / archive.folder, archive.inside)
        if not keep:
            path.unlink()


def fetch(url: str, path: Path, checksum: str, tries: int = 5) -> None:
    """Fetch one file, continuing a `.part` file that an earlier try left; see `download` for errors."""
    part = path.with_name(path.name + ".part")
    for attempt in range(1, tries + 1):
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # no byte is left to send; whether it is the file, the checksum says
                break
            raise DataError(f"{url}: the server answers {error.code} {error.reason}; check the address") from error
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
            if attempt == tries or not part.exists() or part.stat().st_size == before:
                raise DataError(
                    f"{url}: can't be reached ({getattr(error, 'reason', error)}); connect this machine to the network "
                    f"and try again, which continues what has arrived, or put the file at {path} yourself"
                ) from error
        except OSError as error:
            raise DataError(f"{part}: can't be written ({error}); make room or choose another folder") from error
    if (actual := _digest(part, checksum)) != checksum:
        part.unlink()
        raise DataError(f"{url}: the checksum is {actual}, not {checksum}; the file was deleted, fetch it again")
    os.replace(part, path)


def _transfer(url: str, part: Path) -> None:
    """Append to `part` what it lacks; raises IncompleteRead where the connection ends early."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        length = answer.headers.get("Content-Length")
        arrived = 0
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                arrived += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        if length is not None and arrived < int(length):
            raise http.client.IncompleteRead(b"", int(length) - arrived)


def _digest(path: Path, checksum: str) -> str:
    """The checksum of a file, of the kind that `checksum` is of."""
    kind = checksum.partition(":")[0]
    with open(path, "rb") as file:
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"


def unpack(path: Path, folder: Path, inside: str) -> None:
    """Unpack the part `inside` of a zip or tar archive as `folder`, which appears only when it is complete.

    Only plain files and folders come out: a member with an absolute path, `..`, a link or a device, or an archive that
    grows beyond `LARGEST` bytes, is an error and leaves nothing behind.
    """
    scratch = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        total = 0
        for count, (name, size, opened) in enumerate(_members(path)):
            total += size
            if count >= MEMBERS or total > LARGEST:
                raise DataError(
                    f"{path}: unpacks to more than {LARGEST >> 30} GB or {MEMBERS} files; it is not the data set"
                )
            relative = PurePosixPath(name)
            if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
                raise DataError(f"{path}: the member {name[:200]!r} leads out of the folder; don't use this archive")
            if relative.is_relative_to(inside):
                _write(scratch / relative.relative_to(inside), size, opened, path)
        if not scratch.is_dir():
            raise DataError(f"{path}: there is no folder '{inside}' in it; it is not the data set")
        os.replace(scratch, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: can't be unpacked into {folder} ({error}); delete the archive and fetch it again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


Member = tuple[str, int, Callable[[], IO[bytes] | None]]


def _members(path: Path) -> Iterator[Member]:
    """`(name, bytes, function that opens it)` of every plain file; links and devices are errors."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                mode = info.external_attr >> 28  # of the Unix file type: 8 a file, 4 a folder, 0 unknown
                if mode not in (0, 4, 8):
                    raise DataError(
                        f"{path}: the member {info.filename[:200]!r} is a link or device; don't use this archive"
                    )
                if not info.is_dir():
                    yield info.filename, info.file_size, partial(archive.open, info)
        return
    with tarfile.open(path) as tar:
        for member in tar:
            if not (member.isfile() or member.isdir()):
                raise DataError(f"{path}: the member {member.name[:200]!r} is a link or device; don't use this archive")
            if member.isfile():
                yield member.name, member.size, partial(tar.extractfile, member)


def _write(target: Path, size: int, opened: Callable[[], IO[bytes] | None], path: Path) -> None:
    """Copy one member, no more bytes than its entry promises: that is what a bomb gets wrong."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source: Any = opened()
    with source, open(target, "xb") as out:
        left = size
        while chunk := source.read(min(CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise DataError(f"{path}: the member {target.name[:200]!r} is longer than its entry says; don't use it")
            out.write(chunk)
        if left:
            raise DataError(
                f"{path}: the member {target.name[:200]!r} is cut off; delete the archive and fetch it again"
            )
