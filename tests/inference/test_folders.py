"""Folders of images, damaged files among them, and what is written for them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from detection import save_detector
from detection.cli.predict import predict_in
from detection.data.records import DataError
from detection.inference import predict
from detection.inference.sources import open_source
from tests.inference.blobs import NAMES, Blobs, film, scene
from tests.runs import ROOT, rehearsed


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
@pytest.mark.parametrize("annotated", rehearsed([False, True], True))
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
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found.append({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()})
        said.append(done.stdout.replace(str(out), ""))
        assert done.stderr.count("6.png") == 1
    assert said[0] == said[1] and "6 images, 30 objects" in said[0]
    assert found[0].keys() == found[1].keys() and len(found[0]) == (10 if annotated else 8)
    different = [name for name in found[0] if found[0][name] != found[1][name]]
    assert different == []
