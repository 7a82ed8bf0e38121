"""What a command says in the terminal: our log, and of Lightning's what is worth reading."""

from __future__ import annotations

import logging
import re
import warnings

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.logging import RichHandler

LOGGERS = ("detection", "lightning.pytorch", "lightning.fabric")
NOISE = re.compile(
    r"GPU available|TPU available|HPU available|.*Tip: |.*litlogger|Seed set to|.*Trainer.fit. stopped|"
    r"Loading `.*_dataloader` to|Restor(ing|ed) (all )?states|LR finder stopped early|"
    r"`weights_only` was not set|Finished batch size"
)
MISLEADING = (
    ".*You have overridden `on_before_batch_transfer` in `LightningModule`.*",  # on purpose: it checks the batch
    ".*does not have many workers.*",  # more than the cores of this machine would be slower
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # the metric is the same on every rank
    "(?s).*Jsonargparse|.*skip_none parameter was deprecated.*",  # Lightning's own calls
    "(?s).*Dump of a value that does not round-trip: a tuple.*",  # defaults of albumentations, which takes lists too
    ".*isinstance.treespec, LeafSpec.* is deprecated.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*Checkpoint directory .* exists and is not empty.*",  # config.yaml is written before
    ".*no val dataloader.*limit_val_batches.*",
)


def set_up_output() -> None:
    """Show our log and Lightning's warnings once (first rank), without what misleads or repeats."""
    rich = RichHandler(show_path=False, show_level=False, log_time_format="%H:%M:%S")
    handler = rich if Console(stderr=True).is_terminal else logging.StreamHandler()
    handler.addFilter(lambda record: not NOISE.match(record.getMessage()))
    level = logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.ERROR
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    for message in MISLEADING:
        warnings.filterwarnings("ignore", message)
