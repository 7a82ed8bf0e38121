"""The way of a newcomer, as the README has it: a VOC folder of 20 images -> trained -> a video -> ONNX."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data import scenes
from detection.data.coco import read_coco
from detection.data.images import read_image
from detection.data.voc import read_voc
from detection.data.writers import write_coco, write_voc

ROOT = Path(__file__).resolve().parents[1]


def call(script, *arguments):
    """Run a script as from the command line, without the ten seconds that each new process takes to import."""
    before = sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(
            str(ROOT / ("examples" if script == "run_exported.py" else "scripts") / script), run_name="__main__"
        )
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{script} ended with {end.code}")
    finally:
        sys.argv = before


def official_map(gt, dt):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(gt))
        evaluator = COCOeval(coco, coco.loadRes(dt), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats[:3].tolist()


@pytest.mark.rehearsal
def test_from_twenty_images_to_onnx(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')
    data = tmp_path / "my_data"
    drawn = scenes.draw(tmp_path / "scenes", train=16, val=4)
    for split, (file, images) in scenes.SPLITS.items():
        write_voc(read_coco(drawn, file, images), data, split)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTION_RUN_FOLDER", raising=False)
    call("check_data.py", "--root", data)
    small = ["--data.min_size", 96, "--data.max_size", 128, "--data.num_workers", 0, "--trainer.accelerator", "cpu"]
    small += ["--model.schedule.warmup_steps", 4, "--model.detector.box_score_thresh", 0.001]
    call("fit.py", "--data.root", data, "--name", "my_data", "--trainer.max_epochs", 6, "--data.batch_size", 4, *small)
    (ckpt,) = Path("runs/my_data").glob("*/best.ckpt")

    pictures = [read_image(path) for path in sorted((data / "JPEGImages").glob("val_*.jpg"))]
    height, width = pictures[0].shape[:2]
    film = cv2.VideoWriter("clip.mp4", cv2.VideoWriter.fourcc(*"mp4v"), 5.0, (width, height))
    for picture in pictures:
        film.write(np.ascontiguousarray(cv2.resize(picture, (width, height))[..., ::-1]))
    film.release()
    call("predict.py", "--ckpt", ckpt, "--source", "clip.mp4", "--output", "on_video", "--score_thresh", 0.05)
    assert len(json.loads(Path("on_video/predictions.json").read_text())["images"]) == 4
    assert Path("on_video/clip_annotated.mp4").stat().st_size > 0

    # The figures of evaluate.py are those of what predict.py writes.
    call("evaluate.py", "--ckpt", ckpt, "--accelerator", "cpu")
    figures = json.loads((ckpt.parent / "evaluation_val" / "figures.json").read_text())["figures"]
    pattern = str(data / "JPEGImages" / "val_*.jpg")
    call("predict.py", "--ckpt", ckpt, "--source", pattern, "--output", "on_val", "--score_thresh", 0,
         "--batch_size", 4, "--pictures", "false")  # fmt: skip
    index = read_voc(data, "val", read_voc(data, "train").classes)
    write_coco(index, Path("val.json"))
    found = json.loads(Path("on_val/predictions.json").read_text())
    names = {image["id"]: image["file_name"] for image in found["images"]}
    ids = {Path(record.file_name).name: record.image_id for record in index.records}
    for entry in found["annotations"]:
        entry["image_id"] = ids[names[entry["image_id"]]]
    assert len(found["annotations"]) > 20
    assert figures["map_50"] > 0
    wanted = [figures[name] for name in ("map", "map_50", "map_75")]
    assert official_map("val.json", found["annotations"]) == pytest.approx(wanted, abs=1e-6)

    call("export.py", "--ckpt", ckpt, "--output", "detector.onnx", "--images", data / "JPEGImages", "--count", 4)
    assert Path("detector.onnx").is_file()
