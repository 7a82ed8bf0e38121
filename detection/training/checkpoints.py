"""The files that a run goes on from: which to take for `--resume`, and how they are written so that they are whole."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from detection.recipes import blame, describe, packages_of
from detection.training.storable import without_unreadable

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
RUN_FOLDER = "DETECTION_RUN_FOLDER"  # hands the folder to the processes of other ranks
STAMP = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:_(\d+))?")
# What only going on needs; two thirds of a file, more with averaged weights
OF_TRAINING = ("optimizer_states", "lr_schedulers", "loops", "resume", "current_model_state", "averaging_state")
WANTED = "--resume takes a .ckpt file, the folder of a run, or auto"


class Start(NamedTuple):
    """Where a run begins: its folder, the checkpoint to go on from, if any, and whether the folder was made for it."""

    folder: Path
    checkpoint: Path | None
    made: bool = False


def start(resume: str | None, parent: Path, make: bool = True) -> Start:
    """Choose the folder and the checkpoint of a run, and say in the log which.

    A new folder is made at once, as that of one run alone: two runs of a second would share it otherwise.

    Args:
        resume: None for a new run; a checkpoint; the folder of a run, for its newest whole checkpoint; or `auto` for
            the newest run in `parent`, which is begun (again) where it has no checkpoint.
        parent: folder of the runs of one name.
        make: a new folder, rather than its name alone, for what leaves nothing on disk.

    Raises:
        FileNotFoundError: no checkpoint is there.
        ValueError: the checkpoint named, or every one of the run, is damaged.
    """
    found = _find(resume, parent, make)
    os.environ[RUN_FOLDER] = str(found.folder)
    return found


def _find(resume: str | None, parent: Path, make: bool) -> Start:
    if resume is None:
        return _new_run(parent, make)
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            return Start(path.parent, _announce(path))
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise FileNotFoundError(f"no checkpoint at {path}: {WANTED}")
        return Start(path, checkpoint)
    folder = _handed_folder() or newest_run(parent)
    if folder is None:
        log.info("--resume auto: no run in %s, so a new one begins", parent)
        return _new_run(parent, make)
    try:
        checkpoint = newest_checkpoint(folder)
    except ValueError as error:
        log.warning("--resume auto: %s; a new run begins", error)
        return _new_run(parent, make)
    if checkpoint is None:
        log.info("--resume auto: %s ended before its first checkpoint, so it begins again", folder)
    return Start(folder, checkpoint)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, announced in the log; None where there is no file at all.

    Raises:
        ValueError: there are some, but none is whole.
    """
    there = [folder / name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
    problems = []
    for path in there:
        try:
            checkpoint = _announce(path)
        except ValueError as error:
            problems.append(str(error))
            log.warning("%s; looking at the one before", error)
        else:
            return checkpoint
    if problems:
        raise ValueError(f"no checkpoint in {folder} is whole, with the state of a training ({'; '.join(problems)})")
    return None


def _announce(path: Path) -> Path:
    epoch, step = progress(path)
    log.info("going on from %s: epoch %d, step %d", path, epoch + 1, step)
    return path


def progress(path: Path) -> tuple[int, int]:
    """Epoch, from 0, and optimiser steps of a checkpoint, every byte of which is read and checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is cut off, damaged, or no checkpoint of a training, as a `.safetensors` file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: {WANTED}")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds weights, but no run to go on with: begin one with them, --weights {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if whole else {}
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, and nothing else is read") from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is cut off or damaged")
    if not isinstance(content, dict) or not {"epoch", "global_step", "loops", "optimizer_states"} <= content.keys():
        last = path.with_name(LAST)
        there = (
            f"{last} does" if last.is_file() else f"{LAST} of its run does, and --weights begins another run with them"
        )
        raise ValueError(f"{path} holds weights, but not the optimiser's state to go on with: {there}")
    return int(content["epoch"]), int(content["global_step"])


def best_or_last(path: Path) -> Path:
    """Whose weights are meant: the file itself, or of a run's folder the best checkpoint, else the last.

    Raises:
        FileNotFoundError: there is no such file, or the folder has neither.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not path.is_dir():
        return path
    found = next((path / name for name in (BEST, LAST) if (path / name).is_file()), None)
    if found is None:
        runs = sorted(file.parent for name in (BEST, LAST) for file in path.glob(f"*/{name}"))
        hint = f"; name one of its runs, such as {runs[-1]}" if runs else ": is it the folder of a run?"
        raise FileNotFoundError(f"there is no {BEST} or {LAST} in {path}{hint}")
    return found


class Kept(NamedTuple):
    """What a checkpoint keeps that has to be known before data and detector are made.

    Attributes:
        data: the state of the data module, such as the split that it made.
        detector: the recipe of the detector.
    """

    data: Mapping[str, Any] = MappingProxyType({})
    detector: Mapping[str, Any] = MappingProxyType({})


def kept(path: Path) -> Kept:
    """Read a checkpoint that `start` has checked; its tensors stay on the disk."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    recipe = content.get("hyper_parameters", {}).get("detector")
    return Kept(content.get("DetectionDataModule", {}), recipe or {})


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0))  # Lightning's, known before the processes meet


def _handed_folder() -> Path | None:
    """The folder that the first rank has chosen, in the processes that it has started."""
    return Path(os.environ[RUN_FOLDER]) if _rank() != 0 and RUN_FOLDER in os.environ else None


def _new_run(parent: Path, make: bool) -> Start:
    if handed := _handed_folder():
        return Start(handed, None)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if _rank():  # of a cluster's launcher: the first rank makes the folder in this very second, or has made it
        newest = newest_run(parent)
        return Start(newest if newest is not None and newest.name.startswith(stamp) else parent / stamp, None)
    for number in itertools.count():
        folder = parent / (f"{stamp}_{number}" if number else stamp)
        if not make:
            if not folder.exists():
                return Start(folder, None)
            continue
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue  # another run of this second has it
        except OSError:
            return Start(folder, None)  # `check_start` says what is wrong with it
        return Start(folder, None, made=True)
    raise AssertionError


def newest_run(parent: Path) -> Path | None:
    """The newest folder of a run below that of its name, if there is any."""
    runs = [(match, path) for path in parent.glob("*") if path.is_dir() and (match := STAMP.fullmatch(path.name))]
    return max(runs, key=lambda run: (run[0][1], int(run[0][2] or 0)))[1] if runs else None


def announce_parts(detector: Any, settings: Mapping[str, Any]) -> None:
    """Warn of parts that no recipe describes, as checkpoints can't make them again; name the packages to trust.

    Args:
        detector: that is about to train.
        settings: what else the checkpoints keep, by name.
    """
    parts = {"": detector} | dict(settings)
    problems = [blame(part, name) for name, part in parts.items() if describe(part) is NotImplemented]
    lost = [f"{name.lstrip('.') or 'the detector'}: {kind}" for found in problems for name, kind in found.items()]
    if lost:
        log.warning(
            "the checkpoints of this run can't be opened by themselves, as no recipe describes %s. Give the part from "
            "YAML, or decorate its class with detection.recorded, or pass its class or a functools.partial; a class "
            "must be in a module that can be imported",
            ", ".join(lost),
        )
    elif packages := packages_of([describe(part) for part in parts.values()]):
        log.info("its checkpoints have parts of your own: open them with --trust %s", " ".join(packages))


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, to the disk, and only then in its place: a file is whole or not there.

    The `last.ckpt` before the newest stays as `previous.ckpt`, and there is no moment without a `last.ckpt`;
    `best.ckpt` is without `OF_TRAINING`. Where the disk is full the old files stay too, the log has one line, and
    training goes on: to stop would lose more. Checkpoints are read without running code from them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Called on the first rank alone, so it must not raise what the others would wait for."""
        path = Path(path)
        if path.name == BEST:
            checkpoint = {name: value for name, value in checkpoint.items() if name not in OF_TRAINING}
        partial_file = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial_file.open("wb") as file:
                torch.save(without_unreadable(checkpoint), file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                _keep_as(path.with_name(PREVIOUS), path)
            partial_file.replace(path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # PyTorch's writer hides the reason
            if not isinstance(cause, OSError):
                raise
            partial_file.unlink(missing_ok=True)
            kept = f"the one of before stays, and training goes on: make room in {path.parent}"
            log.error("%s could not be saved (%s); %s", path, cause.strerror or cause, kept)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """The content of a checkpoint; plain values and tensors only, whatever `weights_only` says."""
        return torch.load(path, map_location=map_location, weights_only=True)


def _keep_as(kept: Path, path: Path) -> None:
    """Give a file a second name as well, in place of the file that had it.

    The first name stays, so that a process killed before it is written anew leaves a file there. Where the file system
    knows one name a file, it is renamed.
    """
    second = kept.with_suffix(".link")
    try:
        second.unlink(missing_ok=True)
        os.link(path, second)
    except OSError:
        path.replace(kept)
        return
    second.replace(kept)
    second.unlink(missing_ok=True)  # renaming does nothing where both names are already of one file


def _sync_folder(folder: Path) -> None:
    """Bring the renaming to the disk as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class KeepBest(ModelCheckpoint):
    """`best.ckpt` by validation mAP; a run whose folder was moved still knows which was the best.

    Where validation had no object that counts, so that mAP is -1, nothing is the best, and the log says so once.
    """

    def __init__(self, folder: Path) -> None:
        options = {"auto_insert_metric_name": False, "enable_version_counter": False}  # no slash, no best-v1.ckpt
        # Not at the end of the epoch, or the `last.ckpt` of the validation would not know of it
        options["save_on_train_epoch_end"] = False
        super().__init__(folder, Path(BEST).stem, monitor="val/map", mode="max", **options)  # type: ignore[arg-type]
        self._said = False

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Whether the figure, which all ranks have alike, makes a checkpoint the best."""
        if current is None or current >= 0:
            return super().check_monitor_top_k(trainer, current)
        if not self._said and trainer.is_global_zero:
            log.warning(
                "the validation images have no object that counts, so no %s is kept; %s is the newest", BEST, LAST
            )
        self._said = True
        return False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def moved(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else ""

        paths = {name: moved(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")}
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})
