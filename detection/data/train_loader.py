"""The loader of training batches, which a run can leave and take up again in the middle of an epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from detection.batch import Batch
from detection.data.dataset import DetectionDataset, Sample
from detection.data.records import DataError
from detection.data.samplers import TrainBatchSampler, rank_and_world

log = logging.getLogger(__name__)


class TrainLoader(DataLoader[Sample]):
    """A DataLoader that Lightning can save and resume in the middle of an epoch.

    Its state counts the batches handed out, not those that workers have fetched ahead. A resumed run sees exactly the
    batches, and the augmentations, that an unbroken run would have seen. Between two batches, when all of the first
    one's step is done, `between_steps` is called.

    Images that can't be read, in whose place the data set drew others, are named in a warning, each once. When they
    are more than `dataset.max_unreadable`, counted on each rank for itself, that is a DataError.
    """

    batch_sampler: TrainBatchSampler

    def __init__(self, dataset: DetectionDataset, batch_sampler: TrainBatchSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self.between_steps: Callable[[], None] = lambda: None
        self._epoch, self._handed_out = 0, 0
        self._unreadable: dict[str, None] = {}
        self._most_unreadable = dataset.max_unreadable

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._epoch, self._handed_out = self.batch_sampler.epoch, self.batch_sampler.start_batch
        for batch in super().__iter__():
            self._handed_out += 1
            self._report(batch.unreadable)
            yield batch
            self.between_steps()

    def _report(self, unreadable: tuple[str, ...]) -> None:
        for problem in unreadable:
            if problem not in self._unreadable:
                self._unreadable[problem] = None
                log.warning("%s. Another image is trained on in its place", problem)
        if len(self._unreadable) > self._most_unreadable:
            raise DataError(
                f"{len(self._unreadable)} images can't be read, more than max_unreadable allows "
                f"({self._most_unreadable}); restore them: {' | '.join(self._unreadable)}"
            )

    def state_dict(self) -> dict[str, int]:
        """Epoch and batch that come next, and how many processes share the epoch, in batches of which size."""
        state = self.batch_sampler.state_dict()
        if self._epoch == self.batch_sampler.epoch:
            done = self._handed_out >= len(self)
            state = {"epoch": self._epoch + done, "start_batch": 0 if done else self._handed_out}
        return state | {"world": rank_and_world()[1], "batch_size": self.batch_sampler.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        start, world, size = state["start_batch"], rank_and_world()[1], self.batch_sampler.batch_size
        before = state["world"], state.get("batch_size", size)
        if start and before != (world, size):
            rank_zero_warn(
                f"The run was stopped at batch {start} of an epoch that {before[0]} processes shared, {before[1]} "
                f"images a batch; now there are {world}, with {size}: images of that epoch may be seen twice or not "
                "at all."
            )
            start = min(start * before[0] * before[1] // (world * size), len(self))
        self.batch_sampler.load_state_dict({"epoch": state["epoch"], "start_batch": start})
        self._epoch, self._handed_out = state["epoch"], start
