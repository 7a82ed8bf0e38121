"""Which checkpoint `--resume` takes, and that a file is whole or not there, whatever happens to the disk."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import save_file

from detection.training.checkpoints import OF_TRAINING, KeepBest, Start, WholeFiles, progress, start

TRAINING = {"loops": {}, "optimizer_states": [], "state_dict": {"weight": torch.arange(5000.0)}}


def save(path: Path, step: int) -> Path:
    WholeFiles().save_checkpoint(TRAINING | {"epoch": step // 10, "global_step": step}, path)
    return path


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A write beyond it fails in the system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_run_folder_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(None, tmp_path)
    assert first == Start(first.folder, None, made=True) and first.folder.is_dir()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert start(None, tmp_path) == first._replace(made=False)  # another rank of the same run
    assert start("auto", tmp_path).folder == first.folder
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    names = [start(None, tmp_path, make=False).folder for _ in range(2)]  # of what leaves nothing on disk
    assert names[0] == names[1] != first.folder and not names[0].exists()


def test_runs_that_begin_at_once_have_a_folder_each(tmp_path: Path) -> None:
    context, count = multiprocessing.get_context("fork"), 12
    gate, said = context.Barrier(count), context.SimpleQueue()

    def begin() -> None:
        gate.wait(60)
        said.put(start(None, tmp_path / "runs" / "x").folder.name)

    processes = [context.Process(target=begin) for _ in range(count)]
    for process in processes:
        process.start()
    names = [said.get() for _ in processes]
    for process in processes:
        process.join()
    assert len(set(names)) == count and set(names) == {path.name for path in (tmp_path / "runs" / "x").iterdir()}


def test_checkpoint_or_folder_is_taken_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = save(tmp_path / "x" / "last.ckpt", 25)
    assert start(str(path), tmp_path) == start(str(path.parent), tmp_path) == Start(path.parent, path)
    assert f"going on from {path}: epoch 3, step 25" in caplog.text
    other = save(path.with_name("epoch_2.ckpt"), 20)
    assert start(str(other), tmp_path).checkpoint == other


def test_best_is_for_use_and_last_to_go_on_from(tmp_path: Path) -> None:
    """Weights, recipe and counters of both are the same; the state of the optimiser is in the last alone."""
    last, best = save(tmp_path / "last.ckpt", 20), save(tmp_path / "best.ckpt", 20)
    kept = torch.load(best, weights_only=True)
    missing = set(torch.load(last, weights_only=True)) - set(kept)
    assert "optimizer_states" in missing and missing <= set(OF_TRAINING) and kept["global_step"] == 20
    with pytest.raises(ValueError, match=rf"best.ckpt holds weights, but not the optimiser's state .*: {last} does$"):
        start(str(best), tmp_path)
    last.unlink()
    for named in (best, tmp_path):
        with pytest.raises(ValueError, match=r"last.ckpt of its run does, and --weights begins another run with them"):
            start(str(named), tmp_path)


def test_a_file_of_weights_alone_is_no_run_to_go_on_with(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"mine\.safetensors holds weights, but no run .*: begin one .* --weights /"):
        start(str(path), tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere/last.ckpt", "empty"])
def test_missing_path_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*{name}.*auto"):
        start(str(tmp_path / name), tmp_path)


def test_auto_takes_the_newest_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert start("auto", tmp_path / "none").checkpoint is None
    assert "so a new one begins" in caplog.text
    for name in ("2026-01-02_03-04-05_9", "2026-01-02_03-04-05_10", "2026-01-01_00-00-00", "zebra"):
        save(tmp_path / name / "last.ckpt", 5)
    newest = tmp_path / "2026-01-02_03-04-05_10"
    assert start("auto", tmp_path) == Start(newest, newest / "last.ckpt")
    newer = tmp_path / "2026-01-03_00-00-00"
    newer.mkdir()
    assert start("auto", tmp_path) == Start(newer, None)  # not an older run, which may be another experiment
    assert f"{newer} ended before its first checkpoint, so it begins again" in caplog.text


def test_truncated_file_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: last.ckpt is cut off | injected: truncation of the real file to its half |
    promise: the one before is taken, and the log says so; without any whole one it is an error, or a new run."""
    caplog.set_level(logging.INFO)
    folder = tmp_path / "2026-01-02_03-04-05"
    save(folder / "last.ckpt", 10)
    save(folder / "last.ckpt", 20)
    cut_off(folder / "last.ckpt")
    assert start("auto", tmp_path) == start(str(folder), tmp_path) == Start(folder, folder / "previous.ckpt")
    assert "last.ckpt is cut off or damaged; looking at the one before" in caplog.text
    assert "previous.ckpt: epoch 2, step 10" in caplog.text
    with pytest.raises(ValueError, match="cut off or damaged"):
        start(str(folder / "last.ckpt"), tmp_path)  # named, so nothing else will do
    cut_off(folder / "previous.ckpt")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        start(str(folder), tmp_path)
    new = start("auto", tmp_path)
    assert new.folder != folder and new.checkpoint is None


def test_one_wrong_byte_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", 10)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cut off or damaged"):
        progress(path)


class Gadget:
    """Does something when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_but_plain_values_is_read(tmp_path: Path) -> None:
    torch.save(TRAINING | {"epoch": 0, "global_step": 1, "evil": Gadget(tmp_path / "mark")}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="nothing else is read"):
        progress(tmp_path / "last.ckpt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        WholeFiles().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not (tmp_path / "mark").exists()
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"not the optimiser.s state to go on with"):
        progress(tmp_path / "weights.ckpt")


def test_full_disk_leaves_the_old_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: no room for a checkpoint | injected: a limit of the system on the size of files |
    promise: the file of before is untouched, one line says so, nothing is left over, training goes on."""
    path = save(tmp_path / "last.ckpt", 10)
    before = path.read_bytes()
    with files_no_larger_than(10_000):
        save(path, 20)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.ckpt"]
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "last.ckpt could not be saved (File too large)" in message and "\n" not in message
    save(path, 30)
    assert [progress(tmp_path / name)[1] for name in ("last.ckpt", "previous.ckpt")] == [30, 10]


@pytest.mark.parametrize("moment", ["before the first renaming", "between the two"])
def test_killed_between_renamings_leaves_a_last_checkpoint(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a process killed while a checkpoint takes the place of the one before | injected: an end at a renaming |
    promise: `last.ckpt` is there and whole, and the next one is saved as ever."""
    path = save(save(tmp_path / "last.ckpt", 10), 20)
    replace, left = Path.replace, iter([True, False] if moment == "between the two" else [False])

    def renames_or_dies(self: Path, target: Path) -> Path:
        if next(left):
            return replace(self, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", renames_or_dies)
        with pytest.raises(KeyboardInterrupt):
            save(path, 30)
    assert progress(path)[1] == 20
    save(path, 40)
    assert [progress(tmp_path / name)[1] for name in ("last.ckpt", "previous.ckpt")] == [40, 20]
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]


def test_without_hard_links_the_one_before_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "last.ckpt", 10)

    def refuses(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    save(path, 20)
    assert [progress(tmp_path / name)[1] for name in ("last.ckpt", "previous.ckpt")] == [20, 10]
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]


def test_moved_run_still_knows_its_best(tmp_path: Path) -> None:
    old, new = KeepBest(tmp_path / "old"), KeepBest(tmp_path / "new")
    path = str(tmp_path / "old" / "best.ckpt")
    old.best_k_models, old.best_model_path, old.kth_best_model_path = {path: torch.tensor(0.5)}, path, path
    old.best_model_score = old.current_score = old.kth_value = torch.tensor(0.5)
    new.load_state_dict(old.state_dict())
    assert new.best_model_score == 0.5
    assert new.best_model_path == new.kth_best_model_path == str(tmp_path / "new" / "best.ckpt")
    assert list(new.best_k_models) == [new.best_model_path]


class Validates(L.LightningModule):
    """Logs the next of some mAPs after each epoch."""

    def __init__(self, figures: list[float]) -> None:
        super().__init__()
        self.layer, self.figures = torch.nn.Linear(1, 1), iter(figures)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log("val/map", next(self.figures))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(("figures", "best"), [([-1.0, -1.0], None), ([-1.0, 0.0, -1.0], 1), ([0.2, -1.0], 0)])
def test_validation_without_an_object_crowns_no_checkpoint(
    figures: list[float], best: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    keep = KeepBest(tmp_path)
    trainer = L.Trainer(max_epochs=len(figures), callbacks=[keep], num_sanity_val_steps=0, **options)
    loader = torch.utils.data.DataLoader(torch.ones(2, 1))
    trainer.fit(Validates(figures), loader, loader)
    said = [record.getMessage() for record in caplog.records if "no object that counts" in record.getMessage()]
    assert said == [
        "the validation images have no object that counts, so no best.ckpt is kept; last.ckpt is the newest"
    ]
    assert (tmp_path / "best.ckpt").exists() == (best is not None)
    if best is None:
        assert keep.best_model_path == "" and keep.best_model_score is None
    else:
        assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == best
        assert keep.best_model_score == max(figures)
