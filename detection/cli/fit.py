"""The command `fit`: LightningCLI without subcommands, with our run folder, callbacks and errors."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from detection.cli.by_size import follow_size
from detection.cli.configuration import complete, fit_anchors_to_data, fit_detector_to_data, keep_mask_grid, plain
from detection.cli.fit_help import DEFAULTS, FROM_DATA, description
from detection.cli.folder import SaveConfig, never_validates, remove, remove_empty, say_changes, write_readme
from detection.cli.output import LOGGERS as LOGGERS
from detection.cli.output import set_up_output
from detection.cli.parser import Parser, cause
from detection.data.datamodule import DetectionDataModule
from detection.data.records import DataError
from detection.errors import RunError, SettingsError, explain, unexplained
from detection.interop.files import take_weights
from detection.recipes import packages_of, rebuild
from detection.training import tuning
from detection.training.callbacks import Bar, PredictionPictures, Results, SplitFile, Throughput
from detection.training.checkpoints import (
    BEST,
    LAST,
    RUN_FOLDER,
    KeepBest,
    Kept,
    Start,
    WholeFiles,
    best_or_last,
    kept,
    start,
)
from detection.training.locking import alone
from detection.training.loggers import RUN_FLAGS, MetricsFile, Tracker, WandbMode
from detection.training.module import DetectionModule
from detection.training.optimisation import COSINE, SGD_MOMENTUM, state_per_parameter
from detection.training.proposal_figures import ProposalRecall, SampledForeground
from detection.training.resume import INTERRUPTED, Interrupted, KeepLast
from detection.training.safety import Guard, check_start, end_other_ranks, end_with_parent
from detection.training.sharing import SyncNorms
from detection.training.tracking import Tracking
from detection.training.tuning import Find
from detection.trust import RecipeError, import_from_working_directory

log = logging.getLogger(__name__)

# What libraries raise at settings that they can't be built with.
UNEXPLAINED = (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, TypeError, MisconfigurationException)
# Lightning's `Timer` has one as a default, which no configuration could be written with otherwise.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(str(value.value)))
set_parsing_settings(import_path_denylist=[])  # jsonargparse's own, such as `os`, is an error and no warning


class FitCLI(LightningCLI):
    """Trains a detector: parses, chooses the run's folder, builds data, model and trainer.

    Args:
        args: command line without the program's name.
    """

    def __init__(self, args: Sequence[str]) -> None:
        given = complete(args)
        self.resumed, self.trust = given.resumed, given.trust
        self._start: Start | None = None
        try:
            self._build(given.args)
        except BaseException:
            self.clean_up()
            raise

    def _build(self, args: list[str]) -> None:
        super().__init__(
            DetectionModule,
            DetectionDataModule,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            parser_class=Parser,
            # An abbreviation that works today is ambiguous when a flag is added.
            parser_kwargs={"description": description(), "allow_abbrev": False, "prog": "detection fit"},
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # DetectionModule keeps what it needs by itself
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments only, whatever stands in `sys.argv`."""
        parser.resumed = self.resumed
        self.config = parser.parse_args(args)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The flags of the trainer, the model and the data; classes come from the data."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults(DEFAULTS)
        parser.add_class_arguments(DetectionModule, "model", skip=FROM_DATA, instantiate=False, fail_untyped=False)
        parser.set_defaults({"model.optimizer": SGD_MOMENTUM, "model.schedule": COSINE})
        parser.add_class_arguments(DetectionDataModule, "data", instantiate=False, fail_untyped=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The flags of the run itself."""
        parser.add_argument("--name", type=str, default="run", help="Runs of one kind share runs/NAME.")
        parser.add_argument("--output", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Checkpoint or folder of a run to go on with; `auto`: the newest run of this --name, else a new one.",
        )
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="Begin with the weights of a run, a .ckpt, .safetensors or .pth, but a new optimiser and schedule.",
        )
        parser.add_argument(
            "--by_size",
            type=bool,
            default=False,
            help="Length, rate and colours follow from the number of training images, where they have their defaults.",
        )
        parser.add_argument(
            "--save_every", type=float, default=10.0, help="Minutes between saves of last.ckpt within an epoch."
        )
        parser.add_argument(
            "--find",
            type=Find | None,
            default=None,
            help="Train nothing, but look for a learning rate (`lr`) or the largest batch of a GPU (`batch_size`).",
        )
        parser.add_argument(
            "--wandb",
            type=WandbMode,
            default="auto",
            help="`auto`: online when logged in, else offline; or `online`, `offline`, `off`.",
        )
        parser.add_argument(
            "--wandb_project", type=str | None, default=None, help="W&B project; WANDB_PROJECT, or detection."
        )
        parser.add_argument(
            "--wandb_entity", type=str | None, default=None, help="W&B team or user; WANDB_ENTITY, or that of the key."
        )
        parser.add_argument("--wandb_group", type=str | None, default=None, help="Group of the run in W&B.")
        parser.add_argument(
            "--wandb_tags",
            type=list[str] | None,
            default=None,
            help="Tags of the run in W&B, e.g. '[baseline, night]'.",
        )
        parser.add_argument("--wandb_notes", type=str | None, default=None, help="Notes on the run in W&B.")
        parser.add_argument(
            "--wandb_name", type=str | None, default=None, help="Name of the run in W&B; that of its folder."
        )
        parser.add_argument("--log_model", type=bool, default=False, help="Keep best.ckpt in W&B too, as an artifact.")

    def instantiate_classes(self) -> None:
        """Build the data first: it knows the classes and image sizes that the detector needs.

        `self.config`, which is saved, stays as the user wrote it.
        """
        if self.config.trainer.strategy != "auto" or self.config.trainer.devices != "auto":
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo's remarks on host names
        if _rank() and RUN_FOLDER in os.environ:  # started by the first rank, not by a cluster's launcher
            end_with_parent(os.getppid())
        self._check_run()
        weights = best_or_last(Path(self.config.weights)) if self.config.weights else None
        self._start = self._choose_start()
        if self._start.made:  # for this run alone, so before there is anything to write, which may never come
            weakref.finalize(self, remove_empty, self._start.folder, self._start.folder.parent)
        self.folder, self.checkpoint = self._start.folder, self._start.checkpoint
        if self.checkpoint:
            say_changes(self.folder, yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))
        if self.config.find:  # under a name that `--resume auto` does not take for a run
            self.folder = self.folder.with_name(f"{self.folder.name}_find_{self.config.find}")
        self.save_config_kwargs = {"folder": self.folder, "resumed": bool(self.checkpoint)}
        config = self.config.clone()
        self.datamodule = DetectionDataModule(**self._make_parts(config.pop("data")))
        going_on = kept(self.checkpoint) if self.checkpoint else Kept()
        self.datamodule.load_state_dict(going_on.data)
        if config.by_size:
            follow_size(config, self.datamodule)
        fit_detector_to_data(config.model.detector, self.datamodule)
        fit_anchors_to_data(config.model.detector, self.datamodule, going_on.detector, self.trust)
        keep_mask_grid(config.model.detector, going_on.detector)
        parts = self._make_parts(config.pop("model"))
        self.config_init = self.parser.instantiate(config)  # the trainer's callbacks, loggers, plugins
        self.model = DetectionModule(**parts, class_names=self.datamodule.class_names)
        if weights is not None and not self.checkpoint:
            take_weights(self.model.detector, weights, self.datamodule.class_names)
            log.info("beginning with the weights of %s, with a new optimiser and schedule", weights)
        self.trainer = self.instantiate_trainer()

    def _choose_start(self) -> Start:
        """The run's folder, and the checkpoint to go on from."""
        leaves_nothing = self.config.find or self.config.trainer.fast_dev_run
        return start(self.config.resume, Path(self.config.output) / self.config.name, not leaves_nothing)

    def _check_run(self) -> None:
        """Refuse flags of the run and the trainer that contradict each other."""
        if (parts := self.config.trainer.accumulate_grad_batches) < 1:
            raise ValueError(f"trainer.accumulate_grad_batches is {parts}: it counts batches, so at least 1")
        if self.config.trainer.limit_train_batches == 0:
            raise ValueError(
                "trainer.limit_train_batches is 0: nothing would be trained; to look at figures alone, evaluate"
            )
        if self.config.find and (self.config.resume or self.config.trainer.fast_dev_run):
            raise ValueError("--find looks before a run begins: leave --resume and --trainer.fast_dev_run out")
        if self.config.weights and self.config.resume not in (None, "auto"):
            raise ValueError(
                "--resume goes on with a run and its optimiser, --weights begins another: give one of them"
            )
        interval = self.config.trainer.val_check_interval
        if isinstance(interval, int | float) and interval <= 0:
            raise ValueError(f"trainer.val_check_interval is {interval}: give a share of the epoch, or some batches")
        if (folder := self.config.trainer.default_root_dir) is not None:
            raise ValueError(f"a run's folder is OUTPUT/NAME/TIME: give --output {folder} in the place of "
                             "--trainer.default_root_dir")  # fmt: skip

    def clean_up(self) -> None:
        """Take away the folder that was made for this run, unless it has trained."""
        if self._start is not None and self._start.made:
            remove(self._start.folder)

    def _make_parts(self, section: Namespace) -> dict[str, Any]:
        """The arguments of a section, its parts made as those of a checkpoint are: from recipes."""
        try:
            return {name: rebuild(plain(value, self.trust), self.trust) for name, value in vars(section).items()}
        except RecipeError as error:
            raise RecipeError(f"{self.resumed}: {error}" if self.resumed else str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer with our loggers and callbacks beside those of the configuration."""
        given = self.config_init.trainer
        # What Lightning makes of `ddp` and `auto`: gradients lie in the buffers that are sent, and not twice in memory
        StrategyRegistry.register("ddp", DDPStrategy, override=True, start_method="popen", gradient_as_bucket_view=True)
        settings: dict[str, Any] = {"default_root_dir": str(self.folder)}
        settings["plugins"] = [*listed(given.plugins), WholeFiles(), *([SyncNorms()] if given.sync_batchnorm else [])]
        bar = self._shows_bar(given) or (_has_bar(given) and given.enable_progress_bar is not False)
        settings["enable_progress_bar"] = bar and not self.config.find
        self.guard = Guard(self.folder, self.datamodule.hparams["timeout"])
        if self.config.find:
            return super().instantiate_trainer(**settings, **tuning.SETTINGS, callbacks=[], **kwargs)
        settings["callbacks"] = self._callbacks(given)
        if given.logger is not False:
            settings["logger"] = self._loggers(given)
        return super().instantiate_trainer(**settings, **kwargs)

    def _shows_bar(self, given: Namespace) -> bool:
        """Whether ours is shown: to a person at a terminal who has not chosen another."""
        return given.enable_progress_bar is not False and Console().is_terminal and not _has_bar(given)

    def _callbacks(self, given: Namespace) -> list[Callback]:
        bar = self._shows_bar(given)
        callbacks: list[Callback] = [self.guard, *listed(given.callbacks), Throughput(line_every=0 if bar else 60)]
        callbacks += [
            PredictionPictures(str(self.folder)),
            Results(),
            SplitFile(self.folder),
            ProposalRecall(),
            SampledForeground(),
            Tracking(self.folder, self.config.log_model),
        ]
        if bar:
            callbacks.append(Bar())
        if self._saves:
            callbacks += [KeepBest(self.folder), KeepLast(self.folder, self.config.save_every)]
        return callbacks

    def _loggers(self, given: Namespace) -> list[Logger]:
        loggers: list[Logger] = [MetricsFile(self.folder)]
        if given.logger is not None and given.logger is not True:
            return [*loggers, *listed(given.logger)]
        if self.config.wandb != "off" and os.environ.get("WANDB_MODE") != "disabled":
            plain = yaml.safe_load(self.parser.dump(self.config))
            shown = {name: self.config[f"wandb_{name}"] for name in RUN_FLAGS}
            loggers.append(Tracker(self.config.wandb, self.folder, plain, shown))
        return loggers

    def fit(self) -> None:
        """Train to the end, or on from the checkpoint; with `--find` only look for what is wanted."""
        if self.config.find == "lr":
            tuning.find_lr(self.trainer, self.model, self.datamodule, self.folder)
            return
        if self.config.find:
            tuning.find_batch_size(self.trainer, self.model, self.datamodule)
            return
        writes = _rank() == 0 and not self.config.trainer.fast_dev_run
        if writes:
            slots = state_per_parameter(self.model.optimizer)
            check_start(self.folder, self.model, slots, 2 * self.datamodule.hparams["num_workers"])
        with alone(self.folder) if writes else nullcontext():
            self._train(writes)

    def _train(self, writes: bool) -> None:
        if writes:
            never = never_validates(self.trainer)
            if never and self._saves:
                log.warning("%s: this run is never validated, so it keeps no %s, but %s", never, BEST, LAST)
            self._write_readme(validated=not never)
            if not self.checkpoint:  # figures of a run that ended before its first checkpoint, and begins again
                (self.folder / "metrics.csv").unlink(missing_ok=True)
        parameters = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        total, trained = sum(n for n, _ in parameters), sum(n for n, trains in parameters if trains)
        log.info("detector: %.1f M parameters, of which %.1f M train", total / 1e6, trained / 1e6)
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint)
        if not self.guard.begun and not self.checkpoint:  # one that goes on may have been at its end
            raise SettingsError(
                "nothing was trained: max_epochs, max_steps, max_time or limit_train_batches of trainer leave no step",
                on_all_ranks=True,
            )
        if writes:
            self._write_readme(validated=(self.folder / BEST).is_file())
        if not self.guard.begun:
            log.warning("no batch was left to train on: to go on further raise --trainer.max_epochs or max_steps")
        if not self.config.trainer.fast_dev_run:
            log.info("the run is in %s", self.folder)

    @property
    def _saves(self) -> bool:
        return self.config.trainer.enable_checkpointing is not False

    def _write_readme(self, validated: bool) -> None:
        packages = packages_of([dict(self.model.hparams), dict(self.datamodule.hparams)])
        write_readme(self.folder, packages, validated, self._saves)


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0))  # Lightning's, known before the processes meet


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 for a mistake in flags, configuration or data, 75 for a signal."""
    set_up_output()
    import_from_working_directory()
    try:
        cli = FitCLI(sys.argv[1:] if args is None else args)
    except (ValueError, FileNotFoundError) as error:
        return _fail(error)
    except UNEXPLAINED as error:
        if os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        return _fail(RunError(unexplained(error, "can't be built")))
    try:
        cli.fit()
    except Interrupted as stop:
        log.warning("%s", stop)
        return 0 if _rank() else INTERRUPTED  # Lightning kills all ranks when another one ends with an error
    except Exception as error:
        begun, sentence = cli.guard.begun, explain(error)
        if not begun:
            cli.clean_up()
            if sentence is None and not os.environ.get("JSONARGPARSE_DEBUG"):
                sentence = unexplained(error, "can't be trained with")
        if sentence is not None and not (_rank() and getattr(error, "on_all_ranks", False)):
            sys.stderr.write(f"error: {sentence}{f' (rank {_rank()})' if _rank() else ''}\n")
        end_other_ranks(cli.trainer, error)
        if sentence is None:
            raise
        return 2 if isinstance(error, DataError | SettingsError) or (not begun and _is_mistake(error)) else 1
    return 0


def _is_mistake(error: Exception) -> bool:
    """Whether settings are to blame for what ended a run before its first step, and not the machine."""
    return explain(error) is None or isinstance(error, ValueError | MisconfigurationException)


def _has_bar(given: Namespace) -> bool:
    return any(isinstance(callback, ProgressBar) for callback in listed(given.callbacks))


def listed(value: Any) -> list[Any]:
    """A setting that may be one, several or none, as a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _fail(error: Exception) -> int:
    if _rank() == 0:
        sys.stderr.write(f"error: {cause(' '.join(str(error).split()))}\n")
    return 2
