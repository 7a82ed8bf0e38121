"""Detectors of any channels and 16 bits, from the builder to the exported file and a whole run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.models import adapt_input_conv
from torch import nn

from detection import Detector, TestTimeAugmentation
from detection.batch import Batch, check_images
from detection.cli.check import main as check_data
from detection.cli.fit import FitCLI, main
from detection.data.datamodule import DetectionDataModule
from detection.data.spectral import PixelFormat
from detection.inference import predict
from detection.inference.sources import open_source
from detection.interop import CheckpointError, load_detector, save_detector
from detection.interop.detectron2 import to_detectron2
from detection.interop.export import ExportableDetector, outputs_of
from detection.models import relatives, zoo
from detection.models.transform import ImageTransform
from detection.recipes import rebuild
from detection.weights import fit_stem
from tests import twins
from tests.runs import TINY

MEAN, STD = [0.4, 0.5, 0.3, 0.2, 0.6], [0.2, 0.1, 0.3, 0.05, 0.2]
BUILDERS: dict[str, dict[str, Any]] = {
    "fasterrcnn_resnet_fpn": {"backbone_name": "resnet18"},
    "fasterrcnn_mobilenet_v3_large_fpn": {},
    "fasterrcnn_efficientnet_lite0_fpn": {},
    "cascadercnn_efficientnet_lite0_fpn": {},
    "maskrcnn_efficientnet_lite0_fpn": {},
    "fasterrcnn_timm_fpn": {"backbone_name": "convnext_atto"},
}


def build(name: str, channels: int, depth: int = 8, **options: Any) -> Any:
    home = zoo if hasattr(zoo, name) else relatives
    facts = {"in_channels": channels, "image_depth": depth, "image_mean": MEAN[:channels], "image_std": STD[:channels]}
    torch.manual_seed(0)
    settings = {"num_classes": 4, "min_size": 64, "max_size": 96, **BUILDERS.get(name, {}), **facts, **options}
    return getattr(home, name)(**settings).eval()


def stem(model: nn.Module) -> nn.Conv2d:
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_takes_other_channels(name: str, channels: int) -> None:
    model = build(name, channels)
    assert stem(model).weight.shape[1] == channels and stem(model).weight.requires_grad
    images = [torch.rand(channels, 60, 80), torch.rand(channels, 50, 70)]
    again = rebuild(model.recipe)  # as a checkpoint does
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a, b in zip(model(images), again.eval()(images), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_pretrained_stem_is_timms_adapted_one() -> None:
    rgb = stem(build("fasterrcnn_efficientnet_lite0_fpn", 3)).weight
    four = stem(build("fasterrcnn_efficientnet_lite0_fpn", 4)).weight
    assert torch.equal(four, adapt_input_conv(4, rgb))
    torch.testing.assert_close(four[:, 3], rgb[:, 0] * 3 / 4)  # red again
    one = stem(build("fasterrcnn_efficientnet_lite0_fpn", 1)).weight
    torch.testing.assert_close(one, rgb.sum(dim=1, keepdim=True))


def test_grey_as_one_channel_is_grey_as_three() -> None:
    """The kernels' sum on one channel is the kernels on three equal ones, but for rounding."""
    one, three = build("fasterrcnn_efficientnet_lite0_fpn", 1), build("fasterrcnn_efficientnet_lite0_fpn", 3)
    three.load_state_dict(
        {k: v for k, v in one.state_dict().items() if v.shape != stem(one).weight.shape}, strict=False
    )
    three.transform = ImageTransform(64, 96, MEAN[:1] * 3, STD[:1] * 3)
    grey = torch.rand(1, 60, 80)
    batches = [m.transform([image], None, 4) for m, image in ((one, grey), (three, grey.repeat(3, 1, 1)))]
    for a, b in zip(one.extract(batches[0]).maps, three.extract(batches[1]).maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_weights_of_an_rgb_detector_fit_another_one(tmp_path: Path) -> None:
    rgb = build("fasterrcnn_resnet_fpn", 3)
    save_detector(tmp_path / "rgb.safetensors", rgb, ["a", "b", "c"])
    model = build("fasterrcnn_resnet_fpn", 5, weights=str(tmp_path / "rgb.safetensors"))
    state = rgb.state_dict()
    own = model.state_dict()
    name = "backbone.body.conv1.weight"
    assert torch.equal(own.pop(name), adapt_input_conv(5, state[name]))
    assert all(torch.equal(own[key], state[key]) for key in own)
    assert fit_stem(state, state).keys() == state.keys()


def test_16_bits_are_the_same_light_as_8() -> None:
    few, many = build("fasterrcnn_efficientnet_lite0_fpn", 3), build("fasterrcnn_efficientnet_lite0_fpn", 3, 16)
    pixels = torch.randint(0, 256, (3, 60, 80))
    a, b = few([pixels.byte()])[0], many([(pixels * 257).to(torch.uint16)])[0]
    torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=1e-3)
    torch.testing.assert_close(a["scores"], b["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), r"image 0 must be a \(4, h, w\) tensor, not \(3, 8, 8\)"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), r"image 0 is torch.uint8: give uint16 in \[0, 65535\] or float"),
        (torch.full((4, 8, 8), 900.0), "reaches 900: float images must be in .0, 1. .divide by 65535, or give uint16"),
    ],
)
def test_images_of_another_format_are_refused(image: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_images([image], 4, 16)


def test_builders_say_what_they_need() -> None:
    with pytest.raises(ValueError, match="images of 4 channels need as many values of image_mean and image_std, not 3"):
        zoo.fasterrcnn_resnet_fpn(in_channels=4)
    with pytest.raises(ValueError, match="Backbone has no first convolution that could take 4"):
        build("rcnn_efficientnet_lite0", 4)
    with pytest.raises(CheckpointError, match="takes 5 channels, but Detectron2 reads RGB"):
        to_detectron2(build("fasterrcnn_resnet_fpn", 5))


def test_views_of_test_time_augmentation_keep_the_format() -> None:
    model = build("fasterrcnn_efficientnet_lite0_fpn", 4, 16)
    views = TestTimeAugmentation(model, scales=(0.8, 1.0), hflip=True)
    images = torch.randint(0, 65536, (1, 4, 64, 96)).to(torch.uint16)
    size, nothing = torch.tensor([[64, 96]]), torch.zeros(1, 1, 4)
    batch = Batch(images, size, nothing, size[:, :1], torch.zeros(1, 1, dtype=torch.bool), size)
    found = views.run(batch, False, True)[1][0]
    plain = model.run(batch, False, True)[1][0]
    assert len(found["scores"]) and found["scores"].max() >= plain["scores"].max() - 1e-6


@pytest.mark.parametrize("form", [PixelFormat(4, 8), PixelFormat(1, 16), PixelFormat(5, 16)], ids=str)
def test_a_detector_takes_files_arrays_and_tensors_alike(form: PixelFormat, tmp_path: Path) -> None:
    detector = Detector(build("fasterrcnn_efficientnet_lite0_fpn", *form), ["a", "b", "c"], device="cpu")
    pixels = np.random.default_rng(0).integers(0, form.highest, (60, 80, form.channels)).astype(form.dtype)
    np.save(tmp_path / "a.npy", pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms: list[Any] = [tmp_path / "a.npy", pixels, tensor, tensor.float() / form.highest]
    forms += [pixels[..., 0]] if form.channels == 1 else []
    forms += [Image.fromarray(pixels, "RGBA")] if form == (4, 8) else []
    first, *others = [detector(image) for image in forms]
    assert len(first)
    for found in others:
        np.testing.assert_array_equal(found.boxes, first.boxes)
    with pytest.raises(ValueError, match=rf"an image as array must be \(H, W, {form.channels}\) uint"):
        detector(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("form", [PixelFormat(4, 8), PixelFormat(2, 16)], ids=str)
@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.rehearsal)], ids=["graph", "ONNX"])
def test_export_of_any_format_finds_what_the_model_finds(form: PixelFormat, traced: bool, tmp_path: Path) -> None:
    """What is traced, run as it is; and the file."""
    from detection.interop.exported_files import onnx_runner, to_onnx
    from detection.interop.parity import compare

    model = build("fasterrcnn_efficientnet_lite0_fpn", *form, box_score_thresh=0.4, box_detections_per_img=300)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(3)
    if traced:
        pytest.importorskip("onnxscript", reason='needs pip install "detection[export]"')
        pytest.importorskip("onnxruntime", reason='needs pip install "detection[export]"')
        logging.disable(logging.DEBUG)
        to_onnx(model, tmp_path / "d.onnx", {})
        logging.disable(logging.NOTSET)
    graph, names = ExportableDetector(model), outputs_of(model)

    def run(planes: NDArray[Any]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            return {n: v.numpy() for n, v in zip(names, graph(torch.from_numpy(planes)), strict=True)}

    rng = np.random.default_rng(0)
    images = []
    for height, width in ((60, 80), (96, 50)):  # coarse noise, as in the test of RGB
        coarse = rng.integers(0, form.highest, (height // 8, width // 8, form.channels)).astype(form.dtype)
        images.append(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    detector = Detector(model, [f"class {i}" for i in range(1, model.num_classes)], device="cpu")
    parity = compare(detector, onnx_runner(tmp_path / "d.onnx") if traced else run, images)
    assert parity.detections > 20 and parity.unmatched <= 0.02 * parity.detections
    # 16-bit pixels are resized in float32 here and in OpenCV, in another order: a level of 65535 apart now and then.
    assert parity.box < 1e-2 and parity.score < (1e-4 if form.depth == 8 else 1e-3)


def fit(root: Path, output: Path, *more: str) -> FitCLI:
    flags = [*TINY, *twins.flags(root), "--trainer.max_steps=2", "--data.num_workers=0", f"--output={output}"]
    cli = FitCLI([*flags, "--wandb=off", *more])
    cli.fit()
    return cli


def test_a_run_on_four_channels_of_16_bits_from_data_to_pictures(tmp_path: Path) -> None:
    def deep(picture: NDArray[np.uint8]) -> NDArray[Any]:
        return twins.sixteen(twins.four(picture))  # type: ignore[arg-type]

    root = twins.draw_set(tmp_path / "data", deep)
    form = ("--data.channels=4", "--data.depth=16", "--data.photometric=0.5", "--data.mosaic=0.5")
    cli = fit(root, tmp_path / "runs", *form)
    images = [twins.draw_shapes(np.random.default_rng([0, i]))[0] for i in range(12)]
    every = np.concatenate([deep(image).reshape(-1, 4) for image in images]) / 65535
    transform = cli.model.detector.transform
    np.testing.assert_allclose(transform.mean.flatten(), every.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(transform.std.flatten(), every.std(axis=0), rtol=1e-3)
    assert (cli.folder / "predictions.jpg").is_file() and stem(cli.model.detector).in_channels == 4
    loaded = load_detector(cli.folder / "best.ckpt")
    assert torch.equal(loaded.transform.mean, transform.mean) and loaded.transform.image_depth == 16
    detector = Detector.from_checkpoint(cli.folder / "best.ckpt", device="cpu")
    summary = predict(detector, open_source(str(root / "val"), detector.form), tmp_path / "found", score_thresh=0.0)
    assert summary.images == 6 and not summary.problems
    with Image.open(tmp_path / "found" / "annotated" / "0000.png") as picture:
        assert picture.mode == "RGB"
    data = DetectionDataModule.load_from_checkpoint(cli.folder / "best.ckpt")
    assert data.form == (4, 16)


@pytest.mark.rehearsal
def test_what_only_the_fourth_channel_has_in_its_low_bits_is_learned(tmp_path: Path) -> None:
    """RGB is noise; of the fourth channel no pixel has a bit in the byte that 8-bit reading keeps."""

    def hidden(picture: NDArray[np.uint8]) -> NDArray[Any]:
        rng = np.random.default_rng(int(picture.sum()))
        return np.dstack([rng.integers(0, 65536, picture.shape, np.uint16), picture.mean(axis=2).astype(np.uint16)])

    root = twins.draw_set(tmp_path / "data", hidden, train=60, val=20)
    flags = [*twins.flags(root), "--config=quickstart", "--data.channels=4", "--data.depth=16", "--wandb=off"]
    flags += ["--data.min_size=96", "--data.max_size=128", "--data.num_workers=0", f"--output={tmp_path}"]
    flags += ["--trainer.max_epochs=6", "--trainer.check_val_every_n_epoch=6", "--trainer.accelerator=cpu"]
    cli = FitCLI([*flags, "--trainer.num_sanity_val_steps=0"])
    cli.fit()
    assert cli.trainer.callback_metrics["val/map_50"] > 0.5


def test_a_run_whose_files_have_other_channels_ends_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = twins.draw_set(tmp_path / "data")
    flags = [*TINY, *twins.flags(root), "--data.num_workers=0", f"--output={tmp_path}", "--wandb=off"]
    assert main([*flags, "--data.channels=4"]) == 2
    assert "the image has 3 channels of 8 bits, but 4 channels of 8 bits are wanted" in capsys.readouterr().err
    refused = ["--data.channels=5", "--data.augmentations+=albumentations.CLAHE"]
    assert main([*flags, *refused]) == 2
    assert "CLAHE can't take images of 5 channels of 8 bits; leave it out" in capsys.readouterr().err


def test_what_the_user_gives_stays(tmp_path: Path) -> None:
    root = twins.draw_set(tmp_path / "data", twins.grey)
    flags = [*TINY, *twins.flags(root), "--data.channels=1", "--wandb=off", f"--output={tmp_path}"]
    cli = FitCLI([*flags, "--model.detector.image_mean=[0.25]"])
    assert cli.model.detector.transform.mean.flatten().tolist() == [0.25]
    assert cli.model.detector.transform.std.numel() == 1


def test_the_check_prints_what_a_configuration_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = twins.draw_set(tmp_path / "data", twins.four)
    twins.write(root / "train" / "0003.png", twins.draw_shapes(np.random.default_rng(0))[0])
    arguments = ["--root", str(root), "--format", "coco", "--annotations", "train.json", "--images", "train"]
    written = ["--json", str(tmp_path / "a.json"), "--sheet", str(tmp_path / "sheet.png")]
    assert check_data([*arguments, "--channels", "4", *written]) == 2
    said = capsys.readouterr().out
    assert "the image has 3 channels of 8 bits, but 4 channels of 8 bits are wanted" in " ".join(said.split())
    found = json.loads((tmp_path / "a.json").read_text())[0]["channels"]
    assert len(found["image_mean"]) == len(found["image_std"]) == 4
    assert f"image_mean: {found['image_mean']}" in said and (tmp_path / "sheet.png").is_file()


def test_settings_that_can_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="the scenes are drawn in 8-bit RGB"):
        DetectionDataModule(channels=4)
    with pytest.raises(ValueError, match=r"must be positive, and data\.depth 8 or 16"):
        DetectionDataModule("x", "coco", channels=0)
    with pytest.raises(ValueError, match="Selective Search reads 8-bit RGB, not 4 channels of 8 bits"):
        DetectionDataModule("x", "coco", channels=4, proposals={"class_path": "detection.SearchedProposals"})  # type: ignore[arg-type]
