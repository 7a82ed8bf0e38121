"""What a run shows: W&B's own record of it read back, faults of W&B, proposals against pycocotools, samples."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import wandb
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from detection.batch import Target
from detection.cli.fit import RUN_FOLDER, main
from detection.data import rle, scenes
from detection.evaluation.results import image_result
from detection.matching import BalancedSampler
from detection.training import loggers
from detection.training.loggers import MetricsFile, Tracker
from detection.training.proposal_figures import CountingSampler, proposal_result, recalled
from detection.training.tracking import (
    Tracking,
    class_rows,
    overlays,
    same_size,
)
from tests.runs import scene_flags

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 32768


def records(path: Path) -> Iterator[Record]:
    """W&B's messages in a run's file, which is framed as LevelDB's log: header, then parts that don't cross blocks."""
    data, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or last part
            yield Record.FromString(message)
            message = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of all parts of a run."""
    wandb.teardown()  # its process writes behind us
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("wandb/*run-*/*.wandb")):
        for record in records(path):
            if record.HasField("history"):
                rows.append({})
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                place = rows[-1]
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
    return rows


def media(folder: Path, value: dict[str, Any]) -> Any:
    (path,) = folder.glob(f"wandb/*run-*/files/{value['path']}")
    return json.loads(path.read_text()) if path.suffix == ".json" else path


@pytest.fixture(autouse=True)
def _wandb_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B without a key, with its own folders, and gone afterwards."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb_own"))
    yield
    wandb.teardown()
    os.environ.pop("WANDB_ERROR_REPORTING", None)
    os.environ.pop(RUN_FOLDER, None)


SMALL = [
    *("--data.num_workers", "0", "--data.min_size", "64", "--data.batch_size", "4"),
    *("--model.detector.fpn_channels", "16", "--model.detector.weights_backbone", "null"),
    *("--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.num_sanity_val_steps", "0"),
]


SHOWN = [
    *("--wandb_project", "birds", "--wandb_entity", "team", "--wandb_group", "ablation"),
    *("--wandb_tags", "[baseline, night]", "--wandb_notes", "none", "--wandb_name", "first try"),
]


@pytest.mark.slow
def test_a_run_is_recorded_whole_and_goes_on_as_the_same_run(tmp_path: Path) -> None:
    data = scenes.draw(tmp_path / "scenes", train=8, val=3)
    flags = ["--config", "quickstart", *scene_flags(data), "--output", str(tmp_path / "runs"), *SMALL]
    assert main([*flags, "--trainer.max_epochs", "1", "--log_model", "true", *SHOWN]) == 0
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    (first,) = folder.glob("wandb/offline-run-*/*.wandb")
    check_figures(folder)
    check_media(folder, data)
    check_checkpoint_and_configuration(folder, data, list(records(first)))
    assert main(["--resume", str(folder), "--trainer.max_epochs", "2"]) == 0
    runs = [
        record.run.run_id
        for path in folder.glob("wandb/*run-*/*.wandb")
        for record in records(path)
        if record.HasField("run")
    ]
    assert len(runs) == 2 and len(set(runs)) == 1
    assert [row["trainer/global_step"] for row in history(folder)] == [0, 1, 2, 3]
    assert {path.name for path in (folder / "plots").iterdir()} >= {
        "curves.png",
        "precision_recall.png",
        "confusion.png",
    }


def check_figures(folder: Path) -> None:
    rows = history(folder)
    assert [row["_step"] for row in rows] == [row["trainer/global_step"] for row in rows] == [0, 1]
    needed = {"train/loss", "train/loss_objectness", "lr", "images/s", "time/data", "memory/process_gib"}
    needed |= {"train/foreground_rpn", "train/foreground_roi_heads"}
    assert all(needed <= set(row) for row in rows)
    assert all(0 < row["train/foreground_roi_heads"] <= 32 for row in rows)  # a quarter of 128
    with (folder / "metrics.csv").open(newline="") as file:
        written = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
    validated = {key: value for key, value in written.items() if key.startswith("val/")}
    assert {"val/map", "val/map_50", "val/map_75", "val/mar_1", "val/mar_10", "val/mar_100"} <= set(validated)
    assert {f"val/proposals_ar_{limit}" for limit in (100, 300, 1000)} <= set(validated)
    assert {key: rows[-1][key] for key in validated} == pytest.approx(validated)


def check_media(folder: Path, data: Path) -> None:
    row = history(folder)[-1]
    table = media(folder, row["val/classes"])
    assert table["columns"] == ["class", "AP", "AP50", "AP75", "objects", "detections"]
    assert {line[0]: line[1] for line in table["data"] if line[1] is not None} == pytest.approx(
        {key.removeprefix("val/ap/"): value for key, value in row.items() if key.startswith("val/ap/")}
    )
    assert "curves/precision_recall_table" in row, sorted(row)
    for name in ("precision_recall", "confusion"):
        assert media(folder, row[f"plots/{name}"]).stat().st_size > 1000
    truth = COCO(data / scenes.SPLITS["val"][0])
    assert row["val/images"]["count"] == 3
    names = {category["id"]: category["name"] for category in truth.loadCats(truth.getCatIds())}
    for image, caption, boxes in zip(
        truth.loadImgs(truth.getImgIds()), row["val/images"]["captions"], row["val/images"]["all_boxes"], strict=True
    ):
        assert Path(caption).name == Path(image["file_name"]).name
        shown = media(folder, boxes["ground_truth"])["box_data"]
        annotated = truth.loadAnns(truth.getAnnIds(image["id"]))
        corners = [[box["position"][side] for side in ("minX", "minY", "maxX", "maxY")] for box in shown]
        expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotated)]
        np.testing.assert_allclose(np.reshape(corners, (-1, 4)), np.reshape(expected, (-1, 4)), atol=1e-3)
        assert [box["box_caption"] for box in shown] == [names[a["category_id"]] for a in annotated]
        assert all(box["domain"] == "pixel" for box in shown)
        for box in media(folder, boxes["predictions"])["box_data"]:
            assert box["scores"]["score"] >= 0.05 and box["box_caption"].endswith(f"{box['scores']['score']:.2f}")


def check_checkpoint_and_configuration(folder: Path, data: Path, kept: list[Record]) -> None:
    (artifact,) = [r.artifact for r in kept if r.HasField("artifact") and r.artifact.type == "model"]
    assert set(artifact.aliases) == {"best", "latest"}
    (entry,) = artifact.manifest.contents
    digest = base64.b64encode(hashlib.md5((folder / "best.ckpt").read_bytes()).digest()).decode()
    assert (entry.path, entry.digest) == ("best.ckpt", digest)
    (run,) = [record.run for record in kept if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["data"]["batch_size"], config["model"]["optimizer"]["class_path"]) == (4, "torch.optim.AdamW")
    assert (run.project, run.entity, run.run_group, run.display_name) == ("birds", "team", "ablation", "first try")
    assert (list(run.tags), run.notes) == (["baseline", "night"], "none")
    facts = {r.artifact.type: r.artifact for r in kept if r.HasField("artifact")}
    assert [entry.path for entry in facts["config"].manifest.contents] == ["config.yaml"]
    counts = json.loads(facts["dataset"].metadata)
    assert (counts["train"]["images"], counts["val"]["images"]) == (8, 3)
    truth = json.loads((data / scenes.SPLITS["val"][0]).read_text())
    assert counts["val"]["objects"] == sum(counts["val"]["per_class"].values()) == len(truth["annotations"])
    summary = {
        item.key: json.loads(item.value_json) for r in kept if r.HasField("summary") for item in r.summary.update
    }
    assert summary["best/map"] == pytest.approx(history(folder)[-1]["val/map"]) and summary["best/step"] == 2
    (end,) = [record.exit for record in kept if record.HasField("exit")]
    assert end.exit_code == 0


class Logging(BoringModel):
    """Lightning's small model, with a figure each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.log("loss", output["loss"])
        return output


def train(folder: Path, tracker: Tracker, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {"max_steps": 6, "log_every_n_steps": 1, "limit_val_batches": 0, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(logger=[MetricsFile(folder), tracker], **settings | quiet | options)
    trainer.fit(Logging())
    return trainer


def test_an_error_in_wandb_is_one_warning_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fails(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) > 2:
            raise BrokenPipeError("the service is gone")

    tracker = Tracker("offline", tmp_path / "a" / "b")
    monkeypatch.setattr(type(tracker.experiment), "log", fails)
    trainer = train(tmp_path, tracker)
    assert trainer.global_step == 6 and len(calls) == 3  # and not asked again
    assert any("W&B failed (BrokenPipeError: the service is gone)" in message for message in caplog.messages)
    with (tmp_path / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6


def test_no_server_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "detection")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setattr(loggers, "START_TIMEOUT", 2.0)
    folder = tmp_path / "a" / "b"
    assert train(folder, Tracker("auto", folder)).global_step == 6
    assert any("can't start online" in message for message in caplog.messages)
    assert [row["trainer/global_step"] for row in history(folder)] == [0, 1, 2, 3, 4, 5]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1


BROKEN = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import lightning as L
from test_tracking import Tracker, train

class EndService(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3:
            for task in Path("/proc/self/task").iterdir():
                for child in (task / "children").read_text().split():
                    if "wandb-core" in Path(f"/proc/{{child}}/cmdline").read_text():
                        os.kill(int(child), signal.SIGKILL)
                        print("ended the service")

folder = Path({folder!r})
trainer = train(folder, Tracker("offline", folder), callbacks=[EndService()])
print("steps", trainer.global_step)
"""


@pytest.mark.rehearsal
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds W&B's process in /proc")
def test_the_end_of_wandbs_process_is_not_the_end_of_training(tmp_path: Path) -> None:
    code = BROKEN.format(paths=[str(ROOT), str(ROOT / "tests")], folder=str(tmp_path / "a" / "b"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["ended the service", "steps 6"]
    with (tmp_path / "a" / "b" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from pathlib import Path
from test_tracking import Tracker, train
if __name__ == "__main__":
    train(Path("a/b"), Tracker("auto", Path("a/b")), devices=2, strategy="ddp")
"""
    (tmp_path / "two.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "two.py"], capture_output=True, text=True, timeout=600, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "a" / "b").glob("wandb/*run-*/*.wandb"))) == 1
    assert len(history(tmp_path / "a" / "b")) == 6


def test_long_runs_show_ever_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracking, shown = Tracking(tmp_path), []
    monkeypatch.setattr(tracking, "_show", lambda *args: shown.append(tracking.validations))
    for _ in range(256):
        tracking.on_validation_end(type("Trainer", (), {"sanity_checking": False})(), None)  # type: ignore[arg-type]
    assert shown == [*range(1, 32), *range(32, 64, 2), *range(64, 128, 4), *range(128, 256, 8), 256]
    again = Tracking(tmp_path)
    again.load_state_dict(tracking.state_dict())
    assert again.validations == 256


def test_recall_of_proposals_is_pycocotools(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, annotations, found, results = [], [], [], []
    for image in range(1, 5):
        corner, side = rng.uniform(0, 300, (20, 2)), rng.uniform(20, 120, (20, 2))
        gt = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
        boxes = (np.repeat(gt, 20, axis=0) + rng.normal(0, 12, (400, 4))).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = rng.permutation(400).astype(np.float32)
        crowd = np.arange(20) == 3
        images.append({"id": image, "width": 500, "height": 500})
        for box, is_crowd in zip(gt.astype(float), crowd, strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "bbox": xywh, "area": 5000.0}
            annotations.append(entry | {"iscrowd": int(is_crowd)})
        for box, score in zip(boxes.astype(float), scores.astype(float), strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            found.append({"image_id": image, "category_id": 1, "bbox": xywh, "score": score})
        labels = torch.from_numpy(rng.integers(1, 4, 20))  # recall is without classes
        flags = (torch.full((20,), 5000.0), torch.from_numpy(crowd), torch.zeros(20, dtype=torch.bool))
        target = Target(image, f"{image}.jpg", (500, 500), torch.from_numpy(gt), labels, *flags)
        results.append(proposal_result(torch.from_numpy(boxes), torch.from_numpy(scores), target))
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    (tmp_path / "dt.json").write_text(json.dumps(found))
    truth = COCO(tmp_path / "gt.json")
    judge = COCOeval(truth, truth.loadRes(str(tmp_path / "dt.json")), "bbox")
    judge.params.maxDets = [100, 300, 1000]
    judge.evaluate()
    judge.accumulate()
    expected = judge.eval["recall"][:, 0, 0].mean(0)
    assert 0 < expected[0] < expected[1] < expected[2] < 1
    parts = recalled(results[:1]) + recalled(results[1:])  # batch by batch
    assert parts[0] == 76
    assert (parts[1:] / parts[0]).numpy() == pytest.approx(expected)


def test_counting_changes_no_draw() -> None:
    labels = torch.randint(-1, 2, (3, 500), generator=torch.Generator().manual_seed(0))
    labels[0] = 0
    plain, counting = BalancedSampler(64, 0.25), CountingSampler(BalancedSampler(64, 0.25))
    results = []
    for sampler in (plain, counting):
        torch.manual_seed(1)
        results.append(sampler(labels, lambda: torch.zeros(3, 500)))
    expected, drawn = results
    assert torch.equal(drawn[0], expected[0]) and torch.equal(drawn[1], expected[1])
    assert counting.foreground is not None and float(counting.foreground) == pytest.approx((0 + 16 + 16) / 3)


def test_overlays_follow_an_image_that_is_shrunk(tmp_path: Path) -> None:
    Image.new("RGB", (400, 200)).save(tmp_path / "wide.png")
    left = np.zeros((200, 400), bool)
    left[100:, :200] = True
    boxes, labels = torch.tensor([[0.0, 100, 200, 200], [0, 0, 400, 200]]), torch.tensor([2, 1])
    masks = [rle.encode(left), rle.encode(np.ones_like(left))]
    flags = torch.ones(2), torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    target = Target(1, "wide.png", (200, 400), boxes, labels, *flags, masks)
    scores = torch.tensor([0.9, 0.4])
    result = image_result({"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}, target, 2, masks=True)
    shown = overlays(result, ["cat", "dog"], tmp_path, side=100)
    wandb.Image(**shown)  # takes it as it is
    assert shown["data_or_path"].shape == (50, 100, 3)
    dog, cat = shown["boxes"]["predictions"]["box_data"]
    assert dog["position"] == {"minX": 0, "minY": 25, "maxX": 50, "maxY": 50}
    assert (dog["box_caption"], dog["class_id"], cat["box_caption"]) == ("dog 0.90", 2, "cat 0.40")
    painted = shown["masks"]["predictions"]["mask_data"]  # the better one on top
    assert (painted[25:, :50] == 2).all() and (painted[:25] == 1).all() and (painted[:, 50:] == 1).all()
    high = {"data_or_path": np.ones((80, 20, 3), np.uint8)}
    assert {image["data_or_path"].shape for image in same_size([high, shown])} == {(80, 100, 3)}
    assert shown["masks"]["predictions"]["mask_data"].shape == (80, 100)
    assert len(overlays(result, ["cat", "dog"], tmp_path, 0.5)["boxes"]["predictions"]["box_data"]) == 1
    rows = class_rows([result], ["cat", "dog", "absent"])
    assert [row[0] for row in rows] == ["cat", "dog"]
    assert np.array([row[1:] for row in rows]) == pytest.approx(1)


def test_the_sweep_makes_command_lines_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = yaml.safe_load((ROOT / "sweeps" / "bccd.yaml").read_text())
    drawn = {"model.lr": {"value": 0.004}, "model.weight_decay": {"value": 0.01}, "data.batch_size": {"value": 2}}
    assert set(drawn) == set(sweep["parameters"])
    macros = create_sweep_command_args({"args": drawn}) | {"interpreter": ["python"], "program": [sweep["program"]]}
    line = [word for part in create_sweep_command(sweep["command"]) for word in macros.get(part[2:-1], [part])]
    assert line[:2] == ["python", "scripts/fit.py"] and (ROOT / line[1]).is_file()
    with pytest.raises(SystemExit) as stop:
        main([*line[2:], "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["model"]["lr"], config["data"]["batch_size"], config["name"]) == (0.004, 2, "bccd")


@pytest.mark.slow
def test_the_sweeps_command_line_trains_and_records_what_the_search_wants(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As W&B's agent does: flags from the sweep's file, the draw in a file that W&B's run reads; without a server."""
    drawn = {"model.lr": 0.003, "model.weight_decay": 0.05, "data.batch_size": 4}
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(yaml.safe_dump({"wandb_version": 1} | {key: {"value": v} for key, v in drawn.items()}))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    flags = ["--config=bccd", f"--data.root={shared_data / 'bccd'}", *(f"--{key}={v}" for key, v in drawn.items())]
    tiny = [*("--trainer.max_steps", "2", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1")]
    tiny += ["--data.min_size", "64", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main([*flags, *tiny, "--trainer.log_every_n_steps", "1", "--output", str(tmp_path / "runs")]) == 0
    (folder,) = (tmp_path / "runs" / "bccd").iterdir()
    assert "val/map" in history(folder)[-1]
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    updates = [item for r in records(record) for item in r.run.config.update if r.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in updates}
    assert {key: config[key] for key in drawn} == drawn  # what the search drew
    sections = {key: config[key.split(".")[0]][key.split(".")[1]] for key in drawn}
    assert sections == drawn  # is what the run was made with
