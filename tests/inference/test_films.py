"""Films and streams, from the disk and from a server."""

from __future__ import annotations

import json
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import cv2
import numpy as np
import pytest

from detection.data.records import DataError
from detection.inference import predict
from detection.inference.sources import open_source
from tests.inference.blobs import Blobs, film, scene


def test_video_in_video_out(tmp_path):
    path = film(tmp_path / "clip.mp4", "mp4v")
    source = open_source(str(path))
    assert len(source) == 9
    done = predict(Blobs(), source, tmp_path / "out", batch_size=4)
    assert done.images == 9 and done.counts["red"] == 9 and not done.problems
    document = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert document["images"][3]["file_name"] == "clip.mp4#3"
    lefts = [entry["bbox"][0] for entry in document["annotations"]]
    np.testing.assert_allclose(lefts, [5 * i + 4 for i in range(9)], atol=2)
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip_annotated.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    code = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").lower()
    said = [note for note in done.notes if "MPEG-4, which browsers don't play" in note]
    assert (code in (b"avc1", b"h264")) != bool(said) and (not said or code in (b"mp4v", b"fmp4"))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == 9 and frames[0].shape == (212, 320, 3)  # room for names, sides even


def test_video_is_h264_where_opencv_writes_it(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, path, code, fps, size):
            asked.append(int(code).to_bytes(4, "little"))

        def isOpened(self):  # noqa: N802
            return True

        def write(self, frame):
            asked.append(frame.shape)

        def release(self):
            pass

    asked = []
    path = film(tmp_path / "clip.mp4", "mp4v")
    monkeypatch.setattr(cv2, "VideoWriter", Writer, raising=True)
    Writer.fourcc = staticmethod(lambda *letters: int.from_bytes("".join(letters).encode(), "little"))
    done = predict(Blobs(), open_source(str(path)), tmp_path / "out", limit=2)
    assert asked == [b"avc1", (212, 320, 3), (212, 320, 3)] and not done.notes


def test_video_is_h264_by_pyav_where_opencv_does_not_write_it(tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason='needs pip install "detection[video]"')
    real, asked = cv2.VideoWriter, []

    def writer(path, code, *settings):
        asked.append(int(code).to_bytes(4, "little"))
        return real() if asked[-1] == b"avc1" else real(path, code, *settings)

    writer.fourcc = real.fourcc
    path = film(tmp_path / "clip.mp4", "mp4v")
    monkeypatch.setattr(cv2, "VideoWriter", writer)
    done = predict(Blobs(), open_source(str(path)), tmp_path / "out")
    assert asked == [b"avc1"] and not done.notes
    with av.open(str(tmp_path / "out" / "clip_annotated.mp4")) as made, av.open(str(path)) as given:
        stream = made.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12)
        frames = [frame.to_ndarray(format="rgb24") for frame in made.decode(video=0)]
        count = sum(1 for _ in given.decode(video=0))
    assert len(frames) == count == 9 and frames[0].shape == (212, 320, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 1  # the blob has moved

    monkeypatch.setitem(sys.modules, "av", None)
    done = predict(Blobs(), open_source(str(path)), tmp_path / "other", limit=1)
    assert asked[1:] == [b"avc1", b"mp4v"] and len(done.notes) == 1
    assert 'pip install "detection[video]"' in done.notes[0] and "browsers don't play" in done.notes[0]


@pytest.fixture
def server(tmp_path):
    """The address of a server of this machine: files, and pictures in a row as cameras send them."""
    folder = tmp_path / "served"
    folder.mkdir()
    film(folder / "clip.avi", "MJPG")
    film(folder / "clip.mp4", "mp4v")

    class Camera(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

        def do_GET(self):
            if not self.path.startswith("/live"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for i in range(6):
                image = scene(64, 96, (0, 5 * i + 4, 16, 5 * i + 28, 40))[..., ::-1]
                jpeg = cv2.imencode(".jpg", np.ascontiguousarray(image))[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                self.wfile.write(head.encode() + jpeg + b"\r\n")
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Camera) as opened:
        Thread(target=opened.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{opened.server_address[1]}"
        opened.shutdown()


@pytest.mark.parametrize("name", ["clip.avi", "clip.mp4"])
def test_films_of_a_server(server, tmp_path, name):
    done = predict(Blobs(), open_source(f"http://{server}/{name}"), tmp_path / "out")
    assert (done.images, done.counts) == (9, {"red": 9}) and not done.problems
    assert all("MPEG-4" in note for note in done.notes)
    assert (tmp_path / "out" / "clip_annotated.mp4").is_file()


def test_stream_says_that_it_ended_and_keeps_its_password(server, tmp_path):
    source = open_source(f"http://me:secret@{server}/live?token=secret")
    done = predict(Blobs(), source, tmp_path / "out")
    assert done.counts == {"red": 6} and not done.problems
    said = [note for note in done.notes if "MPEG-4" not in note]  # this OpenCV may have no H.264
    assert said == ["live: the stream ended or broke off after 6 frames"]
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("predictions.*"))
    assert "live#5" in written and "secret" not in written
    limited = predict(Blobs(), open_source(f"http://{server}/live"), tmp_path / "two", limit=2)
    assert limited.images == 2 and all("MPEG-4" in note for note in limited.notes)
    with pytest.raises(DataError, match=r"^http://127.0.0.1/none: there is no film or stream; OpenCV") as caught:
        open_source(f"http://me:secret@{server}/none?token=secret")
    assert "secret" not in str(caught.value)
