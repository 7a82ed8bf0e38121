"""Exported detectors find what the model finds, in graphs with open sizes."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as mask_api
from PIL import Image
from torchvision.models import detection as reference

from detection import (
    Detector,
    cascadercnn_efficientnet_lite0_fpn,
    fasterrcnn_efficientnet_lite0_fpn,
    keypointrcnn_efficientnet_lite0_fpn,
    load_detector,
    maskrcnn_efficientnet_lite0_fpn,
)
from detection.__main__ import main as command
from detection.batch import Target
from detection.data import scenes
from detection.data.augment import resize_into
from detection.data.images import read_image
from detection.imbalance import EqualizationLoss
from detection.inference.exported import kept_facts
from detection.interop import openvino
from detection.interop.export import ExportableDetector, _clamp
from detection.interop.exported_files import (
    onnx_runner,
    read_torch_facts,
    to_onnx,
    to_torch,
    torch_runner,
    write_torch_facts,
)
from detection.interop.openvino import (
    openvino_runner,
    read_openvino_facts,
    to_openvino,
    write_openvino_facts,
)
from detection.interop.parity import compare, compare_accuracy
from detection.interop.tensorrt import objections, to_tensorrt
from detection.resizing import resize_as_opencv
from detection.weights import read_saved
from tests.runs import rehearsed, scene_flags

RUNNER = Path(__file__).resolve().parents[1] / "examples" / "run_exported.py"
SIZES = [(80, 120), (150, 70), (64, 64), (201, 333), (207, 209)]  # the last loses a pixel with a careless division


def decided(builder, **arguments):
    """A detector of random heads on a trained backbone."""
    torch.manual_seed(0)
    options = {"num_classes": 4, "min_size": 96, "max_size": 160, "box_score_thresh": 0.4} | arguments
    model = builder(box_detections_per_img=300, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("cls_score.weight"):
                parameter.mul_(3)
    return model


def noise(sizes=SIZES):
    rng = np.random.default_rng(0)
    for height, width in sizes:
        coarse = Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8))
        yield np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def as_predicted(model):
    return Detector(model, ["a", "b", "c"], device="cpu")


def assert_same(parity):
    # Scores of random heads lie so close that rounding decides between a few boxes that overlap.
    assert parity.detections > 20 and parity.unmatched <= 0.02 * parity.detections
    assert parity.box < 1e-2 and parity.score < 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnxscript", reason='needs pip install "detection[export]"')
    pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')
    logging.disable(logging.DEBUG)  # PyTorch traces its own tracing as soon as anybody listens, as pytest does
    model = decided(maskrcnn_efficientnet_lite0_fpn)
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    to_onnx(model, path, kept_facts(model, ["a", "b", "c"], [7, 8, 9]))
    yield model, path
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_onnx_finds_what_the_model_finds(exported):
    model, path = exported
    parity = compare(as_predicted(model), onnx_runner(path), list(noise()))
    assert_same(parity)
    assert parity.mask < 1e-2


@pytest.mark.slow
def test_onnx_takes_images_of_any_shape(exported):
    """Down to a line of one pixel, which the size rule would shrink to nothing."""
    model, path = exported
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, (*size, 3), np.uint8) for size in ((1, 5000), (5000, 1), (1, 1), (3, 400))]
    parity = compare(as_predicted(model), onnx_runner(path), images)
    assert parity.unmatched == 0 and parity.box < 1e-2 and parity.score < 1e-4


@pytest.mark.parametrize("seed", range(20))
def test_pixels_in_the_graph_are_those_that_are_loaded(seed):
    rng = np.random.default_rng(seed)
    size, new = rng.integers(1, 300, 2), rng.integers(1, 400, 2)
    new = size // 2 if seed % 5 == 0 and min(size) > 1 else new  # half the size is a case of its own in OpenCV
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    loaded = np.zeros((3, *new), np.uint8)
    resize_into(image, loaded)
    planes, old = torch.from_numpy(image.transpose(2, 0, 1).copy())[None], torch.tensor(size, dtype=torch.float64)
    resized = resize_as_opencv(planes, old, tuple(new.tolist()), ExportableDetector.divide)
    assert (resized[0].numpy() == loaded).all()


def test_an_activation_of_ones_own_stays_as_it_is():
    class Halved(torch.nn.Hardtanh):
        def forward(self, x):
            return x / 2

    x = torch.linspace(-9, 9, 50)
    assert torch.equal(_clamp(Halved(), x), x / 2)
    assert torch.equal(_clamp(torch.nn.ReLU6(), x), torch.nn.functional.relu6(x))


@pytest.mark.slow
def test_onnx_takes_batches_and_images_without_objects(exported):
    _, path = exported
    run = onnx_runner(path)
    (image,) = noise([(90, 130)])
    planes = image.transpose(2, 0, 1)
    batch = run(np.stack([planes, planes[..., ::-1], planes]))
    alone = run(planes[None])
    count = int(alone["counts"][0])
    assert count > 0 and batch["counts"][0] == batch["counts"][2] == count
    for name in ("boxes", "labels", "scores", "masks"):
        np.testing.assert_allclose(batch[name][2, :count], alone[name][0, :count], atol=1e-3)
    assert (alone["scores"][0, count:] == 0).all()


@pytest.mark.rehearsal
def test_onnx_on_real_images(exported, shared_data):
    model, path = exported
    files = sorted((shared_data / "bccd" / "JPEGImages").glob("*.jpg"))[:20]
    parity = compare(as_predicted(model), onnx_runner(path), [read_image(file) for file in files])
    assert parity.images == 20
    assert_same(parity)


@pytest.mark.slow
def test_standalone_runner_prints_the_same(exported, tmp_path):
    model, path = exported
    (image,) = noise([(90, 130)])
    Image.fromarray(image).save(tmp_path / "photo.png")
    command = [sys.executable, "-I", RUNNER, path, tmp_path / "photo.png", "--score-thresh", "0.3", "--draw"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split()[1:] for line in done.stdout.splitlines()]
    wanted = as_predicted(model)(image)
    assert [line[0] for line in lines] == list(wanted.names)
    boxes = np.array([line[2:] for line in lines], float)
    np.testing.assert_allclose(boxes, wanted.boxes, atol=0.06)
    assert Image.open(tmp_path / "photo.png_detections.png").size == (130, 90)


@pytest.mark.slow
def test_openvino_finds_what_the_model_finds(exported, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason='needs pip install "detection[openvino]"')
    model, traced = exported
    path = tmp_path / "detector.xml"
    # It begins with the ONNX file, which is here already: to trace a detector takes a minute or two.
    monkeypatch.setattr(openvino, "to_onnx", lambda given, path, facts: shutil.copyfile(traced, path))
    to_openvino(model, path, {"class_names": ["a", "b", "c"]})
    write_openvino_facts(path, {"parity": {"images": 5}})
    facts = {"class_names": ["a", "b", "c"], "parity": {"images": 5}, "inference_precision": "f32"}
    assert read_openvino_facts(path) == facts
    parity = compare(as_predicted(model), openvino_runner(path, threads=1), list(noise()))
    assert_same(parity)
    assert parity.mask < 1e-2
    (image,) = noise([(90, 130)])
    Image.fromarray(image).save(tmp_path / "photo.png")
    runner = [sys.executable, RUNNER, path, tmp_path / "photo.png", "--score-thresh"]
    done = subprocess.run([*runner, "0.3"], capture_output=True, text=True, check=True)
    lines = [line.split()[1:] for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == as_predicted(model)(image).names
    done = subprocess.run([*runner, "1"], capture_output=True, text=True, check=True)
    assert "nothing scores 1 or more" in done.stdout


@pytest.mark.slow
def test_an_exported_file_is_used_as_a_checkpoint_is(exported, tmp_path, capsys):
    """By `predict`, and by `evaluate` on ground truth that is what the checkpoint finds: its AP is 1."""
    model, path = exported
    ours, theirs = as_predicted(model), Detector.from_checkpoint(path)
    assert theirs.class_names == ours.class_names and (theirs.min_size, theirs.max_size) == (96, 160)
    coco = {"categories": [{"id": i, "name": name} for i, name in zip((7, 8, 9), "abc", strict=True)]}
    coco |= {"images": [], "annotations": []}
    for i, image in enumerate(noise(SIZES[:3])):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        coco["images"].append({"id": i, "file_name": f"{i}.png", "height": image.shape[0], "width": image.shape[1]})
        mine, files = ours(image), theirs(image)
        assert abs(len(mine) - len(files)) <= 0.02 * len(mine) and len(mine) > 20
        mine = mine.take(np.arange(60))  # COCO counts 100 an image
        for box, label, mask in zip(mine.boxes, mine.labels, mine.masks, strict=True):
            gaps = np.abs(files.boxes - box).max(axis=1) + 1e3 * (files.labels != label)
            assert gaps.min() < 1e-2
            assert (mask_api.decode([mask]) != mask_api.decode([files.masks[gaps.argmin()]])).mean() < 0.01
            x, y, *corner = box.tolist()
            row = {"id": len(coco["annotations"]) + 1, "image_id": i, "category_id": int(label) + 6, "iscrowd": 0}
            row |= {"bbox": [x, y, corner[0] - x, corner[1] - y], "area": (corner[0] - x) * (corner[1] - y)}
            coco["annotations"].append(row)
    (tmp_path / "coco.json").write_text(json.dumps(coco))

    flags = ["--source", str(tmp_path / "0.png"), "--score_thresh", "0", "--output", str(tmp_path / "out")]
    assert not command(["predict", "--ckpt", str(path), *flags])
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(written["annotations"]) == len(theirs(read_image(tmp_path / "0.png")))
    assert [kind["id"] for kind in written["categories"]] == [7, 8, 9]
    assert "leave --device and --precision out" in str(
        command(["predict", "--ckpt", str(path), *flags, "--device=cuda"])
    )

    flags = ["--annotations", str(tmp_path / "coco.json"), "--output", str(tmp_path / "report"), "--masks=false"]
    assert not command(["evaluate", "--ckpt", str(path), *flags])
    figures = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("map "))
    assert float(figures["map"]) > 0.9
    assert "name data" in str(command(["evaluate", "--ckpt", str(path)]))


@pytest.mark.rehearsal
def test_int8_keeps_the_boxes_of_a_trained_detector(shared_data, tmp_path):
    pytest.importorskip("nncf", reason='needs pip install "detection[openvino]"')
    files = sorted((shared_data / "bccd" / "JPEGImages").glob("*.jpg"))[:8]
    images = [read_image(file) for file in files]
    model = fasterrcnn_efficientnet_lite0_fpn(num_classes=4, min_size=96, max_size=160, box_score_thresh=0.0)
    to_openvino(model.eval(), tmp_path / "d.xml", {}, "int8", images)
    to_openvino(model.eval(), tmp_path / "f.xml", {})
    assert (tmp_path / "d.bin").stat().st_size < 0.35 * (tmp_path / "f.bin").stat().st_size
    found = openvino_runner(tmp_path / "d.xml")(planes(images[0]))
    assert found["counts"][0] > 20 and np.isfinite(found["boxes"]).all()


@pytest.mark.slow
def test_a_file_for_tensorrt_is_static_and_finds_what_the_model_finds(exported, tmp_path):
    model, open_file = exported
    path = tmp_path / "fixed.onnx"
    to_tensorrt(model, path, {}, (150, 70))
    parity = compare(as_predicted(model), onnx_runner(path), list(noise([(150, 70)] * 3)))
    assert_same(parity)
    assert parity.mask < 1e-2
    assert objections(path) == []
    said = objections(open_file)  # open sizes are computed in float64, and candidates counted
    assert any("NonZero" in reason for reason in said) and "it computes in float64" in said
    assert "the shape of images is open" in said


@pytest.mark.slow
def test_accuracy_is_that_of_the_file(exported):
    """Against ground truth that is what the model finds, it has AP 1, and a file that finds half of it has less."""
    model, path = exported
    detector, run = as_predicted(model), onnx_runner(path)
    labelled = []
    for i, image in enumerate(noise(SIZES[:3])):
        found = detector(image).take(np.arange(60))  # COCO counts 100 an image
        boxes, labels = torch.from_numpy(found.boxes), torch.from_numpy(found.labels)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        flags = torch.zeros(len(boxes), dtype=torch.bool)
        labelled.append(
            (image, Target(i, f"{i}.jpg", image.shape[:2], boxes, labels, areas, flags, flags, found.masks))
        )
    same = compare_accuracy(detector, run, labelled)
    assert same.images == 3 and abs(same.lost) < 1e-3 and same.model > 0.9
    few = compare_accuracy(detector, lambda planes: run(planes) | {"counts": np.array([20])}, labelled)
    assert few.lost > 0.3 and str(few).endswith("lost")


@pytest.mark.slow
@pytest.mark.parametrize(
    "builder",
    rehearsed(
        [fasterrcnn_efficientnet_lite0_fpn, cascadercnn_efficientnet_lite0_fpn], fasterrcnn_efficientnet_lite0_fpn
    ),
)
def test_torch_finds_what_the_model_finds(exported, builder, tmp_path):  # behind the fixture, which silences the log
    """With a loss that reads its logits by itself; the fixture has a softmax."""
    model = decided(builder, class_loss=EqualizationLoss(), box_score_thresh=0.25)
    path = tmp_path / "detector.pt2"
    to_torch(model, path, kept_facts(model, ["a", "b", "c"], None))
    assert_same(compare(as_predicted(model), torch_runner(path), list(noise())))
    write_torch_facts(path, {"parity": {"images": 5}})  # after which PyTorch still reads it
    assert read_torch_facts(path)["parity"] == {"images": 5}
    (image,) = noise([(90, 130)])
    ours, theirs = as_predicted(model)(image), Detector.from_checkpoint(path)(image)
    assert len(ours) == len(theirs) > 5
    gaps = np.abs(ours.boxes[:, None] - theirs.boxes).max(axis=2)  # of equal scores either may come first
    assert gaps.min(axis=1).max() < 1e-2


@pytest.mark.rehearsal
def test_key_points_are_found_in_the_heatmaps_of_a_file(tmp_path):
    """Sharp ones, as training makes them: on flat heatmaps a rounding error would move the peak."""
    pytest.importorskip("onnxscript", reason='needs pip install "detection[export]"')
    pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')
    logging.disable(logging.DEBUG)  # as for `exported`
    model = decided(keypointrcnn_efficientnet_lite0_fpn, num_keypoints=5, fpn_channels=32)
    with torch.no_grad():
        model.roi_heads.keypoint_predictor.kps_score_lowres.weight.mul_(30)
    path = tmp_path / "detector.onnx"
    to_onnx(model, path, kept_facts(model, ["a", "b", "c"], None))
    logging.disable(logging.NOTSET)
    parity = compare(as_predicted(model), onnx_runner(path), list(noise()))
    assert_same(parity)
    assert parity.keypoint < 1e-2 and "of a key point" in str(parity)
    (image,) = noise([(90, 130)])
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))[None]
    given = onnx_runner(path)(planes)
    assert given["heatmaps"].shape[1:] == (given["boxes"].shape[1], 5, 56, 56) and "keypoints" not in given
    ours, theirs = as_predicted(model)(image), Detector.from_checkpoint(path)(image)
    assert theirs.keypoints.shape == (len(theirs), 5, 3) and len(ours) == len(theirs) > 5
    gaps = np.abs(ours.keypoints[:, None] - theirs.keypoints).max(axis=(2, 3))
    assert gaps.min(axis=1).max() < 1e-2
    Image.fromarray(image).save(tmp_path / "photo.png")
    runner = [sys.executable, RUNNER, path, tmp_path / "photo.png", "--score-thresh", "0", "--draw"]
    done = subprocess.run(runner, capture_output=True, text=True, check=True)
    said = np.array([line.split()[7:] for line in done.stdout.splitlines()], float).reshape(-1, 5, 2)
    np.testing.assert_allclose(said, theirs.keypoints[..., :2], atol=0.06)


@pytest.mark.rehearsal
def test_probabilities_of_a_loss_are_in_the_file(exported, tmp_path):  # behind the other, which silences the log
    """Class chances times that of an object, traced."""
    model = decided(fasterrcnn_efficientnet_lite0_fpn, class_loss=EqualizationLoss(), box_score_thresh=0.25)
    path = tmp_path / "detector.onnx"
    to_onnx(model, path, kept_facts(model, ["a", "b", "c"], None))
    assert_same(compare(as_predicted(model), onnx_runner(path), list(noise())))
    (image,) = noise([(90, 130)])
    before = as_predicted(model)(image).scores
    by_softmax = decided(fasterrcnn_efficientnet_lite0_fpn, box_score_thresh=0.25)  # of the same weights
    assert np.abs(before[0] - as_predicted(by_softmax)(image).scores[0]) > 1e-2


@pytest.mark.slow
def test_class_names_travel_with_the_file(exported):
    import onnxruntime

    facts = onnxruntime.InferenceSession(str(exported[1])).get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == ["a", "b", "c"]


@pytest.mark.rehearsal  # of steps that have tests of their own
def test_from_another_library_by_a_run_of_other_sizes_to_a_file(tmp_path, monkeypatch):
    """A file of torchvision -> converted -> trained on at other sizes -> exported: it sees and finds what predict does.

    Each of them could have sizes of its own: 800 of torchvision, those of the run, and those of the file.
    """
    pytest.importorskip("onnxscript", reason='needs pip install "detection[export]"')
    pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTION_RUN_FOLDER", raising=False)
    torch.manual_seed(0)
    torch.save(reference.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None).state_dict(), "tv.pth")
    data = scenes.draw(tmp_path / "scenes", train=4, val=2)
    assert not command(
        ["convert", "import", "--source", "tv.pth", "--output", "tv.safetensors", "--certificate", "false"]
    )
    sizes = ["--data.min_size", "112", "--data.max_size", "144", "--data.batch_size", "2", "--data.num_workers", "0"]
    detector = ["--model.detector", "detection.detector_for_classes", "--model.detector.path", "tv.safetensors"]
    steps = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--model.lr", "0.0001"]
    assert not command(["fit", "--config", "own_data", *scene_flags(data), *sizes, *detector, *steps])
    (run,) = (tmp_path / "runs").glob("*/*")
    photo = next(iter(sorted(data.rglob("val/*.jpg"))))
    check = ["--images", str(photo), "--split", "val"]
    assert not command(["export", "--ckpt", str(run), "--output", "d.onnx", *check])
    assert json.loads(facts_of("d.onnx")["parity"])["images"] == 1
    certificate = json.loads(facts_of("d.onnx")["certificate"])
    stages = {row["stage"] for row in certificate["rows"]}
    assert certificate["holds"] and {"features, level 0", "RPN objectness", "RPN deltas", "boxes", "scores"} <= stages
    assert certificate["accuracy"]["images"] == 2 and not command(["verify", "d.onnx"])
    accuracy = json.loads(facts_of("d.onnx")["accuracy"])
    assert accuracy["images"] == 2 and abs(accuracy["file"] - accuracy["model"]) < 0.01
    assert not command(
        ["predict", "--ckpt", str(run), "--source", str(photo), "--score_thresh", "0", "--device", "cpu"]
    )

    pixels = read_image(photo)
    theirs = {name: value[0] for name, value in onnx_runner(Path("d.onnx"))(planes(pixels)).items()}
    found = json.loads(Path("predictions/predictions.json").read_text())["annotations"]
    count = int(theirs["counts"])
    assert count == len(found) > 20
    ours = np.array([row["bbox"] for row in found])
    ours[:, 2:] += ours[:, :2]
    gaps = np.abs(ours[:, None] - theirs["boxes"][None, :count]).max(axis=2)
    assert (gaps.min(axis=1) < 0.05).mean() > 0.95  # of those with almost equal scores NMS may keep others

    model = load_detector(run / "last.ckpt")
    assert (model.transform.min_size, model.transform.max_size) == ((112,), 144)
    seen = ExportableDetector(model)._resize(torch.from_numpy(planes(pixels)))[0]
    batch = Detector.from_checkpoint(run / "last.ckpt", "cpu").batch([pixels]).images
    assert torch.equal((seen * 255).round().to(torch.uint8), batch)  # to the pixel
    model.transform.min_size = (128,)  # as a file of other sizes would
    parity = compare(as_trained(model, run), onnx_runner(Path("d.onnx")), [pixels])
    assert parity.unmatched > 0 or parity.box > 0.1


def planes(pixels):
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]


def facts_of(path):
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def as_trained(model, run):
    return Detector(model, read_saved(run / "last.ckpt").class_names, device="cpu")
