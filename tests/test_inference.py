"""Detection outside of training: any form of image, folders with damaged files, videos, tiles, and what is written."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection import maskrcnn_efficientnet_lite0_fpn, save_detector
from detection.cli.predict import predict_in
from detection.data import rle
from detection.data.augment import eval_transform
from detection.data.coco import read_coco
from detection.data.dataset import DetectionDataset, collate
from detection.data.records import DataError
from detection.data.spectral import RGB
from detection.inference import Detections, Detector, Tiles, predict
from detection.inference.run import detect_tiled
from detection.inference.sources import Listed, open_source
from detection.inference.tiles import shift_mask
from detection.training.module import encode_detections
from detection.weights import CheckpointError

NAMES = ("red", "blue")


class Blobs:
    """Stands for a detector: each red or blue region of a dark image is an object, its pixels the mask."""

    class_names, category_ids = NAMES, (7, 90)

    def predict(self, images, batch_size=8):
        return [self._find(image) for image in images]

    def _find(self, image):
        boxes, labels, scores, masks = [], [], [], []
        for label, channel in ((1, 0), (2, 2)):
            bright = np.ascontiguousarray(image[..., channel] > 128).astype(np.uint8)
            _, regions, stats, _ = cv2.connectedComponentsWithStats(bright)
            for number, (x, y, w, h, area) in enumerate(stats[1:].tolist(), start=1):
                boxes.append((x, y, x + w, y + h))
                labels.append(label)
                scores.append(min(0.99, 0.5 + area / 1e5))
                masks.append(rle.encode(regions == number))
        return Detections(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int64),
            np.array(scores, np.float32),
            NAMES,
            image.shape[:2],
            tuple(masks),
        )


def scene(height, width, *rectangles):
    image = np.full((height, width, 3), 30, np.uint8)
    for channel, x1, y1, x2, y2 in rectangles:
        image[y1:y2, x1:x2, channel] = 220
    return image


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return maskrcnn_efficientnet_lite0_fpn(
        num_classes=3, weights_backbone=None, box_score_thresh=0.0, box_detections_per_img=5, min_size=64, max_size=96
    )


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(scene(60, 80, (0, 10, 10, 30, 40))).save(folder / "a.png")
    Image.fromarray(scene(60, 80, (2, 50, 20, 70, 50), (0, 5, 5, 25, 25))).save(folder / "more" / "b.png")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def test_every_form_of_an_image_gives_the_same(model, tmp_path):
    detector = Detector(model, NAMES)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), planes, planes / 255]
    first = detector(pixels)
    assert len(first) == 5 and first.names[0] in NAMES and first.size == (60, 80)
    assert (np.diff(first.scores) <= 0).all()
    for form in forms:
        other = detector(form)
        np.testing.assert_array_equal(other.boxes, first.boxes)
        assert other.masks == first.masks


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"\(H, W, 3\) uint8"),
        (np.zeros((4, 4, 3)), r"\(H, W, 3\) uint8"),
        (torch.zeros(4, 4, 3), r"must be \(3, H, W\)"),
        (torch.full((3, 4, 4), 255.0), r"in \[0, 1\]"),
    ],
)
def test_no_image_is_said_to_be_none(model, image, message):
    with pytest.raises(ValueError, match=message):
        Detector(model, NAMES)(image)


def test_detections_are_those_of_the_evaluation_pipeline(model, tmp_path):
    rng = np.random.default_rng(0)
    images = []
    for i, (height, width) in enumerate([(60, 80), (90, 50), (64, 64)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    dataset = DetectionDataset(read_coco(tmp_path, "a.json", ""), eval_transform(64, 96))
    batch = collate([dataset[i] for i in range(3)])
    with torch.no_grad():
        wanted = encode_detections(model.for_inference().run(batch, False, True)[1], batch)
    found = Detector(model, NAMES).predict([tmp_path / f"{i}.png" for i in range(3)])
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours.boxes, theirs["boxes"].numpy())
        np.testing.assert_array_equal(ours.scores, theirs["scores"].numpy())
        assert list(ours.masks) == theirs["masks"]


def test_a_file_brings_its_class_names(model, tmp_path):
    save_detector(tmp_path / "d.safetensors", model, NAMES, (7, 90))
    detector = Detector.from_checkpoint(tmp_path / "d.safetensors")
    pixels = scene(60, 80, (0, 10, 10, 30, 40))
    assert detector.class_names == NAMES and detector.category_ids == (7, 90)
    np.testing.assert_allclose(detector(pixels).boxes, Detector(model, NAMES)(pixels).boxes, atol=1e-3)
    save_detector(tmp_path / "nameless.safetensors", model)
    with pytest.raises(CheckpointError, match="does not name its classes"):
        Detector.from_checkpoint(tmp_path / "nameless.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Detector.from_checkpoint(tmp_path / "none.ckpt")


def test_half_precision_finds_boxes_in_float32(model):
    found = Detector(model, NAMES, precision="bf16")(scene(60, 80, (0, 10, 10, 30, 40)))
    assert found.boxes.dtype == np.float32 and np.isfinite(found.boxes).all()


def test_filters_and_coco():
    found = Blobs()._find(scene(60, 80, (0, 10, 10, 30, 40), (2, 50, 20, 70, 50), (0, 1, 1, 4, 4)))
    assert found.names == ["red", "red", "blue"]
    assert found.of(["blue"]).boxes.tolist() == [[50, 20, 70, 50]]
    assert len(found.above(0.505)) == 2 and len(found.above(1)) == 0
    with pytest.raises(ValueError, match=r"no class 'green'.*red, blue"):
        found.of(["green"])
    entry = found.of(["blue"]).to_coco(3, (7, 90))[0]
    assert (entry["image_id"], entry["category_id"], entry["bbox"]) == (3, 90, [50, 20, 20, 30])
    assert mask_api.area(entry["segmentation"]) == 600
    assert found.bitmaps().sum(axis=(1, 2)).tolist() == [9, 600, 600]


@pytest.mark.parametrize(("size", "drawn"), [((60, 80), (320, 240)), ((400, 300), (300, 400))])
def test_pictures_have_room_for_names(size, drawn):
    found = Detections(np.array([[5, 5, 40, 30]], np.float32), np.array([1]), np.array([0.9]), tuple(NAMES), size)
    picture = found.draw(np.zeros((*size, 3), np.uint8))
    assert picture.size == drawn  # width and height: its own where a name can be read


def test_supervision_gets_boxes_masks_and_names():
    supervision = pytest.importorskip("supervision", reason='needs pip install "detection[supervision]"')
    found = Blobs()._find(scene(60, 80, (0, 10, 10, 30, 40), (2, 50, 20, 70, 50)))
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert theirs.xyxy.tolist() == found.boxes.tolist() and theirs.class_id.tolist() == [0, 1]
    assert theirs.data["class_name"].tolist() == ["red", "blue"] and theirs.mask.sum() == 1200
    assert len(found.above(1).to_supervision()) == 0


def test_without_supervision_the_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install .*supervision"):
        Blobs()._find(scene(8, 8)).to_supervision()


def test_folder_gives_pictures_json_and_csv(photos, tmp_path):
    out = tmp_path / "out"
    done = predict(Blobs(), open_source(str(photos)), out, classes=["red"], batch_size=2)
    assert (done.images, done.counts) == (2, {"red": 2})
    assert len(done.problems) == 1 and "damaged.jpg" in done.problems[0]
    coco = COCO()
    coco.dataset = document = json.loads((out / "predictions.json").read_text())
    coco.createIndex()
    assert [image["file_name"] for image in document["images"]] == ["a.png", "more/b.png"]
    assert [entry["category_id"] for entry in coco.loadAnns(coco.getAnnIds())] == [7, 7]
    assert len(coco.loadRes(document["annotations"]).getAnnIds()) == 2
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [(row["image"], row["class"], row["x1"]) for row in rows] == [
        ("a.png", "red", "10.00"),
        ("more/b.png", "red", "5.00"),
    ]
    picture, photo = Image.open(out / "annotated" / "a.png"), Image.open(photos / "a.png")
    assert max(picture.size) == 320  # room for names
    changed = np.array(picture) != np.array(photo.resize(picture.size, Image.Resampling.BILINEAR))
    assert changed.any()
    assert not changed[50 * picture.height // photo.height :].any()  # far from the object


def test_sources(photos):
    assert len(open_source(str(photos / "**" / "*.png"))) == 2
    assert len(open_source(str(photos / "a.png"))) == 1
    assert [name for name, _ in open_source(str(photos / "more" / "b.png"))] == ["b.png"]
    with pytest.raises(DataError, match="no such file"):
        open_source(str(photos / "*.gif"))
    (photos / "empty").mkdir()
    with pytest.raises(DataError, match="no image in this folder"):
        open_source(str(photos / "empty"))
    (photos / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"clip.mp4: not a readable video"):
        open_source(str(photos / "clip.mp4"))


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


def test_folder_leaves_out_what_is_no_input_and_says_so(photos, tmp_path):
    (photos / ".cache").mkdir()
    for hidden in (photos / ".cache" / "a.png", photos / "._a.png"):
        Image.fromarray(scene(60, 80)).save(hidden)
    for name in ("b.heic", "a.heic", "c.psd", "d.mp4"):
        (photos / name).write_bytes(b"something")
    for out in (photos, photos / "results", photos / "more"):  # into and below the source, again and again
        source = open_source(str(photos))
        done = predict(Blobs(), source, out)
        assert done.images == 2
        document = json.loads((out / "predictions.json").read_text())
        assert [image["file_name"] for image in document["images"]] == ["a.png", "more/b.png"]
        assert (out / "annotated" / "more" / "b.png").is_file()
    assert len(open_source(str(photos / "**" / "*.png"))) == 2
    said = "\n".join(done.notes)
    assert f"not read: {photos}: 2 .heic files: a.heic, b.heic; export them as JPEG" in said
    assert "1 .psd files: c.psd" in said and "1 .mp4 files: d.mp4; name each as --source" in said
    assert f"not read: {photos / 'results' / 'annotated'}: pictures of an earlier run" in said
    assert "notes.txt" not in said and ".cache" not in said


def test_a_folder_called_annotated_is_read_where_no_run_made_it(photos):
    (photos / "annotated").mkdir()
    Image.fromarray(scene(60, 80)).save(photos / "annotated" / "c.png")
    assert len(open_source(str(photos))) == 4
    (photos / "annotated" / "c.png").unlink()


def test_frames_are_noted_and_odd_kinds_are_drawn_as_png(tmp_path):
    frames = [Image.fromarray(scene(60, 80, (0, 10 + i, 10, 30, 40))) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    done = predict(Blobs(), open_source(str(tmp_path / "a.gif")), tmp_path / "out")
    assert done.counts == {"red": 1} and not done.problems
    assert done.notes == [f"{tmp_path / 'a.gif'}: only the first of 3 frames is read"]
    assert Image.open(tmp_path / "out" / "annotated" / "a.gif.png").format == "PNG"


def test_huge_pictures_are_looked_at_in_tiles(photos, tmp_path, monkeypatch):
    class Near(Blobs):
        form = RGB
        min_size, seen = 100, []

        def predict(self, images, batch_size=8):
            assert len(images) <= batch_size
            self.seen += [image.shape[:2] for image in images]
            return super().predict(images)

    rectangles = [(0, 70, 30, 95, 60), (2, 120, 90, 150, 120)]
    Image.fromarray(scene(150, 200, *rectangles)).save(photos / "aerial.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14_000)
    for module in ("data.images", "inference.run"):
        monkeypatch.setattr(f"detection.{module}.LARGEST", 20_000)
    monkeypatch.setattr("detection.inference.run.DRAWN", 120)
    done = predict(Near(), open_source(str(photos)), tmp_path / "out", batch_size=3)
    assert done.images == 3 and done.counts == {"red": 3, "blue": 2}
    assert Near.seen == [(60, 80), (100, 100)] + [(100, 100)] * 5 + [(60, 80)]
    (note,) = done.notes
    assert note.startswith("aerial.tif: 150 x 200 pixels (height x width), looked at in tiles of 100")
    assert Image.open(tmp_path / "out" / "annotated" / "aerial.tif").size == (120, 90)
    document = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sorted(entry["bbox"] for entry in document["annotations"])[3:] == [[70, 30, 25, 30], [120, 90, 30, 30]]
    with pytest.raises(DataError, match=r"aerial.tif: 150x200 pixels .* too many"):
        Detector.predict(Near(), [photos / "aerial.tif"])


def film(path, codec, count=9):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 12.0, (96, 64))
    for i in range(count):
        writer.write(np.ascontiguousarray(scene(64, 96, (0, 5 * i + 4, 16, 5 * i + 28, 40))[..., ::-1]))
    writer.release()
    return path


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


def test_limit_and_interruption_leave_whole_files(photos, tmp_path):
    assert predict(Blobs(), open_source(str(photos)), tmp_path / "one", limit=1, pictures=False).images == 1
    assert not (tmp_path / "one" / "annotated").exists()

    class Tired(Blobs):
        def predict(self, images, batch_size=8):
            if images[0][20, 60, 2] > 128:
                raise KeyboardInterrupt
            return super().predict(images)

    done = predict(Tired(), open_source(str(photos)), tmp_path / "out", batch_size=1)
    assert done.images == 1 and "interrupted after 1" in done.problems[0]
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]) == 1


def test_windows_cover_the_image_with_overlap():
    for height, width in [(100, 100), (250, 999), (101, 100), (333, 70)]:
        seen = np.zeros((height, width), int)
        windows = Tiles(100, 0.2).windows(height, width)
        for x1, y1, x2, y2 in windows:
            seen[y1:y2, x1:x2] += 1
            assert x2 - x1 == min(100, width) and y2 - y1 == min(100, height)
        assert seen.min() == 1
        starts = sorted({x for x, *_ in windows})
        assert all(b - a <= 80 for a, b in zip(starts, starts[1:], strict=False))
    with pytest.raises(ValueError, match="tiles of 0 pixels"):
        Tiles(0)


@pytest.mark.parametrize(
    "rectangles",
    [
        [(0, 70, 30, 95, 60)],  # across the border of two tiles, whole in neither or one
        [(0, 20, 20, 60, 60), (2, 65, 65, 95, 95)],  # across a corner of four
        [(0, 10, 40, 190, 60)],  # longer than a tile
        [(0, 85, 10, 95, 20), (0, 85, 24, 95, 34)],  # two neighbours inside the overlap
        [(0, 0, 0, 200, 150)],  # everything
        [(0, 78, 10, 82, 40), (0, 84, 10, 100, 40), (2, 100, 10, 120, 40)],
    ],
)
def test_objects_on_tile_borders_are_found_once_and_whole(rectangles):
    image = scene(150, 200, *rectangles)
    found = detect_tiled(Blobs(), image, Tiles(100, 0.25))
    whole = Blobs()._find(image)
    order = np.lexsort(found.boxes.T)
    assert found.boxes[order].tolist() == whole.boxes[np.lexsort(whole.boxes.T)].tolist()
    assert found.size == (150, 200)
    masks = found.bitmaps()[order]
    np.testing.assert_array_equal(masks, whole.bitmaps()[np.lexsort(whole.boxes.T)])


def test_mask_of_a_window_moves():
    mask = np.random.default_rng(0).random((20, 30)) > 0.5
    mask[:, 4:7] = True
    for corner, size in [((5, 7), (40, 50)), ((0, 0), (20, 30)), ((20, 0), (20, 50))]:
        laid = np.zeros(size, bool)
        laid[corner[1] : corner[1] + 20, corner[0] : corner[0] + 30] = mask
        moved = shift_mask(rle.encode(mask), corner, size)
        np.testing.assert_array_equal(mask_api.decode(moved), laid)
        assert moved["counts"] == rle.encode(laid)["counts"]


def test_script_says_what_is_wrong(model, tmp_path, photos, capsys):
    save_detector(tmp_path / "d.safetensors", model, NAMES)
    with pytest.raises(DataError, match="no class 'green'"):
        predict_in(tmp_path / "d.safetensors", str(photos), classes=["green"])
    with pytest.raises(DataError, match="--device cuda:1 is one device, but 4 are to share"):
        predict_in(tmp_path / "d.safetensors", str(photos), device="cuda:1", devices=2, num_nodes=2)
    with pytest.raises(DataError, match=r"a video or a stream stays on one device: leave --devices"):
        predict_in(tmp_path / "d.safetensors", str(film(tmp_path / "clip.mp4", "mp4v")), devices=2)
    predict_in(tmp_path / "d.safetensors", str(photos), tmp_path / "out", score_thresh=0.0, device="cpu")
    shown = capsys.readouterr()
    assert "2 images, 10 objects: " in shown.out and "damaged.jpg" in shown.err
    predict_in(tmp_path / "d.safetensors", str(photos), tmp_path / "none", score_thresh=1.0, device="cpu")
    assert "2 images, 0 objects of score 1 or more (--score_thresh lowers that)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("annotated", [False, True])
def test_two_processes_write_what_one_writes(model, tmp_path, annotated):
    """Seven images of different sizes, the last unreadable, in batches of two: shares of four and three files."""
    save_detector(tmp_path / "d.safetensors", model, NAMES)
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    sizes = [(60, 80), (50, 90), (64, 64), (40, 70), (33, 47), (60, 60), (70, 50)]
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "6.png").write_bytes(b"no image")
    entries = [{"id": f"x{i}", "file_name": f"{i}.png", "width": w, "height": h} for i, (h, w) in enumerate(sizes)]
    info = {"images": [*entries[5::-1], entries[6], entries[0] | {"id": "again"}]}
    info["categories"] = [{"id": 3, "name": "blue"}, {"id": 1, "name": "red"}]
    (tmp_path / "info.json").write_text(json.dumps(info))
    flags = ["--ckpt", tmp_path / "d.safetensors", "--source", folder, "--device", "cpu", "--batch_size", 2]
    flags += ["--score_thresh", 0, *(["--annotations", tmp_path / "info.json"] if annotated else [])]
    found, said = [], []
    for devices in (1, 2):
        out = tmp_path / f"out{devices}"
        command = [sys.executable, "scripts/predict.py", *map(str, flags), "--output", out, "--devices", str(devices)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
        assert done.returncode == 0, done.stderr
        found.append({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()})
        said.append(done.stdout.replace(str(out), ""))
        assert done.stderr.count("6.png") == 1
    assert said[0] == said[1] and "6 images, 30 objects" in said[0]
    assert found[0].keys() == found[1].keys() and len(found[0]) == (10 if annotated else 8)
    different = [name for name in found[0] if found[0][name] != found[1][name]]
    assert different == []


def listed(tmp_path, ids=("b", "a"), categories=((3, "blue"), (12, "other"), (1, "red"))):
    """Two pictures, a file that lists them without objects, as of a test set, and one with the objects."""
    folder = tmp_path / "test"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(scene(60, 80, (0, 10, 10, 30, 40))).save(folder / "one.png")
    Image.fromarray(scene(60, 80, (2, 50, 20, 70, 50), (0, 5, 5, 25, 25))).save(folder / "more" / "two.png")
    files = zip(ids, ("one.png", "more/two.png"), strict=True)
    info = {"images": [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in files]}
    info["categories"] = [{"id": i, "name": name} for i, name in categories]
    number = {name: i for i, name in categories}
    objects = ((0, "red", [10, 10, 20, 30]), (1, "blue", [50, 20, 20, 30]), (1, "red", [5, 5, 20, 20]))
    annotations = [
        {
            "id": k + 1,
            "image_id": ids[i],
            "category_id": number.get(name, 0),
            "bbox": b,
            "area": b[2] * b[3],
            "iscrowd": 0,
        }
        for k, (i, name, b) in enumerate(objects)
    ]
    (tmp_path / "image_info.json").write_text(json.dumps(info))
    (tmp_path / "instances.json").write_text(json.dumps(info | {"annotations": annotations}))
    return folder


@pytest.mark.parametrize("ids", [("b", "a"), (9, 2), (2**63 + 5, 2**63 + 1), ("007", "7b")])
def test_a_test_set_is_predicted_under_its_own_ids(tmp_path, ids):
    folder = listed(tmp_path, ids)
    done = predict(Blobs(), Listed(tmp_path / "image_info.json", folder), tmp_path / "out", 0.0)
    assert done.images == 2 and not done.left_out and not done.problems
    truth = COCO(str(tmp_path / "instances.json"))
    found = truth.loadRes(str(tmp_path / "out" / "detections_bbox.json"))
    scores = COCOeval(truth, found, "bbox")
    scores.evaluate(), scores.accumulate(), scores.summarize()
    assert scores.stats[0] == pytest.approx(1.0, abs=1e-12)
    masks = json.loads((tmp_path / "out" / "detections_segm.json").read_text())
    assert len(masks) == 3 and set(masks[0]) == {"image_id", "category_id", "segmentation", "score"}
    whole = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["id"] for image in whole["images"]] == [*ids]
    assert {c["id"]: c["name"] for c in whole["categories"]} == {1: "red", 3: "blue", 12: "other"}


def test_an_image_listed_twice_is_exported_under_both_ids(tmp_path):
    folder = listed(tmp_path)
    info = json.loads((tmp_path / "image_info.json").read_text())
    info["images"].append(info["images"][0] | {"id": "again"})
    (tmp_path / "image_info.json").write_text(json.dumps(info))
    done = predict(Blobs(), Listed(tmp_path / "image_info.json", folder), tmp_path / "out", 0.0)
    entries = json.loads((tmp_path / "out" / "detections_bbox.json").read_text())
    assert done.images == 2 and sorted(entry["image_id"] for entry in entries) == ["a", "a", "again", "b"]


def test_a_class_that_the_test_set_lacks_is_counted(tmp_path):
    folder = listed(tmp_path, categories=((3, "blue"), (12, "other")))
    done = predict(Blobs(), Listed(tmp_path / "image_info.json", folder), tmp_path / "out", 0.0)
    assert done.left_out == {"red": 2} and done.counts == {"red": 2, "blue": 1}
    entries = json.loads((tmp_path / "out" / "detections_bbox.json").read_text())
    assert [entry["category_id"] for entry in entries] == [3]


def broken(info, where, **values):
    return info | {where: [info[where][0] | values, *info[where][1:]]}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda info: broken(info, "images", file_name="none.png"), "1 of its 2 images are not in"),
        (lambda info: broken(info, "images", file_name="../image_info.json"), "is not inside"),
        (lambda info: broken(info, "images", file_name=None), "image b: it has no file_name"),
        (lambda info: broken(info, "images", id=None), "entry 0 of 'images' has no id"),
        (lambda info: broken(info, "images", id=1.5), "entry 0 of 'images' has no id that is a whole number or text"),
        (lambda info: broken(info, "images", id="a"), "two entries of 'images' have the id 'a'"),
        (lambda info: {"images": info["images"]}, "'categories' is missing"),
        (lambda info: info | {"images": []}, "it lists no image"),
        (lambda info: [info], "holds a list, not an object"),
    ],
)
def test_a_test_set_that_can_not_be_used_is_refused(tmp_path, spoil, sentence):
    folder = listed(tmp_path)
    info = json.loads((tmp_path / "image_info.json").read_text())
    (tmp_path / "image_info.json").write_text(json.dumps(spoil(info)))
    with pytest.raises(DataError, match=re.escape(sentence)):
        Listed(tmp_path / "image_info.json", folder)


def test_a_test_set_of_other_classes_is_refused(tmp_path):
    folder = listed(tmp_path, categories=((3, "cat"), (12, "dog")))
    with pytest.raises(DataError, match=r"none of the detector's classes \(red, blue\) .* \(cat, dog\)"):
        predict(Blobs(), Listed(tmp_path / "image_info.json", folder), tmp_path / "out")


def test_detections_of_one_image_draw_themselves_in_a_notebook():
    pixels = scene(60, 80)
    model = maskrcnn_efficientnet_lite0_fpn(num_classes=3, weights_backbone=None, box_score_thresh=0.0)
    kept = Detector(model, NAMES, min_size=64, max_size=64, device="cpu")(pixels)
    assert (kept.pixels == pixels).all() and kept._repr_png_().startswith(b"\x89PNG")
    found = replace(Blobs().predict([pixels])[0], pixels=pixels)
    shown = Image.open(BytesIO(found._repr_png_()))
    assert shown.size == (320, 240)
    assert (np.asarray(shown) == np.asarray(found.draw(pixels, side=320))).all()
    assert found.above(2.0).pixels is pixels and replace(found, pixels=None)._repr_png_() is None
    with pytest.raises(ValueError, match="don't keep their image"):
        replace(found, pixels=None).draw()
