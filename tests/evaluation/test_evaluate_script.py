"""`scripts/evaluate.py`: the figures that training logged, those of other data, and those of a results file."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import cv2
import lightning as L
import numpy as np
import pytest
import torch

from detection import Detector, maskrcnn_efficientnet_lite0_fpn
from detection.__main__ import main
from detection.cli.comparing import same_images
from detection.cli.convert import bring
from detection.cli.detected import of_file, of_run
from detection.cli.evaluate import evaluate
from detection.commit import code_version
from detection.data.coco import read_coco
from detection.data.datamodule import DetectionDataModule
from detection.data.records import DataError
from detection.data.writers import write_voc
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.significance import compare
from detection.models.masks import MaskHead
from detection.models.roi_heads import TwoFCHead
from detection.training.module import DetectionModule
from detection.training.optimisation import CosineSchedule
from tests.runs import ROOT, run_script

RESULT = "evaluation_mine_objects"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Mask R-CNN after six steps on twelve drawn images whose category ids have gaps, and what it logged."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image in range(12):
        pixels = rng.integers(0, 60, (96, 128, 3), np.uint8)
        for _ in range(3):
            (x, y), (w, h) = rng.integers(0, 60, 2).tolist(), rng.integers(12, 34, 2).tolist()
            category = int(rng.integers(2))
            pixels[y : y + h, x : x + w, category] = 230
            entry = {"image_id": 100 + image, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(entry | {"id": len(annotations) + 1, "category_id": (7, 90)[category]})
        cv2.imwrite(str(folder / f"{image}.png"), pixels)
        images.append({"id": 100 + image, "file_name": f"{image}.png", "height": 96, "width": 128})
    categories = [{"id": 7, "name": "blue"}, {"id": 90, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "objects.json").write_text(json.dumps(content))
    L.seed_everything(0)
    data = DetectionDataModule(
        str(folder),
        "coco",
        "objects.json",
        "objects.json",
        batch_size=4,
        num_workers=0,
        min_size=96,
        max_size=128,
        masks=True,
    )
    small = {"box_head": partial(TwoFCHead, out_channels=256), "mask_head": partial(MaskHead, layers=[32, 32])}
    detector = maskrcnn_efficientnet_lite0_fpn(num_classes=3, weights_backbone=None, box_score_thresh=0.0, **small)
    module = DetectionModule(detector, data.class_names, schedule=CosineSchedule(warmup_steps=1))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", num_sanity_val_steps=0, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    logged = {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items()}
    boxes = {f"bbox_{k}": v for k, v in logged.items() if k.startswith(("map", "mar"))}
    return folder, boxes | {k: v for k, v in logged.items() if k.startswith("segm_m")}


def run(*arguments):
    return run_script("evaluate", *arguments, cwd=ROOT)


@pytest.mark.slow
def test_figures_are_those_of_training(trained, pycoco):
    folder, logged = trained
    done = run("--ckpt", folder / "last.ckpt", "--accelerator", "cpu", "--batch_size", 5)
    assert done.returncode == 0, done.stderr
    out = folder / "evaluation_val"
    figures = json.loads((out / "figures.json").read_text())["figures"]
    assert logged["bbox_map_50"] > 0 and logged["segm_map_50"] > 0
    assert {name: figures[name] for name in logged} == pytest.approx(logged, abs=1e-6)
    # Training logs no figure for sizes that no object has.
    assert {figures[name] for name in figures.keys() - logged} <= {-1.0}
    for kind in ("bbox", "segm"):
        official = pycoco(str(folder / "objects.json"), str(out / f"detections_{kind}.json"), kind)["figures"]
        own = {name.removeprefix(f"{kind}_"): value for name, value in figures.items() if name.startswith(kind)}
        assert own == pytest.approx(official, abs=1e-6) and len(own) == 12
    assert f"report: {out / 'report.html'}" in done.stdout
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_the_report_names_the_code_that_trained(trained, tmp_path):
    content = torch.load(trained[0] / "last.ckpt", weights_only=True)
    assert content["code"] == code_version() != "unknown"
    torch.save(content | {"code": "0123abcdef, then 4567abcdef"}, trained[0] / "older.ckpt")
    evaluate(trained[0] / "older.ckpt", accelerator="cpu", batch_size=12, output=tmp_path)
    facts = json.loads((tmp_path / "figures.json").read_text())["facts"]
    assert (facts["code"], facts["evaluated with"]) == ("0123abcdef, then 4567abcdef", code_version())
    assert "code <b>0123abcdef, then 4567abcdef</b>" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_comparison_detects_once_and_reads_what_it_kept(trained, monkeypatch):
    folder, logged = trained
    first = of_run(folder / "last.ckpt", "val", [], None, "cpu", 5)
    assert "detected in 12 images" in first.notes[0] and first.masks and first.facts["code"] == code_version()
    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "predict", None)
        again = of_run(folder / "last.ckpt", "val", [], None, "cpu", 5)
    assert "read from" in again.notes[0]
    for run in (first, again):
        metric = MeanAP(run.class_names, run.limit, ("bbox", "segm"))
        metric.update([], [], run.results)
        figures = metric.compute()
        assert {name: figures[name] for name in logged} == pytest.approx(logged, abs=1e-6)
        assert run.load_image(run.results[0]).shape == (96, 128, 3)
    for one, other in zip(first.results, again.results, strict=True):
        assert np.array_equal(one.boxes, other.boxes) and np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.labels, other.labels) and len(one.masks) == len(other.masks) == len(one.labels)
    file = of_file(folder / "detections_val_last" / "detections_bbox.json", folder / "objects.json", None)
    (run,), (same,) = same_images([[again], [file]])
    found = compare([run.results], [same.results], run.class_names, draws=100)
    assert {row.difference for row in found.figures if not math.isnan(row.difference)} == {0.0}
    content = torch.load(folder / "last.ckpt", weights_only=True)
    torch.save(content | {"code": "0123abcdef"}, folder / "last.ckpt")  # another file: what was kept is not its
    assert "detected in 12 images" in of_run(folder / "last.ckpt", "val", [], None, "cpu", 12).notes[0]
    torch.save(content, folder / "last.ckpt")


def test_crowds_are_said_to_be_left_out(tmp_path, capsys):
    box = {"bbox": [5, 5, 20, 20], "area": 400, "image_id": 1, "category_id": 1}
    gt = {"images": [{"id": 1, "file_name": "a.png", "height": 60, "width": 60}]}
    gt |= {"categories": [{"id": 1, "name": "a"}]}
    gt["annotations"] = [box | {"id": i + 1, "iscrowd": int(i > 0)} for i in range(3)]
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    (tmp_path / "dt.json").write_text(json.dumps([box | {"score": 0.5}]))
    evaluate(results=tmp_path / "dt.json", annotations=tmp_path / "gt.json")
    printed = capsys.readouterr().out
    assert re.search(r"^map +1\.0000 +1 object$", printed, re.MULTILINE)
    assert "\n2 more objects are crowds, which COCO's protocol leaves out\n" in printed


def report_of(folder):
    return json.loads((folder / "figures.json").read_text())["figures"]


def elsewhere(trained, folder, ids=(5, 3)):
    """The same images and objects in another folder, whose file numbers and orders everything otherwise."""
    content = json.loads((trained / "objects.json").read_text())
    for image in content["images"]:
        (folder / "pictures").mkdir(exist_ok=True)
        shutil.copy(trained / image["file_name"], folder / "pictures")
        image["id"] += 2**40
    other = {7: ids[0], 90: ids[1]}
    for item in content["annotations"]:
        item |= {"image_id": item["image_id"] + 2**40, "category_id": other[item["category_id"]]}
    content["categories"] = [{"id": other[c["id"]], "name": c["name"]} for c in reversed(content["categories"])]
    content["categories"].append({"id": 99, "name": "red"})
    (folder / "other.json").write_text(json.dumps(content))
    return folder / "other.json"


@pytest.mark.slow
def test_other_data_needs_nothing_of_the_training_data(trained, pycoco, tmp_path):
    folder, logged = trained
    file = elsewhere(folder, tmp_path)
    ckpt = tmp_path / "moved.ckpt"
    shutil.copy(folder / "last.ckpt", ckpt)
    hidden = folder.with_name("hidden")
    folder.rename(hidden)  # the training data is not there
    try:
        with pytest.raises(DataError, match=r"the data of the training is not there .* as --root"):
            evaluate(ckpt, accelerator="cpu")
        done = run("--ckpt", ckpt, "--root", tmp_path, "--annotations", "other.json", "--images", "pictures",
                   "--accelerator", "cpu")  # fmt: skip
    finally:
        hidden.rename(folder)
    assert done.returncode == 0, done.stderr
    figures = report_of(tmp_path / "evaluation_other")
    assert {name: figures[name] for name in logged} == pytest.approx(logged, abs=1e-6)
    for kind in ("bbox", "segm"):
        path = tmp_path / "evaluation_other" / f"detections_{kind}.json"
        assert {entry["category_id"] for entry in json.loads(path.read_text())} == {3, 5}
        official = pycoco(str(file), str(path), kind)["figures"]
        own = {name.removeprefix(f"{kind}_"): value for name, value in figures.items() if name.startswith(kind)}
        assert own == pytest.approx(official, abs=1e-6)


@pytest.mark.rehearsal
def test_two_processes_give_the_figures_of_one(trained, tmp_path):
    folder, _ = trained
    found = []
    for devices in (1, 2):
        # Five a batch of twelve images: the shares of the processes are padded by an image that counts once.
        out = tmp_path / str(devices)
        done = run("--ckpt", folder / "last.ckpt", "--accelerator", "cpu", "--devices", devices, "--output", out,
                   "--batch_size", 5)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report:") == 1
        entries = json.loads((out / "detections_bbox.json").read_text())
        found.append(
            (report_of(out), sorted((e["image_id"], e["category_id"], *np.round(e["bbox"], 2)) for e in entries))
        )
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6) and found[0][0]["bbox_map_50"] > 0
    assert len(found[0][1]) == len(found[1][1])
    np.testing.assert_allclose(found[0][1], found[1][1], atol=0.02)


@pytest.mark.slow
def test_data_in_another_format(trained, tmp_path):
    folder, logged = trained
    index = read_coco(folder, "objects.json")
    write_voc(index, tmp_path, "final")
    done = run("--ckpt", folder / "last.ckpt", "--accelerator", "cpu", "--root", tmp_path, "--format", "voc", "--split",
               "final", "--output", tmp_path / "out", "--masks", "false")  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = report_of(tmp_path / "out")
    assert figures["map_50"] == pytest.approx(logged["bbox_map_50"], abs=1e-6)


@pytest.mark.slow
def test_a_checkpoint_of_other_loaders_takes_named_data_alone(trained, tmp_path):
    folder, _ = trained
    content = torch.load(folder / "last.ckpt", weights_only=True)
    content["datamodule_hyper_parameters"] = {"root": "elsewhere"}  # of a data module that is not ours
    torch.save({key: value for key, value in content.items() if key != "sums"}, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match="trained with loaders that can't be made again; name data: --annotations"):
        evaluate(tmp_path / "other.ckpt", accelerator="cpu")
    evaluate(tmp_path / "other.ckpt", annotations=folder / "objects.json", accelerator="cpu", batch_size=1)
    entries = json.loads((tmp_path / "evaluation_objects" / "detections_bbox.json").read_text())
    best = max((entry for entry in entries if entry["image_id"] == 103), key=lambda entry: entry["score"])
    found = Detector.from_checkpoint(tmp_path / "other.ckpt", "cpu")(folder / "3.png")  # in the model's own size, too
    x1, y1, x2, y2 = found.boxes[0].tolist()
    assert best["score"] == pytest.approx(float(found.scores[0]), abs=1e-5)
    assert best["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-2)


@pytest.mark.slow
def test_a_file_of_weights_alone_has_the_figures_of_its_run(trained, tmp_path, capsys):
    folder, file = trained[0], tmp_path / "mine.safetensors"
    bring(folder / "last.ckpt", file, certificate=False)
    data = {"root": folder, "annotations": Path("objects.json"), "accelerator": "cpu", "batch_size": 12}
    evaluate(folder / "last.ckpt", **data, output=tmp_path / "run")
    evaluate(file, **data)
    of_run, of_file = (json.loads((tmp_path / out / "figures.json").read_text()) for out in ("run", RESULT))
    assert of_file["figures"] == pytest.approx(of_run["figures"], abs=1e-6) and of_run["figures"]["bbox_map"] > 0
    assert "<title>Evaluation of mine.safetensors" in (tmp_path / RESULT / "report.html").read_text()
    write_voc(read_coco(folder, "objects.json"), tmp_path / "voc", "test")
    evaluate(file, root=tmp_path / "voc", split="test", accelerator="cpu", masks=False)
    assert (tmp_path / "evaluation_mine_test" / "figures.json").is_file()
    with pytest.raises(DataError, match=r"mine\.safetensors: .*not say what it was trained on; name data: --an"):
        evaluate(file, accelerator="cpu")
    said = str(main(["compare", str(file), str(folder / "last.ckpt")]))
    assert said.endswith(f"results file that `detection evaluate --ckpt {file} --root DATA` writes, with --gt")
    said = str(main(["suspects", str(file), "--split", "val"]))
    assert "a .safetensors file holds a detector, but not its run" in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({}, "name what to evaluate: --ckpt, a checkpoint, or --results"),
        ({"ckpt": "a", "results": "b"}, "name what to evaluate"),
        ({"results": "dets.json"}, "dets.json: name the COCO file"),
        ({"results": "nowhere.json", "annotations": "none.json"}, "none.json: the annotation file is missing"),
    ],
)
def test_what_is_missing_is_said(flags, sentence):
    with pytest.raises(DataError, match=re.escape(sentence)):
        evaluate(**{name: Path(value) for name, value in flags.items()})


@pytest.mark.slow
def test_copies_that_are_fused_have_the_figures_of_one(trained, tmp_path, capsys):
    folder, logged = trained
    shutil.copy(folder / "last.ckpt", folder / "copy.ckpt")
    paths = [folder / "last.ckpt", folder / "copy.ckpt"]
    evaluate(paths[0], accelerator="cpu", batch_size=12, output=tmp_path / "one")  # a batch of 4 rounds otherwise
    evaluate(paths, accelerator="cpu", batch_size=12, fuse="wbf", output=tmp_path)
    one, written = (json.loads((folder / "figures.json").read_text()) for folder in (tmp_path / "one", tmp_path))
    assert written["figures"] == pytest.approx(one["figures"], abs=1e-6)
    assert one["figures"]["bbox_map"] == pytest.approx(logged["bbox_map"], rel=0.01)
    assert written["facts"]["fused by"] == "wbf" and written["facts"]["checkpoint"].count(".ckpt") == 2
    assert f"bbox_map {one['figures']['bbox_map']:.4f}, segm_map" in capsys.readouterr().out


@pytest.mark.rehearsal
def test_the_ap_of_a_greedy_soup_is_that_of_its_file(trained, tmp_path, capsys):
    """The other ingredient scores objects low and background high."""
    folder, logged = trained
    content = torch.load(folder / "last.ckpt", weights_only=True)
    for name, value in content["state_dict"].items():
        if name.endswith("cls_score.weight"):
            value.neg_()
    torch.save(content, tmp_path / "worse.ckpt")
    paths = [str(tmp_path / "worse.ckpt"), str(folder / "last.ckpt")]
    assert main(["soup", *paths, "--greedy", "--accelerator", "cpu", "--output", str(tmp_path / "soup.ckpt")]) is None
    assert f"last.ckpt: AP {logged['segm_map']:.4f}" in capsys.readouterr().out
    soup = torch.load(tmp_path / "soup.ckpt", weights_only=True)["soup"]
    assert soup["kind"] == "greedy" and soup["of"] == paths and soup["images"].endswith(", val")
    evaluate(tmp_path / "soup.ckpt", accelerator="cpu", batch_size=12, output=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert written["figures"]["segm_map"] == pytest.approx(soup["ap"], abs=1e-6)
    assert written["facts"]["soup of"] == ", ".join(i["path"] for i in soup["ingredients"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"split": "minival"}, "the training data has no split 'minival', but val and test"),
        ({"images": Path("pictures")}, "--images goes with --annotations"),
        ({"format": "voc"}, "data of format voc needs --root"),
        ({"format": "yolo", "annotations": Path("x.json")}, "leave one of them out"),
        ({"annotations": Path("x.json")}, "x.json: the annotation file is missing"),
    ],
)
def test_data_that_is_named_badly_is_refused(trained, flags, sentence):
    with pytest.raises(DataError, match=re.escape(sentence)):
        evaluate(trained[0] / "last.ckpt", accelerator="cpu", **flags)


@pytest.mark.slow
def test_a_split_that_was_never_named_is_refused(trained):
    done = run("--ckpt", trained[0] / "last.ckpt", "--split", "test")
    assert done.returncode == 1
    assert "without naming a test split; use --split val" in done.stderr
    assert "Traceback" not in done.stderr
