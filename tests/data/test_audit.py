from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from detection import anchors
from detection.cli import check
from detection.cli.advice import grid_of
from detection.data.anchor_fit import Boxes, Grid, best_iou, covers, propose, recall
from detection.data.audit import Audit, audit, look_across, splits_in, statistics
from detection.data.audit_report import picture_sheet
from detection.data.coco import read_coco
from detection.data.finding import find
from detection.data.records import DataError
from detection.data.voc import read_voc


def scatter(count: int, low: float, high: float, height: int = 480, width: int = 640, seed: int = 0) -> Boxes:
    rng = np.random.default_rng(seed)
    side = np.exp(rng.uniform(np.log(low), np.log(high), (count, 2))).clip(max=(width, height))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([width, height]) - side)
    return Boxes(np.hstack([corner, corner + side]), np.tile([[float(height), float(width)]], (count, 1)))


@pytest.mark.parametrize("grid", [Grid(), Grid(((24, 40), (48, 80)), (8, 16), (0.5, 1.5), 320, 400)])
def test_best_iou_equals_a_search_over_all_anchors(grid: Grid) -> None:
    height, width = 480, 640
    boxes = scatter(80, 6, 400)
    scale = min(grid.min_size / height, grid.max_size / width)
    new_height, new_width = int(height * scale), int(width * scale)
    levels = []
    for sizes, stride in zip(grid.sizes, grid.strides, strict=True):
        generator = AnchorGenerator((tuple(sizes),), (grid.ratios,))
        generator.set_cell_anchors(torch.float32, torch.device("cpu"))
        cells = [-(-new_height // stride), -(-new_width // stride)]
        levels += generator.grid_anchors([cells], [[torch.tensor(stride), torch.tensor(stride)]])
    anchors = torch.cat(levels)
    resized = torch.from_numpy(boxes.xyxy) * torch.tensor([new_width / width, new_height / height] * 2)
    expected = box_iou(resized.float(), anchors).amax(1)
    np.testing.assert_allclose(best_iou(boxes, grid), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("ratios", [(0.5, 1.5), (1.0,)])
def test_best_iou_of_anchors_in_the_middle_of_cells(ratios: tuple[float, ...]) -> None:
    boxes, strides = scatter(80, 6, 400), (8, 16)
    options: dict[str, Any] = {"offset": 0.5, "round_anchors": False}
    generator = anchors.AnchorGenerator([[24, 41.3], [48, 80]], ratios, **options, ratio_is_width_over_height=True)
    grid = Grid.of(generator, strides, 480, 640)
    laid = torch.cat(generator([(60, 80), (30, 40)], strides, (480, 640)))
    expected = box_iou(torch.from_numpy(boxes.xyxy).float(), laid).amax(1)
    np.testing.assert_allclose(best_iou(boxes, grid), expected.numpy(), atol=1e-4)


def test_proposal_covers_boxes_that_the_default_misses() -> None:
    small = scatter(500, 6, 14)
    assert not covers(recall(small, Grid()))
    better = propose(small, Grid())
    assert recall(small, better)["all"]["recall_0.5"] > recall(small, Grid())["all"]["recall_0.5"] + 0.3
    assert better.strides == Grid().strides and len({len(sizes) for sizes in better.sizes}) == 1
    assert json.dumps(better.sizes)
    usual = scatter(500, 60, 300)
    assert recall(usual, Grid())["large"]["boxes"] > 100


def dataset(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "extra"):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(root / f"{name}.png")
    names = {"images": [{"id": i, "file_name": f"{n}.png", "width": 80, "height": 60} for i, n in enumerate("abc")]}
    boxes = [[5, 5, 30, 20], [5, 5, 30, 20], [2, 2, 1.5, 40]]
    items = [
        {"id": i, "image_id": 0, "category_id": 1, "bbox": box, "segmentation": [[5, 5, 35, 5, 35, 25]]}
        for i, box in enumerate(boxes)
    ]
    classes = [{"id": 1, "name": "traffic light"}, {"id": 2, "name": "Traffic-Light"}]
    (root / "gt.json").write_text(json.dumps(names | {"annotations": items, "categories": classes}))
    return root


def look(root: Path) -> Audit:
    (found,) = (audit(name, read) for name, read in splits_in(find(root)).items())
    return found


def test_notes_do_not_spoil_a_clean_set(tmp_path: Path) -> None:
    found = look(dataset(tmp_path))
    assert found.code == 0
    problems = [defect.problem for defect in found.defects]
    for expected in (
        "it has no object",
        "box and class are those of annotation 0",
        "box is 1.5 x 40 px",
        "1 of 2 classes never occur: Traffic-Light",
        "the names 'traffic light' and 'Traffic-Light' are nearly alike",
        "1 images are not in this split: extra.png",
    ):
        assert expected in problems
    assert problems.count("it has no object") == 2 and len(problems) == 7
    assert found.statistics["classes"]["traffic light"] == {"objects": 3, "images": 1}
    assert found.statistics["areas"] == {"small": 3, "medium": 0, "large": 0}


def test_pixels_are_looked_at(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    data = (root / "b.png").read_bytes()
    (root / "b.png").write_bytes(data[: len(data) // 2])  # its header is whole
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(root / "c.png") as image:
        image.save(root / "c.png", exif=exif)
    found = look(root)
    assert found.code == 2
    (broken,) = [defect for defect in found.defects if defect.severity == "broken"]
    assert broken.file == "b.png" and "truncated" in broken.problem
    (turned,) = [defect for defect in found.defects if "EXIF" in defect.problem]
    assert turned.file == "c.png" and turned.fix == "the picture is not turned, as its annotation's size says"


def test_near_duplicates_are_noted(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    with Image.open(root / "a.png") as image:
        smooth = image.resize((8, 6)).resize((80, 60), Image.Resampling.BICUBIC)
    smooth.save(root / "a.png")
    smooth.point(lambda v: min(255, v + 9)).save(root / "c.png")
    assert [d.file for d in look(root).defects if d.problem == "it looks like a.png"] == ["c.png"]


def test_images_in_two_coco_splits_are_noted_by_content(tmp_path: Path) -> None:
    """b.png is copied under another name: only its bytes tell that validation sees a training image."""
    root = dataset(tmp_path)
    train = json.loads((root / "gt.json").read_text())
    (root / "copy.png").write_bytes((root / "b.png").read_bytes())
    val = train | {"images": [{"id": 7, "file_name": "copy.png", "width": 80, "height": 60}]}
    val["annotations"] = [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [5, 5, 30, 20]}]
    val["images"].append({"id": 8, "file_name": "extra.png", "width": 80, "height": 60})
    (root / "val.json").write_text(json.dumps(val))
    audits = [audit(name, read) for name, read in splits_in(find(root)).items()]
    before = len(audits[-1].defects)
    look_across(audits)
    (found,) = audits[-1].defects[before:]
    assert (found.file, found.severity) == ("val", "note")
    assert found.problem == "1 of its 2 images are in 'gt' too: copy.png"


def test_overlap_of_the_lists_of_cells(shared_data: Path) -> None:
    """611 entries for 356 files; the counts are those of `comm -12` on the sorted lists."""
    audits = []
    for name, read in splits_in(find(shared_data / "cells")).items():
        files = [record.file_name for record in read().records]
        audits.append(Audit(name, None, [], contents=dict(zip(files, files, strict=True))))
    look_across(audits)
    shared = {(d.file, d.problem.split(":")[0]) for d in audits[-1].defects}
    assert shared == {
        ("train", "202 of its 302 images are in 'test' too"),
        ("trainval", "27 of its 27 images are in 'test' too"),
        ("val", "27 of its 27 images are in 'test' too"),
    }


def test_refusal_is_broken_and_keeps_what_was_found(shared_data: Path) -> None:
    root = shared_data / "eval_refs" / "hotcoco_fixtures"
    found = audit("bad", lambda: read_coco(root, "healthcheck_bad.json"))
    assert found.code == 2 and found.index is None and len(found.defects) >= 6
    assert found.to_json()["verdict"] == "broken"


def check_data(*arguments: str) -> int:
    return check.main(arguments)


def test_script_exit_codes_json_and_sheet(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = dataset(tmp_path)
    files = ("--json", str(root / "out" / "found.json"), "--sheet", str(root / "out" / "sheet.png"))
    assert check_data("--root", str(root), "--format", "coco", *files) == 0
    (found,) = json.loads((root / "out" / "found.json").read_text())
    assert found["verdict"] == "clean" and found["split"] == "gt" and len(found["defects"]) == 7
    assert found["anchors"]["recall"]["all"]["boxes"] == 3
    sheet = np.asarray(Image.open(root / "out" / "sheet.png"))
    drawn = (sheet == [255, 102, 102]).all(-1) | (np.ptp(sheet, axis=-1) == 153)  # saturation .6 of full brightness
    assert drawn.sum() > 200
    bccd = ("--root", str(shared_data / "bccd"), "--format", "voc", "--split", "val", "--min-size", "240")
    assert check_data(*bccd) in (0, 1)
    output = capsys.readouterr().out
    assert "traffic light" in output and "WBC" in output and "recall" in output
    os.remove(root / "c.png")
    assert check_data("--root", str(root), "--format", "coco") == 2
    assert check_data("--root", str(root), "--format", "voc") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no pictures with annotations in VOC" in said and "there is COCO" in said and "leave the format out" in said
    assert check_data("--root", str(root / "none"), "--format", "yolo") == 2


def test_the_anchors_that_it_prints_are_taken_back_and_judged(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--root", str(shared_data / "cells"), "--split", "train", "--min-size", "240", "--max-size", "400")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    check_data(*data, "--json", str(first))
    output = capsys.readouterr().out
    command = f"detection fit --data.root {shared_data / 'cells'} --data.train_split train --data.min_size 240 "
    assert output.splitlines()[-1] == f"Next: {command}--data.max_size 400"
    (tmp_path / "plain.yaml").write_text("model: {detector: detection.models.zoo.fasterrcnn_resnet50_fpn}")
    check_data(*data, "--config", str(tmp_path / "plain.yaml"))
    assert capsys.readouterr().out.splitlines()[-1].endswith(" --model.detector.rpn_anchor_generator auto")
    block = output.partition("\nmodel:\n")[2].partition("\n\n")[0]
    (tmp_path / "anchors.yaml").write_text(f"model:\n{block}\n")
    check_data(*data, "--json", str(second), "--config", str(tmp_path / "anchors.yaml"))
    output = capsys.readouterr().out
    assert "proposed" not in output and "rpn_anchor_generator" not in output
    assert output.splitlines()[-1].startswith(f"Next: detection fit --config {tmp_path / 'anchors.yaml'} ")
    ((before,), (after,)) = (json.loads(file.read_text()) for file in (first, second))
    assert after["anchors"]["recall"] == before["anchors"]["proposal_recall"] != before["anchors"]["recall"]
    assert after["anchors"]["grid"] == before["anchors"]["proposal"] and "proposal" not in after["anchors"]


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ("{class_path: detection.no_builder}", "has no no_builder"),
        ("{init_args: {rpn_anchor_generator: {class_path: torch.nn.ReLU}}}", "anchors of a ReLU can't be judged"),
        (
            "{init_args: {rpn_anchor_generator: {class_path: detection.AnchorGenerator, init_args: {sizes: [[8]]}}}}",
            r"these of 1 levels can't be judged on strides \(4, 8, 16, 32, 64\)",
        ),
    ],
)
def test_anchors_that_cannot_be_judged(detector: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {{detector: {detector}}}")
    with pytest.raises(DataError, match=message):
        grid_of(tmp_path / "config.yaml", (240, 400))


def test_anchors_are_judged_at_the_strides_of_the_detector(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {detector: detection.models.relatives.fasterrcnn_resnet_c4}")
    sizes = ((32, 64, 128, 256, 512),)
    assert grid_of(tmp_path / "config.yaml", (240, 400)) == Grid(sizes, (16,), min_size=240, max_size=400)
    flags = grid_of(None, (240, 400), [8, 16], [1.0], [4, 8])
    assert flags == Grid(((8,), (16,)), (4, 8), (1.0,), 240, 400)


def test_sheet_without_a_picture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no picture can be drawn"):
        picture_sheet([Audit("x", None, [])], tmp_path / "sheet.png")


def test_statistics_of_real_sets(shared_data: Path) -> None:
    counts = statistics(
        read_coco(shared_data / "tiny_coco", "annotations/instances_train2017.json", "train2017", masks=True)
    )
    assert (counts["crowds"], counts["masks of several polygons"], counts["masks of run lengths"]) == (5, 38, 5)
    assert sum(c["objects"] > 0 for c in counts["classes"].values()) == 49
    counts = statistics(read_voc(shared_data / "voc2012_sample100"))
    assert (counts["difficult"], counts["boxes touching the right or bottom edge"]) == (38, 69)
    assert statistics(read_voc(shared_data / "deepforest"))["most objects on an image"] == 279
