"""Which images make a batch: aspect-ratio groups and repeats of rare classes, by rank, repeatable and resumable."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from detection.data.images import KEPT_PIXELS
from detection.data.store import RecordStore


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where torch.distributed isn't running."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def repeat_factors(store: RecordStore, threshold: float) -> Tensor:
    """How often each image should be seen in an epoch so that rare classes are (LVIS, Gupta et al. 2019, section 5).

    A class on a fraction `f` of the images has the factor `max(1, sqrt(threshold / f))`; an image has the largest
    factor of its classes, and 1 without objects. Crowds and difficult objects count.

    Returns:
        `(R,)` float64, each at least 1.
    """
    count = len(store)
    images = torch.repeat_interleave(torch.arange(count), store.object_ends.diff())
    pairs = torch.unique(torch.stack([images, store.labels]), dim=1)
    fraction = torch.bincount(pairs[1]).double() / max(count, 1)
    by_class = (threshold / fraction).sqrt().clamp(min=1.0)
    return torch.ones(count, dtype=torch.float64).scatter_reduce(0, pairs[0], by_class[pairs[1]], "amax")


def has_objects(store: RecordStore) -> Tensor:
    """`(R,)` bool, whether there is anything to train on but background; ignore regions are not."""
    images = torch.repeat_interleave(torch.arange(len(store)), store.object_ends.diff())
    return torch.bincount(images[~store.iscrowd], minlength=len(store)) > 0


class TrainBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(index, seed)` for training, where `seed` decides the augmentation of that draw.

    One order of the whole epoch follows from `(seed, epoch)` on every rank alike; it is cut into batches, and rank r
    takes batches r, r + W, r + 2W of W ranks. The order is first padded from its own beginning to a multiple of
    `batch_size * W`, so that ranks take equally many batches, all full. Without padding the ranks are disjoint and
    together hold every image. The rank is read when iteration begins, so the sampler may be built before
    torch.distributed starts.

    Args:
        store: the records.
        batch_size: images a batch, on one device.
        seed: of order and augmentation.
        group_by_aspect: fill batches from images at least as wide as high, or from the others, which saves padding;
            only what is left over at the end of an epoch is mixed.
        repeat_threshold: see `repeat_factors`; 0 shows every image once an epoch. Fractional factors are rounded by
            chance anew in each epoch, the length of the epoch stays the same.
        same_every_epoch: have the order and augmentation of the first epoch in all, to overfit a few batches.
        empty_share: of the images without objects that an epoch shows, drawn anew in each.

    Tiles of the same files come near each other, so that a worker decodes a file once and not for each tile: the files
    are put in random order and taken together, as many as a worker keeps (`RecentImages`); among the tiles of these the
    order is random.
    """

    def __init__(
        self,
        store: RecordStore,
        batch_size: int,
        seed: int = 0,
        group_by_aspect: bool = True,
        repeat_threshold: float = 0.0,
        same_every_epoch: bool = False,
        empty_share: float = 1.0,
    ) -> None:
        if not len(store):
            raise ValueError("the training split holds no image")
        self.batch_size = batch_size
        self.seed = seed
        self.same_every_epoch = same_every_epoch
        self.epoch = 0
        self.start_batch = 0
        height, width = store.sizes.unbind(1)
        self._groups = (width >= height).long() if group_by_aspect else torch.zeros_like(width)
        factors = torch.ones(len(store), dtype=torch.float64)
        if repeat_threshold:
            factors = repeat_factors(store, repeat_threshold)
        if empty_share < 1:
            factors[~has_objects(store)] *= empty_share
        self._factors = factors
        self._files, self._pixels = store.files, None if store.windows is None else store.windows[:, 2:].prod(dim=1)
        self._draws = int(factors.sum().ceil())

    @property
    def sampler(self) -> TrainBatchSampler:
        """Itself: Lightning calls `batch_sampler.sampler.set_epoch` before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Change the order; a new epoch begins at its first batch, the one restored stays where it was."""
        if epoch != self.epoch:
            self.epoch, self.start_batch = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch on one rank."""
        return -(-self._draws // (self.batch_size * rank_and_world()[1]))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, world = rank_and_world()
        batches = self._batches(world)[rank::world][self.start_batch :]
        self.start_batch = 0
        yield from batches

    def _batches(self, world: int) -> list[list[tuple[int, int]]]:
        epoch = 0 if self.same_every_epoch else self.epoch
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = self._order(generator)
        missing = -len(order) % (self.batch_size * world)
        order = torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]])
        seeds = torch.randint(2**62, (len(order),), generator=generator)
        # positions of one group, cut into full batches; what is left over makes mixed batches
        positions = [torch.nonzero(self._groups[order] == group).flatten() for group in (0, 1)]
        full = [p[: len(p) - len(p) % self.batch_size] for p in positions]
        rest = torch.cat([p[len(f) :] for p, f in zip(positions, full, strict=True)])
        batches = torch.cat([*full, rest]).view(-1, self.batch_size)
        shuffled = torch.randperm(len(batches), generator=generator)
        batches = batches[shuffled if self._files is None else batches.amin(dim=1).argsort()]
        return [list(zip(order[b].tolist(), seeds[b].tolist(), strict=True)) for b in batches]

    def _order(self, generator: torch.Generator) -> Tensor:
        """The epoch's draws `(D,)`: each image floor or ceil of its factor times, in random order."""
        order = torch.randperm(len(self._factors), generator=generator)
        upto = self._factors[order].cumsum(0)
        upto[-1] = self._draws
        # systematic sampling: an image gets a copy for every whole number that its stretch of the sum passes
        ticks = (upto + torch.rand((), generator=generator, dtype=torch.float64)).floor().long()
        draws = order.repeat_interleave(ticks.diff(prepend=ticks.new_zeros(1)))
        draws = draws[torch.randperm(len(draws), generator=generator)]
        return draws if self._files is None else self._file_by_file(draws, generator)

    def _file_by_file(self, draws: Tensor, generator: torch.Generator) -> Tensor:
        """The draws `(D,)` in their order, but for those of other files, which come in groups that a worker keeps."""
        assert self._files is not None and self._pixels is not None
        order = torch.randperm(int(self._files.max()) + 1, generator=generator)
        pixels = torch.zeros_like(order).scatter(0, self._files, self._pixels)
        groups = torch.empty_like(order)
        before = pixels[order].cumsum(0) - pixels[order]
        groups[order] = before // (KEPT_PIXELS // 2)  # the last of a group may reach over it, by as much at most
        return draws[groups[self._files[draws]].argsort(stable=True)]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "start_batch": self.start_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at batch `start_batch` of `epoch`, both counted on one rank."""
        self.epoch, self.start_batch = state["epoch"], state["start_batch"]
