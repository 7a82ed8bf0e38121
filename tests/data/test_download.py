from __future__ import annotations

import hashlib
import io
import itertools
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from detection.data import download as module
from detection.data.download import DATASETS, Archive, download, fetch, unpack
from detection.data.records import DataError


@dataclass
class Server:
    """Files by path; `cut` ends the first answers early; `ranges` records what was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    resumes: bool = True
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            data = state.files.get(self.path)
            if data is None:
                return self.send_error(404)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.resumes else 0
            if start and start >= len(data):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + state.cut.pop(0)] if state.cut else data[start:])
            return None

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()


def md5(data: bytes) -> str:
    return f"md5:{hashlib.md5(data).hexdigest()}"


def tar_of(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


DATA = bytes(range(256)) * 5000


def test_fetch(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = DATA
    fetch(f"{server.url}/a", tmp_path / "a", md5(DATA))
    assert (tmp_path / "a").read_bytes() == DATA and server.ranges == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_interrupted_transfers_continue(server: Server, tmp_path: Path) -> None:
    server.files["/a"], server.cut = DATA, [400_000, 300_000]
    fetch(f"{server.url}/a", tmp_path / "a", f"sha256:{hashlib.sha256(DATA).hexdigest()}")
    assert (tmp_path / "a").read_bytes() == DATA
    assert server.ranges == [None, "bytes=400000-", "bytes=700000-"]


def test_next_run_continues_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = DATA
    (tmp_path / "a.part").write_bytes(DATA[:1000])
    fetch(f"{server.url}/a", tmp_path / "a", md5(DATA))
    assert (tmp_path / "a").read_bytes() == DATA and server.ranges == ["bytes=1000-"]
    (tmp_path / "b.part").write_bytes(DATA)  # complete, but the run ended before it got its name
    fetch(f"{server.url}/a", tmp_path / "b", md5(DATA))
    assert (tmp_path / "b").read_bytes() == DATA


def test_server_that_ignores_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.files["/a"], server.resumes = DATA, False
    (tmp_path / "a.part").write_bytes(b"x" * 1000)
    fetch(f"{server.url}/a", tmp_path / "a", md5(DATA))
    assert (tmp_path / "a").read_bytes() == DATA


def test_wrong_checksum_is_deleted_and_never_gets_the_name(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = DATA
    with pytest.raises(DataError, match=r"/a: the checksum is md5:\w+, not md5:0"):
        fetch(f"{server.url}/a", tmp_path / "a", "md5:0")
    assert list(tmp_path.iterdir()) == []


def test_transfer_that_never_gets_on_gives_up_and_keeps_what_it_has(server: Server, tmp_path: Path) -> None:
    server.files["/a"], server.cut = DATA, [1000, 0, 0, 0]
    with pytest.raises(DataError, match="can't be reached"):
        fetch(f"{server.url}/a", tmp_path / "a", md5(DATA))
    assert (tmp_path / "a.part").stat().st_size == 1000 and not (tmp_path / "a").exists()


def test_offline_and_absent_files_say_so(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="/none: the server answers 404"):
        fetch(f"{server.url}/none", tmp_path / "a", "md5:0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match=r"can't be reached .*connect this machine .* put the file at"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/a", tmp_path / "a", "md5:0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_download_unpacks_once(server: Server, tmp_path: Path, kind: str) -> None:
    members = (("VOCdevkit/VOC2012/Annotations/a.xml", b"<a/>"), ("VOCdevkit/VOC2012/b.txt", b""), ("other/c", b"c"))
    data = tar_of(*members) if kind == "tar" else zip_of(*members)
    server.files[f"/v.{kind}"] = data
    archive = Archive(f"{server.url}/v.{kind}", md5(data), "VOC2012", "VOCdevkit/VOC2012")
    lines: list[str] = []
    download((archive,), tmp_path / "data", log=lines.append)
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["data/VOC2012/Annotations/a.xml", "data/VOC2012/b.txt"]
    download((archive,), tmp_path / "data", log=lines.append)
    assert len(server.ranges) == 1 and lines[-1].endswith("is there already")


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link(name: str) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info, b"/etc/passwd"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_of(("in/a", b"a"), ("../evil", b"x")), "leads out of the folder"),
        (tar_of(("in/a", b"a"), ("in/../../evil", b"x")), "leads out of the folder"),
        (tar_of(("in/a", b"a"), ("/evil", b"x")), "leads out of the folder"),
        (zip_of(("in/a", b"a"), ("../evil", b"x")), "leads out of the folder"),
        (zip_of(("in/a", b"a"), ("in/..\\evil", b"x")), "leads out of the folder"),
        (tar_of(("in/a", b"a"), link("in/l", tarfile.SYMTYPE, "/etc")), "link or device"),
        (tar_of(("in/a", b"a"), link("in/l", tarfile.LNKTYPE, "in/a")), "link or device"),
        (tar_of(("in/a", b"a"), link("in/l", tarfile.CHRTYPE, "")), "link or device"),
        (zip_of(("in/a", b"a"), zip_link("in/l")), "link or device"),
        (tar_of(("in/a", b"a"), ("in/a", b"b")), "can't be unpacked"),
        (tar_of(("out/a", b"a")), "no folder 'in' in it"),
        (tar_of(("in/a", b"a" * 5000))[:3000], "can't be unpacked|cut off"),
        (zip_of(("in/a", DATA))[:-300], "can't be unpacked"),
        (b"nonsense", "can't be unpacked"),
        (b"", "can't be unpacked"),
    ],
    ids=itertools.count(),  # no bytes of archives: those of a zip tell the time, and workers must agree
)
def test_unsafe_archives_leave_nothing_behind(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "archive").write_bytes(data)
    with pytest.raises(DataError, match=message):
        unpack(tmp_path / "archive", tmp_path / "target" / "set", "in")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["archive", "target"]


def test_bombs_are_stopped_by_what_they_claim_and_by_what_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(zip_of(("in/a", bytes(2_000_000)), ("in/b", bytes(2_000_000))))
    monkeypatch.setattr(module, "LARGEST", 3_000_000)
    with pytest.raises(DataError, match="unpacks to more than"):
        unpack(path, tmp_path / "set", "in")
    monkeypatch.setattr(module, "LARGEST", 10**9)
    real = zip_of(("in/a", bytes(2_000_000)))
    lied = real.replace((2_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    assert lied != real
    path.write_bytes(lied)
    with pytest.raises(DataError):
        unpack(path, tmp_path / "set", "in")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_catalogue_has_a_checksum_for_every_file() -> None:
    for archives in DATASETS.values():
        assert len({archive.folder for archive in archives}) == len(archives)
        assert all(archive.checksum.startswith("md5:") and len(archive.checksum) == 36 for archive in archives)
