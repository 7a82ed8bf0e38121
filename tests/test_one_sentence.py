"""A mistake in the settings of a run or a script is one sentence, before anything trains, and leaves no folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from detection.cli.fit import FitCLI, main
from detection.data import scenes
from detection.inference import Detector
from detection.models.fast.folding import FoldedNorm
from detection.training.precision import WeightPrecision
from tests.runs import TINY, run_script, scene_flags
from tests.test_drift import build


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=4, val=2)


@pytest.fixture
def args(data: Path, tmp_path: Path) -> list[str]:
    own = ["--data.num_workers", "0", "--output", str(tmp_path / "runs"), "--trainer.max_steps", "2"]
    return ["--config", "quickstart", *TINY, *scene_flags(data), *own]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.lr=-1"], "model.lr is -1.0"),
        (["--data.hflip", "2"], "data.hflip is 2.0: it must be from 0 to 1"),
        (["--data.batch_size", "0"], "batch_size 0"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval is 0"),
        (["--data.classes", "[bal]"], "did you mean 'ball'?"),
        (["--model.lr_mult", "{rpn: -1}"], "model.lr_mult of rpn is -1"),
        (["--model.freeze", "{rpn: -1}"], "model.freeze of rpn is -1: give epochs from 0 on"),
        (["--model.metrics", "[torchmetrics.MeanMetric]"], "model.metrics: MeanMetric does not take detections"),
        (["--trainer.max_steps", "0"], "nothing was trained"),
        (["--trainer.max_epochs", "0"], "nothing was trained"),
        (["--trainer.max_time", "00:00:00:00"], "nothing was trained"),
        (["--trainer.limit_train_batches", "0"], "nothing would be trained"),
        (["--trainer.accelerator", "tpu"], "Requirement 'torch_xla"),
        (["--trainer.val_check_interval", "100"], "must be less than or equal to the number of the training batches"),
        (["--trainer.max_epochs=-1", "--trainer.max_steps=-1"], "give trainer.max_epochs, max_steps or max_time"),
        (["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/mpa"], "did you mean val/map?"),
        (["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "map_50"], "did you mean val/map_50?"),
        (
            [
                "--trainer.callbacks+=EarlyStopping",
                "--trainer.callbacks.monitor=val/map",
                "--trainer.limit_val_batches=0",
            ],
            "it is never logged",
        ),
    ],
)
def test_it_is_one_sentence_and_no_folder(
    flags: list[str], said: str, args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.parametrize(
    ("flags", "said", "unsaid"),
    [
        (["--epochs", "3"], "--trainer.max_epochs", "min_epochs"),
        (["--model.lr", "abc"], "--model.lr takes a number, not abc", "did you mean"),
        (["--config", "bcdd"], "did you mean --config bccd?", "None"),
        (["--trainer.precision", "bf16-mixd"], "did you mean bf16-mixed?", "class"),
        (["--model.schedule.warmup_steps", "{a: 1}"], "--model.schedule.warmup_steps takes a whole number", "Union"),
        (["--data.scale_jitter_size", "true"], "--data.scale_jitter_size takes a whole number, not true", "None"),
        (["--model.optimizer", "AdanW"], "did you mean AdamW?", "dot import"),
        (
            ["--model.schedule", "torch.optim.lr_scheduler.StepLR"],
            "--model.schedule: the following arguments are required: step_size",
            "Union",
        ),
        (["--model.schedule", "{milestones: [0.5]}"], "write --model.schedule.milestones of detection.Multi", "Union"),
        (["--trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitor: 3}}"], "it takes text", "class '"),
        (["--model.schedule", "CosineSchedule"], "did you mean detection.CosineSchedule?", "dot import"),
    ],
)
def test_suggestions_lead_where_they_should(
    flags: list[str], said: str, unsaid: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    message = capsys.readouterr().err
    assert said in message and unsaid not in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.precision", "bf16-true"],
        ["--trainer.precision", "64-true"],
        ["--trainer.precision", "bf16-true", "--model.detector.norm", "frozen"],  # as with weights, which TINY lacks
        ["--trainer.precision", "64-true", "--model.detector.norm", "frozen"],
        ["--trainer.precision", "16-true", "--model.detector.norm", "frozen", "--model.lr", "1e-5"],
        ["--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", "0.1", "--model.optimizer", "AdamW"],
        ["--trainer.precision", "16-mixed", "--trainer.gradient_clip_val", "0.1", "--model.optimizer", "AdamW"],
        ["--trainer.precision", "16-true", "--model.lr", "1e-5"],
        ["--model.schedule.warmup_steps", "0"],
        ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/map"],
        ["--trainer.callbacks", "Timer"],  # whose default is an Enum
        ["--trainer.callbacks", "TQDMProgressBar"],  # in the place of ours, which needs a terminal
    ],
    ids=" ".join,
)
def test_it_trains(flags: list[str], args: list[str]) -> None:
    cli = FitCLI([*args, *flags])
    cli.fit()
    dtypes = {"bf16-true": torch.bfloat16, "64-true": torch.float64, "16-true": torch.float16}
    head = cli.model.detector.roi_heads.box_predictor.cls_score.weight
    assert cli.trainer.global_step == 2 and head.isfinite().all()
    assert head.dtype == dtypes.get(flags[1], torch.float32)
    if "mixed" in flags[1]:
        assert cli.trainer.optimizers[0].param_groups[0]["fused"]
        gradient = torch.nn.utils.get_total_norm([p.grad for p in cli.model.parameters() if p.grad is not None])
        assert gradient <= 0.1 * (1 + 1e-5)
    detector = Detector.from_checkpoint(cli.folder / "last.ckpt", "cpu")  # and the file is one like any other
    assert detector.model.roi_heads.box_predictor.cls_score.weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("detector", ["fasterrcnn_efficientnet_lite0_fpn", "fasterrcnn_resnet_fpn"])
def test_whole_detectors_with_frozen_norms_train_in_that_type(
    detector: str, precision: str, data: Path, tmp_path: Path
) -> None:
    """The quickstart's own, with its weights, and a small ResNet."""
    small = ["--model.detector.backbone_name", "resnet18", "--model.detector.weights_backbone", "null"]
    own = [*small, "--model.detector.norm", "frozen"] if "resnet" in detector else []
    rest = ["--data.num_workers", "0", "--output", str(tmp_path), "--trainer.max_steps", "2", "--wandb", "off"]
    given = ["--config", "quickstart", *scene_flags(data), *rest, "--data.batch_size", "2"]
    cli = FitCLI([*given, "--trainer.precision", precision, "--model.detector", f"detection.{detector}", *own])
    cli.fit()
    assert cli.trainer.global_step == 2 and "val/map" in cli.trainer.callback_metrics
    assert any(isinstance(module, FoldedNorm) for module in cli.model.modules())


def test_float64_weights_give_the_same_maps_and_leave_anchors_alone() -> None:
    """In bfloat16 an anchor's corner at 300 would be right to a pixel: anchors are no weights."""
    model, images = build().eval(), [torch.rand(3, 60, 80)]
    batch = model.transform(images, None, 4)
    with torch.no_grad():
        expected = [m.clone() for m in model.extract(batch).maps]
        anchors = [cells.clone() for cells in model.rpn.anchor_generator._cells]
        WeightPrecision("64-true", torch.float64).convert_module(model)
        found = model.extract(batch).maps
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)
    for got, want in zip(model.rpn.anchor_generator._cells, anchors, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_float16_is_clipped(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient scaler of a GPU, here on the CPU: a fused optimiser takes its scale off too late to clip."""
    cli = FitCLI([*args, "--trainer.gradient_clip_val", "1.0", "--model.optimizer", "AdamW"])
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=128.0)
    cli.trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    cli.fit()
    assert cli.trainer.global_step == 2 and not cli.trainer.optimizers[0].param_groups[0]["fused"]


def test_a_device_that_is_not_there() -> None:
    for name in ("cuda:17", "quantum"):
        with pytest.raises(ValueError, match=f"--device {name}: this machine has no such device"):
            Detector(build(), ["a", "b", "c"], device=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["predict.py", "--ckpt", "x", "--source", "y", "--score_tresh", "1"], "did you mean --score_thresh?"),
        (["predict.py", "--ckpt", "x", "--source", "y", "--score_thresh", "50"], "it must be from 0 to 1"),
        (["predict.py", "--ckpt", "x", "--source", "y", "--limit", "0"], "--limit is 0: it must be at least 1"),
        (["predict.py", "--ckpt", "x", "--source", "y", "--batch_size", "0"], "--batch_size is 0"),
        (["evaluate.py", "--ckpt", "x", "--batch_size", "0"], "--batch_size is 0"),
        (["export.py", "--ckpt", "x", "--outptu", "y.onnx"], "--output"),
        (["check_data.py", "--rot", "x"], "did you mean --root?"),
        (["download.py", "voc2007", "--roto", "x"], "--root"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_script_says_it_in_one_line(command: list[str], said: str, tmp_path: Path) -> None:
    done = run_script(command[0].removesuffix(".py"), *command[1:], cwd=tmp_path)
    assert done.returncode != 0 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
