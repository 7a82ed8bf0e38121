"""One truth for each setting of a run: what is logged is what steps, on resume too, or it is refused in a sentence."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Timer

from detection.cli.fit import FitCLI, main
from detection.data import scenes
from tests.runs import TINY, rows, scene_flags

FLAGS = [
    "--config",
    "quickstart",
    *TINY,
    "--data.num_workers",
    "0",
    "--trainer.num_sanity_val_steps",
    "0",
    "--trainer.max_epochs",
    "2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.draw(tmp_path_factory.mktemp("scenes"), train=8, val=4)


class Stop(Exception):  # noqa: N818
    """Ends a run at a step."""


class Watch(L.Callback):
    """Notes the rate of each step and the batch, and ends the run before a step."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.rates, self.sizes, self.files = stop, list[float](), list[int](), list[tuple[str, ...]]()
        self.options: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, _: int) -> None:
        if trainer.global_step == self.stop:
            raise Stop
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.options = dict(trainer.optimizers[0].param_groups[0])
        self.sizes.append(len(batch))
        self.files.append(tuple(target.file_name for target in batch.targets))


Begin = Callable[..., tuple[Path, Watch]]


@pytest.fixture
def begin(data: Path, tmp_path: Path) -> Begin:
    """`begin(*flags, stop=3)`: a run that fails before that step, saved after each; its folder and what was seen."""

    def run(*flags: str, stop: int | None = None) -> tuple[Path, Watch]:
        own = ["--output", str(tmp_path / "runs"), "--save_every", "0"]
        return follow([*FLAGS, *own, *scene_flags(data), *flags], stop)

    return run


def follow(args: list[str], stop: int | None = None) -> tuple[Path, Watch]:
    cli, watch = FitCLI(args), Watch(stop)
    cli.trainer.callbacks.insert(0, watch)
    with suppress(Stop):
        cli.fit()
    return cli.folder, watch


def factors(total: int, warmup: int = 50) -> list[float]:
    """Of the quickstart's cosine over so many steps, from its formula."""
    half = min(warmup, max(1, total // 2))
    rise = [min(1.0, 0.001 + 0.999 * step / half) for step in range(total)]
    angles = [
        torch.tensor(max(0, s - half) / max(1, total - half) * torch.pi, dtype=torch.float64) for s in range(total)
    ]
    return [a * 0.5 * (1 + float(angle.cos())) for a, angle in zip(rise, angles, strict=True)]


def test_a_new_rate_is_the_rate_that_steps(begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    folder, before = begin("--model.lr", "0.008", stop=3)  # 8 steps in all, 2 images each
    caplog.set_level(logging.INFO, "detection")
    resumed = follow(["--resume", str(folder), "--model.lr", "0.0008", "--model.weight_decay", "0.01"])[1]
    wanted = [0.008 * 2 / 16 * factor for factor in factors(8)[:3]]
    assert before.rates == pytest.approx(wanted, rel=1e-6)
    assert resumed.rates == pytest.approx([0.0008 * 2 / 16 * factor for factor in factors(8)[3:]], rel=1e-6)
    assert [float(row["lr"]) for row in rows(folder) if row["lr"]][3:] == pytest.approx(resumed.rates, rel=1e-6)
    assert resumed.options["weight_decay"] == 0.01
    said = next(m for m in caplog.messages if "settings changed from here on" in m)
    assert "model.lr 0.0008 (it was 0.008)" in said and "model.weight_decay 0.01" in said


def test_a_run_that_ends_by_the_clock_has_a_schedule_of_that_length(
    begin: Begin, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a step takes a second, twenty seconds are twenty steps; on resume what is left of them."""
    passed = [0.0]

    def tick(*_: Any) -> None:
        passed[0] += 1.0

    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: passed[0])
    monkeypatch.setattr(Timer, "on_train_batch_start", tick)
    logging.getLogger("detection").propagate = True
    caplog.set_level(logging.INFO, "detection")
    no_end = ("--trainer.max_epochs=-1", "--trainer.max_steps=-1", "--trainer.max_time", "00:00:00:20")
    folder, watch = begin(*no_end, "--trainer.limit_val_batches", "0", stop=12)
    resumed = follow(["--resume", str(folder)])[1]
    wanted = [0.003 * 2 / 16 * factor for factor in factors(20)]
    assert watch.rates + resumed.rates == pytest.approx(wanted, rel=1e-6)
    assert "as many steps as the time allows" in caplog.text


def test_optimiser_options_are_taken_too(begin: Begin) -> None:
    folder, before = begin(stop=3)
    resumed = follow(["--resume", str(folder), "--model.optimizer.betas", "[0.8, 0.99]"])[1]
    assert before.options["betas"] != resumed.options["betas"] and list(resumed.options["betas"]) == [0.8, 0.99]


def test_more_epochs_make_the_schedule_longer(begin: Begin) -> None:
    folder, _ = begin(stop=3)
    resumed = follow(["--resume", str(folder), "--trainer.max_epochs", "4"])[1]
    assert resumed.rates == pytest.approx([0.003 * 2 / 16 * factor for factor in factors(16)[3:]], rel=1e-6)


def test_another_batch_is_taken_with_its_rate_and_the_rest_of_the_epoch(begin: Begin) -> None:
    folder, before = begin("--data.batch_size", "1", stop=4)  # half of the first of two epochs
    with pytest.warns(UserWarning, match="may be seen twice"):
        resumed = follow(["--resume", str(folder), "--data.batch_size", "2"])[1]
    assert before.sizes == [1] * 4 and resumed.sizes == [2] * (2 + 4)
    seen = {file for batch in before.files + resumed.files[:2] for file in batch}
    assert len(seen) >= 6  # most of the epoch's eight; the order is drawn in batches
    assert len({file for batch in resumed.files[2:] for file in batch}) == 8
    total = 4 + 6  # the steps that are done, and those that are left: not the 8 of such a run from its start
    assert resumed.rates == pytest.approx([0.003 * 2 / 16 * factor for factor in factors(total)[4:]], rel=1e-6)


def test_a_larger_batch_does_not_end_the_epoch(begin: Begin) -> None:
    folder, _ = begin("--data.batch_size", "1", stop=6)
    with pytest.warns(UserWarning, match="may be seen twice"):
        resumed = follow(["--resume", str(folder), "--data.batch_size", "4"])[1]
    assert resumed.sizes == [4] * (1 + 2)


@pytest.mark.parametrize("limit", [[], ["--trainer.limit_train_batches", "5"]], ids=["all", "limited"])
def test_an_epoch_that_was_over_leaves_nothing_to_share(limit: list[str], begin: Begin) -> None:
    folder, before = begin("--data.batch_size", "1", *limit, stop=5 if limit else 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*may be seen twice")
        resumed = follow(["--resume", str(folder), "--data.batch_size", "2"])[1]
    assert before.sizes == [1] * (5 if limit else 8) and resumed.sizes == [2] * 4
    assert len({file for batch in resumed.files for file in batch}) == 8  # the second epoch from its start


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model.optimizer", "SGD"], "model.optimizer torch.optim.sgd.SGD (it was torch.optim.adamw.AdamW"),
        (["--model.lr_mult", "{backbone: 0.1}"], "the rest, backbone; it was the rest"),
        (["--model.freeze", "[roi_heads]"], "other parameters that train"),
        (["--data.classes", "[ball, star]"], "model.class_names"),
        (["--model.detector.box_head.out_channels", "16"], "model.detector.box_head.out_channels 16 (it was 32)"),
        (["--data.seed", "5"], "data.seed 5 (it was 0)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_resumed_run_cannot_take_is_refused(
    flags: list[str], named: str, begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = begin(stop=2)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(["--resume", str(folder), *flags]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert named in said and f"start afresh from its weights with --weights {folder}" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    if "out_channels" not in named:  # and the way that is named works, with the same tensors
        assert main(["--weights", str(folder), *flags, "--trainer.max_steps", "1"]) == 0


def test_weights_begin_another_run(begin: Begin, tmp_path: Path) -> None:
    folder, _ = begin()
    cli = FitCLI(["--weights", str(folder), "--name", "other", "--data.classes", "[star, ball]"])
    saved = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    own = cli.model.state_dict()
    for name, value in saved.items():
        if "box_predictor" not in name:
            assert torch.equal(own[name], value), name
    labels = [0, *(scenes.CLASSES.index(name) + 1 for name in ("star", "ball"))]
    name = "detector.roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(own[name], saved[name][labels])
    assert cli.folder.parent.name == "other" and cli.checkpoint is None and cli.trainer.global_step == 0
    cli.clean_up()


@pytest.mark.parametrize("flags", [["--weights", "nowhere"], ["--weights", "x.pth", "--resume", "x.ckpt"]])
def test_weights_that_are_not_there(flags: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, *FLAGS, *scene_flags(data)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_configuration_is_in_the_folder_whatever_the_logger(begin: Begin, tmp_path: Path) -> None:
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "csv")]
    folder, _ = begin(*logger, "--model.weight_decay", "0.02", stop=3)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["weight_decay"] == 0.02
    resumed = follow(["--resume", str(folder)])[1]
    assert resumed.options["weight_decay"] == 0.02 and len(resumed.rates) == 5
    assert list((tmp_path / "csv").rglob("metrics.csv")) and len([r for r in rows(folder) if r["lr"]]) == 8


def test_a_run_without_its_configuration_is_no_quickstart(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = begin(stop=2)
    (folder / "config.yaml").unlink()
    (tmp_path / "config.yaml").write_text("model: {lr: 0.5}")  # of somebody else
    monkeypatch.chdir(tmp_path)
    for resume in (folder, folder / "last.ckpt"):
        assert main(["--resume", str(resume)]) == 2
        assert f"{folder} has no config.yaml" in capsys.readouterr().err
    assert main(["--resume", str(folder.parent)]) == 2
    assert f"name one of its runs, such as --resume {folder}" in capsys.readouterr().err


@pytest.mark.parametrize("resume", ["nowhere", "null", "auto", "nowhere.ckpt"])
def test_no_configuration_of_the_working_directory_is_taken(
    resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detection.cli.configuration import CONFIGS, expand

    (tmp_path / "config.yaml").write_text("model: {lr: 0.5}")
    monkeypatch.chdir(tmp_path)
    assert expand(["--resume", resume])[1] == str(CONFIGS / "quickstart.yaml")


def test_the_seed_decides_the_order_of_the_images(data: Path, tmp_path: Path) -> None:
    def order(*flags: str) -> list[tuple[str, ...]]:
        once = ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0", "--output", str(tmp_path)]
        return follow([*FLAGS, *scene_flags(data), *once, *flags])[1].files

    one, two = order("--seed_everything", "1"), order("--seed_everything", "2")
    assert one != two and one == order("--seed_everything", "1")
    assert order("--seed_everything", "2", "--data.seed", "1") == one


@pytest.mark.parametrize("flags", [["--trainer.limit_val_batches", "0"], ["--trainer.check_val_every_n_epoch", "10"]])
def test_a_run_without_validation_names_the_checkpoint_it_keeps(
    flags: list[str], begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = begin(*flags, "--trainer.max_epochs", "1")
    readme = (folder / "README.md").read_text()
    assert not (folder / "best.ckpt").exists() and "best.ckpt" not in readme and f"{folder}/last.ckpt" in readme
    assert any("it keeps no best.ckpt, but last.ckpt" in message for message in caplog.messages)


def test_another_folder_than_the_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trainer.default_root_dir", str(tmp_path / "here"), "--output", str(tmp_path / "runs")]) == 2
    assert f"give --output {tmp_path / 'here'} in the place of" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
