"""Push and pull against a server that keeps what it is sent, as the Hub's does; nothing leaves the machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from detection import fasterrcnn_efficientnet_lite0_fpn, load_detector, save_detector
from detection.__main__ import main as command
from detection.interop import CheckpointError
from detection.weights import read_saved

hub = pytest.importorskip("huggingface_hub", reason='needs pip install "detection[hub]"')
TOKEN = "hf_" + "s3cret" * 6
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.give(401, {"error": f"bad token {self.headers.get('Authorization')}"})
        if self.path == "/api/validate-yaml":
            return self.give(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.give(200, {"url": f"{self.server.address}/me/cells"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.give(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.address}/me/cells/commit/{COMMIT}"
        return self.give(200, {"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None, "success": True})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        name = self.path.rpartition("/")[2]
        if not self.path.startswith("/me/cells/resolve/main/") or name not in self.server.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.give(200, content, headers)

    def give(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.created, server.seen = {}, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Read from the environment when the package is imported, which other tests have done.
    for name, value in (("ENDPOINT", server.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(hub.constants, name, value)
    monkeypatch.setattr(
        hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    model = fasterrcnn_efficientnet_lite0_fpn(num_classes=3, weights_backbone=None, min_size=64, max_size=96)
    path = tmp_path_factory.mktemp("detector") / "d.safetensors"
    save_detector(path, model, ["cell", "nucleus"], [7, 9])
    return path


def test_what_is_pushed_is_pulled(server, file, tmp_path, capsys):
    evaluation = file.parent / "evaluation_val"
    evaluation.mkdir(exist_ok=True)
    figures = {"map": 0.4321, "map_50": 0.8, "map_large": -1.0}
    (evaluation / "figures.json").write_text(json.dumps({"figures": figures, "facts": {"data": "cells"}}))
    assert not command(["convert", "push", "--ckpt", str(file), "--repo", "me/cells", "--license", "apache-2.0"])
    assert server.created[0]["name"] == "cells" and "private" in str(server.created[0])
    assert set(server.files) == {"detector.safetensors", "README.md"}  # and nothing that could run
    card = server.files["README.md"].decode()
    for said in (
        "cell, nucleus",
        "| map | 0.4321 |",
        "split `val`",
        'license: "apache-2.0"',
        "| 64, 96 |",
        "## Limits",
    ):
        assert said in card, said
    assert "map_large" not in card and str(file.parent) not in card
    output = tmp_path / "back.safetensors"
    assert not command(["convert", "pull", "--repo", "me/cells", "--output", str(output)])
    mine, theirs = load_detector(file), load_detector(output)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())
    assert read_saved(output).class_names == ["cell", "nucleus"] and read_saved(output).category_ids == [7, 9]
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err + card and COMMIT in told.out


def test_refusals_say_what_to_do_and_never_the_token(server, file, tmp_path, monkeypatch):
    from detection.interop import hub as ours

    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 7)
    with pytest.raises(CheckpointError, match=r"log in with `hf auth login`, or set HF_TOKEN") as refused:
        ours.push(file, "me/cells")
    assert "hf_wrong" not in str(refused.value)
    with pytest.raises(CheckpointError, match=r"no such repository, revision or detector.safetensors"):
        ours.pull("me/absent", tmp_path / "d.safetensors")
    server.files["detector.safetensors"] = b"not one"
    with pytest.raises(CheckpointError, match=r"not a whole .safetensors file"):
        ours.pull("me/cells", tmp_path / "d.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"owner/name"):
        ours.pull("cells", tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match=r"written as .safetensors"):
        ours.pull("me/cells", tmp_path / "d.pth")


def test_offline_nobody_is_called(server, tmp_path, monkeypatch):
    from detection.interop import hub as ours

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"can't be reached.*HF_HUB_OFFLINE must not be set"):
        ours.pull("me/cells", tmp_path / "d.safetensors")
    assert server.seen == []


def test_without_the_package_the_install_is_named(monkeypatch, file):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "detection[hub]" in str(command(["convert", "push", "--ckpt", str(file), "--repo", "me/cells"]))
